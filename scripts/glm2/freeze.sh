#!/usr/bin/env bash
# ChatGLM2-6B, Freeze: the last four of 28 layers train. Environment variables: see scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
launch glm2 freeze ChatGLM2-6B --freeze_module_name "layers.27.,layers.26.,layers.25.,layers.24." "$@"
