"""Which files a flag such as --train_path names: files and folders, each as PATH or PATH:WEIGHT. Imports no torch."""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from tuning.samples.file_kinds import path_problem

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")  # of data files, in a folder; each also packed
PACKED = ("", ".gz", ".bz2", ".xz")
# what stands in the folder of a model, of results or of a training state
NO_DATA = {"config.json", "adapter_config.json", "tokenizer.model", "ice_text.model", "run.json", "log.jsonl", "best"}
MOST = 1000  # the largest weight


class DataFile(NamedTuple):
    """A data file. weight: how often an epoch has each of its rows; 0.5: half of them."""

    path: str
    weight: float = 1.0


def find_files(texts: Iterable[str], weights: bool = False, base: str = "") -> tuple[list[DataFile], list[str]]:
    """The files that some values of a flag name, and lines about what a folder holds besides.

    Args:
        weights: a value may be PATH:WEIGHT.
        base: folder to which paths are relative.

    Raises:
        ValueError: one names no data file.
    """
    files, notes = [], []
    for text in texts:
        path, weight = _split_weight(text, weights, base)
        full = os.path.join(base, path)
        if not os.path.isdir(full):
            if problem := path_problem(full):
                raise ValueError(problem)
            files.append(DataFile(full, weight))
            continue
        names, others = _list_folder(full)
        files += [DataFile(os.path.join(full, name), weight) for name in names]
        if others:
            notes.append(f"{full}: not read: {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}")
    return files, notes


def _split_weight(text: str, weights: bool, base: str) -> tuple[str, float]:
    """Path and weight; a path that exists as it stands has weight 1."""
    path, colon, weight = text.rpartition(":")
    if (
        not colon
        or not path
        or os.path.exists(os.path.join(base, text))
        or not os.path.exists(os.path.join(base, path))
    ):
        return text, 1.0
    if not weights:
        raise ValueError(f"no such file; weights are for --train_path alone, so name {path}")
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", weight) or not 0 < float(weight) <= MOST:
        raise ValueError(f"the weight {weight!r} must be a number above 0 and at most {MOST}")
    return path, float(weight)


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    """The names of a folder's data files in order, and those of everything else in it that is not hidden."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if found := NO_DATA.intersection(names):
        raise ValueError(f"is no folder of data: with {min(found)} it is one of a model or of results")
    endings = tuple(ending + packed for ending in ENDINGS for packed in PACKED)
    data = [name for name in names if name.lower().endswith(endings) and os.path.isfile(os.path.join(folder, name))]
    if not data:
        raise ValueError(f"the folder has no data files ({', '.join(ENDINGS)}, each also with .gz, .bz2 or .xz)")
    return data, [name for name in names if name not in data]
