"""config.json of GlmForCausalLM from an official one, and the check that two describe the same network."""

import os

import torch
from transformers import GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from ..checkpoint import CheckpointError, read_json, weight_shapes
from ..families import NATIVE
from ..glm2 import ChatGLM2Config
from ..messages import short_repr
from ..streamed import check_names

# How each key of a GlmConfig follows from an official config.
SAME = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_groups",
    "head_dim": "kv_channels",
    "attention_bias": "add_qkv_bias",
    "rms_norm_eps": "layernorm_epsilon",
}


def rope_of(config: ChatGLM2Config) -> dict:
    """rope_parameters: in ChatGLM3 rope_ratio makes the base larger, in ChatGLM2-6B-32K it divides the positions."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if config.rope_ratio_scales_base:
        return rope | {"rope_theta": 10000.0 * config.rope_ratio}
    return rope if config.rope_ratio == 1 else rope | {"rope_type": "linear", "factor": float(config.rope_ratio)}


def native_config(config: ChatGLM2Config, stop_ids: list[int], dtype: torch.dtype) -> dict:
    """The content of config.json for transformers.

    The keys of transformers 4 (torch_dtype, rope_theta, partial_rotary_factor, rope_scaling) stand beside those of 5.
    """
    rope, name = rope_of(config), str(dtype).removeprefix("torch.")
    content = {"architectures": [NATIVE], "model_type": "glm"}
    content |= {key: getattr(config, official) for key, official in SAME.items()}
    content |= {
        "max_position_embeddings": config.seq_length,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": False,
        "use_cache": True,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "bos_token_id": None,
        "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0],
        "pad_token_id": config.pad_token_id or 0,
        "dtype": name,
        "torch_dtype": name,
    }
    if "factor" in rope:
        content["rope_scaling"] = {"rope_type": rope["rope_type"], "factor": rope["factor"]}
    return content


def check_same_network(folder: str, config: ChatGLM2Config, official: str) -> None:
    """Check that the config.json of a GlmForCausalLM describes the network of an official one.

    Args:
        folder: of the GlmForCausalLM.
        official: where the official config is, for messages.

    Raises:
        CheckpointError: they differ; the message names a key.
    """
    path = os.path.join(folder, "config.json")
    try:
        found = GlmConfig.from_dict(read_json(path))
    except CheckpointError:
        raise
    except Exception as error:  # a value that transformers reads can raise anything
        raise CheckpointError(f"{path} does not describe a {NATIVE}: {' '.join(str(error).split())[:300]}") from error
    expected = {key: getattr(config, name) for key, name in SAME.items()} | {"hidden_act": "silu"}
    expected |= {"tie_word_embeddings": False}
    pairs = [(key, getattr(found, key), value) for key, value in expected.items()]
    rope = found.rope_parameters or {}
    pairs += [(f"rope_parameters: {key}", rope.get(key), value) for key, value in rope_of(config).items()]
    for key, there, here in pairs:
        if there != here:
            raise CheckpointError(
                f"{path}: {key} is {short_repr(there)}, {short_repr(here)} in {official}: not the same network"
            )


def native_skeleton(folder: str, content: dict) -> GlmForCausalLM:
    """The GlmForCausalLM of a folder on the meta device, in eval mode.

    Args:
        content: of its config.json.

    Raises:
        CheckpointError: the folder's weights do not fit.
    """
    config = GlmConfig.from_dict(content)
    with torch.device("meta"):
        model = GlmForCausalLM(config).eval().requires_grad_(False)
    model.model.rotary_emb = GlmRotaryEmbedding(config)  # computed, not read
    found = weight_shapes(folder)
    check_names(folder, model, found)
    return model
