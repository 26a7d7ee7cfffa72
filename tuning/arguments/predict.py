"""The flags of predict.py. Imports no torch, so that --help and wrong flags are answered in under a second."""

import argparse
import os

from glm_models import MODE
from tuning.arguments.data import add_columns
from tuning.arguments.models import Model, ModelOrWeights
from tuning.arguments.parser import SWITCH, File, Integer, NewPath, Number, Parser, Text
from tuning.arguments.quantization import needs_package
from tuning.metrics import HEADLINE, missing

DESCRIPTION = """Answer with a trained model: a whole file, one sample, or a chat in the terminal.

    python predict.py --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --predict_path data/spo_1.json
    deepspeed predict.py --mode glm3 --model_path ... --predict_path ...     (on all GPUs)
    python predict.py --mode glm3 --model_path ... --instruction "..." --input "..."
    python predict.py --mode glm3 --model_path ...            (chat; an empty line ends it)"""

HINTS = {
    "ptuning_checkpoint": "the folder of the prefix goes to --model_path, that of its base to --ori_model_dir",
    "checkpoint": "the folder of the model goes to --model_path",
    "load_in_4bit": "--quantization_bit 4 quantises the model",
    "load_in_8bit": "--quantization_bit 8 quantises the model",
    "top_k": "it is always 50, the default of transformers; --top_p and --temperature are what can be set",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of predict.py.

    Raises:
        UserError: see Parser.parse_args.
    """
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    parser = Parser(DESCRIPTION, contradictions, HINTS)
    group = parser.group("model")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B")
    group.add_argument(
        "--model_path", type=ModelOrWeights(), required=True,
        help="folder of a model, a P-Tuning result or a LoRA adapter; a model's name on a hub; or the weights file of "
        "a P-Tuning prefix",
    )  # fmt: skip
    group.add_argument(
        "--ori_model_dir",
        type=Model(),
        default_text="what the adapter's config names",
        help="base model of an adapter, or of a P-Tuning prefix alone",
    )
    group.add_argument(
        "--device", type=Text(), default_text="the accelerator, else cpu", help="cuda, cuda:1, cpu or a number"
    )
    group.add_argument(
        "--quantization_bit", type=int, choices=("0", "4", "8"), default_text="as in its training, else 0",
        help="quantise the linear layers: 4 (nf4), 8 (int8), 0: do not",
    )  # fmt: skip
    group.add_argument("--verbose", **SWITCH, help="show the messages of the libraries")
    group.add_argument("--local_rank", type=Integer(-1), default=-1, help="set by the launcher")

    group = parser.group("one sample (without it and without a file: chat in the terminal)")
    group.add_argument("--instruction", default="", default_text="empty", help="its instruction")
    group.add_argument("--input", default="", default_text="empty", help="its input")

    group = parser.group("the chat, ChatGLM3 only")
    group.add_argument(
        "--system",
        type=Text(),
        default_text="none",
        help="system message; with --tools its default is the official one",
    )
    group.add_argument(
        "--tools", type=File(), help="JSON file: a list of the tools that the model may call, as in training"
    )

    group = parser.group("a whole file")
    group.add_argument(
        "--predict_path",
        type=File(),
        help="rows of instruction, input, and output: a reference, a list of them, or none",
    )
    group = parser.group("settings for a file", needs="--predict_path")
    group.add_argument(
        "--output_path", type=NewPath(), default_text="predictions-NAME.jsonl in the model folder",
        help="file for the answers",
    )  # fmt: skip
    add_columns(group, answers_needed=False)
    group.add_argument("--overwrite", **SWITCH, help="remove the answers in output_path, and start again")
    group.add_argument("--batch_size", type=Integer(), default=8, help="rows that a process answers at a time")
    group.add_argument(
        "--metrics", choices=("auto", *HEADLINE), default="auto", help="how to score; auto: depends on the references"
    )

    group = parser.group("generation")
    group.add_argument(
        "--max_length", type=Integer(), default=2048, help="maximum tokens of prompt and answer together"
    )
    group.add_argument("--do_sample", **SWITCH, help="sample instead of greedy decoding")
    group = parser.group("sampling", needs="--do_sample")
    group.add_argument(
        "--top_p", type=Number(above=0, most=1), default=0.8, help="sample from this share of the probability"
    )
    group.add_argument(
        "--temperature", type=Number(above=0), default=0.8, help="above 1: more random, below 1: less random"
    )
    group.add_argument("--seed", type=Integer(0, 2**32 - 1), default=1234, help="seed of the sampling")
    group = parser.group("generation, not in the chat", needs="--predict_path or --instruction or --input")
    group.add_argument(
        "--max_src_len", type=Integer(), default_text="max_length - 16",
        help="maximum tokens per prompt; best as in training",
    )  # fmt: skip
    group.add_argument(
        "--max_new_tokens", type=Integer(), default_text="no limit of its own", help="maximum tokens of an answer"
    )
    group.add_argument("--num_beams", type=Integer(), default=1, help="number of beams of beam search")
    group.add_argument("--repetition_penalty", type=Number(above=0), default=1.0, help="above 1: discourage repetition")
    return parser


def contradictions(args: argparse.Namespace) -> list[str]:
    """Problems of flags that do not go together; see Parser."""
    wrong = needs_package(f"--quantization_bit {args.quantization_bit}") if args.quantization_bit else []
    if (count := processes()) > 1 and not args.predict_path:
        wrong.append(f"{count} processes answer a file (--predict_path); for a chat or one sample: python predict.py")
    if count > 1 and args.device not in (None, "cpu"):
        wrong.append(f"--device {args.device} names one device; each of the {count} processes has its own")
    if args.predict_path and (args.instruction or args.input):
        wrong.append("--predict_path and --instruction or --input exclude each other")
    if (
        args.predict_path
        and args.output_path
        and os.path.exists(args.output_path)
        and os.path.samefile(args.output_path, args.predict_path)
    ):
        wrong.append("--output_path and --predict_path are one file")
    if longest_prompt(args) >= args.max_length - 3 or longest_prompt(args) < 1:
        prompts = longest_prompt(args)
        wrong.append(f"--max_src_len {prompts} must be above 0 and well below --max_length {args.max_length}")
    if args.system or args.tools:
        if args.mode != "glm3":
            wrong.append(f"--system and --tools: {args.mode} has neither system messages nor tools; only glm3 has")
        if args.predict_path or args.instruction or args.input:
            wrong.append("--system and --tools are for the chat; rows of a file have their own")
    if missing(args.metrics):
        wrong.append(f"--metrics {args.metrics} needs more packages: {missing(args.metrics)}")
    return wrong


def longest_prompt(args: argparse.Namespace) -> int:
    """Maximum tokens per prompt."""
    return args.max_length - 16 if args.max_src_len is None else args.max_src_len


def processes() -> int:
    """How many processes a launcher has started."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 1
