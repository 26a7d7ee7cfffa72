"""Instruction files for test_fuzz.py: rows broken on purpose or by chance, rows with odd keys, files of other encodings
and programs. Each broken row is refused on its line, each whole one comes out, and a key that is not read is named.
"""

import bz2
import collections
import csv
import gzip
import io
import json
import lzma
import random
import re
from pathlib import Path

import pytest
from mutator import mutate_bytes

from glm_models import MODE
from tuning.errors import DataError
from tuning.samples.dataset import DataSettings, InstructionData
from tuning.samples.encoding import encode_sample
from tuning.samples.row_files import RowError, scan_rows

OTHER_TYPES = [b'"\\1": ' + value for value in (b"3", b"true", b"{}", b'["a"]', b"1e3", b"[]")]
EMPTY = [b'"output": ' + value for value in (b'""', b'"  "', b'"\\\\n\\\\t"', '"\u3000"'.encode())]
OTHER_KEYS = [(b'"instruction"', b'"Key"'), (b'"output"', b'"Key"')]
OTHER_KEYS += [(b'"input"', b'"%s"' % name) for name in (b"inrut", b"Input", b"in_put", b"context", b"imput")]

# What other programs read. With a value that says something, a row that has one of these keys is refused.
TURNS = [["前一个问题", "前一个回答"], {"role": "user", "content": "你好"}, {"from": "human", "value": "你好"}]
MEANT_ELSEWHERE = {
    "chathistory": [[["问", "答"]], "问答"],
    "systemprompt": ["你是一个助手。"],
    "messages": [TURNS[1:2], "user: 你好"],
    "conversations": [TURNS[2:], TURNS[:1]],
    "tools": [[{"name": "get_weather"}]],
    "loss": [0.5, False, [0, 0.5]],
    "weight": [2, 0.1, "2"],
    "images": [["a.png"], "a.png"],
}
SAYS_NOTHING = [None, "", " ", [], {}, [[]], [""], [{}], {"a": None}]
METADATA = [
    "id",
    "source",
    "类别",
    "",
    "more\x1b[31m",
    "k" * 3000,
    "\x7f",
    "\x9b1m",
    "a'b",
    '"',
    "lang",
    "\ud83d",
    "\0",
]
VALUES = [None, True, 0, 7, 3.5, "", "x", "一段文字", ["a"], {"a": {"b": [1]}}, [[[]]], "\0", "2" * 500]
FOREIGN_ROWS = [
    lambda text: {"prompt": text, "response": "答", "content": text, "summary": "答"},
    lambda text: {"prompt": text, "response": "答", "history": ["问", "答"]},
    lambda text: {"content": text, "summary": ["答"]},
    lambda text: {"messages": [{"role": "user", "content": text}, {"from": "gpt", "value": "答"}]},
    lambda text: {"conversations": [{"from": "gpt", "value": text}, {"from": "gpt", "value": "答"}]},
    lambda text: {"conversations": [{"role": "user", "content": text}], "tools": []},
    lambda text: {"text": text, "summary": "答"},
    lambda text: {"question": text, "answer": "答", "id": 3},
    lambda text: {"instruction": text, "response": "答", "context": ""},
    lambda text: {"instruction": text, "chosen": "答", "rejected": "不"},
    lambda text: {"data": [{"instruction": text, "input": "", "output": "答"}]},
    lambda text: {"0": {"instruction": text, "input": "", "output": "答"}},
]
CALL = {"name": "f", "arguments": '{"a": [1, null]}'}
CONVERSATIONS = [
    {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "tools": []},
    {
        "conversations": [
            {"role": "system", "content": "短"},
            {"role": "user", "content": "问"},
            {"role": "tool", "name": "f", "parameters": {"a": 1}, "observation": {"b": [2]}, "loss": False},
            {"role": "assistant", "content": "答", "metadata": ""},
        ],
        "tools": [{"name": "f"}],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "问"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": CALL}]},
            {"role": "tool", "tool_call_id": "c", "content": "2"},
            {"role": "assistant", "content": "答", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {
        "conversations": [
            {"from": "human", "value": "问"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "答"},
        ],
        "system": "短",
        "tools": '[{"name": "f"}]',
    },
]
NO_STRINGS = [3, 2.5, True, ["一", "二"], [], {"a": "一"}, [["问", "答"]]]

# Encodings that are not read -> what the message has to say; those that are
ENCODINGS = {"utf-32": "UTF-32", "utf-32-le": "UTF-32LE", "utf-32-be": "UTF-32BE"}
READ_ENCODINGS = ("utf-8", "utf-8-sig", "gb18030", "gbk", "utf-16", "utf-16-le", "utf-16-be")
PACK = (gzip.compress, bz2.compress, lzma.compress)


def write_table(chance: random.Random, rows: list[dict]) -> str:
    """Rows as a table of a random dialect, with the columns in a random order."""
    names, text = [*rows[0]], io.StringIO()
    chance.shuffle(names)
    end, quoting = (
        chance.choice(("\n", "\r\n")),
        chance.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)),
    )
    writer = csv.writer(text, delimiter=chance.choice(",\t;"), lineterminator=end, quoting=quoting)
    writer.writerow(names)
    for row in rows:
        text.write(end * chance.choice((0, 0, 0, 1)))
        writer.writerow([row[name] for name in names])
    return text.getvalue()


