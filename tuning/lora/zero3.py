"""LoRA on a base that ZeRO-3 has partitioned: peft and DeepSpeed are told which weights must be gathered."""

import contextlib

import deepspeed
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config


def is_partitioned(model: nn.Module) -> bool:
    """Whether the weights of a model are partitioned over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def peft_gathers(model: nn.Module):
    """Context in which peft gathers the weights that it reads, if they are partitioned.

    peft asks transformers whether there is ZeRO-3, which only transformers' own Trainer says.
    """
    if not is_partitioned(model):
        yield
        return
    said = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # transformers has a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del said


def read_elsewhere(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Parameters that a module reads though they are another one's: DoRA's lengths read those of their layer."""
    found = {}
    for layer in model.modules():
        for name, lengths in getattr(layer, "lora_magnitude_vector", {}).items():
            found[lengths] = [*layer.base_layer.parameters(), layer.lora_A[name].weight]
    return found


def register_reads(model: nn.Module) -> None:
    """Have ZeRO-3 gather what a module reads of others, for its own forward and backward pass.

    DeepSpeed finds such reads only in a forward pass in which the weights are not there by chance, and not while a
    checkpoint is recomputed.
    """
    if is_partitioned(model):
        for module, parameters in read_elsewhere(model).items():
            for parameter in parameters:
                deepspeed.zero.register_external_parameter(module, parameter)
