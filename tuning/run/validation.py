"""Validation while training: the loss of held-out rows, scores of generated answers, the best model, when to stop.

A validation takes no random number of the training's and leaves no gradient, so losses are those of a run without it.
Every rank takes as many batches through the model as the others, since under ZeRO-3 each pass needs all of them.
"""

import json
import math
import os
import time
from collections.abc import Callable

import torch

from glm_models.generation import generate_answers
from tuning.errors import UserError
from tuning.folders import write_errors, write_file
from tuning.metrics import AS_WRITTEN, FROM_LOSS, HEADLINE, kind_of, missing, references_of, score, with_references
from tuning.run.log import JsonLines
from tuning.run.results import BEST
from tuning.samples.batches import MicroBatch
from tuning.samples.dataset import HeldOut, InstructionData
from tuning.samples.encoding import encode_sample
from tuning.samples.row_files import RowError, scan_rows
from utils import control_group, data_parallel_rank, data_parallel_size, device, is_main, on_rank_0, say

LOWER_IS_BETTER = {"loss", "perplexity", "repeating", "empty"}
NO_DIRECTION = {"mean_length", "reference_length"}

# Rows


def spread(rows: list[int], most: int) -> list[int]:
    """At most so many of the rows, evenly spaced: files are often sorted."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def deal_batches(rows: list[int], lengths, batch_size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's batches of at most batch_size rows of about the same length, the longest first.

    All ranks have as many; fillers make up the number.

    Args:
        lengths: [samples], tokens of each.
    """
    order = sorted(rows, key=lambda i: int(lengths[i]), reverse=True)
    batches = [MicroBatch(order[a : a + batch_size], 1) for a in range(0, len(order), batch_size)]
    batches += [MicroBatch(order[-1:], 1, is_filler=True)] * (-len(batches) % world_size)
    return batches[rank::world_size]


# Figures


@torch.no_grad()
def mean_loss(model, data: InstructionData, rows: list[int], batch_size: int) -> float:
    """Cross entropy a token, over all answer tokens of the rows on all ranks together, summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=device())
    for batch in deal_batches(rows, data.lengths, batch_size, data_parallel_rank(), data_parallel_size()):
        total += model(**data[batch].to(device())).loss  # a sum: num_items_in_batch is 1
    total = total.cpu()
    torch.distributed.all_reduce(total, group=control_group())
    return total.item() / data.answer_tokens(rows)


def gather_answers(
    engine, tokenizer, data: InstructionData, rows: list[int], batch_size: int, max_new_tokens: int
) -> list[tuple[str, bool]] | None:
    """Greedy answers to the rows' prompts, made by all ranks: on rank 0 each in its place, None on the others.

    Returns:
        Text, and whether it ended by itself.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    lengths = data.lengths - data.answer_lengths
    model = engine.module
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    # under ZeRO-3 a rank whose answers are complete goes on until those of all are
    synced = engine.zero_optimization_stage() == 3 and world_size > 1
    mine: dict[int, tuple[str, bool]] = {}
    for batch in deal_batches(rows, lengths, batch_size, rank, world_size):
        prompts = [data.samples.prompt(i).tolist() for i in batch.rows]
        answers = generate_answers(base, tokenizer, prompts, [max_new_tokens] * len(prompts), synced_gpus=synced)
        if not batch.is_filler:
            mine |= zip(batch.rows, answers, strict=True)
    everyone = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(mine, everyone, group=control_group())
    if everyone is None:
        return None
    found = {row: answer for part in everyone for row, answer in part.items()}
    return [found[row] for row in rows]


# Validation


