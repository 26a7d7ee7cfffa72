"""Base class of the families' configs: config.json is checked before a network is built from it."""

import os
import typing
from types import UnionType
from typing import ClassVar

import torch
from transformers import PreTrainedConfig

from .checkpoint import CheckpointError, read_json
from .families import FAMILIES, convert_first, is_native
from .messages import short_repr

# Maximum values, far above those of any model, so that a wrong number does not fill the memory.
MAXIMUM = dict.fromkeys(("num_layers", "num_attention_heads", "multi_query_group_num"), 1000)
MAXIMUM |= dict.fromkeys(("hidden_size", "inner_hidden_size", "ffn_hidden_size", "kv_channels", "pre_seq_len"), 10**6)
MAXIMUM_OF_OTHERS = 10**8
# Ends of the keys that may be 0; sizes and counts are at least 1.
MAY_BE_ZERO = ("_id", "_bit", "_dropout", "_epsilon", "_range")
MAXIMUM_LABELS = 1000  # transformers makes a table of this size; nothing here reads it

# Keys of config.json with which transformers would build another model than the weights are for, or load others.
REFUSED = ("quantization_config", "compression_config", "transformers_weights", "configuration_files")
REFUSED += ("attn_implementation", "_attn_implementation", "rope_scaling", "rope_parameters", "rope_theta")
# Keys that PreTrainedConfig may read: they change nothing that is computed. Unknown keys are dropped.
HARMLESS = ("architectures", "dtype", "torch_dtype", "transformers_version")


# More keys that transformers reads. They are ignored here and not written into results.
IGNORED = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal", "per_layer_config")
IGNORED += ("_attn_implementation_internal", "_attn_implementation_autoset", "tp_plan", "num_labels", "id2label")
IGNORED += ("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "label2id")
IGNORED += ("problem_type", "is_encoder_decoder", "output_attentions", "output_hidden_states", "name_or_path")


class ChatGLMConfigBase(PreTrainedConfig):
    """A config whose values have the annotated types and possible sizes.

    Raises:
        CheckpointError: a value has not; the message names the key.
    """

    title: ClassVar[str]  # the model's name

    def __post_init__(self, **kwargs):
        for key in kwargs:
            known = getattr(type(self), key, None)
            if callable(known) or (isinstance(known, property) and known.fset is None):
                raise CheckpointError(f"{key} is not a key of a config")
        labels = kwargs.get("num_labels", 0)
        if type(labels) is not int or not 0 <= labels <= MAXIMUM_LABELS:
            raise CheckpointError(f"num_labels {short_repr(labels)} has no meaning here; remove it")
        super().__post_init__(**kwargs)
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise CheckpointError("dtype (or torch_dtype) must be the name of a torch type")
        for key, hint in self.own_keys().items():
            self._check(key, getattr(self, key), hint)

    @staticmethod
    def _check(key: str, value, hint) -> None:
        hints = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = {typing.get_origin(kind) or kind for kind in hints}
        kinds |= {int} if float in kinds else set()
        numbers = value if isinstance(value, list) else [value]
        if type(value) not in kinds or (isinstance(value, list) and any(type(number) is not int for number in value)):
            names = " or ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in kinds))
            raise CheckpointError(f"{key} must be {names}, not {short_repr(value)}")
        minimum, maximum = int(not key.endswith(MAY_BE_ZERO)), MAXIMUM.get(key, MAXIMUM_OF_OTHERS)
        for number in numbers:
            if type(number) in (int, float) and not (minimum <= number <= maximum):  # NaN is neither
                raise CheckpointError(f"{key} {short_repr(number)} is not between {minimum} and {maximum}")

    @classmethod
    def own_keys(cls) -> dict[str, typing.Any]:
        """The keys of config.json that are read here, by their official names, with their types."""
        bases = cls.__mro__[: cls.__mro__.index(ChatGLMConfigBase)]
        hints = {key: hint for base in reversed(bases) for key, hint in base.__annotations__.items()}
        return {key: hint for key, hint in hints.items() if typing.get_origin(hint) is not ClassVar}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **changes):
        """The config of a folder. Keys that are not read here are dropped, because transformers would act on many.

        Args:
            changes: keys of config.json to override, by their official names.

        Raises:
            CheckpointError: config.json is missing, broken, or not of such a model; the message names file and key.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        path = os.path.join(folder, "config.json")
        content = read_json(path)
        if is_native(content):
            mode = next(mode for mode, signs in FAMILIES.items() if signs.title == cls.title)
            raise CheckpointError(convert_first(mode, folder))
        try:
            return cls(**cls._select(content) | changes, name_or_path=folder)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # a value that transformers reads can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{path} does not describe a {cls.title}: {reason[:300]}") from error

    @classmethod
    def is_copied(cls, key: str) -> bool:
        """Whether this key of the base's config.json is copied into results."""
        return key not in ("dtype", *REFUSED, *IGNORED) and not callable(getattr(cls, key, None))

    @classmethod
    def _select(cls, content: dict) -> dict:
        """The part of a config.json that PreTrainedConfig may read."""
        for key in REFUSED:
            if content.get(key) is not None:
                raise CheckpointError(
                    f"{key} {short_repr(content[key])} is not supported; remove it. {cls.title} has no such key"
                )
        known = cls.own_keys()
        selected = {key: content[key] for key in content if key in known or key in HARMLESS}
        for alias, key in cls.attribute_map.items():  # as in configs that transformers wrote
            if alias in content and selected.setdefault(key, content[alias]) != content[alias]:
                raise CheckpointError(
                    f"{alias} is {short_repr(content[alias])} and {key} is {short_repr(content[key])}, but both are "
                    "names of the same thing"
                )
        return selected
