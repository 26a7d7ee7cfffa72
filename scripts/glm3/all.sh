#!/usr/bin/env bash
# ChatGLM3-6B, all parameters, sharded over the GPUs by ZeRO-3. Environment variables: see scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
launch glm3 all ChatGLM3-6B --ds_file ds_zero3_no_offload.json "$@"
