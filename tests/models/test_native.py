"""GlmForCausalLM folders in the other scripts: written by train.py, answered with, and refused by name."""

import filecmp
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from jobs import run_jobs
from runs import ROOT, STAGES, make_rows
from test_convert import ALL_FOUR, convert, make_adapter

import merge_lora
import predict
import train
from glm_models import MODE
from glm_models.checkpoint import CheckpointError, read_json, read_weights, write_json
from glm_models.convert import direct
from glm_models.prefix import FULL_PREFIX
from tuning.engine.loading import load_result
from tuning.errors import UserError
from tuning.evaluate import compare, forgetting
from tuning.folders import check_folder
from tuning.lora.adapter import BASE_FILE, record_base

# method, ZeRO stage, both in bfloat16 on two ranks
CASES = {"glm3": ("freeze --train_last_layers 1", 2), "glm2": ("all", 3)}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Folder of results of trainings that differ in --save_format alone, and of one that was resumed."""
    top = tmp_path_factory.mktemp("native-runs")
    rows, jobs = make_rows(top / "rows.json", 12), {}
    fixed = f"--train_path {rows} --data_cache none --max_len 96 --max_src_len 64 --max_steps 3 --learning_rate 1e-2"
    fixed += " --show_loss_step 1 --warmup_ratio 0"
    for mode, (method, stage) in CASES.items():
        content = read_json(str(ROOT / STAGES[stage])) | {"bf16": {"enabled": True}}
        write_json(str(top / f"zero{stage}.json"), content)
        some = f"--mode {mode} --model_name_or_path {tiny[mode]} --train_type {method} --ds_file {top}/zero{stage}.json"
        jobs[f"{mode}-official"] = f"{some} {fixed}"
        jobs[f"{mode}-native"] = f"{some} {fixed} --save_format native --save_state_steps 2 --save_model_step 1 "
        jobs[f"{mode}-native"] += "--keep_results 2"
        state = f"{top}/{mode}-native/states/step-00000002"
        jobs[f"{mode}-resumed"] = f"{some} {fixed} --save_format native --resume_from_checkpoint {state}"
    run_jobs(top, 2, {name: f"{flags} --output_dir {top / name}".split() for name, flags in jobs.items()})
    return top


def result(top: Path, name: str) -> Path:
    return next(top.glob(f"{name}/epoch-*-step-3"))


@pytest.mark.parametrize("mode", CASES)
def test_a_native_result_is_the_conversion_of_the_official_one(mode, runs, tmp_path):
    official, native = result(runs, f"{mode}-official"), result(runs, f"{mode}-native")
    converted = convert(mode, official, tmp_path / "converted")
    names = sorted(name for name in os.listdir(converted) if name not in ("manifest.json", "official"))
    assert sorted(os.listdir(native)) == sorted([*names, "manifest.json", "official"])
    names.remove("model.safetensors")  # its weights may lie in another order
    assert filecmp.cmpfiles(converted, native, names, shallow=False)[1:] == ([], [])
    there, here = (dict(read_weights(str(folder))) for folder in (converted, native))
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)
    side = sorted(os.listdir(converted / "official"))
    assert filecmp.cmpfiles(converted / "official", native / "official", side, shallow=False)[1:] == ([], [])
    back = dict(read_weights(str(convert(mode, native, tmp_path / "back"))))
    expected = dict(read_weights(str(official)))
    assert back.keys() == expected.keys() and {tensor.dtype for tensor in back.values()} >= {torch.bfloat16}
    assert all(torch.equal(back[name], expected[name]) for name in back)


@pytest.mark.parametrize("mode", CASES)
def test_native_results_are_resumed_checked_and_removed_like_others(mode, runs):
    assert [path.name for path in sorted(runs.glob(f"{mode}-native/epoch-*"))] == [
        f"epoch-{epoch}-step-{step}" for epoch, step in ((1, 2), (1, 3))
    ]
    whole, resumed = result(runs, f"{mode}-native"), result(runs, f"{mode}-resumed")
    check_folder(str(whole), nothing_else=True)
    assert (whole / "manifest.json").read_bytes() == (resumed / "manifest.json").read_bytes()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.arange(5, 41)[None]).logits


@pytest.fixture(scope="module")
def native(tiny, tmp_path_factory):
    """native[mode]: the tiny checkpoint as a GlmForCausalLM."""
    top = tmp_path_factory.mktemp("native")
    return {mode: convert(mode, tiny[mode], top / mode) for mode in CASES}


@pytest.mark.parametrize("mode", CASES)
def test_files_are_answered_alike_with_both_forms(mode, runs, tmp_path):
    rows = make_rows(tmp_path / "rows.json", 4)
    fixed = ["--mode", mode, "--predict_path", str(rows), "--max_new_tokens", "8"]
    texts = []
    for form in ("official", "native"):
        output = tmp_path / f"{form}.jsonl"
        predict.main([*fixed, "--model_path", str(result(runs, f"{mode}-{form}")), "--output_path", str(output)])
        texts.append(output.read_text())
        settings = json.loads(Path(f"{output}.run.json").read_text())["settings"]
        texts.append([settings[f"{what} of --model_path"] for what in ("weights", "config.json", "tokenizer")])
    assert texts[:2] == texts[2:]


@pytest.mark.parametrize("mode", CASES)
def test_adapters_of_both_forms_on_a_native_base(mode, tiny, native, tmp_path, capsys):
    adapter = make_adapter(MODE[mode].model.from_pretrained(tiny[mode]), tmp_path / "adapter", ALL_FOUR)
    write_json(str(adapter / BASE_FILE), record_base(mode, tiny[mode], torch.float32))
    other = convert(mode, adapter, tmp_path / "other", "--ori_model_dir", str(native[mode]))
    expected = logits(load_result(mode, str(adapter), tiny[mode], "cpu")[1])
    assert not torch.equal(expected, logits(load_result(mode, tiny[mode], None, "cpu")[1]))
    assert torch.equal(expected, logits(load_result(mode, str(other), None, "cpu")[1]))
    capsys.readouterr()
    assert torch.equal(expected, logits(load_result(mode, str(adapter), str(native[mode]), "cpu")[1]))
    assert "has the fingerprint of the base that" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"convert it first: python -m glm_models.convert .*--output_dir NEW$"):
        load_result(mode, str(other), tiny[mode], "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_native_model_is_loaded_in_any_type(native, tiny, dtype):
    _, expected = load_result("glm3", tiny["glm3"], None, "cpu", dtype)
    tokenizer, found = load_result("glm3", str(native["glm3"]), None, "cpu", dtype)
    assert torch.equal(logits(found), logits(expected)) and found.dtype == dtype
    assert found.generation_config.eos_token_id == tokenizer.stop_token_ids


def test_who_needs_the_official_form_names_the_command(native, tiny, tmp_path, capsys):
    folder, rows = str(native["glm3"]), str(make_rows(tmp_path / "rows.json", 4))
    adapter = make_adapter(MODE["glm3"].model.from_pretrained(tiny["glm3"]), tmp_path / "adapter", ALL_FOUR)
    some = ["--mode", "glm3", "--model_name_or_path", folder, "--train_path", rows, "--output_dir", f"{tmp_path}/new"]
    for main, argv in (
        (train.main, some),
        (train.main, [*some, "--plan"]),
        (train.main, [*some, "--check_data"]),
        (train.main, [*some, "--train_type", "all", "--save_format", "native"]),
        (merge_lora.main, ["--mode", "glm3", "--ori_model_dir", folder, "--model_dir", str(adapter)]),
    ):
        with pytest.raises(SystemExit) as end:
            main(argv)
        said = capsys.readouterr().err
        command = f"python -m glm_models.convert --mode glm3 --model_path {folder} --output_dir NEW"
        assert end.value.code == 2 and command in said and said.count("error:") == 1, said


def test_a_prefix_alone_on_a_native_base_is_refused_with_the_command(native, tiny, tmp_path, capsys):
    alone = shutil.copytree(tiny["glm3"], tmp_path / "prefix")
    (alone / "model.safetensors").unlink()
    write_json(str(alone / "config.json"), read_json(str(alone / "config.json")) | {"pre_seq_len": 2})
    sizes = MODE["glm3"].config.from_pretrained(alone)
    width = 2 * sizes.num_layers * sizes.kv_channels * sizes.multi_query_group_num
    torch.save({f"{FULL_PREFIX}embedding.weight": torch.ones(2, width)}, alone / "pytorch_model.bin")
    load_result("glm3", str(alone), tiny["glm3"], "cpu")
    capsys.readouterr()
    folder = str(native["glm3"])
    with pytest.raises(SystemExit) as end:
        predict.main(["--mode", "glm3", "--model_path", str(alone), "--ori_model_dir", folder, "--device", "cpu"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("error:") == said.count("\n") == 1
    assert "GlmForCausalLM has no place" in said and f"--mode glm3 --model_path {folder} --output_dir NEW" in said


def test_forgetting_takes_a_native_base_and_compare_names_the_command(native, tiny, tmp_path, capsys):
    rows = make_rows(tmp_path / "rows.json", 1)
    row = json.loads(rows.read_text().splitlines()[0]) | {"category": "one"}
    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps(row))
    argv = ["--mode", "glm3", "--base", str(native["glm3"]), "--tuned", tiny["glm3"], "--suite", str(suite)]
    forgetting.main([*argv, "--output", f"{tmp_path}/report.json", "--max_new_tokens", "1", "--device", "cpu"])
    overall = read_json(f"{tmp_path}/report.json")["overall"]
    assert overall["kl"] == pytest.approx(0, abs=1e-5) and overall["agree"] == 1
    capsys.readouterr()
    flags = ["--model", f"glm3={native['glm3']}", "--train_path", str(rows), "--test_path", str(rows)]
    with pytest.raises(SystemExit) as end:
        compare.main([*flags, "--output_dir", f"{tmp_path}/out"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("error:") == said.count("\n") == 1
    assert f"python -m glm_models.convert --mode glm3 --model_path {native['glm3']} --output_dir NEW" in said
    assert not (tmp_path / "out").exists()


def test_what_another_program_has_saved_or_changed_is_refused(native, tmp_path):
    alone = shutil.copytree(native["glm3"], tmp_path / "alone", ignore=shutil.ignore_patterns("official"))
    with pytest.raises(CheckpointError, match="--ori_model_dir"):
        load_result("glm3", str(alone), None, "cpu")
    changed = shutil.copytree(native["glm3"], tmp_path / "changed")
    config = read_json(str(changed / "config.json"))
    write_json(str(changed / "config.json"), config | {"rms_norm_eps": 1e-3})
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        load_result("glm3", str(changed), None, "cpu")
    with pytest.raises(CheckpointError, match="--mode glm"):
        load_result("glm", str(native["glm3"]), None, "cpu")


def test_what_has_no_native_form_is_refused_before_anything_is_loaded(tiny):
    some = ["--model_name_or_path", tiny["glm3"], "--train_path", __file__, "--save_format", "native"]
    for flags, word in (
        ("--mode glm3 --train_type lora", "merge_lora.py"),
        ("--mode glm3 --train_type ptuning", "predict.py"),
        ("--mode glm --train_type all", "ChatGLM-6B"),
    ):
        with pytest.raises(UserError) as error:
            train.parse_args([*some, *flags.split()])
        assert "--save_format native" in str(error.value) and word in str(error.value)


def test_a_wrong_native_result_is_not_kept(tiny, tmp_path, monkeypatch):
    """Bits that changed on the disk; and a network that is not the same."""
    model = MODE["glm3"].model.from_pretrained(tiny["glm3"])
    tensors = dict(model.named_parameters())

    def write(name: str) -> list[str]:
        os.makedirs(tmp_path / name)
        args = (str(tmp_path / name), tiny["glm3"], "glm3", torch.float32, [2], tensors.items(), 0, {})
        return direct.write_model(*args)

    assert "bit for bit" in write("right")[0]
    digest = direct._digest
    monkeypatch.setattr(direct, "FolderWeights", lambda folder: Flipped(folder))
    with pytest.raises(CheckpointError, match="is not as it was written"):
        write("flipped")
    monkeypatch.undo()
    assert direct._digest is digest
    wrong = {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}
    monkeypatch.setattr("glm_models.convert.config.rope_of", lambda config: wrong)
    with pytest.raises(CheckpointError, match="the one it was made of"):
        write("wrong")


class Flipped(direct.FolderWeights):
    """One bit of one weight is another."""

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = super().__getitem__(name)
        if name == "model.norm.weight":
            weight = weight.clone()
            weight.view(torch.int32)[0] ^= 1
        return weight
