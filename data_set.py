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
from tuning.samples.data_files import DataFile, find_files
from tuning.samples.dataset import DataSettings, HeldOut, InstructionData, prepare, split_rows
from tuning.samples.dump import dump_samples
from tuning.samples.epochs import BatchShape, EpochPlan, Packs, RankBatches, RunLength, pack_rows, plan_epoch
from tuning.samples.formats import Columns
from tuning.samples.mixture import Mixture, add_replay, shared_samples, weigh
from tuning.samples.row_files import describe_file
from utils import (
    check_same,
    data_parallel_rank,
    data_parallel_size,
    is_rank_0,
    on_rank_0,
    once_per_node,
    print_rank_0,
    wait_for_all,
)

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
    check_same({path: f"SHA-256 {data.content[:12]}"})
    if folder is None:
        wait_for_all()  # all have mapped it
        once_per_node(lambda: os.unlink(prepared))  # what is mapped stays readable
    return data


def dump(args, tokenizer) -> None:
    """--dump_samples: write the samples that would be trained, before packing. Needs no other processes."""
    paths, folder = name_files(args.train_path, weights=True), cache_folder(args)
    files = []
    for path, _ in paths:
        settings = data_settings(args, path)
        prepared = prepare(settings, tokenizer, folder, progress=True) if folder else None
        files.append(InstructionData(settings, tokenizer, prepared))
        describe_data("data", files[-1], settings.columns, len(paths) > 1)
    data = Mixture(files)
    rows = range(len(data)) if args.eval_ratio is None else split_rows(data, args.eval_ratio)[0].tolist()
    dump_samples(data, rows, args.dump_samples)
    print(f"{len(rows)} samples: {args.dump_samples}")


def name_files(texts: list[str], weights: bool = False) -> list[DataFile]:
    """The files that the values of a flag name; what a folder holds besides is printed."""
    files, notes = find_files(texts, weights)
    for line in notes:
        print_rank_0(line)
    return files


def describe_data(title: str, data: InstructionData, columns: Columns | None, named: bool) -> None:
    """Print on rank 0 what was read of a file, and what kind of file it is.

    Args:
        named: with its path.
    """
    if is_rank_0():
        ((path, _),) = data.files
        where = f"{path}: " if named else ""
        print_rank_0("\n".join((*describe_file(path, columns), f"{title}: {where}{data.summary()}", *data.warnings())))


class Sources(NamedTuple):
    """The rows of a run.

    data: all samples.
    packs: packs(epoch), from 1 on: the samples of that epoch; each epoch has the same number of packs.
    held_out: rows to validate on, None without validation.
    contents: what a resumed run is compared by: "SHA-256 of" each flag that names files, and their weights.
    """

    data: InstructionData
    packs: Callable[[int], Packs]
    held_out: HeldOut | None
    contents: dict


def load_sources(args, tokenizer) -> Sources:
    """All files that flags name."""
    files = on_rank_0(lambda: name_files(args.train_path, weights=True))  # a folder is listed once
    weights = [weight for _, weight in files]
    task, contents = _load_files(args, tokenizer, "--train_path", [path for path, _ in files])
    if any(weight != 1 for weight in weights):
        contents["weights of --train_path"] = weights
    rows, held_out, more = _hold_out(args, tokenizer, task)

    def pack(data, rows):
        return pack_rows(data, args.max_len, args.seed, rows) if args.packing else Packs(rows)

    longest = args.per_device_train_batch_size
    weigh(task, weights, rows, lambda some: pack(task, some), longest, args.seed)
    if len(files) > 1 or weights != [1]:
        about = "about " * (args.packing and weights != [1] * len(weights))
        each = ", ".join(f"{path} x {weight:g}" for path, weight in files)
        print_rank_0(f"an epoch: {about}{task.rows:.0f} rows, of {each}")
    if not args.replay_path:
        return Sources(task, task.epoch_packs, held_out, contents | more)
    general = load_data(args, tokenizer, args.replay_path, columns=False)
    general_packs = pack(general, np.arange(len(general)))
    mixture, text = add_replay(task, general, general_packs, args.replay_ratio, longest, args.seed)
    if is_rank_0():
        print_rank_0("\n".join((*describe_file(args.replay_path), f"replay: {text}", *general.warnings())))
    if any(general.content == one.content for one in task.parts):
        print_rank_0("warning: --replay_path has the very rows of --train_path")
    return Sources(
        mixture, mixture.epoch_packs, held_out, contents | more | {"SHA-256 of --replay_path": general.content}
    )


def _load_files(args, tokenizer, flag: str, paths: list[str], several_outputs: bool = False) -> tuple[Mixture, dict]:
    """The samples of the files of a flag, and their `contents`."""
    title = {"--train_path": "data", "--eval_path": "validation data"}[flag]
    parts = []
    for path in paths:
        parts.append(load_data(args, tokenizer, path, several_outputs))
        describe_data(title, parts[-1], Columns.of(args), len(paths) > 1)
    if is_rank_0():
        for line in shared_samples(parts, cache_folder(args)):
            print_rank_0(line)
    several = {f"file {number}": one.content for number, one in enumerate(parts, 1)}
    return Mixture(parts), {f"SHA-256 of {flag}": several if len(parts) > 1 else parts[0].content}


def _hold_out(args, tokenizer, task: Mixture) -> tuple[np.ndarray, HeldOut | None, dict]:
    """Rows to train on, those to validate on, and `contents` of --eval_path."""
    rows, held_out, contents = np.arange(len(task)), None, {}
    if args.eval_ratio is not None:
        rows, held_out_rows = split_rows(task, args.eval_ratio)
        held_out = HeldOut(task, held_out_rows.tolist(), "--train_path")
        print_rank_0(
            f"{len(rows)} of them to train on, {len(held_out.rows)} to validate on (--eval_ratio {args.eval_ratio:g})"
        )
    elif args.eval_path:
        paths = [path for path, _ in on_rank_0(lambda: name_files(args.eval_path))]
        data, contents = _load_files(args, tokenizer, "--eval_path", paths, several_outputs=True)
        held_out = HeldOut(data, list(range(len(data))), "--eval_path")
        if {one.content for one in data.parts} & {one.content for one in task.parts}:
            print_rank_0(
                "warning: --eval_path has the very rows of --train_path: its scores say nothing of unseen rows"
            )
    if held_out and args.eval_generate != "off" and not held_out.answered:
        raise DataError(
            f"--eval_generate: the rows of {held_out.name} to validate on are all plain text, which has no answers; "
            "without the flag their loss is measured"
        )
    return rows, held_out, contents


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
