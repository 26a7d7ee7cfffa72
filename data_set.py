"""From an instruction file to batches: rows are read and checked, turned into ids and labels, and dealt out to ranks.

A tokenizer is known here by these only: `encode_prompts`, `encode_answers`, `context_length`, `fingerprint`,
`eos_token_id`, and by what findings.py asks of it. Where the ids lie on disk is the matter of cache.py.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader

from tuning.samples import cache
from tuning.samples.batches import Batch, MicroBatch
from tuning.samples.dataset import InstructionData, prepare, split_rows
from tuning.samples.epochs import pack_rows, plan_epoch
from tuning.samples.mixture import Mixture
from utils import data_parallel_rank, data_parallel_size, is_main, on_rank_0, once_per_node, say

# Batches


def epoch_loader(data: InstructionData, steps: list[list[MicroBatch]], rank: int, world_size: int, pin: bool):
    """A DataLoader over the batches of one rank."""
    mine = [micro_batch for step in steps for micro_batch in step[rank::world_size]]
    # a generator of its own: at each start a loader takes a number from the global one, which dropout draws from too
    return DataLoader(data, sampler=mine, batch_size=None, pin_memory=pin, generator=torch.Generator())


def load_data(args, tokenizer, path: str, several_outputs: bool = False) -> InstructionData:
    """A file's samples: prepared by one process a node, or taken from the cache, and then mapped into all of them."""
    settings = (path, tokenizer, args.max_len, args.max_src_len, args.is_skip, args.allow_empty_output)
    keep = args.data_cache != "none"
    cache_dir = (args.data_cache or cache.default_folder()) if keep else None
    more = {"skip_bad": args.on_bad_row == "skip", "several_outputs": several_outputs}
    prepared = once_per_node(lambda: prepare(*settings, cache_dir=cache_dir, progress=is_main(), **more))
    data = InstructionData(*settings, prepared=prepared)
    if not keep:
        on_rank_0(lambda: None)  # all have mapped it
        once_per_node(lambda: os.unlink(prepared))  # what is mapped stays readable
    return data


class Sources(NamedTuple):
    """The rows of a run.

    packs: of an epoch, what it takes of `data`: lists of samples' numbers, the same number of lists in each epoch.
    held_out: has the rows to validate on, held_out_rows; none without validation.
    contents: SHA-256 of each file, by the flag that names it.
    """

    data: InstructionData
    packs: Callable[[int], list[list[int]]]
    held_out: InstructionData
    held_out_rows: list[int]
    contents: dict[str, str]


def load_sources(args, tokenizer) -> Sources:
    """All files that flags name."""
    task = held_out = load_data(args, tokenizer, args.train_path)
    say("\n".join((f"data: {task.summary()}", *task.warnings())))
    contents = {"--train_path": task.content}
    rows, held_out_rows = range(len(task)), []
    if args.eval_ratio is not None:
        rows, held_out_rows = split_rows(task, args.eval_ratio)
        say(f"{len(rows)} of them to train on, {len(held_out_rows)} to validate on (--eval_ratio {args.eval_ratio:g})")
    elif args.eval_path:
        held_out = load_data(args, tokenizer, args.eval_path, several_outputs=True)
        held_out_rows, contents["--eval_path"] = list(range(len(held_out))), held_out.content
        say("\n".join((f"validation data: {held_out.summary()}", *held_out.warnings())))
        if held_out.content == task.content:
            say("warning: --eval_path has the very rows of --train_path: its scores say nothing of unseen rows")

    def pack(data, rows):
        return pack_rows(data, args.max_len, args.seed, rows) if args.packing else [[i] for i in rows]

    packs = pack(task, rows)
    if not args.replay_path:
        return Sources(task, lambda epoch: packs, held_out, held_out_rows, contents)
    general = load_data(args, tokenizer, args.replay_path)
    contents["--replay_path"] = general.content
    general_packs = pack(general, range(len(general)))
    longest = args.per_device_train_batch_size
    mixture = Mixture(task, packs, general, general_packs, args.replay_ratio, longest, args.seed)
    say("\n".join((f"replay: {mixture.summary()}", *general.warnings())))
    if general.content == task.content:
        say("warning: --replay_path has the very rows of --train_path")
    return Sources(mixture, mixture.epoch_packs, held_out, held_out_rows, contents)


def training_steps(engine, sources: Sources, args, epoch_steps: int) -> Iterator[tuple[int, list[Batch]]]:
    """Yield epoch and micro-batches of this rank for each optimiser step, from where the engine is to the end.

    Args:
        engine: DeepSpeed's; its `global_steps` are the steps done.
        epoch_steps: optimiser steps of an epoch.
    """
    rank, size, accumulation = data_parallel_rank(), data_parallel_size(), args.gradient_accumulation_steps
    split = (args.per_device_train_batch_size, accumulation, size)
    pin = get_accelerator().device_name() != "cpu"
    for epoch in range(engine.global_steps // epoch_steps + 1, args.num_train_epochs + 1):
        plan = plan_epoch(sources.data, sources.packs(epoch), *split, args.seed, epoch, args.group_by_length)
        left = plan[engine.global_steps % epoch_steps :]
        batches = iter(epoch_loader(sources.data, left, rank, size, pin))
        while step := list(itertools.islice(batches, accumulation)):
            yield epoch, step
