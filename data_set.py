"""From an instruction file to batches: rows are read and checked, turned into ids and labels, and dealt out to ranks.

A tokenizer is known here by four things only: `encode_prompt`, `encode_answer`, `context_length` and `eos_token_id`.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

IGNORE_INDEX = -100


class DataError(ValueError):
    """A row or file that cannot be used; the message names file and line and what is wrong."""


# Rows


def read_rows(path: str, several_outputs: bool = False, empty_outputs: bool = False) -> Iterator[tuple[int, dict]]:
    """Read an instruction file: JSON lines, or one JSON array of objects.

    Args:
        several_outputs: a row's output may also be a list of strings (references to compare a prediction with).
        empty_outputs: an output may be empty (nothing to extract).

    Yields:
        Line number (of the row's start, from 1) and the row, a dict with strings under instruction, input and output.

    Raises:
        DataError: the file cannot be read, or a row is not as it must be.
    """
    try:
        # newline="\n": a lone carriage return inside a text is no end of line
        with open(path, encoding="utf-8", newline="\n") as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            rows = _array_rows(path, file.read()) if first == "[" else _line_rows(path, file)
            empty = True
            for line, row in rows:
                empty = False
                check_row(row, f"{path} line {line}", several_outputs, empty_outputs)
                yield line, row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    if empty:
        raise DataError(f"{path} holds no rows")


def _line_rows(path, file):
    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {line} is not valid JSON: {error}") from None


def _array_rows(path, text):
    """Rows of a JSON array, one by one, so that each knows its line."""
    decoder = json.JSONDecoder()
    position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[") + 1)

    def skip_space(start):
        end = start
        while end < len(text) and text[end].isspace():
            end += 1
        return end, text.count("\n", start, end)

    position, newlines = skip_space(position)
    line += newlines
    more = text[position : position + 1] != "]"
    while more:
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {line} is not valid JSON: {error}") from None
        yield line, row
        line += text.count("\n", position, end)
        position, newlines = skip_space(end)
        line += newlines
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise DataError(f"{path} line {line}: expected a comma or ] after a row of the array")
        more = mark == ","
        position, newlines = skip_space(position + 1)
        line += newlines
    if position < len(text):
        raise DataError(f"{path} line {line}: there is more after the end of the array")


def check_row(row, where: str, several_outputs: bool = False, empty_outputs: bool = False) -> None:
    """Make sure that a row has what training needs.

    Raises:
        DataError: with `where` in front.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with instruction, input and output, not {_kind(row)}")
    for key in ("instruction", "input", "output"):
        if key not in row:
            raise DataError(f"{where}: the key {key!r} is missing; a row has instruction, input and output")
    for key in ("instruction", "input"):
        if not isinstance(row[key], str):
            raise DataError(f"{where}: {key} must be a string, not {_kind(row[key])}")
    if not (row["instruction"] + row["input"]).strip():
        raise DataError(f"{where}: instruction and input are both empty")
    outputs = row["output"] if several_outputs and isinstance(row["output"], list) else [row["output"]]
    if not outputs or not all(isinstance(output, str) for output in outputs):
        wanted = "a string or a list of strings" if several_outputs else "a string"
        raise DataError(f"{where}: output must be {wanted}, not {_kind(row['output'])}")
    if not empty_outputs and not all(output.strip() for output in outputs):
        raise DataError(f"{where}: output is empty; --allow_empty_output trains such rows to answer nothing")


def _kind(value) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )


# Samples


class Sample(NamedTuple):
    """One row as ids; positions from `answer_start` on are learnt."""

    input_ids: list[int]
    answer_start: int
    prompt_cut: bool  # the query lost its end to max_src_len
    answer_cut: bool  # the answer lost its end to max_len, and with it the end token

    @property
    def labels(self) -> list[int]:
        """Aligned with input_ids; IGNORE_INDEX on the prompt."""
        return [IGNORE_INDEX] * self.answer_start + self.input_ids[self.answer_start :]


def encode_sample(tokenizer, row: dict, max_len: int, max_src_len: int) -> Sample:
    """Prompt, answer, end token.

    An answer that does not fit is cut and then has no end token: an end token after a cut would teach the model to stop
    in mid-sentence.

    Raises:
        ValueError: the prompt leaves no room for an answer, or max_src_len none for the query.
    """
    query = row["instruction"] + row["input"]
    prompt = tokenizer.encode_prompt(query, max_src_len=max_src_len)
    room = max_len - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt's {len(prompt)} tokens leave no room for an answer in max_len {max_len}")
    answer = [*tokenizer.encode_answer(row["output"]), tokenizer.eos_token_id]
    # a prompt of at least max_src_len tokens, framing included, may have been cut
    prompt_cut = len(prompt) >= max_src_len and len(prompt) < len(tokenizer.encode_prompt(query))
    return Sample(prompt + answer[:room], len(prompt), prompt_cut, len(answer) > room)


