"""`train.py --dump_samples FILE`: the samples of a training file as text, for users who want to see their labels."""

import json
import os
from collections.abc import Iterable

from tuning.errors import DataError
from tuning.samples.cache import whole_file
from tuning.samples.dataset import InstructionData


def dump_samples(data: InstructionData, rows: Iterable[int], path: str) -> None:
    """Write samples in order, a line of JSON each: file, line, input_ids and labels (-100 where nothing is learnt).

    Args:
        rows: numbers of the samples in `data`.

    Raises:
        DataError: the file is there already, or it cannot be written.
    """
    if os.path.exists(path):
        raise DataError(f"--dump_samples {path}: the file is there already; name a new one, or remove it")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with whole_file(path, "x", encoding="utf-8") as file:
            for row in rows:
                sample = data.samples[row]
                path, line = data.place(row)
                file.write(
                    json.dumps({"file": path, "line": line, "input_ids": sample.input_ids, "labels": sample.labels})
                    + "\n"
                )
    except OSError as error:
        raise DataError(f"--dump_samples {path}: cannot be written: {error.strerror}") from None
