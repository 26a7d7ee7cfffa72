"""What tuning cost: a suite of general prompts before and after, beside each other.

    python -m tuning.evaluate.forgetting --mode glm3 --base ChatGLM3-6B/ --tuned output-glm3/epoch-2-step-750

For each category of the suite (data/forgetting.json: translation both ways, code, general questions, chat):

    forgetting  how much the negative log-likelihood of the reference answers rose, in nats per answer token: the one
                number to look at; 0 is none
    KL          of the tuned model's next-token distributions from the base's, at the references' tokens, in nats
    agree       share of greedy answers that are the same, and how far they are the same from the start

Either folder may be a full model, a P-Tuning result or a LoRA adapter. One model is in memory at a time.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from glm_models import MODE
from tuning import ROOT, exits
from tuning.arguments.models import Model
from tuning.arguments.parser import SWITCH, File, Folder, Integer, NewPath, Parser, Text, answer_early
from tuning.environment import let_segments_grow

SUITE = os.path.join(ROOT, "data", "forgetting.json")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    parser = Parser(__doc__, contradictions)
    group = parser.group("what is compared")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B")
    group.add_argument("--base", type=Model(), required=True, help="model before tuning: folder, or name on a hub")
    group.add_argument(
        "--tuned", type=Folder(), required=True, help="folder of the result: a model, a P-Tuning result or an adapter"
    )
    group.add_argument(
        "--suite", type=File(), default=SUITE, default_text="data/forgetting.json",
        help="rows of instruction, input, output and category",
    )  # fmt: skip
    group.add_argument(
        "--output", type=NewPath(), default_text="forgetting.json in --tuned",
        help="report in JSON; the same in tables is beside it, ending in .md",
    )  # fmt: skip
    group = parser.group("settings")
    group.add_argument(
        "--device", type=Text(), default_text="the accelerator, else cpu", help="cuda, cuda:1, cpu or a number"
    )
    group.add_argument("--max_length", type=Integer(), default=2048, help="maximum tokens of prompt and reference")
    group.add_argument("--max_new_tokens", type=Integer(), default=128, help="maximum tokens per greedy answer")
    group.add_argument("--verbose", **SWITCH, help="show the messages of the libraries")
    return parser.parse_args(argv)


def contradictions(args: argparse.Namespace) -> list[str]:
    """What is wrong with --output; see Parser."""
    if args.output is None:
        return []
    if not args.output.endswith(".json"):
        return [f"--output {args.output} must end in .json"]
    if not os.path.isdir(os.path.dirname(args.output) or "."):
        return [f"--output {args.output}: no such folder"]
    return []


if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)
    let_segments_grow()

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from glm_models.generation import generate_ids
from tuning.engine.loading import load_result, named_device
from tuning.errors import DataError, UserError
from tuning.exits import exit_on_user_errors
from tuning.folders import check_space, file_hash, write_errors, write_file
from tuning.hub import find_models
from tuning.lora.adapter import trained_bits
from tuning.samples.batches import MicroBatch, collate
from tuning.samples.encoding import Sample, encode_sample
from tuning.samples.formats import KEYS, question_of, unused_keys
from tuning.samples.row_files import describe_file, read_rows
from utils import silence_libraries

SHOWN = ("forgetting", "nll_base", "nll_tuned", "kl", "agree", "agree_prefix")


# The suite


def read_suite(path: str) -> tuple[list[int], list[dict]]:
    """Lines and rows of a suite: an instruction file whose rows have a `category` too.

    Raises:
        DataError: see `read_rows`; or a category is missing.
    """
    lines, rows = zip(*read_rows(path), strict=True)
    for line in describe_file(path):
        print(line)
    if unused := unused_keys(rows, KEYS | {"category"}):
        print(f"{path}: {unused}")
    for line, row in zip(lines, rows, strict=True):
        if not isinstance(row.get("category"), str) or not row["category"].strip():
            raise DataError(f"{path} line {line}: a row of a suite needs a category, as a string")
    return list(lines), list(rows)


def encode_suite(tokenizer, path: str, lines: list[int], rows: list[dict], max_length: int) -> list[Sample]:
    """The rows as whole samples.

    Raises:
        DataError: one does not fit into max_length.
    """
    samples = []
    for line, row in zip(lines, rows, strict=True):
        try:
            sample = encode_sample(tokenizer, row, max_length, max_length)
        except ValueError as error:
            raise DataError(f"{path} line {line}: {error}") from None
        if sample.prompt_cut or sample.answer_cut:
            raise DataError(f"{path} line {line} has more than --max_length {max_length} tokens")
        samples.append(sample)
    return samples


# One model


@torch.inference_mode()
def answer_log_probs(model, tokenizer, sample: Sample) -> torch.Tensor:
    """Log-probabilities of all next tokens at each token of a reference and its end: float32 [tokens, vocabulary]."""
    # as in training: for ChatGLM-6B the context decides who sees whom
    batch = collate([sample], tokenizer.context_length, MicroBatch([0], 1.0)).to(model.device)
    before = batch["answer_positions"] - 1  # a token's distribution stands at the one before it
    output = model(input_ids=batch["input_ids"], segments=batch["segments"], logits_to_keep=before, use_cache=False)
    return output.logits[0].float().log_softmax(-1)


@torch.inference_mode()
def greedy_answer(model, tokenizer, sample: Sample, max_new_tokens: int) -> list[int]:
    """Ids of the likeliest answer, without the token that ends it."""
    ((ids, _),) = generate_ids(model, tokenizer, [sample.prompt], [max_new_tokens])
    return ids


def reference_ids(sample: Sample) -> torch.Tensor:
    """Ids of the reference answer and its end: [tokens]."""
    return torch.tensor(sample.learnt)


def negative_log_likelihood(log_probs: torch.Tensor, sample: Sample) -> float:
    """Of the reference answer and its end, summed over its tokens, in nats."""
    return -log_probs.gather(1, reference_ids(sample)[:, None].to(log_probs.device)).double().sum().item()


def divergence(base: torch.Tensor, tuned: torch.Tensor) -> float:
    """KL(base || tuned) of next-token distributions [tokens, vocabulary], summed over tokens, in nats."""
    # kl_div's own order: of its target from its input
    return torch.nn.functional.kl_div(tuned, base, reduction="sum", log_target=True).item()


def common_prefix(one: Sequence, other: Sequence) -> float:
    """How far two answers are the same from the start: tokens, as a share of the longer one."""
    longer = max(len(one), len(other))
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same / longer if longer else 1.0


# Both


class Measured(NamedTuple):
    """A row of the suite under one model; in nats, summed over its answer tokens."""

    nll: float
    kl: float  # from the base; 0 for the base itself
    answer: list[int]


def measure_base(model, tokenizer, samples: list[Sample], max_new_tokens: int, folder: str):
    """Measure the base, and keep its distributions in a file without a name, memory-mapped.

    Returns:
        A `Measured` for each sample; float32 [answer tokens of all, vocabulary], log-probabilities.
    """
    sizes = [len(sample.learnt) for sample in samples]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    needed = 4 * sum(sizes) * vocabulary
    check_space(folder, needed, "the base's distributions (TMPDIR names another folder)")
    print(f"the base's distributions take {needed / 2**20:.0f} MiB in {folder} meanwhile")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(needed)
        kept = np.memmap(file, np.float32, "r+", shape=(sum(sizes), vocabulary))
    found, start = [], 0
    for sample, size in tqdm(list(zip(samples, sizes, strict=True)), desc="base", leave=False):
        log_probs = answer_log_probs(model, tokenizer, sample)
        kept[start : start + size] = log_probs.cpu().numpy()
        answer = greedy_answer(model, tokenizer, sample, max_new_tokens)
        found.append(Measured(negative_log_likelihood(log_probs, sample), 0.0, answer))
        start += size
    return found, kept


def measure_tuned(model, tokenizer, samples: list[Sample], max_new_tokens: int, kept: np.ndarray) -> list[Measured]:
    """Measure the tuned model, its distributions against those `kept` of the base."""
    found, start = [], 0
    for sample in tqdm(samples, desc="tuned", leave=False):
        log_probs = answer_log_probs(model, tokenizer, sample)
        if log_probs.shape[1] != kept.shape[1]:
            raise UserError(f"base and tuned model have vocabularies of {kept.shape[1]} and {log_probs.shape[1]}")
        base = torch.from_numpy(kept[start : start + len(log_probs)]).to(log_probs.device)
        answer = greedy_answer(model, tokenizer, sample, max_new_tokens)
        found.append(Measured(negative_log_likelihood(log_probs, sample), divergence(base, log_probs), answer))
        start += len(log_probs)
    return found


def summarise(tokens: list[int], base: list[Measured], tuned: list[Measured]) -> dict[str, float]:
    """Figures of some rows: see the module's docstring.

    Args:
        tokens: of each row's reference, its end included.
    """
    total = sum(tokens)
    before, after = sum(row.nll for row in base) / total, sum(row.nll for row in tuned) / total
    answers = [(one.answer, other.answer) for one, other in zip(base, tuned, strict=True)]
    return {
        "rows": len(tokens),
        "tokens": total,
        "forgetting": after - before,
        "nll_base": before,
        "nll_tuned": after,
        "kl": sum(row.kl for row in tuned) / total,
        "agree": sum(one == other for one, other in answers) / len(answers),
        "agree_prefix": sum(common_prefix(*pair) for pair in answers) / len(answers),
    }


def compare(
    mode: str,
    base: str,
    tuned: str,
    suite: str = SUITE,
    device: torch.device | None = None,
    max_length: int = 2048,
    max_new_tokens: int = 128,
) -> dict:
    """Run a suite on a base model and on what tuning made of it.

    Args:
        base, tuned: folders; see the module's docstring.
        device: None for the accelerator, else the CPU.
        max_length: most tokens of prompt and reference.
        max_new_tokens: most tokens of a greedy answer.

    Returns:
        `categories`: by name, what `summarise` returns of its rows; `overall`: the means over the categories; `rows`:
        each prompt, its reference, both answers and its figures, in nats per answer token; and what was compared.

    Raises:
        UserError: the two do not belong together. DataError, FolderError, CheckpointError: about files.
    """
    device = device or named_device(None)
    lines, rows = read_suite(suite)
    bits = trained_bits(tuned)  # of both: else the error of quantisation would count as forgetting
    tokenizer, model = load_result(mode, base, None, device, bits=bits)
    samples = encode_suite(tokenizer, suite, lines, rows, max_length)
    before, kept = measure_base(model, tokenizer, samples, max_new_tokens, tempfile.gettempdir())
    dtype = model.dtype  # for both: else the difference of two types would count as forgetting
    del model
    gc.collect()
    get_accelerator().empty_cache()
    other_tokenizer, model = load_result(mode, tuned, base, device, dtype, bits)
    if tokenizer.fingerprint() != other_tokenizer.fingerprint():
        raise UserError(f"{base} and {tuned} have different tokenizers: their distributions cannot be compared")
    after = measure_tuned(model, tokenizer, samples, max_new_tokens, kept)

    figures = figures_of(rows, [len(sample.learnt) for sample in samples], before, after, tokenizer)
    return {
        "base": base,
        "tuned": tuned,
        "suite": suite,
        "suite_sha256": file_hash(suite),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_bit": bits,
        "max_new_tokens": max_new_tokens,
        **figures,
    }


def figures_of(rows: list[dict], tokens: list[int], before: list, after: list, tokenizer) -> dict:
    """`overall`, `categories` and `rows` of `compare`.

    Args:
        tokens: of each reference. before, after: what `measure_base` and `measure_tuned` found for each row.
    """
    categories = {}
    for category in dict.fromkeys(row["category"] for row in rows):
        chosen = [i for i, row in enumerate(rows) if row["category"] == category]
        categories[category] = summarise(*([some[i] for i in chosen] for some in (tokens, before, after)))
    overall = {key: sum(some[key] for some in categories.values()) / len(categories) for key in SHOWN}
    shown = []
    for row, size, one, other in zip(rows, tokens, before, after, strict=True):
        asked = {key: row[key] for key in ("category", "instruction", "input", "output")}
        answers = {
            "base_answer": tokenizer.decode_answer(one.answer),
            "tuned_answer": tokenizer.decode_answer(other.answer),
        }
        single = {key: value for key, value in summarise([size], [one], [other]).items() if key != "rows"}
        shown.append({**asked, **answers, **single})
    return {"overall": overall, "categories": categories, "rows": shown}


# Reports


def table(report: dict) -> list[str]:
    """A line a category, and one for all."""
    heads = ("category", "rows", "tokens", "forgetting", "NLL base", "NLL tuned", "KL", "agree", "agree from start")
    rows = [
        [name, str(some["rows"]), str(some["tokens"]), *_figures(some)] for name, some in report["categories"].items()
    ]
    rows.append(["mean of categories", "", "", *_figures(report["overall"])])
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def _figures(some: dict) -> list[str]:
    forgetting, *nats, agree, prefix = (some[key] for key in SHOWN)
    return [f"{forgetting:+.3f}", *(f"{value:.3f}" for value in nats), f"{agree:.0%}", f"{prefix:.0%}"]


def markdown(report: dict) -> str:
    """The table, and under it the answers side by side."""
    lines = [f"# {report['tuned']} against {report['base']}", "", *table(report)]
    lines += ["", "NLL, KL and forgetting are nats per answer token.", "", "## Answers", ""]
    heads = ("category", "prompt", "reference", "base", "tuned", "forgetting")
    lines += ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads))]
    for row in report["rows"]:
        texts = [row["category"], question_of(row), row["output"]]
        texts += [row["base_answer"], row["tuned_answer"]]
        lines.append("| " + " | ".join([*map(_cell, texts), f"{row['forgetting']:+.3f}"]) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    for character, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(character, shown)
    return text


# The script


def main(argv=None) -> None:
    with exit_on_user_errors():
        args = parse_args(argv)
        silence_libraries(args.verbose)
        find_models(args, "base")
        output = args.output or os.path.join(args.tuned, "forgetting.json")
        device = named_device(args.device)
        report = compare(args.mode, args.base, args.tuned, args.suite, device, args.max_length, args.max_new_tokens)
        pages = os.path.splitext(output)[0] + ".md"
        with write_errors(output):
            write_file(output, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
            write_file(pages, markdown(report))
        print(*table(report), f"answers side by side: {pages}", sep="\n")


if __name__ == "__main__":
    main()
