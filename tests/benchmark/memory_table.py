"""The original project's memory tables (A40, batch 1) beside what the planner says this project needs.

    python tests/benchmark/memory_table.py [--json FILE] [--ds_zero2 FILE] [--ds_zero3 FILE] [--only FLAG]

Runs the original's commands through `train.py --plan`'s planner on the official configurations. Planned is simulated;
published is what the original's README says. No GPU, no weights.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train
from glm_models import MODE
from tuning.plan import planner

METHODS = {
    "freeze": ["--freeze_module_name", "layers.27.,layers.26.,layers.25.,layers.24."],
    "ptuning": ["--pre_seq_len", "16", "--prefix_projection", "True"],
    "lora": ["--lora_dim", "16", "--lora_alpha", "64", "--lora_dropout", "0.1"],
    "all": [],
}
ALL_LINEAR = "query_key_value,dense_h_to_4h,dense_4h_to_h,dense"
LORA_MODULES = {"glm": "query_key_value", "glm2": ALL_LINEAR, "glm3": ALL_LINEAR}  # of the original's commands

LONG = ("--tiled_mlp", "--offload_inputs")

# method, mode, ds file, checkpointing, max_len, GPUs, published GB, bound GiB, more flags
ROWS = [
    ("freeze", "glm", "zero2", True, 1560, 1, 36, 26),
    ("freeze", "glm", "zero2", False, 1560, 1, 38, 26),
    ("freeze", "glm", "zero2", True, 1560, 4, 24, 17.5),
    ("freeze", "glm", "zero2", False, 1560, 4, 29, 17.5),
    ("freeze", "glm2", "zero2", True, 1560, 1, 35, 26),
    ("freeze", "glm2", "zero2", False, 1560, 1, 36, 26),
    ("freeze", "glm2", "zero2", True, 1560, 4, 22, 17.5),
    ("freeze", "glm2", "zero2", False, 1560, 4, 27, 17.5),
    ("ptuning", "glm", "zero2", True, 768, 1, 43, 31),
    ("ptuning", "glm", "zero2", False, 300, 1, 44, 31),
    ("ptuning", "glm", "zero2", True, 1560, 4, 37, 31),
    ("ptuning", "glm", "zero2", False, 1360, 4, 44, 31),
    ("ptuning", "glm2", "zero2", True, 1560, 1, 20, 16.5),
    ("ptuning", "glm2", "zero2", False, 1560, 1, 40, 20),
    ("ptuning", "glm2", "zero2", True, 1560, 4, 19, 16.5),
    ("ptuning", "glm2", "zero2", False, 1560, 4, 39, 20),
    ("lora", "glm", "zero2", True, 1560, 1, 20, 14.5),
    ("lora", "glm", "zero2", False, 1560, 1, 45, 19),
    ("lora", "glm", "zero2", True, 1560, 4, 20, 14.5),
    ("lora", "glm", "zero2", False, 1560, 4, 45, 19),
    ("lora", "glm2", "zero2", True, 1560, 1, 20, 15),
    ("lora", "glm2", "zero2", False, 1560, 1, 43, 23),
    ("lora", "glm2", "zero2", True, 1560, 4, 19, 15),
    ("lora", "glm2", "zero2", False, 1560, 4, 42, 23),
    ("all", "glm", "zero3_offload", True, 1560, 4, 33, None),
    ("all", "glm2", "zero3", True, 1560, 4, 44, 29),
    ("all", "glm2", "zero3_offload", True, 1560, 4, 26, None),
    # not published: long context, every position a target
    ("lora", "glm3", "zero2", True, 8192, 1, None, 18.5),
    ("lora", "glm3", "zero2", True, 32768, 1, None, None),
    ("lora", "glm3", "zero2", True, 32768, 1, None, 25.5, "--tiled_mlp"),
    ("lora", "glm3", "zero2", True, 32768, 1, None, 19, "--tiled_mlp", "--offload_inputs"),
    # the same on quantised bases, all linear layers adapted; needs bitsandbytes
    *(
        ("lora", mode, "zero2", True, length, 1, None, bound, "--quantization_bit", bits, *more)
        for mode in ("glm3", "glm2", "glm")
        for length, bits, bound, more in (
            (2048, "4", 7.5, ()),
            (2048, "8", None, ()),
            (8192, "4", 10.4, ()),
            (8192, "4", 8, LONG),
            (16384, "4", 9, LONG),
            (32768, "4", 11, LONG),
        )
    ),
]


def command(row: tuple, folder: str, files: dict[str, str], extra: list[str]) -> argparse.Namespace:
    """train.py's arguments for a row."""
    method, mode, ds, checkpointing, max_len, _, published, _, *more = row
    source = min(1024, max_len * 2 // 3) if published else 1
    argv = ["--mode", mode, "--model_name_or_path", folder, "--train_path", __file__, "--train_type", method]
    argv += ["--max_len", str(max_len), "--max_src_len", str(source), "--gradient_accumulation_steps", "4"]
    argv += ["--ds_file", files[ds], "--gradient_checkpointing", str(checkpointing), *METHODS[method], *more, *extra]
    if method == "lora":
        argv += ["--lora_module_name", ALL_LINEAR if "--quantization_bit" in more else LORA_MODULES[mode]]
    return train.parse_args(argv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--ds_zero2", default="ds_zero2_no_offload.json", help="ds file of the ZeRO-2 rows")
    parser.add_argument(
        "--ds_zero3", default="ds_zero3_no_offload.json", help="ds file of the ZeRO-3 row without offload"
    )
    parser.add_argument("--only", default="", help="only the rows with this word among their flags")
    options, extra = parser.parse_known_args()  # what is left goes to train.py
    warnings.filterwarnings("ignore")
    files = {"zero2": options.ds_zero2, "zero3": options.ds_zero3, "zero3_offload": "ds_zero3_offload.json"}

    results = []
    print("| method | model | ds | checkpointing | length | GPUs | published | planned | ratio | bound | most in |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in (row for row in ROWS if not options.only or options.only in row):
        method, mode, ds, checkpointing, max_len, gpus, published, bound, *more = row
        with tempfile.TemporaryDirectory() as folder:
            MODE[mode].config().save_pretrained(folder)  # the defaults are the official values
            start = time.perf_counter()
            found = planner.Plans(planner.plan_setup, gpus)(command(row, folder, files, extra))
            seconds = time.perf_counter() - start
        planned = found.peak / planner.GIB
        ratio = f"{planned / published:.2f}" if published else "-"
        verdict = "-" if bound is None else f"{bound} {'ok' if planned <= bound else 'MISSED'}"
        shown = "yes" if checkpointing else "no"
        print(
            f"| {' '.join([method, *more])} | {mode} | {ds} | {shown} | {max_len} | {gpus} | {published or '-'} "
            f"| {planned:.1f} | {ratio} | {verdict} | {found.phase} |",
            flush=True,
        )
        results.append(
            {
                "method": method,
                "flags": more,
                "mode": mode,
                "ds": ds,
                "gradient_checkpointing": checkpointing,
                "max_len": max_len,
                "gpus": gpus,
                "published_gb": published,
                "planned_gib": planned,
                "bound_gib": bound,
                "parts_gib": {name: size / planner.GIB for name, size in found.parts.items()},
                "slack_gib": found.slack / planner.GIB,
                "phase": found.phase,
                "main_memory_gib": found.host.memory / planner.GIB,
                "seconds": seconds,
            }
        )
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
