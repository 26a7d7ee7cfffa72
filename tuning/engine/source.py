"""What a model is loaded from, for the ways of loading that this project has beside transformers' own."""

from typing import NamedTuple

import torch

from glm_models.checkpoint import read_weights
from glm_models.convert.weights import OfficialView


class Source(NamedTuple):
    """A checkpoint folder, and how its weights are wanted.

    model_class: model class of a family.
    config: its configuration.
    dtype: of what is computed, and of all weights that are not quantised; see ds_config.compute_dtype.
    attention: implementation in transformers' registry.
    new_prefix: see check_prefix.
    view: the weights if the folder is that of a GlmForCausalLM; they have been checked.
    """

    model_class: type
    folder: str
    config: object
    dtype: torch.dtype
    attention: str
    new_prefix: bool = False
    view: OfficialView | None = None

    def open(self) -> None:
        """Check the weights before memory is allocated, and set in the config what `from_pretrained` sets.

        Raises:
            CheckpointError: the weights do not fit the config, or a file is missing or broken.
        """
        if self.view is None:
            self.model_class.check_weights(self.folder, self.config, self.new_prefix)
        self.config.dtype, self.config._attn_implementation = self.dtype, self.attention
        self.config.name_or_path = self.folder

    def read(self):
        """Yield (official name, tensor) of all weights."""
        return read_weights(self.folder) if self.view is None else self.view.items()
