"""Who imports whom: arrows point one way, nobody imports a script; 12 scripts are there; flags mean what they say."""

import ast
from pathlib import Path

import pytest

from glm_models import MODE
from train import TRAIN_TYPE, parse_args
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in ROOT.glob("*.py")} | {"glm_models"}
MAY_IMPORT = {
    "adapter": {"errors", "folders", "glm_models", "lora"},
    "allocator": set(),
    "answers": {"errors", "folders", "glm_models"},
    "arguments": {"errors", "file_kinds", "other_names"},
    "charts": set(),
    "compare_arguments": {"arguments", "errors", "glm_models", "predict_arguments", "train_arguments"},
    "compare_methods": {
        "arguments",
        "compare_arguments",
        "data_set",
        "errors",
        "exits",
        "folders",
        "formats",
        "glm_models",
        "report",
    },
    "data_cache": set(),
    "data_check": {"data_cache", "data_findings", "data_set", "formats"},
    "data_findings": {"formats"},
    "data_set": {"data_cache", "data_findings", "file_kinds", "formats", "row_files"},
    "ds_check": {"ds_keys", "errors"},
    "ds_config": {"ds_check", "ds_keys", "errors", "glm_models", "utils"},
    "ds_keys": set(),
    "errors": set(),
    "evaluation": {"data_set", "errors", "folders", "glm_models", "log", "metrics", "utils"},
    "exits": {"errors", "folders", "glm_models"},
    "file_kinds": set(),
    "folders": set(),
    "forgetting": {
        "allocator",
        "arguments",
        "data_cache",
        "data_set",
        "errors",
        "exits",
        "folders",
        "formats",
        "glm_models",
        "loading",
        "utils",
    },
    "formats": set(),
    "glm_models": set(),
    "launch": {"errors", "utils"},
    "loading": {"adapter", "errors", "glm_models", "probe", "utils"},
    "log": {"folders", "throughput", "utils"},
    "lora": {"glm_models"},
    "memory_trace": set(),
    "merge_lora": {"adapter", "arguments", "errors", "exits", "folders", "glm_models", "probe", "utils"},
    "metrics": set(),
    "other_names": set(),
    "plan_host": {"folders", "plan_zero"},
    "plan_zero": {"data_set", "memory_trace", "utils"},
    "plan_zero3": {"memory_trace", "plan_zero"},
    "planner": {"data_set", "ds_config", "glm_models", "memory_trace", "plan_host", "plan_zero", "plan_zero3", "utils"},
    "predict": {
        "adapter",
        "allocator",
        "answers",
        "arguments",
        "data_findings",
        "data_set",
        "errors",
        "exits",
        "formats",
        "glm_models",
        "loading",
        "metrics",
        "predict_arguments",
        "utils",
    },
    "predict_arguments": {"arguments", "glm_models", "metrics"},
    "probe": {"adapter", "glm_models"},
    "replay": {"data_set"},
    "report": {"arguments", "charts", "errors", "exits", "folders", "glm_models", "metrics", "report_inputs"},
    "report_inputs": {"answers", "errors", "metrics", "row_files", "run_record"},
    "results": {"errors", "folders", "states"},
    "row_files": {"file_kinds", "formats"},
    "run_record": {"errors", "folders", "glm_models", "results", "states", "utils"},
    "states": {"errors", "folders", "utils"},
    "stops": {"data_set", "exits", "launch", "utils"},
    "throughput": {"glm_models"},
    "train": {
        "adapter",
        "allocator",
        "arguments",
        "data_cache",
        "data_check",
        "data_set",
        "ds_config",
        "evaluation",
        "exits",
        "folders",
        "glm_models",
        "launch",
        "log",
        "lora",
        "planner",
        "replay",
        "results",
        "run_record",
        "states",
        "stops",
        "throughput",
        "train_arguments",
        "utils",
    },
    "train_arguments": {"arguments", "glm_models", "metrics"},
    "utils": {"adapter", "errors", "exits", "folders", "glm_models", "zero3"},
    "zero3": {"glm_models"},
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


@pytest.mark.parametrize("script", ["train", "predict", "forgetting"])
def test_torch_is_told_of_memory_before_it_is_imported(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    told = next(i for i, line in enumerate(lines) if line.strip() == "let_segments_grow()")
    assert told < next(i for i, line in enumerate(lines) if line == "import torch")


COLLECTIVES = {"barrier", "all_gather_object", "gather_object", "broadcast_object_list", "all_reduce", "broadcast"}


def test_ranks_wait_for_each_other_on_the_cpu():
    """The devices' group gives up after ten minutes, which a slow disk may take; on it goes what devices compute."""
    on_devices = []
    for path in (*ROOT.glob("*.py"), *ROOT.glob("glm_models/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in COLLECTIVES and ast.unparse(node.func.value).endswith(("distributed", "comm", "dist")):
                groups = [ast.unparse(value) for value in (*node.args, *(key.value for key in node.keywords))]
                if "control_group()" not in groups:
                    on_devices.append((path.name, node.func.attr))
    assert on_devices == [("ops.py", "all_reduce")]  # how many chunks of logits the ranks make
