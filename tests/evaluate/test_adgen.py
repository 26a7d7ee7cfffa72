"""scripts/adgen.sh: what it gives to train.py, the cut of the summaries, its table; the launcher trains nothing."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from glm_models import MODE
from tuning.arguments.train import parse_args
from tuning.metrics import missing

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "这款白色的裙采用宽松的版型，简约的风格让人一眼难忘，穿在身上十分舒适，日常搭配也很方便。" * 2
ROWS = [{"content": "类型#裙*颜色#白色" * n, "summary": SUMMARY[: 30 * n]} for n in (1, 3)]
# notes its words, and saves the base model itself as what was trained
LAUNCHER = """#!/bin/sh
echo "$@" >> "$NOTED"
while [ $# -gt 1 ]; do
  case $1 in --output_dir) output=$2 ;; --model_name_or_path) model=$2 ;; --max_steps) steps=$2 ;; esac
  shift
done
mkdir -p "$output" && cp -r "$model" "$output/epoch-1-step-$steps"
"""


@pytest.fixture
def adgen(tiny, tmp_path):
    """adgen(method, *words, VARIABLE=value): the finished script, in tmp_path."""
    (tmp_path / "deepspeed").write_text(LAUNCHER)
    (tmp_path / "deepspeed").chmod(0o755)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.json").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    paths = {"MODEL": tiny["glm"], "OUTPUT": f"{tmp_path}/out", "NOTED": f"{tmp_path}/noted"}
    paths |= {name.upper(): f"{tmp_path}/{name}.json" for name in ("train", "dev")}
    paths |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(method: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
        environ = os.environ | paths | {"METHODS": method} | variables
        command = ["bash", "scripts/adgen.sh", *words]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)

    return run


def noted(folder: Path) -> list:
    """The flags of train.py in each launch."""
    for name in ("train", "dev"):  # without python nothing made them
        (folder / f"out/{name}.json").touch()
    return [parse_args(line.split(" train.py ")[1].split()) for line in (folder / "noted").read_text().splitlines()]


@pytest.mark.skipif(bool(missing("text")), reason=missing("text"))
def test_a_run_has_the_official_settings_cuts_and_table(adgen, tmp_path, tiny):
    done = adgen("ptuning", "--show_loss_step", "5", STEPS="7", NUM_GPUS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    (args,) = noted(tmp_path)
    assert (args.pre_seq_len, args.prefix_projection, args.learning_rate, args.max_steps) == (128, False, 2e-2, 7)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 2)  # on 2 devices: 16 rows
    assert (args.weight_decay, args.warmup_ratio, args.max_src_len, args.show_loss_step) == (0, 0, 63, 5)
    assert json.loads(Path(args.ds_file).read_text())["optimizer"]["params"]["betas"] == [0.9, 0.999]

    tokenizer = MODE["glm"].tokenizer.from_pretrained(tiny["glm"])
    lengths = [len(ids) for ids in tokenizer.encode_texts([row["summary"] for row in ROWS])]
    assert lengths[0] < 62 < lengths[1]
    for name in ("train", "dev"):
        rows = [json.loads(line) for line in (tmp_path / f"out/{name}.json").read_text().splitlines()]
        kept = [tokenizer.encode_texts([row["output"]])[0] for row in rows]
        assert [len(ids) for ids in kept] == [lengths[0], 62]
    answers = [json.loads(line) for line in (tmp_path / "out/ptuning.jsonl").read_text().splitlines()]
    assert [row["output"] for row in answers] == [row["output"] for row in rows]
    for row in answers:
        assert row["ended"] or len(tokenizer.encode_texts([row["prediction"]])[0]) <= 65 + 2
    table = done.stdout.splitlines()[-3:]
    assert table[0].split() == ["bleu_4", "rouge_1", "rouge_2", "rouge_l"]
    assert "( 8.10)" in table[1] and "(24.97)" in table[1]


def test_other_methods_train_with_their_settings(adgen, tmp_path):
    (tmp_path / "python").symlink_to("/bin/true")  # cuts nothing and predicts nothing: this test is of the training
    done = adgen("lora all")
    assert done.returncode == 0, done.stderr
    lora, all_ = noted(tmp_path)
    assert (lora.train_type, lora.learning_rate, lora.max_steps) == ("lora", 5e-4, 3000)
    assert (lora.lora_dim, lora.lora_alpha, lora.lora_module_name) == (8, 32, "query_key_value")
    assert (all_.train_type, all_.learning_rate, all_.max_steps) == ("all", 1e-4, 3000)
    assert "zero3" in all_.ds_file


@pytest.mark.parametrize(
    ("method", "variables", "message"),
    [
        ("freeze", {}, "METHODS freeze is none"),
        ("all", {"NUM_GPUS": "3"}, "must divide 16"),
        ("all", {"DEV": "missing.json"}, "missing.json is not there"),
    ],
)
def test_wrong_variables_are_answered_at_once(adgen, tmp_path, method, variables, message):
    done = adgen(method, **variables)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()
