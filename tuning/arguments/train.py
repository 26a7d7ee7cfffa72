"""The flags of train.py. Imports no torch, so that --help and wrong flags are answered in under a second.

Each flag says with `may_change` whether it may differ when a run is resumed; see parser.Group.add_argument.
"""

import argparse

from glm_models import MODE
from tuning.arguments.data import DataPath, add_columns
from tuning.arguments.lora import ALL_LINEAR, LORA, add_variants, changes_base, lora_contradictions
from tuning.arguments.models import FolderOrWeights, Model, format_contradictions
from tuning.arguments.parser import (
    LARGEST,
    SWITCH,
    File,
    Folder,
    GiB,
    Integer,
    Names,
    NewPath,
    Number,
    Parser,
    Text,
    read_number,
)
from tuning.arguments.quantization import training_problems
from tuning.metrics import FROM_LOSS, HEADLINE, missing

TRAIN_TYPES = ("freeze", "ptuning", "lora", "all")  # the keys of methods.TRAIN_TYPE, which needs torch

# --lr_scheduler_type -> DeepSpeed's name
SCHEDULES = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant": "WarmupLR"}

FREEZE = "layers.27.,layers.26.,layers.25.,layers.24."  # --freeze_module_name without --train_last_layers

SHARE = Number(above=0, below=1)
DROPOUT = Number(least=0, below=1)
EVALUATE = "--eval_path or --eval_ratio"

