"""Compare the tuning methods: train each from the same base, with several seeds, evaluate all, and write a report.

    python -m tuning.evaluate.compare --model glm3=ChatGLM3-6B/ --train_path data/spo_0.json \\
        --test_path data/spo_1.json --output_dir output-compare

Everything is done by train.py, predict.py and forgetting.py, whose commands are in the report. What is finished is not
done again: the same line goes on after a stop. A run that fails is named in the report and does not stop the others.
"""

import concurrent.futures
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

from tuning import ROOT, exits
from tuning.arguments.compare import METHODS, is_small, parse_args, predict_lengths, training_flags
from tuning.arguments.parser import answer_early

if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)

from glm_models.checkpoint import read_json
from tuning.errors import DataError, UserError
from tuning.evaluate import report
from tuning.exits import clear_errors
from tuning.folders import write_errors, write_file
from tuning.samples.formats import question_of, unused_keys
from tuning.samples.row_files import read_rows

INTERRUPTED = 75  # exit code of a training that saved its state and can go on

# Data


def split_rows(args) -> dict[str, str]:
    """Hold rows of train_path out, the same whatever the seed. Returns paths: train, sweep (part of it), validation.

    A row is held out by the hash of what is asked, so that rows which ask the same stay together.

    Raises:
        UserError: a test row's question is among the training rows, or too few rows are left to train on.
    """
    rows = [row for _, row in read_rows(args.train_path, empty_outputs=True)]
    test = {question_of(row) for _, row in read_rows(args.test_path, several_outputs=True, empty_outputs=True)}
    if unused := unused_keys(rows):
        print(f"{args.train_path}: {unused}")
    if both := sum(question_of(row) in test for row in rows):
        raise UserError(f"{both} rows of --train_path ask what --test_path asks: scores would not be of unseen rows")
    order = sorted({question_of(row) for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(order) < 2 * args.validation_rows:
        raise UserError(
            f"--train_path has {len(order)} different questions: --validation_rows {args.validation_rows} "
            "would leave too few of them to train on"
        )
    held = set(order[: args.validation_rows])
    parts = {"train": [row for row in rows if question_of(row) not in held]}
    parts |= {
        "sweep": parts["train"][: args.sweep_rows],
        "validation": [row for row in rows if question_of(row) in held],
    }
    paths = {}
    for name, part in parts.items():
        paths[name] = os.path.join(args.output_dir, "data", f"{name}.json")
        os.makedirs(os.path.dirname(paths[name]), exist_ok=True)
        write_file(paths[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return paths


# A run: stages of one training, each a command; finished ones are in run.json


class Interrupted(Exception):
    """The comparison is to stop; the same command goes on."""


class Runner:
    """Runs commands of several runs at a time, and stops all of them together.

    Args:
        jobs: how many at a time; on a CPU each gets its share of the cores.
    """

    def __init__(self, jobs: int, port: int):
        self.stopped, self.children, self.lock = threading.Event(), set(), threading.Lock()
        self.ports = [port + i for i in range(jobs)]
        self.threads = max(1, (os.cpu_count() or 1) // jobs)

    def __call__(self, command: list[str], log: str) -> None:
        """Run a command, its output into a file.

        Raises:
            Interrupted: it, or all, were stopped.
            RuntimeError: it failed; the message is what it said last.
        """
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        with open(log, "w", encoding="utf-8") as file:
            with self.lock:
                if self.stopped.is_set():
                    raise Interrupted
                port = self.ports.pop()
                child = subprocess.Popen(
                    [part.replace("{PORT}", str(port)) for part in command],
                    cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self.children.add(child)
            code = child.wait()
            with self.lock:
                self.children.remove(child)
                self.ports.append(port)
        if self.stopped.is_set() or code == INTERRUPTED:
            raise Interrupted
        if code:
            raise RuntimeError(
                f"{command[1] if len(command) > 1 else command[0]} ended with code {code}: {said_last(log)}"
            )

    def stop(self) -> None:
        """Ask all that runs to save its state and end."""
        self.stopped.set()
        with self.lock:
            for child in self.children:
                child.send_signal(signal.SIGTERM)


def said_last(log: str, lines: int = 3) -> str:
    """The error of a log, or its last lines."""
    with open(log, encoding="utf-8", errors="replace") as file:
        text = [line.strip() for line in file if line.strip() and "\r" not in line]
    at = next((i for i, line in enumerate(text) if line.startswith("error:")), len(text) - lines)
    return " ".join(text[max(0, at) :][:lines]) or "it said nothing"


def train_command(args, paths: dict, mode: str, method: str, seed: int, rate: float, folder: str, on: str) -> list[str]:
    """The training of a run, results in folder/training.

    Args:
        on: which rows, a key of paths.
    """
    command = [sys.executable, "train.py"]
    if args.num_gpus > 1:
        command = ["deepspeed", "--log_level", "warning", "--master_port", "{PORT}"]
        command += ["--num_gpus", str(args.num_gpus), "train.py"]
    command += ["--mode", mode, "--model_name_or_path", args.model[mode], "--train_path", paths[on]]
    command += ["--learning_rate", f"{rate:g}", "--seed", str(seed), "--resume_from_checkpoint", "auto"]
    evaluates = on == "train"
    command += ["--eval_path", paths["validation"]] * evaluates
    command += training_flags(args, args.model[mode], method, evaluates)
    return [*command, "--output_dir", os.path.join(folder, "training")]


def predict_command(args, mode: str, model: str, rows: str, output: str) -> list[str]:
    """Answers of a model to a file of rows."""
    command = [sys.executable, "predict.py", "--mode", mode, "--model_path", model, "--predict_path", rows]
    return [*command, "--output_path", output, *predict_lengths(args.model[mode]), *shlex.split(args.predict_flags)]


def do_run(args, paths: dict, runner, folder: str, run: dict, on: str = "train") -> dict:
    """Take a run through its stages: train, predict, forget. Returns it with all that is known of it.

    folder/run.json is written after each stage; stages in it are not done again as long as the commands are the same.

    Args:
        run: mode, method ("base" is the model as it is), seed, learning_rate.
        on: train for a run of the comparison, sweep for one that tries a rate.

    Raises:
        Interrupted: see Runner.
    """
    file = os.path.join(folder, "run.json")
    base, answers = args.model[run["mode"]], os.path.join(folder, "predictions.jsonl")
    rows = paths["validation"] if on == "sweep" else args.test_path
    training = os.path.join(folder, "training")
    commands = {}
    if run["method"] != "base":
        which = run["mode"], run["method"], run["seed"], run["learning_rate"]
        commands["train"] = train_command(args, paths, *which, folder, on)
    commands["predict"] = predict_command(args, run["mode"], "{MODEL}" if commands else base, rows, answers)
    if run["method"] != "base" and on == "train" and args.suite != "none":
        command = [
            sys.executable,
            "-m",
            "tuning.evaluate.forgetting",
            "--mode",
            run["mode"],
            "--base",
            base,
            "--tuned",
            "{MODEL}",
        ]
        command += ["--suite", args.suite] if args.suite else []
        command += ["--max_new_tokens", "32"] if is_small(args.model[run["mode"]]) else []
        commands["forget"] = [*command, "--output", os.path.join(folder, "forgetting.json")]
    key = hashlib.sha256(json.dumps([commands, contents([rows, paths[on], base])]).encode()).hexdigest()

    old = read_json(file) if os.path.isfile(file) else {}
    if old.get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
        old = {"stages": []}
    os.makedirs(folder, exist_ok=True)
    run = {**old, **run, "key": key, "commands": {}, "status": "unfinished", "error": ""}
    write_file(file, json.dumps(run, ensure_ascii=False, indent=1))
    model = base
    try:
        for stage, command in commands.items():
            if stage != "train" and "train" in run["stages"]:
                model = os.path.join(training, run["result"])
            command = [part.replace("{MODEL}", model) for part in command]
            run["commands"][stage] = shlex.join(command)
            if stage in run["stages"]:
                continue
            start, log = time.perf_counter(), os.path.join(folder, f"{stage}.log")
            runner(command, log)
            run[f"{stage}_seconds"] = time.perf_counter() - start
            if stage == "train":
                run |= read_training(training)
            elif stage == "forget":
                found = read_json(os.path.join(folder, "forgetting.json"))
                run["forgetting"] = {name: some["forgetting"] for name, some in found["categories"].items()}
            run["stages"] = [*run["stages"], stage]
            write_file(file, json.dumps(run, ensure_ascii=False, indent=1))
        run["status"] = "done"
        if not args.keep_models:
            remove_weights(training)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        run |= {"status": "failed", "error": str(error)}
    write_file(file, json.dumps(run, ensure_ascii=False, indent=1))
    return run


def contents(paths: list[str]) -> list:
    """What tells that files are the same: of a file its hash, of a model folder sizes and times."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            entries = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(path) if e.is_file())
            found.append(entries)
        else:
            with open(path, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found


def read_training(training: str) -> dict:
    """What a finished training tells of itself: result (name of its folder), sizes, speed, memory, curves.

    Raises:
        ValueError: it has not reached its end.
    """
    path = os.path.join(training, "summary.json")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: the training has not reached its end")
    keys = ("result", "trained", "parameters", "seconds", "tokens_per_second", "memory_gib")
    found = {key: read_json(path)[key] for key in keys}
    size = sum(entry.stat().st_size for entry in os.scandir(os.path.join(training, found["result"])))
    # no test rows seen: `split_rows` refuses them
    return {**found, "output_bytes": size, "seen": 0, **report.read_curves(training)}


def remove_weights(training: str) -> None:
    """Leave of a training what is small: logs, not weights and states."""
    if os.path.isdir(training):
        for entry in os.scandir(training):
            if entry.is_dir() and (entry.name.startswith("epoch-") or entry.name in ("states", "best")):
                shutil.rmtree(entry.path)


# The comparison


def rate_of(args, mode: str, method: str) -> float:
    """The learning rate of a method: the user's, else the default for the model's size."""
    return args.learning_rates.get(method) or METHODS[method][2 if is_small(args.model[mode]) else 1]


def sweep_rates(args, paths: dict, runner, run_all) -> list[dict]:
    """Try a third, once and three times each method's rate on part of the rows; the best on the rows held out is taken.

    Returns:
        A row a training: mode, method, learning_rate, score, chosen. args.learning_rates is not changed.
    """
    todo = {}
    for mode in args.model:
        for method in args.methods:
            for factor in (1 / 3, 1, 3):
                rate = float(f"{rate_of(args, mode, method) * factor:.2g}")
                run = {"mode": mode, "method": method, "seed": args.seeds[0], "learning_rate": rate}
                todo[os.path.join(args.output_dir, "sweep", mode, f"{method}-{rate:g}")] = run
    table = []
    for folder, run in run_all(todo, "sweep").items():
        row = {key: run[key] for key in ("mode", "method", "learning_rate")} | {"score": None, "chosen": False}
        if run["status"] == "done":
            row["score"] = report.mean_score(os.path.join(folder, "predictions.jsonl"))
        table.append(row)
    for mode in args.model:
        for method in args.methods:
            tried = [r for r in table if (r["mode"], r["method"]) == (mode, method) and r["score"] is not None]
            if tried:
                max(tried, key=lambda row: row["score"])["chosen"] = True
    return table


def compare(args, runner=None) -> str:
    """The whole comparison. Returns the report's path.

    Args:
        runner: runs a command, its output into a file; see Runner, which is the default.

    Raises:
        Interrupted: after the stop of what was running; the same call goes on.
    """
    with write_errors(args.output_dir):
        os.makedirs(args.output_dir, exist_ok=True)
    paths = split_rows(args)
    runner = runner or Runner(args.jobs, args.master_port)
    start = time.perf_counter()

    def run_all(todo: dict[str, dict], on: str = "train") -> dict[str, dict]:
        done = {}
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            try:
                work = {
                    pool.submit(do_run, args, paths, runner, folder, run, on): folder for folder, run in todo.items()
                }
                for future in concurrent.futures.as_completed(work):
                    folder = work[future]
                    done[folder] = run = future.result()
                    spent = time.strftime("%H:%M:%S", time.gmtime(time.perf_counter() - start))
                    print(f"[{spent}] {len(done)}/{len(todo)} {folder}: {run['status']} {run['error']}", flush=True)
            except BaseException:  # Ctrl-C too
                pool.shutdown(wait=False, cancel_futures=True)
                getattr(runner, "stop", lambda: None)()
                raise
        return {folder: done[folder] for folder in todo}

    sweep = sweep_rates(args, paths, runner, run_all) if args.sweep else []
    chosen = {(row["mode"], row["method"]): row["learning_rate"] for row in sweep if row["chosen"]}
    todo = {}
    for mode in args.model:
        todo[os.path.join(args.output_dir, mode, "base")] = {"mode": mode, "method": "base", "seed": None}
        for seed in args.seeds:
            for method in args.methods:
                rate = chosen.get((mode, method)) or rate_of(args, mode, method)
                run = {"mode": mode, "method": method, "seed": seed, "learning_rate": rate}
                todo[os.path.join(args.output_dir, mode, f"{method}-seed-{seed}")] = run
    done = run_all(todo)
    settings = {name: str(value) for name, value in vars(args).items()}
    runs = [
        {**run, "predictions": os.path.relpath(os.path.join(folder, "predictions.jsonl"), args.output_dir)}
        for folder, run in done.items()
    ]
    return report.write_report(args.output_dir, runs, settings, sweep)[0]


def main(argv=None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with clear_errors(DataError):
        args = parse_args(argv)
        try:
            path = compare(args)
        except (KeyboardInterrupt, Interrupted):
            print("stopped; the same command goes on", file=sys.stderr)
            os._exit(INTERRUPTED)  # no waiting for threads
        print(f"report: {path}")


if __name__ == "__main__":
    main()
