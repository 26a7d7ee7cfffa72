"""Runs several trainings one after the other in the same forked processes: start-up takes most of a tiny run's time."""

import gc
import json
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from runs import Forked

import train
import utils
from glm_models import ops
from tuning.engine import ds_config

LIMIT = 1500  # seconds for all trainings of a call


def run_jobs(folder: Path, ranks: int, jobs: dict[str, list[str]]) -> dict[str, list[float]]:
    """Losses of several trainings, by name. Stage 3 has processes of its own: it changes how modules are made.

    Args:
        jobs: arguments of train.py by name.
    """
    losses = {}
    for stage3 in (False, True):
        some = {name: argv for name, argv in jobs.items() if any("zero3" in word for word in argv) == stage3}
        if not some:
            continue
        results, log = folder / f"results-{ranks}.json", folder / f"log-{ranks}-{stage3}"
        codes = Forked(ranks, log, lambda rank, some=some, results=results: _run_all(some, results)).wait(LIMIT)
        assert codes == dict.fromkeys(range(ranks), 0), log.read_text()[-3000:]
        losses |= {name: [loss for _, loss in history] for name, history in json.loads(results.read_text()).items()}
    return losses


def _run_all(jobs: dict[str, list[str]], results: Path) -> None:
    ops.TILE, ops.CHUNK = 16, 10_000  # else tiny rows would fit in one
    ds_config.LARGEST_GROUP = 20_000  # and tiny models
    utils.silence_libraries(verbose=False)
    # any CPU can compute in both, if slowly; what train.py thinks of it is not what these runs are about
    accelerator = get_accelerator()
    accelerator.is_bf16_supported = accelerator.is_fp16_supported = lambda: True
    done = {}
    for name, argv in jobs.items():
        print("job", name, flush=True)
        done[name] = train.train(train.parse_args(argv))
        gc.collect()  # else models would pile up: engines have cycles
    if utils.is_rank_0():
        results.write_text(json.dumps(done))
