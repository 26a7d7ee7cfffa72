"""What the families' configs share: a config.json is checked before a network is made of it."""

import os
import typing
from types import UnionType
from typing import ClassVar

import torch
from transformers import PreTrainedConfig

from .checkpoint import CheckpointError, read_json

# Largest values, far beyond any model: a wrong number shall not fill the memory.
MOST = dict.fromkeys(("num_layers", "num_attention_heads", "multi_query_group_num"), 1000)
MOST |= dict.fromkeys(("hidden_size", "inner_hidden_size", "ffn_hidden_size", "kv_channels", "pre_seq_len"), 10**6)
MOST_OF_OTHERS = 10**8
# Ends of the keys that may be 0; of a size or a number of something there is at least 1.
MAY_BE_ZERO = ("_id", "_bit", "_dropout", "_epsilon", "_range")
MOST_LABELS = 1000  # transformers makes a table of so many, which nothing here reads


class ChatGLMConfigBase(PreTrainedConfig):
    """A config whose values have the types of its class's annotations, and sizes that a network can have.

    Raises:
        CheckpointError: they have not; the message names the key.
    """

    title: ClassVar[str]  # the model's name
    telling_keys: ClassVar[frozenset]  # those that no other family has

    def __post_init__(self, **kwargs):
        for key in kwargs:
            known = getattr(type(self), key, None)
            if callable(known) or (isinstance(known, property) and known.fset is None):
                raise CheckpointError(f"{key} is no key of a config")
        labels = kwargs.get("num_labels", 0)
        if type(labels) is not int or not 0 <= labels <= MOST_LABELS:
            raise CheckpointError(f"num_labels {shown(labels)} means nothing here; remove it")
        super().__post_init__(**kwargs)
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise CheckpointError("dtype (or torch_dtype) must name a type of torch")
        for base in type(self).__mro__[: type(self).__mro__.index(ChatGLMConfigBase)]:
            for key, hint in base.__annotations__.items():
                if typing.get_origin(hint) is not ClassVar:
                    self._check(key, getattr(self, key), hint)

    @staticmethod
    def _check(key: str, value, hint) -> None:
        wanted = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = {typing.get_origin(kind) or kind for kind in wanted}
        kinds |= {int} if float in kinds else set()
        numbers = value if isinstance(value, list) else [value]
        if type(value) not in kinds or (isinstance(value, list) and any(type(number) is not int for number in value)):
            names = " or ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in kinds))
            raise CheckpointError(f"{key} must be {names}, not {shown(value)}")
        least, most = int(not key.endswith(MAY_BE_ZERO)), MOST.get(key, MOST_OF_OTHERS)
        for number in numbers:
            if type(number) in (int, float) and not (number >= least and number <= most):  # NaN is neither
                raise CheckpointError(f"{key} {shown(number)} is not between {least} and {most}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, of a folder.

        Raises:
            CheckpointError: config.json is missing, broken, or describes no such model; file and key are named.
        """
        path = os.path.join(pretrained_model_name_or_path, "config.json")
        read_json(path)  # its errors are clearer than those of transformers
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # transformers acts on many more keys, and anything can come of their values
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{path} does not describe a {cls.title}: {reason[:300]}") from error


def shown(value) -> str:
    """A value from a file, for a message: short, and printable on any terminal."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
