"""Tool calls of ChatGLM3: written as the official chat does, read back by it and by us; their scores; example data."""

import json
import math
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from glm_models.tools import (
    MAX_DEPTH,
    ToolCall,
    ToolCallError,
    answer_text,
    check_name,
    find_call,
    read_answer,
    read_call,
    read_parameters,
    split_reply,
    write_call,
    write_observation,
    write_parameters,
)
from tuning.errors import UserError
from tuning.metrics.tool_calls import NAMES, same_json, tool_rows, tool_scores
from tuning.samples.formats import read_row

ROOT = Path(__file__).resolve().parents[2]


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def official_parser(output: str) -> dict:
    """What the official process_response makes of a call. It runs eval: for text made in this file only."""
    for response in output.split("<|assistant|>"):
        metadata, content = response.split("\n", maxsplit=1)
        content = "\n".join(content.split("\n")[1:-1])

        def tool_call(**kwargs):
            return kwargs

        content = {"name": metadata.strip(), "parameters": eval(content, {"tool_call": tool_call})}
    return content


# ---- writing


def test_calls_are_written_as_the_official_preprocessing_does():
    parameters = {"键": "甲", "n": 3, "ok": True, "x": None, "f": 1.5, "l": [1, "二"]}
    content = block("tool_call(键='甲', n=3, ok=True, x=None, f=1.5, l=[1, '二'])")
    assert write_call("lookup", parameters) == {"role": "assistant", "metadata": "lookup", "content": content}
    assert write_parameters({"键": '引号\'和"双引号"\n换行'}) == block("tool_call(键='引号\\'和\"双引号\"\\n换行')")
    assert write_parameters({"s": "it's", "d": {}, "e": "", "n": -1.0}) == block(
        "tool_call(s=\"it's\", d={}, e='', n=-1.0)"
    )
    assert write_parameters({}) == block("tool_call()")
    assert write_parameters({"far": [math.inf, -math.inf]}) == block("tool_call(far=[1e309, -1e309])")
    # what is no Python keyword argument, and what the official parser would take for the next message
    assert write_parameters({"user-id": 1, "a": 2, "class": "<|assistant|>"}) == block(
        "tool_call(**{'user-id': 1}, a=2, **{'class': '\\x3c|assistant|>'})"
    )


def test_observations_are_text_or_json():
    assert write_observation("10:30\n") == "10:30\n"
    assert write_observation({"codes": ["P0301"], "数量": 1}) == '{"codes": ["P0301"], "数量": 1}'
    assert [write_observation(value) for value in (None, True, [1, 2], 1.5)] == ["null", "true", "[1, 2]", "1.5"]
    with pytest.raises(ToolCallError, match="neither text nor a JSON value"):
        write_observation({1, 2})


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        [1],
        "a=1",
        {1: 2},
        {"a": {1: 2}},
        {"a": (1, 2)},
        {"a": [b"x"]},
        {"a": {"b": math.nan}},
        {"a": 10**5000},
        {"a": {3}},
    ],
)
def test_what_is_no_json_is_refused(parameters):
    with pytest.raises(ToolCallError, match="parameter"):
        write_parameters(parameters)


def test_depth_is_bounded_below_what_the_parser_takes():
    value = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert read_parameters(write_parameters({"a": value})) == {"a": value} == official_call({"a": value})
    with pytest.raises(ToolCallError, match="'a' has more than"):
        write_parameters({"a": [value]})


@pytest.mark.parametrize("name", ["", "  ", " time", "time ", "a\nb", "a<|assistant|>", None, 3])
def test_names_that_would_not_be_read_back_are_refused(name):
    with pytest.raises(ToolCallError, match="name"):
        write_call(name, {})


def official_call(parameters: dict) -> dict:
    call = write_call("t", parameters)
    return official_parser(f"{call['metadata']}\n {call['content']}")["parameters"]  # the space that begins a text


# ---- round trip

ODD = ["'", '"', "\\", "\n", "\r", "\t", "\0", "\x7f", "\u2028", "\ufeff", "\ud800", "`", "```", "<|assistant|>", "{}"]
ODD += [
    "<|user|>",
    "[gMASK]",
    "</s>",
    "é",
    "e\u0301",
    "ａ",
    "ﬁ",
    "甲",
    "😀",
    " ",
    "=",
    ",",
    ")",
    "#",
    "%s",
    "\\x3c",
    "inf",
]
KEYS = ["a", "b2", "键", "class", "None", "user-id", "", "1", "__debug__", "ﬁ", "ａ", "self", "match", "print", "é"]


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice([*ODD, chr(draw.randrange(0x3000))]) for _ in range(draw.randrange(6)))


