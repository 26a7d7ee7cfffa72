"""train.py as a whole, with real DeepSpeed on one rank and on two: the same losses however a batch is split, whatever
the ZeRO stage and with or without checkpointing; the right weights move and no others; four rows are learnt by heart
and predict.py gives them back; results are complete folders with the same files from every stage.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_lively_checkpoint
from jobs import run_jobs
from runs import Launched
from safetensors.torch import load_file, save_file

import merge_lora
import predict
from glm_models import MODE
from glm_models.checkpoint import ARCHITECTURES
from tuning.lora.adapter import check_base
from tuning.methods import TRAIN_TYPE

ROOT = Path(__file__).resolve().parent.parent
DS_FILES = {"z2": "ds_zero2_no_offload.json", "z3": "ds_zero3_no_offload.json", "offload": "ds_zero3_offload.json"}
METHOD_FLAGS = {
    "freeze": ["--freeze_module_name", "layers.1.,final_layernorm"],
    "ptuning": ["--pre_seq_len", "6", "--prefix_dropout", "0"],
    "lora": ["--lora_dim", "8", "--lora_dropout", "0", "--lora_module_name", "query_key_value,dense_h_to_4h"],
    "all": [],
}
RATES = {"freeze": "5e-3", "ptuning": "3e-2", "lora": "1e-2", "all": "5e-3"}
PAIRS = [(mode, method) for mode in MODE for method in TRAIN_TYPE]

ROWS = [
    ("抽取故障：", "发动机怠速不稳。", "发动机_性能故障_怠速不稳"),
    ("抽取故障：", "水泵漏水，需要更换。", "水泵_部件故障_漏水"),
    ("抽取故障：", "用诊断仪读取故障码，变速箱里的离合器打滑。", "诊断仪_检测工具_故障码\n离合器_部件故障_打滑"),
    ("写一句话：", "天气", "今天的天气真不错。"),
    ("问答：", "中国的首都是哪里？", "北京是中国的首都。"),
    ("抽取故障：", "轮胎磨损不均。", "轮胎_部件故障_磨损不均"),
]


def deepspeed(ranks: int, *command: str, timeout: int = 1500) -> subprocess.CompletedProcess:
    """Run a script under the launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(29600 + os.getpid() % 300)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def tiny(folder):
    """As everywhere, but of two layers: a small training's time goes with their number."""
    for mode, settings in TINY.items():
        make_lively_checkpoint(mode, str(folder / f"base-{mode}"), **settings | {"layers": 2})
    return {mode: str(folder / f"base-{mode}") for mode in TINY}


@pytest.fixture(scope="module")
def rows(folder):
    """Files: six rows of very different lengths; the first four; these a hundred times, for epochs of so many steps."""
    paths = {}
    for name, some in (("six", ROWS), ("four", ROWS[:4]), ("four100", ROWS[:4] * 100)):
        paths[name] = folder / f"{name}.json"
        lines = [json.dumps(dict(zip(("instruction", "input", "output"), row, strict=True))) for row in some]
        paths[name].write_text("\n".join(lines) + "\n\n")  # an empty last line is no error
    return paths


def arguments(mode, method, base, data, output, *more) -> list[str]:
    fixed = f"--mode {mode} --train_type {method} --model_name_or_path {base} --train_path {data} --output_dir {output}"
    fixed += f" --max_len 128 --max_src_len 96 --show_loss_step 1 --seed 7 --data_cache {Path(output).parent}/cache"
    return [*fixed.split(), *METHOD_FLAGS[method], *more]


