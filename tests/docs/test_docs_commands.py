"""The commands in the documents.

Each is parsed by the script that it calls. Those of README.md are also run, with tiny models and few rows, except those
in NOT_RUN; the launcher is replaced: train.py runs in one forked process, and for the scripts it only prints.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from documents import PAIRS, ROOT, code_spans, commands, read

import merge_lora
import predict
import train
from glm_models.convert import __main__ as convert
from glm_models.convert import gguf
from tuning.arguments import compare as compare_arguments
from tuning.arguments import predict as predict_arguments
from tuning.arguments import train as train_arguments
from tuning.evaluate import forgetting


@pytest.fixture(scope="module")
def places(tiny, tmp_path_factory):
    """What stands in for the files and folders of the commands: tiny models, few rows, new folders."""
    work = tmp_path_factory.mktemp("commands")
    for name, count in {"spo_0": 6, "spo_1": 2}.items():
        rows = (ROOT / f"data/{name}.json").read_text(encoding="utf-8").splitlines()[:count]
        (work / f"{name}.json").write_text("\n".join(rows), encoding="utf-8")
    result = f"{work}/output-glm3/epoch-2-step-4"  # 6 rows, 4 a step
    return {
        **{f"{title}/": tiny[mode] for mode, title in {"glm": "ChatGLM-6B", "glm2": "ChatGLM2-6B"}.items()},
        "ChatGLM3-6B/": tiny["glm3"],
        "ChatGLM3-6B-Base/": tiny["glm3"],
        "glm3-hf": tiny["glm3"],
        "their-adapter": tiny["glm3"],
        "adgen-chatglm2-6b-pt/checkpoint-3000": tiny["glm2"],
        "corpus.json": f"{work}/spo_0.json",
        "my-tools.json": f"{work}/spo_0.json",
        "data/spo_0.json": f"{work}/spo_0.json",
        "data/spo_1.json": f"{work}/spo_1.json",
        "my.json": f"{work}/spo_0.json",
        **{f"./output-{mode}": f"{work}/output-{mode}" for mode in tiny},
        "output-glm3/epoch-2-step-750": result,
        "output-glm3/epoch-2-step-750-merged": f"{result}-merged",
    }


REQUIRED = "--mode glm3 --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json"  # for ... in a command
PARSERS = {
    "train.py": train_arguments.parse_args,
    "predict.py": predict_arguments.parse_args,
    "merge_lora.py": merge_lora.parse_args,
    "glm_models.convert": convert.parse_args,
    "glm_models.convert.gguf": gguf.parse_args,
    "tuning.evaluate.forgetting": forgetting.parse_args,
    "tuning.evaluate.compare": compare_arguments.parse_args,
}


def split_command(command: str, places: dict[str, str]) -> tuple[str, list[str], list[str]]:
    """Script, the launcher's words before it, and its own words, with what stands in for files."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    at = next(i for i, word in enumerate(words) if word in PARSERS)
    mine = words[at + 1 :]
    if mine[:1] == ["..."]:
        mine = [*REQUIRED.split(), *mine[1:]]
    return words[at], words[:at], [places.get(word, word) for word in mine]


@pytest.fixture
def results(places):
    """Folders that commands before would have made; removed again, for those that make them."""
    made = [Path(path) for name, path in places.items() if "epoch" in name and not os.path.exists(path)]
    for folder in made:
        folder.mkdir(parents=True)
    yield
    for folder in reversed(made):
        folder.rmdir()


@pytest.mark.parametrize("name", PAIRS)
def test_commands_have_flags_that_the_scripts_know(name, places, results, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(read(name)):
        if command.startswith("deepspeed") or "deepspeed --" in command or command.startswith("python "):
            if re.search(r"^python .*\.ds_keys|benchmark|tests/", command):
                continue
            script, launcher, words = split_command(command, places)
            if launcher[0] == "deepspeed":
                assert runner.parse_args([*launcher[1:], script, *words]).user_script == script
            PARSERS[script](words)


SCRIPT = re.compile(r"((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*)bash (scripts/\S+\.sh) ?(.*)")


@pytest.mark.parametrize("name", PAIRS)
def test_scripts_read_the_variables_and_pass_on_the_flags_of_commands(name, places):
    files = ["--train_path", places["data/spo_0.json"], "--test_path", places["data/spo_1.json"]]
    for command in commands(read(name)):
        if match := SCRIPT.fullmatch(command):
            variables, script, words = match.groups()
            text = read(script) + "".join(map(read, re.findall(r"scripts/\w+\.sh", read(script))))
            text += read("scripts/common.sh") * ("common.sh" in text)
            for variable in re.findall(r"([A-Z_]+)=", variables):
                assert f"${{{variable}:-" in text, command
            if "compare" in script:
                compare_arguments.parse_args(["--model", f"glm3={places['ChatGLM3-6B/']}", *files, *shlex.split(words)])


def in_child(main: Callable, words: list[str], log: Path) -> str:
    """What `main` printed in a forked process. It must end well; nobody types anything."""
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, log.read_text()[-3000:]
        return log.read_text()
    code = 99
    try:
        os.chdir(ROOT)
        for stream, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT), (2, os.O_WRONLY | os.O_APPEND)):
            os.dup2(os.open("/dev/null" if stream == 0 else log, mode), stream)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


