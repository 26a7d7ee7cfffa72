"""Who imports whom: arrows point one way, nobody imports a script; 12 scripts are there; flags mean what they say."""

import ast
import json
from pathlib import Path

import pytest

from glm_models import MODE
from train import TRAIN_TYPE, parse_args
from utils import UserError, load_ds_config

ROOT = Path(__file__).resolve().parent.parent
OURS = {"train", "utils", "data_set", "data_cache", "data_check", "data_findings", "throughput", "planner"}
OURS |= {"memory_trace", "folders", "states", "stops", "merge_lora", "predict", "metrics", "adapter", "probe"}
OURS |= {
    "arguments",
    "train_arguments",
    "predict_arguments",
    "errors",
    "file_kinds",
    "formats",
    "row_files",
    "lora",
    "evaluation",
    "replay",
    "forgetting",
    "zero3",
    "charts",
    "report",
    "compare_methods",
    "glm_models",
}
MAY_IMPORT = {
    "errors": set(),
    "arguments": {"errors", "file_kinds"},
    "train_arguments": {"arguments", "glm_models", "metrics"},
    "predict_arguments": {"arguments", "glm_models", "metrics"},
    "charts": set(),
    "report": {"arguments", "charts", "folders", "glm_models", "metrics", "utils"},
    "compare_methods": {
        "arguments",
        "data_set",
        "errors",
        "folders",
        "formats",
        "glm_models",
        "predict_arguments",
        "report",
        "train_arguments",
        "utils",
    },
    "glm_models": set(),
    "adapter": {"folders", "glm_models"},
    "data_cache": set(),
    "file_kinds": set(),
    "formats": set(),
    "row_files": {"file_kinds", "formats"},
    "data_findings": {"formats"},
    "data_set": {"data_cache", "data_findings", "file_kinds", "formats", "row_files"},
    "data_check": {"data_cache", "data_findings", "data_set", "formats"},
    "evaluation": {"data_set", "folders", "glm_models", "metrics", "utils"},
    "replay": {"data_set"},
    "folders": set(),
    "metrics": set(),
    "throughput": {"glm_models"},
    "utils": {"adapter", "errors", "folders", "glm_models", "throughput", "zero3"},
    "zero3": {"glm_models"},
    "states": {"folders", "utils"},
    "stops": {"data_set", "utils"},
    "lora": {"glm_models"},
    "memory_trace": set(),
    "planner": {"data_set", "glm_models", "memory_trace", "utils"},
    "probe": {"adapter", "glm_models"},
    "train": {
        "adapter",
        "arguments",
        "train_arguments",
        "folders",
        "glm_models",
        "data_cache",
        "data_check",
        "data_set",
        "evaluation",
        "lora",
        "planner",
        "replay",
        "states",
        "stops",
        "throughput",
        "utils",
    },
    "merge_lora": {"arguments", "adapter", "folders", "glm_models", "probe", "utils"},
    "predict": {"arguments", "predict_arguments", "glm_models", "data_set", "formats", "metrics", "utils"},
    "forgetting": {"arguments", "data_cache", "data_set", "folders", "formats", "glm_models", "utils"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_one_way(module):
    files = list((ROOT / module).glob("*.py")) if module == "glm_models" else [ROOT / f"{module}.py"]
    for file in files:
        allowed = MAY_IMPORT[module] | ({module} if module == "glm_models" else set())
        if file.name == "tiny.py":  # a script
            allowed = allowed | {"arguments", "errors"}
        assert imported(file) & OURS <= allowed, file


def test_there_is_a_script_for_each_family_and_method():
    for mode in MODE:
        for method in TRAIN_TYPE:
            text = (ROOT / "scripts" / mode / f"{method}.sh").read_text()
            assert f"launch {mode} {method} " in text


FLAGS = ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__]


def test_flags_mean_what_they_say():
    assert parse_args([*FLAGS, "--train_type", "ptuning", "--prefix_projection", "False"]).prefix_projection is False
    assert parse_args([*FLAGS, "--gradient_checkpointing"]).gradient_checkpointing is True
    assert parse_args(FLAGS).train_type == "lora"
    assert (ROOT / parse_args(FLAGS).ds_file).is_file()
    with pytest.raises(UserError):
        parse_args([*FLAGS, "--prefix_projection", "perhaps"])


def test_all_argument_errors_come_at_once():
    with pytest.raises(UserError) as error:
        parse_args([*FLAGS, "--num_train_epochs", "0", "--warmup_ratio", "1.5", "--max_len", "10"])
    for name in ("num_train_epochs", "warmup_ratio", "max_src_len"):
        assert name in str(error.value)


VALUES = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": None}, '"zero_optimization" is missing'),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled must be true, false"),
        ({"train_batch_size": 16}, '"train_batch_size" is 16, the command line makes it 8'),
        ({}, '"optimizer" is missing'),
        ({"steps_per_print": "auto"}, 'does not know what "auto" means for .steps_per_print'),
    ],
)
def test_a_ds_file_that_cannot_be_meant_is_refused(tmp_path, change, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **change}))
    with pytest.raises(UserError, match=message):
        load_ds_config(str(path), VALUES)


def test_ds_files_hold_no_auto_that_train_does_not_know(tmp_path):
    import train

    for file in ROOT.glob("ds_zero*.json"):
        values = train.ds_values(parse_args(FLAGS), 1, 10, 64)
        assert '"auto"' not in json.dumps(load_ds_config(str(file), values))
