"""How exactly an adapter answers in half precision: logits and greedy answers of what load_result gives, against base
and adapter, unmerged, in float32; beside them the error of the base alone, and what merging into half precision loses.

    python tests/adapter_errors.py            # a table, in bfloat16 and float16, for all families
"""

import contextlib
import io
import itertools
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "support"), str(TESTS / "lora")]

import torch
from conftest import TEXT, TINY, make_lively_checkpoint
from peft import PeftModel
from test_merge import make_adapter, make_base

import utils
from glm_models import MODE
from glm_models.generation import generate_ids
from tuning.engine.loading import load_result

ALL = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CPU = torch.device("cpu")
LENGTH = 8  # tokens of an answer


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


class Said(NamedTuple):
    """logits: of all tokens of the prompts [tokens, vocabulary], float32; answers: ids of the greedy ones."""

    logits: torch.Tensor
    answers: list[list[int]]


class Compared(NamedTuple):
    """What a model says in float32 and what in half precision, where it is `model`.

    margins: for each answer that differs, by how much float32's logits prefer its own token where the two part.
    """

    wide: Said
    half: Said
    model: torch.nn.Module
    margins: list[float]

    def error(self) -> float:
        """Of the logits, root mean square."""
        return rms(self.half.logits - self.wide.logits)

    def same_answers(self) -> int:
        return sum(one == other for one, other in zip(self.wide.answers, self.half.answers, strict=True))


def encode(tokenizer) -> list[list[int]]:
    return [tokenizer.encode_prompt(text) for text in TEXT[:24]]


@torch.inference_mode()
def ask(model, tokenizer) -> Said:
    prompts = encode(tokenizer)
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    logits = model(**batch).logits[batch["attention_mask"].bool()].float()
    return Said(logits, [ids for ids, _ in generate_ids(model, tokenizer, prompts, [LENGTH] * len(prompts))])


@torch.inference_mode()
def find_margins(model, tokenizer, own: Said, other: Said) -> list[float]:
    """See Compared.margins, of a model and what it says itself, and what another one says."""
    margins = []
    for prompt, *answers in zip(encode(tokenizer), own.answers, other.answers, strict=True):
        steps = enumerate(itertools.zip_longest(*answers))  # None: the answer has ended
        parted = next(((place, pair) for place, pair in steps if pair[0] != pair[1]), None)
        if parted is not None:
            place, pair = parted
            logits = model(torch.tensor([prompt + answers[0][:place]])).logits[0, -1]
            mine, theirs = (logits[tokenizer.stop_token_ids if token is None else token].max() for token in pair)
            margins.append((mine - theirs).item())
    return margins


def in_type(mode: str, base: str, folder: str, dtype: torch.dtype):
    """A base, if `folder` is another one with its adapter in peft's own layers."""
    model = MODE[mode].model.from_pretrained(base, dtype=dtype).eval()
    return model if folder == base else PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)


def wide_and_half(mode: str, base: str, folder: str, tokenizer, dtype: torch.dtype, merged: bool = False) -> Compared:
    """The same base or adapter in float32, unmerged, and in half precision as load_result gives it, or `merged`."""
    wide = in_type(mode, base, folder, torch.float32)
    if merged:
        half = in_type(mode, base, folder, dtype).merge_and_unload()
    else:
        half = load_result(mode, folder, base, CPU, dtype)[1]
    wide = wide if folder == base else wide.get_base_model()
    said, in_half = ask(wide, tokenizer), ask(half, tokenizer)
    return Compared(said, in_half, half, find_margins(wide, tokenizer, said, in_half))


def main() -> None:
    utils.silence_libraries(verbose=False)
    print("errors of logits, as shares of the logits; answers that are the same as in float32, of 24")
    print("family | type | effect of the adapter | error: base | adapter | merged | same: base, adapter, merged")
    means = []
    for mode in MODE:
        with tempfile.TemporaryDirectory() as work:
            make_lively_checkpoint(mode, f"{work}/tiny", **TINY[mode])
            tokenizer = MODE[mode].tokenizer.from_pretrained(f"{work}/tiny")
            for dtype in (torch.bfloat16, torch.float16):
                name = str(dtype).removeprefix("torch.")
                with contextlib.redirect_stdout(io.StringIO()):
                    base = make_base({mode: f"{work}/tiny"}, mode, Path(work, name), dtype)
                    alone = wide_and_half(mode, base, base, tokenizer, dtype)
                for std in (0.1, 0.03, 0.01):
                    with contextlib.redirect_stdout(io.StringIO()):
                        adapter = make_adapter(mode, base, Path(work, f"{name}-{std}"), ALL, std)
                        found = wide_and_half(mode, base, adapter, tokenizer, dtype)
                        merged = wide_and_half(mode, base, adapter, tokenizer, dtype, merged=True)
                    share = rms(found.wide.logits - alone.wide.logits) / rms(alone.wide.logits)
                    three = (alone, found, merged)
                    means.append((name, [one.error() / rms(one.wide.logits) for one in three]))
                    errors = " | ".join(f"{error:.3%}" for error in means[-1][1])
                    same = ", ".join(str(one.same_answers()) for one in three)
                    print(f"{mode} | {name} | {share:.1%} | {errors} | {same}", flush=True)
    for name in dict.fromkeys(name for name, _ in means):
        columns = zip(*(errors for kind, errors in means if kind == name), strict=True)
        print(f"mean, {name}: " + " | ".join(f"{sum(column) / len(column):.3%}" for column in columns))


if __name__ == "__main__":
    main()
