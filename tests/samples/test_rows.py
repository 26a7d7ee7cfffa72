"""formats.py and file_kinds.py: a row or a file that cannot be trained as it stands is named in one line, with the
file, the line and the way out, and the commands of the way out do what they say; what means nothing to us is named.
"""

import codecs
import json
import shlex
import shutil
import subprocess
import sys

import pytest

from tuning.errors import DataError
from tuning.metrics import references_of, score, with_references
from tuning.samples.dataset import DataSettings, InstructionData
from tuning.samples.row_files import RowError, read_rows, scan_rows

GOOD = {"instruction": "抽取故障：", "input": "水泵漏水。", "output": "水泵_部件故障_漏水"}
needs_jq = pytest.mark.skipif(not shutil.which("jq"), reason="the program jq is not here")


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows, name="rows.json"):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
        return path

    return write_rows


def refusal(path, **options) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(DataError) as error:
        list(read_rows(str(path), **options))
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 1500
    return message


def refused_row(write, row, **options) -> str:
    """What is said of a row on line 2; the row before it is read."""
    path = write(GOOD, row)
    assert next(scan_rows(str(path))) == (1, GOOD)
    message = refusal(path, **options)
    assert message.startswith(f"{path} line 2: ")
    return message


def convert(path, message: str):
    """The file that the last command of a message makes, for those that start with jq or python."""
    start = max(message.rfind("jq -c"), message.rfind("python -c"))
    command = shlex.split(message[start : message.index(" FILE > NEW", start)])
    command[0] = shutil.which("jq") if command[0] == "jq" else sys.executable
    new = path.with_name("new.json")
    with open(new, "wb") as file:
        subprocess.run([*command, str(path)], stdout=file, check=True, timeout=60, env={"PYTHONUTF8": "1"})
    return new


def without(*keys) -> dict:
    return {key: value for key, value in GOOD.items() if key not in keys}


# Keys


MISSPELT = [("instruction", name) for name in ("instuction", "instructions", "instruct")]
MISSPELT += [("input", name) for name in ("inrut", "inptu", "imput", "inpt", "inputs", "input2", "context", "question")]
MISSPELT += [("output", name) for name in ("ouput", "outputs", "ouptut")]


@pytest.mark.parametrize(("meant", "name"), MISSPELT)
def test_a_key_that_nobody_reads_does_not_take_the_place_of_one_that_is_read(write, meant, name):
    for text in (GOOD[meant], [GOOD[meant]]):
        message = refused_row(write, without(meant) | {name: text}, missing_outputs=True)
        assert f"there is no {meant}, but text under the key {name!r}; if that is it: jq -c " in message
    for nothing in ("", None, 7) if meant == "input" else ():
        rows = list(read_rows(str(write(without(meant) | {name: nothing}))))
        assert rows == [(1, without("input") | {name: nothing, "input": ""})]
    list(read_rows(str(write(GOOD | {name: "text"}))))  # with all of ours it is one more key


@pytest.mark.parametrize("name", ["Input", "INPUT", "in_put", " input", "ｉｎｐｕｔ"])
def test_spellings_of_a_key(write, name):
    assert f"the key {name!r} must be written 'input'" in refused_row(write, without("input") | {name: "水"})


@needs_jq
@pytest.mark.parametrize("name", ["inrut", "context"])
def test_a_key_is_renamed_or_left(write, name):
    path = write(without("input") | {name: GOOD["input"]})
    message = refusal(path)
    assert list(read_rows(str(convert(path, message)))) == [(1, without("input") | {name: GOOD["input"], "input": ""})]
    rename = message[: message.index("; if not")]
    assert list(read_rows(str(convert(path, rename)))) == [(1, GOOD)]


def test_rows_without_input_are_whole(write, tokenizers):
    path = write(without("input"), without("input") | {"input": None}, without("input") | {"input": "", "id": "a text"})
    assert [row["input"] for _, row in read_rows(str(path))] == ["", "", ""]
    data = InstructionData(DataSettings(str(path), 200, 100), tokenizers["glm3"])
    assert len({tuple(sample.input_ids) for sample in data.samples}) == 1


