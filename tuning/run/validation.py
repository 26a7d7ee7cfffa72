"""Validation during training: loss of held-out rows, scores of generated answers, best model, early stopping.

Validation draws no random numbers and leaves no gradients, so training losses are the same as without it. Every rank
runs the same number of batches, since under ZeRO-3 each forward pass needs all ranks.
"""

import json
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from glm_models.generation import generate_answers
from glm_models.pipeline import pipeline_input
from glm_models.tools import answer_text
from tuning.errors import UserError
from tuning.folders import write_errors, write_file
from tuning.metrics import (
    FROM_LOSS,
    HEADLINE,
    kind_of,
    missing,
    references_of,
    score,
    with_answer,
    with_references,
)
from tuning.run.log import JsonLines
from tuning.run.results import BEST
from tuning.samples.batches import MicroBatch
from tuning.samples.dataset import HeldOut, InstructionData
from tuning.samples.encoding import encode_samples
from tuning.samples.epochs import RunLength
from tuning.samples.formats import Columns, to_dialogue
from tuning.samples.row_files import RowError, scan_rows
from utils import (
    control_group,
    data_parallel_rank,
    data_parallel_size,
    device,
    is_rank_0,
    on_rank_0,
    print_rank_0,
    stage_count,
    wait_for_all,
)

LOWER_IS_BETTER = {"loss", "perplexity", "repeating", "empty"}
NO_DIRECTION = {"mean_length", "reference_length"}

# Rows


class LearntAnswer(NamedTuple):
    """One learnt answer of a sample: the sample's number, and where in it the answer begins and ends."""

    row: int
    start: int
    end: int


def learnt_answers(data: InstructionData, rows: list[int]) -> list[LearntAnswer]:
    """All learnt answers of some samples: each has what stands before it in its sample as its history."""
    return [LearntAnswer(row, *span) for row in rows for span in data.samples[row].spans]


def spread(items: list, most: int) -> list:
    """At most `most` of them, evenly spaced, since files are often sorted."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def deal_batches(rows: list[int], lengths, batch_size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """Batches of this rank, of at most batch_size rows of similar length, the longest first.

    All ranks get the same number of batches; fillers complete it.

    Args:
        lengths: [samples], tokens of each.
    """
    order = sorted(rows, key=lambda i: int(lengths[i]), reverse=True)
    batches = [MicroBatch(order[a : a + batch_size], 1) for a in range(0, len(order), batch_size)]
    batches += [MicroBatch(order[-1:], 1, is_filler=True)] * (-len(batches) % world_size)
    return batches[rank::world_size]


# Figures


@torch.no_grad()
def mean_loss(engine, data: InstructionData, rows: list[int], batch_size: int) -> float:
    """Mean cross entropy per answer token, over the rows of all ranks; summed in float64."""
    wait_for_all()
    total = torch.zeros((), dtype=torch.float64, device=device())
    batches = deal_batches(rows, data.lengths, batch_size, data_parallel_rank(), data_parallel_size())
    if stage_count() > 1:
        engine.eval_batch((pipeline_input(data[batch]) for batch in batches), num_micro_batches=len(batches))
        for loss in engine.fwd_outputs:  # empty on all stages but the last one
            total += loss
    else:
        for batch in batches:
            total += engine.module(**data[batch].to(device())).loss  # a sum: num_items_in_batch is 1
    total = total.cpu()
    torch.distributed.all_reduce(total, group=control_group())
    return total.item() / data.answer_tokens(rows)


def gather_answers(
    engine, tokenizer, data: InstructionData, wanted: list[LearntAnswer], batch_size: int, max_new_tokens: int
) -> list[tuple[str, bool]] | None:
    """Generate greedy answers in the place of learnt ones, on all ranks.

    Returns:
        On rank 0 the text for each, and whether it ended by itself; None on other ranks.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    places, lengths = list(range(len(wanted))), [one.start for one in wanted]
    model = engine.module
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    # under ZeRO-3 a rank with complete answers continues until all ranks are done
    synced = engine.zero_optimization_stage() == 3 and world_size > 1
    mine: dict[int, tuple[str, bool]] = {}
    for batch in deal_batches(places, lengths, batch_size, rank, world_size):
        prompts = [data.samples[wanted[i].row].input_ids[: wanted[i].start] for i in batch.rows]
        answers = generate_answers(base, tokenizer, prompts, [max_new_tokens] * len(prompts), synced_gpus=synced)
        if not batch.is_filler:
            mine |= zip(batch.rows, answers, strict=True)
    everyone = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(mine, everyone, group=control_group())
    if everyone is None:
        return None
    found = {place: answer for part in everyone for place, answer in part.items()}
    return [found[place] for place in places]


