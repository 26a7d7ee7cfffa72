"""Time and memory of planning epochs, by the number of rows: the figures are of one process.

    python tests/benchmark/epoch_planning.py --rows 1000000

Each line has the seconds and the MiB that a step adds at its peak; the lengths of the rows themselves (16 bytes a row)
were there before. Every plan is made in a process of its own.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from process import forget_peak, status

from tuning.samples.epochs import BatchShape, Packs, pack_rows, plan_epoch
from tuning.samples.mixture import Mixture, add_replay, weigh

MAX_LEN = 1024
SHAPE = BatchShape(rows=4, accumulation=4, data_parallel=4)


class Data:
    """Stands for InstructionData: lengths as those of answers and short articles."""

    context_length, samples, files = None, (0,), []

    def __init__(self, rows: int):
        rng = np.random.default_rng(1)
        self.lengths = np.clip(rng.lognormal(5, 0.8, rows), 8, MAX_LEN).astype(np.int64)
        self.answer_lengths = 1 + (self.lengths * rng.random(rows) / 2).astype(np.int64)
        self.texts = np.zeros(rows, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def summary(self) -> str:
        return ""


def singly(rows: int) -> Packs:
    return Packs(np.arange(rows))


def first_epoch(data: Data) -> None:
    plan_epoch(data, singly(len(data)), SHAPE, 1, 1)


def later_epoch(data: Data) -> None:
    plan_epoch(data, singly(len(data)), SHAPE, 1, 2)


def by_length(data: Data) -> None:
    plan_epoch(data, singly(len(data)), SHAPE, 1, 1, by_length=True)


def packing(data: Data) -> None:
    pack_rows(data, MAX_LEN, 1)


def packed_epoch(data: Data) -> None:
    plan_epoch(data, pack_rows(data, MAX_LEN, 1), SHAPE, 1, 2)


def mixture(data: Data) -> None:
    files = Mixture([data])
    weigh(files, [1], np.arange(len(data)), Packs, 4, 1)
    mixed, _ = add_replay(files, data, singly(len(data)), 0.3, 4, 1)
    plan_epoch(mixed, mixed.epoch_packs(2), SHAPE, 1, 2)


def dealing(data: Data) -> None:
    for _ in plan_epoch(data, singly(len(data)), SHAPE, 1, 2):
        pass


ACTIONS = (first_epoch, later_epoch, by_length, packing, packed_epoch, mixture, dealing)


def measure(action, rows: int, results) -> None:
    """Send seconds and MiB of an action."""
    action(Data(1000))  # what is imported and compiled at the first use
    data = Data(rows)
    forget_peak()
    before, start = status("VmRSS"), time.perf_counter()
    action(data)
    results.put((time.perf_counter() - start, (status("VmHWM") - before) / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--actions", nargs="+", choices=[action.__name__ for action in ACTIONS])
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    found = []
    print("| rows | step | s | MiB |", "|---|---|---|---|", sep="\n")
    context = multiprocessing.get_context("fork")
    for rows in args.rows:
        for action in ACTIONS:
            if args.actions and action.__name__ not in args.actions:
                continue
            results = context.Queue()
            process = context.Process(target=measure, args=(action, rows, results))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"error: {action.__name__} of {rows} rows ended with exit code {process.exitcode}")
            seconds, mib = results.get()
            found.append({"rows": rows, "action": action.__name__, "seconds": seconds, "mib": mib})
            print(f"| {rows} | {action.__name__} | {seconds:.2f} | {mib:.0f} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
