"""The benchmarks run: in small, so that what they reach into has not gone away. Their figures are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = {
    "epoch_planning": "--rows 2000",
    "training_speed": "--modes glm3 --rows 200 --max_len 384 --hidden 128 --layers 1 --repeats 1",
    "prediction_speed": "--rows 6 --max_src_len 64 --hidden 128 --layers 1 --batch_size 3 --repeats 1",
    "data_preparation": "--runs 1 --rows 1000 --at_least 1 --checkpoint glm3={glm3}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name, tiny, tmp_path):
    options = COMMANDS[name].format(**tiny).split()
    command = [sys.executable, f"tests/benchmark/{name}.py", *options, "--json", f"{tmp_path}/found"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    assert found and run.stdout.startswith(("|", "\n|"))
