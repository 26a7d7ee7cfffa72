"""LoRA training of a middle-sized random model: this project's loop against transformers' Trainer, on the same rows.

    python tests/benchmark/training_speed.py --data data/spo_0.json --json speed.json

For ChatGLM2 and ChatGLM3 the Trainer has transformers' own GlmForCausalLM with the same weights, and peft; ChatGLM-6B
has no such peer, so there it is the same model with plain attention and all logits. Both get the same batches of four
rows, the Trainer's padded to the longest; packed rows hold up to 2,048 tokens, and a batch is one. Each figure is from
a process of its own; runs alternate, and ratios are medians. Tokens are the real ones, padding is not counted. The peak
of matrix products is measured between the steps, since the speed of a machine that others use too comes and goes.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from process import forget_peak, status

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

WARM_UP = 3  # steps that are not timed
BATCH = 4
OURS = {
    "ours": [],
    "ours, by length": ["--group_by_length"],
    "ours, packed": ["--packing", "--per_device_train_batch_size", "1", "--max_len", "2048"],
}
KINDS = ("trainer", *OURS)
FIGURES = ("tokens_per_second", "peak_gib_above_model")


class Clock:
    """Times steps, and the peak of memory above that of the loaded model."""

    def start(self) -> None:
        """Call once the model is loaded."""
        self.ends, self.tokens, self.paused = [], [], 0.0
        forget_peak()
        self.loaded = status("VmRSS")

    def step(self, tokens: int) -> None:
        self.ends.append(time.perf_counter() - self.paused)
        self.tokens.append(tokens)

    @contextlib.contextmanager
    def pause(self):
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[WARM_UP - 1]

    def result(self) -> dict:
        if len(self.ends) <= WARM_UP:
            sys.exit(f"{len(self.ends)} steps in all, of which {WARM_UP} are warm-up: take more --rows")
        return {
            "tokens_per_second": sum(self.tokens[WARM_UP:]) / self.seconds,
            "peak_gib_above_model": (status("VmHWM") - self.loaded) / 2**30,
        }


def arguments(mode: str, folder: str, data: str, output: str, max_len: int, more=()) -> list[str]:
    return (
        f"--mode {mode} --model_name_or_path {folder} --train_path {data} --allow_empty_output --output_dir {output} "
        f"--max_len {max_len} --max_src_len {max_len - 256} --train_type lora --lora_dim 8 --lora_alpha 16 "
        "--lora_dropout 0 --lora_module_name query_key_value,dense,dense_h_to_4h,dense_4h_to_h "
        f"--per_device_train_batch_size {BATCH} --learning_rate 1e-4 --show_loss_step 1000000"
    ).split() + list(more)


def run_ours(argv: list[str]) -> dict:
    import torch

    import train
    import utils
    from tuning.run import flops as throughput
    from tuning.run.log import RunLog

    clock = Clock()
    groups, add = train.parameter_groups, RunLog.add
    flops, peaks = [], []

    def loaded(*args):
        clock.start()
        return groups(*args)

    def timed(log, step, epoch):
        (batch,) = step.batches
        clock.step(batch.tokens)
        flops.append(log.flops.of(batch["segments"], len(batch["answer_positions"])))
        with clock.pause():
            peaks.append(throughput.matmul_peak.__wrapped__(torch.float32, seconds=0.2))
        return add(log, step, epoch)

    train.parameter_groups, RunLog.add = loaded, timed
    utils.silence_libraries(verbose=False)
    train.save = lambda *_: None
    train.train(train.parse_args(argv))
    result = clock.result()
    peak = statistics.median(peaks[WARM_UP:])
    return result | {"flops": sum(flops[WARM_UP:]) / clock.seconds, "peak_flops": peak}


def run_trainer(argv: list[str]) -> dict:
    import numpy as np
    import torch
    from native import native_model
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import train
    from glm_models import MODE
    from tuning.samples.dataset import DataSettings, InstructionData
    from tuning.samples.encoding import IGNORE_INDEX
    from tuning.samples.epochs import BatchShape, Packs, plan_epoch

    args = train.parse_args(argv)
    family = MODE[args.mode]
    tokenizer = family.tokenizer.from_pretrained(args.model_name_or_path)
    data = InstructionData(
        DataSettings(args.train_path[0], args.max_len, args.max_src_len, empty_outputs=True), tokenizer
    )
    plan = plan_epoch(data, Packs(np.arange(len(data))), BatchShape(BATCH), args.seed, 1)

    def padded(rows):
        some = [data.samples[i] for i in rows]
        pads = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE_INDEX}
        batch = {
            name: pad_sequence([torch.tensor(getattr(s, name)) for s in some], batch_first=True, padding_value=pad)
            for name, pad in pads.items()
        }
        if args.mode != "glm":
            lengths = torch.tensor([len(s.input_ids) for s in some])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch

    model = family.model.from_pretrained(args.model_name_or_path, dtype=torch.float32, use_cache=False)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    if args.mode == "glm":
        model.set_attn_implementation("eager")
        plain = model.forward

        def all_logits(input_ids, labels, **_):
            output = plain(input_ids)
            logits, wanted = output.logits[:, :-1].float(), labels[:, 1:]
            output.loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            return output

        model.forward = all_logits
    else:
        model = native_model(model)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    clock = Clock()

    class Timer(TrainerCallback):
        def on_step_end(self, _, state, control, **__):
            clock.step(data.tokens(plan[state.global_step - 1][0].rows))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=1,  # an item is a batch
            num_train_epochs=1,
            learning_rate=1e-4,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = InOrder(
            model,
            settings,
            train_dataset=[padded(step[0].rows) for step in plan],
            data_collator=lambda items: items[0],
            callbacks=[Timer()],
        )
        clock.start()
        trainer.train()
    return clock.result()


def make_base(mode: str, folder: str, data: str, hidden: int, layers: int) -> None:
    """A random model with the real number of vocabulary rows."""
    from glm_models.tiny import make_tiny_checkpoint, read_lines

    rows = 130528 if mode == "glm" else 65024
    make_tiny_checkpoint(mode, folder, read_lines([data]), layers, hidden, hidden // 64, 4000, embedding_rows=rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "data/spo_0.json"), help="instruction file")
    parser.add_argument("--rows", type=int, default=240, help="so many rows of it")
    parser.add_argument("--max_len", type=int, default=1024, help="most tokens of a row")
    parser.add_argument("--modes", nargs="+", default=["glm2", "glm3", "glm"], help="families")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=6, help="its layers")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="what to run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, mode, folder, data = args.worker
        with tempfile.TemporaryDirectory() as output:
            argv = arguments(mode, folder, data, output, args.max_len, OURS.get(kind, ()))
            result = run_trainer(argv) if kind == "trainer" else run_ours(argv)
        print("RESULT", json.dumps(result), flush=True)
        os._exit(0)

    everything = {}
    with tempfile.TemporaryDirectory() as work:
        data = Path(work, "rows.json")
        rows = Path(args.data).read_text(encoding="utf-8").splitlines(keepends=True)[: args.rows]
        data.write_text("".join(rows), encoding="utf-8")
        for mode in args.modes:
            folder = str(Path(work, mode))
            make_base(mode, folder, args.data, args.hidden, args.layers)
            runs = {kind: [] for kind in args.kinds}
            for _ in range(args.repeats):
                for kind in args.kinds:
                    command = [sys.executable, __file__, "--max_len", str(args.max_len)]
                    command += ["--worker", kind, mode, folder, str(data)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    line = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
                    if not line:
                        sys.exit(f"{kind} of {mode} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
                    runs[kind].append(json.loads(line[0].removeprefix("RESULT ")))
            everything[mode] = runs
            show(mode, runs)
    if args.json:
        Path(args.json).write_text(json.dumps(everything, indent=2) + "\n")


def show(mode: str, runs: dict[str, list[dict]]) -> None:
    """A markdown table of one family."""
    print(f"\n| {mode} | tokens/s | against Trainer | memory above the model, GiB | against Trainer | of matmul peak |")
    print("|---|---|---|---|---|---|")
    for kind, results in runs.items():
        tokens, memory = (statistics.median(r[key] for r in results) for key in FIGURES)
        faster = smaller = used = ""
        if "trainer" in runs:
            pairs = list(zip(results, runs["trainer"], strict=True))
            faster, smaller = (
                f"{statistics.median(mine[key] / theirs[key] for mine, theirs in pairs):.2f} x" for key in FIGURES
            )
        if kind != "trainer":
            used = f"{statistics.median(r['flops'] / r['peak_flops'] for r in results):.0%}"
        print(f"| {kind} | {tokens:.0f} | {faster} | {memory:.2f} | {smaller} | {used} |", flush=True)


if __name__ == "__main__":
    main()
