"""Who imports whom: arrows point one way, nobody imports a script; 12 scripts are there; flags mean what they say."""

import ast
import graphlib
from pathlib import Path

import pytest

from glm_models import MODE
from tuning.arguments.train import parse_args
from tuning.errors import UserError
from tuning.methods import TRAIN_TYPE

ROOT = Path(__file__).resolve().parent.parent
# The rooms from top to bottom: a module may import from its own room and from those below it.
ROOMS = [
    {"train", "predict", "merge_lora"},
    {"tuning.plan", "tuning.evaluate"},
    {"tuning.engine", "tuning.methods"},
    {"tuning.run", "tuning.lora", "data_set"},
    {"tuning.arguments"},
    {"tuning.samples", "tuning.folders", "tuning.exits", "tuning.hub"},
    {"utils", "tuning.metrics"},
    {"tuning.errors", "tuning.terminal", "tuning.environment", "tuning"},  # "tuning" itself has ROOT
    {"glm_models"},
]


# Command lines within a room, and what they may import from others.
COMMAND_LINES = {
    "glm_models.tiny": ("tuning.arguments.parser", "tuning.errors"),
    "glm_models.convert.__main__": ("tuning.arguments.parser", "tuning.errors", "tuning.exits", "tuning.folders")
    + ("tuning.arguments.models", "tuning.hub", "tuning.lora.adapter", "utils"),
    "glm_models.convert.gguf": ("tuning.arguments.parser", "tuning.errors", "tuning.exits", "tuning.folders")
    + ("tuning.arguments.models", "tuning.hub", "tuning.lora.adapter", "utils"),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [path for part in ("*.py", "tuning/**/*.py", "glm_models/**/*.py") for path in sorted(ROOT.glob(part))]
MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> int:
    """The level of a module's room."""
    names = [".".join(module.split(".")[:n]) for n in (2, 1)]
    return next(level for name in names for level, rooms in enumerate(ROOMS) if name in rooms)


def imported(path: Path, anywhere: bool = True) -> set[str]:
    """Modules of ours that a file imports: anywhere in it, or when it is imported itself."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module_of(path).split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, (package, node.module)))
            inside = {f"{origin}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= inside or {origin}
    return names & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    mine = ".".join(module.split(".")[:2]) if module.startswith("tuning.") else module.split(".")[0]
    for other in imported(MODULES[module]):
        theirs = ".".join(other.split(".")[:2]) if other.startswith("tuning.") else other.split(".")[0]
        if other in COMMAND_LINES.get(module, ()):
            continue
        assert theirs == mine or room_of(other) > room_of(module), f"{module} imports {other}"


def test_modules_do_not_import_each_other_in_a_circle():
    order = graphlib.TopologicalSorter({module: imported(path, False) - {module} for module, path in MODULES.items()})
    order.prepare()  # raises CycleError, with the circle


def test_the_top_has_what_belongs_there():
    assert {path.stem for path in ROOT.glob("*.py")} == {"train", "utils", "data_set", "merge_lora", "predict"}


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
    path = ROOT / (f"{script}.py" if script != "forgetting" else "tuning/evaluate/forgetting.py")
    lines = path.read_text().splitlines()
    told = next(i for i, line in enumerate(lines) if line.strip() == "let_segments_grow()")
    assert told < next(i for i, line in enumerate(lines) if line == "import torch")


COLLECTIVES = {"barrier", "all_gather_object", "gather_object", "broadcast_object_list", "all_reduce", "broadcast"}


def test_ranks_wait_for_each_other_on_the_cpu():
    """The devices' group gives up after ten minutes, which a slow disk may take; on it goes what devices compute."""
    on_devices = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in COLLECTIVES and ast.unparse(node.func.value).endswith(("distributed", "comm", "dist")):
                groups = [ast.unparse(value) for value in (*node.args, *(key.value for key in node.keywords))]
                if "control_group()" not in groups:
                    on_devices.append((path.name, node.func.attr))
    assert on_devices == [("ops.py", "all_reduce")]  # how many chunks of logits the ranks make


def test_files_and_functions_stay_short():
    """Readers keep a file of 450 lines and a function of 60 in mind; flags of the scripts are lists."""
    for path in MODULES.values():
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and "arguments" not in path.parts:
                assert node.end_lineno - node.lineno < 60, (path, node.name)
