"""P-Tuning prefixes that are stored alone, as the official scripts save them: read beside their base, trained on,
written, and loaded by the steps of the official demos.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, enliven, make_lively_checkpoint, write_model
from jobs import run_jobs
from runs import ROOT, STAGES, make_rows
from safetensors.torch import load_file, save_file

import merge_lora
import predict
import train
from glm_models import MODE
from glm_models.checkpoint import CheckpointError, read_json, write_json
from glm_models.convert import __main__ as convert
from glm_models.prefix import FULL_PREFIX, read_prefix
from tuning.engine.loading import load_result
from tuning.errors import FolderError, UserError
from tuning.lora.adapter import BASE_FILE, record_base
from tuning.lora.prefix import start_from_prefix, take_prefix

KINDS = [(mode, projection) for mode in MODE for projection in (False, True)]
kinds = pytest.mark.parametrize(("mode", "projection"), KINDS)
LENGTH = 5
IDS = torch.arange(5, 41)[None]


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """folders[mode, projection]: a whole P-Tuning model, and the folder that the official trainer saves of it."""
    top, found = tmp_path_factory.mktemp("prefixes"), {}
    for mode, projection in KINDS:
        changes = {"pre_seq_len": LENGTH, "prefix_projection": projection}
        config = MODE[mode].config.from_pretrained(tiny[mode], **changes)
        model = MODE[mode].model.from_pretrained(tiny[mode], config=config, new_prefix=True)
        enliven(model.transformer.prefix_encoder)
        whole, alone = top / f"{mode}-{projection}", top / f"{mode}-{projection}-alone"
        for folder, more in ((whole, {}), (alone, {"_name_or_path": str(tiny[mode])})):
            shutil.copytree(tiny[mode], folder)
            write_json(str(folder / "config.json"), read_json(str(folder / "config.json")) | changes | more)
        write_model(model, str(whole))
        (alone / "model.safetensors").unlink()
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if "prefix_encoder" in name}
        assert len(trained) == (5 if projection else 1)
        torch.save(trained, alone / "pytorch_model.bin")
        found[mode, projection] = whole, alone
    return found


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def result_logits(mode: str, folder, base=None, **more) -> torch.Tensor:
    return logits(load_result(mode, str(folder), base and str(base), "cpu", **more)[1])


def forms(alone: Path, folder: Path) -> dict[str, Path]:
    """A prefix in the forms in which people have it."""
    weights = torch.load(alone / "pytorch_model.bin", weights_only=True)
    checkpoint = shutil.copytree(alone, folder / "checkpoint-3000")  # of transformers' Trainer
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (checkpoint / name).write_bytes(b"cos\nsystem\n(S'touch " + str(folder).encode() + b"/ran'\ntR.")
    (checkpoint / "trainer_state.json").write_text("{}")
    safe = shutil.copytree(alone, folder / "safe")
    (safe / "pytorch_model.bin").unlink()
    save_file(weights, safe / "model.safetensors", metadata={"format": "pt"})
    stripped = folder / "prefix_encoder.pt"
    torch.save({name.removeprefix(FULL_PREFIX): tensor for name, tensor in weights.items()}, stripped)
    return {"trainer": checkpoint, "safetensors": safe, "stripped": stripped, "file": safe / "model.safetensors"}


@kinds
def test_a_prefix_beside_its_base_answers_as_the_whole_model(mode, projection, folders, tiny, tmp_path, capsys):
    whole, alone = folders[mode, projection]
    expected = result_logits(mode, whole)
    assert not torch.equal(expected, result_logits(mode, tiny[mode]))
    capsys.readouterr()
    assert torch.equal(result_logits(mode, alone), expected)
    said = capsys.readouterr().out
    assert f"is a P-Tuning prefix alone (pre_seq_len 5, prefix_projection {projection}); its base model is" in said
    assert "only names and shapes can show" in said
    for path in forms(alone, tmp_path).values():
        assert torch.equal(result_logits(mode, path, tiny[mode]), expected)
    assert not (tmp_path / "ran").exists()


def test_a_prefix_in_float16_goes_with_a_base_of_another_type(folders, tiny, tmp_path):
    whole, alone = folders["glm3", True]
    half = {name: tensor.half() for name, tensor in torch.load(alone / "pytorch_model.bin").items()}
    torch.save(half, tmp_path / "half.bin")
    joined = shutil.copytree(whole, tmp_path / "joined")
    save_file(load_file(whole / "model.safetensors") | half, joined / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.bfloat16, torch.float32):
        found = result_logits("glm3", tmp_path / "half.bin", tiny["glm3"], dtype=dtype)
        assert found.dtype == dtype and torch.equal(found, result_logits("glm3", joined, dtype=dtype))
    large = half | {EMBEDDING: half[EMBEDDING].float().index_fill(0, torch.tensor([0]), 1e5)}
    torch.save(large, tmp_path / "large.bin")
    assert result_logits("glm3", tmp_path / "large.bin", tiny["glm3"], dtype=torch.bfloat16).isfinite().all()
    with pytest.raises(CheckpointError, match=r"embedding.weight has values that torch.float16 does not have"):
        result_logits("glm3", tmp_path / "large.bin", tiny["glm3"], dtype=torch.float16)


def arguments(mode: str, base, *more: str):
    return ["--mode", mode, "--model_name_or_path", str(base), "--train_path", __file__, "--train_type", "ptuning",
            *map(str, more)]  # fmt: skip


# Training

# ZeRO stage, type of numbers
CASES = dict.fromkeys(KINDS, (2, "float32"))
CASES |= {("glm3", True): (2, "bfloat16"), ("glm", False): (3, "bfloat16"), ("glm2", True): (3, "bfloat16")}


@pytest.fixture(scope="module")
def runs(folders, tiny, tmp_path_factory):
    """Losses and folder of results of trainings on two ranks: on from whole models, and from prefixes alone."""
    top = tmp_path_factory.mktemp("prefix-runs")
    rows, jobs = make_rows(top / "rows.json", 12), {}
    fixed = f"--train_path {rows} --data_cache none --max_len 96 --max_src_len 64 --max_steps 3 --learning_rate 1e-2"
    fixed += f" --train_type ptuning --pre_seq_len {LENGTH} --show_loss_step 1 --warmup_ratio 0"
    for (mode, projection), (stage, dtype) in CASES.items():
        content = read_json(str(ROOT / STAGES[stage])) | {"bf16": {"enabled": dtype == "bfloat16"}}
        write_json(str(top / f"zero{stage}-{dtype}.json"), content)
        whole, alone = folders[mode, projection]
        name = f"{mode}-{projection}"
        some = f"--mode {mode} --prefix_projection {projection} --ds_file {top}/zero{stage}-{dtype}.json {fixed}"
        from_prefix = f"{some} --model_name_or_path {tiny[mode]} --ptuning_checkpoint {alone} --save_prefix_only"
        jobs[f"{name}-whole"] = f"{some} --model_name_or_path {whole}"
        jobs[f"{name}-prefix"] = f"{from_prefix} --save_state_steps 2"
        if dtype == "bfloat16":
            jobs[f"{name}-resumed"] = f"{from_prefix} --resume_from_checkpoint {top}/{name}-prefix/states/step-00000002"
    argv = {name: f"{flags} --output_dir {top / name}".split() for name, flags in jobs.items()}
    return run_jobs(top, 2, argv), top


@kinds
def test_training_goes_on_and_is_saved_for_the_official_demos(mode, projection, runs, folders, tiny):
    losses, top = runs
    name, dtype = f"{mode}-{projection}", getattr(torch, CASES[mode, projection][1])
    expected, found = losses[f"{name}-whole"], losses[f"{name}-prefix"]
    assert len(found) == 3 and found[0] == expected[0]
    # later ones up to rounding: how a weight lies in its file decides on the order of sums
    assert found == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    (whole,), (alone,) = (list(top.glob(f"{name}-{kind}/epoch-*-step-3")) for kind in ("whole", "prefix"))
    assert not list(alone.glob("*.safetensors"))
    config = read_json(str(alone / "config.json"))
    assert (config["pre_seq_len"], config["prefix_projection"]) == (LENGTH, projection)
    assert config["_name_or_path"] == str(tiny[mode])
    stored = torch.load(alone / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    before = read_prefix(str(folders[mode, projection][1])).weights
    assert all((tensor - before[name.removeprefix(FULL_PREFIX)]).abs().max() > 1e-3 for name, tensor in stored.items())

    expected = load_file(whole / "model.safetensors")
    for part, tensor in stored.items():
        torch.testing.assert_close(tensor, expected[part], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(logits(load_as_the_official_demos(mode, tiny[mode], alone)), result_logits(mode, alone))
    if dtype == torch.bfloat16:
        (resumed,) = top.glob(f"{name}-resumed/epoch-*-step-3")
        again = torch.load(resumed / "pytorch_model.bin", weights_only=True)
        assert all(torch.equal(again[name], stored[name]) for name in stored)
        assert losses[f"{name}-resumed"] == losses[f"{name}-prefix"][2:]


def load_as_the_official_demos(mode: str, base: str, checkpoint: Path):
    """The steps of web_demo.py (ChatGLM-6B, ChatGLM2-6B) and composite_demo (ChatGLM3) with a ptuning checkpoint: a
    model of the base with pre_seq_len, then the file's weights, their first names cut off, into its prefix encoder."""
    asked = read_json(str(checkpoint / "config.json"))
    config = MODE[mode].config.from_pretrained(base)
    config.pre_seq_len, config.prefix_projection = asked["pre_seq_len"], asked["prefix_projection"]
    model = MODE[mode].model.from_pretrained(base, config=config, new_prefix=True).float()
    start = "transformer.prefix_encoder."
    found = torch.load(os.path.join(checkpoint, "pytorch_model.bin"))
    found = {name[len(start) :]: tensor for name, tensor in found.items() if name.startswith(start)}
    model.transformer.prefix_encoder.load_state_dict(found)
    return model.eval()


