"""Convert ChatGLM2 and ChatGLM3 to transformers' GlmForCausalLM, which needs no remote code, or back.

    python -m glm_models.convert --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --output_dir glm3-hf

The folder's config.json tells the direction. A model is read and written one weight at a time, and verified before the
result gets its name: weights bit by bit, ids, and logits. A LoRA adapter is converted too; then --ori_model_dir is the
base on which it will be used.
"""

import argparse

from glm_models import MODE
from glm_models.families import WHAT_SERVES_GLM, is_native
from tuning import exits
from tuning.arguments.models import Model
from tuning.arguments.parser import SWITCH, Folder, NewPath, Parser, answer_early


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    parser = Parser(__doc__, contradictions)
    group = parser.group("models")
    group.add_argument("--mode", choices=MODE, help="model family: ChatGLM2-6B or ChatGLM3-6B")
    group.add_argument(
        "--model_path",
        type=Model(),
        help="what to convert: a model of either form, as folder or name on a hub, or the folder of an adapter",
    )
    group.add_argument("--output_dir", type=NewPath(), help="folder to write; must be empty or new")
    group.add_argument(
        "--ori_model_dir", type=Model(), default_text="what the first conversion kept",
        help="back: the official folder for config, tokenizer and code; of an adapter: its base in the other form",
    )  # fmt: skip
    group.add_argument("--tokenizer_only", **SWITCH, help="write only tokenizer and chat template, for vLLM")
    group.add_argument(
        "--check", type=Folder(), help="only say which programs serve this folder, and what it lacks for others"
    )
    group.add_argument("--no_verify", **SWITCH, help="do not compare the result with what it was made of")
    return parser


def contradictions(args: argparse.Namespace) -> list[str]:
    if args.check:
        others = [f"--{name}" for name, value in vars(args).items() if value and name not in ("check", "mode")]
        return [f"--check does nothing else: leave {', '.join(others)} out"] if others else []
    lost = [f"--{name} is missing" for name in ("mode", "model_path", "output_dir") if getattr(args, name) is None]
    if lost:
        return lost
    if args.mode == "glm":
        return [f"--mode glm: transformers has no class for ChatGLM-6B; {WHAT_SERVES_GLM}"]
    return []


if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)

import os

from glm_models.checkpoint import CheckpointError, printable, total_bytes, weight_shapes
from glm_models.convert.adapter import (
    Update,
    check_fit,
    converted_config,
    is_native_adapter,
    native_update,
    official_update,
    same_update,
    write_plain_adapter,
)
from glm_models.convert.clients import check
from glm_models.convert.model import (
    Official,
    base_files,
    compare_tokenizers,
    has_config,
    official_files,
    open_native,
    read_config,
    refuse_prefix,
    verify_native,
    verify_official,
    write_native,
    write_official,
)
from glm_models.convert.tokenizer import write_tokenizer
from glm_models.convert.weights import NativeView
from glm_models.prefix import describe_prefix, find_prefix
from glm_models.streamed import return_freed_memory, skeleton
from tuning.errors import UserError
from tuning.exits import exit_on_user_errors
from tuning.folders import check_new_folder, check_space, claimed_folder
from tuning.hub import TOKENIZER, WEIGHTS, find_models
from tuning.lora.adapter import CONFIG, read_adapter, trained_bits
from tuning.lora.adapter import read_config as read_adapter_config
from utils import silence_libraries


def convert_model(args) -> str:
    """Convert a whole model. Returns what was written."""
    if find_prefix(args.model_path):
        raise CheckpointError(f"{describe_prefix(args.model_path)}; GlmForCausalLM has no place for a prefix")
    native = is_native(read_config(args.model_path))
    if not native and args.ori_model_dir:
        raise UserError("--ori_model_dir does nothing for an official folder, which has all files")
    if native:
        official = official_files(args.mode, args.model_path, args.ori_model_dir)
        view = open_native(args.model_path, official)
    else:
        official = Official.read(args.mode, args.model_path)
        refuse_prefix(official)
        skeleton(args.mode, args.model_path)
        view = NativeView(args.model_path, official.heads)
    check_space(args.output_dir, total_bytes(view.layout), "the converted model")
    with claimed_folder(args.output_dir) as partial:
        if native:
            write_official(partial, official, args.model_path, view)
        else:
            write_native(partial, official, view)
        if args.no_verify:
            print("not verified (--no_verify): the result was not compared with what it was made of")
        else:
            lines = verify_official(partial, official, args.model_path) if native else verify_native(partial, official)
            print(*map(printable, lines), sep="\n")
    return "an official folder" if native else "a GlmForCausalLM, which needs no remote code"