class InstructionData(Dataset):
    """All samples of a file. Indexed by a `MicroBatch`, it gives a batch of tensors.

    Args:
        path: the instruction file.
        tokenizer: of the family; it makes the prompts.
        max_len: most tokens of a sample.
        max_src_len: most tokens of its prompt.
        is_skip: drop samples that would be cut.
        empty_outputs: an empty output is an answer too: the end token alone.

    Raises:
        DataError: a row is broken or its prompt leaves no room for an answer; or no sample is left.
    """

    def __init__(
        self, path: str, tokenizer, max_len: int, max_src_len: int, is_skip: bool = False, empty_outputs: bool = False
    ):
        self.context_length = tokenizer.context_length
        self.samples: list[Sample] = []
        self.lines: list[int] = []  # where each sample comes from
        self.prompts_cut = self.answers_cut = self.skipped = 0
        for line, row in read_rows(path, empty_outputs=empty_outputs):
            try:
                sample = encode_sample(tokenizer, row, max_len, max_src_len)
            except ValueError as error:
                raise DataError(f"{path} line {line}: {error}") from None
            self.prompts_cut += sample.prompt_cut
            self.answers_cut += sample.answer_cut
            if is_skip and (sample.prompt_cut or sample.answer_cut):
                self.skipped += 1
                continue
            self.samples.append(sample)
            self.lines.append(line)
        if not self.samples:
            raise DataError(f"{path}: every row is longer than max_src_len {max_src_len} or max_len {max_len} allow")

    def __len__(self) -> int:
        return len(self.samples)

    def summary(self) -> str:
        """One line on what was read, and what was lost to the length limits."""
        lengths = sorted(len(sample.input_ids) for sample in self.samples)
        median, longest = lengths[len(lengths) // 2], lengths[-1]
        text = f"{len(self)} samples, {sum(lengths)} tokens (median {median}, longest {longest})"
        if self.skipped:
            return f"{text}; {self.skipped} longer ones skipped (--is_skip)"
        if self.prompts_cut or self.answers_cut:
            text += f"; cut to fit: {self.prompts_cut} prompts (--max_src_len), {self.answers_cut} answers (--max_len)"
        return text

    def length(self, row: int) -> int:
        """Tokens of one sample."""
        return len(self.samples[row].input_ids)

    def tokens(self, rows: list[int]) -> int:
        """Tokens of some samples together."""
        return sum(map(self.length, rows))

    def answer_tokens(self, rows: list[int]) -> int:
        """Tokens with a label."""
        return sum(len(self.samples[i].input_ids) - self.samples[i].answer_start for i in rows)

    def __getitem__(self, micro_batch: "MicroBatch") -> "Batch":
        return collate([self.samples[i] for i in micro_batch.rows], self.context_length, micro_batch)


# Batches


class MicroBatch(NamedTuple):
    """The rows that one rank takes through the model at once."""

    rows: list[int]
    num_items: float  # divisor of the summed loss, see plan_epoch
    is_filler: bool = False  # keeps the ranks in step and adds nothing: its rows have no labels


class Batch(dict):
    """Arguments of the model: whole samples end to end in one row, nothing is padding.

    input_ids and labels [1, tokens]; segments, each sample's tokens and how many of them are context;
    answer_positions [answer tokens], where labels are; num_items_in_batch.
    """

    tokens: int  # that are learnt from or read: none in a filler
    samples: int

    def to(self, device) -> dict:
        """The arguments with their tensors on `device`."""
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in self.items()}


def collate(samples: list[Sample], context_length: Callable[[list[int]], int], micro_batch: MicroBatch) -> Batch:
    """Put samples end to end; context_length is the tokenizer's."""
    labels = [label for sample in samples for label in sample.labels]
    if micro_batch.is_filler:
        labels = [IGNORE_INDEX] * len(labels)
    batch = Batch(
        input_ids=torch.tensor([[i for sample in samples for i in sample.input_ids]]),
        labels=torch.tensor([labels]),
        segments=[(len(sample.input_ids), context_length(sample.input_ids)) for sample in samples],
        # counted here, since to count on a GPU is to wait for it
        answer_positions=torch.tensor([i for i, label in enumerate(labels) if label != IGNORE_INDEX], dtype=torch.long),
        num_items_in_batch=micro_batch.num_items,
    )
    batch.tokens, batch.samples = (0, 0) if micro_batch.is_filler else (len(labels), len(samples))
    return batch