def test_the_base_of_a_written_prefix_is_checked(runs, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tuning.lora.prefix.on_rank_0", lambda action: action())
    (alone,) = runs[1].glob("glm2-True-prefix/epoch-*-step-3")
    load_result("glm2", str(alone), None, "cpu")
    assert "has the fingerprint of the base that" in capsys.readouterr().out
    make_lively_checkpoint("glm2", str(tmp_path / "other"), **TINY["glm2"])
    model = MODE["glm2"].model.from_pretrained(tmp_path / "other")
    enliven(model, seed=8)
    write_model(model, str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"another base than .*other: names, types or values"):
        load_result("glm2", str(alone), str(tmp_path / "other"), "cpu")
    flags = ("--pre_seq_len", LENGTH, "--ptuning_checkpoint", alone)
    with pytest.raises(CheckpointError, match=r"another base than .*other: names, types or values"):
        start_from_prefix(train.parse_args(arguments("glm2", tmp_path / "other", *flags)))
    assert len(start_from_prefix(train.parse_args(arguments("glm2", tiny["glm2"], *flags)))) == 1
    copied = shutil.copytree(alone, tmp_path / "copied")
    with open(copied / "pytorch_model.bin", "r+b") as file:
        file.seek(900)
        file.write(b"\xff")
    with pytest.raises(FolderError, match="is not as it was written"):
        load_result("glm2", str(copied), None, "cpu")


def test_the_model_may_be_named_by_its_prefix(folders, tiny, tmp_path):
    _, alone = folders["glm2", True]
    args = train.parse_args(arguments("glm2", alone, "--pre_seq_len", LENGTH))
    take_prefix(args)
    assert (args.model_name_or_path, args.ptuning_checkpoint) == (str(tiny["glm2"]), str(alone))
    args = train.parse_args(arguments("glm2", tiny["glm2"]))
    take_prefix(args)
    assert (args.model_name_or_path, args.ptuning_checkpoint) == (str(tiny["glm2"]), None)
    lost = shutil.copytree(alone, tmp_path / "lost")
    config = read_json(str(lost / "config.json"))
    write_json(str(lost / "config.json"), config | {"_name_or_path": "gone\x1b"})
    with pytest.raises(UserError, match=r"its base gone\\x1b is not here: name the base with --model_name_or_path"):
        take_prefix(train.parse_args(arguments("glm2", lost)))
    with pytest.raises(UserError, match="is not here; name it with --ori_model_dir"):
        load_result("glm2", str(lost), None, "cpu")


# What does not fit


def change(weights: dict, **changes) -> dict:
    return {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}


EMBEDDING = FULL_PREFIX + "embedding.weight"
BROKEN = {
    "a part is missing": ({FULL_PREFIX + "trans.2.bias": None}, {}, "it has embedding.weight, trans.0.bias"),
    "an unknown part": ({FULL_PREFIX + "norm.weight": torch.ones(2)}, {}, "norm.weight, trans.0.bias"),
    "not finite": ({EMBEDDING: torch.full((5, 64), torch.nan)}, {}, "embedding.weight holds NaN or infinity"),
    "whole numbers": ({EMBEDDING: torch.ones(5, 64, dtype=torch.int64)}, {}, "not a weight of a prefix"),
    "two prefixes": ({"other.prefix_encoder.embedding.weight": torch.ones(5, 64)}, {}, "more than one P-Tuning prefix"),
    "another length": ({}, {"pre_seq_len": 16}, "pre_seq_len is 16, but the prefix beside it has 5"),
    "another kind": ({}, {"prefix_projection": False}, "prefix_projection is False, but the prefix beside it has True"),
    "another base": ({EMBEDDING: torch.ones(5, 96)}, {}, "embedding.weight is [5, 96], the base needs [5, "),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_prefix_is_refused_in_one_line(kind, folders, tmp_path):
    changes, config, line = BROKEN[kind]
    folder = shutil.copytree(folders["glm3", True][1], tmp_path / "alone")
    path = folder / "pytorch_model.bin"
    torch.save(change(torch.load(path, weights_only=True), **changes), path)
    write_json(str(folder / "config.json"), read_json(str(folder / "config.json")) | config)
    with pytest.raises(CheckpointError, match=re.escape(line)) as error:
        load_result("glm3", str(folder), None, "cpu")
    assert "\n" not in str(error.value)


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_pickle_runs(folders, tmp_path):
    folder = shutil.copytree(folders["glm3", False][1], tmp_path / "alone")
    torch.save({EMBEDDING: torch.ones(5, 64), "more": Runs(f"touch {tmp_path}/ran")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors; not loaded"):
        load_result("glm3", str(folder), None, "cpu")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is broken"):
        load_result("glm3", str(folder), None, "cpu")


def test_flags_that_differ_from_the_prefix_are_named(folders, tiny, monkeypatch):
    monkeypatch.setattr("tuning.lora.prefix.on_rank_0", lambda action: action())
    whole, alone = folders["glm2", True]

    def start(*flags):
        start_from_prefix(train.parse_args(arguments("glm2", tiny["glm2"], "--ptuning_checkpoint", *flags)))

    with pytest.raises(UserError, match=r"^--pre_seq_len 16: .* keeps its length and kind: --pre_seq_len 5$"):
        start(alone)
    with pytest.raises(UserError, match=r"--prefix_projection False: .* --prefix_projection True$"):
        start(alone, "--pre_seq_len", LENGTH, "--prefix_projection", "False")
    with pytest.raises(CheckpointError, match="does not hold a P-Tuning prefix alone"):
        start(whole)
    with pytest.raises(UserError, match="is a file, but not one of weights"):
        start(__file__)
    lora = ["--train_type", "lora", "--save_prefix_only", "--ptuning_checkpoint", str(alone)]
    with pytest.raises(UserError) as error:
        train.parse_args([*arguments("glm2", tiny["glm2"]), *lora])
    for flag in ("--save_prefix_only", "--ptuning_checkpoint"):
        assert f"{flag} does nothing without --train_type ptuning, and --train_type is lora here" in str(error.value)


def test_who_needs_a_whole_model_says_what_a_prefix_is(folders, tiny, tmp_path, capsys):
    whole, alone = folders["glm2", True]
    base, output = str(tiny["glm2"]), str(tmp_path / "new")
    mode = ["--mode", "glm2"]
    for main, argv in (
        (merge_lora.main, ["--ori_model_dir", base, "--model_dir", str(alone)]),
        (convert.main, ["--model_path", str(alone), "--output_dir", output]),
        (train.main, ["--model_name_or_path", str(alone), "--train_path", str(make_rows(tmp_path / "rows.json", 4)),
                      "--train_type", "freeze", "--train_last_layers", "1", "--output_dir", output]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([*mode, *argv])
        said = capsys.readouterr().err
        assert end.value.code == 2 and "holds a P-Tuning prefix alone, as the official scripts save it" in said
        assert "--ptuning_checkpoint" in said and said.count("error:") == 1
    with pytest.raises(SystemExit):
        predict.main([*mode, "--model_path", str(whole), "--ori_model_dir", base, "--input", "x"])
    assert "--ori_model_dir does nothing for" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict.main([*mode, "--model_path", str(whole / "model.safetensors"), "--input", "x"])
    assert "is a file, but not of a P-Tuning prefix alone" in capsys.readouterr().err


def test_a_file_is_answered_with_a_prefix(folders, tiny, tmp_path, capsys):
    whole, alone = folders["glm3", False]
    file = shutil.copytree(alone, tmp_path / "alone") / "pytorch_model.bin"
    rows = make_rows(tmp_path / "rows.json", 3)
    fixed = ["--mode", "glm3", "--predict_path", str(rows), "--max_new_tokens", "6"]
    predict.main([*fixed, "--model_path", str(whole), "--output_path", str(tmp_path / "whole.jsonl")])
    predict.main([*fixed, "--model_path", str(file), "--ori_model_dir", str(tiny["glm3"])])
    written = tmp_path / "alone" / "predictions-rows.jsonl"
    assert written.read_text() == (tmp_path / "whole.jsonl").read_text()
    record = json.loads(Path(f"{written}.run.json").read_text())
    assert "pytorch_model.bin of --model_path" in record["settings"]
    weights = torch.load(file, weights_only=True)
    torch.save({name: 2 * tensor for name, tensor in weights.items()}, file)
    with pytest.raises(SystemExit):
        predict.main([*fixed, "--model_path", str(file), "--ori_model_dir", str(tiny["glm3"])])
    assert "pytorch_model.bin of --model_path" in capsys.readouterr().err


def test_a_record_of_a_quantised_base_is_obeyed(folders, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tuning.engine.loading.needs_package", lambda what: [f"{what} needs a package"])
    folder = shutil.copytree(folders["glm3", False][1], tmp_path / "alone")
    write_json(str(folder / BASE_FILE), record_base("glm3", str(tiny["glm3"]), torch.float32, 4))
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(UserError, match=r"quantised to 4 bits \(nf4\), needs a package"):
            load_result("glm3", str(path), None, "cpu")
