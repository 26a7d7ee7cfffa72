"""What transformers needs to know about a ChatGLM, strict loading of weights, and initial values of new ones."""

import math
import os
import re

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init

from .checkpoint import CheckpointError, read_json, weight_layout, weight_shapes
from .identify import check_family
from .messages import short_repr
from .prefix import PREFIX, describe_prefix, inner_names


def check_not_quantised(config) -> None:
    """Refuse a checkpoint whose own weights are quantised, such as the official ChatGLM-6B-int4.

    Raises:
        CheckpointError: it is one.
    """
    if config.quantization_bit:
        raise CheckpointError(
            f"the checkpoint holds weights quantised to {config.quantization_bit} bits; "
            "use the unquantised one (quantization_bit 0)"
        )


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Base class of all models here."""

    mode: str  # the key in MODE
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True  # for the rows of samples in training; not for padded batches
    _supports_attention_backend = True
    # computed by the model, never read: some official files have them, some do not
    _keys_to_ignore_on_load_unexpected = [r"\.inv_freq$"]
    # see check_prefix
    _keys_to_ignore_on_load_missing = [r"prefix_encoder\."]

    def __init__(self, config, *args, **kwargs):
        check_not_quantised(config)
        super().__init__(config, *args, **kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As in transformers, but without its warning: peft still uses this old name."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, new_prefix: bool = False, **kwargs):
        """As in transformers, but a weight that is missing, unknown or of another shape is an error.

        Args:
            config: None for the folder's own; then kwargs may override its keys.
            new_prefix: see check_prefix.

        Raises:
            CheckpointError: the folder is missing, of another family or incomplete, or shapes do not fit its config.
        """
        folder = str(pretrained_model_name_or_path)
        check_family(folder, cls.mode, need=("config",))
        if config is None:
            changes = {key: kwargs.pop(key) for key in cls.config_class.own_keys() if key in kwargs}
            config = cls.config_class.from_pretrained(folder, **changes)
        cls.check_weights(folder, config, new_prefix)  # broken files and indices are found here too
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            folder,
            *args,
            **kwargs,
            config=config,
            generation_config=read_generation_config(folder, config),
            use_safetensors=None,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the other problems
        )
        misshapen = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        cls.check_fit(folder, info["missing_keys"], info["unexpected_keys"], misshapen)
        return (model, info) if wants_info else model

    @classmethod
    def check_weights(cls, folder: str, config, new_prefix: bool = False) -> None:
        """Check that a folder's weights fit a config, before memory is allocated for them.

        Args:
            new_prefix: see check_prefix.

        Raises:
            CheckpointError: they do not fit, or a file is missing or broken.
        """
        found = weight_shapes(folder)
        check_prefix(folder, config, found, new_prefix)
        with torch.device("meta"), init.no_init_weights():
            model = cls(config)
        expected = {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
        missing = expected.keys() - found.keys()
        for pair in model.all_tied_weights_keys.items():
            if not missing.issuperset(pair):
                missing -= {*pair}
        unknown = [name for name in found if name not in expected and not cls.is_computed(name)]
        misshapen = [name for name in expected.keys() & found if expected[name] != found[name]]
        cls.check_fit(folder, missing, unknown, misshapen)

    @classmethod
    def is_computed(cls, name: str) -> bool:
        """Whether a weight in a file is ignored, because the model computes it."""
        return any(re.search(pattern, name) for pattern in cls._keys_to_ignore_on_load_unexpected)

    @staticmethod
    def check_fit(folder: str, missing, unknown, misshapen) -> None:
        """Check that no weight of a folder is missing, unknown or of another shape than the model's.

        Raises:
            CheckpointError: one is; the message counts all three kinds.
        """
        # a missing prefix was either refused by check_prefix, or a new one is to be trained
        missing = [name for name in missing if "prefix_encoder." not in name]
        kinds = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
        wrong = [f"{len(names)} {kind} (first: {min(names)})" for kind, names in kinds.items() if names]
        if wrong:
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: {', '.join(wrong)}")

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers searches each family's source for the registry, but attention_forward calls it

    @torch.no_grad()
    def _init_weights(self, module):
        """Initial values of weights that the checkpoint lacks: a prefix encoder's, or all of a model from a config."""
        std = self.config.initializer_range
        if hasattr(module, "in_prefix"):
            # torch's defaults, as in the official models: with a std of 0.02 a prefix would hardly learn
            if isinstance(module, nn.Linear):
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif hasattr(module, "weight") and not list(module.children()):  # the norms
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


PROJECTION_WEIGHTS = 5  # with prefix_projection: an embedding, and weights and biases of two linear layers


def check_prefix(folder: str, config, shapes: dict[str, torch.Size], new_prefix: bool = False) -> None:
    """Check that a folder's weights include the P-Tuning prefix that a config asks for.

    Args:
        shapes: of the folder's weights, by name.
        new_prefix: a prefix will be trained. Then it may be missing, and the folder's config.json need not name one.

    Raises:
        CheckpointError: the prefix is missing, it is of another length or kind, or the folder holds only a prefix.
    """
    prefix = {name.split(PREFIX)[1]: shape for name, shape in shapes.items() if PREFIX in name}
    length = prefix["embedding.weight"][0] if prefix.get("embedding.weight") else None
    projection = any(name.startswith("trans.") for name in prefix)
    if inner_names(shapes):
        raise CheckpointError(describe_prefix(folder))
    if config.pre_seq_len is None:  # a prefix that the config does not ask for is found by check_fit
        return
    asked = f"pre_seq_len {config.pre_seq_len}, prefix_projection {str(config.prefix_projection).lower()}"
    if not prefix:
        if not new_prefix and has_lost_prefix(folder):
            raise CheckpointError(
                f"{folder}: config.json asks for a P-Tuning prefix ({asked}), but there is none among the weights; "
                "set pre_seq_len to null. Only --train_type ptuning makes a new one"
            )
    elif length != config.pre_seq_len or projection != config.prefix_projection:
        raise CheckpointError(
            f"the prefix in {folder} (transformer.{PREFIX}embedding) has pre_seq_len {length}, prefix_projection "
            f"{str(projection).lower()}, but asked for are {asked}; a trained prefix keeps its length and kind"
        )
    elif len(prefix) != (PROJECTION_WEIGHTS if projection else 1):
        raise CheckpointError(f"{folder}: weights of the P-Tuning prefix are missing; there are {', '.join(prefix)}")


def has_lost_prefix(folder: str) -> bool:
    """Whether a folder's config.json asks for a prefix that is not among its weights."""
    names = (name for names in weight_layout(folder).values() for name in names)
    asked = read_json(os.path.join(folder, "config.json")).get("pre_seq_len") is not None
    return asked and not any(PREFIX in name for name in names)


def read_generation_config(folder: str, config) -> GenerationConfig:
    """The ids of special tokens from generation_config.json, else from the config.

    All other keys are ignored: they would change greedy answers, or load code or other models.

    Raises:
        CheckpointError: the file is broken, or a value is not a token id.
    """
    path = os.path.join(folder, "generation_config.json")
    content = read_json(path) if os.path.lexists(path) else {}
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids[key] = content.get(key, getattr(config, key))
        numbers = ids[key] if isinstance(ids[key], list) and key == "eos_token_id" else [ids[key]]
        if ids[key] is not None and not (numbers and all(type(n) is int and 0 <= n < 10**8 for n in numbers)):
            raise CheckpointError(f"{path}: {key} must be a token id, not {short_repr(ids[key])}")
    return GenerationConfig(**ids)
