#!/usr/bin/env bash
# Run all tests in an environment of their own. VENV: where it is (default .venv). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment requirements-dev.txt
python -m pytest "$@"