def random_value(draw: random.Random, depth: int = 0):
    kind = draw.randrange(6 if depth > 3 else 8)
    if kind == 0:
        return draw.choice([None, True, False, 0, 0.0, -0.0, 1e400, -1e400, "", [], {}])
    if kind == 1:
        return draw.randrange(-(10 ** draw.randrange(1, 40)), 10**9)
    if kind == 2:
        return draw.choice([draw.random(), draw.uniform(-1e300, 1e300), 1e-320, 5e22, 0.1 + 0.2])
    if kind < 6:
        return random_text(draw)
    if kind == 6:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {random_text(draw): random_value(draw, depth + 1) for _ in range(draw.randrange(4))}


def exact(value):
    """A value with its types and order: what == does not tell apart."""
    if isinstance(value, dict):
        return [(key, exact(item)) for key, item in value.items()]
    return [exact(item) for item in value] if isinstance(value, list) else (type(value).__name__, repr(value))


def test_what_is_written_is_read_back_by_the_official_parser_and_by_us():
    draw = random.Random(13)
    for _ in range(3000):
        keys = [draw.choice([*KEYS, random_text(draw)]) for _ in range(draw.randrange(5))]
        parameters = {key: random_value(draw) for key in keys}
        name = draw.choice(["time", "读故障码", "get-weather", "a b"])
        call = write_call(name, parameters)
        before = draw.choice(["", "\n 好的，我来查。<|assistant|>"])
        reply = f"{before}{name}\n {call['content']}"
        found = read_call(reply)
        assert found.name == name and exact(found.parameters) == exact(parameters)
        if not before:  # the official parser takes every message of a reply for a call here
            assert exact(official_parser(reply)["parameters"]) == exact(parameters)
        assert json.loads(json.dumps(parameters)) == found.parameters  # hence it is JSON


def test_a_call_is_one_line_between_fences():
    draw = random.Random(14)
    for _ in range(300):
        content = write_parameters({"a": random_value(draw)})
        assert content.count("\n") == 2 and "<|assistant|>" not in content


# ---- reading


def test_a_plain_answer_is_no_call():
    assert read_call("\n 十点半。") is None
    assert read_call("没有换行") is None
    assert read_call("") is None
    assert read_call("time\n```python\ntool_call()\n```<|assistant|>\n 好了") is None
    assert split_reply("\n 好<|assistant|>time \n x\ny") == [("", " 好"), ("time", " x\ny")]


def test_forms_that_the_official_parser_reads_are_read():
    wanted = {"a": "甲乙", "b": [1, 2], "c": {"d": None}}
    for code in (
        "tool_call(a='甲乙', b=[1, 2], c={'d': None})",
        "tool_call(a='甲' '乙', b=(1, 2), c={'d': None},)",
        "  tool_call(\n    a='甲乙',\n    b=[1, 2],  # 二\n    c={'d': None},\n)  ",
        "tool_call(**{'a': '甲乙', 'b': [1, 2]}, c={'d': None})",
    ):
        assert read_parameters(block(code)) == wanted
    assert read_parameters(" " + block("tool_call(a=-1.5)") + "\n") == {"a": -1.5}
    assert read_parameters("```\ntool_call()\n```") == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "a call is a block between"),
        ("tool_call(a=1)", "a call is a block between"),
        ("```python\ntool_call(a='甲", "a call is a block between"),
        ("```python\n```", "a call is a block between"),
        (block(""), "cannot be parsed"),
        (block("tool_call(a='甲"), "cannot be parsed"),
        (block("tool_call(a=1"), "cannot be parsed"),
        (block("tool_call(a=1)\ntool_call(a=2)"), "cannot be parsed"),
        (block("import os"), "cannot be parsed"),
        (block("tool_call(a=1, a=2)"), "given twice"),
        (block("tool_call(a='\0')"), "cannot be parsed"),
        (block("tool_call(a=" + "(" * 5000 + ")"), "cannot be parsed"),
        (block("tool_call(a=" + "-" * 90000 + "1)"), "cannot be parsed|not a literal"),
        (block("tool_call(a=1" + "+1" * 40000 + ")"), "cannot be parsed|not a literal"),
        (block("tool_call(a='" + "x" * 200000 + "')"), "characters, more than"),
        (block("tool_call(a=" + "9" * 5000 + ")"), "cannot be parsed"),
        (block("print(1+1)"), "not one call of tool_call"),
        (block("tool_call"), "not one call of tool_call"),
        (block("tool_call()()"), "not one call of tool_call"),
        (block("x.tool_call(a=1)"), "not one call of tool_call"),
        (block("tool_call(1, a=2)"), "arguments without a name"),
        (block("tool_call(*[1])"), "arguments without a name"),
        (block("tool_call(a=1, **{'a': 2})"), "given twice"),
        (block("tool_call(**[1])"), "not an object"),
        (block("tool_call(a=__import__('os').getcwd())"), "parameter 'a' is not a literal"),
        (block("tool_call(a=true)"), "parameter 'a' is not a literal"),
        (block("tool_call(a=f'{1}')"), "parameter 'a' is not a literal"),
        (block("tool_call(a=1 if 1 else 2)"), "parameter 'a' is not a literal"),
        (block("tool_call(a={1, 2})"), "parameter 'a' is not a literal"),
        (block("tool_call(a=b'x')"), "parameter 'a' is not a literal"),
        (block("tool_call(a=1j)"), "parameter 'a' is not a literal"),
        (block("tool_call(a={1: 2})"), "parameter 'a' is not a literal"),
        (block("tool_call(a=[...])"), "parameter 'a' is not a literal"),
        (block("tool_call(a={[]: 1})"), "parameter 'a' is not a literal"),
    ],
)
def test_what_is_no_call_says_why(content, message):
    with pytest.raises(ToolCallError, match=message) as error:
        read_call(f"time\n{content}")
    assert len(str(error.value)) < 200 and str(error.value).isascii()


