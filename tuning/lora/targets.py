"""Which modules of a model LoRA adapts and which it trains whole: the names in the flags, checked."""

from torch import nn

from glm_models.modeling import Block
from tuning.arguments.lora import ALL_LINEAR
from tuning.arguments.parser import split_names
from tuning.errors import UserError


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of all linear layers."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def find_targets(model: nn.Module, flag: str) -> list[str]:
    """The names of linear layers that --lora_module_name means, last parts of their paths.

    Raises:
        UserError: the model has no such linear layer.
    """
    blocks = [path for path, module in model.named_modules() if isinstance(module, Block)]
    linear = linear_paths(model)
    in_blocks = {path.rpartition(".")[2] for path in linear if any(path.startswith(f"{block}.") for block in blocks)}
    if flag == ALL_LINEAR:
        return sorted(in_blocks)
    names, known = split_names(flag), sorted({path.rpartition(".")[2] for path in linear})
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--lora_module_name {', '.join(unknown)}: no such linear layer; there are {', '.join(known)}. "
            f"All linear layers of the blocks: --lora_module_name {ALL_LINEAR}"
        )
    return names


def find_whole(model: nn.Module, flag: str | None, targets: list[str]) -> list[str] | None:
    """The names of modules that --modules_to_save means, last parts of their paths; None without the flag.

    Args:
        targets: names of the adapted layers.

    Raises:
        UserError: the model has no such module, it is adapted, or it shares its weight with another one.
    """
    if flag is None:
        return None
    names = split_names(flag)
    # single layers: peft would hide the methods of a block or of an attention module
    modules = {path: m for path, m in model.named_modules() if not list(m.children()) and list(m.parameters())}
    known = sorted({path.rpartition(".")[2] for path in modules})
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--modules_to_save {', '.join(unknown)}: no such layer; there are {', '.join(known)}")
    if both := sorted({*names} & {*targets}):
        raise UserError(f"--modules_to_save {', '.join(both)}: --lora_module_name adapts it already")
    for path in tied_layers(model):
        if path.rpartition(".")[2] in names:
            raise UserError(
                f"--modules_to_save {path.rpartition('.')[2]}: in this model embedding and output layer are one weight "
                "(tie_word_embeddings), which would be trained as two"
            )
    return names


def tied_layers(model: nn.Module) -> set[str]:
    """Paths of the modules that share a weight with another one."""
    return {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
