"""What --quantization_bit needs, said before torch is imported."""

import importlib.util

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


def training_problems(train_type: str, bits: int | None) -> list[str]:
    """What is wrong with --quantization_bit in a training, a line each; the ds file is checked in ds_config."""
    if bits is None:
        return []
    lines = needs_package(f"--quantization_bit {bits}")
    if train_type not in METHODS:
        lines.append(
            f"--quantization_bit {bits} goes with --train_type {' or '.join(METHODS)}: quantised weights stay as they "
            f"are, and {train_type} trains them"
        )
    return lines
