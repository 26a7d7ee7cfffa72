"""Pipeline parallelism by DeepSpeed: a model cut into stages, each loaded and held by its own processes alone."""

import contextlib
import io
import itertools

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn
from transformers import initialization as init

from glm_models import MODE
from glm_models.checkpoint import FolderWeights
from glm_models.pipeline import (
    Blocks,
    FirstLayer,
    LastLayer,
    LastNorm,
    Prefix,
    count,
    cut_blocks,
    has_prefix,
    stage_modules,
)
from glm_models.pretrained import PREFIX
from tuning.engine.source import Source
from tuning.errors import UserError
from utils import control_group, cut_into_stages, on_rank_0, stage_count, tell_all


def divide_ranks(stages: int | None) -> None:
    """Divide the processes of this run into those of each stage; without --pipeline_stages each has the whole model.

    Raises:
        UserError: their number is not a multiple of the number of stages.
    """
    ranks = torch.distributed.get_world_size()
    if stages and ranks % stages:
        raise UserError(f"--pipeline_stages {stages}: {ranks} process{'es' * (ranks > 1)} cannot share {stages} stages")
    cut_into_stages(stages)


def cut_model(args, model, groups: list[dict], ds_config: dict) -> list[range] | None:
    """The numbers of the blocks of each stage; None without --pipeline_stages.

    Args:
        model: as the method makes it; no values are needed.
        groups: its parameter groups.
        ds_config: resolved.

    Raises:
        UserError: the model has fewer blocks than stages, a stage has nothing that trains, or DeepSpeed could not keep
            an embedding and an output layer equal.
    """
    if not args.pipeline_stages:
        return None
    family = MODE[args.mode]
    with torch.device("meta"), init.no_init_weights():
        base = family.model(family.config.from_pretrained(args.model_name_or_path))
    blocks = len(base.transformer.blocks)
    if blocks < args.pipeline_stages:
        raise UserError(f"--pipeline_stages {args.pipeline_stages}: the model has {blocks} transformer blocks")
    # what a method adds does not move the cuts: `load_stage` needs them before
    stages = cut_blocks(base, args.pipeline_stages)
    check_trained(whole_model(model), groups, stages)
    if tied_numbers(whole_model(model), 0, len(stages)) and ds_config["fp16"]["enabled"]:
        raise UserError(
            "--pipeline_stages: in fp16 DeepSpeed does not add up the gradients of a weight that several stages have "
            "(an embedding that is the output layer too, a P-Tuning prefix); use bf16, or LoRA"
        )
    return stages


def is_tied(model) -> bool:
    """Whether the output layer of a base model is its embedding, and trains."""
    return bool(model.all_tied_weights_keys) and model.get_input_embeddings().weight.requires_grad


def describe_stages(model, stages: list[range], copies: int) -> str:
    """The line with the blocks and the parameters of each stage.

    Args:
        copies: how many processes have the same stage.
    """
    sizes = [sum(map(count, stage_modules(whole_model(model), numbers))) for numbers in stages]
    parts = (f"{numbers[0]}-{numbers[-1]} ({size:,} parameters)" for numbers, size in zip(stages, sizes, strict=True))
    return (
        f"pipeline: {len(stages)} stages x {copies}, blocks {', '.join(parts)}; ZeRO stage 1, also where the ds file "
        "says 2"
    )


def tied_numbers(model, number: int, stages: int) -> int:
    """How many trained numbers of a base model this stage has that another one has too.

    Args:
        number: of the stage, of `stages`.
    """
    embedding = model.get_input_embeddings().weight
    shared = [embedding] if is_tied(model) and number in (0, stages - 1) else []
    shared += model.transformer.prefix_encoder.parameters() if has_prefix(model) else []
    return sum(parameter.numel() for parameter in shared if parameter.requires_grad)


def check_trained(model, groups: list[dict], stages: list[range]) -> None:
    """Make sure that each stage has parameters of each group: DeepSpeed's optimizer of a stage needs some.

    Raises:
        UserError: one has none.
    """
    for number, blocks in enumerate(stages):
        own = {id(p) for module in stage_modules(model, blocks) for p in module.parameters()}
        for group in groups:
            if not any(id(parameter) in own for parameter in group["params"]):
                kind = "with" if group["weight_decay"] else "without"
                raise UserError(
                    f"--pipeline_stages {len(stages)}: stage {number}, with blocks {blocks[0]} to {blocks[-1]}, has no "
                    f"parameters {kind} weight decay that train, and DeepSpeed's pipeline needs the same kinds on "
                    "every stage: train something in each, or use fewer stages"
                )


