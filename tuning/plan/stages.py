"""The memory of each stage of a pipeline (--pipeline_stages), simulated like that of a whole model.

DeepSpeed's schedule (deepspeed/runtime/pipe/schedule.py) lets a stage run its forward pass for as many micro-batches as
there are stages from it to the last one before the first backward pass comes: so many sets of activations are held.
Taken from deepspeed/runtime/pipe/engine.py and bf16_optimizer.py of 0.19.8. Nothing here was measured on a GPU.
"""

import types
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from glm_models import pipeline
from glm_models.attention import segments_tensor
from glm_models.pipeline import stage_layers
from tuning.plan.allocator import CachingAllocator
from tuning.plan.trace import Event, trace_step
from tuning.plan.zero import Setup, Zero12Simulator


class _Sent(torch.autograd.Function):
    """Hidden states for the next stage, whose gradient comes back in a buffer of DeepSpeed's."""

    @staticmethod
    def forward(ctx, hidden_states):
        ctx.save_for_backward(hidden_states)
        return hidden_states.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        (hidden_states,) = ctx.saved_tensors
        return torch.empty_like(hidden_states)


class StageModel(nn.Module):
    """A stage as a model: forward(**batch).loss, where a stage before the last one sends its hidden states on.

    Args:
        model: the whole one, on the meta device.
        numbers: of the stage's blocks.
    """

    def __init__(self, model, numbers: range):
        super().__init__()
        self.config, self.is_first = model.config, 0 in numbers
        self.layers = nn.ModuleList(stage_layers(model, numbers))

    def forward(self, hidden_states, input_ids, labels, segments):
        row = (input_ids, labels, segments)
        flow = row if self.is_first else (hidden_states.clone(), *row)  # DeepSpeed makes this copy
        for layer in self.layers:
            flow = layer(flow)
        return types.SimpleNamespace(loss=_Sent.apply(flow[0]) if isinstance(flow, tuple) else flow)


class Stage(NamedTuple):
    """One stage of a planned pipeline.

    numbers: of its blocks.
    setup: of the stage alone.
    hidden: bytes of the hidden states that it gets from the stage before it, or sends.
    in_flight: micro-batches whose activations it holds at once.
    """

    numbers: range
    setup: Setup
    hidden: int
    in_flight: int


def plan_stages(setup: Setup, model, stages: list[range]) -> list[Stage]:
    """The stages of a training.

    Args:
        setup: of the whole model.
        model: the base model in it.
    """
    batch, found = setup.batch, []
    row = {name: batch[name].to("meta") for name in ("input_ids", "labels")}
    row["segments"] = segments_tensor(batch["segments"], "cpu")  # their values are needed
    weight = next(model.parameters())
    hidden = weight.new_empty(*batch["input_ids"].shape, model.config.hidden_size).requires_grad_()
    accumulation = setup.ds_config["gradient_accumulation_steps"]
    for number, numbers in enumerate(stages):
        part = StageModel(model, numbers).train()
        own = set(map(id, part.parameters()))
        groups = [group | {"params": [p for p in group["params"] if id(p) in own]} for group in setup.groups]
        inputs = {"hidden_states": hidden, **row}
        in_flight = min(len(stages) - number, accumulation)
        nbytes = hidden.numel() * hidden.element_size()
        found.append(Stage(numbers, Setup(part, inputs, setup.ds_config, groups), nbytes, in_flight))
    return found


def trace_stage(stage: Stage, answers: torch.Tensor) -> list[Event]:
    """Trace of one micro-batch in a stage.

    Args:
        answers: where the learnt tokens are, which the meta device does not find.
    """
    with mock.patch.object(pipeline, "find_answers", lambda labels: answers.to("meta")):
        return trace_step(stage.setup.model, stage.setup.batch)


def held_bytes(trace: list[Event]) -> int:
    """Bytes that a micro-batch holds between its forward and its backward pass."""
    sizes: dict = {}
    for event in trace:
        if event.what == "alloc" and event.tag != "host":
            sizes[event.key] = event.size
        elif event.what == "free":
            sizes.pop(event.key, None)
        elif event.what in ("backward", "gradient"):
            break
    return sum(sizes.values())


class StageSimulator(Zero12Simulator):
    """Replays the trace of a stage: ZeRO stage 1 over the ranks that have the same stage.

    With bf16 weights and float32 sums DeepSpeed uses its BF16_Optimizer: sums of all gradients of the stage, and the
    bf16 gradients of a micro-batch until its backward pass ends.
    """

    def __init__(self, stage: Stage, ranks: int, memory: CachingAllocator):
        super().__init__(stage.setup, ranks, memory)
        self.stage_of_pipeline = stage
        self.gradients: list = []  # blocks of the micro-batch's gradients

    def replay(self, trace: list[Event]) -> None:
        stage = self.stage_of_pipeline
        self.allocate("buffers", 2 * stage.hidden)  # what is received: activations, and gradients
        self.allocate("activations", (stage.in_flight - 1) * (held_bytes(trace) + stage.hidden))
        super().replay(trace)

    def allocate_states(self) -> None:
        super().allocate_states()
        if self.sums_apart and self.sums is None:
            self.sums = self.allocate("gradients", self._sum_size())

    def on_gradient(self, parameter, block) -> None:
        self.held.add(block)

    def end_of_backward(self) -> None:
        self.held.clear()