def pack_rows(data: InstructionData, max_len: int, seed: int) -> list[list[int]]:
    """Put samples together, up to max_len tokens: the longest first, each where it leaves the least room."""
    packs: list[list[int]] = []
    room: dict[int, list[int]] = {}  # packs by the tokens that still fit
    rooms = 0  # bit n is set where room[n] holds a pack
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)  # so that chance says which of equal length come together
    for i in sorted(order, key=data.length, reverse=True):
        tokens = data.length(i)
        fitting = rooms >> tokens
        if fitting:
            left = tokens + (fitting & -fitting).bit_length() - 1
            pack = room[left].pop()
            if not room[left]:
                rooms &= ~(1 << left)
        else:
            left, pack = max_len, len(packs)
            packs.append([])
        packs[pack].append(i)
        left -= tokens
        room.setdefault(left, []).append(pack)
        rooms |= 1 << left
    return packs


def count_steps(rows: int, batch_size: int, accumulation: int, world_size: int) -> int:
    """Optimiser steps of an epoch; the last one may hold fewer rows."""
    return -(-rows // (batch_size * accumulation * world_size))


def plan_epoch(
    data: InstructionData,
    packs: list[list[int]],
    batch_size: int,
    accumulation: int,
    world_size: int,
    seed: int,
    epoch: int,
    by_length: bool = False,
) -> list[list[MicroBatch]]:
    """Deal an epoch's rows out to optimiser steps, micro-batches and ranks; the same on every rank.

    Every step has accumulation x world_size micro-batches, so that all ranks stay in step and the engine's own count of
    accumulated micro-batches ends with the epoch. A last step with fewer rows spreads them; where there are fewer rows
    than micro-batches, fillers without labels make up the number.

    The engine divides by accumulation and averages over ranks. With num_items = answer tokens of the step /
    (accumulation x world_size), the step's loss is the mean over all its answer tokens, however they are split.

    The first epoch begins with the longest rows of all, so that a lack of memory shows at once. In each step the
    largest micro-batches come first, so that ranks have about as much to do at the same time.

    Args:
        packs: what takes the place of a row: one sample each, or several with `pack_rows`.
        by_length: put rows of about the same length into a step.

    Returns:
        steps, each a list of micro-batches; rank r takes those at r, r + world_size, ...
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(packs)))
    rng.shuffle(order)
    parts = accumulation * world_size
    size = batch_size * parts

    def longest_first(some):
        return sorted(some, key=lambda i: data.tokens(packs[i]), reverse=True)

    if epoch == 1:
        first = longest_first(order)[:size]
        taken = set(first)
        order = first + [i for i in order if i not in taken]
    if by_length:
        window = 50 * size  # sorted within, so that chance still says who meets whom
        order = [i for a in range(0, len(order), window) for i in longest_first(order[a : a + window])]

    steps = [_deal_step(data, [packs[i] for i in order[a : a + size]], parts) for a in range(0, len(order), size)]
    if by_length:
        middle = steps[1 : len(order) // size]  # but the first, and a last one with fewer rows
        rng.shuffle(middle)
        steps[1 : 1 + len(middle)] = middle
    return steps


def _deal_step(data: InstructionData, packs: list[list[int]], parts: int) -> list[MicroBatch]:
    """One optimiser step as `parts` micro-batches, the largest first."""
    num_items = sum(map(data.answer_tokens, packs)) / parts
    cuts = [len(packs) * i // parts for i in range(parts + 1)]
    split = [[row for pack in packs[a:b] for row in pack] for a, b in itertools.pairwise(cuts)]
    split.sort(key=data.tokens, reverse=True)
    return [MicroBatch(rows or split[0][:1], num_items, is_filler=not rows) for rows in split]


def epoch_loader(data: InstructionData, steps: list[list[MicroBatch]], rank: int, world_size: int, pin: bool):
    """A DataLoader over the batches of one rank."""
    mine = [micro_batch for step in steps for micro_batch in step[rank::world_size]]
    return DataLoader(data, sampler=mine, batch_size=None, pin_memory=pin)