# Flags of other programs that have no counterpart here.
IN_DS_FILE = "precision is set in the ds file, by bf16 and fp16"
HINTS = {
    "bf16": IN_DS_FILE,
    "fp16": IN_DS_FILE,
    "do_train": "train.py always trains; leave it out",
    "eval_strategy": "--eval_path or --eval_ratio makes it validate, --eval_steps says how often",
    "evaluation_strategy": "--eval_path or --eval_ratio makes it validate, --eval_steps says how often",
    "load_in_4bit": "--quantization_bit 4 quantises the base model",
    "load_in_8bit": "--quantization_bit 8 quantises the base model",
    "max_grad_norm": "gradient clipping is set in the ds file: gradient_clipping",
    "max_samples": "a short trial needs --max_steps, or a short file: head -n 100 FILE",
    "optim": "the optimizer is set in the ds file",
    "report_to": "figures for TensorBoard and log.jsonl are always written to --output_dir",
    "torch_dtype": IN_DS_FILE,
    "warmup_steps": "--warmup_ratio gives the share of all steps",
    "zero_stage": "the ZeRO stage is set in the ds file: see --ds_file",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a training.

    Raises:
        UserError: see Parser.parse_args.
    """
    args = make_parser().parse_args(argv)
    if args.num_train_epochs is None and args.max_steps is None:
        args.num_train_epochs = 1
    if args.freeze_module_name is None and args.train_last_layers is None:
        args.freeze_module_name = FREEZE
    if not args.adapter_path:
        for name, value in LORA.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return args


class Epochs:
    """A number of passes over the data, above 0; an int if it is whole."""

    metavar = "X"

    def __call__(self, text: str) -> int | float:
        number = read_number(text)
        if number <= 0:
            raise ValueError("must be above 0; predict.py scores a model without training it")
        if number > LARGEST:
            raise ValueError(f"must be at most {LARGEST}")
        return int(number) if number.is_integer() else number


def fixed_flags(args: argparse.Namespace) -> dict:
    """Flags, with their values, that must not change when a run is resumed."""
    return make_parser().fixed(args)


def applicable(words: list[str], train_type: str, evaluates: bool) -> list[str]:
    """The words of a command line, without flags that do nothing for this method or without validation."""
    flags, kept, keep = make_parser().flags, [], True
    for word in words:
        if word.startswith("--"):
            flag = flags.get(word.removeprefix("--").partition("=")[0])
            needs = flag.needs if flag else ""
            keep = not needs.startswith("--train_type ") or needs == f"--train_type {train_type}"
            keep &= evaluates or needs not in (EVALUATE, "--eval_generate")
        kept += [word] * keep
    return kept


def validates(args: argparse.Namespace) -> bool:
    """Whether there are rows to validate on."""
    return bool(args.eval_path) or args.eval_ratio is not None


def best_by_loss(args: argparse.Namespace) -> bool:
    """Whether the loss alone decides on the best model and on early stopping."""
    return args.best_metric in FROM_LOSS


def make_parser() -> Parser:
    parser = Parser(
        "Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B: freeze, P-Tuning v2, LoRA or all parameters.\n\n"
        "    deepspeed train.py --mode glm3 --train_type lora --model_name_or_path ChatGLM3-6B/ "
        "--train_path data/spo_0.json",
        contradictions,
        HINTS,
    )
    add_data(parser)
    add_methods(parser)
    add_optimisation(parser)
    add_devices(parser)
    add_results(parser)
    add_validation(parser)
    add_interruptions(parser)
    return parser


def add_data(parser: Parser) -> None:
    # files and folders have may_change=True: their content is compared instead
    group = parser.group("model and data")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B")
    group.add_argument(
        "--model_name_or_path",
        type=Model(),
        required=True,
        may_change=True,
        help="base model: its folder, or its name on a hub, such as THUDM/chatglm3-6b",
    )
    group.add_argument(
        "--train_path", type=DataPath(weights=True), nargs="+", required=True, may_change=True,
        metavar="PATH[:WEIGHT]", help="training data: files, or folders of them; with weight 2 each row comes twice",
    )  # fmt: skip
    add_columns(group, may_change=False)
    group.add_argument(
        "--train_on", choices=("all", "last"), default_text="all of a conversation; with a history, the output",
        help="answers to learn: all, those of a history too, or the last of each row",
    )  # fmt: skip
    group.add_argument("--max_len", type=Integer(), default=1024, help="maximum tokens per sample, prompt included")
    group.add_argument("--max_src_len", type=Integer(), default=512, help="maximum tokens per prompt")
    group.add_argument("--is_skip", **SWITCH, help="leave out samples that are too long instead of truncating them")
    group.add_argument("--allow_empty_output", **SWITCH, help="train on rows with an empty output too")
    group.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error", help="stop at the first broken row, or skip them"
    )
    group.add_argument("--packing", **SWITCH, help="pack several samples into one row of up to max_len tokens")
    group.add_argument("--group_by_length", **SWITCH, help="batch samples of similar length: less waiting between GPUs")
    group.add_argument(
        "--replay_path", type=File(), needs="--replay_ratio", may_change=True,
        help="general data mixed into each epoch, against forgetting",
    )  # fmt: skip
    group.add_argument(
        "--replay_ratio", type=SHARE, needs="--replay_path", help="share of general data in each epoch, such as 0.1"
    )
    group.add_argument(
        "--data_cache", type=NewPath(), default_text="~/.cache/chatglm-tuning", may_change=True,
        help="folder that keeps tokenized data; none: keep nothing",
    )  # fmt: skip
    group.add_argument(
        "--output_dir", type=NewPath(), default="./output", may_change=True, help="folder for checkpoints and logs"
    )
    group = parser.group("checking the data")
    group.add_argument("--check_data", **SWITCH, may_change=True, help="report what is wrong in the data; do not train")
    group.add_argument(
        "--dump_samples", type=NewPath(), metavar="FILE", may_change=True,
        help="write ids and labels of all training samples to FILE, as JSON lines; do not train",
    )  # fmt: skip
    group.add_argument(
        "--test_path", type=File(), needs="--check_data", may_change=True,
        help="also report the rows of this file whose prompts are in the training data",
    )  # fmt: skip


def add_methods(parser: Parser) -> None:
    group = parser.group("method")
    group.add_argument("--train_type", choices=TRAIN_TYPES, default="lora", help="fine-tuning method")

    group = parser.group("freeze", needs="--train_type freeze")
    group.add_argument(
        "--freeze_module_name", type=Names(), default_text=FREEZE,
        help="train the parameters with one of these in their name, freeze all others; comma-separated",
    )  # fmt: skip
    group.add_argument(
        "--train_last_layers", type=Integer(),
        help="train the last N transformer blocks, freeze all else; in place of --freeze_module_name",
    )  # fmt: skip

    group = parser.group("P-Tuning v2", needs="--train_type ptuning")
    group.add_argument("--pre_seq_len", type=Integer(), default=16, help="length of the prefix in virtual tokens")
    group.add_argument(
        "--prefix_projection", **{**SWITCH, "default": True}, help="compute the prefix with a small network"
    )
    group.add_argument("--prefix_dropout", type=DROPOUT, default=0.1, help="dropout on the prefix")
    group.add_argument(
        "--ptuning_checkpoint", type=FolderOrWeights(), may_change=True,
        help="start from this prefix, which was saved alone: a folder, or its weights file",
    )  # fmt: skip
    group.add_argument(
        "--save_prefix_only", **SWITCH, may_change=True,
        help="save results as the official scripts do: the prefix alone, without the model",
    )  # fmt: skip

    group = parser.group("LoRA", needs="--train_type lora")
    group.add_argument(
        "--adapter_path", type=Folder(), may_change=True,
        help="start from this adapter of an earlier training, with its rank, alpha and layers",
    )  # fmt: skip
    group.add_argument(
        "--lora_dim", type=Integer(), default_text=str(LORA["lora_dim"]), help="rank of the update matrices"
    )
    group.add_argument(
        "--lora_alpha", type=Number(above=0), default_text=str(LORA["lora_alpha"]),
        help="scaling: updates are multiplied by alpha / rank",
    )  # fmt: skip
    group.add_argument("--lora_dropout", type=DROPOUT, default=0.1, help="dropout on the input of the update matrices")
    group.add_argument(
        "--lora_module_name", type=Names(), default_text=LORA["lora_module_name"],
        help=f"linear layers to adapt; comma-separated; {ALL_LINEAR}: all but the output layer",
    )  # fmt: skip
    add_variants(parser)


def add_optimisation(parser: Parser) -> None:
    group = parser.group("optimization")
    group.add_argument(
        "--num_train_epochs", type=Epochs(), default_text="1", help="passes over the data, such as 2 or 0.5"
    )
    group.add_argument(
        "--max_steps", type=Integer(), help="end after this many optimizer steps, in place of --num_train_epochs"
    )
    group.add_argument(
        "--lr_scheduler_type", choices=SCHEDULES, default_text="the ds file's, else linear", may_change=True,
        help="learning rate after warm-up: falls to 0 in a line, falls as a cosine, or stays",
    )  # fmt: skip
    group.add_argument(
        "--per_device_train_batch_size", type=Integer(), default=1, help="micro-batch size on each device"
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=Integer(), default=1, help="micro-batches per optimizer step"
    )
    group.add_argument(
        "--learning_rate", type=Number(above=0), default=1e-4, help="peak learning rate, reached after warm-up"
    )
    group.add_argument(
        "--weight_decay", type=Number(least=0), default=0.1, help="weight decay; biases and norms have none"
    )
    group.add_argument(
        "--warmup_ratio", type=Number(least=0, below=1), default=0.1, help="share of the steps used for warm-up"
    )
    group.add_argument(
        "--neftune_noise_alpha", type=Number(above=0),
        help="NEFTune: add uniform noise of this strength to the embeddings in training, such as 5",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=Integer(0, 2**32 - 1), default=1234, help="seed of data order, new weights and dropout"
    )


def add_devices(parser: Parser) -> None:
    group = parser.group("memory and devices")
    group.add_argument(
        "--ds_file", type=File(), default="ds_zero2_no_offload.json", may_change=True, help="DeepSpeed config file"
    )
    group.add_argument(
        "--quantization_bit", type=int, choices=("4", "8"),
        help="quantise the frozen base model: 4 (nf4, QLoRA) or 8 (int8); with lora and ptuning",
    )  # fmt: skip
    group.add_argument(
        "--gradient_checkpointing", **SWITCH, may_change=True, help="keep one activation per layer, recompute the rest"
    )
    group.add_argument(
        "--tiled_mlp", **SWITCH, may_change=True, help="for long rows: compute the MLPs for some tokens at a time"
    )
    group.add_argument(
        "--offload_inputs", **SWITCH, needs="--gradient_checkpointing", may_change=True,
        help="for long rows: keep the activations of gradient checkpointing in main memory",
    )  # fmt: skip
    group.add_argument(
        "--keep_attention", **SWITCH, needs="--gradient_checkpointing", may_change=True,
        help="for long rows: keep what attention gives, too, and do not compute it again",
    )  # fmt: skip
    group.add_argument(
        "--attn_implementation", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa", may_change=True,
        help="attention: torch's fused kernels, plain operations, or the flash-attn package",
    )  # fmt: skip
    group.add_argument(
        "--pipeline_stages", type=Integer(least=2), may_change=True,
        help="cut the layers into this many stages, each on a card of its own",
    )  # fmt: skip
    group.add_argument("--local_rank", type=Integer(-1), default=-1, may_change=True, help="set by the launcher")

    group = parser.group("memory plan")
    group.add_argument("--plan", **SWITCH, may_change=True, help="print the memory needed per GPU; do not train")
    group.add_argument(
        "--max_memory", type=GiB(), needs="--plan", may_change=True,
        help="find flags that fit into this memory per GPU: 24 (GiB), 24GiB or 24GB",
    )  # fmt: skip
    group.add_argument(
        "--plan_gpus", type=Integer(), default_text="the launcher's", needs="--plan", may_change=True,
        help="number of GPUs to plan for",
    )  # fmt: skip


def add_results(parser: Parser) -> None:
    group = parser.group("logs and checkpoints")
    group.add_argument(
        "--show_loss_step", type=Integer(), default=10, may_change=True, help="optimizer steps between log lines"
    )
    group.add_argument(
        "--save_model_step", type=Integer(), may_change=True,
        help="optimizer steps between checkpoints, besides the one after each epoch",
    )  # fmt: skip
    group.add_argument(
        "--keep_results", type=Integer(), default_text="all", may_change=True,
        help="number of checkpoints epoch-*-step-* to keep, the newest; best is kept besides",
    )  # fmt: skip
    group.add_argument(
        "--save_format", choices=("official", "native"), default="official", may_change=True,
        help="form of whole models: the official one, or transformers' GlmForCausalLM, without remote code",
    )  # fmt: skip
    group.add_argument(
        "--overwrite_output_dir", **SWITCH, may_change=True,
        help="remove the results of an earlier run from output_dir once this one starts to train; no other files",
    )  # fmt: skip
    group.add_argument("--verbose", **SWITCH, may_change=True, help="show the messages of the libraries")


def add_validation(parser: Parser) -> None:
    group = parser.group("validation")
    group.add_argument(
        "--eval_path", type=DataPath(), nargs="+", may_change=True, help="validation data: files or folders"
    )
    group.add_argument(
        "--eval_ratio", type=SHARE, help="share of the training data held out for validation, such as 0.1"
    )
    group = parser.group("validation settings", needs=EVALUATE)
    group.add_argument(
        "--eval_steps", type=Integer(), default_text="each epoch", help="optimizer steps between validations"
    )
    group.add_argument("--eval_at_start", **SWITCH, may_change=True, help="validate before the first step too")
    group.add_argument(
        "--eval_batch_size", type=Integer(), default=8, may_change=True,
        help="maximum rows per validation batch on each device",
    )  # fmt: skip
    group.add_argument(
        "--eval_generate", choices=("off", "auto", *HEADLINE), default="off", may_change=best_by_loss,
        help="generate answers and score them; auto: in the way that fits the references",
    )  # fmt: skip
    answers = {"needs": "--eval_generate", "may_change": best_by_loss}
    group.add_argument(
        "--eval_generate_rows", type=Integer(), default=200, **answers, help="maximum answers to generate"
    )
    group.add_argument(
        "--eval_max_new_tokens", type=Integer(), default_text="the longest reference and a quarter", **answers,
        help="maximum tokens per answer",
    )  # fmt: skip
    group.add_argument("--best_metric", type=Text(), default="loss", help="metric that selects output_dir/best")
    group.add_argument(
        "--early_stopping_patience", type=Integer(), help="stop after this many validations without improvement"
    )


def add_interruptions(parser: Parser) -> None:
    group = parser.group("stop and resume")
    group.add_argument(
        "--save_state_steps", type=Integer(), may_change=True, help="optimizer steps between training states"
    )
    group.add_argument(
        "--save_total_limit", type=Integer(), default=2, may_change=True,
        help="number of training states to keep; for checkpoints: keep_results",
    )  # fmt: skip
    group.add_argument(
        "--resume_from_checkpoint", type=NewPath(), nargs="?", const="auto", metavar="auto|PATH", may_change=True,
        help="resume from the training state PATH; auto: the newest one in output_dir, or start if there is none",
    )  # fmt: skip
    group.add_argument(
        "--resume_changed", **SWITCH, needs="--resume_from_checkpoint", may_change=True,
        help="resume although flags or data have changed",
    )  # fmt: skip
    group.add_argument(
        "--skip_nonfinite", type=Integer(0), default=0, may_change=True,
        help="number of steps that may be skipped because loss or gradients are not finite",
    )  # fmt: skip


def contradictions(args: argparse.Namespace) -> list[str]:
    """Problems of flags that do not go together; see Parser."""
    wrong = training_problems(args)
    if args.max_src_len >= args.max_len:
        wrong.append(f"--max_src_len {args.max_src_len} must be less than --max_len {args.max_len}")
    if args.max_steps is not None and args.num_train_epochs is not None:
        wrong.append("--max_steps and --num_train_epochs exclude each other: both say when training ends")
    alone = [f"--{name}" for name in ("plan", "check_data", "dump_samples") if getattr(args, name)]
    if len(alone) > 1:
        wrong.append(f"{' and '.join(alone)} exclude each other")
    if args.eval_path and args.eval_ratio is not None:
        wrong.append("--eval_path and --eval_ratio exclude each other")
    if args.overwrite_output_dir and args.resume_from_checkpoint == "auto":
        wrong.append("--overwrite_output_dir (start again) and --resume_from_checkpoint auto exclude each other")
    if args.packing and args.group_by_length:
        wrong.append("--packing and --group_by_length exclude each other: packed rows are all about max_len long")
    if args.train_last_layers and args.freeze_module_name:
        wrong.append("--train_last_layers and --freeze_module_name exclude each other: both say what trains")
    if args.keep_attention and args.attn_implementation != "sdpa":
        wrong.append(f"--keep_attention goes with --attn_implementation sdpa, not with {args.attn_implementation}")
    wrong += lora_contradictions(args) + pipeline_contradictions(args) + format_contradictions(args)
    if missing(args.eval_generate):
        wrong.append(f"--eval_generate {args.eval_generate} needs more packages: {missing(args.eval_generate)}")
    return wrong


def pipeline_contradictions(args: argparse.Namespace) -> list[str]:
    """What does not go with --pipeline_stages, where no process has the whole model."""
    if not args.pipeline_stages:
        return []
    wrong = []
    if changes_base(args.init_lora_weights or ""):
        wrong.append(f"--pipeline_stages and --init_lora_weights {args.init_lora_weights}: it changes the whole base")
    if args.quantization_bit:
        wrong.append("--pipeline_stages and --quantization_bit: a stage cannot be loaded quantised yet")
    if args.max_memory is not None:
        wrong.append("--pipeline_stages and --max_memory: the search is for flags without a pipeline")
    if args.eval_generate not in ("off", None):
        wrong.append("--pipeline_stages and --eval_generate: stages cannot generate; predict.py scores the results")
    return wrong
