"""The flags of compare.py, and those that it passes to train.py and predict.py. Imports no torch."""

import argparse
import json
import os
import shlex
from collections.abc import Callable

from glm_models import MODE
from tuning.arguments import predict as predict_arguments
from tuning.arguments import train as train_arguments
from tuning.arguments.models import Model
from tuning.arguments.parser import SWITCH, File, Integer, NewPath, Number, Parser
from tuning.errors import UserError

DESCRIPTION = """Train every method from the same base with several seeds, score all of them, and write a report.

    python -m tuning.evaluate.compare --model glm3=ChatGLM3-6B/ --train_path data/spo_0.json \\
        --test_path data/spo_1.json --output_dir output-compare

The same command continues after a stop. A run that fails is named in the report and does not stop the others."""

SMALL = 1024  # models of less width are small: other learning rates, shorter rows, larger batches

# Method -> flags of train.py, and learning rates for a model of the official size and for a small one.
# Large: freeze as the original project; P-Tuning with projection as the original, where it did best of all; without
# projection and LoRA as their authors (P-Tuning v2 as the official ptuning/train.sh, LoRA as in Hu et al. 2021); all as
# is usual for models of this size. None of these was measured here. Small: chosen with --sweep, see docs/evaluation.md.
METHODS = {
    "freeze": (["--train_type", "freeze"], 1e-4, 2e-3),
    "ptuning": (["--train_type", "ptuning", "--prefix_projection", "True"], 1e-4, 3e-3),
    "ptuning-plain": (["--train_type", "ptuning", "--prefix_projection", "False"], 2e-2, 3e-2),
    "lora": (["--train_type", "lora", "--lora_dim", "16", "--lora_alpha", "64"], 2e-4, 2e-3),
    "all": (["--train_type", "all"], 2e-5, 3e-4),
}
LORA_LAYERS = "query_key_value,dense_h_to_4h,dense_4h_to_h,dense"
LARGE_FLAGS = "--max_len 1560 --max_src_len 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 "
LARGE_FLAGS += "--num_train_epochs 2 --gradient_checkpointing --show_loss_step 10 "
LARGE_FLAGS += "--weight_decay 0.1 --save_state_steps 200"
SMALL_FLAGS = "--max_len 384 --max_src_len 256 --per_device_train_batch_size 8 --num_train_epochs 2 "
SMALL_FLAGS += "--show_loss_step 10 --weight_decay 0.01 --save_total_limit 1"
# of each train_type, see METHODS
LARGE_DROPOUT = {"lora": "--lora_dropout 0.1"}
SMALL_DROPOUT = {"lora": "--lora_dropout 0", "ptuning": "--prefix_dropout 0"}

LARGE_EVAL, SMALL_EVAL = "--eval_steps 100 --eval_generate_rows 50", "--eval_steps 50 --eval_batch_size 50"

# Flags of train.py and predict.py that the comparison sets by itself.
OURS = {"mode", "model_name_or_path", "train_path", "output_dir", "train_type", "seed", "learning_rate", "eval_path"}
OURS |= {"resume_from_checkpoint", "plan", "check_data", "model_path", "predict_path", "output_path"}


class ModelFolder:
    """MODE=FOLDER; the value is the pair."""

    metavar = "MODE=FOLDER"

    def __call__(self, text: str) -> tuple[str, str]:
        mode, _, folder = text.partition("=")
        if mode not in MODE or not folder:
            raise ValueError(f"MODE=FOLDER is needed, MODE one of {', '.join(MODE)}")
        if os.path.exists(folder) and not os.path.isfile(os.path.join(folder, "config.json")):
            raise ValueError("no model folder there (config.json is missing)")
        return mode, Model()(folder)


class Rate:
    """METHOD=RATE; the value is the pair."""

    metavar = "METHOD=RATE"

    def __call__(self, text: str) -> tuple[str, float]:
        method, _, rate = text.partition("=")
        if method not in METHODS:
            raise ValueError(f"the methods are {', '.join(METHODS)}")
        return method, Number(above=0)(rate)


class Words:
    """Words in shell syntax, in one string; the value is that string."""

    metavar = "FLAGS"

    def __call__(self, text: str) -> str:
        shlex.split(text)
        return text