NOT_RUN = {  # each makes an environment with pip, which takes minutes and a network
    "bash scripts/quickstart.sh",
    "bash scripts/quickstart.sh chat",
    "bash scripts/test.sh",
    "python3 -m venv .venv && . .venv/bin/activate",
    "pip install -r requirements.txt",
}
SHORTER = {"train.py": ["--data_cache", "none"], "predict.py": ["--max_length", "300"], "merge_lora.py": []}


def test_the_readmes_commands_run(places, tmp_path):
    """In their order, as a reader would type them. What each must have made is looked at."""
    made = {
        "--ds_file": lambda log: os.path.isfile(f"{places['output-glm3/epoch-2-step-750']}/adapter_model.safetensors"),
        "--check_data": lambda log: "tokens" in log,
        "--ori_model_dir": lambda log: os.path.isfile(f"{places['output-glm3/epoch-2-step-750-merged']}/config.json"),
        "--predict_path": lambda log: "F1" in log,
        "--instruction": lambda log: log.strip(),
        "--plan": lambda log: "GiB" in log,
    }
    seen = set()
    for number, command in enumerate(commands(read("README.md"))):
        if command in NOT_RUN or command.startswith("MODEL="):  # for that see the next test
            continue
        script, _, words = split_command(command, places)
        if script == "predict.py":
            words = ["200" if word == "1024" else word for word in words]
        words += [*SHORTER[script], *(["--output_dir", str(tmp_path)] * ("--check_data" in words))]
        main = {"train.py": train.main, "predict.py": predict.main, "merge_lora.py": merge_lora.main}[script]
        log = in_child(main, words, tmp_path / f"{number}.log")
        for flag in made.keys() & {*words}:
            assert made[flag](log), f"{command}\n{log}"
            seen.add(flag)
    assert seen == made.keys()


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["chats"], 2), (["chat", "chat"], 2), (["notes"], 2)])
def test_the_quick_start_starts_nothing_at_a_typing_error(words, code):
    run = subprocess.run(["bash", "scripts/quickstart.sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == code and "VENV" in run.stdout
    assert ("error: quickstart.sh takes chat or nothing" in run.stderr) == bool(code)


def table_rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with a word, without its head."""
    table = text.split(f"\n| {first} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.fixture
def launched(tmp_path, places):
    """launched(script, words, variables): what a script gives to deepspeed, by a launcher that only prints it."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\nfor word in "cards=$CUDA_VISIBLE_DEVICES" "$@"; do printf "%s\\n" "$word"; done\n')
    launcher.chmod(0o755)

    def launch(script: str, words: list[str], variables: dict[str, str]) -> tuple[str, list[str]]:
        environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        run = subprocess.run(["bash", script, *words], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        cards, *told = run.stdout.splitlines()
        return cards, [places.get(word, word) for word in told[told.index("train.py") + 1 :]]

    return launch


def test_the_readmes_script_starts_a_training_with_its_variables(places, launched):
    (command,) = [one for one in commands(read("README.md")) if one.startswith("MODEL=")]
    words = shlex.split(command)
    at = words.index("bash")
    variables = dict(word.split("=") for word in words[:at])
    cards, told = launched(words[at + 1], words[at + 2 :], variables)
    assert cards == f"cards={variables['GPUS']}"
    args = train_arguments.parse_args(told)
    assert (args.mode, args.train_type, args.num_train_epochs) == ("glm2", "lora", 3)
    assert (args.model_name_or_path, args.train_path) == (places["ChatGLM2-6B/"], [places["my.json"]])
    assert args.output_dir == variables["OUTPUT"]


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readmes_tables_are_the_twelve_scripts(name, places, launched):
    (command,) = [one for one in commands(read(name)) if "--lora_dim" in one]
    _, _, words = split_command(command, places)
    at, end = words.index("--train_type"), words.index("--output_dir")
    models = table_rows(read(name), "model" if name == "README.md" else "模型")
    methods = table_rows(read(name), "method" if name == "README.md" else "方法")
    assert (len(models), len(methods)) == (3, 4)
    for _, model in models:
        model = [places.get(word, word) for word in shlex.split(code_spans(model)[0])]
        mode = model[1]
        for _, flags, ds_file in methods:
            flags, ds_files = [shlex.split(span) for span in code_spans(flags)], code_spans(ds_file)
            if flags[0][0] == "--train_type":
                method = flags[0]
            else:  # that of the command, with other modules for ChatGLM-6B
                method = [*words[at:end], *(flags[0] if mode == "glm" else ())]
            train_type = method[1]
            method = [*method, "--ds_file", ds_files[0 if mode == "glm" else -1]]
            typed = train_arguments.parse_args([*words[:at], *model, *method])
            variables = {"MODEL": typed.model_name_or_path, "DATA": typed.train_path[0], "OUTPUT": typed.output_dir}
            _, told = launched(f"scripts/{mode}/{train_type}.sh", [], variables)
            assert vars(train_arguments.parse_args(told)) == vars(typed)