def test_other_keys_are_named_in_the_line_on_the_data(write, tokenizers):
    path = write(GOOD | {"id": 1, "来源": "书"}, GOOD | {"id": 2, "\x1b[31m": "x", "k" * 500: []}, name="more.json")
    said = InstructionData(DataSettings(str(path), 200, 100), tokenizers["glm3"]).summary()
    assert "; keys not used: id (2 rows), \\x1b[31m (1 row), " in said
    assert "来源 (1 row)" in said and "kkk... (1 row)" in said and said.isprintable()


LOST = {
    "chat_history": ([["问", "答"]], "earlier turns"),
    "System": ("你是一个助手。", "a system message"),
    "system_prompt": ("你是一个助手。", "a system message"),
    "dialogue": ([{"role": "user", "content": "你好"}], "turns of a conversation"),
    "tools": ([{"name": "get_weather"}], "tools"),
    "loss_weight": (0.5, "a weight for the loss"),
    "images": (["a.png"], "images or sound"),
}


@pytest.mark.parametrize("key", LOST)
def test_keys_that_mean_something_are_refused_by_name(write, key):
    value, holds = LOST[key]
    message = refused_row(write, GOOD | {key: value})
    assert f"the key {key!r} holds {holds}, which would be lost; " in message
    for nothing in ([], "", None, [""]):
        list(read_rows(str(write(GOOD | {key: nothing}))))


@needs_jq
def test_rows_without_such_a_key(write):
    path = write(GOOD | {"chat_history": [["问", "答"]], "it's": 1}, GOOD)
    assert list(read_rows(str(convert(path, refusal(path))))) == [(1, GOOD | {"it's": 1}), (2, GOOD)]


def test_names_of_keys_cannot_write_on_the_terminal(write):
    for key in ("history\x1b[31m", "\x9b31m", "\x7f", "k" * 9000, "\ud83d"):
        row = json.dumps({key: GOOD["input"], "instruction": "a", "output": {"a": 1}})
        refusal(write(row.encode()))
        refusal(write(json.dumps(GOOD | {key: {"history": ["问"]}}).encode()))
        refusal(write(json.dumps({key: [GOOD]}).encode()))


# Other formats


FORMATS = {
    "Prompt-Response": {"Prompt": "水泵漏水", "Response": "换水泵"},
    "completion": {"prompt": "水泵漏水", "completion": "换水泵"},
    "Dolly": {"instruction": "水泵漏水", "context": "", "response": "换水泵"},
    "question-answer": {"Question": "水泵漏水", "Answer": "换水泵", "id": 3},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("as_array", [False, True])
def test_rows_of_other_formats_are_named_and_can_be_converted(write, name, as_array):
    rows = [FORMATS[name], FORMATS[name]]
    path = write(json.dumps(rows).encode()) if as_array else write(*rows)
    message = refusal(path)
    assert "line 1: a row of " in message and "FILE > NEW" in message
    if shutil.which("jq"):
        found = [row for _, row in read_rows(str(convert(path, message)))]
        texts = [(row["instruction"] + row["input"], row["output"]) for row in found]
        assert texts == [("水泵漏水", "换水泵")] * 2


@needs_jq
def test_rows_inside_one_object_are_taken_out(write):
    for whole in ({"data": [GOOD, GOOD]}, {"0": GOOD, "1": GOOD}):
        for indent in (None, 2):
            path = write(json.dumps(whole, indent=indent).encode())
            message = refusal(path)
            assert "all rows" in message
            if "FILE > NEW" in message:
                assert [row for _, row in read_rows(str(convert(path, message)))] == [GOOD, GOOD]


def test_lists_inside_rows_do_not_make_a_file_one_object(write, tokenizers):
    path = write(b'{"instruction": "a', GOOD | {"more": [{"text": "a", "label": "b"}]})
    assert "line 1: not valid JSON" in refusal(path)
    assert InstructionData(DataSettings(str(path), 200, 100, skip_bad=True), tokenizers["glm3"]).lines.tolist() == [2]
    path = write(b'{"instruction": "a", "more": [', GOOD)
    assert "line 1: not valid JSON" in refusal(path)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["一", "二"], "not a list; training takes one answer: join several parts into one string"),
        (7, 'not a number; write it in quotes: "7"'),
        (True, "not true or false; write it as text"),
        ({"故障": "漏水"}, "not an object"),
    ],
)
def test_values_in_the_place_of_strings(write, value, says):
    assert f"output must be a string, {says}" in refused_row(write, GOOD | {"output": value})