def misspell(chance: random.Random, name: str) -> str:
    """A name with one letter lost, doubled, changed or out of its order."""
    while True:
        i = chance.randrange(len(name) - 1)
        letter = chance.choice("abcdefghijklmnopqrstuvwxyz_-")
        wrong = chance.choice(
            (
                name[:i] + name[i + 1 :],
                name[:i] + name[i] + name[i:],
                name[:i] + letter + name[i + 1 :],
                name[:i] + name[i + 1] + name[i] + name[i + 2 :],
                name + "s",
                name.upper(),
            )
        )
        if wrong != name:
            return wrong


def change_part(chance: random.Random, value) -> None:
    """Take away, double or change one part of an object or a list, anywhere in it."""
    while True:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[key], dict | list) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        way = chance.choice(("gone", "twice", "odd", "name"))
        if way == "odd":
            value[key] = chance.choice((None, 0, 1, 0.5, True, False, "", "问", "\ud83d", [], {}, [[]], [{}], {"a": 1}))
        elif way == "gone":
            del value[key]
        elif isinstance(value, list):
            value.insert(chance.randrange(len(value) + 1), value[key])
        else:
            value[chance.choice(("role", "from", "content", "loss", "system", "history", "more", "tool_calls"))] = (
                value[key]
            )
        return


