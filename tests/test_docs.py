"""The documents say what is so: flags and defaults, quoted code, names and links, commands, and both languages alike.

Every command in a document is parsed by the script that it calls. Those of README.md are also run, with tiny models and
few rows, but for those in NOT_RUN.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.launcher import runner

import merge_lora
import predict
import train
from tuning.arguments import compare as compare_arguments
from tuning.arguments import predict as predict_arguments
from tuning.arguments import train as train_arguments
from tuning.arguments.other_names import LAUNCHER
from tuning.engine.ds_config import ds_values, load_ds_config
from tuning.evaluate import forgetting
from tuning.samples.formats import find_flaw

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"README.md": "README_zh.md"} | {
    f"docs/{path.name}": f"docs/zh/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))
}
ALL = [*PAIRS, *PAIRS.values()]


@functools.cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    """The blocks of code in a language, without their own indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in blocks]


def without_fences(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_each_document_is_there_in_both_languages():
    assert sorted(path.name for path in ROOT.glob("docs/*.md")) == sorted(path.name for path in ROOT.glob("docs/zh/*"))


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readmes_are_short(name):
    assert len(read(name).splitlines()) <= 200
    assert len(read(name).encode()) <= 14_000


# Flags. The documents' words for the defaults that have no value of their own.
CHINESE = {
    "required": "必填",
    "all": "全部",
    "none": "无",
    "empty": "空",
    "each epoch": "每个 epoch",
    "the launcher's": "启动器的卡数",
    "the longest reference and a quarter": "最长参考答案再加四分之一",
    "the adapter's with -merged appended": "LoRA 目录名加 -merged",
    "what the adapter's config names": "LoRA 配置中记录的目录",
    "the accelerator, else cpu": "有加速卡用加速卡，否则 cpu",
    "predictions-NAME.jsonl in the model folder": "模型目录下的 predictions-NAME.jsonl",
}
TABLES = {  # document -> a flag that tells its table, and the flags
    "--train_path": ("training.md", train_arguments),
    "--predict_path": ("results.md", predict_arguments),
    "--model_dir": ("results.md", merge_lora),
}


def defaults_in(text: str, telling: str) -> dict[str, str]:
    """Flag -> default, of the table that has the flag `telling` in its first column."""
    tables = re.split(r"\n\n", text)
    (table,) = [part for part in tables if re.search(rf"^\| [^|]*`{telling}`[^|]* \| ", part, re.MULTILINE)]
    found = {}
    for line in table.splitlines():
        names, defaults = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:3])
        names = re.findall(r"`(--\w+)`", names)
        defaults = re.split(r"[,、] ?(?=\S)", defaults) if len(names) > 1 else [defaults]
        found |= dict(zip(names, defaults if len(defaults) > 1 else defaults * len(names), strict=True))
    return {name: default.replace("`", "") for name, default in found.items()}


def same(shown: str, default: str) -> bool:
    try:
        return float(shown) == float(default)
    except ValueError:
        return shown == default


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
@pytest.mark.parametrize("telling", TABLES)
def test_the_tables_have_every_flag_with_its_default(folder, telling):
    name, arguments = TABLES[telling]
    flags = arguments.make_parser().flags.values()
    texts = {flag.name: "required" if flag.required else flag.default_text for flag in flags}
    if "zh" in folder:
        texts = {name: CHINESE.get(text, text) for name, text in texts.items()}
    shown = defaults_in(read(f"{folder}/{name}"), telling)
    assert shown.keys() == texts.keys()
    assert [(name, shown[name], texts[name]) for name in texts if not same(shown[name], texts[name])] == []


# Code and names