class Suite(File):
    """A file, or none."""

    metavar = "FILE|none"

    def __call__(self, text: str) -> str:
        return text if text == "none" else super().__call__(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    parser = Parser(DESCRIPTION, contradictions)
    group = parser.group("what is compared")
    group.add_argument("--model", type=ModelFolder(), nargs="+", required=True, help="base models, such as glm3=FOLDER")
    group.add_argument("--train_path", type=File(), required=True, help="rows to train on")
    group.add_argument(
        "--test_path",
        type=File(),
        required=True,
        help="rows to score, none of them in train_path; output may be a list",
    )
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), default_text="all five", help="methods"
    )
    group.add_argument(
        "--seeds", type=Integer(0, 2**32 - 1), nargs="+", default=[1, 2, 3], default_text="1 2 3",
        help="one training for each seed",
    )  # fmt: skip
    group.add_argument("--output_dir", type=NewPath(), default="output-compare", help="folder for runs and report")
    group.add_argument(
        "--suite", type=Suite(), default_text="data/forgetting.json", help="rows to measure forgetting on"
    )

    group = parser.group("training")
    group.add_argument(
        "--learning_rates", type=Rate(), nargs="+", default=[], default_text="the method's", help="other learning rates"
    )
    group.add_argument(
        "--train_flags", type=Words(), default="", default_text="empty",
        help="more flags for train.py, in one string; flags of one method go to that method alone",
    )  # fmt: skip
    group.add_argument(
        "--predict_flags",
        type=Words(),
        default="",
        default_text="empty",
        help="more flags for predict.py, in one string",
    )
    group.add_argument("--validation_rows", type=Integer(), default=100, help="rows of train_path that are held out")
    group.add_argument("--keep_models", **SWITCH, help="keep the weights of every run")
    group.add_argument("--sweep", **SWITCH, help="first try a third and three times each rate on the rows held out")
    group.add_argument(
        "--sweep_rows", type=Integer(), default=500, needs="--sweep", help="rows to train on in the sweep"
    )

    group = parser.group("devices")
    group.add_argument("--num_gpus", type=Integer(), default=1, help="processes per training, one on each GPU")
    group.add_argument("--jobs", type=Integer(), default=1, help="runs at the same time, on a machine without a GPU")
    group.add_argument(
        "--master_port", type=Integer(1, 65535), default=29530, needs="--num_gpus", help="first port; one for each job"
    )
    args = parser.parse_args(argv)
    args.model, args.learning_rates = dict(args.model), dict(args.learning_rates)
    args.methods, args.seeds = list(dict.fromkeys(args.methods)), list(dict.fromkeys(args.seeds))
    return args


def contradictions(args: argparse.Namespace) -> list[str]:
    """Problems of flags that do not go together; see Parser."""
    wrong = []
    if args.model and len(dict(args.model)) < len(args.model):
        wrong.append("--model: each mode once")
    for method in dict(args.learning_rates).keys() - set(args.methods):
        wrong.append(f"--learning_rates {method}: it is not among --methods")
    for flag, text in (("--train_flags", args.train_flags), ("--predict_flags", args.predict_flags)):
        ours = sorted({word for word in shlex.split(text) if word.split("=")[0].removeprefix("--") in OURS})
        wrong += [f"{flag} {word}: the comparison sets it by itself" for word in ours]
    for start in ("--adapter_path", "--ptuning_checkpoint"):
        if any(word.split("=")[0] == start for word in shlex.split(args.train_flags)):
            wrong.append(f"--train_flags {start}: all methods start from the base")
    return wrong or (handed_on(args) if args.model and args.train_path and args.test_path else [])


def handed_on(args: argparse.Namespace) -> list[str]:
    """Errors in --train_flags and --predict_flags, found now and not after hours."""
    wrong = {}
    for mode, folder in args.model:
        for method in args.methods:
            command = ["--mode", mode, "--model_name_or_path", folder, "--train_path", args.train_path]
            command += ["--eval_path", args.test_path, *training_flags(args, folder, method, True)]
            wrong |= problems("--train_flags", train_arguments.parse_args, command)
        command = ["--mode", mode, "--model_path", folder, "--predict_path", args.test_path]
        command += [*predict_lengths(folder), *shlex.split(args.predict_flags)]
        wrong |= problems("--predict_flags", predict_arguments.parse_args, command)
    words, trained = shlex.split(args.train_flags), {METHODS[method][0][1] for method in args.methods}
    used = {word for method in trained for word in train_arguments.applicable(words, method, True)}
    unused = sorted({word for word in words if word.startswith("--")} - used)
    return [*wrong, *(f"--train_flags {word}: none of --methods has it" for word in unused)]


def problems(flag: str, parse: Callable, command: list[str]) -> dict[str, None]:
    """The problems that `parse` finds in a command, as keys."""
    try:
        parse(command)
    except UserError as error:
        return dict.fromkeys(f"{flag}: {line.strip()}" for line in str(error).split("\n"))
    return {}


def training_flags(args, folder: str, method: str, evaluates: bool) -> list[str]:
    """The flags of a training on the model in a folder, without files, learning rate and seed."""
    flags, small, layers = METHODS[method][0], is_small(folder), read_settings(folder).get("num_layers", 28)
    train_type = flags[1]
    own = train_arguments.applicable(shlex.split(args.train_flags), train_type, evaluates)
    given = {word.partition("=")[0] for word in own}
    if train_type == "freeze" and "--train_last_layers" not in given:  # the original trains 4 of 28 layers
        top = range(layers - 1, layers - 1 - max(1, round(layers / 7)), -1)
        flags = [*flags, "--freeze_module_name", ",".join(f"layers.{i}." for i in top)]
    elif train_type == "lora":
        flags = [*flags, "--lora_module_name", LORA_LAYERS]
    more = SMALL_FLAGS if small else LARGE_FLAGS
    more += " " + (SMALL_DROPOUT if small else LARGE_DROPOUT).get(train_type, "")
    if evaluates:
        more += " --eval_generate auto --eval_at_start " + (SMALL_EVAL if small else LARGE_EVAL)
    if "--max_steps" in given:
        more = more.replace("--num_train_epochs 2 ", "")
    return [*flags, *shlex.split(more), *own]


def predict_lengths(folder: str) -> list[str]:
    return ["--max_length", "384", "--batch_size", "50"] if is_small(folder) else ["--max_src_len", "1024"]


def is_small(folder: str) -> bool:
    """Whether the model in a folder is smaller than the official ones."""
    return read_settings(folder).get("hidden_size", SMALL) < SMALL


def read_settings(folder: str) -> dict:
    """The numbers in the config.json of a model folder; the training reports other problems of the file."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return {key: value for key, value in json.load(file).items() if isinstance(value, int)}
    except (OSError, ValueError, AttributeError):
        return {}