class RowKinds:
    """Kinds of `test_fuzz.Fuzz`, which has `folder` and `tokenizers`."""

    folder: Path
    tokenizers: dict

    def row(self, chance: random.Random) -> dict:
        number = chance.randrange(10**6)
        return {"instruction": "抽取故障：", "input": f"第{number}辆车\n水泵漏水。", "output": f"水泵_漏水{number}"}

    BREAKS = {  # ways to break the bytes of a row for certain, by kind of file that can go on after it
        "any": [
            lambda chance, text: (
                text[:-1] + b', "more": ' + chance.choice((b"NaN", b"-Infinity", b"[Infinity]")) + b"}"
            ),
            lambda chance, text: text[:-1] + b', "' + chance.choice((b"input", b"output")) + b'": "other"}',
            lambda chance, text: text[:-1] + b', "more": [{"a": 1, "a": 1}]}',
            lambda chance, text: text.replace("水".encode(), chance.choice((b"\xff", b"\xe6\xb0", b"\xed\xa0\x80")), 1),
            lambda chance, text: text.replace(
                "水".encode(), chance.choice((b"\\ud83d", b"\\ude00", b"\t", b"\x1f")), 1
            ),
            lambda chance, text: text.replace(*chance.choice(OTHER_KEYS)),
            lambda chance, text: re.sub(b'"(input|output)": "[^"]*"', chance.choice(OTHER_TYPES), text, count=1),
            lambda chance, text: re.sub(b'"(instruction|output)": "[^"]*"', b'"\\1": null', text, count=1),
            lambda chance, text: re.sub(b'"output": "[^"]*"', chance.choice(EMPTY), text),
            lambda chance, text: chance.choice((b"3", b"null", b"true", b'"text"', b"[]", b"{}", b"[" + text + b"]")),
        ],
        "lines": [  # in an array these hide what follows
            lambda chance, text: text[: chance.randrange(1, len(text))],
            lambda chance, text: text[chance.randrange(1, len(text)) :],
            lambda chance, text: text + chance.choice((b"}", b",", b"x", text, b"\0")),
            lambda chance, text: text.replace(b'": "', b'" "', 1),
            lambda chance, text: text.replace(b'", "', b'" "', 1),
            lambda chance, text: text.replace("水".encode(), b"\\x", 1),
            lambda chance, text: chance.choice((b"[", b'{"a":')) * chance.choice((1, 3000, 100_000)),
            lambda chance, text: b"\xef\xbb\xbf" * 2 + text,  # one is a byte order mark at the start of a file
        ],
    }

    def rows(self, chance: random.Random) -> None:
        """Rows broken on purpose never come out, the others do, with the samples that they have alone."""
        mode = chance.choice(list(MODE))
        tokenizer, is_array = self.tokenizers[mode], chance.random() < 0.3
        rows = [self.row(chance) for _ in range(chance.randrange(2, 12))]
        texts = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        broken = {i for i in range(len(rows)) if chance.random() < 0.4}
        ends = None  # the row behind which an array cannot be read
        for i in sorted(broken):
            kinds = ["any"] if is_array and (ends is not None or chance.random() < 0.8) else ["any", "lines"]
            kind = chance.choice(kinds)
            if is_array and kind == "lines":
                ends, texts[i] = i, texts[i].replace(b'": "', b'" "', 1)
            else:
                texts[i] = chance.choice(self.BREAKS[kind])(chance, texts[i])
        blank = chance.choice((b"", b"\n", b" \n\r\n"))
        end = chance.choice((b"\n", b"\r\n"))
        content = b"\xef\xbb\xbf" * (chance.random() < 0.2)
        lines = []
        if is_array:
            content += b"["
        for i, text in enumerate(texts):
            content += (end if is_array and i == 0 else b"") + blank * (chance.random() < 0.2)
            lines.append(content.count(b"\n") + 1)
            content += text + (b"," if is_array and i < len(texts) - 1 else b"") + end
        if is_array:
            content += b"]" + end
        if not is_array and texts[0].lstrip().startswith(b"["):
            return  # means an array
        path = self.folder / "rows.json"
        path.write_bytes(content)
        right = [i for i in range(len(rows)) if i not in broken]
        if broken:
            with pytest.raises(DataError, match=f"line {lines[min(broken)]}: "):
                InstructionData(DataSettings(str(path), 200, 100), tokenizer)
        if not right or ends is not None:
            with pytest.raises(DataError):
                InstructionData(DataSettings(str(path), 200, 100, skip_bad=True), tokenizer)
            raise DataError
        try:
            data = InstructionData(DataSettings(str(path), 200, 100, skip_bad=True), tokenizer)
        except DataError as error:
            raise AssertionError(f"rows that are whole are refused: {error}") from error
        assert data.lines.tolist() == [lines[i] for i in right], (data.lines.tolist(), lines, broken)
        assert list(data.samples) == [encode_sample(tokenizer, rows[i], 200, 100) for i in right]

    def row_bytes(self, chance: random.Random) -> None:
        """A line that random changes of bytes missed comes out, and what comes out stands there."""
        rows = [self.row(chance) for _ in range(chance.randrange(1, 8))]
        texts = [json.dumps(row, ensure_ascii=chance.random() < 0.3).encode() for row in rows]
        content = b"[\n" + b",\n".join(texts) + b"\n]\n" if chance.random() < 0.3 else b"\n".join(texts) + b"\n"
        content = mutate_bytes(chance, content, chance.choice((1, 1, 2, 5)))
        path = self.folder / "bytes.json"
        path.write_bytes(content)
        found = dict(scan_rows(str(path)))  # raises where there is no row
        content = content.removeprefix(b"\xef\xbb\xbf")
        is_array = content.lstrip()[:1] == b"["
        by_line = dict(enumerate(content.split(b"\n"), 1))
        for line, row in found.items():
            if isinstance(row, RowError):
                assert f"line {line}: " in str(row)
                continue
            assert all(type(row[key]) is str for key in ("instruction", "input", "output"))
            assert (row["instruction"] + row["input"]).strip() and row["output"].strip()
            "".join(row[key] for key in ("instruction", "input", "output")).encode()
            if not is_array:
                written = json.loads(by_line[line].decode())
                assert written | {"input": written.get("input") or ""} == row
        if not is_array:
            assert found.keys() == {line for line, text in by_line.items() if text.strip()}
            original = dict(zip(texts, rows, strict=True))
            for line, text in by_line.items():
                if text in original:
                    assert found[line] == original[text]
        data = InstructionData(DataSettings(str(path), 200, 100, skip_bad=True), self.tokenizers["glm3"])
        self.check_unused(data, [row for row in found.values() if not isinstance(row, RowError)])

    @staticmethod
    def check_unused(data: InstructionData, rows: list[dict]) -> None:
        """Each key that is not read is counted, and the line on the data names it if there are few."""
        counts = collections.Counter(key for row in rows for key in row.keys() - {"instruction", "input", "output"})
        assert bool(counts) == ("keys not used: " in data.summary())
        if len(counts) <= 5:
            assert sum(data.unused.values()) == counts.total()
        said = data.summary()
        assert said.isprintable() and len(said) < 2000, ascii(said)
        said.encode()

    def odd_row(self, chance: random.Random) -> tuple[dict, dict | None]:
        """A row with something odd, and what it means to us; None if it has to be refused."""
        row = self.row(chance)
        way = chance.choice(("metadata", "metadata", "empty", "input", "lost", "inside", "name", "format", "type"))
        if way == "metadata":
            return row | {chance.choice(METADATA): chance.choice(VALUES) for _ in range(chance.choice((1, 2, 9)))}, row
        if way == "input":
            short = {"instruction": row["instruction"], "output": row["output"]}
            return short | chance.choice(({}, {"input": None}, {"input": ""}, {"id": "7"})), short | {"input": ""}
        if way in ("empty", "lost", "inside"):
            key = chance.choice(list(MEANT_ELSEWHERE))
            value = chance.choice(SAYS_NOTHING if way == "empty" else MEANT_ELSEWHERE[key])
            if way == "inside" and key == "images":
                way = "lost"  # inside others they may be anything
            key = chance.choice((key, key.title(), key.upper(), f"{key[:3]}_{key[3:]}", f" {key}"))
            more = {"more": [{"a": {key: value}}]} if way == "inside" else {key: value}
            return {**more, **row} if chance.random() < 0.5 else row | more, row if way == "empty" else None
        if way == "name":
            key = chance.choice(list(row))
            wrong = (
                misspell(chance, key)
                if chance.random() < 0.7 or key != "input"
                else chance.choice(("context", "query"))
            )
            return {(wrong if name == key else name): value for name, value in row.items()}, None
        if way == "format":
            return chance.choice(FOREIGN_ROWS)(row["input"]), None
        return row | {chance.choice(list(row)): chance.choice(NO_STRINGS)}, None

    def row_keys(self, chance: random.Random) -> None:
        """Rows that say more than we read are refused by name; keys that are not read are named."""
        mode = chance.choice(list(MODE))
        tokenizer = self.tokenizers[mode]
        rows = [self.odd_row(chance) if chance.random() < 0.4 else 2 * (self.row(chance),) for _ in range(4)]
        texts = [
            json.dumps(row, ensure_ascii=chance.random() < 0.3).encode("utf-8", "backslashreplace") for row, _ in rows
        ]
        is_array = chance.random() < 0.3
        path = self.folder / "keys.json"
        path.write_bytes(b"[" + b",\n".join(texts) + b"]\n" if is_array else b"\n".join(texts) + b"\n")
        found = dict(scan_rows(str(path)))
        assert list(found) == [1, 2, 3, 4]
        for line, (row, meant) in enumerate(rows, 1):
            if meant is not None:
                assert not isinstance(found[line], RowError), str(found[line])
                assert found[line] == row | {"input": meant["input"]}
                continue
            assert isinstance(found[line], RowError), row
            message = str(found[line])
            assert message.startswith(f"{path} line {line}: ") and message.isprintable() and len(message) < 2000
        right = [(row, meant) for row, meant in rows if meant is not None]
        if len(right) < len(rows):
            first = next(line for line, (_, meant) in enumerate(rows, 1) if meant is None)
            with pytest.raises(DataError, match=f"line {first}: "):
                InstructionData(DataSettings(str(path), 200, 100), tokenizer)
        data = InstructionData(DataSettings(str(path), 200, 100, skip_bad=True), tokenizer)
        assert list(data.samples) == [encode_sample(tokenizer, meant, 200, 100) for _, meant in right]
        self.check_unused(data, [row for row, _ in right])
        if len(right) < len(rows):
            raise DataError  # rightly refused as a whole

    def row_conversations(self, chance: random.Random) -> None:
        """Conversations with parts taken away, doubled or changed: refused on their line, or samples for ChatGLM3."""
        rows = []
        for _ in range(4):
            row = json.loads(json.dumps(chance.choice(CONVERSATIONS)))
            for _ in range(chance.choice((0, 1, 1, 2))):
                change_part(chance, row)
            rows.append(row)
        path = self.folder / "conversations.json"
        lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") for row in rows]
        path.write_bytes(b"\n".join(lines))
        found = dict(scan_rows(str(path)))
        assert list(found) == [1, 2, 3, 4]
        for line, row in found.items():
            if isinstance(row, RowError):
                message = str(row)
                assert message.startswith(f"{path} line {line}: ") and message.isprintable() and len(message) < 2000
            elif rows[line - 1] in CONVERSATIONS:
                assert row == rows[line - 1] | {"output": "答"}
        right = [line for line, row in found.items() if not isinstance(row, RowError)]
        data = InstructionData(DataSettings(str(path), 900, 800, skip_bad=True), self.tokenizers["glm3"])
        assert data.lines.tolist() == right and min(data.answer_lengths) > 1
        said = data.summary()
        assert said.isprintable() and len(said) < 2000, ascii(said)
        if len(right) < len(rows):
            raise DataError  # rightly refused as a whole

    def row_files(self, chance: random.Random) -> None:
        """Whole files that are none of ours: what they are is said. Ours come out whole, in every encoding of UTF-8."""
        rows = [self.row(chance) for _ in range(chance.randrange(1, 6))]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if chance.random() < 0.3:
            text = json.dumps(rows, ensure_ascii=False, indent=chance.choice((None, 2))) + "\n"
        content, says = self.other_file(chance, rows, text)
        path = self.folder / "file.json"
        path.write_bytes(content)
        for skip_bad in (False, True) if says else (False,):
            try:
                data = InstructionData(DataSettings(str(path), 200, 100, skip_bad=skip_bad), self.tokenizers["glm2"])
            except DataError as error:
                assert says, f"a whole file is refused: {error}"
                assert says in str(error) and str(path) in str(error) and str(error).isprintable(), str(error)
            else:
                if says == "NUL" and skip_bad and len(rows) > 1:  # the last line alone is broken
                    assert data.findings["json"][0] == 1
                    rows = rows[:-1]
                else:
                    assert not says, f"taken as it is: {content[:60]!r}"
                assert list(data.samples) == [encode_sample(self.tokenizers["glm2"], row, 200, 100) for row in rows]
        if says:
            raise DataError

    @staticmethod
    def other_file(chance: random.Random, rows: list[dict], text: str) -> tuple[bytes, str]:
        """The bytes of a file, and a word of the message; "" if the file is to be read."""
        way = chance.choice(("read", "read", "read", "cut", "encoding", "pointer", "nul", "other"))
        if way in ("read", "cut"):
            text = write_table(chance, rows) if chance.random() < 0.5 else "\n" * chance.randrange(2) + text
            content = text.encode(chance.choice(READ_ENCODINGS))
            if way == "read":
                return (chance.choice(PACK)(content) if chance.random() < 0.5 else content), ""
            packed = chance.choice(PACK)(content)
            return packed[: chance.randrange(20, len(packed) - 1)], "is cut off or damaged"
        if way == "encoding":
            encoding = chance.choice(list(ENCODINGS))
            return text.encode(encoding), ENCODINGS[encoding]
        if way == "pointer":
            oid = chance.randbytes(32).hex()
            return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 10\n".encode(), "git lfs pull"
        if way == "nul":
            return (b"\0" * 4096, "NUL") if chance.random() < 0.5 else ((text.rstrip() + "\0" * 9).encode(), "NUL")
        return chance.choice(
            (
                (b"", "no rows"),
                (b"<!DOCTYPE html><html>404</html>", "web page"),
                (b"PAR1" + bytes(40) + b"PAR1", "Parquet"),
                (b"PK\x03\x04" + bytes(26) + b"xl/workbook.xml", "Excel"),
                (b"[]", "no rows"),
                (json.dumps(rows[0], indent=2).encode(), "over several lines"),
                (json.dumps({"data": rows}, ensure_ascii=False).encode(), "take them out"),
                (("\n".join(map(str, rows))).encode(), "Python's quotes"),
            )
        )
