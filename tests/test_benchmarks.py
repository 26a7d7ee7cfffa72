"""The benchmarks run: in small, so that what they reach into has not gone away. Their figures are not looked at."""

import json
import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from runs import Forked

import train
from glm_models import MODE

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "benchmark"

COMMANDS = {
    "epoch_planning": "--rows 2000",
    "training_speed": "--modes glm3 --rows 150 --max_len 384 --hidden 128 --layers 1 --repeats 1 "
    "--kinds trainer 'ours, packed'",
    "kernel_count": "--modes glm2 --methods ptuning --layers 2",
    "prediction_speed": "--rows 6 --max_src_len 64 --hidden 128 --layers 1 --batch_size 3 --repeats 1",
    "data_preparation": "--runs 1 --rows 1000 --at_least 1 --checkpoint glm3={glm3}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name, tiny, tmp_path):
    options = shlex.split(COMMANDS[name].format(**tiny))

    def script(rank):
        os.chdir(ROOT)
        sys.path.insert(0, str(FOLDER))
        sys.argv = [str(FOLDER / f"{name}.py"), *options, "--json", f"{tmp_path}/found"]
        runpy.run_path(sys.argv[0], run_name="__main__")

    log = tmp_path / "log"
    assert Forked(1, log, script).wait() == {0: 0}, log.read_text()[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    assert found and "\n|" in f"\n{log.read_text()}"  # a table


def test_the_speed_of_each_kind_is_measured_with_flags_that_train_py_takes(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import training_speed

    for more in training_speed.OURS.values():
        argv = training_speed.arguments("glm3", tiny["glm3"], __file__, f"{tmp_path}/output", 384, more)
        assert train.parse_args(argv).train_type == "lora"


@pytest.mark.parametrize("mode", MODE)
@pytest.mark.parametrize(("method", "most"), [("lora", 3000), ("all", 1800), ("ptuning", 3000)])
def test_a_micro_batch_launches_few_kernels_and_waits_for_none(mode, method, most, monkeypatch):
    """Reckoned for the official 28 layers from 2 and 3: all but the first and the last are alike."""
    monkeypatch.syspath_prepend(FOLDER)
    from kernel_count import count_method

    two, three = (count_method(mode, method, 150, layers) for layers in (2, 3))
    assert not two.waits and not three.waits
    of_a_layer = three.kernels.total() - two.kernels.total()
    assert of_a_layer > 0 and three.kernels.total() + (28 - 3) * of_a_layer <= most
