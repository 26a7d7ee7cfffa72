"""The comparison: what runs, what does not run again, what fails; with a stand-in for the scripts, once for real."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuning.arguments.compare import METHODS, parse_args
from tuning.errors import UserError
from tuning.evaluate import compare as compare_methods
from tuning.evaluate.compare import Interrupted, Runner, compare

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = {"result": "epoch-1-step-2", "trained": 1000, "parameters": 20000, "seconds": 65.0}
SUMMARY |= {"tokens_per_second": 123.4, "memory_gib": 0.75}
CURVE = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]


def row(i, output=None):
    return {"instruction": "抽取：", "input": f"第{i}行", "output": output or f"甲{i}_组成_乙{i}"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows))
    return str(path)


@pytest.fixture
def flags(tmp_path, tiny):
    train = write_rows(tmp_path / "train.json", [row(i) for i in range(40)])
    test = write_rows(tmp_path / "test.json", [row(i) for i in range(100, 110)])
    flags = ["--model", f"glm3={tiny['glm3']}", "--train_path", train, "--test_path", test]
    return [*flags, "--output_dir", str(tmp_path / "out"), "--validation_rows", "10", "--suite", "none"]


class Scripts:
    """Stands for train.py and predict.py: the larger the learning rate, the more answers are right.

    fails: part of a command line that fails; stops: number of commands after which all is interrupted.
    """

    def __init__(self, fails="nothing", stops=10**6):
        self.fails, self.stops, self.commands = fails, stops, []

    def __call__(self, command, log):
        flag = dict(itertools.pairwise(command))
        if len(self.commands) >= self.stops:
            raise Interrupted
        self.commands.append(command)
        if self.fails in " ".join(command):
            raise RuntimeError("train.py ended with code 1: error: no luck")
        if command[1] == "train.py":
            folder = os.path.join(flag["--output_dir"], "epoch-1-step-2")
            os.makedirs(folder)
            Path(folder, "weights").write_text(flag["--learning_rate"])
            Path(flag["--output_dir"], "summary.json").write_text(json.dumps(SUMMARY))
            lines = "".join(json.dumps(line) + "\n" for line in CURVE)
            Path(flag["--output_dir"], "log.jsonl").write_text(lines)
            return
        rate = 0.0
        if flag["--model_path"].endswith("epoch-1-step-2"):
            rate = float(Path(flag["--model_path"], "weights").read_text())
        with open(flag["--predict_path"]) as rows, open(flag["--output_path"], "w") as answers:
            for i, each in enumerate(map(json.loads, rows)):
                right = i < rate * 1000
                prediction = each["output"] if right else "甲_组成_丙"
                answers.write(json.dumps({**each, "prediction": prediction, "ended": True}) + "\n")


def runs_of(tmp_path):
    runs = json.loads((tmp_path / "out" / "runs.json").read_text())["runs"]
    return {(run["method"], run["seed"]): run for run in runs}


def test_each_method_and_seed_is_trained_once_from_the_same_base_and_scored(flags, tmp_path, tiny):
    scripts = Scripts()
    path = compare(parse_args([*flags, "--seeds", "1", "2"]), scripts)
    assert path == str(tmp_path / "out" / "report.html") and os.path.isfile(path)
    runs = runs_of(tmp_path)
    assert set(runs) == {("base", None)} | {(method, seed) for method in METHODS for seed in (1, 2)}
    trainings = [command for command in scripts.commands if command[1] == "train.py"]
    assert len(trainings) == 10 and len(scripts.commands) == 10 + 11
    for command in trainings:
        assert command[command.index("--model_name_or_path") + 1] == tiny["glm3"]
    prefix = [c[c.index("--prefix_projection") + 1] for c in trainings if "ptuning" in c]
    assert prefix == ["True", "False"] * 2
    freeze = next(command for command in trainings if "freeze" in command)
    assert freeze[freeze.index("--freeze_module_name") + 1] == "layers.3."  # a seventh of the four layers, at least one
    run = runs["lora", 2]
    assert {key: run[key] for key in SUMMARY} == SUMMARY and run["curve"] == CURVE
    assert not list((tmp_path / "out").rglob("weights"))  # results of hundreds of GB are not kept


def test_what_is_finished_is_not_done_again(flags, tmp_path):
    args = [*flags, "--seeds", "1", "--methods", "lora", "all"]
    first = Scripts(stops=3)  # base, LoRA's training and prediction
    with pytest.raises(Interrupted):
        compare(parse_args(args), first)
    second = Scripts()
    compare(parse_args(args), second)
    assert [command[1] for command in second.commands] == ["train.py", "predict.py"]
    third = Scripts()
    compare(parse_args(args), third)
    assert third.commands == []
    fourth = Scripts()  # another rate is another run; the other method's stays
    compare(parse_args([*args, "--learning_rates", "lora=5e-3"]), fourth)
    assert ["lora" in " ".join(command) for command in fourth.commands] == [True, True]
    assert runs_of(tmp_path)["lora", 1]["learning_rate"] == 5e-3


def test_a_result_that_was_trained_but_not_scored_is_scored_without_training(flags, tmp_path):
    args = [*flags, "--seeds", "1", "--methods", "lora"]
    with pytest.raises(Interrupted):
        compare(parse_args(args), Scripts(stops=2))
    scripts = Scripts()
    compare(parse_args(args), scripts)
    assert [command[1] for command in scripts.commands] == ["predict.py"]
    assert "epoch-1-step-2" in " ".join(scripts.commands[0])


def test_a_run_that_fails_is_named_and_tried_again_and_does_not_stop_the_others(flags, tmp_path):
    args = [*flags, "--seeds", "1", "--methods", "lora", "all"]
    compare(parse_args(args), Scripts(fails="--train_type lora"))
    assert runs_of(tmp_path)["all", 1]["status"] == "done"
    assert runs_of(tmp_path)["lora", 1]["status"] == "failed"
    for name in ("report.html", "report.md"):
        assert (
            "glm3 lora seed 1: failed. train.py ended with code 1: error: no luck"
            in (tmp_path / "out" / name).read_text()
        )
    scripts = Scripts()
    compare(parse_args(args), scripts)
    assert len(scripts.commands) == 2 and runs_of(tmp_path)["lora", 1]["status"] == "done"


def test_rows_are_held_out_by_what_they_ask_and_never_trained_on(flags, tmp_path):
    rows = [row(i // 2, f"甲_组成_{i}") for i in range(80)]  # each question twice
    write_rows(tmp_path / "train.json", rows)
    compare(parse_args([*flags, "--seeds", "1", "--methods", "lora"]), Scripts())
    parts = {
        name: [json.loads(line) for line in (tmp_path / "out" / "data" / f"{name}.json").read_text().splitlines()]
        for name in ("train", "validation")
    }
    asked = {name: {each["input"] for each in part} for name, part in parts.items()}
    assert len(asked["validation"]) == 10 and len(parts["validation"]) == 20
    assert not asked["train"] & asked["validation"] and len(parts["train"]) == 60


def test_the_sweep_takes_the_best_rate_by_rows_held_out(flags, tmp_path):
    scripts = Scripts()
    compare(parse_args([*flags, "--seeds", "1", "--methods", "lora", "--sweep"]), scripts)
    tried = json.loads((tmp_path / "out" / "runs.json").read_text())["sweep"]
    assert [(each["learning_rate"], each["score"], each["chosen"]) for each in tried] == [
        (0.00067, 0.1, False),
        (0.002, 0.2, False),
        (0.006, 0.6, True),
    ]
    assert runs_of(tmp_path)["lora", 1]["learning_rate"] == 0.006
    for command in scripts.commands:  # no rate is chosen by test rows
        if any("/sweep/glm3/" in part for part in command) and command[1] == "predict.py":
            assert command[command.index("--predict_path") + 1].endswith("data/validation.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "glm4=x"], "--model glm4=x: MODE=FOLDER is needed"),
        (["--model", "glm3=nowhere"], "--model glm3=nowhere: no such folder"),
        (["--model", f"glm3={os.path.dirname(__file__)}"], "config.json is missing"),
        (["--learning_rates", "lora=high"], "--learning_rates lora=high: must be a number"),
        (["--learning_rates", "adapter=1"], "--learning_rates adapter=1: the methods are freeze"),
        (["--test_path", "nowhere"], "--test_path nowhere: no such file"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--validation_rows", "30"], "would leave too few"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(flags, more, message):
    with pytest.raises(UserError, match=message):
        compare(parse_args([*flags, *more]), Scripts())


def test_test_rows_among_the_training_rows_are_refused(flags, tmp_path):
    write_rows(tmp_path / "test.json", [row(3), row(200)])
    with pytest.raises(UserError, match="1 rows of --train_path ask what --test_path asks"):
        compare(parse_args(flags), Scripts())


def test_the_runner_tells_what_a_command_said_and_stops_all(tmp_path):
    runner = Runner(1, 29779)
    code = "import sys; print('x'); print('error: the flag is wrong'); sys.exit(2)"
    with pytest.raises(RuntimeError, match="ended with code 2: error: the flag is wrong"):
        runner([sys.executable, "-c", code], str(tmp_path / "log"))
    with pytest.raises(Interrupted):
        runner([sys.executable, "-c", "import sys; sys.exit(75)"], str(tmp_path / "log"))
    runner.stop()
    with pytest.raises(Interrupted):
        runner([sys.executable, "-c", "print(1)"], str(tmp_path / "log"))


def test_a_whole_comparison_for_real(flags, tmp_path, tiny):
    command = [sys.executable, "-m", "tuning.evaluate.compare", *flags, "--methods", "ptuning-plain", "--seeds", "1"]
    more = ["--train_flags", "--num_train_epochs 1 --data_cache none", "--predict_flags", "--max_length 64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = runs_of(tmp_path)["ptuning-plain", 1]
    assert run["status"] == "done", run["error"]
    # 16 positions of keys and values of 4 layers, 2 groups of 16 numbers each
    assert run["trained"] == 16 * 4 * 2 * 2 * 16
    assert run["memory_gib"] > 0.1 and run["curve"][-1]["step"] == 4
    assert compare_methods.read_json(tmp_path / "out" / "glm3" / "base" / "run.json")["status"] == "done"