# How a global batch of four rows is run; six rows make a full step and one of two rows.
VARIANTS = {
    "4x1": "--per_device_train_batch_size 4",
    "2x2": "--per_device_train_batch_size 2 --gradient_accumulation_steps 2",
    "1x4": "--gradient_accumulation_steps 4",
    "4x1-checkpointing": "--per_device_train_batch_size 4 --gradient_checkpointing",
    "4x1-z3": f"--per_device_train_batch_size 4 --ds_file {DS_FILES['z3']}",
    "2x2-z3-checkpointing": "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --gradient_checkpointing "
    f"--ds_file {DS_FILES['z3']}",
    "4x1-offload": f"--per_device_train_batch_size 4 --ds_file {DS_FILES['offload']}",
}
TWO_RANKS = {
    "2x1": "--per_device_train_batch_size 2",
    "1x2-z3-checkpointing": "--gradient_accumulation_steps 2 --gradient_checkpointing --ds_file " + DS_FILES["z3"],
}


# All four rows in one step, alone or packed; LoRA on the output layer, which takes the loss another way.
ONE_STEP = {
    "rows": "--per_device_train_batch_size 4",
    "packed": "--per_device_train_batch_size 2 --packing --max_len 100",
    "packed-z3-saving": "--gradient_accumulation_steps 2 --packing --max_len 100 --gradient_checkpointing --tiled_mlp "
    f"--offload_inputs --keep_attention --ds_file {DS_FILES['z3']}",
}
ONE_STEP_TWO_RANKS = {"packed-z3-saving": ONE_STEP["packed-z3-saving"].removeprefix("--gradient_accumulation_steps 2 ")}
ONE_STEP_PAIRS = [*PAIRS, *((mode, "lora_head") for mode in MODE)]


def variant_jobs(tiny, rows, folder, variants, ranks, pairs=PAIRS, data="six", epochs=2):
    jobs = {}
    for mode, method in pairs:
        for name, flags in variants.items():
            key = f"{mode}-{method}-{name}"
            # Adam's first steps have full length however small a gradient is: higher rates blow rounding up
            more = [*flags.split(), "--num_train_epochs", str(epochs), "--learning_rate", "5e-3"]
            if method == "lora_head":
                more += ["--lora_module_name", "lm_head" if mode == "glm" else "query_key_value,output_layer"]
            output = folder / f"{key}-{ranks}"
            jobs[key] = arguments(mode, method.split("_")[0], tiny[mode], rows[data], output, *more)
    return jobs


def losses_of(tiny, rows, folder, variants, two_ranks, *what) -> dict[str, list[float]]:
    """Loss lists of variants on one rank, and of others, their names with -two, on two."""
    one = run_jobs(folder, 1, variant_jobs(tiny, rows, folder, variants, 1, *what))
    two = run_jobs(folder, 2, variant_jobs(tiny, rows, folder, two_ranks, 2, *what))
    return one | {f"{name}-two": values for name, values in two.items()}


@pytest.fixture(scope="module")
def losses(tiny, rows, folder):
    """Loss lists of every family, method and variant; 4x1 comes first and is what the others are held against."""
    return losses_of(tiny, rows, folder, VARIANTS, TWO_RANKS)