def test_cut_and_changed_calls_never_raise_anything_else():
    draw = random.Random(15)
    for _ in range(1500):
        content = write_parameters({draw.choice(["a", "键", "x-y"]): random_value(draw) for _ in range(2)})
        place = draw.randrange(len(content) + 1)
        broken = content[:place] + draw.choice([*ODD, ""]) + content[place + draw.randrange(3) :]
        for text in (content[:place], broken):
            try:
                parameters = read_parameters(text)
            except ToolCallError:
                continue
            assert isinstance(parameters, dict)


def test_reading_is_silent_and_needs_no_torch():
    code = "import sys, glm_models.tools as t\n"
    code += r"assert t.read_parameters('```\ntool_call(a=\'\\d\')\n```') == {'a': r'\d'}" + "\n"
    code += "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# ---- scores


def test_scores_tell_name_and_parameters_apart():
    wanted = ToolCall("weather", {"city": "青河", "n": 1})
    replies = {
        "weather\n ```python\ntool_call(n=1.0, city='青河')\n```": (1, 1, 1, 1),
        "time\n```python\ntool_call(city='青河', n=1)\n```": (1, 0, 1, 0),
        "weather\n```python\ntool_call(city='青河', n=True)\n```": (1, 1, 0, 0),
        "weather\n```python\ntool_call(city='青河')\n```": (1, 1, 0, 0),
        "weather\n```python\ntool_call(city='青河', n=1": (0, 0, 0, 0),
        "\n 青河的天气很好。": (0, 0, 0, 0),
        "\n 好的。<|assistant|>weather\n```python\ntool_call(city='青河', n=1)\n```": (1, 1, 1, 1),
    }
    rows = tool_rows(list(replies), [[wanted]] * len(replies))
    assert [tuple(row) for row in zip(*rows.values(), strict=True)] == list(replies.values())
    means = tool_scores(list(replies), [[wanted]] * len(replies))
    assert means == dict(zip(NAMES, (5 / 7, 4 / 7, 3 / 7, 2 / 7), strict=True))


def test_scores_of_plain_answers_and_of_several_references():
    call = write_call("time", {})
    reply = f"{call['metadata']}\n{call['content']}"
    assert tool_scores(["\n 你好", reply], [["\n 不客气。"], ["\n 不客气。"]]) == dict.fromkeys(NAMES, 0.5)
    assert tool_scores([reply], [["\n 不客气。", reply]]) == dict.fromkeys(NAMES, 1.0)
    # the reference that fits best, not the best part of each
    rows = tool_rows([ToolCall("a", {"x": 1})], [[ToolCall("a", {}), ToolCall("b", {"x": 1})]])
    assert rows["tool_call_right"] == [0.0] and rows["tool_name"] != rows["tool_parameters"]
    with pytest.raises(ValueError):
        tool_scores([], [])
    with pytest.raises(ValueError):
        tool_rows([reply], [])
    with pytest.raises(ValueError, match="list of at least one"):
        tool_rows([reply], [reply])
    broken = "time\n```python\ntool_call(a=\n```"  # a reference, perhaps of a text task, that nothing can read
    assert tool_rows([broken, reply, "好"], [[broken]] * 3)["tool_call_right"] == [1.0, 0.0, 0.0]


