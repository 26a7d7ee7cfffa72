"""decoding.py, tables.py and json_rows.py: files of every kind give the same rows, and what is wrong in one is said in
one line, with the file and the line.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc

import pytest

from tuning.errors import DataError
from tuning.samples import decoding, json_rows, tables
from tuning.samples.dataset import DataSettings, InstructionData
from tuning.samples.decoding import is_gb18030
from tuning.samples.formats import Columns
from tuning.samples.row_files import RowError, describe_file, read_rows, scan_rows

ROWS = [
    {"instruction": "抽取故障：", "input": "水泵漏水，发动机过热。", "output": "水泵_部件故障_漏水"},
    {"instruction": "写一首诗", "input": '一行,\n又一行；"引号"\u2028', "output": "春天\t来了;\n真好"},
    {"instruction": "问题", "input": "", "output": "答案", "history": [["你好", "你也好"]], "system": "你是助手。"},
]
NAMES = ["instruction", "input", "output", "history", "system"]
PACK = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def table(rows, delimiter=",", names=NAMES, end="\r\n", quoting=csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        writer.writerow([one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in cells])
    return text.getvalue()


def text_of(kind: str, rows=ROWS) -> str:
    if kind == "lines":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == "array":
        return json.dumps(rows, ensure_ascii=False, indent=1)
    return table(rows, {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind])


def lines_of(kind: str) -> list[int]:
    return {"lines": [1, 2, 3], "array": [2, 7, 12]}.get(kind, [2, 3, 6])


@pytest.fixture
def write(tmp_path):
    def write_file(content: bytes | str, name="rows"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        list(read_rows(path, **options))
    message = str(error.value)
    assert message.startswith(path) and message.isprintable() and len(message) < 1000
    return message.removeprefix(path)


@pytest.mark.parametrize("kind", ["lines", "array", "csv", "tsv", "semicolons"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-8", ""), ("utf-8-sig", ""), ("gb18030", "GB18030 text"), ("utf-16", "UTF-16LE text")]
    + [("utf-16-le", "UTF-16LE text"), ("utf-16-be", "UTF-16BE text")],
)
def test_files_of_every_kind_have_the_same_rows(write, kind, encoding, said):
    content = text_of(kind).encode(encoding)
    for ending, pack in PACK.items():
        path = write(pack(content), f"rows.{kind}{ending}")
        found = list(read_rows(path))
        assert [row for _, row in found] == ROWS
        assert [line for line, _ in found] == lines_of(kind)
        name = {"csv": "a CSV table", "tsv": "a TSV table", "semicolons": "a CSV table"}.get(kind, "")
        packing = {"": "", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}[ending]
        words = ", ".join(filter(None, (name, packing, said)))
        assert describe_file(path) == ([f"{path}: {words}"] if words else [])


def test_they_give_the_same_samples(write, tokenizers):
    samples = [
        list(InstructionData(DataSettings(path, 200, 150), tokenizers["glm3"]).samples)
        for path in (
            write(text_of("lines"), "a.json"),
            write(gzip.compress(text_of("csv").encode("gb18030")), "b.csv.gz"),
            write(text_of("array").encode("utf-16"), "c.json"),
        )
    ]
    assert samples[0] == samples[1] == samples[2] and len(samples[0]) == 3


# Tables


@pytest.mark.parametrize(
    "names",
    ["prompt response history", "content summary", "query response", "id conversations", "messages tools", "text"],
)
def test_columns_are_recognised_as_the_keys_of_rows_are(write, names):
    names = names.split()
    cells = {"id": "7", "history": [["一", "二"]], "text": "一段文字"}
    cells |= {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    cells |= {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}
    cells |= {"tools": [{"type": "function", "function": {"name": "f"}}]}
    row = {name: cells.get(name, name) for name in names}
    found = [
        list(scan_rows(write(content), texts=True))
        for content in (json.dumps(row, ensure_ascii=False), table([row], names=names))
    ]
    assert found[0] == [(1, found[1][0][1])] and found[1][0][0] == 2


def test_columns_that_flags_name_make_a_table(write):
    path = write('问题\t回答\t轮次\n问\t答\t\n问\t答\t"[[""一"", ""二""]]"\n', "rows.tsv")
    assert "line 1: a table needs a header" in refusal(path)
    found = [row for _, row in read_rows(path, columns=Columns("问题", "回答", "轮次"))]
    assert found == [
        {"instruction": "问", "input": "", "output": "答"},
        {"instruction": "问", "input": "", "output": "答", "history": [["一", "二"]]},
    ]


@pytest.mark.parametrize("key", ["input", "history", "system"])
def test_an_empty_cell_is_no_value_where_one_may_be_missing(write, key):
    (row,) = [row for _, row in read_rows(write(f"instruction,output,{key}\na,b, \n"))]
    assert row == {"instruction": "a", "input": "", "output": "b"}


LONG = "长" * (csv.field_size_limit() + 1)
HEADER = "instruction,input,output\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("instruction,input,output,input\na,b,c,d\n", " line 1: the header: two columns have the name 'input'"),
        (",instruction,output\n0,b,c\n", " line 1: the header: column 1 has no name; .*index=False"),
        ("instruction,output,\na,b,\n", " line 1: the header: column 3 has no name"),
        ('instruction,"output\na,b\n', " line 2: the header: a quote that is not closed"),
        ('instruction,"output"x\na,b\n', " line 1: the header: text after the quote that ends a cell"),
        (
            "写一首诗,,春天来了\n写一首诗,,夏天来了\n",
            " line 1: a table needs a header .*here are '写一首诗', '', '春天来了'",
        ),
        (HEADER + "a,b,c\n\na,b\n", " line 4: 2 cells, and 3 columns in the header; a cell with a , .*must be quoted"),
        (HEADER + 'a,"b\nb",c\na,b,c,d\n', " line 4: 4 cells, and 3 columns"),
        (
            HEADER + 'a,b,c\na,"b,c\n' + "a,b,c\n" * 3,
            " line 3: a quote that is not closed; the rest of the table cannot",
        ),
        (HEADER + f"a,{LONG},c\n", rf" line 2: a cell of more than {csv.field_size_limit()} characters"),
        (HEADER + 'a,"er sagt "ja" dazu",c\n', ' line 2: text after the quote .*written twice: ""$'),
        (HEADER + 'a,"er "sagt, dazu",c\n', " line 2: text after the quote .*the rest of the table cannot be read"),
        (HEADER.strip() + "\ra,b,c\ra,b,c\r", " line 1: the header: a carriage return alone .*tr "),
        (HEADER + "a,b\0,c\n", " line 2: NUL bytes"),
        (HEADER + "a,b,\n", " line 2: output is empty"),
        (HEADER, " holds no rows"),
        ("instruction,output,history\na,b,[1\n", r" line 2: the cell 'history' must hold JSON, and begins '\[1'"),
        ("conversations\n你好\n", " line 2: the cell 'conversations' must hold JSON, and begins '你好'"),
        (
            "question,answer\na,b\n",
            " line 2: a row of question, answer; .*in a table name the columns by --prompt_column",
        ),
        ("instruction,output,images\na,b,c.png\n", " line 2: the key 'images' holds .*in a table "),
    ],
)
def test_what_is_wrong_in_a_table_is_said_in_one_line(write, content, says):
    path = write(content, "rows.csv")
    with pytest.raises(DataError, match=f"^{path}{says}"):
        list(read_rows(path))
    message = refusal(path)
    assert "jq" not in message


def test_broken_rows_of_a_table_can_be_left_out(write, tokenizers):
    content = HEADER + 'a,b,c\na,b\n"a"x,"",c\na,"b\nb",c\na,水,c\na,b,c\n'
    path = write(content.encode().replace("水".encode(), b"\xff"))
    found = dict(scan_rows(path))
    kinds = {line: row.flaw.kind for line, row in found.items() if isinstance(row, RowError)}
    assert kinds == {3: "table", 4: "table", 7: "encoding"} and [*found] == [2, 3, 4, 5, 7, 8]
    data = InstructionData(DataSettings(path, 200, 100, skip_bad=True), tokenizers["glm2"])
    assert data.lines.tolist() == [2, 5, 8]
    assert "left out as broken (--on_bad_row skip): 3 rows (lines 3, 4, 7)" in data.summary()


# Encodings


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", ["lines", "csv"])
def test_a_line_that_is_no_text_is_one_broken_row(write, encoding, kind):
    rows = [{"instruction": f"第{i}个问题", "input": "水泵漏水", "output": "换水泵"} for i in range(9)]
    content = text_of(kind, rows).encode(encoding)
    part = "第4".encode(encoding)
    half = {"gb18030": b"\xff", "utf-16-le": b"\x3d\xd8", "utf-16-be": b"\xd8\x3d"}[encoding]
    path = write(content.replace(part, half + part))
    line = 5 + (kind == "csv")
    found = dict(scan_rows(path))
    assert [one for one, row in found.items() if isinstance(row, RowError)] == [line] and len(found) == 9
    said = {"gb18030": "GB18030", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}[encoding]
    assert found[line].flaw.kind == "encoding" and f"not {said} text" in str(found[line])
    if encoding != "gb18030":  # a file that ends within a character
        found = dict(scan_rows(write(content[:-3])))
        assert [one for one, row in found.items() if isinstance(row, RowError)] == [max(found)] and len(found) == 9


def test_lines_of_utf_8_in_a_file_of_gb18030_are_not_taken_for_it(write):
    rows = [{"instruction": "抽取故障", "input": f"第{i}辆车水泵漏水", "output": "换水泵"} for i in range(2000)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = write(b"\n".join(line.encode("gb18030" if i != 1500 else "utf-8") for i, line in enumerate(lines)))
    found = dict(scan_rows(path))
    assert [line for line, row in found.items() if isinstance(row, RowError)] == [1501]
    few = write(b"\n".join(line.encode("utf-8" if i != 3 else "gb18030") for i, line in enumerate(lines[:5])))
    assert describe_file(few) == []
    assert [line for line, row in scan_rows(few) if isinstance(row, RowError)] == [4]


CHINESE = "我们在春天去了北京的公园，看见很多人在那里唱歌跳舞，水泵漏水的故障也修好了。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("봄이 오면 꽃이 피고 새들이 노래합니다. 우리는 공원에 갔습니다. 사람들이 많았습니다.", "euc-kr"),
        ("春になると花が咲き、鳥が歌います。私たちは公園に行きました。", "euc-jp"),
        ("春になると花が咲き、鳥が歌います。私たちは公園に行きました。", "shift-jis"),
        ("我們在春天去了北京的公園，看見很多人在那裡唱歌跳舞，水泵漏水的故障也修好了。", "big5"),
        ("Весной мы пошли в парк и увидели там много людей, которые пели и танцевали.", "windows-1251"),
        ("Im Frühling gingen wir in den Park, ñ é è ü ö ä à ç, großes Glück, schöne Grüße.", "windows-1252"),
        (CHINESE, "utf-8"),
        ("春天来了", "gb18030"),  # too short to be sure
    ],
)
def test_what_is_not_certainly_chinese_is_not_taken_for_gb18030(write, text, encoding):
    assert is_gb18030(CHINESE.encode("gbk"))
    line = json.dumps({"instruction": text, "input": "", "output": "a"}, ensure_ascii=False)
    assert not is_gb18030(f"{line}\n{line}\n".encode(encoding))
    if encoding != "utf-8":
        assert " line 1: not UTF-8 text" in refusal(write(f"{line}\n".encode(encoding)))


def test_gb18030_below_rows_of_ascii(write):
    rows = [{"instruction": "a", "input": "b" * 90, "output": "c"}] * 2000
    path = write(text_of("lines", rows).encode() + text_of("lines").encode("gb18030"))
    assert describe_file(path) == [f"{path}: GB18030 text"]
    assert [row for _, row in read_rows(path)][2000:] == ROWS


# Packed files


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_a_packed_file_that_is_cut_off_or_damaged_is_named(write, ending):
    rows = [{"instruction": f"{random.Random(i).random()}", "input": "水", "output": "泵"} for i in range(5000)]
    packed = PACK[ending](text_of("lines", rows).encode())
    name = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}[ending]
    more = [packed + b"more"] * (ending != ".bz2")  # after which Python reads nothing
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    for content in (packed[: len(packed) // 2], packed[:40], bytes(damaged), *more):
        message = refusal(write(content))
        assert f": its {name} data is cut off or damaged (" in message and "get the file again" in message
        for _, row in zip(range(9), scan_rows(write(packed)), strict=False):
            assert not isinstance(row[1], RowError)


def test_archives_in_a_packed_file_are_named(write):
    assert "is a tar archive" in refusal(write(gzip.compress(bytes(100) + b"a" * 157 + b"ustar" + bytes(300))))
    assert "is compressed with gzip" in refusal(write(gzip.compress(gzip.compress(b"{}"))))
    assert "is empty" in refusal(write(gzip.compress(b"")))


@pytest.mark.parametrize("start", [b"[", b'instruction,output\n"a', b'{"instruction": "', b""])
def test_a_small_file_that_unpacks_to_much_needs_little_memory(write, start, monkeypatch):
    for module in (json_rows, tables):
        monkeypatch.setattr(module, "LONGEST", 1 << 22)
    monkeypatch.setattr(decoding, "BLOCK", 1 << 18)
    file = io.BytesIO()
    with gzip.open(file, "wb", 1) as packed:
        packed.write(start)
        for _ in range(64):
            packed.write((b" " if start == b"[" else b"a") * (1 << 20))
    path = write(file.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            list(read_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


# Sizes


def test_arrays_are_read_piece_by_piece(write, monkeypatch):
    rows = [
        {"instruction": f"第{i}", "input": "水\n" * (i % 50), "output": '泵"\\' * 9, "n": 1 / (i + 1)}
        for i in range(200)
    ]
    for indent in (None, 1):
        text = json.dumps(rows, ensure_ascii=False, indent=indent)
        path = write(text)
        whole = list(scan_rows(path))
        broken = text.replace('"n": 0.0066', '"n" 0.0066')
        with pytest.raises(json.JSONDecodeError) as error:
            json.loads(broken)
        broken = write(broken, "broken")
        problem = refusal(broken)
        assert f"{error.value.msg}, line {error.value.lineno} column {error.value.colno}; the rest" in problem
        with monkeypatch.context() as patch:
            for block in (7, 100, 1000):
                patch.setattr(json_rows, "BLOCK", block)
                assert list(scan_rows(path)) == whole
                assert refusal(broken) == problem


def test_memory_does_not_grow_with_a_table(write):
    path = write(HEADER + "".join(f"a{i},{'水' * 200},c\n" for i in range(20_000)))  # 12 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