class Validation:
    """Validates, keeps the best model, and says when to stop. Each method is called on every rank.

    Args:
        engine: DeepSpeed's.
        held_out: the samples to validate on.
        args: of train.py.
        epoch_steps: optimiser steps of an epoch.
        log: the run's (log.RunLog).
        save_result: writes the model to a folder of this name in output_dir.

    Raises:
        UserError: --best_metric is none of those that there will be.
    """

    def __init__(
        self,
        engine,
        tokenizer,
        held_out: HeldOut,
        args,
        epoch_steps: int,
        log,
        save_result: Callable[[str], None],
    ):
        self.engine, self.tokenizer, self.args, self.log, self.save_result = engine, tokenizer, args, log, save_result
        self.data, self.rows = held_out.data, held_out.rows
        self.every, self.total_steps = args.eval_steps or epoch_steps, args.num_train_epochs * epoch_steps
        self.kind, names = None, list(FROM_LOSS)
        if args.eval_generate != "off":
            self.generated = spread(self.rows, args.eval_generate_rows)
            longest = max(self.data.answer_tokens([i]) for i in self.generated)
            self.max_new_tokens = args.eval_max_new_tokens or math.ceil(1.25 * longest)
            self.asked: list[dict] = []  # rank 0: the rows of the file, as `generated`
            self.references: list[list[str]] = []
            self.kind, more = on_rank_0(lambda: self._read_references(held_out.path))
            names += more
        if args.best_metric not in names:
            raise UserError(f"--best_metric {args.best_metric}: there are {', '.join(names)}; {self._more_names()}")
        self.lower = args.best_metric in LOWER_IS_BETTER
        self.best, self.best_step = math.nan, 0
        self.stale = 0  # validations since the best
        self.file = None

    def _read_references(self, path: str) -> tuple[str, list[str]]:
        """Read what to compare with. Returns its kind, and the names of the scores."""
        lines = {int(self.data.lines[i]) for i in self.generated}
        found = {}
        for line, row in scan_rows(path, several_outputs=True, empty_outputs=True):
            if line in lines and not isinstance(row, RowError):
                found[line, self._ids(row)] = row  # a line may hold several rows of an array
        asked = [found[int(self.data.lines[i]), tuple(self.data.samples[i].input_ids)] for i in self.generated]
        self.asked = [with_references(row, self.tokenizer) for row in asked]
        self.references = [references_of(row) for row in self.asked]
        kind = kind_of(self.references) if self.args.eval_generate == "auto" else self.args.eval_generate
        one = self.references[0]
        return kind, [name for name in score(kind, one[:1], [one], [True]) if name not in NO_DIRECTION]

    def _ids(self, row: dict) -> tuple[int, ...]:
        """A row's sample, empty if it has none."""
        try:
            return tuple(encode_sample(self.tokenizer, row, self.args.max_len, self.args.max_src_len).input_ids)
        except ValueError:  # no room for an answer
            return ()

    def _more_names(self) -> str:
        if self.kind is None:
            return "with --eval_generate there are more"
        return f"ROUGE and BLEU need {missing(self.kind)}" if missing(self.kind) else f"answers are {self.kind}"

    def state(self) -> dict[str, torch.Tensor]:
        """What a training state keeps."""
        return {
            "best": torch.tensor(self.best, dtype=torch.float64),
            "best_step": torch.tensor(self.best_step),
            "stale": torch.tensor(self.stale),
        }

    def set_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Undo `state`; nothing is there if the run had no validation before."""
        if tensors:
            self.best, self.best_step = float(tensors["best"]), int(tensors["best_step"])
            self.stale = int(tensors["stale"])

    def begin(self) -> None:
        """Get ready, after a state was loaded."""
        text = f"validation: {len(self.rows)} rows"
        if self.kind:
            text += (
                f"; answers to {len(self.generated)}, of at most {self.max_new_tokens} tokens, scored as {self.kind}"
            )
            text += f" (ROUGE and BLEU are left out; they need: {missing(self.kind)})" if missing(self.kind) else ""
        say(text)
        step = self.engine.global_steps
        if is_main():
            self.file = JsonLines(os.path.join(self.args.output_dir, "validation.jsonl"), step)
        if self.args.eval_at_start and not step:
            self._measure(0)

    def due(self) -> bool:
        """Whether the step that has just ended is to be validated."""
        step = self.engine.global_steps
        return step % self.every == 0 or step == self.total_steps

    def run(self, epoch: int) -> bool:
        """Validate, and keep the model if it is the best so far. Returns whether training is to stop early."""
        value = self._measure(epoch)[self.args.best_metric]
        step, patience = self.engine.global_steps, self.args.early_stopping_patience
        better = value < self.best if self.lower else value > self.best
        if better or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.best_step, self.stale = value, step, 0
            with self.log.paused():
                self.save_result(BEST)
                on_rank_0(lambda: self._write_best(epoch))
            return False
        self.stale += 1
        if patience is None or self.stale < patience or step == self.total_steps:
            return False
        patient = f"{self.stale} validations without improvement (patience)"
        say(f"stopping early after step {step}: {patient}; {self.describe_best()}")
        return True

    def describe_best(self) -> str | None:
        """The best figure so far and its step, in words; None if no validation had one."""
        return f"best at step {self.best_step}: {self.args.best_metric} {self.best:.4f}" if self.best_step else None

    def close(self) -> None:
        """No validation comes any more."""
        if self.file is not None:
            self.file.close()

    def _write_best(self, epoch: int) -> None:
        content = {"step": self.best_step, "epoch": epoch, "metric": self.args.best_metric, "value": self.best}
        path = os.path.join(self.args.output_dir, "best.json")
        with write_errors(path):
            write_file(path, json.dumps(content) + "\n")

    def _measure(self, epoch: int) -> dict[str, float]:
        """All figures by name, the same on every rank; printed and written on rank 0."""
        step, start = self.engine.global_steps, time.perf_counter()
        with self.log.paused():
            self.engine.eval()
            try:
                model = self.engine.module
                loss = mean_loss(model, self.data, self.rows, self.args.eval_batch_size)
                values = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
                if self.kind:
                    sizes = (self.args.eval_batch_size, self.max_new_tokens)
                    answers = gather_answers(self.engine, self.tokenizer, self.data, self.generated, *sizes)
                    values |= on_rank_0(lambda: self._score(answers, step))
            except Exception as error:
                error.add_note(f"in the validation after step {step} (--eval_batch_size {self.args.eval_batch_size})")
                raise
            finally:
                self.engine.train()
            # ZeRO-3 fetches ahead as if a backward pass came: what is on its way must not meet a saving
            self.engine.empty_partition_cache()
            seconds = time.perf_counter() - start
            if self.file is not None:
                self._tell(step, epoch, values, seconds)
        return values

    def _score(self, answers: list[tuple[str, bool]], step: int) -> dict[str, float]:
        """Scores of the answers, which are written beside the references."""
        lines = []
        for row, (text, ended) in zip(self.asked, answers, strict=True):
            keys = {key: row[key] for key in ("instruction", "input", "output", AS_WRITTEN) if key in row}
            lines.append(json.dumps({"step": step, **keys, "prediction": text, "ended": ended}, ensure_ascii=False))
        path = os.path.join(self.args.output_dir, "validation-predictions.jsonl")
        with write_errors(path):
            write_file(path, "\n".join(lines) + "\n")
        texts, ended = map(list, zip(*answers, strict=True))
        return score(self.kind, texts, self.references, ended)

    def _tell(self, step: int, epoch: int, values: dict[str, float], seconds: float) -> None:
        shown = [*FROM_LOSS, self.args.best_metric]
        if self.kind:
            shown += [HEADLINE[self.kind], "exact_match", "ended"]
        figures = " ".join(f"{name} {values[name]:.4f}" for name in dict.fromkeys(shown) if name in values)
        best = f"; best {self.args.best_metric} before {self.best:.4f}, step {self.best_step}" if self.best_step else ""
        say(f"validation epoch {epoch} step {step}/{self.total_steps} {figures} ({seconds:.1f} s{best})")
        self.file.add(step=step, epoch=epoch, **values, seconds=seconds)
        self.log.write("eval", values, step)
