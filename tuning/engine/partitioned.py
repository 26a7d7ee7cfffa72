"""Loading under ZeRO-3: every rank reads its own part of each weight, straight from the files."""

import deepspeed
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from transformers import initialization as init

from glm_models.checkpoint import read_weights
from glm_models.pretrained import read_generation_config


def load_partitioned(
    model_class,
    folder: str,
    config,
    dtype: torch.dtype,
    attention: str,
    ds_config: dict,
    new_prefix: bool = False,
):
    """As `model_class.from_pretrained`, but no process ever holds more than its part, one weight and one file.

    Called on every rank. transformers would read all files into rank 0, and send each weight from there.

    Args:
        model_class: of a family.
        config: its configuration.
        dtype: what `ds_config` makes of precision.
        attention: implementation in transformers' registry.
        new_prefix: see check_prefix.

    Raises:
        CheckpointError: the weights do not fit the config, or a file is missing or broken.
    """
    model_class.check_weights(folder, config, new_prefix)
    config.dtype, config._attn_implementation, config.name_or_path = dtype, attention, folder
    # each module's weights are partitioned as soon as it is made, with no values yet; ties wait for what is read
    with init.no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = model_class(config)
    missing, unknown, misshapen = fill(model, folder)
    tie(model, missing)
    model_class.check_fit(folder, missing, unknown, misshapen)
    initialise(model, missing)
    model.generation_config = read_generation_config(folder, config)
    return model.eval()


def own_part(parameter: torch.nn.Parameter) -> tuple[int, torch.Tensor]:
    """Where this rank's part of a partitioned parameter begins in the flat whole, and the part, without padding."""
    size = parameter.ds_tensor.ds_numel
    begin = torch.distributed.get_rank(parameter.ds_process_group) * size
    return begin, parameter.ds_tensor[: max(0, min(size, parameter.ds_numel - begin))]


@torch.no_grad()
def fill(model, folder: str) -> tuple[set[str], list[str], list[str]]:
    """Read the weights that the model has. Returns the names of those missing, unknown and misshapen in the files."""
    parameters = dict(model.named_parameters())
    missing, unknown, misshapen = set(parameters), [], []
    for name, tensor in read_weights(folder):
        if name not in parameters:
            unknown += [] if model.is_computed(name) else [name]
            continue
        missing.discard(name)
        parameter = parameters[name]
        if tensor.shape != parameter.ds_shape:
            misshapen.append(name)
        elif parameter.ds_tensor.status == PartitionedParamStatus.AVAILABLE:
            begin, part = own_part(parameter)
            part.copy_(tensor.reshape(-1)[begin : begin + len(part)])  # the file is mapped: only this is read of it
            parameter.ds_secondary_tensor = None  # a copy within the node (hpZeRO), made anew from the parts
        else:  # the parts are on NVMe, where only DeepSpeed knows its way
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensor)
        parameter._is_hf_initialized = True  # for `initialise`
    return missing, unknown, misshapen


def tie(model, missing: set[str]) -> None:
    """Tie what the config says, but for weights that the files hold twice and differently; as transformers does.

    Args:
        missing: tied names are taken from it.
    """
    parameters = dict(model.named_parameters())
    for target, source in list(model.all_tied_weights_keys.items()):
        if missing.isdisjoint({target, source}):
            pair = [parameters[target], parameters[source]]
            with deepspeed.zero.GatheredParameters(pair):
                if not torch.equal(*pair):
                    del model.all_tied_weights_keys[target]
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def initialise(model, missing: set[str]) -> None:
    """Give values to weights that are in no file: those of a new prefix. The same numbers as without ZeRO-3."""
    parameters = [parameter for name, parameter in model.named_parameters() if name in missing]
    if parameters:
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            model.transformer.prefix_encoder.apply(model._init_weights)
