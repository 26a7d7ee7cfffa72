#!/usr/bin/env bash
# Check on this machine's GPU what was never run on one: bash scripts/gpu_check.sh   (under 20 minutes; no weights needed)
# Prints a table; the exit code is not 0 if a check fails. PYTHON: the interpreter to use (default: python of the active
# environment, with requirements.txt installed). Flags are passed on: see python tests/gpu_check.py --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" tests/gpu_check.py "$@"
