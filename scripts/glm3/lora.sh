#!/usr/bin/env bash
# ChatGLM3-6B, LoRA: trains low-rank updates; merge them with merge_lora.py. Environment variables: see scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
launch glm3 lora ChatGLM3-6B --lora_dim 16 --lora_alpha 64 --lora_dropout 0.1 --lora_module_name "query_key_value,dense_h_to_4h,dense_4h_to_h,dense" "$@"