def test_an_answer_is_a_call_only_if_it_is_nothing_else():
    call = write_call("time", {"city": "甲"})
    text = answer_text(call["metadata"], call["content"])
    assert read_answer(text) == find_call(text) == ToolCall("time", {"city": "甲"})
    assert answer_text("", "十点半。") == "十点半。"
    plain = (
        "十点\n半",
        "",
        "代码：\n```python\nprint(1)\n```",
        "\n" + text,
        f"{text}<|assistant|>\n 好",
        call["content"],
    )
    assert [read_answer(one) for one in plain] == [None] * len(plain)
    with pytest.raises(ToolCallError, match="a call is a block between"):
        read_answer(text[:-3])
    assert find_call(text[:-3]) is None


def test_same_json():
    same = [(1, 1.0), (0, -0.0), ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}), (None, None), ("é", "é"), (True, True)]
    other = [(1, True), (0, False), (1, "1"), (None, 0), ([1, 2], [2, 1]), ({"a": 1}, {"a": 1, "b": 2}), ([], {})]
    other += [("é", unicodedata.normalize("NFD", "é")), ([True], [1]), (None, False), ({}, None)]
    assert all(same_json(a, b) and same_json(b, a) for a, b in same)
    assert not any(same_json(a, b) or same_json(b, a) for a, b in other)


# ---- the example data


@pytest.fixture
def make_tools(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "data")
    import make_tools

    return make_tools


def test_example_data_is_what_the_script_makes(make_tools, capsys):
    for part, rows in enumerate(make_tools.make_tools()):
        assert (ROOT / "data" / f"tools_{part}.json").read_text(encoding="utf-8") == make_tools.lines_of(rows)
    make_tools.check()
    assert "tools_1: 100 rows" in capsys.readouterr().out
    test = make_tools.read_rows("tools_1.json")
    assert len(make_tools.calls_of(test)) >= 100
    base = make_tools.make_base(300)
    assert not make_tools.calls_of(base) & make_tools.calls_of(test)
    assert 80 <= len([row for row in base if make_tools.calls_of([row])]) <= 100  # a third; the others use words


def test_flags_of_the_script_that_makes_them(make_tools):
    for flags, message in (
        (["--check", "--text", "x"], "--check and --text exclude each other"),
        (["--base", "3"], "--base takes a count and a file"),
        (["--base", "many", "x"], "--base many"),
        (["--repeat", "0", "x", "y"], "--repeat takes a count and a file"),
    ):
        with pytest.raises(UserError, match=message):
            make_tools.parse_args(flags)
    for row in make_tools.make_repeats(50):
        question, answer = (message["content"] for message in row["conversations"])
        assert question == make_tools.REPEAT + answer
    rows = make_tools.read_rows("tools_2.json")
    text = make_tools.tokenizer_text(rows)
    assert "tool_call(city='0', day='0')" in text and make_tools.SYSTEM in text
    for message in (m for row in rows for m in row["conversations"] if m["role"] == "tool"):
        for key in ("city", "name", "system"):
            assert message["parameters"].get(key, "\0") not in text


def test_every_example_call_can_be_written(make_tools):
    for message in (m for row in make_tools.read_rows("tools_2.json") for m in row["conversations"]):
        if message["role"] == "tool":
            check_name(message["name"])
            assert official_call(message["parameters"]) == message["parameters"]


def test_the_rows_of_both_test_files_end_with_a_call_and_with_its_answer(make_tools):
    for call, answer in zip(*map(make_tools.read_rows, ("tools_1.json", "tools_2.json")), strict=True):
        called, answered = read_row(call), read_row(answer)
        wanted = answer["conversations"][-2]
        assert read_answer(called.answer) == (wanted["name"], wanted["parameters"])
        assert called.messages == answered.messages[:-2]
        assert read_answer(answered.answer) is None


def test_example_conversations_are_whole():
    rows = [json.loads(line) for line in (ROOT / "data" / "chat.json").read_text(encoding="utf-8").splitlines()]
    assert 60 <= len(rows) <= 150
    texts = [json.dumps(row["conversations"], ensure_ascii=False) for row in rows]
    assert len(set(texts)) == len(texts)
    for row in rows:
        roles = [message["role"] for message in row["conversations"]]
        start = roles[0] == "system"
        assert roles[start:] == ["user", "assistant"] * (len(roles[start:]) // 2) and len(roles) >= 4, row
        assert all(message["content"] == message["content"].strip() != "" for message in row["conversations"])
    left_out = [m["content"] for row in rows for m in row["conversations"] if m.get("loss") is False]
    assert len(left_out) == 2 and sum(row["conversations"][0]["role"] == "system" for row in rows) == 10
