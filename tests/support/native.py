"""transformers' own GlmForCausalLM with the weights of a ChatGLM2 or ChatGLM3 of ours."""

from transformers import GlmConfig, GlmForCausalLM


def native_weights(model, weights):
    """Tensors under this project's names (weights, or gradients) -> under the names of GlmForCausalLM."""
    config = model.config
    heads, groups, size = config.num_attention_heads, config.num_groups, config.kv_channels
    found = {}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        if "query_key_value" not in name:
            for mine, theirs in (
                ("embedding.word_embeddings", "model.embed_tokens"),
                ("encoder.final_layernorm", "model.norm"),
                ("output_layer", "lm_head"),
                ("encoder.", "model."),
                ("self_attention.dense", "self_attn.o_proj"),
                ("dense_h_to_4h", "gate_up_proj"),
                ("dense_4h_to_h", "down_proj"),
            ):
                name = name.replace(mine, theirs)
            found[name] = tensor
            continue
        name = name.replace("encoder.", "model.").replace("self_attention", "self_attn")
        if config.multi_query_attention:
            q, k, v = tensor.split([heads * size, groups * size, groups * size])
        else:
            q, k, v = (part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, size)).unbind(1))
        for letter, part in zip("qkv", (q, k, v), strict=True):
            found[name.replace("query_key_value", f"{letter}_proj")] = part
    return found


# what rope_ratio means: in ChatGLM2-6B-32K positions are divided by it, in ChatGLM3 the base is multiplied
ROPE = {
    "glm2": lambda ratio: {"rope_type": "linear", "factor": float(ratio), "rope_theta": 10000.0},
    "glm3": lambda ratio: {"rope_type": "default", "rope_theta": 10000.0 * ratio},
}


def native_model(model):
    config = model.config
    native = GlmForCausalLM(
        GlmConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_groups,
            head_dim=config.kv_channels,
            hidden_act="silu",
            attention_bias=config.add_qkv_bias,
            rms_norm_eps=config.layernorm_epsilon,
            max_position_embeddings=config.seq_length,
            tie_word_embeddings=False,
            rope_parameters={
                **ROPE[model.mode](config.rope_ratio),
                "partial_rotary_factor": 0.5,
            },
            pad_token_id=0,
            eos_token_id=2,
        )
    ).eval()
    native.load_state_dict(native_weights(model, model.state_dict()))
    return native
