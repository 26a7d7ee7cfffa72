#!/usr/bin/env bash
# ChatGLM3-6B, Freeze: the last four of 28 layers train. Environment variables: see scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
launch glm3 freeze ChatGLM3-6B --freeze_module_name "layers.27.,layers.26.,layers.25.,layers.24." "$@"
