"""What the cards of a training send each other in an optimizer step, in bytes: in a pipeline, under ZeRO-2 and ZeRO-3.

Counted is what a rank hands over to the other ranks: what it sends to the next or previous stage, the input of a sum
over ranks (all-reduce, reduce-scatter), and the output of a gathering of weights. A few numbers beside that (norms,
losses, signals) are left out. tests/pipelines.py compares this with what is really handed over.
"""

from typing import NamedTuple

from tuning.plan.host import MIB
from tuning.plan.zero import Setup

ROW_NUMBERS = 8  # bytes of a token id, a label, a length
META = 4 * 256  # DeepSpeed sends the shapes before the tensors, in a buffer of 256 numbers


class Traffic(NamedTuple):
    """Bytes of one rank in an optimizer step.

    stages: to the next and the previous stage.
    sums: gradients to be summed over ranks.
    weights: gathered from other ranks.
    """

    stages: int = 0
    sums: int = 0
    weights: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class Part(NamedTuple):
    """What a rank of a stage trains: numbers of weights.

    trained: of the stage.
    tied: of the weight that is tied to one of another stage, and trains; 0 without.
    """

    trained: int
    tied: int = 0


def stage_traffic(
    part: Part,
    position: tuple[int, int],
    rows: list[tuple[int, int]],
    hidden: int,
    item: int,
    sum_item: int,
    ranks: int,
) -> Traffic:
    """Of a rank in a pipeline.

    Args:
        position: number of the stage, and how many there are.
        rows: tokens and samples of each micro-batch.
        hidden: size of hidden states.
        item, sum_item: bytes per number of the weights, and of the sums of gradients.
        ranks: that have the same stage.
    """
    number, stages = position
    sent = 0
    for tokens, samples in rows:
        if number < stages - 1:
            sent += META + tokens * (hidden * item + 2 * ROW_NUMBERS) + 2 * samples * ROW_NUMBERS
        if number > 0:
            sent += tokens * hidden * item
    sums = part.tied * sum_item
    if ranks > 1:
        sums += part.trained * sum_item
    return Traffic(sent, sums, part.trained * item if ranks > 1 else 0)


def zero_traffic(stage: int, trained: int, used: int, micro_batches: int, item: int) -> Traffic:
    """Of a rank under ZeRO-2 or ZeRO-3 on several cards.

    Args:
        trained: numbers of trained weights.
        used: numbers of all weights, see `used_numbers`.
        micro_batches: of this rank.
    """
    sums = micro_batches * trained * item
    if stage < 3:
        return Traffic(sums=sums, weights=trained * item)
    return Traffic(sums=sums, weights=2 * micro_batches * used * item)  # for the forward and the backward pass


def used_numbers(model) -> int:
    """Numbers of all weights; of one that two layers share twice, since ZeRO-3 gathers it for each."""
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    shared = model.get_input_embeddings().weight
    return numbers + (getattr(shared, "ds_numel", shared.numel()) if model.all_tied_weights_keys else 0)


def describe_traffic(setup: Setup, gpus: int) -> list[str]:
    """A line with what a GPU of several sends in an optimizer step; none for a single one."""
    if gpus == 1:
        return []
    zero, item = setup.ds_config["zero_optimization"], next(setup.model.parameters()).element_size()
    trained = sum(p.numel() for group in setup.groups for p in group["params"])
    accumulation = setup.ds_config["gradient_accumulation_steps"]
    sent = zero_traffic(zero["stage"], trained, used_numbers(setup.model), accumulation, item)
    gradients, weights = (f"{size / MIB:.0f} MiB" for size in (sent.sums, sent.weights))
    most = "at most " * (zero["stage"] == 3)  # what is used again soon is kept
    return [f"sent by each GPU in a step: {gradients} of gradients, {most}{weights} of weights"]
