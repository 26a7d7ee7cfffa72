"""What is lost when weights, moments and gradients are bf16 alone: the same training with and without float32 masters.

    python tests/benchmark/bf16_states.py --work /tmp/bf16-states

A small ChatGLM3 learns data/general.json and a third of data/spo_0.json from random weights, in float32: the base. All
its parameters are then tuned in bf16 on data/d2q_0.json: the same rows in the same order with float32 masters and
moments and with both in bf16, at several learning rates; at the highest, with several micro-batches summed in float32
and in bf16, too. The loss on data/d2q_1.json, which is never trained on, is measured at the start and the end.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

MASTERS = {"float32": {}, "bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
BATCH, MICRO = 8, 4  # rows of a step; micro-batches, where there are several


def write_ds(path: Path, masters: str, sums: str) -> str:
    content = json.loads((ROOT / "ds_zero2_no_offload.json").read_text())
    content |= {"bf16": {"enabled": True} | MASTERS[masters], "data_types": {"grad_accum_dtype": sums}}
    path.write_text(json.dumps(content))
    return str(path)


def run(args, output: Path, base: Path, rows: Path, epochs: int, rate: float, *more: str) -> dict:
    """Train all parameters on some rows. Returns the mean loss of each 5 steps, and of each validation."""
    import train

    argv = f"""
        --mode glm3 --train_type all --model_name_or_path {base} --train_path {rows} --output_dir {output}
        --max_len 256 --max_src_len 192 --num_train_epochs {epochs} --learning_rate {rate} --weight_decay 0.01
        --show_loss_step 5 --data_cache {args.work}/cache
    """.split()
    train.train(train.parse_args([*argv, *more]))
    losses = {}
    for name, file in (("curve", "log.jsonl"), ("held_out", "validation.jsonl")):
        lines = (output / file).read_text().splitlines() if (output / file).exists() else []
        losses[name] = [json.loads(line)["loss"] for line in lines]
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for models and results; must be new")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 1e-4, 2e-5], help="learning rates")
    parser.add_argument("--base_epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=400, help="rows to tune on")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of the model")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()

    from glm_models.tiny import make_tiny_checkpoint, read_lines

    work = Path(args.work)
    work.mkdir(parents=True)
    lines = {name: (ROOT / "data" / f"{name}.json").read_text().splitlines() for name in ("general", "spo_0", "d2q_0")}
    for name, some in (("learnt", lines["general"] + lines["spo_0"][:500]), ("task", lines["d2q_0"][: args.rows])):
        (work / f"{name}.json").write_text("\n".join(some))
    texts = read_lines([str(ROOT / "data" / f"{name}.json") for name in lines])
    make_tiny_checkpoint("glm3", str(work / "random"), texts, layers=3, hidden_size=args.hidden, heads=4)
    flags = ["--per_device_train_batch_size", str(BATCH)]
    run(args, work / "base", work / "random", work / "learnt.json", args.base_epochs, 3e-3, *flags)
    (base,) = (work / "base").glob(f"epoch-{args.base_epochs}-*")

    cases = [(rate, masters, 1, "auto") for rate in args.rates for masters in MASTERS]
    cases += [(max(args.rates), "bf16", MICRO, sums) for sums in ("fp32", "bf16")]
    results = [
        "| learning rate | masters and moments | micro-batches | sums | training | held out |",
        "|---|---|---|---|---|---|",
    ]
    found = []
    for number, (rate, masters, micro, sums) in enumerate(cases):
        more = ["--ds_file", write_ds(work / f"{number}.json", masters, sums)]
        more += ["--per_device_train_batch_size", str(BATCH // micro), "--gradient_accumulation_steps", str(micro)]
        more += ["--eval_path", str(ROOT / "data" / "d2q_1.json"), "--eval_at_start"]
        one = run(args, work / f"run-{number}", base, work / "task.json", args.epochs, rate, *more)
        start, *_, end = one["held_out"]
        train_loss = statistics.mean(one["curve"][-5:])
        found.append({"rate": rate, "masters": masters, "micro_batches": micro, "sums": sums, **one})
        results.append(f"| {rate:g} | {masters} | {micro} | {sums} | {train_loss:.3f} | {start:.3f} to {end:.3f} |")
    print("", *results, sep="\n")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