def pieces(text: str, lines: int) -> set[str]:
    """Every run of so many lines of a text, without its indentation."""
    rows = text.splitlines()
    return {textwrap.dedent("\n".join(rows[i : i + lines])) for i in range(len(rows) - lines + 1)}


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_loop_is_quoted_from_train_py(name):
    quotes = [quote.rstrip("\n") for quote in fences(read(name), "python")]
    assert [quote.split("(")[0] for quote in quotes] == ["def train_step", "for epoch, batches in training_steps"]
    for quote in quotes:
        assert quote in pieces(read("train.py"), len(quote.splitlines())), f"train.py no longer has\n{quote}"


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", [*ALL, "data/README.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(read(name))):
        if re.match("https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", without_fences(file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), target


def code_spans(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_fences(text))


# Files of ours begin so. (Files that a run writes, or of the official models, are named without a folder.)
OURS = re.compile(r"(\.ci|data|docs|glm_models|scripts|tests|tuning)/[\w./<>-]*|(ds_zero|requirements)\w*\.\w+")


def words_of_code(name: str) -> list[str]:
    """The words in the code spans and the commands of a document."""
    return [word for text in (*code_spans(read(name)), *fences(read(name), "bash")) for word in text.split()]


@pytest.mark.parametrize("name", ALL)
def test_files_and_names_in_them_are_there(name):
    for word in words_of_code(name):
        if re.match(r"(tuning|glm_models)\.\w", word):  # behind python -m
            word = word.replace(".", "/") + ".py"
        path, _, inside = word.partition(":")
        path = path.replace("<mode>", "glm3").replace("<train_type>", "lora")
        if not OURS.fullmatch(path) and path not in ("train.py", "data_set.py", "utils.py"):
            continue
        assert (ROOT / path).exists(), word
        if inside:
            defined = rf"^ *(def|class) {inside}\b|^{inside}(:.*)? = "
            assert re.search(defined, read(path), re.MULTILINE), f"{path} has no {inside}"


# Of Python's argparse, deepspeed's launcher, pip and Slurm.
OTHER_FLAGS = {"--help", "--log_level", "--index-url", "--signal"} | {f"--{name}" for name in LAUNCHER}


@functools.cache
def known_flags() -> set[str]:
    """The flags of our scripts and tools, and OTHER_FLAGS."""
    files = [
        path for part in ("*.py", "tuning/**/*.py", "glm_models/*.py", "tests/**/*.py") for path in ROOT.glob(part)
    ]
    tools = [path for path in files if not path.name.startswith("test_") or path.name == "test_fuzz.py"]
    sources = "\n".join(path.read_text() for path in tools)
    return set(re.findall(r"[\"'](--[\w-]+)[\"']", sources)) | OTHER_FLAGS


@pytest.mark.parametrize("name", ALL)
def test_flags_in_the_text_are_those_of_the_scripts(name):
    found = {word.split("=")[0] for word in words_of_code(name) if re.match(r"--\w", word)}
    assert found - known_flags() == set()


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "docs/extending.md", "docs/zh/extending.md"])
def test_the_file_trees_are_those_of_the_project(name):
    (tree,) = [block for block in fences(read(name), "") if block.startswith("train.py")]
    folder, seen = "", set()
    for line in tree.splitlines():
        indented = line.startswith(" ")
        names = re.match(r"\s*(\S+(?: \S+)*)", line)[1].split()  # two blanks or more are before what it is
        for entry in names:
            found = sorted(ROOT.glob((folder if indented else "") + entry.rstrip("/")))
            assert found, line
            seen |= {path.relative_to(ROOT).as_posix() for path in found}
        folder = folder if indented else names[0]
    missing = {path.name for path in ROOT.glob("*.py")} - seen
    missing |= {f"tuning/{path.parent.name}" for path in ROOT.glob("tuning/*/__init__.py")} - seen
    if "extending" in name:
        missing |= {f"glm_models/{path.name}" for path in ROOT.glob("glm_models/*.py")} - seen
    assert missing == set()


@pytest.mark.parametrize("name", ["docs/troubleshooting.md", "docs/zh/troubleshooting.md"])
def test_quoted_messages_are_those_of_the_code(name):
    sources = "\n".join(path.read_text() for part in ("tuning", "glm_models") for path in ROOT.glob(f"{part}/**/*.py"))
    sources = re.sub(r'"\n\s*f?"', "", sources)  # texts go on in the next line
    symptoms = re.findall(r"^\| ([^|]*) \|", read(name), re.MULTILINE)
    foreign = {"Permission denied", "Address already in use", "g++", "ninja"}  # of the system and other programs
    quoted = {span for symptom in symptoms for span in code_spans(symptom)} - foreign
    assert len(quoted) >= 8
    for message in quoted:
        for part in re.split(r"\.\.\.|ChatGLM2-6B|--mode glm\d|^bf16|this CPU|127\.0\.1\.1|\bnan\b|\b4\b", message):
            assert part.strip() in sources, message


def test_the_example_of_a_method_is_one(tmp_path):
    """docs/extending.md: exactly the biases train."""
    for name in ("docs/extending.md", "docs/zh/extending.md"):
        (code,) = fences(read(name), "python")
        scope = {}
        exec(code, scope)
        model = scope["bias"](None, lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)))
        assert [p.requires_grad for p in model.parameters()] == [False, True, False, True]


