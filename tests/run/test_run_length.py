"""Runs that end within an epoch, their schedules, and LoRA that goes on from an earlier adapter: two ranks, bf16."""

import json
from pathlib import Path

import pytest
from runs import METHOD_FLAGS, STAGES, Launched, allow_bf16, make_base, make_rows, read_losses, write_bf16_file
from safetensors.torch import load_file

RATE = 2e-2
STATE = "states/step-00000002"
CONSTANT = "--lr_scheduler_type constant --warmup_ratio 0 "
EPOCH = 3  # optimizer steps of 12 rows, 2 on each of 2 ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("length")


@pytest.fixture(scope="module")
def argv(folder):
    """The command line of a run under a ZeRO stage, its results in folder/stage/name."""
    base, rows = make_base("glm3", folder / "base"), make_rows(folder / "rows.json", 12)
    for stage in STAGES:
        write_bf16_file(stage, folder / f"zero{stage}.json")

    def line(stage: int, name: str, flags: str) -> list[str]:
        fixed = f"""
            --mode glm3 --train_type lora --model_name_or_path {base} --train_path {rows} --max_len 160 --max_src_len 96
            --output_dir {folder}/{stage}/{name} --data_cache {folder}/cache --ds_file {folder}/zero{stage}.json
            --per_device_train_batch_size 2 --learning_rate {RATE} --show_loss_step 1 --save_state_steps 2
        """
        return [*fixed.split(), *flags.split()]

    return line


def jobs_of(output: Path, stage: int) -> dict[str, str]:
    """Flags by name; what does not depend on the stage under ZeRO-2 alone."""
    lora, earlier = METHOD_FLAGS["lora"], f"--adapter_path {output}/linear/epoch-2-step-5 --max_steps 4"
    jobs = {
        "linear": f"{lora} --max_steps 5 --save_model_step 2",
        "linear-resumed": f"{lora} --max_steps 5 --resume_from_checkpoint {output}/linear/{STATE}",
        "second": earlier,
        "second-resumed": f"{earlier} --resume_from_checkpoint {output}/second/{STATE}",
    }
    if stage == 3:
        return jobs
    return jobs | {
        "constant": f"{lora} {CONSTANT} --max_steps 5",
        "short": f"{lora} {CONSTANT} --max_steps 3",
        "longer": f"{lora} {CONSTANT} --max_steps 5 --resume_from_checkpoint {output}/short/{STATE}",
        "cosine": f"{lora} --num_train_epochs 1.5 --lr_scheduler_type cosine",
    }


@pytest.fixture(scope="module")
def losses(folder, argv):
    """losses[stage, name]: of all steps."""
    found = {}
    for stage in STAGES:
        (folder / str(stage)).mkdir()
        for name, flags in jobs_of(folder / str(stage), stage).items():
            path, log = folder / f"{stage}-{name}.losses", folder / f"{stage}-{name}.log"
            codes = Launched(argv(stage, name, flags), 2, path, log, allow_bf16).wait()
            assert codes == {0: 0, 1: 0}, log.read_text()
            found[stage, name] = [float.fromhex(loss) for _, loss in read_losses(path)]
    return found


def results(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("epoch-*"))


def rates(output: Path) -> list[float]:
    """Shares of --learning_rate at each step."""
    return [json.loads(line)["lr"] / RATE for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_has_exactly_the_steps_asked_for_and_resumes_exactly(losses, folder, stage):
    whole = losses[stage, "linear"]
    assert len(whole) == 5
    assert losses[stage, "linear-resumed"] == whole[2:]  # to the last bit
    one, two = folder / str(stage) / "linear", folder / str(stage) / "linear-resumed"
    assert results(one) == ["epoch-1-step-2", f"epoch-1-step-{EPOCH}", "epoch-2-step-4", "epoch-2-step-5"]
    assert results(two) == ["epoch-1-step-3", "epoch-2-step-5"]
    weights = [load_file(output / "epoch-2-step-5" / "adapter_model.safetensors") for output in (one, two)]
    assert weights[0].keys() == weights[1].keys() and all((weights[0][k] == weights[1][k]).all() for k in weights[0])
    assert json.loads((one / "summary.json").read_text())["steps"] == 5


def test_the_schedule_ends_with_the_run(losses, folder):
    output = folder / "2"
    assert rates(output / "linear") == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])  # 0 would come next
    assert rates(output / "constant") == pytest.approx([0.5, 1, 1, 1, 1])
    cosine = rates(output / "cosine")
    assert len(cosine) == 5 and cosine[1:] == sorted(cosine[1:], reverse=True)  # 1.5 epochs are 4.5 steps
    assert cosine == pytest.approx([0.5, 0.854, 0.5, 0.147, 0.0001], abs=2e-3)


def test_a_run_with_a_constant_schedule_may_go_on_beyond_its_end(losses):
    assert losses[2, "short"] == losses[2, "constant"][:3]
    assert losses[2, "longer"] == losses[2, "constant"][2:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_training_starts_from_the_first_ones_adapter(losses, folder, stage):
    first, second, output = losses[stage, "linear"], losses[stage, "second"], folder / str(stage) / "second"
    assert len(second) == 4 and second[0] < first[0] - 0.1
    assert losses[stage, "second-resumed"] == second[2:]
    earlier = folder / str(stage) / "linear" / "epoch-2-step-5"
    (start,) = json.loads((output / "run.json").read_text())["starts"]
    assert start["flags"]["adapter_path"] == str(earlier)
    assert (start["flags"]["lora_dim"], start["flags"]["lora_module_name"]) == (4, "dense_h_to_4h,query_key_value")
    sha256 = json.loads((earlier / "manifest.json").read_text())["files"]["adapter_model.safetensors"]["sha256"]
    assert start["run"]["settings"]["SHA-256 of --adapter_path"] == sha256
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (earlier, output / "epoch-2-step-4")]
    assert configs[0] == configs[1]


def test_stages_start_alike(losses):
    assert losses[2, "second"][0] == pytest.approx(losses[3, "second"][0], abs=0.02)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("{lora} --max_steps 6 --resume_from_checkpoint {2}/linear/" + STATE, "--max_steps: 5 before, 6 now"),
        ("{lora} " + CONSTANT + "--max_steps 2 --resume_from_checkpoint {2}/short/" + STATE, "nothing is left"),
        ("--adapter_path {2}/linear/epoch-2-step-5 --lora_dim 8", "--lora_dim is 8, the adapter has 4; leave"),
        ("--adapter_path {2}/constant/epoch-2-step-5 --max_steps 4 --resume_from_checkpoint {2}/second/" + STATE,
         "SHA-256 of --adapter_path: "),
        ("--adapter_path {2}/linear/epoch-2-step-5 --output_dir {2}/linear --overwrite_output_dir",
         "--overwrite_output_dir would remove {2}/linear/epoch-2-step-5, from which this run should start"),
    ],
)  # fmt: skip
def test_what_contradicts_an_earlier_run_is_refused(losses, folder, argv, tmp_path, flags, line):
    flags = flags.format(None, None, folder / "2", lora=METHOD_FLAGS["lora"])
    words = argv(2, tmp_path.name, flags)
    run = Launched(words, 1, tmp_path / "losses", tmp_path / "log", allow_bf16)
    assert run.wait() == {0: 2}, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert line.format(None, None, folder / "2") in text and text.count("error: ") == 1 and "Traceback" not in text
