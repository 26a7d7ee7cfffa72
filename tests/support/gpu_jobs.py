"""Trainings and predictions in one process, measured: what tests/gpu_check.py runs on the device.

    python tests/support/gpu_jobs.py JOBS RESULTS          (or under the deepspeed launcher)

JOBS is a json file, {name: [script, arguments]}, script train or predict; RESULTS gets a line for each job that ended:
{"name": ..., and what `run_training` returns, or "error"}. A process that dies leaves the lines before.
"""

import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from deepspeed.accelerator import get_accelerator

import predict
import train
import utils
from tuning.run.health import StepHooks


class Meter:
    """Watches one training from its second optimizer step on: memory of the device, waits for it, the engine.

    waits: operations that made the CPU wait for the device.
    micro_batches: those in which they were counted.
    """

    def __init__(self):
        self.engine, self.waits, self.micro_batches, self.on = None, 0, 0, False
        self.cuda = get_accelerator().device_name() == "cuda"

    def __enter__(self):
        self.kept = get_accelerator().synchronize
        get_accelerator().synchronize = self._synchronize
        return self

    def __exit__(self, *_):
        get_accelerator().synchronize = self.kept
        if self.on:
            torch.cuda.set_sync_debug_mode("default")
            self.warned.__exit__(None, None, None)
            self.waits += sum("synchroniz" in str(warning.message) for warning in self.caught)

    def before_step(self, watch, batches):
        self.engine = watch.engine
        if self.engine.global_steps == 0:
            get_accelerator().reset_peak_memory_stats()
        elif self.cuda and not self.on:
            self.on, self.warned = True, warnings.catch_warnings(record=True)
            self.caught = self.warned.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        self.micro_batches += self.on * len(batches)

    def _synchronize(self, *args):
        self.waits += self.on
        return self.kept(*args)


def run_training(argv: list[str]) -> dict:
    """losses, seconds, bytes of the device's memory, waits a micro-batch, whether the optimizer is fused."""
    gc.collect()  # engines have cycles: the one before would count
    get_accelerator().empty_cache()
    start = time.perf_counter()
    with Meter() as meter:
        history = train.train(train.parse_args(argv), StepHooks(meter.before_step))
    optimizer = getattr(meter.engine.optimizer, "optimizer", meter.engine.optimizer)
    return {
        "losses": [loss for _, loss in history],
        "seconds": time.perf_counter() - start,
        "allocated": get_accelerator().max_memory_allocated() if meter.cuda else None,
        "reserved": torch.cuda.max_memory_reserved() if meter.cuda else None,
        "waits": meter.waits / meter.micro_batches if meter.micro_batches else None,
        "fused": bool(optimizer.param_groups[0].get("fused")),
    }


def main() -> None:
    jobs, results = [Path(arg) for arg in sys.argv if arg.endswith((".json", ".jsonl"))]
    utils.silence_libraries(verbose=False)
    for name, (script, argv) in json.loads(jobs.read_text()).items():
        print("job", name, flush=True)
        try:
            result = run_training(argv) if script == "train" else predict.main(argv) or {}
        except Exception as error:  # the other jobs are tried all the same
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if utils.is_rank_0():
            with results.open("a") as file:
                file.write(json.dumps({"name": name, **result}) + "\n")
        if "error" in result and ("CUDA error" in result["error"] or int(os.environ.get("WORLD_SIZE", 1)) > 1):
            sys.exit(1)  # the device takes no more work from this process, or the ranks are no longer together


if __name__ == "__main__":
    main()