def convert_adapter(args) -> str:
    """Convert a LoRA adapter for the base in --ori_model_dir. Returns what was written."""
    if not args.ori_model_dir:
        raise UserError("--ori_model_dir is missing: the base, already in the other form, for the converted adapter")
    if bits := trained_bits(args.model_path):
        raise CheckpointError(
            f"{args.model_path} was trained on a base in {bits} bits, which transformers' class would not have; merge "
            "it (merge_lora.py, also --into_quantized) and convert the result, or answer with predict.py"
        )
    adapter, config = read_adapter(args.model_path, "can be converted"), read_adapter_config(args.model_path)
    if adapter.whole:
        raise CheckpointError(
            f"{args.model_path} has modules that were trained whole (modules_to_save); merge it with merge_lora.py and "
            "convert the result"
        )
    source = Update(adapter.pairs, adapter.magnitudes)
    native = is_native(read_config(args.ori_model_dir))
    if is_native_adapter(source) == native:
        raise UserError(f"{args.model_path} is an adapter for models of the form of {args.ori_model_dir} already")
    official = base_files(args.mode, args.ori_model_dir, native)
    heads = official.heads
    made = native_update(source, heads) if native else official_update(source, heads)
    shapes = weight_shapes(args.ori_model_dir)
    check_fit(made, shapes, args.ori_model_dir)
    config = converted_config(config, source, made, shapes) | {
        "base_model_name_or_path": os.path.abspath(args.ori_model_dir)
    }
    print(printable(f"only names and shapes show whether {args.ori_model_dir} is the base of {args.model_path}"))
    with claimed_folder(args.output_dir) as partial:
        write_plain_adapter(partial, config, made)
        again = read_adapter(partial)
        found = Update(again.pairs, again.magnitudes)
        if not same_update(*((source, found) if native else (found, source)), heads):
            raise CheckpointError(f"the converted adapter is not {args.model_path}; the disk or the memory is at fault")
    rank = f"rank {source.rank}"
    rank += "" if made.rank == source.rank else f" became {made.rank}: query_key_value has one A, theirs were several"
    return f"an adapter for {args.ori_model_dir} ({rank}), which adds the same"


def convert_tokenizer(args) -> str:
    """Write the tokenizer's files alone. Returns what was written."""
    official = Official.read(args.mode, args.model_path)
    with claimed_folder(args.output_dir) as partial:
        write_tokenizer(partial, official.tokenizer, official.config.seq_length)
        compare_tokenizers(partial, official.tokenizer)
    if official.config.rope_ratio != 1 and not official.config.rope_ratio_scales_base:
        print("warning: vLLM's class for official weights reads rope_ratio as ChatGLM3 does; convert the whole model")
    return "tokenizer and chat template, which need no remote code"


def convert(args) -> str:
    """Convert what the flags name. Returns what was written.

    Raises:
        UserError, FolderError: the output exists, the disk has too little room, or flags do not fit the folder.
        CheckpointError: the folder cannot be converted, is broken, or the result is wrong.
    """
    check_new_folder(args.output_dir)
    if args.tokenizer_only:
        return convert_tokenizer(args)
    if not has_config(args.model_path) and os.path.isfile(os.path.join(args.model_path, CONFIG)):
        return convert_adapter(args)
    if not has_config(args.model_path):
        raise CheckpointError(f"{args.model_path} has no config.json: not a model's folder")
    return convert_model(args)


def main(argv=None) -> None:
    with exit_on_user_errors():
        args = parse_args(argv)
        silence_libraries(verbose=False)
        return_freed_memory()
        if args.check:
            print(*map(printable, check(args.check, args.mode)), sep="\n")
            return
        find_models(args, "model_path", "ori_model_dir", need=TOKENIZER if args.tokenizer_only else WEIGHTS)
        print(f"wrote {os.path.normpath(args.output_dir)}: {convert(args)}; {args.model_path} is unchanged")


if __name__ == "__main__":
    main()
