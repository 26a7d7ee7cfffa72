"""Main memory that loading a checkpoint takes, at the most, in each of two ranks under ZeRO-2 and ZeRO-3.

    python tests/benchmark/load_times.py [--json FILE]

Makes a random ChatGLM3 of 2.5 GB in shards of 0.5 GB, and loads it as train.py does. Pages of the files count once they
are read; under ZeRO-2 on a CPU that is when training first uses a weight. The limits: under ZeRO-2 1.15 times the model
and one shard, under ZeRO-3 the rank's part and one shard.
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
    from tuning.engine import ds_config, loading, patches
    from tuning.engine.ds_config import load_ds_config
    from tuning.run import launch

    torch.set_num_threads(1)
    utils.silence_libraries(verbose=False)
    patches.apply()
    rank, world_size = launch.start_distributed(verbose=False)
    args = train.parse_args(f"--mode glm3 --model_name_or_path {folder} --train_path {__file__}".split())
    config = load_ds_config(ds_file, ds_config.ds_values(args, world_size, 10, 1024))
    forget_peak()
    before = status("VmRSS")
    model = loading.load_base("glm3", folder, torch.float32, config)
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
    parser.add_argument("--json", metavar="FILE", help="write the figures, in bytes, there as well")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        load(*args.worker)

    from glm_models import checkpoint
    from glm_models.tiny import make_tiny_checkpoint, read_lines

    whole = checkpoint.write_weights.__defaults__
    checkpoint.write_weights.__defaults__ = (2**29,)  # shards of so many bytes
    with tempfile.TemporaryDirectory() as folder:
        text = read_lines([str(ROOT / "data/spo_0.json")])
        make_tiny_checkpoint("glm3", folder, text, 46, 1024, 16, embedding_rows=65024)
        checkpoint.write_weights.__defaults__ = whole
        shard = max(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        rows = []
        for stage in (2, 3):
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29555"]
            command += [__file__, "--worker", folder, f"ds_zero{stage}_no_offload.json"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if "RESULT " not in done.stdout:
                sys.exit(done.stdout + done.stderr)
            result = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
            limit = shard + result["model"] * (1.15 if stage == 2 else 1 / len(result["ranks"]))
            for rank, (most, after) in enumerate(result["ranks"]):
                figures = {"model": result["model"], "shard": shard, "limit": limit, "most": most, "after": after}
                rows.append({"stage": stage, "rank": rank, **figures, "ok": most <= limit})

    print(
        "| GB of each rank | model | a shard | limit | most while loading | after it | |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        figures = " | ".join(f"{row[key] / 1e9:.2f}" for key in ("model", "shard", "limit", "most", "after"))
        print(f"| ZeRO-{row['stage']}, rank {row['rank']} | {figures} | {'ok' if row['ok'] else 'too much'} |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
