#!/usr/bin/env bash
# ChatGLM2-6B, P-Tuning v2: a trained prefix in every layer. Environment variables: see scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
launch glm2 ptuning ChatGLM2-6B --pre_seq_len 16 --prefix_projection True "$@"
