"""From data files to batches: rows are read and checked, turned into ids and labels, and dealt out to ranks.

Of a tokenizer this uses only `encode_dialogues`, `context_length`, `fingerprint`, and what findings.py names. cache.py
knows how the ids are stored on disk.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader

from tuning.errors import DataError
from tuning.samples import cache
from tuning.samples.batches import Batch
from tuning.samples.dataset import DataSettings, HeldOut, InstructionData, prepare, split_rows
from tuning.samples.dump import dump_samples
from tuning.samples.epochs import BatchShape, EpochPlan, Packs, RankBatches, RunLength, pack_rows, plan_epoch
from tuning.samples.formats import Columns
from tuning.samples.mixture import Mixture
from utils import data_parallel_rank, data_parallel_size, is_rank_0, on_rank_0, once_per_node, print_rank_0

# Batches


def epoch_loader(data: InstructionData, plan: EpochPlan, rank: int, first_step: int, pin: bool) -> DataLoader:
    """A DataLoader over the batches of one rank, from a step of the epoch on (counted from 0)."""
    # a generator of its own: at each start a loader takes a number from the global one, which dropout draws from too
    batches = RankBatches(plan, rank, first_step)
    return DataLoader(data, sampler=batches, batch_size=None, pin_memory=pin, generator=torch.Generator())


def data_settings(args, path: str, several_outputs: bool = False, columns: bool = True) -> DataSettings:
    """What the flags say of a data file.

    Args:
        columns: whether the flags that name columns are about this file.
    """
    return DataSettings(
        path,
        args.max_len,
        args.max_src_len,
        skip_cut=args.is_skip,
        empty_outputs=args.allow_empty_output,
        skip_bad=args.on_bad_row == "skip",
        several_outputs=several_outputs,
        columns=Columns.of(args) if columns else None,
        train_on=args.train_on,
    )


def cache_folder(args) -> str | None:
    """Where prepared files stay, by --data_cache; None if they are not kept."""
    return None if args.data_cache == "none" else args.data_cache or cache.default_folder()


def load_data(args, tokenizer, path: str, several_outputs: bool = False, columns: bool = True) -> InstructionData:
    """A file's samples: prepared by one process per node, or found in the cache, then mapped into all of them."""
    settings, folder = data_settings(args, path, several_outputs, columns), cache_folder(args)
    prepared = once_per_node(lambda: prepare(settings, tokenizer, folder, progress=is_rank_0()))
    data = InstructionData(settings, tokenizer, prepared)
    if folder is None:
        on_rank_0(lambda: None)  # all have mapped it
        once_per_node(lambda: os.unlink(prepared))  # what is mapped stays readable
    return data


def dump(args, tokenizer) -> None:
    """--dump_samples: write the samples that would be trained, before packing. Needs no other processes."""
    settings, folder = data_settings(args, args.train_path), cache_folder(args)
    prepared = prepare(settings, tokenizer, folder, progress=True) if folder else None
    data = InstructionData(settings, tokenizer, prepared)
    rows = range(len(data)) if args.eval_ratio is None else split_rows(data, args.eval_ratio)[0].tolist()
    dump_samples(data, rows, args.dump_samples)
    print("\n".join((f"data: {data.summary()}", *data.warnings(), f"{len(rows)} samples: {args.dump_samples}")))


class Sources(NamedTuple):
    """The rows of a run.

    data: all samples.
    packs: packs(epoch), from 1 on: the samples of that epoch; each epoch has the same number of packs.
    held_out: rows to validate on, None without validation.
    contents: SHA-256 of each file, by the flag that names it.
    """

    data: InstructionData
    packs: Callable[[int], Packs]
    held_out: HeldOut | None
    contents: dict[str, str]


def load_sources(args, tokenizer) -> Sources:
    """All files that flags name."""
    task = load_data(args, tokenizer, args.train_path)
    print_rank_0("\n".join((f"data: {task.summary()}", *task.warnings())))
    contents = {"--train_path": task.content}
    rows, held_out = np.arange(len(task)), None
    if args.eval_ratio is not None:
        rows, held_out_rows = split_rows(task, args.eval_ratio)
        held_out = HeldOut(task, held_out_rows.tolist(), args.train_path)
        print_rank_0(
            f"{len(rows)} of them to train on, {len(held_out.rows)} to validate on (--eval_ratio {args.eval_ratio:g})"
        )
    elif args.eval_path:
        data = load_data(args, tokenizer, args.eval_path, several_outputs=True)
        held_out, contents["--eval_path"] = HeldOut(data, list(range(len(data))), args.eval_path), data.content
        print_rank_0("\n".join((f"validation data: {data.summary()}", *data.warnings())))
        if data.content == task.content:
            print_rank_0(
                "warning: --eval_path has the very rows of --train_path: its scores say nothing of unseen rows"
            )

    if held_out and args.eval_generate != "off" and not held_out.answered:
        raise DataError(
            f"--eval_generate: the rows of {held_out.path} to validate on are all plain text, which has no answers; "
            "without the flag their loss is measured"
        )

    def pack(data, rows):
        return pack_rows(data, args.max_len, args.seed, rows) if args.packing else Packs(rows)

    packs = pack(task, rows)
    if not args.replay_path:
        return Sources(task, lambda epoch: packs, held_out, contents)
    general = load_data(args, tokenizer, args.replay_path, columns=False)
    contents["--replay_path"] = general.content
    general_packs = pack(general, np.arange(len(general)))
    longest = args.per_device_train_batch_size
    mixture = Mixture(task, packs, general, general_packs, args.replay_ratio, longest, args.seed)
    print_rank_0("\n".join((f"replay: {mixture.summary()}", *general.warnings())))
    if general.content == task.content:
        print_rank_0("warning: --replay_path has the very rows of --train_path")
    return Sources(mixture, mixture.epoch_packs, held_out, contents)


def batch_shape(args) -> BatchShape:
    """The rows of an optimizer step of this run; the processes must be connected."""
    return BatchShape(args.per_device_train_batch_size, args.gradient_accumulation_steps, data_parallel_size())


def training_steps(engine, sources: Sources, args, length: RunLength) -> Iterator[tuple[int, list[Batch]]]:
    """Yield epoch and micro-batches of this rank for each optimizer step, from where the engine is to the end.

    Args:
        engine: DeepSpeed's; its `global_steps` are the steps done.
        length: the run ends after its `total_steps`, which may be within an epoch.
    """
    rank, shape = data_parallel_rank(), batch_shape(args)
    pin = get_accelerator().device_name() != "cpu"
    step = engine.global_steps
    while step < length.total_steps:
        epoch, first = step // length.epoch_steps + 1, step % length.epoch_steps
        plan = plan_epoch(sources.data, sources.packs(epoch), shape, args.seed, epoch, args.group_by_length)
        batches = iter(epoch_loader(sources.data, plan, rank, first, pin))
        last = min(epoch * length.epoch_steps, length.total_steps)
        for _ in range(step, last):
            yield epoch, list(itertools.islice(batches, shape.accumulation))
        step = last
