"""Compare tuning methods: train each from the same base with several seeds, evaluate all, and write a report.

    python -m tuning.evaluate.compare --model glm3=ChatGLM3-6B/ --train_path data/spo_0.json \\
        --test_path data/spo_1.json --output_dir output-compare

The work is done by train.py, predict.py and forgetting.py; their commands are in the report. Finished stages are not
repeated: after a stop, the same command continues. A failed run is named in the report and does not stop the others.
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

from glm_models import check_family
from glm_models.checkpoint import read_json
from tuning.errors import ExitCode, UserError
from tuning.evaluate import report, scores
from tuning.evaluate.inputs import read_curves
from tuning.exits import exit_on_user_errors
from tuning.folders import file_hash, write_errors, write_file
from tuning.hub import find_model
from tuning.samples.formats import question_of, unused_keys
from tuning.samples.row_files import describe_file, read_rows

# Data


def split_rows(args) -> dict[str, str]:
    """Hold out rows of train_path, independently of the seed. Returns paths: train, sweep (a part of it), validation.

    A row is held out by the hash of its question, so that rows with the same question stay together.

    Raises:
        UserError: the question of a test row is among the training rows, or too few rows are left to train on.
    """
    rows = [row for _, row in read_rows(args.train_path, empty_outputs=True)]
    test = {question_of(row) for _, row in read_rows(args.test_path, several_outputs=True, empty_outputs=True)}
    for line in (*describe_file(args.train_path), *describe_file(args.test_path)):
        print(line)
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


# A run: the stages of one training, each a command; run.json lists the finished ones


class Interrupted(Exception):
    """The comparison was stopped; the same command continues it."""


class Runner:
    """Runs commands, several at a time, and stops all of them together.

    Args:
        jobs: number of commands at a time; each gets its share of the CPU cores.
        port: the first of `jobs` ports for the deepspeed launcher.
    """

    def __init__(self, jobs: int, port: int):
        self.stopped, self.children, self.lock = threading.Event(), set(), threading.Lock()
        self.ports = [port + i for i in range(jobs)]
        self.threads = max(1, (os.cpu_count() or 1) // jobs)

    def __call__(self, command: list[str], log: str) -> None:
        """Run a command and write its output to the file `log`.

        Raises:
            Interrupted: this command or the whole comparison was stopped.
            RuntimeError: the command failed; the message has its last output.
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
        if self.stopped.is_set() or code == ExitCode.RESUMABLE:
            raise Interrupted
        if code:
            raise RuntimeError(
                f"{command[1] if len(command) > 1 else command[0]} ended with code {code}: {last_output(log)}"
            )

    def stop(self) -> None:
        """Ask all running commands to save their state and end."""
        self.stopped.set()
        with self.lock:
            for child in self.children:
                child.send_signal(signal.SIGTERM)


def last_output(log: str, lines: int = 3) -> str:
    """The error message in a log, or else its last lines."""
    with open(log, encoding="utf-8", errors="replace") as file:
        text = [line.strip() for line in file if line.strip() and "\r" not in line]
    at = next((i for i, line in enumerate(text) if line.startswith("error:")), len(text) - lines)
    return " ".join(text[max(0, at) :][:lines]) or "it printed nothing"


