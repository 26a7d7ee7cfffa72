"""Merge a LoRA adapter into its base model: a complete model folder that needs no peft.

    python merge_lora.py --mode glm3 --ori_model_dir ChatGLM3-6B/ --model_dir output-glm3/epoch-2-step-750

The base's files are read and written one by one, a few rows of a weight at a time; each sum is computed in float32 and
rounded once, to the type of the base. Before the result gets its name it is verified: every weight is compared with
base and adapter, and the logits on a few prompts with those of the unmerged model.
"""

import argparse
import itertools
import os
from typing import NamedTuple

from glm_models import MODE
from tuning import exits
from tuning.arguments.models import Model
from tuning.arguments.parser import SWITCH, Folder, NewPath, Parser, answer_early


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.group("models")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B")
    group.add_argument("--ori_model_dir", type=Model(), required=True, help="base model: folder, or name on a hub")
    group.add_argument("--model_dir", type=Folder(), required=True, help="folder of the LoRA adapter")
    group.add_argument(
        "--output_dir", type=NewPath(), default_text="the adapter's with -merged appended",
        help="folder to write; must be empty or new",
    )  # fmt: skip
    group.add_argument(
        "--into_quantized", **SWITCH,
        help="merge into the base as it was in the training of an adapter on a quantised base: quantised and back",
    )  # fmt: skip
    group.add_argument("--no_verify", **SWITCH, help="do not compare the merged with the unmerged model")
    return parser


if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)

import torch
from torch import nn

from glm_models import check_family
from glm_models.checkpoint import (
    DTYPES,
    CheckpointError,
    WeightFile,
    matrix_dtype,
    printable,
    shard_names,
    total_bytes,
    weight_layout,
    write_index,
    write_safetensors,
    write_side_files,
)
from glm_models.streamed import QUESTIONS, as_bytes, differences, return_freed_memory, rms, skeleton, tied_weights
from tuning.arguments.quantization import missing_package, needs_package
from tuning.engine.loading import load_tokenizer
from tuning.errors import UserError
from tuning.exits import exit_on_user_errors
from tuning.folders import check_new_folder, check_space, claimed_folder
from tuning.hub import find_models
from tuning.lora.adapter import (
    Adapter,
    add_adapter,
    check_base,
    has_patterns,
    read_adapter,
    read_config,
    trained_bits,
    unread_keys,
)
from tuning.lora.verify import BaseWeights, logits, quantized_weights
from utils import silence_libraries

CHUNK = 2**21  # values of a weight that are added at a time: 8 MiB in float32


