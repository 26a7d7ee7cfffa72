"""Flags that name a model or a part of one, and the form in which results are saved."""

import argparse
import os
import re

from glm_models.families import parse_hub_name
from tuning.arguments.parser import Folder

RESULT = r"best|epoch-\d+-step-\d+.*"  # names of results
WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")  # how the names of weights files end


class Model(Folder):
    """An existing folder, or else the name of a model on a hub: see tuning.hub, which makes a folder of it."""

    metavar = "FOLDER|NAME"

    def __call__(self, text: str) -> str:
        name = None if os.path.exists(text) else parse_hub_name(text)
        if name is None:
            return super().__call__(text)
        owner, _, model = name.repository.partition("/")
        if not name.hub and (os.path.isdir(owner) or re.fullmatch(RESULT, model)):
            raise ValueError("no such folder")  # a slip in a path
        return text


class ModelOrWeights(Model):
    """A model, or a weights file."""

    metavar = "FOLDER|NAME|FILE"

    def __call__(self, text: str) -> str:
        return text if is_weights(text) else super().__call__(text)


class FolderOrWeights(Folder):
    """An existing folder, or a weights file."""

    metavar = "FOLDER|FILE"

    def __call__(self, text: str) -> str:
        return text if is_weights(text) else super().__call__(text)


def is_weights(path: str) -> bool:
    """Whether a path is that of a weights file.

    Raises:
        ValueError: it is another file.
    """
    if os.path.isfile(path) and not path.endswith(WEIGHTS):
        raise ValueError(f"is a file, but not one of weights, which end in {', '.join(WEIGHTS)}")
    return os.path.isfile(path)


def format_contradictions(args: argparse.Namespace) -> list[str]:
    """What does not go with --save_format native."""
    if args.save_format != "native":
        return []
    wrong = []
    if args.mode == "glm":
        wrong.append("--save_format native and --mode glm: transformers has no class for ChatGLM-6B")
    if args.train_type == "ptuning":
        wrong.append(
            "--save_format native and --train_type ptuning: GlmForCausalLM has no place for the prefix; predict.py and "
            "the official code answer with the official form"
        )
    if args.train_type == "lora":
        wrong.append(
            "--save_format native and --train_type lora: an adapter fits models of its base's form. Leave the flag "
            "out, and convert the result: merged (merge_lora.py), or alone for a converted base; both by python -m "
            "glm_models.convert"
        )
    return wrong
