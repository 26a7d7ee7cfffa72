"""Loading under ZeRO-3: every rank reads its own part of each weight directly from the files."""

import deepspeed
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from transformers import initialization as init

from glm_models.pretrained import read_generation_config
from tuning.engine.source import Source
from utils import wait_for_all


def load_partitioned(source: Source, ds_config: dict):
    """Like `from_pretrained`, but no process holds more than its part, one weight and one file.

    Called on every rank. transformers would read all files on rank 0 and send each weight from there.

    Raises:
        CheckpointError: see Source.open.
    """
    source.open()
    wait_for_all()
    # Each module is partitioned as soon as it is made, without values. Weights are tied after the files are read.
    with init.no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = source.model_class(source.config)
    missing, unknown, misshapen = fill(model, source.read())
    wait_for_all()  # a rank's disk may be far slower
    tie(model, missing)
    model.check_fit(source.folder, missing, unknown, misshapen)
    initialise(model, missing)
    model.generation_config = read_generation_config(source.folder, source.config)
    return model.eval()


def own_part(parameter: torch.nn.Parameter) -> tuple[int, torch.Tensor]:
    """Offset of this rank's part in the flat parameter, and the part itself without padding."""
    size = parameter.ds_tensor.ds_numel
    begin = torch.distributed.get_rank(parameter.ds_process_group) * size
    return begin, parameter.ds_tensor[: max(0, min(size, parameter.ds_numel - begin))]


@torch.no_grad()
def fill(model, weights) -> tuple[set[str], list[str], list[str]]:
    """Read the model's weights, (name, tensor) each. Returns names that are missing, unknown, or of another shape."""
    parameters = dict(model.named_parameters())
    missing, unknown, misshapen = set(parameters), [], []
    for name, tensor in weights:
        if name not in parameters:
            unknown += [] if model.is_computed(name) else [name]
            continue
        missing.discard(name)
        parameter = parameters[name]
        if tensor.shape != parameter.ds_shape:
            misshapen.append(name)
        elif parameter.ds_tensor.status == PartitionedParamStatus.AVAILABLE:
            begin, part = own_part(parameter)
            part.copy_(tensor.reshape(-1)[begin : begin + len(part)])  # memory-mapped: only this part is read
            parameter.ds_secondary_tensor = None  # hpZeRO's copy within the node; made again from the parts
        else:  # the parts are on NVMe; only DeepSpeed can write them
            wait_for_all()
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensor)
        parameter._is_hf_initialized = True  # for `initialise`
    return missing, unknown, misshapen


def tie(model, missing: set[str]) -> None:
    """Tie weights as the config says, except pairs that differ in the files; as transformers does.

    Args:
        missing: tied names are removed from it.
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
    """Initialise weights that are in no file: those of a new prefix. Same numbers as without ZeRO-3."""
    parameters = [parameter for name, parameter in model.named_parameters() if name in missing]
    if parameters:
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            model.transformer.prefix_encoder.apply(model._init_weights)
