"""Convert ChatGLM2 and ChatGLM3 to transformers' GlmForCausalLM, which needs no remote code, or back.

    python -m glm_models.convert --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --output_dir glm3-hf

The folder's config.json tells the direction. A model is read and written one weight at a time, and verified before the
result gets its name: weights bit by bit, ids, and logits. A LoRA adapter is converted too; then --ori_model_dir is the
base on which it will be used.
"""

import argparse

from glm_models import MODE
from tuning import exits
from tuning.arguments.parser import SWITCH, Folder, NewPath, Parser, answer_early


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    parser = Parser(__doc__, contradictions)
    group = parser.group("models")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM2-6B or ChatGLM3-6B")
    group.add_argument(
        "--model_path", type=Folder(), required=True, help="folder to convert: a model of either form, or an adapter"
    )
    group.add_argument("--output_dir", type=NewPath(), required=True, help="folder to write; must be empty or new")
    group.add_argument(
        "--ori_model_dir", type=Folder(), default_text="what the first conversion kept",
        help="back: the official folder for config, tokenizer and code; of an adapter: its base in the other form",
    )  # fmt: skip
    group.add_argument("--tokenizer_only", **SWITCH, help="write only tokenizer and chat template, for vLLM")
    group.add_argument("--no_verify", **SWITCH, help="do not compare the result with what it was made of")
    return parser


def contradictions(args: argparse.Namespace) -> list[str]:
    if args.mode == "glm":
        return [
            "--mode glm: transformers has no class for ChatGLM-6B; predict.py, its official code and chatglm.cpp serve "
            "its folders as they are (P-Tuning: not chatglm.cpp)"
        ]
    return []


if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)

import os

from glm_models.checkpoint import CheckpointError, printable, total_bytes
from glm_models.convert.config import is_native
from glm_models.convert.model import (
    Official,
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
from glm_models.streamed import skeleton
from tuning.errors import UserError
from tuning.exits import exit_on_user_errors
from tuning.folders import check_new_folder, check_space, claimed_folder
from utils import silence_libraries


def convert_model(args) -> str:
    """Convert a whole model. Returns what was written."""
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


def convert_tokenizer(args) -> str:
    """Write the tokenizer's files alone. Returns what was written."""
    official = Official.read(args.mode, args.model_path)
    with claimed_folder(args.output_dir) as partial:
        write_tokenizer(partial, official.tokenizer, official.config.seq_length)
        compare_tokenizers(partial, official.tokenizer)
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
    if not has_config(args.model_path):
        raise CheckpointError(f"{args.model_path} has no config.json: not a model's folder")
    return convert_model(args)


def main(argv=None) -> None:
    with exit_on_user_errors():
        args = parse_args(argv)
        silence_libraries(verbose=False)
        print(f"wrote {os.path.normpath(args.output_dir)}: {convert(args)}; {args.model_path} is unchanged")


if __name__ == "__main__":
    main()
