"""How much a small model forgets when it is tuned far too long on one task, and how much of that replay prevents.

    python tests/benchmark/forgetting.py --work /tmp/forgetting

A small ChatGLM3 learns nine tenths of data/general.json from random weights: the base. All its parameters are then
tuned far too long on triple extraction (500 rows of data/spo_0.json), without replay of those nine tenths and with
some. The suite is the other tenth, of each category.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

TASK_ROWS = 500
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def split_general() -> tuple[list[dict], list[dict]]:
    """(rows to learn and to replay, rows of the suite): every tenth row of a category goes to the suite."""
    learnt, suite, seen = [], [], {}
    for row in read("general.json"):
        seen[row["category"]] = seen.get(row["category"], 0) + 1
        (learnt if seen[row["category"]] % 10 else suite).append(row)
    return learnt, suite


def train(output: Path, base: Path, rows: str, epochs: int, rate: float, *more: str) -> Path:
    """All parameters on some rows; returns the result."""
    argv = f"""
        --mode glm3 --train_type all --model_name_or_path {base} --train_path {rows} --output_dir {output}
        --max_len 256 --max_src_len 192 --per_device_train_batch_size 16 --num_train_epochs {epochs}
        --learning_rate {rate} --weight_decay 0.01 --show_loss_step 50 --data_cache none --save_total_limit 1
    """.split()
    subprocess.run([sys.executable, str(ROOT / "train.py"), *argv, *more], check=True, cwd=ROOT)
    (result,) = output.glob(f"epoch-{epochs}-*")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for models and results; must be new")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.05, 0.2], help="replay ratios to try")
    parser.add_argument("--base_epochs", type=int, default=15, help="epochs over general.json")
    parser.add_argument("--epochs", type=int, default=6, help="epochs over the task's rows")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the tuning")
    args = parser.parse_args()

    from glm_models.tiny import make_tiny_checkpoint, read_lines
    from tuning.evaluate.forgetting import compare, table

    work = Path(args.work)
    work.mkdir(parents=True)
    learnt, held_out = split_general()
    general, suite = write(work / "general.json", learnt), write(work / "suite.json", held_out)
    task = write(work / "spo.json", read("spo_0.json")[:TASK_ROWS])
    test = write(work / "task.json", [{**row, "category": "task"} for row in read("spo_1.json")[:40]])
    lines = read_lines([str(ROOT / "data" / name) for name in ("general.json", "spo_0.json")])
    make_tiny_checkpoint("glm3", str(work / "random"), lines, layers=4, hidden_size=128, heads=4)
    base = train(work / "base", work / "random", general, args.base_epochs, 3e-3)

    runs = {"no replay": []}
    runs |= {f"replay {r:g}": ["--replay_path", general, "--replay_ratio", str(r)] for r in args.ratios}
    found = {}
    for name, more in runs.items():
        print(f"== {name}")
        tuned = train(work / name.replace(" ", "-"), base, task, args.epochs, args.rate, *more)
        report = compare("glm3", str(base), str(tuned), suite, max_new_tokens=80)
        on_task = compare("glm3", str(base), str(tuned), test, max_new_tokens=1)["overall"]
        print(*table(report), sep="\n")
        found[name] = {**report["overall"], "task_base": on_task["nll_base"], "task": on_task["nll_tuned"]}
        found[name]["categories"] = {key: some["forgetting"] for key, some in report["categories"].items()}
    (work / "figures.json").write_text(json.dumps(found, indent=1))

    names = list(next(iter(found.values()))["categories"])
    print("| | forgetting | KL | agree |", *(f"{name} |" for name in names), "task NLL |")
    for name, some in found.items():
        each = " | ".join(f"{some['categories'][key]:+.2f}" for key in names)
        figures = f"{some['forgetting']:+.2f} | {some['kl']:.2f} | {some['agree']:.0%}"
        print(f"| {name} | {figures} | {each} | {some['task']:.3f} |")
    first = next(iter(found.values()))
    print(f"base: NLL {first['nll_base']:.3f}, task {first['task_base']:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
