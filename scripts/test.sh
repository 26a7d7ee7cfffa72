#!/usr/bin/env bash
# Run all tests in an environment of their own, three files at a time: much of a test is waiting for processes. The order
# of files is that of tests/conftest.py, the longest first.
# VENV: its folder (default .venv). Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment requirements-dev.txt
export OMP_NUM_THREADS=1
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
