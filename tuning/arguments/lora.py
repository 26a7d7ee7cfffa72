"""Flags of LoRA beyond rank, scaling and layers: its variants in peft, and what trains besides."""

import argparse
import re

from tuning.arguments.parser import SWITCH, Names, Number, Parser, split_names

# flags that --adapter_path sets, and their values without it
LORA = {"lora_dim": 8, "lora_alpha": 30, "lora_module_name": "query_key_value", "init_lora_weights": "true"}
LORA |= {"use_dora": False, "use_rslora": False, "modules_to_save": None}

ALL_LINEAR = "all-linear"  # value of --lora_module_name

STARTS = ("true", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_N")
NEEDS_ROWS = "needs a pass over the data before training, which is not made here"
REFUSED_STARTS = {
    "corda": NEEDS_ROWS,
    "eva": NEEDS_ROWS,
    "lora_ga": NEEDS_ROWS,
    "false": "starts from another model than the base; peft has it for debugging",
    "loftq": "starts from a quantised base, which is not made here",
    "mica": "trains the matrix A alone, which is not done here",
}


class StartName:
    """Initial values of A and B, by peft's name."""

    metavar = "|".join(STARTS)

    def __call__(self, text: str) -> str:
        name = text.lower()
        if name in REFUSED_STARTS:
            raise ValueError(REFUSED_STARTS[name])
        if name not in STARTS[:-1] and not re.fullmatch(r"pissa_niter_[0-9]{1,3}", name):
            raise ValueError(f"choose from {', '.join(STARTS)}, where N is the number of iterations, such as 16")
        return name


def changes_base(start: str) -> bool:
    """Whether initial values are taken out of the base's weights (PiSSA, OLoRA)."""
    return start.startswith(("pissa", "olora"))


def add_variants(parser: Parser) -> None:
    group = parser.group("variants of LoRA", needs="--train_type lora")
    group.add_argument(
        "--use_dora", **{**SWITCH, "default": None}, default_text="False",
        help="DoRA: also train the length of each row of the adapted weights",
    )  # fmt: skip
    group.add_argument(
        "--use_rslora", **{**SWITCH, "default": None}, default_text="False",
        help="rsLoRA: multiply updates by alpha / square root of the rank",
    )  # fmt: skip
    group.add_argument(
        "--init_lora_weights", type=StartName(), default_text=LORA["init_lora_weights"],
        help="initial values of the update matrices",
    )  # fmt: skip
    group.add_argument(
        "--modules_to_save", type=Names(),
        help="modules to train whole and to save with the adapter, such as word_embeddings,output_layer",
    )  # fmt: skip
    group.add_argument(
        "--loraplus_lr_ratio", type=Number(least=1), default_text="1",
        help="LoRA+: learning rate of the matrices B, as a multiple of --learning_rate",
    )  # fmt: skip


def lora_contradictions(args: argparse.Namespace) -> list[str]:
    """Problems of LoRA flags that do not go together; see Parser."""
    wrong = []
    if args.adapter_path and args.init_lora_weights:
        wrong.append("--init_lora_weights and --adapter_path exclude each other: the values are the adapter's")
    rank = args.lora_dim or LORA["lora_dim"]
    if args.init_lora_weights == "orthogonal" and rank % 2:
        wrong.append(f"--init_lora_weights orthogonal needs an even rank, --lora_dim is {rank}")
    layers = split_names(args.lora_module_name or LORA["lora_module_name"])
    if ALL_LINEAR in layers and len(layers) > 1:
        wrong.append(f"--lora_module_name {args.lora_module_name}: {ALL_LINEAR} stands alone")
    if both := sorted({*layers} & {*split_names(args.modules_to_save or "")}):
        wrong.append(f"{', '.join(both)} cannot be both in --lora_module_name and in --modules_to_save")
    return wrong