# Validation


class Validation:
    """Validates, saves the best model, and decides on early stopping. Each method is called on every rank.

    Args:
        engine: DeepSpeed's.
        held_out: the samples to validate on.
        args: of train.py.
        length: of the run; --eval_steps is an epoch unless given.
        log: the run's (log.RunLog).
        save_result: writes the model to a folder of this name in output_dir.

    Raises:
        UserError: there is no metric of the name --best_metric.
    """

    def __init__(
        self,
        engine,
        tokenizer,
        held_out: HeldOut,
        args,
        length: RunLength,
        log,
        save_result: Callable[[str], None],
    ):
        self.engine, self.tokenizer, self.args, self.log, self.save_result = engine, tokenizer, args, log, save_result
        self.data, self.rows = held_out.data, held_out.rows
        self.every, self.total_steps = args.eval_steps or length.epoch_steps, length.total_steps
        self.kind, names = None, list(FROM_LOSS)
        if args.eval_generate != "off":
            answered = held_out.answered
            self.texts = len(self.rows) - len(answered)
            self.generated = spread(learnt_answers(self.data, answered), args.eval_generate_rows)
            longest = max(one.end - one.start for one in self.generated)
            self.max_new_tokens = args.eval_max_new_tokens or math.ceil(1.25 * longest)
            self.asked: list[dict] = []  # rank 0: the rows of the file, as `generated`
            self.references: list[list[str]] = []
            self.kind, more = on_rank_0(lambda: self._read_references())
            names += more
        if args.best_metric not in names:
            raise UserError(f"--best_metric {args.best_metric}: there are {', '.join(names)}; {self._more_names()}")
        self.lower = args.best_metric in LOWER_IS_BETTER
        self.best, self.best_step = math.nan, 0
        self.stale = 0  # validations since the best
        self.file = None

    def _read_references(self) -> tuple[str, list[str]]:
        """Read the references of the generated answers. Returns their kind, and the names of the scores."""
        places = [self.data.place(one.row) for one in self.generated]
        wanted, found = set(places), {}
        columns = Columns.of(self.args)
        for path in dict.fromkeys(path for path, _ in places):
            for line, row in scan_rows(path, several_outputs=True, empty_outputs=True, columns=columns):
                if (path, line) in wanted and not isinstance(row, RowError):
                    # a line may hold several answers
                    found |= {(path, line, *answer): one for answer, one in self._answers(row)}
        asked = [
            found[*place, tuple(self.data.samples[one.row].input_ids), one.start]
            for one, place in zip(self.generated, places, strict=True)
        ]
        self.asked = [with_references(row, self.tokenizer) for row in asked]
        self.references = [references_of(row) for row in self.asked]
        kind = kind_of(self.references) if self.args.eval_generate == "auto" else self.args.eval_generate
        one = self.references[0]
        return kind, [name for name in score(kind, one[:1], [one], [True]) if name not in NO_DIRECTION]

    def _answers(self, row: dict) -> list[tuple[tuple[tuple[int, ...], int], dict]]:
        """Of each learnt answer of a row: its sample's ids and where it begins there, and the row with it as output."""
        dialogue, limits = to_dialogue(row, self.args.train_on), (self.args.max_len, self.args.max_src_len)
        try:
            samples = encode_samples(self.tokenizer, [dialogue], *limits)
        except ValueError:  # no room for an answer
            return []
        learnt = [message for message in dialogue.messages if message.learn]
        encoded = self.tokenizer.encode_dialogues([dialogue], limits[1], max_len=limits[0])
        found = []
        for number, (sample, one) in enumerate(zip(samples, encoded, strict=True)):
            # each answer has a sample, or one sample has all those of the turns that it kept
            its = learnt[number : number + 1] if len(encoded) > 1 else learnt[-len(one.spans) :]
            for (start, _), answer in zip(sample.spans, its, strict=False):  # the last ones may be cut
                output = {"output": answer_text(answer.metadata, answer.content)}
                one_row = row if answer is dialogue.messages[-1] else row | output
                found.append(((tuple(sample.input_ids), start), one_row))
        return found

    def _more_names(self) -> str:
        if self.kind is None:
            return "with --eval_generate there are more"
        return f"ROUGE and BLEU need {missing(self.kind)}" if missing(self.kind) else f"answers are {self.kind}"

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for a training state."""
        return {
            "best": torch.tensor(self.best, dtype=torch.float64),
            "best_step": torch.tensor(self.best_step),
            "stale": torch.tensor(self.stale),
        }

    def set_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned; empty if the run had no validation before."""
        if tensors:
            self.best, self.best_step = float(tensors["best"]), int(tensors["best_step"])
            self.stale = int(tensors["stale"])

    def begin(self) -> None:
        """Start, after a training state was loaded: print the settings, and validate if --eval_at_start."""
        text = f"validation: {len(self.rows)} rows"
        if self.kind:
            text += (
                f"; answers to {len(self.generated)}, of at most {self.max_new_tokens} tokens, scored as {self.kind}"
            )
            text += f"; none to {self.texts} blocks of plain text" if self.texts else ""
            text += f" (ROUGE and BLEU are left out; they need: {missing(self.kind)})" if missing(self.kind) else ""
        print_rank_0(text)
        step = self.engine.global_steps
        if is_rank_0():
            self.file = JsonLines(os.path.join(self.args.output_dir, "validation.jsonl"), step)
        if self.args.eval_at_start and not step:
            self._measure(0)

    def due(self) -> bool:
        """Whether to validate after this step."""
        step = self.engine.global_steps
        return step % self.every == 0 or step == self.total_steps

    def run(self, epoch: int) -> bool:
        """Validate, and save the model if it is the best so far. Returns whether training should stop early."""
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
        print_rank_0(f"stopping early after step {step}: {patient}; {self.describe_best()}")
        return True

    def describe_best(self) -> str | None:
        """The best value so far and its step as text; None if no validation had a value."""
        return f"best at step {self.best_step}: {self.args.best_metric} {self.best:.4f}" if self.best_step else None

    def close(self) -> None:
        """Close the file, after the last validation."""
        if self.file is not None:
            self.file.close()

    def _write_best(self, epoch: int) -> None:
        content = {"step": self.best_step, "epoch": epoch, "metric": self.args.best_metric, "value": self.best}
        path = os.path.join(self.args.output_dir, "best.json")
        with write_errors(path):
            write_file(path, json.dumps(content) + "\n")

    def _measure(self, epoch: int) -> dict[str, float]:
        """All metrics by name, the same on every rank; rank 0 prints and writes them."""
        step, start = self.engine.global_steps, time.perf_counter()
        with self.log.paused():
            self.engine.eval()
            try:
                loss = mean_loss(self.engine, self.data, self.rows, self.args.eval_batch_size)
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
            # ZeRO-3 prefetches as if a backward pass followed: parameters in flight must not meet a save
            self.engine.empty_partition_cache()
            seconds = time.perf_counter() - start
            if self.file is not None:
                self._tell(step, epoch, values, seconds)
        return values

    def _score(self, answers: list[tuple[str, bool]], step: int) -> dict[str, float]:
        """Score the answers, and write them beside the references."""
        lines = []
        for row, (text, ended) in zip(self.asked, answers, strict=True):
            lines.append(json.dumps({"step": step, **with_answer(row, text, ended)}, ensure_ascii=False))
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
        print_rank_0(f"validation epoch {epoch} step {step}/{self.total_steps} {figures} ({seconds:.1f} s{best})")
        self.file.add(step=step, epoch=epoch, **values, seconds=seconds)
        self.log.write("eval", values, step)
