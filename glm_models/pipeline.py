"""A family's network as the stages of a pipeline: layers of which each takes what the one before it returns.

The first layer takes a row (`Row`): samples end to end, as data_set.py makes them. From then on a tuple goes from
layer to layer, and so from stage to stage: hidden states [1, tokens, hidden] and the row. Positions, which token sees
which, and where the answers are follow from the row. The last layer returns the summed loss of the answers.

A stage is made of a model whose other weights are on the meta device, so that no process holds what is not its own.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

from .attention import LayerInputs, as_segments, segments_tensor
from .modeling import IGNORE_INDEX, answer_loss
from .rotary import rotation_matrices


class Row(NamedTuple):
    """A micro-batch, as tensors of integers: they have no gradients, and no part is ever empty.

    input_ids, labels: [1, tokens].
    segments: [samples, 2], see attention.segments_tensor.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor


def pipeline_input(batch: dict) -> tuple[Row, torch.Tensor]:
    """A training batch (see LanguageModelMixin.forward for its keys) as a row, and the divisor of the summed loss."""
    row = Row(batch["input_ids"], batch["labels"], segments_tensor(batch["segments"]))
    return row, torch.tensor(float(batch["num_items_in_batch"]))


def find_answers(labels: torch.Tensor) -> torch.Tensor:
    """Where the learnt tokens of a row are: [learnt tokens]."""
    return (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]


class FirstLayer(nn.Module):
    """Row -> embedded tokens and row."""

    def __init__(self, transformer):
        super().__init__()
        self.vocabulary = transformer.get_input_embeddings()  # the name that LastLayer has too: they may be tied
        self.noise = transformer.noise_like if transformer.noise_alpha else None

    def forward(self, row: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        input_ids, labels, segments = row
        hidden_states = self.vocabulary(input_ids)
        if self.training and self.noise:
            hidden_states = hidden_states + self.noise(hidden_states, None, as_segments(segments))
        return hidden_states, input_ids, labels, segments


class Prefix(nn.Module):
    """Adds the P-Tuning prefix of all layers to hidden states and row, for the blocks of the same stage.

    All stages have the same encoder, since one network makes the prefix of all layers.
    """

    def __init__(self, transformer):
        super().__init__()
        self.encoder, self.key_values = transformer.prefix_encoder, transformer.prefix_key_values

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        *_, segments = inputs
        return *inputs, self.key_values(len(segments))


class Blocks(nn.Module):
    """Consecutive blocks: hidden states and row -> the same. The last block keeps the tokens that predict answers.

    A prefix that comes after the row is used and not passed on.

    Args:
        numbers: of the blocks, counted from 0.
    """

    def __init__(self, transformer, numbers: range):
        super().__init__()
        self.blocks = nn.ModuleList(transformer.blocks[number] for number in numbers)
        self.run = functools.partial(transformer.run_layers, numbers=numbers)
        self.positions, self.angles = transformer.segment_positions, transformer.rotary_angles
        self.pack = transformer.pack

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_states, input_ids, labels, rows, *prefix = inputs
        segments = as_segments(rows)
        rotation = rotation_matrices(self.angles(self.positions(input_ids, segments)), hidden_states.dtype)
        prefixes = prefix[0].unbind() if prefix else None
        before_answers = find_answers(labels) - 1  # acts in the last block of the model only
        packed = self.pack(segments, hidden_states)
        layer_inputs = LayerInputs(rotation, None, segments, packed, prefixes, keep_positions=before_answers)
        hidden_states, _ = self.run(hidden_states, layer_inputs)
        return hidden_states, input_ids, labels, rows


class LastNorm(nn.Module):
    """The norm after the last block: hidden states and row -> the same.

    A layer of its own: DeepSpeed takes all weights of a layer that is tied to another one for copies, and leaves copies
    out of the gradients' norm.
    """

    def __init__(self, transformer):
        super().__init__()
        self.norm = transformer.last_norm

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_states, *row = inputs
        return self.norm(hidden_states), *row


class LastLayer(nn.Module):
    """Hidden states [1, learnt tokens, hidden] and row -> their cross entropy in float32, summed."""

    def __init__(self, output_layer: nn.Module):
        super().__init__()
        self.vocabulary = output_layer

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden_states, _, labels, _ = inputs
        return answer_loss(hidden_states, labels, self.vocabulary, num_items=1, answer_positions=find_answers(labels))


def cut(costs: list[int], stages: int) -> list[range]:
    """Divide a list into parts of consecutive entries so that the largest sum is as small as possible.

    Args:
        costs: of each entry; at least as many as stages.

    Returns:
        The numbers of the entries of each part, none of them empty.
    """

    @functools.cache
    def best(start: int, parts: int) -> tuple[int, tuple[int, ...]]:
        """The largest sum of the entries from `start` on in so many parts, and where these end."""
        if parts == 1:
            return sum(costs[start:]), (len(costs),)
        found = []
        for end in range(start + 1, len(costs) - parts + 2):
            largest, ends = best(end, parts - 1)
            found.append((max(largest, sum(costs[start:end])), (end, *ends)))
        return min(found)

    ends = best(0, stages)[1]
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def cut_blocks(model, stages: int) -> list[range]:
    """The numbers of the blocks of each stage, so that the stages have about the same number of parameters.

    The first stage has the embedding too, the last one the last norm and the output layer.
    """
    transformer = model.transformer
    costs = [count(block) for block in transformer.blocks]
    costs[0] += count(transformer.get_input_embeddings())
    costs[-1] += count(transformer.last_norm) + count(model.get_output_embeddings())
    return cut(costs, stages)


def count(module: nn.Module) -> int:
    """Number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def stage_layers(model, numbers: range) -> list[nn.Module]:
    """The layers of a stage with these blocks."""
    transformer, last = model.transformer, len(model.transformer.blocks) - 1
    first_layer = [FirstLayer(transformer)] if 0 in numbers else []
    last_layers = [LastNorm(transformer), LastLayer(model.get_output_embeddings())] if last in numbers else []
    prefix = [Prefix(transformer)] if has_prefix(model) else []
    return [*first_layer, *prefix, Blocks(transformer, numbers), *last_layers]


def has_prefix(model) -> bool:
    """Whether a model has a P-Tuning prefix, which all stages need."""
    return model.config.pre_seq_len is not None


def stage_modules(model, numbers: range) -> list[nn.Module]:
    """The modules of a stage with these blocks, in a model whose other weights the stage does not need."""
    transformer, last = model.transformer, len(model.transformer.blocks) - 1
    modules = [transformer.get_input_embeddings()] * (0 in numbers)
    modules += [transformer.prefix_encoder] if has_prefix(model) else []
    modules += [transformer.blocks[number] for number in numbers]
    return modules + [transformer.last_norm, model.get_output_embeddings()] * (last in numbers)