@pytest.mark.parametrize("variant", [*list(VARIANTS)[1:], *(f"{name}-two" for name in TWO_RANKS)])
@pytest.mark.parametrize(("mode", "method"), PAIRS)
def test_losses_do_not_depend_on_how_a_batch_is_run(losses, mode, method, variant):
    expected = losses[f"{mode}-{method}-4x1"]
    assert len(expected) == 4
    assert losses[f"{mode}-{method}-{variant}"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def one_step_losses(tiny, rows, folder):
    return losses_of(tiny, rows, folder, ONE_STEP, ONE_STEP_TWO_RANKS, ONE_STEP_PAIRS, "four", 3)


@pytest.mark.parametrize("variant", [*list(ONE_STEP)[1:], *(f"{name}-two" for name in ONE_STEP_TWO_RANKS)])
@pytest.mark.parametrize(("mode", "method"), ONE_STEP_PAIRS)
def test_packing_and_saving_memory_change_no_loss(one_step_losses, mode, method, variant):
    expected = one_step_losses[f"{mode}-{method}-rows"]
    assert len(expected) == 3
    assert expected[2] < expected[0]  # it learns, so later losses depend on earlier gradients
    assert one_step_losses[f"{mode}-{method}-{variant}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("mode", "method"), PAIRS)
def test_every_stage_saves_the_same_files(losses, folder, mode, method):
    results = [
        folder / f"{mode}-{method}-{name}/epoch-2-step-4" for name in ("4x1-1", "4x1-z3-1", "1x2-z3-checkpointing-2")
    ]
    names = [sorted(path.name for path in result.iterdir()) for result in results]
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert weights in names[0]
    assert names[0] == names[1] == names[2]
    first, *others = [load_file(result / weights) for result in results]
    for other in others:
        assert {n: (t.shape, t.dtype) for n, t in other.items()} == {n: (t.shape, t.dtype) for n, t in first.items()}
        for name, tensor in other.items():
            if name.endswith("query_key_value.bias"):
                continue  # a key's bias has no gradient but rounding noise, which Adam makes steps of
            torch.testing.assert_close(tensor, first[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("mode", "method"), PAIRS)
def test_exactly_the_right_weights_move(losses, tiny, folder, mode, method):
    result = folder / f"{mode}-{method}-4x1-z3-1/epoch-2-step-4"
    if method == "lora":
        adapter = load_file(result / "adapter_model.safetensors")
        assert len(adapter) == 2 * 2 * 2  # A and B, layers, modules
        assert all(tensor.any() for tensor in adapter.values())
        return
    base, trained = load_file(f"{tiny[mode]}/model.safetensors"), load_file(result / "model.safetensors")
    moves = {
        "freeze": lambda name: "layers.1." in name or "final_layernorm" in name,
        "ptuning": lambda name: "prefix_encoder" in name,
        "all": lambda name: True,
    }[method]
    for name, tensor in trained.items():
        if "inv_freq" in name:
            continue
        same = name in base and torch.equal(tensor, base[name])
        assert same != moves(name), name
    assert base.keys() <= trained.keys()


EPOCHS = {"freeze": 1, "ptuning": 2, "lora": 1, "all": 1}  # of a hundred steps
RATES_BY_HEART = RATES | {"ptuning": "1e-2"}


def memorised_result(folder, mode, method) -> Path:
    return folder / f"m-{mode}-{method}/epoch-{EPOCHS[method]}-step-{100 * EPOCHS[method]}"


@pytest.fixture(scope="module")
def confident(tiny, folder):
    """The tiny models with an output layer four times as large.

    Random output weights are so alike that even the best hidden state leaves the loss at 0.2, and freeze, P-Tuning and
    LoRA do not train them.
    """
    folders = {}
    for mode in MODE:
        folders[mode] = folder / f"confident-{mode}"
        shutil.copytree(tiny[mode], folders[mode])
        path = folders[mode] / "model.safetensors"
        tensors = load_file(path)
        for name in ("lm_head.weight", "transformer.word_embeddings.weight", "transformer.output_layer.weight"):
            if name in tensors:
                tensors[name] = tensors[name] * 4
        save_file(tensors, path, metadata={"format": "pt"})
    return folders


@pytest.fixture(scope="module")
def memorised(confident, rows, folder):
    """Folders of models that were trained on four rows until they know them, and the last losses."""
    jobs = {}
    for mode, method in PAIRS:
        flags = f"--num_train_epochs {EPOCHS[method]} --learning_rate {RATES_BY_HEART[method]} --weight_decay 0".split()
        flags += ["--per_device_train_batch_size", "4", "--show_loss_step", "10"]  # losses are means of ten steps
        if method == "ptuning":
            flags += ["--pre_seq_len", "32"]
        jobs[f"{mode}-{method}"] = arguments(
            mode, method, confident[mode], rows["four100"], folder / f"m-{mode}-{method}", *flags
        )
    return run_jobs(folder, 1, jobs)


@pytest.mark.parametrize(("mode", "method"), PAIRS)
def test_four_rows_are_learnt_by_heart_and_predicted(memorised, confident, rows, folder, mode, method):
    assert memorised[f"{mode}-{method}"][-1] < 0.05
    result = memorised_result(folder, mode, method)
    command = f"--mode {mode} --predict_path {rows['four']} --max_length 128 --batch_size 3"
    predict.main([*command.split(), "--model_path", str(result)])
    expected = [row[2] for row in ROWS[:4]]
    assert predictions(result) == expected
    if method == "lora":
        merged = folder / f"merged-{mode}"
        merge_lora.main(
            f"--mode {mode} --ori_model_dir {confident[mode]} --model_dir {result} --output_dir {merged}".split()
        )
        predict.main([*command.split(), "--model_path", str(merged)])
        assert predictions(merged) == expected


def predictions(folder: Path) -> list[str]:
    lines = (folder / "predictions-four.jsonl").read_text().splitlines()
    assert all(json.loads(line)["ended"] for line in lines)
    return [json.loads(line)["prediction"] for line in lines]


def test_predictions_go_on_where_they_stopped(memorised, rows, folder, capsys):
    source = memorised_result(folder, "glm3", "all")
    result = folder / "resumed"
    shutil.copytree(source, result)
    answers = result / "predictions-four.jsonl"
    whole = "--mode glm3 --max_length 128 --model_path {} --predict_path {}".format(result, rows["four"]).split()
    answers.unlink(missing_ok=True)
    predict.main(whole)
    text = answers.read_text()
    lines = text.splitlines(keepends=True)
    answers.write_text("".join(lines[:2]) + lines[2][:25])  # stopped in the middle of the third
    predict.main(whole)
    assert answers.read_text() == text
    assert "holds 2 of 4 answers" in capsys.readouterr().out


def test_merged_model_equals_the_adapter(losses, tiny, folder):
    from peft import PeftModel

    for mode in MODE:
        result = folder / f"{mode}-lora-4x1-1/epoch-2-step-4"
        merged_folder = folder / f"equal-{mode}"
        assert "has the fingerprint" in check_base(str(result), mode, str(tiny[mode]))
        merge_lora.merge(mode, str(tiny[mode]), str(result), str(merged_folder))
        family = MODE[mode]
        adapter = PeftModel.from_pretrained(family.model.from_pretrained(tiny[mode]), result).eval()
        merged = family.model.from_pretrained(merged_folder).eval()
        ids = torch.tensor([family.tokenizer.from_pretrained(merged_folder).encode_prompt(ROWS[2][1])])
        with torch.no_grad():
            want = adapter(input_ids=ids).logits
            torch.testing.assert_close(merged(ids).logits, want, rtol=0, atol=1e-4)
            with adapter.disable_adapter():
                assert (want - adapter(input_ids=ids).logits).abs().max() > 0.05  # the adapter does something
        base = load_file(f"{tiny[mode]}/model.safetensors")
        assert load_file(merged_folder / "model.safetensors").keys() == base.keys()


def test_result_folders_keep_what_other_tools_read(memorised, tiny, folder):
    for mode in MODE:
        base = json.loads(Path(tiny[mode], "config.json").read_text())
        config = json.loads((memorised_result(folder, mode, "ptuning") / "config.json").read_text())
        names = {} if mode == "glm" else {"architectures": ARCHITECTURES}
        assert config == base | names | {"pre_seq_len": 32, "prefix_projection": True}
        generation = json.loads((memorised_result(folder, mode, "all") / "generation_config.json").read_text())
        stop = MODE[mode].tokenizer.from_pretrained(tiny[mode]).stop_token_ids
        assert generation["eos_token_id"] == (stop if len(stop) > 1 else stop[0])


def bad_run(tiny, rows, folder, **change) -> list[str]:
    flags = {
        "mode": "glm3",
        "model_name_or_path": tiny["glm3"],
        "train_path": rows["six"],
        "output_dir": folder / "bad",
        "data_cache": folder / "cache",
    }
    flags |= {"max_len": 128, "max_src_len": 96, **change}
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


def errors(tiny, folder):
    """Flags that cannot work, and what the message must say."""
    bad_rows = folder / "bad_rows.json"
    good = json.dumps({"instruction": "a", "input": "b", "output": "c"})
    bad_rows.write_text(good + "\n" + '{"instruction": "a", "input": "b", "output": ["c"]}\n')
    ds = json.loads((ROOT / DS_FILES["z2"]).read_text())
    ds["optimizer"]["params"]["lr"] = 0.5
    other_lr = folder / "other_lr.json"
    other_lr.write_text(json.dumps(ds))
    return {
        "mode": ({"mode": "glm"}, "--mode glm3 (ChatGLM3-6B)"),
        "path": ({"model_name_or_path": folder / "nowhere"}, "nowhere: no such folder"),
        "cache": ({"data_cache": bad_rows}, "bad_rows.json: File exists; --data_cache names another folder"),
        "data": ({"train_path": bad_rows}, "bad_rows.json line 2: output must be a string, not a list"),
        "module": ({"lora_module_name": "query_key_value,dence"}, "dence: no such linear layer; there are dense"),
        "freeze": (
            {"train_type": "freeze", "freeze_module_name": "layers.99."},
            "layers.99.: no parameter name contains it",
        ),
        "ds_file": ({"ds_file": other_lr}, '"optimizer.params.lr" is 0.5, the command line makes it 0.0001'),
        "contradiction": ({"max_src_len": 200}, "--max_src_len 200 must be less than --max_len 128"),
    }


def check_one_error(output: str, message: str) -> None:
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    assert message in lines[0]


@pytest.fixture(scope="module")
def refused(tiny, rows, folder):
    """Runs of two ranks that cannot work, started together: for some seconds each waits for its launcher to end it."""
    runs = {}
    for kind, (change, _) in errors(tiny, folder).items():
        argv = bad_run(tiny, rows, folder, **{"output_dir": folder / f"bad-{kind}"} | change)
        runs[kind] = Launched(argv, 2, folder / "bad-losses", folder / f"bad-{kind}.log")
    return runs


@pytest.mark.parametrize("kind", ["mode", "path", "data", "cache", "module", "freeze", "ds_file", "contradiction"])
def test_what_cannot_work_ends_with_one_clear_error_on_two_ranks(refused, tiny, folder, kind):
    assert 0 not in refused[kind].wait().values()
    check_one_error(refused[kind].log.read_text(), errors(tiny, folder)[kind][1])


def test_under_the_launcher_there_is_one_error_too(tiny, rows, folder):
    change, message = errors(tiny, folder)["data"]
    run = deepspeed(2, "train.py", *bad_run(tiny, rows, folder, **change))
    assert run.returncode != 0
    check_one_error(run.stdout + run.stderr, message)


def test_python_alone_trains_on_one_device(tiny, rows, folder):
    command = arguments("glm2", "lora", tiny["glm2"], rows["six"], folder / "alone", "--save_model_step", "2")
    command += ["--data_cache", "none"]
    run = subprocess.run([sys.executable, "train.py", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    saved = sorted(path.name for path in (folder / "alone").iterdir() if not path.name.startswith("."))
    results = ["epoch-1-step-2", "epoch-1-step-4", "epoch-1-step-6"]
    assert saved == [*results, "log.jsonl", "run.json", "summary.json", "tensorboard"]
    summary = json.loads((folder / "alone" / "summary.json").read_text())
    assert (summary["result"], summary["steps"]) == ("epoch-1-step-6", 6) and summary["trained"] < summary["parameters"]
    assert "step 6/6" in run.stdout
