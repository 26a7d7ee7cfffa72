"""Main memory that loading a checkpoint takes, at the most, in each of two ranks under ZeRO-2 and ZeRO-3.

    python tests/benchmark/loading.py

Makes a random ChatGLM3 of about 2 GB in shards of 0.25 GB, and loads it as train.py does. Pages of the files count once
they are read; under ZeRO-2 on a CPU that is when training first uses a weight.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from process import forget_peak, status

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


def load(folder: str, ds_file: str) -> None:
    import torch

    import train
    import utils

    torch.set_num_threads(1)
    utils.quiet(verbose=False)
    rank, world_size = utils.start_distributed(verbose=False)
    args = train.parse_args(f"--mode glm3 --model_name_or_path {folder} --train_path {__file__}".split())
    config = utils.load_ds_config(ds_file, train.ds_values(args, world_size, 10, 1024))
    forget_peak()
    before = status("VmRSS")
    model = utils.load_base("glm3", folder, torch.float32, config)
    found = [status("VmHWM") - before, status("VmRSS") - before]
    size = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    everyone = [None] * world_size
    torch.distributed.all_gather_object(everyone, found)
    if rank == 0:
        print("RESULT", json.dumps({"model": size, "ranks": everyone}), flush=True)
    torch.distributed.barrier()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        load(*args.worker)

    from glm_models import checkpoint
    from glm_models.tiny import make_tiny_checkpoint, read_lines

    whole = checkpoint.write_weights.__defaults__
    checkpoint.write_weights.__defaults__ = (2**28,)  # shards of so many bytes
    with tempfile.TemporaryDirectory() as folder:
        text = read_lines([str(ROOT / "data/spo_0.json")])
        make_tiny_checkpoint("glm3", folder, text, 30, 1024, 16, embedding_rows=65024)
        checkpoint.write_weights.__defaults__ = whole
        print("| GB of each rank | model | most while loading | after it |\n|---|---|---|---|")
        for stage in (2, 3):
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29555"]
            command += [__file__, "--worker", folder, f"ds_zero{stage}_no_offload.json"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if "RESULT " not in done.stdout:
                sys.exit(done.stdout + done.stderr)
            result = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
            for rank, (most, after) in enumerate(result["ranks"]):
                figures = (result["model"], most, after)
                print(f"| ZeRO-{stage}, rank {rank} | " + " | ".join(f"{x / 1e9:.2f}" for x in figures) + " |")


if __name__ == "__main__":
    main()