def test_python_lists_written_as_text_are_warned_of(write, tokenizers):
    data = InstructionData(
        DataSettings(str(write(GOOD, GOOD | {"output": "['水泵', '漏水']"})), 200, 100), tokenizers["glm3"]
    )
    assert "warning: outputs that are a Python list written as text, as ['a']: 1 row (line 2)" in data.summary()


def test_rows_in_python_s_quotes_can_be_converted(write):
    path = write(str(GOOD).encode(), str(GOOD | {"more": None}).encode())
    assert list(read_rows(str(convert(path, refusal(path))))) == [(1, GOOD), (2, GOOD | {"more": None})]


@pytest.mark.parametrize("mode", ["glm", "glm2", "glm3"])
def test_answers_that_are_the_references_have_full_scores(tokenizers, mode):
    """Full-width characters too, which ChatGLM-6B's vocabulary writes as others."""
    rows = [
        {"output": "空调（后）_部件故障_异响，大"},
        {"output": ["你好：可以吗！", "１２％"]},
        {"output": "plain_a_b"},
    ]
    wanted = [references_of(with_references(row, tokenizers[mode])) for row in rows]
    answers = [tokenizers[mode].as_written(references_of(row))[0] for row in rows]
    encoded = [tokenizers[mode].encode_answer(references_of(row)[0]) for row in rows]
    assert [tokenizers[mode].decode_answer(list(ids)) for ids in encoded] == answers
    assert score("text", answers, wanted)["exact_match"] == 1
    by_file = score("text", answers, [references_of(row) for row in rows])["exact_match"]
    assert by_file == (pytest.approx(1 / 3) if mode == "glm" else 1)


# Files


TEXT = (json.dumps(GOOD, ensure_ascii=False) + "\n") * 3


@pytest.mark.parametrize(("encoding", "named"), [("utf-32", "UTF-32"), ("utf-32-be", "UTF-32BE"), ("big5", "BIG5")])
def test_other_encodings_are_named_and_can_be_converted(write, encoding, named):
    row = (
        GOOD
        if named != "BIG5"
        else {"instruction": "請寫一首詩", "input": "關於春天的風和花", "output": "春風吹過山與海"}
    )
    lines = (json.dumps(row, ensure_ascii=False) + "\n") * 3
    for text in (lines, json.dumps([row] * 3, ensure_ascii=False)):
        path = write(text.encode(encoding))
        message = refusal(path)
        assert f"convert it: iconv -f {named} -t UTF-8 FILE > NEW" in message
        assert [row for _, row in read_rows(str(write(path.read_bytes().decode(named).encode())))] == [row] * 3


def test_utf_8_with_a_mark_and_lines_of_windows(write):
    path = write(codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode())
    assert list(read_rows(str(path))) == [(line, GOOD) for line in (1, 2, 3)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10\n", "is a pointer of git-lfs.*git lfs"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page or XML"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "is compressed with zstd; unpack it: zstd -dc FILE > NEW"),
        (b"PAR1" + bytes(20), "is a Parquet file; convert it"),
        (b"PK\x03\x04" + bytes(26) + b"xl/workbook.xml", "is an Excel workbook; save it as CSV"),
        (bytes(4096), "NUL bytes alone"),
        (b"\n[ ]\n", "holds no rows"),
        (TEXT.strip().encode() + bytes(3), r"line 3: .*NUL bytes"),
        (TEXT.encode() + codecs.BOM_UTF8 + TEXT.encode(), "line 4: .*a byte order mark inside the file.*sed"),
        (json.dumps(GOOD, indent=2).encode(), "line 1: an object over several lines: each line must be one row"),
        (b"# rows\n" + TEXT.encode(), "line 1: .*JSON has no comments"),
        (TEXT.replace("\n", "\r").encode(), "line 1: .*carriage return alone; convert them: tr"),
    ],
)
def test_other_files_are_named(write, content, says):
    path = write(content)
    with pytest.raises(DataError, match=f"^{path}.*{says}"):
        list(read_rows(str(path)))
    assert refusal(path)


def test_a_broken_file_of_lines_says_what_each_row_is(write):
    path = write(GOOD, without("input") | {"inrut": "水"}, GOOD | {"weight": 2}, FORMATS["Dolly"], GOOD)
    found = dict(scan_rows(str(path)))
    kinds = {line: row.flaw.kind for line, row in found.items() if isinstance(row, RowError)}
    assert kinds == {2: "type", 3: "keys", 4: "format"}
