"""What the families' configs share: a config.json is checked before a network is made of it."""

import os
import typing
from types import UnionType
from typing import ClassVar

import torch
from transformers import PreTrainedConfig

from .checkpoint import CheckpointError, read_json, shown

# Largest values, far beyond any model: a wrong number shall not fill the memory.
MOST = dict.fromkeys(("num_layers", "num_attention_heads", "multi_query_group_num"), 1000)
MOST |= dict.fromkeys(("hidden_size", "inner_hidden_size", "ffn_hidden_size", "kv_channels", "pre_seq_len"), 10**6)
MOST_OF_OTHERS = 10**8
# Ends of the keys that may be 0; of a size or a number of something there is at least 1.
MAY_BE_ZERO = ("_id", "_bit", "_dropout", "_epsilon", "_range")
MOST_LABELS = 1000  # transformers makes a table of so many, which nothing here reads

# Keys of config.json that ask for another model than its weights are, or for other weights. transformers acts on them.
REFUSED = ("quantization_config", "compression_config", "transformers_weights", "configuration_files")
REFUSED += ("attn_implementation", "_attn_implementation", "rope_scaling", "rope_parameters", "rope_theta")
# Keys that PreTrainedConfig reads and that may stay: they change nothing that is computed. Unknown ones are left out.
HARMLESS = ("architectures", "dtype", "torch_dtype", "transformers_version")


# Others on which transformers acts. They do nothing here, and results do not get them either.
IGNORED = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal", "per_layer_config")
IGNORED += ("_attn_implementation_internal", "_attn_implementation_autoset", "tp_plan", "num_labels", "id2label")
IGNORED += ("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "label2id")
IGNORED += ("problem_type", "is_encoder_decoder", "output_attentions", "output_hidden_states", "name_or_path")


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
        for key, hint in self.own_keys().items():
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
    def own_keys(cls) -> dict[str, typing.Any]:
        """Keys of config.json that mean something here, by their official names, and their types."""
        bases = cls.__mro__[: cls.__mro__.index(ChatGLMConfigBase)]
        hints = {key: hint for base in reversed(bases) for key, hint in base.__annotations__.items()}
        return {key: hint for key, hint in hints.items() if typing.get_origin(hint) is not ClassVar}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **changes):
        """The config of a folder. Keys that mean nothing here are left out: transformers acts on many.

        Args:
            changes: keys of config.json to set differently, by their official names.

        Raises:
            CheckpointError: config.json is missing, broken, or describes no such model; file and key are named.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        path = os.path.join(folder, "config.json")
        content = read_json(path)
        try:
            return cls(**cls._select(content) | changes, name_or_path=folder)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # anything can come of a value that transformers reads
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{path} does not describe a {cls.title}: {reason[:300]}") from error

    @classmethod
    def hands_on(cls, key: str) -> bool:
        """Whether results get this key of their base's config.json."""
        return key not in ("dtype", *REFUSED, *IGNORED) and not callable(getattr(cls, key, None))

    @classmethod
    def _select(cls, content: dict) -> dict:
        """Of a config.json, what PreTrainedConfig may see."""
        for key in REFUSED:
            if content.get(key) is not None:
                raise CheckpointError(
                    f"{key} {shown(content[key])} is not obeyed here; remove it. {cls.title} has none"
                )
        known = cls.own_keys()
        selected = {key: content[key] for key in content if key in known or key in HARMLESS}
        for alias, key in cls.attribute_map.items():  # as in configs that transformers wrote
            if alias in content and selected.setdefault(key, content[alias]) != content[alias]:
                raise CheckpointError(
                    f"{alias} is {shown(content[alias])} and {key} is {shown(content[key])}, but mean the same thing"
                )
        return selected
