"""The documents say what is so: flags and defaults, quoted code, names and links, and both languages alike.

Their commands: see test_docs_commands.py.
"""

import functools
import json
import re
import textwrap

import pytest
import torch
from documents import ALL, PAIRS, ROOT, code_spans, commands_only, fences, read, without_fences

import merge_lora
from glm_models.convert import __main__ as convert
from glm_models.convert import gguf
from tuning.arguments import predict as predict_arguments
from tuning.arguments import train as train_arguments
from tuning.arguments.other_names import LAUNCHER
from tuning.engine.ds_config import ds_values, load_ds_config
from tuning.samples.dialogue import Dialogue
from tuning.samples.formats import read_row


def test_each_document_is_there_in_both_languages():
    assert sorted(path.name for path in ROOT.glob("docs/*.md")) == sorted(path.name for path in ROOT.glob("docs/zh/*"))


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readmes_are_short(name):
    assert len(read(name).splitlines()) <= 200
    assert len(read(name).encode()) <= 14_000


# Flags. The documents' words for the defaults that have no value of their own.
CHINESE = {
    "as in its training, else 0": "与训练时相同，否则为 0",
    "required": "必填",
    "all": "全部",
    "none": "无",
    "empty": "空",
    "each epoch": "每个 epoch",
    "the ds file's, else linear": "ds 文件里的，否则 linear",
    "the launcher's": "启动器的卡数",
    "the longest reference and a quarter": "最长参考答案再加四分之一",
    "the adapter's with -merged appended": "LoRA 目录名加 -merged",
    "what the adapter's config names": "LoRA 配置中记录的目录",
    "no limit of its own": "不另设上限",
    "what the first conversion kept": "第一次转换时保存的",
    "what the folder names": "目录中记录的",
    "that of the folder": "与目录相同",
    "the accelerator, else cpu": "有加速卡用加速卡，否则 cpu",
    "predictions-NAME.jsonl in the model folder": "模型目录下的 predictions-NAME.jsonl",
}
TABLES = {  # document -> a flag that tells its table, and the flags
    "--train_path": ("training.md", train_arguments),
    "--predict_path": ("results.md", predict_arguments),
    "--model_dir": ("results.md", merge_lora),
    "--tokenizer_only": ("serving.md", convert),
    "--dtype": ("serving.md", gguf),
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
    blocks = fences(read(name), "python")
    assert [block.split("(")[0] for block in blocks] == ["def train_step", "for epoch, batches in training_steps"]
    for quote in (part for block in blocks for part in re.split(r" *\.\.\.\n", block)):  # "..." for lines left out
        quote = textwrap.dedent(quote).rstrip("\n")
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


# Files of ours begin so. (Files that a run writes, or of the official models, are named without a folder.)
OURS = re.compile(r"(\.ci|data|docs|glm_models|scripts|tests|tuning)/[\w./<>-]*|(ds_zero|requirements)\w*\.\w+")


def words_of_code(name: str) -> list[str]:
    """The words in the code spans and the commands of a document."""
    return [word for text in (*code_spans(read(name)), *fences(read(name), "bash")) for word in text.split()]


@pytest.mark.parametrize("name", ALL)
def test_files_and_names_in_them_are_there(name):
    for word in words_of_code(name):
        if re.match(r"(tuning|glm_models)\.\w", word):  # behind python -m
            word = word.replace(".", "/")
            word += "/__main__.py" if (ROOT / word).is_dir() else ".py"
        path, _, inside = word.partition(":")
        path = path.replace("<mode>", "glm3").replace("<train_type>", "lora")
        if not OURS.fullmatch(path) and path not in ("train.py", "data_set.py", "utils.py"):
            continue
        assert (ROOT / path).exists(), word
        if inside:
            defined = rf"^ *(def|class) {inside}\b|^{inside}(:.*)? = "
            assert re.search(defined, read(path), re.MULTILINE), f"{path} has no {inside}"


# Of argparse, the deepspeed launcher, pip, ruff, Slurm, vLLM and llama.cpp.
OTHER_FLAGS = {"--check", "--help", "--log_level", "--index-url", "--signal", "--tokenizer", "--no-jinja", "--lora"}
OTHER_FLAGS |= {"--enable-lora", "--max-lora-rank", "--lora-modules"} | {f"--{name}" for name in LAUNCHER}


@functools.cache
def known_flags() -> set[str]:
    """The flags of our scripts and tools, and OTHER_FLAGS."""
    files = [
        path for part in ("*.py", "tuning/**/*.py", "glm_models/**/*.py", "tests/**/*.py") for path in ROOT.glob(part)
    ]
    long_forms = ("test_fuzz.py", "test_conversations.py", "test_convert.py")
    tools = [path for path in files if not path.name.startswith("test_") or path.name in long_forms]
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


def test_the_example_of_a_method_is_one():
    """docs/extending.md: exactly the biases train."""
    for name in ("docs/extending.md", "docs/zh/extending.md"):
        (code,) = fences(read(name), "python")
        scope = {}
        exec(code, scope)
        model = scope["bias"](None, lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)))
        assert [p.requires_grad for p in model.parameters()] == [False, True, False, True]


@pytest.mark.parametrize("name", ["docs/extending.md", "docs/zh/extending.md"])
def test_the_example_of_an_optimizer_is_accepted(name, tmp_path, tiny):
    config = json.loads(read("ds_zero2_no_offload.json"))
    (section,) = fences(read(name), "json")
    config |= json.loads(f"{{{section}}}")
    (tmp_path / "ds.json").write_text(json.dumps(config))
    words = ["--mode", "glm3", "--model_name_or_path", tiny["glm3"], "--train_path", __file__]
    args = train_arguments.parse_args(words)
    loaded = load_ds_config(str(tmp_path / "ds.json"), ds_values(args, 1, 10, 64), as_gpu=True)
    assert (loaded["optimizer"]["type"], loaded["optimizer"]["params"]["lr"]) == ("Lion", args.learning_rate)


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "docs/data.md", "docs/zh/data.md"])
def test_the_example_of_a_row_is_one(name):
    rows = [line for block in fences(read(name), "json") for line in block.splitlines()]
    assert rows and all(isinstance(read_row(json.loads(row)), Dialogue) for row in rows)


# Both languages


def sections(text: str) -> list[str]:
    """A document's text by headings; the first one is its title's."""
    return re.split(r"^(?=#+ )", re.sub(r"^\[(中文|English).*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]


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
