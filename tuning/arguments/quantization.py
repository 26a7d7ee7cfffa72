"""What --quantization_bit needs, said before torch is imported."""

import argparse
import importlib.util

from tuning.arguments.lora import changes_base

PACKAGE = "bitsandbytes"
INSTALL = f"pip install {PACKAGE}==0.50.2"
METHODS = ("lora", "ptuning")  # that leave the weights as they are which a quantised base keeps


def missing_package() -> str:
    """What to install for quantised layers; "" if it is there."""
    return "" if importlib.util.find_spec(PACKAGE) else INSTALL


def needs_package(what: str) -> list[str]:
    """A line if the package is missing that `what` needs."""
    install = missing_package()
    return [f"{what} needs the package {PACKAGE}: {install}"] if install else []


def training_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with --quantization_bit in a training, a line each; the ds file is checked in ds_config."""
    if args.quantization_bit is None:
        return []
    flag = f"--quantization_bit {args.quantization_bit}"
    lines = needs_package(flag)
    if args.train_type not in METHODS:
        lines.append(
            f"{flag} goes with --train_type {' or '.join(METHODS)}: quantised weights stay as they are, and "
            f"{args.train_type} trains them"
        )
    more = {"--use_dora": args.use_dora, "--modules_to_save": args.modules_to_save}
    more["--init_lora_weights"] = args.init_lora_weights and changes_base(args.init_lora_weights)
    return lines + [f"{flag} goes with plain LoRA, without {name}" for name, given in more.items() if given]
