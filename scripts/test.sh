#!/usr/bin/env bash
# Run all tests in an environment of their own, two files at a time. VENV: its folder (default .venv). Arguments are
# passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment requirements-dev.txt
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist loadfile "$@"
