"""scripts/gpu_check.sh runs where no GPU is, so that it works where one is."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_check

from tuning.arguments.quantization import missing_package

ROOT = Path(__file__).resolve().parent.parent


def test_the_short_form_runs_on_a_cpu():
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        ["bash", "scripts/gpu_check.sh", "--short"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = run.stdout.splitlines()
    outcomes = {title: line for title in gpu_check.CHECKS for line in lines if line.startswith(title)}
    assert outcomes.keys() == gpu_check.CHECKS.keys(), run.stdout + run.stderr
    assert run.returncode == 0 and lines[-1] == "no check failed", run.stdout
    skipped = {title for title, line in outcomes.items() if line[len(title) :].split()[0] == "skipped"}
    gpu_only = {"packed rows", "memory against --plan", "waits for the device", "flash_attention_2", "several GPUs"}
    assert skipped == gpu_only | ({"quantised bases"} if missing_package() else set())


def test_a_check_that_fails_is_counted(tmp_path, monkeypatch, capsys):
    def fails(machine):
        raise AssertionError("2 GiB instead\nof 1")

    def breaks(machine):
        raise KeyError("x")

    monkeypatch.setattr(gpu_check, "CHECKS", {"one": fails, "two": breaks, "three": lambda machine: "well"})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--short", "--folder", str(tmp_path)])
    assert gpu_check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["FAILED", "FAILED", "ok"]
    assert lines[1].endswith("2 GiB instead of 1") and lines[4] == "2 of 3 checks failed"