@pytest.mark.parametrize("name", ["docs/extending.md", "docs/zh/extending.md"])
def test_the_example_of_an_optimizer_is_accepted(name, tmp_path, places):
    config = json.loads(read("ds_zero2_no_offload.json"))
    (section,) = fences(read(name), "json")
    config |= json.loads(f"{{{section}}}")
    (tmp_path / "ds.json").write_text(json.dumps(config))
    args = train_arguments.parse_args([places.get(word, word) for word in REQUIRED.split()])
    loaded = load_ds_config(str(tmp_path / "ds.json"), ds_values(args, 1, 10, 64), as_gpu=True)
    assert (loaded["optimizer"]["type"], loaded["optimizer"]["params"]["lr"]) == ("Lion", args.learning_rate)


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "docs/data.md", "docs/zh/data.md"])
def test_the_example_of_a_row_is_one(name):
    (row,) = fences(read(name), "json")
    assert find_flaw(json.loads(row)) is None


# Both languages


def sections(text: str) -> list[str]:
    """A document's text by headings; the first one is its title's."""
    return re.split(r"^(?=#+ )", re.sub(r"^\[(中文|English).*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]


def commands_only(block: str) -> str:
    return re.sub(r" *# .*$", "", block, flags=re.MULTILINE)


UNITS = {"万": 10_000, "亿": 100_000_000, "百万": 1_000_000, "million": 1_000_000}


def numbers(text: str) -> set[float]:
    """The numbers in a text outside links: 1,500; 10 million and 1,000 万."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    found = re.findall(rf"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?![\d,]*\.?\d)(?: ?({'|'.join(UNITS)}))?", text)
    return {float(number.rstrip(",").replace(",", "")) * UNITS.get(unit, 1) for number, unit in found}


@pytest.mark.parametrize("english", PAIRS)
def test_both_languages_say_the_same(english):
    ours, theirs = sections(read(english)), sections(read(PAIRS[english]))
    assert [part.split(" ")[0] for part in ours] == [part.split(" ")[0] for part in theirs]  # levels of headings
    for one, other in zip(ours, theirs, strict=True):
        title = one.splitlines()[0]
        for language in ("bash", "json", "python"):
            blocks = [[commands_only(block) for block in fences(part, language)] for part in (one, other)]
            assert blocks[0] == blocks[1], title
        one, other = without_fences(one), without_fences(other)
        assert numbers(one) == numbers(other), title
        spans = [sorted({span for span in code_spans(part) if span.isascii()}) for part in (one, other)]
        assert spans[0] == spans[1], title
        assert one.count("\n|") == other.count("\n|"), title  # rows of tables


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
def test_the_memory_at_a_glance_is_that_of_the_long_table(folder):
    """Rows of four numbers at the end: method, cards, planned of both architectures."""
    long = {}
    for line in read(f"{folder}/memory-and-speed.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[3] in ("yes", "是"):
            long[cells[0].split(",")[0].lower(), len(cells[0].split(",")), cells[2], cells[1]] = cells[6]
    compared = 0
    for line in read("README.md" if folder == "docs" else "README_zh.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[1] in ("1", "4"):
            name, *more = re.split("[,，]", cells[0])
            method = {"P-Tuning v2": "p-tuning", "全参数": "all"}.get(name, name.lower())
            for model, figure in zip(("ChatGLM", "ChatGLM2"), cells[2:], strict=True):
                if figure:
                    assert long[method, 1 + len(more), cells[1], model] == re.match(r"[\d.]+", figure)[0], line
                    compared += 1
    assert compared == 15


# Commands


def commands(text: str) -> list[str]:
    """The commands in the bash blocks of a text, a line each, comments left out."""
    lines = commands_only("\n".join(fences(text, "bash"))).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


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
    "bash scripts/test.sh",
    "python3 -m venv .venv && . .venv/bin/activate",
    "pip install -r requirements.txt",
}
SHORTER = {"train.py": ["--data_cache", "none"], "predict.py": ["--max_length", "300"], "merge_lora.py": []}


def test_the_readmes_commands_run(places, tmp_path, monkeypatch):
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


def table_rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with a word, without its head."""
    table = text.split(f"\n| {first} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.fixture
def launched(tmp_path, places):
    """launched(script, words, variables): the words that a script gives to deepspeed, by a launcher that only prints."""
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
    assert (args.model_name_or_path, args.train_path) == (places["ChatGLM2-6B/"], places["my.json"])
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
            variables = {"MODEL": typed.model_name_or_path, "DATA": typed.train_path, "OUTPUT": typed.output_dir}
            _, told = launched(f"scripts/{mode}/{train_type}.sh", [], variables)
            assert vars(train_arguments.parse_args(told)) == vars(typed)
