"""Flags that name a model, or a part of one."""

import os

from tuning.arguments.parser import Folder

WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")  # how the names of weights files end


class FolderOrWeights(Folder):
    """An existing folder, or a weights file."""

    metavar = "PATH"

    def __call__(self, text: str) -> str:
        if os.path.isfile(text):
            if not text.endswith(WEIGHTS):
                raise ValueError(f"is a file, but not one of weights, which end in {', '.join(WEIGHTS)}")
            return text
        return super().__call__(text)
