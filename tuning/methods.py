"""The training methods, one function each in `TRAIN_TYPE`.

A method gets the flags and a function that loads the base model. It returns a model in which exactly the parameters to
train require gradients.
"""

import torch
from peft import LoraConfig, get_peft_model

from glm_models.quantized import count_numbers
from tuning.arguments.parser import split_names
from tuning.errors import UserError
from tuning.lora.earlier import copy_weights, read_start, target_modules, uses_rslora
from tuning.lora.layers import use_own_layers


def freeze(args, load):
    """Train the parameters whose name contains one of --freeze_module_name, freeze all others."""
    model = load()
    wanted = split_names(args.freeze_module_name)
    names = [name for name, _ in model.named_parameters()]
    unknown = [part for part in wanted if not any(part in name for name in names)]
    if unknown:
        raise UserError(
            f"--freeze_module_name {', '.join(unknown)}: no parameter name contains it. Names look like\n  "
            + "\n  ".join(shorten(names))
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in wanted))
    return model


def ptuning(args, load):
    """P-Tuning v2: train keys and values that are put before those of the tokens in every layer; freeze the model."""
    prefix = {key: getattr(args, key) for key in ("pre_seq_len", "prefix_projection", "prefix_dropout")}
    model = load(**prefix)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prefix_encoder." in name)
    return model


def lora(args, load):
    """LoRA (peft): train low-rank updates of the linear layers in --lora_module_name; freeze the model.

    With --adapter_path the updates start as that adapter's; see earlier.take_lora_flags.
    """
    earlier = read_start(args.adapter_path) if args.adapter_path else None
    model = load()
    wanted = split_names(args.lora_module_name)
    paths = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = sorted({path.split(".")[-1] for path in paths})
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        in_blocks = ",".join(sorted({path.split(".")[-1] for path in paths if "layers." in path}))
        raise UserError(
            f"--lora_module_name {', '.join(unknown)}: no such linear layer; there are {', '.join(linear)}. "
            f"All linear layers of the blocks: --lora_module_name {in_blocks}"
        )
    config = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        use_rslora=bool(earlier) and uses_rslora(args.adapter_path),
        target_modules=target_modules(earlier, wanted, paths) if earlier else wanted,
        lora_dropout=args.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    use_own_layers(config)
    # in the model's dtype: DeepSpeed keeps float32 masters, and ZeRO-3 does not cast parameters of another dtype
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if earlier:
        copy_weights(model, earlier)
    return model


def train_all(args, load):
    """Train every parameter."""
    return load().requires_grad_(True)


TRAIN_TYPE = {"freeze": freeze, "ptuning": ptuning, "lora": lora, "all": train_all}


def shorten(names: list[str]) -> list[str]:
    """The parameter names of the first layer, as examples for all layers, and those outside the layers."""
    return [name for name in names if "layers." not in name or "layers.0." in name]


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Optimizer groups of the trained parameters: with weight decay where the family has it, and without."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if model.has_weight_decay(name) else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def count_parameters(model) -> tuple[int, int]:
    """Numbers of trained and of all parameters; under ZeRO-3 those of the whole model."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return trained, count_numbers(model)


def build_model(args, load):
    """Apply the method and the flags that save memory to the base model.

    Args:
        load: gives the base model; keyword arguments change its config.
    """

    def load_lean(**config):
        model = load(**config)
        model.save_memory(args.tiled_mlp, args.offload_inputs)
        return model

    model = TRAIN_TYPE[args.train_type](args, load_lean)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # on by transformers; costs a backward pass below what trains
    return model
