"""The keys that the installed DeepSpeed reads from a ds file, found in its source.

    python tests/ds_source_keys.py

prints those that ds_keys.py does not know: nothing, unless DeepSpeed has new ones.

Two kinds of code read them: models of pydantic, whose fields are keys, and plain code that takes them out of a dict,
mostly by a constant's name.
"""

import ast
import importlib
import inspect
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from tuning.engine.ds_keys import KEYS, Section, walk

PACKAGE = Path(deepspeed.__file__).parent
# Modules that read a ds file for training. inference has configs of its own, the autotuner writes ds files.
CONFIGS = sorted(
    str(path.relative_to(PACKAGE.parent))
    for path in PACKAGE.rglob("*config*.py")
    if not {"inference", "model_implementations", "tuner", "linear", "ops"} & set(path.relative_to(PACKAGE).parts)
    and path.name != "autotp_config.py"  # what tensor_parallel.partition_config holds
)
MORE = ["deepspeed/__init__.py", "deepspeed/compile/init_sp.py"]
# Names that such code gives to the dict, or to a section of it.
DICTS = ("param_dict", "_param_dict", "ds_config", "config_dict", "config", "_params", "timers")
# A ds file's section -> the pydantic model behind it; models within models are followed.
MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "zero_optimization.zenflow": "deepspeed.runtime.zenflow.zenflow_config.ZenFlowConfig",
    "bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
    "fp16": "deepspeed.runtime.precision_config.DeepSpeedFP16Config",
    "": "deepspeed.monitor.config.DeepSpeedMonitorConfig",
    "comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
    "compile": "deepspeed.compile.config.CompileConfig",
    "hybrid_engine": "deepspeed.runtime.config.HybridEngineConfig",
    "tensor_parallel": "deepspeed.runtime.tensor_parallel.config.TPTrainingConfig",
    "timers.throughput": "deepspeed.utils.config.DeepSpeedThroughputTimerConfig",
    "weight_quantization": "deepspeed.inference.config.WeightQuantConfig",
}
OTHER = {"_tp_plan"}  # of a model, not of a ds file


def load(dotted: str):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def model_keys() -> dict[str, set[str]]:
    """Keys of each section that a pydantic model reads, aliases included."""
    found: dict[str, set[str]] = {}

    def follow(section: str, model) -> None:
        names = found.setdefault(section, set())
        for name, field in model.model_fields.items():
            names |= {name, field.alias or name}
            for inner in inner_models(field.annotation):
                follow(f"{section}.{field.alias or name}".lstrip("."), inner)

    for section, model in MODELS.items():
        follow(section, load(model))
    return found


def inner_models(annotation) -> list:
    """Pydantic models in a type."""
    if inspect.isclass(annotation) and issubclass(annotation, DeepSpeedConfigModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in inner_models(part)]


def models_not_followed() -> list[str]:
    """Pydantic models of the configs that no section of MODELS leads to: a new DeepSpeed has a new section."""
    followed = set()

    def follow(model) -> None:
        followed.add(model)
        for field in model.model_fields.values():
            for inner in inner_models(field.annotation):
                follow(inner)

    for model in MODELS.values():
        follow(load(model))
    there = set()
    for file in CONFIGS:
        module = importlib.import_module(file.removesuffix(".py").replace(os.sep, "."))
        there |= {m for m in vars(module).values() if inspect.isclass(m) and issubclass(m, DeepSpeedConfigModel)}
    own = {m for m in there - followed - {DeepSpeedConfigModel} if ".inference." not in m.__module__}
    return sorted(f"{model.__module__}.{model.__name__}" for model in own)


def read_keys() -> dict[str, str]:
    """Keys that plain code takes out of a dict, without their section -> the file that does."""
    found = {}
    for file in [*CONFIGS, *MORE]:
        module = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace(os.sep, "."))
        for node in ast.walk(ast.parse((PACKAGE.parent / file).read_text())):
            for key in taken(node, vars(module)):
                found.setdefault(key, file)
    return found


def taken(node: ast.AST, names: dict) -> list[str]:
    """Keys that one expression asks a dict of DICTS for."""
    if isinstance(node, ast.Call) and name_of(node.func) in ("get_scalar_param", "get_list_param", "get_dict_param"):
        keys = node.args[1:2]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        keys = node.args[:1] if is_dict(node.func.value) else []
    elif isinstance(node, ast.Subscript) and is_dict(node.value):
        keys = [node.slice]
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
        where = node.comparators[0]
        where = where.func.value if isinstance(where, ast.Call) and isinstance(where.func, ast.Attribute) else where
        keys = [node.left] if is_dict(where) else []
    else:
        return []
    values = [key.value if isinstance(key, ast.Constant) else names.get(name_of(key)) for key in keys]
    return [value for value in values if isinstance(value, str) and value]


def name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def is_dict(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        node = node.value
    return name_of(node).endswith(DICTS) or name_of(node).endswith("_dict")


def unknown() -> list[str]:
    """Keys, with where they are read, that ds_keys.py has not."""
    table = {name for name, _ in walk()}
    bare = {name.rpartition(".")[2] for name in table}
    missing = []
    for section, keys in model_keys().items():
        if not inside_refused(section):
            missing += [
                f"{section}.{key}".lstrip(".") for key in sorted(keys - OTHER) if dotted(section, key) not in table
            ]
    missing += [f"{key} ({file})" for key, file in sorted(read_keys().items()) if key not in bare | OTHER]
    return missing + [f"model {model}" for model in models_not_followed()]


def dotted(section: str, key: str) -> str:
    return f"{section}.{key}".lstrip(".")


def inside_refused(section: str) -> bool:
    """Whether ds_keys.py refuses the section as a whole, and so need not know its keys."""
    known = KEYS
    for name in section.split(".") if section else []:
        if not isinstance(known.get(name), Section):
            return name in known
        known = known[name].keys
    return False


if __name__ == "__main__":
    print("\n".join(unknown()) or f"all keys of DeepSpeed {deepspeed.__version__} are known")
