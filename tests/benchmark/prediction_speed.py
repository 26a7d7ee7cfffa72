"""Answering a file with a middle-sized random model: rows that make room for the next, against `generate` in batches.

    python tests/benchmark/prediction_speed.py --data data/spo_0.json --json speed.json

The other side is transformers' own GlmForCausalLM with the same weights, and its `generate` on padded batches of as
many rows, in the order of the file. A random model never ends by itself: each row gets as many tokens as its reference
has, on both sides; a batch of `generate` goes on until its longest row has them. Each figure is from a process of its
own, runs alternate, and the ratio is the median. Seconds are those of the process's CPU: other programs may use the
machine too.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

KINDS = ("generate", "slots")


def read_requests(tokenizer, path: str, rows: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of a file's rows, and the lengths of their references, in ids."""
    from tuning.metrics import with_references
    from tuning.samples.formats import to_dialogue
    from tuning.samples.row_files import read_rows

    numbered = read_rows(path, several_outputs=True, empty_outputs=True)
    found = [with_references(row, tokenizer) for _, row in itertools.islice(numbered, rows)]
    dialogues = [to_dialogue(row) for row in found]
    asked = [dialogue._replace(messages=dialogue.asked) for dialogue in dialogues]
    prompts = [prompt.ids.tolist() for prompt in tokenizer.encode_questions(asked, longest)]
    references = [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in found]
    return prompts, [max(1, len(ids)) for ids in tokenizer.encode_texts(references)]


def run_generate(model, tokenizer, prompts, limits, batch_size) -> dict[int, list[int]]:
    from native import native_model

    native = native_model(model).eval()
    native.generation_config.eos_token_id = None
    found = {}
    for start in range(0, len(prompts), batch_size):
        some = limits[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": prompts[start : start + batch_size]}, return_tensors="pt")
        batch.pop("position_ids", None)
        ids = native.generate(**batch, do_sample=False, max_new_tokens=max(some), pad_token_id=tokenizer.pad_token_id)[
            :, batch["input_ids"].shape[1] :
        ].tolist()
        found |= {start + i: row[:limit] for i, (row, limit) in enumerate(zip(ids, some, strict=True))}
    return found


def run_slots(model, tokenizer, prompts, limits, batch_size) -> dict[int, list[int]]:
    from glm_models.refill import Request, generate_in_slots
    from tuning.evaluate.work import plan_groups

    class NeverEnds:  # this model ends by chance only, and then the two sides would do different work
        pad_token_id, stop_token_ids = tokenizer.pad_token_id, ()

    groups = plan_groups([len(prompt) for prompt in prompts], batch_size)
    requests = ([Request(row, prompts[row], limits[row]) for row in group] for group in groups)
    return {answer.row: answer.ids for answer in generate_in_slots(model, NeverEnds, requests, batch_size)}


def work(kind: str, mode: str, folder: str, args) -> dict:
    """Answer the rows in this process. Returns seconds, tokens and the answers."""
    import torch

    from glm_models import MODE

    torch.set_num_threads(args.threads)
    tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
    model = MODE[mode].model.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, limits = read_requests(tokenizer, args.data, args.rows, args.max_src_len)
    run = run_generate if kind == "generate" else run_slots
    with torch.no_grad():
        run(model, tokenizer, prompts[:2], [2, 2], 2)  # warm-up
        start, elapsed = time.process_time(), time.perf_counter()
        found = run(model, tokenizer, prompts, limits, args.batch_size)
        seconds, elapsed = time.process_time() - start, time.perf_counter() - elapsed
    assert [len(found[row]) for row in range(len(prompts))] == limits
    return {"seconds": seconds, "elapsed": elapsed, "rows": len(prompts), "tokens": sum(limits), "answers": found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "data/spo_0.json"), help="instruction file")
    parser.add_argument("--rows", type=int, default=500, help="so many rows of it")
    parser.add_argument("--max_src_len", type=int, default=512, help="most tokens of a prompt")
    parser.add_argument("--mode", choices=("glm2", "glm3"), default="glm3", help="family")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=6, help="its layers")
    parser.add_argument("--batch_size", type=int, default=8, help="rows at a time")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    if args.worker:
        kind, folder = args.worker
        print("RESULT", json.dumps(work(kind, args.mode, folder, args)), flush=True)
        os._exit(0)

    from training_speed import make_base

    runs = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        make_base(args.mode, folder, args.data, args.hidden, args.layers)
        for _ in range(args.repeats):
            for kind in KINDS:
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", kind, folder]
                done = subprocess.run(command, capture_output=True, text=True)
                line = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
                if not line:
                    sys.exit(f"{kind} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
                runs[kind].append(json.loads(line[0].removeprefix("RESULT ")))
    theirs, mine = ([run.pop("answers") for run in runs[kind]] for kind in KINDS)
    same = sum(theirs[0][row] == mine[0][row] for row in theirs[0])
    show(args, runs, same)
    if args.json:
        Path(args.json).write_text(json.dumps(runs | {"same answers": same}, indent=2) + "\n")


def show(args, runs: dict[str, list[dict]], same: int) -> None:
    """A markdown table."""
    rows = runs["slots"][0]["rows"]
    print(f"| {args.mode}, {rows} rows, {args.batch_size} at a time | rows/s | tokens/s | against generate |")
    print("|---|---|---|---|")
    for kind, results in runs.items():
        seconds = statistics.median(one["seconds"] for one in results)
        pairs = zip(runs["generate"], results, strict=True)
        faster = statistics.median(theirs["seconds"] / mine["seconds"] for theirs, mine in pairs)
        print(f"| {kind} | {rows / seconds:.2f} | {results[0]['tokens'] / seconds:.0f} | {faster:.2f} x |")
    print(f"\nthe same answers in {same} of {rows} rows")


if __name__ == "__main__":
    main()