def whole_model(model):
    """The base model of a peft model; another model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def load_stage(source: Source, numbers: range):
    """Like `from_pretrained`, but only the weights of one stage are read; others are on the meta device.

    Called on every rank.

    Args:
        numbers: of the stage's blocks.

    Raises:
        CheckpointError: see Source.open.
    """
    source.open()
    with torch.device("meta"), init.no_init_weights():
        model = source.model_class(source.config).to(source.dtype)
    weights = FolderWeights(source.folder)
    if on_rank_0(lambda: differ(weights, model.all_tied_weights_keys)):
        model.all_tied_weights_keys.clear()  # as in transformers
    # the output layer gets a weight of its own, which DeepSpeed keeps equal to the embedding where they are tied
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.empty_like(head.weight))
    for module in stage_modules(model, numbers):
        module.to_empty(device="cpu")
    fill(model, weights)
    return model.eval()


def differ(weights: FolderWeights, tied: dict[str, str]) -> bool:
    """Whether weights that the config ties, by name, are different in the files of a folder."""
    there = [pair for pair in tied.items() if weights.where.keys() >= {*pair}]
    return any(not torch.equal(weights[one], weights[other]) for one, other in there)


@torch.no_grad()
def fill(model, weights: FolderWeights) -> None:
    """Read those weights of a model that are not on the meta device.

    A tied one that no file has is its partner's; a prefix that no file has is new, with the values that it would have
    without a pipeline.
    """
    there = weights.where.keys()
    partners = model.all_tied_weights_keys | {source: target for target, source in model.all_tied_weights_keys.items()}
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and (name in there or PREFIX not in name):
            parameter.copy_(weights[name if name in there else partners[name]])
    if has_prefix(model) and not any(PREFIX in name for name in there):
        model.transformer.prefix_encoder.apply(model._init_weights)


class Stages(PipelineModule):
    """DeepSpeed's pipeline of a model; this process makes the layers of its own stage only.

    Args:
        layers: of each stage.
    """

    def __init__(self, layers: list[list[LayerSpec]]):
        self.ends = list(itertools.accumulate(map(len, layers)))  # of the stages, in the list of all layers
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            super().__init__(
                itertools.chain(*layers), num_stages=len(layers), loss_fn=mean_of, partition_method="",
                dynamic_shape=True,
            )  # fmt: skip

    def _partition_layers(self, method: str) -> None:
        """Set where each stage begins and ends, in place of DeepSpeed's methods."""
        self.parts = [0, *self.ends]
        self._set_bounds(*self.parts[self.stage_id : self.stage_id + 2])


def mean_of(total: torch.Tensor, num_items: torch.Tensor) -> torch.Tensor:
    """The loss of a micro-batch: the same division as in modeling.answer_loss."""
    return total / num_items


def build_stages(model, stages: list[range]) -> Stages:
    """DeepSpeed's pipeline of a model that `load_stage` has loaded and a method has changed.

    Args:
        stages: numbers of the blocks of each stage.
    """
    base = whole_model(model)
    transformer, head = base.transformer, base.get_output_embeddings()
    first, last = (FirstLayer, transformer), (LastLayer, head)
    if is_tied(base):
        head.weight.requires_grad_(True)
        first, last = (TiedLayerSpec("vocabulary", *end, tied_weight_attr="vocabulary.weight") for end in (first, last))
    else:
        first, last = LayerSpec(*first), LayerSpec(*last)
    layers = [[LayerSpec(Blocks, transformer, numbers)] for numbers in stages]
    if has_prefix(base):
        names = [f"encoder.{name}" for name, _ in transformer.prefix_encoder.named_parameters()]
        for some in layers:
            some.insert(0, TiedLayerSpec("prefix", Prefix, transformer, tied_weight_attr=names))
    layers[0].insert(0, first)
    layers[-1] += [LayerSpec(LastNorm, transformer), last]
    return Stages(layers)


def own_groups(groups: list[dict]) -> list[dict]:
    """Parameter groups with those parameters alone that this process has."""
    return [group | {"params": [p for p in group["params"] if not p.is_meta]} for group in groups]


def find_holders(parameters: list[nn.Parameter]) -> list[int]:
    """For each parameter of a model the first rank that has its values. Called on every rank."""
    if stage_count() == 1:
        return [0] * len(parameters)
    everyone = tell_all([not parameter.is_meta for parameter in parameters])
    return [ranks.index(True) for ranks in zip(*everyone, strict=True)]


def send_to_rank_0(tensor: torch.Tensor, holder: int) -> torch.Tensor:
    """The tensor with its values on rank 0, sent by `holder` over the CPU; on other ranks the tensor as it is there.

    Called on every rank; only these two do anything.
    """
    rank = torch.distributed.get_rank()
    if holder == 0 or rank not in (0, holder):
        return tensor
    if rank == holder:
        torch.distributed.send(tensor.cpu().contiguous(), 0, control_group())
        return tensor
    received = torch.empty(tensor.shape, dtype=tensor.dtype)
    torch.distributed.recv(received, holder, control_group())
    return received
