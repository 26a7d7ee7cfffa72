"""LoRA that goes on from an earlier adapter: --adapter_path. Rank, alpha and layers are those of the adapter."""

import torch

from glm_models.checkpoint import CheckpointError, printable
from tuning.arguments.parser import split_names
from tuning.errors import UserError
from tuning.folders import file_hash
from tuning.lora.adapter import Adapter, check_base, read_adapter, read_config, trained_bits, unread_keys
from utils import on_rank_0, print_rank_0


def take_lora_flags(args) -> None:
    """Set the flags of rank, scaling, layers and variant to what the adapter has; nothing without --adapter_path.

    Raises:
        UserError: one of them is given and differs.
        CheckpointError, FolderError: the adapter cannot be used, see read_adapter.
    """
    if not args.adapter_path:
        return
    adapter, config = read_start(args.adapter_path), read_config(args.adapter_path)
    layers = sorted({path.rpartition(".")[2] for path in layers_of(adapter)})
    values = {"lora_dim": config["r"], "lora_alpha": config["lora_alpha"]}
    values |= {name: bool(config.get(name)) for name in ("use_dora", "use_rslora")}
    wrong = []
    for name, value in values.items():
        given = getattr(args, name)
        if given not in (None, value):
            wrong.append(f"--{name} is {given}, the adapter has {value}")
        setattr(args, name, value)
    for name, has in (("lora_module_name", layers), ("modules_to_save", sorted(config.get("modules_to_save") or []))):
        given = getattr(args, name)
        if given and set(split_names(given)) != set(has):
            wrong.append(f"--{name} is {given}, the adapter has {','.join(has) or 'none'}")
        setattr(args, name, ",".join(has) or None)
    if wrong:
        raise UserError(f"--adapter_path {args.adapter_path}: {'; '.join(wrong)}; leave these flags out")


def read_start(folder: str) -> Adapter:
    """Read the adapter from which a training starts.

    Raises:
        CheckpointError, FolderError: it is broken, or of a kind that read_adapter does not read.
    """
    return read_adapter(folder, "a training can start from")


def layers_of(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [rank, in] and B [out, rank] by the path of the layer in the base."""
    return {name.removesuffix(".weight"): pair for name, pair in adapter.pairs.items()}


def start_from_adapter(args) -> dict[str, str]:
    """Take the adapter's flags, check its base and print both; nothing without --adapter_path. Called on every rank.

    Returns:
        The name and the SHA-256 of the adapter's weights: part of what a run is.

    Raises:
        UserError, CheckpointError, FolderError: see take_lora_flags and adapter.check_base.
    """
    folder = args.adapter_path
    if not folder:
        return {}
    take_lora_flags(args)
    kind = [f"rank {args.lora_dim}", f"alpha {args.lora_alpha:g}", args.lora_module_name]
    kind += ["DoRA"] * args.use_dora + ["rsLoRA"] * args.use_rslora
    kind += [f"whole {args.modules_to_save}"] if args.modules_to_save else []
    lines = [f"LoRA starts from {folder}: {', '.join(kind)}"]
    lines.append(on_rank_0(lambda: check_base(folder, args.mode, args.model_name_or_path)))
    if (before := trained_bits(folder)) != (now := args.quantization_bit or 0):
        names = [f"quantised to {bits} bits" if bits else "not quantised" for bits in (before, now)]
        lines.append(f"warning: its base was {names[0]} in its training, and is {names[1]} here")
    print_rank_0("\n".join(map(printable, [*lines, *unread_keys(folder, read_config(folder))])))
    return {"SHA-256 of --adapter_path": file_hash(read_start(folder).file.path)}


def target_modules(adapter: Adapter, names: list[str], linear: list[str]) -> list[str]:
    """What peft is to adapt: layers by name, or by path if the adapter has not all layers of these names.

    Args:
        names: last parts of the paths of the adapter's layers.
        linear: paths of the model's linear layers.

    Raises:
        CheckpointError: the model lacks a layer of the adapter.
    """
    paths = layers_of(adapter).keys()
    if lost := sorted(paths - set(linear)):
        raise CheckpointError(f"{adapter.folder} does not fit the base: it has no linear layer {lost[0]}")
    every = {path for path in linear if path.rpartition(".")[2] in names}
    return names if every == paths else sorted(paths)


@torch.no_grad()
def copy_weights(model, adapter: Adapter) -> None:
    """Copy the adapter's weights into the LoRA layers of a peft model; also one on the meta device, to check shapes.

    Raises:
        CheckpointError: a shape differs.
    """
    base = model.get_base_model()
    for path, (a, b) in layers_of(adapter).items():
        layer = base.get_submodule(path)
        _copy(adapter, f"lora_A of {path}", layer.lora_A["default"].weight, a)
        _copy(adapter, f"lora_B of {path}", layer.lora_B["default"].weight, b)
        if f"{path}.weight" in adapter.magnitudes:
            magnitude = adapter.magnitudes[f"{path}.weight"]
            _copy(adapter, f"the magnitude of {path}", layer.lora_magnitude_vector["default"].weight, magnitude)
    parameters = dict(base.named_parameters())
    for name, tensor in adapter.whole.items():
        path, _, part = name.rpartition(".")
        if (trained := parameters.get(f"{path}.modules_to_save.default.{part}")) is None:
            raise CheckpointError(f"{adapter.folder} does not fit the base: it has no {name}")
        _copy(adapter, name, trained, tensor)


def _copy(adapter: Adapter, what: str, weight: torch.Tensor, tensor: torch.Tensor) -> None:
    if weight.shape != tensor.shape:
        raise CheckpointError(
            f"{adapter.folder} does not fit the base: {what} is {list(tensor.shape)}, the base needs "
            f"{list(weight.shape)}"
        )
    weight.copy_(tensor)
