"""Run several trainings in one process a rank: start-up is what takes most of the time of a tiny run.

    deepspeed --num_gpus 2 tests/support/jobs.py JOBS RESULTS

JOBS is a json file, {name: arguments of train.py}; RESULTS gets {name: [[step, loss], ...]}.
"""

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from deepspeed.accelerator import get_accelerator

import train
import utils
from glm_models import ops
from tuning.engine import ds_config


def main():
    torch.set_num_threads(1)
    jobs, results = [Path(arg) for arg in sys.argv if arg.endswith(".json")]
    ops.TILE, ops.CHUNK = 16, 10_000  # else tiny rows would fit in one
    ds_config.LARGEST_GROUP = 20_000  # and tiny models
    utils.silence_libraries(verbose=False)
    # any CPU can compute in both, if slowly; what train.py thinks of it is not what these runs are about
    accelerator = get_accelerator()
    accelerator.is_bf16_supported = accelerator.is_fp16_supported = lambda: True
    done = {}
    for name, argv in json.loads(jobs.read_text()).items():
        print("job", name, flush=True)
        done[name] = train.train(train.parse_args(argv))
        gc.collect()  # else models would pile up: engines have cycles
        if len(done) == 1:  # all is imported now, and stays: DeepSpeed looks for garbage at each start, for a second
            gc.freeze()
    if utils.is_rank_0():
        results.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