def check_fit(model: nn.Module, base: str, adapter: Adapter) -> None:
    """Check that every weight of the adapter belongs to a linear layer of the model, of the right shape.

    Raises:
        CheckpointError: one does not.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, (a, b) in adapter.pairs.items():
        module = linear.get(name.removesuffix(".weight"))
        if module is None:
            raise CheckpointError(f"{adapter.folder} adapts {name}, but {base} has no such linear layer: another base?")
        if (b.shape[0], a.shape[1]) != tuple(module.weight.shape):
            shape = list(module.weight.shape)
            raise CheckpointError(
                f"{adapter.folder} adds {[b.shape[0], a.shape[1]]} to {name}, which is {shape} in {base}: another base?"
            )
    for target in adapter.targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise CheckpointError(
                f"{adapter.folder}: target_modules of its config names {target}, but {base} has no such linear layer"
            )
    weights, tied = dict(model.named_parameters(remove_duplicate=False)), tied_weights(model)
    for name, tensor in adapter.whole.items():
        if name not in weights or weights[name].shape != tensor.shape:
            there = list(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(
                f"{adapter.folder} replaces {name} by {list(tensor.shape)}, which is {there} in {base}: another base?"
            )
        if name in (*tied, *tied.values()):
            raise CheckpointError(
                f"{adapter.folder} replaces {name}, which in {base} is the weight of embedding and output layer alike "
                "(tie_word_embeddings)"
            )


def check_types(base: str, adapter: Adapter, types: dict[str, torch.dtype]) -> None:
    """Check that the base's files have a float weight for each of the adapter.

    Raises:
        CheckpointError: they have not.
    """
    for name in sorted(adapter.changed()):
        if name not in types:
            raise CheckpointError(f"{adapter.folder} adapts {name}, but {base} has no weights of its own for it")
        if not types[name].is_floating_point:
            raise CheckpointError(
                f"{name} of {base} is {DTYPES[types[name]]}; only float weights can be merged with an adapter"
            )


class Rows(NamedTuple):
    """Some rows of a weight [rows, in], the same of B [rows, rank], and their lengths [rows] with DoRA, else None."""

    weight: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None


def chunks(name: str, weight: torch.Tensor, adapter: Adapter):
    """Yield the rows of an adapted weight, about CHUNK values at a time."""
    rows = max(1, CHUNK // weight.shape[1])
    parts = [weight.split(rows), adapter.pairs[name][1].split(rows)]
    magnitude = adapter.magnitudes.get(name)
    parts.append(itertools.repeat(None) if magnitude is None else magnitude.split(rows))
    return itertools.starmap(Rows, zip(*parts, strict=False))


def add(rows: Rows, a: torch.Tensor, scale: float) -> torch.Tensor:
    """weight + scale * B A, each row with the length that DoRA gives it, computed in the type of A."""
    total = rows.weight.to(a.dtype) + scale * (rows.b.to(a.dtype) @ a)
    return total if rows.magnitude is None else total * stretch(total, rows.magnitude)


def stretch(total: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """The factors [rows, 1] that give the rows of `total` these lengths."""
    return (magnitude.to(total.dtype) / total.norm(dim=1))[:, None]


def merged(name: str, weight: torch.Tensor, adapter: Adapter, dtype: torch.dtype):
    """Yield what the adapter makes of a weight, some rows at a time, in `dtype`.

    Raises:
        CheckpointError: a value is NaN or out of the range of that type.
    """
    if name not in adapter.changed():
        yield weight.to(dtype)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    if name in adapter.whole:
        parts = [adapter.whole[name]]
    else:
        a = adapter.pairs[name][0].to(wide)
        parts = (add(rows, a, adapter.scale) for rows in chunks(name, weight, adapter))
    for part in parts:
        total = part.to(dtype)
        if not total.isfinite().all():
            raise CheckpointError(f"{name}: base and adapter together are NaN or too large for {dtype}")
        yield total


def write_merged(folder: str, base: str, adapter: Adapter, weights: BaseWeights) -> dict[str, str]:
    """Write base + adapter, one file per file of the base. Returns the base's file for each written file.

    Args:
        weights: of the base.
    """
    layout = weight_layout(base)
    names = shard_names(len(layout))
    for file, shapes in zip(names, layout.values(), strict=True):
        write_safetensors(
            os.path.join(folder, file),
            shapes,
            lambda name, shapes=shapes: merged(name, weights[name], adapter, shapes[name][0]),
        )
    write_index(folder, dict(zip(names, layout.values(), strict=True)), total_bytes(layout))
    return dict(zip((os.path.join(folder, name) for name in names), layout, strict=True))


def compare_weights(files: dict[str, str], adapter: Adapter, weights: BaseWeights) -> float:
    """Read the merged weights again and compare each with base and adapter.

    A weight that the adapter does not change must equal the base's bit for bit; one that was trained whole, the
    adapter's, rounded once. For all others see `compare_sum`.

    Args:
        files: see write_merged.
        weights: of the base.

    Returns:
        The share of the adapted values that differ from the base's: small changes are lost in rounding.

    Raises:
        CheckpointError: a weight differs by more.
    """
    changed = adapted = 0
    for path, base_path in files.items():
        found = WeightFile(path)
        for name in WeightFile(base_path).names:
            weight, result = weights[name], found[name]
            if name in adapter.pairs:
                right = compare_sum(name, weight, result, adapter)
            else:
                expected = adapter.whole.get(name, weight)
                right = torch.equal(as_bytes(result), as_bytes(expected.to(result.dtype)))
            if not right:
                what = "base + adapter" if name in adapter.changed() else "the base's"
                raise CheckpointError(f"{path}: {name} is not {what}; the disk or the memory is at fault")
            if name in adapter.pairs:
                changed += (result != weight).sum().item()
                adapted += weight.numel()
    return changed / adapted


def compare_sum(name: str, weight: torch.Tensor, result: torch.Tensor, adapter: Adapter) -> bool:
    """Whether a merged weight is the sum, computed here in float64, but for rounding.

    It may differ by half the spacing of its type and by the error of the sums in float32: rank + 2 roundings of at most
    |w| + scale |B| |A| (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). With DoRA the length of a
    row is a sum of as many squares as it has values, and quotient and product are rounded too.
    """
    a = adapter.pairs[name][0].double()
    kind, wide = torch.finfo(result.dtype), torch.finfo(torch.promote_types(result.dtype, torch.float32))
    results = result.split(max(1, CHUNK // weight.shape[1]))
    for rows, got in zip(chunks(name, weight, adapter), results, strict=True):
        exact = add(rows, a, adapter.scale)
        most = rows.weight.double().abs() + adapter.scale * (rows.b.double().abs() @ a.abs())
        error = (len(a) + 2) * wide.eps / 2 * most
        if rows.magnitude is not None:
            total = add(rows._replace(magnitude=None), a, adapter.scale)
            error = error * stretch(total, rows.magnitude).abs()
            error += exact.abs() * (error.norm(dim=1) / exact.norm(dim=1).clamp(min=wide.tiny))[:, None]
            error += exact.abs() * (a.shape[1] + 3) * wide.eps / 2
        allowed = kind.eps / 2 * exact.abs() + kind.smallest_normal * kind.eps / 2 + (1 + kind.eps) * error
        if not ((got.double() - exact).abs() <= allowed).all():
            return False
    return True


def compare_outputs(mode: str, base: str, folder: str, adapter: Adapter, batch, dtype: torch.dtype, bits: int) -> str:
    """Compare the logits of the merged model on QUESTIONS with those of base and adapter, unmerged, in float32.

    Merging rounds each adapted weight once. How much that changes the logits depends on the model, so it is measured: a
    third pass changes each adapted weight of the unmerged model at random by up to half the spacing of the type. The
    merged model may differ from the unmerged one three times as much (root mean square over all tokens and logits), and
    by 1e-4 of the root mean square of the logits more, because sums in float32 depend on their order.

    Args:
        batch: see logits.
        bits: to which the base was quantised before it was merged; 0: it was not.

    Returns:
        A line with the measured differences.

    Raises:
        CheckpointError: they differ by more.
    """
    unmerged = logits(mode, base, batch, adapter, bits=bits)
    rounded = rms(logits(mode, base, batch, adapter, rounding=dtype, bits=bits) - unmerged)
    found = logits(mode, folder, batch)
    line = "logits of merged and unmerged model on " + differences(
        found, unmerged, f" (rounding at random: {rounded:.2g})"
    )
    if not rms(found - unmerged) <= 3 * rounded + 1e-4 * rms(unmerged):
        raise CheckpointError(f"the merged model is not the unmerged one, nothing was kept; {line}")
    return line


def compare_with_training(mode: str, base: str, folder: str, adapter: Adapter, batch, bits: int) -> str:
    """How far a merged model on an unquantised base is from what was trained, which had a quantised base: a line."""
    trained = logits(mode, base, batch, adapter, bits=bits)
    found = logits(mode, folder, batch)
    return f"merged model, and adapter on the base in {bits} bits as it was trained: on " + differences(found, trained)


def check_quantization(folder: str, into_quantized: bool) -> tuple[int, int]:
    """To how many bits the base was quantised in training, and to how many for the merged model; 0: it was not, is not.

    Raises:
        UserError: it is to be quantised and was not in training, or the package for it is missing.
    """
    trained = trained_bits(folder)
    if not into_quantized:
        return trained, 0
    if not trained:
        raise UserError(f"--into_quantized: {folder} was not trained on a quantised base; leave the flag out")
    if problems := needs_package("--into_quantized"):
        raise UserError(problems[0])
    return trained, trained


def describe_target(trained: int, bits: int) -> list[str]:
    """A line if the base was quantised in training; the arguments are what `check_quantization` returns."""
    if not trained:
        return []
    if bits:
        return [f"merging into the base quantised to {bits} bits and back, as in training"]
    return [f"merging into the base as it is; in training it was quantised to {trained} bits (see --into_quantized)"]


def merge(mode: str, base: str, folder: str, output: str, verify: bool = True, into_quantized: bool = False) -> None:
    """Write base + adapter to `output`. Everything is checked before anything is written.

    Args:
        base: the base model's folder.
        folder: the adapter's folder.
        verify: read the result again and compare it; a wrong result is removed.
        into_quantized: merge into the weights that a quantised base had in training.

    Raises:
        UserError, FolderError: output exists and is not an empty folder, the disk has too little room, or it cannot
            be written.
        CheckpointError: the adapter is broken, empty or for another base, the base is broken, or the result is wrong.
    """
    check_new_folder(output)
    check_family(base, mode)
    adapter = read_adapter(folder)
    trained, bits = check_quantization(folder, into_quantized)
    model, layout = skeleton(mode, base), weight_layout(base)
    check_fit(model, base, adapter)
    weights = BaseWeights(base, bits, quantized_weights(model))  # before peft renames layers
    config = read_config(folder)
    if not has_patterns(config):  # regular expressions from a file are not used
        add_adapter(model, folder, adapter.file)
    types = {name: dtype for weights in layout.values() for name, (dtype, _) in weights.items()}
    check_types(base, adapter, types)
    said = [check_base(folder, mode, base), *unread_keys(folder, config), *describe_target(trained, bits)]
    print(*map(printable, said), sep="\n")
    tokenizer = load_tokenizer(mode, base)
    dtype = matrix_dtype(layout)
    check_space(output, total_bytes(layout), "the merged model")

    # an adapted output layer that was tied to the embedding no longer equals it
    changes = {"tie_word_embeddings": False} if adapter.pairs.keys() & tied_weights(model) else {}
    with claimed_folder(output) as partial:
        files = write_merged(partial, base, adapter, weights)
        write_side_files(partial, base, mode, dtype, tokenizer.stop_token_ids, **changes)
        if verify:
            changed = compare_weights(files, adapter, weights)
            print(
                f"verified: the {len(types)} weights on disk are base + adapter, rounded once to {dtype}; "
                f"{changed:.2%} of the values with an adapter changed"
            )
            if changed < 0.01:
                print("WARNING: the other changes are lost in rounding; predict.py with the adapter itself loses none")
            prompts = [tokenizer.encode_prompt(text) for text in QUESTIONS]
            batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
            print("verified: " + compare_outputs(mode, base, partial, adapter, batch, dtype, bits))
            if trained and not bits and not missing_package():
                print(compare_with_training(mode, base, partial, adapter, batch, trained))
        else:
            print("not verified (--no_verify): merged and unmerged model were not compared")


def main(argv=None) -> None:
    with exit_on_user_errors():
        args = parse_args(argv)
        silence_libraries(verbose=False)
        return_freed_memory()
        find_models(args, "ori_model_dir")
        output = args.output_dir or args.model_dir.rstrip("/") + "-merged"
        merge(args.mode, args.ori_model_dir, args.model_dir, output, not args.no_verify, args.into_quantized)
        print(f"wrote {output}: {args.ori_model_dir} with {args.model_dir} merged in; both are unchanged")


if __name__ == "__main__":
    main()
