"""The training methods, one function each in `TRAIN_TYPE`.

A method gets the flags and a function that loads the base model. It returns a model in which exactly the parameters to
train require gradients.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import initialization as init

from glm_models import MODE
from glm_models.attention import keep_attention
from glm_models.prefix import read_prefix
from glm_models.quantized import count_numbers
from tuning.arguments.lora import LORA, changes_base
from tuning.arguments.parser import split_names
from tuning.errors import UserError
from tuning.lora.earlier import copy_weights, read_start, target_modules
from tuning.lora.layers import more_than_plain, use_own_layers
from tuning.lora.prefix import load_with_prefix
from tuning.lora.targets import find_targets, find_whole, linear_paths, tied_layers
from tuning.lora.zero3 import peft_gathers, register_reads


def freeze(args, load):
    """Train the parameters whose name contains one of --freeze_module_name, or the last blocks; freeze all others."""
    model = load()
    if args.train_last_layers is not None:
        return train_last_blocks(model, args.train_last_layers)
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


def train_last_blocks(model, count: int):
    """Train the last `count` transformer blocks, freeze all else.

    Raises:
        UserError: the model has fewer blocks.
    """
    blocks = model.transformer.blocks
    if count > len(blocks):
        raise UserError(f"--train_last_layers {count}: the model has {len(blocks)} transformer blocks")
    model.requires_grad_(False)
    for block in blocks[-count:]:
        block.requires_grad_(True)
    return model


def ptuning(args, load):
    """P-Tuning v2: train keys and values that are put before those of the tokens in every layer; freeze the model.

    With --ptuning_checkpoint they start as those of that prefix.
    """
    config = {key: getattr(args, key) for key in ("pre_seq_len", "prefix_projection", "prefix_dropout")}
    earlier = read_prefix(args.ptuning_checkpoint) if args.ptuning_checkpoint else None
    model = load_with_prefix(load, earlier, **config) if earlier else load(**config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prefix_encoder." in name)
    return model


def lora(args, load):
    """LoRA (peft): train low-rank updates of the linear layers in --lora_module_name; freeze the model.

    With --adapter_path the updates start as that adapter's; see earlier.take_lora_flags.
    """
    earlier = read_start(args.adapter_path) if args.adapter_path else None
    model = load()
    targets = find_targets(model, args.lora_module_name)
    whole = find_whole(model, args.modules_to_save, targets)
    start = args.init_lora_weights or LORA["init_lora_weights"]  # none with --adapter_path
    tied = [name for name in targets if name in {path.rpartition(".")[2] for path in tied_layers(model)}]
    if changes_base(start) and tied:
        raise UserError(f"--init_lora_weights {start} would change the embedding, which is tied to {tied[0]}")
    config = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=True if start == "true" else start,
        target_modules=target_modules(earlier, targets, linear_paths(model)) if earlier else targets,
        modules_to_save=whole,
        lora_dropout=args.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    if args.quantization_bit and (key := more_than_plain(config.to_dict())):
        raise UserError(f"--quantization_bit goes with plain LoRA, and {key} makes the adapter more than that")
    use_own_layers(config)
    # in the model's dtype: DeepSpeed keeps float32 masters, and ZeRO-3 does not cast parameters of another dtype
    with peft_gathers(model):
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    register_reads(model)
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


def parameter_groups(model, args) -> list[dict]:
    """Optimizer groups of the trained parameters: with weight decay where the family has it, and without.

    With --loraplus_lr_ratio, which is LoRA+, each group has its own peak learning rate, `lr`: those of lora_B, and of
    what has one dimension (as in peft: magnitudes of DoRA, biases, norms), a multiple of --learning_rate.
    """
    ratio = args.loraplus_lr_ratio
    groups: dict[tuple[bool, bool], list] = {(fast, decays): [] for fast in (False, True) for decays in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fast = ratio is not None and (".lora_B." in name or parameter.ndim == 1)
            groups[fast, decays_weight(model, name)].append(parameter)
    found = []
    for (fast, decays), parameters in groups.items():
        rate = {} if ratio is None else {"lr": args.learning_rate * (ratio if fast else 1)}
        found.append({"params": parameters, "weight_decay": args.weight_decay if decays else 0.0, **rate})
    return [group for group in found if group["params"]]


def decays_weight(model, name: str) -> bool:
    """Whether a parameter has weight decay: not biases, norms, and DoRA's magnitudes, which scale as norms do."""
    return model.has_weight_decay(name) and "lora_magnitude_vector" not in name


def count_parameters(model) -> tuple[int, int]:
    """Numbers of trained and of all parameters; under ZeRO-3 and in a pipeline those of the whole model."""
    twice = tuple(model.all_tied_weights_keys)  # in a pipeline, tied weights are two
    parameters = [(not name.endswith(twice), p) for name, p in model.named_parameters()]
    trained = sum(getattr(p, "ds_numel", p.numel()) for once, p in parameters if once and p.requires_grad)
    return trained, count_numbers(model) - sum(p.numel() for once, p in parameters if not once)


def build_model(args, load):
    """Apply the method and the flags that save memory to the base model.

    Args:
        load: gives the base model; keyword arguments change its config.
    """

    def load_lean(**config):
        model = load(**config)
        model.save_memory(args.tiled_mlp, args.offload_inputs)
        model.add_embedding_noise(args.neftune_noise_alpha or 0.0)
        return model

    model = TRAIN_TYPE[args.train_type](args, load_lean)
    if args.gradient_checkpointing:
        more = {"context_fn": keep_attention} if args.keep_attention else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **more})
        model.disable_input_require_grads()  # on by transformers; costs a backward pass below what trains
    return model


def zero3_problem(args) -> str | None:
    """Why this method cannot train under ZeRO-3; None if it can."""
    if args.train_type == "lora" and changes_base(args.init_lora_weights or ""):
        return (
            f"--init_lora_weights {args.init_lora_weights} decomposes whole weights of the base and changes them, but "
            "ZeRO-3 has a part of each on every card; use a ds file of ZeRO-2, or gaussian or orthogonal"
        )
    return None


def check_zero3(args, stage: int) -> None:
    """Refuse a method that cannot train under this ZeRO stage.

    Raises:
        UserError: see zero3_problem.
    """
    if stage == 3 and (problem := zero3_problem(args)):
        raise UserError(problem)


def check_method(args):
    """Apply the method to a model without weights, so that wrong names are found before weights are read.

    Returns:
        That model.

    Raises:
        UserError: see the methods.
    """

    def load(**changes):
        family = MODE[args.mode]
        return family.model(family.config.from_pretrained(args.model_name_or_path, **changes))

    with torch.device("meta"), init.no_init_weights():
        return build_model(args, load)