def train_command(args, paths: dict, mode: str, method: str, seed: int, rate: float, folder: str, on: str) -> list[str]:
    """The command that trains a run, with results in folder/training.

    Args:
        on: the rows to train on, a key of `paths`.
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
    """The command that answers a file of rows with a model."""
    command = [sys.executable, "predict.py", "--mode", mode, "--model_path", model, "--predict_path", rows]
    return [*command, "--output_path", output, *predict_lengths(args.model[mode]), *shlex.split(args.predict_flags)]


def stage_commands(args, paths: dict, folder: str, run: dict, on: str, rows: str) -> dict[str, list[str]]:
    """Stage -> command: train, predict, forget. {MODEL} stands for the folder of the model to evaluate.

    Args:
        rows: the file to answer. For the others see `do_run`.
    """
    base, answers = args.model[run["mode"]], os.path.join(folder, "predictions.jsonl")
    if run["method"] == "base":
        return {"predict": predict_command(args, run["mode"], base, rows, answers)}
    which = run["mode"], run["method"], run["seed"], run["learning_rate"]
    commands = {"train": train_command(args, paths, *which, folder, on)}
    commands["predict"] = predict_command(args, run["mode"], "{MODEL}", rows, answers)
    if on == "train" and args.suite != "none":
        command = [sys.executable, "-m", "tuning.evaluate.forgetting", "--mode", run["mode"]]
        command += ["--base", base, "--tuned", "{MODEL}"]
        command += ["--suite", args.suite] if args.suite else []
        command += ["--max_new_tokens", "32"] if is_small(base) else []
        commands["forget"] = [*command, "--output", os.path.join(folder, "forgetting.json")]
    return commands


def do_run(args, paths: dict, runner, folder: str, run: dict, on: str = "train") -> dict:
    """Do the stages of a run that are not finished yet: train, predict, forget. Returns the run with its results.

    folder/run.json is written after each stage. Its stages are not repeated as long as commands and inputs are the
    same; otherwise the run starts again.

    Args:
        run: mode, method ("base" is the untrained model), seed, learning_rate.
        on: "train" for a run of the comparison, "sweep" for one that tries a learning rate.

    Raises:
        Interrupted: see Runner.
    """
    file = os.path.join(folder, "run.json")
    rows = paths["validation"] if on == "sweep" else args.test_path
    commands = stage_commands(args, paths, folder, run, on, rows)
    inputs = fingerprints([rows, paths[on], args.model[run["mode"]]])
    key = hashlib.sha256(json.dumps([commands, inputs]).encode()).hexdigest()
    old = read_json(file) if os.path.isfile(file) else {}
    if old.get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
        old = {"stages": []}
    os.makedirs(folder, exist_ok=True)
    run = {**old, **run, "key": key, "commands": {}, "status": "unfinished", "error": ""}
    write_file(file, json.dumps(run, ensure_ascii=False, indent=1))
    training = os.path.join(folder, "training")
    try:
        for stage, command in commands.items():
            model = os.path.join(training, run["result"]) if "train" in run["stages"] else ""
            command = [part.replace("{MODEL}", model) for part in command]
            run["commands"][stage] = shlex.join(command)
            if stage in run["stages"]:
                continue
            start = time.perf_counter()
            runner(command, os.path.join(folder, f"{stage}.log"))
            run[f"{stage}_seconds"] = time.perf_counter() - start
            run |= read_training(training) if stage == "train" else read_forgetting(folder) if stage == "forget" else {}
            run["stages"] = [*run["stages"], stage]
            write_file(file, json.dumps(run, ensure_ascii=False, indent=1))
        run["status"] = "done"
        if not args.keep_models:
            remove_weights(training)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        run |= {"status": "failed", "error": str(error)}
    write_file(file, json.dumps(run, ensure_ascii=False, indent=1))
    return run


def fingerprints(paths: list[str]) -> list:
    """Values that are equal if the inputs are: the hash of a file, file sizes and times of a model folder."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            entries = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(path) if e.is_file())
            found.append(entries)
        else:
            found.append(file_hash(path))
    return found


def read_training(training: str) -> dict:
    """The results of a finished training: result (name of its folder), sizes, speed, memory, curves.

    Raises:
        ValueError: the training has not reached its end.
    """
    path = os.path.join(training, "summary.json")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: the training has not reached its end")
    keys = ("result", "trained", "parameters", "seconds", "tokens_per_second", "memory_gib")
    found = {key: read_json(path)[key] for key in keys}
    size = sum(entry.stat().st_size for entry in os.scandir(os.path.join(training, found["result"])))
    # seen: `split_rows` refuses test rows among the training rows
    return {**found, "output_bytes": size, "seen": 0, **read_curves(training)}


def read_forgetting(folder: str) -> dict:
    """The forgetting of each category, nats per answer token."""
    found = read_json(os.path.join(folder, "forgetting.json"))
    return {"forgetting": {name: values["forgetting"] for name, values in found["categories"].items()}}


def remove_weights(training: str) -> None:
    """Delete weights and training states; keep logs."""
    if os.path.isdir(training):
        for entry in os.scandir(training):
            if entry.is_dir() and (entry.name.startswith("epoch-") or entry.name in ("states", "best")):
                shutil.rmtree(entry.path)


# The comparison


def rate_of(args, mode: str, method: str) -> float:
    """The learning rate of a method: from --learning_rates, else the default for the size of the model."""
    return args.learning_rates.get(method) or METHODS[method][2 if is_small(args.model[mode]) else 1]


def sweep_rates(args, paths: dict, runner, run_all) -> list[dict]:
    """Try each method's learning rate times 1/3, 1 and 3 on part of the rows; the best on held-out rows is chosen.

    Returns:
        One row per training: mode, method, learning_rate, score, chosen.
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
            row["score"] = scores.mean_score(os.path.join(folder, "predictions.jsonl"))
        table.append(row)
    for mode in args.model:
        for method in args.methods:
            tried = [r for r in table if (r["mode"], r["method"]) == (mode, method) and r["score"] is not None]
            if tried:
                max(tried, key=lambda row: row["score"])["chosen"] = True
    return table


def compare(args, runner=None) -> str:
    """Run the whole comparison. Returns the path of the report.

    Args:
        runner: called with a command and the path of its log; default: a Runner.

    Raises:
        Interrupted: all running commands were stopped; the same call continues.
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
    with exit_on_user_errors():
        args = parse_args(argv)
        args.model = {mode: find_model(model) for mode, model in args.model.items()}
        for mode, model in args.model.items():
            check_family(model, mode)  # else every training would fail on it, one after the other
        try:
            path = compare(args)
        except (KeyboardInterrupt, Interrupted):
            print("stopped; the same command continues", file=sys.stderr)
            os._exit(ExitCode.RESUMABLE)  # do not wait for threads
        print(f"report: {path}")


if __name__ == "__main__":
    main()
