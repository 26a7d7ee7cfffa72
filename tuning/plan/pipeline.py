"""`--plan` for a pipeline: the memory of each stage, and what the stages send."""

import argparse
import os

import torch

from tuning.engine.ds_config import ds_notes
from tuning.engine.pipeline import cut_model, describe_stages, tied_numbers, whole_model
from tuning.errors import UserError
from tuning.lora.earlier import take_lora_flags
from tuning.plan.allocator import CachingAllocator
from tuning.plan.host import GIB, MIB
from tuning.plan.planner import CONTEXT, NAMES, Build, check_deepspeed, expandable
from tuning.plan.stages import Stage, StageSimulator, plan_stages, trace_stage
from tuning.plan.traffic import Part, Traffic, stage_traffic
from tuning.plan.zero import Setup
from utils import is_rank_0, print_rank_0


def plan_pipeline(args: argparse.Namespace, build: Build) -> None:
    """Print the memory that each stage needs, and what it sends in an optimizer step.

    Raises:
        UserError: DeepSpeed was not tested; invalid flags; the processes cannot share the stages.
    """
    check_deepspeed()
    count = args.pipeline_stages
    gpus = args.plan_gpus if args.plan_gpus is not None else int(os.environ.get("WORLD_SIZE", count))
    if gpus % count:
        raise UserError(f"--pipeline_stages {count}: {gpus} GPUs cannot share {count} stages (--plan_gpus)")
    if not is_rank_0():
        return
    take_lora_flags(args)
    setup = build(args, gpus // count)
    model = whole_model(setup.model)
    stages = cut_model(args, setup.model, setup.groups, setup.ds_config)
    for line in ds_notes(setup.ds_config):
        print_rank_0(line)
    print_rank_0(describe_stages(setup.model, stages, gpus // count))
    answers = setup.batch["answer_positions"]
    planned = plan_stages(setup, model, stages)
    lines = [describe_stage(setup, model, number, stage, answers, gpus) for number, stage in enumerate(planned)]
    heads = ["stage", "in flight", *(NAMES[name] for name in PARTS), "slack", "CUDA", "peak", "sends"]
    tokens, dtype = setup.batch["input_ids"].numel(), str(next(model.parameters()).dtype).removeprefix("torch.")
    print_rank_0(
        f"plan (simulated): {args.mode} {args.train_type} in {dtype}, {args.ds_file}, "
        f"{gpus} GPUs, {args.gradient_accumulation_steps} micro-batches of {tokens} tokens in a step\n"
        "GiB per GPU at the peak; in flight: micro-batches whose activations are held; MiB sent in a step:\n"
        + "\n".join("".join(f"{word:>13}" for word in words) for words in [heads, *lines])
    )


PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")


def describe_stage(setup: Setup, model, number: int, stage: Stage, answers: torch.Tensor, gpus: int) -> list[str]:
    """The line of a stage, word by word."""
    stages = setup.ds_config["pipeline"]["stages"]
    memory = CachingAllocator(expandable())
    run = StageSimulator(stage, gpus // stages, memory)
    run.replay(trace_stage(stage, answers))
    sizes = [memory.at_peak.get(part, 0) for part in PARTS]
    sizes += [memory.peak_reserved - memory.peak_allocated, CONTEXT, memory.peak_reserved + CONTEXT]
    sent = traffic_of(setup, model, number, stage, run, gpus // stages)
    return [str(number), str(stage.in_flight), *(f"{size / GIB:.2f}" for size in sizes), f"{sent.total / MIB:.0f}"]


def traffic_of(setup: Setup, model, number: int, stage: Stage, run: StageSimulator, ranks: int) -> Traffic:
    """What a rank of a stage sends in a step with the longest micro-batches."""
    stages, config = setup.ds_config["pipeline"]["stages"], setup.ds_config
    trained = sum(p.numel() for p in run.trained)
    rows = [(setup.batch["input_ids"].numel(), len(setup.batch["segments"]))] * config["gradient_accumulation_steps"]
    part = Part(trained, tied_numbers(model, number, stages))
    return stage_traffic(part, (number, stages), rows, model.config.hidden_size, run.item, run.sum_item, ranks)
