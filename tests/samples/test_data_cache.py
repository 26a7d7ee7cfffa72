"""Preparation of data: many rows at once give what one at a time gives; what is on disk is used when it is right, and
only then; the first broken row of the file is the one that is named.
"""

import gzip
import json
import lzma
import multiprocessing
import os
from dataclasses import replace
from unittest.mock import Mock, call

import numpy as np
import pytest

from glm_models import MODE
from tuning.errors import DataError
from tuning.samples import cache, dataset, row_files
from tuning.samples.dataset import DataSettings, InstructionData, prepare
from tuning.samples.encoding import encode_sample, encode_samples
from tuning.samples.formats import to_dialogue

modes = pytest.mark.parametrize("mode", MODE)

WORDS = [
    "水泵",
    "漏水。",
    " ",
    "  ",
    "   ",
    "\n",
    "\t",
    "\n\n",
    "é",
    "😀",
    "abc",
    "：",
    "答：",
    "问：",
    "<|user|>",
    "\r",
    "12.6伏",
]


def odd_rows(count, longest=60):
    """Rows of all lengths with white space, bytes and template words anywhere; some without an answer."""
    random = np.random.default_rng(5)

    def text(most):
        return "".join(random.choice(WORDS, random.integers(0, most)))

    rows = [{"instruction": text(4), "input": "q" + text(longest), "output": text(25)} for _ in range(count)]
    rows[0] |= {"instruction": "", "input": "q", "output": ""}
    rows[1]["input"] = " " * 200 + "\n\n" * 40
    return rows


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.json"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", newline="\n")
        return str(path)

    return write


def plain_sample(tokenizer, row, max_len, max_src_len):
    """The rules said once more, with an uncut prompt beside the cut one."""
    query = row["instruction"] + row["input"]
    prompt = tokenizer.encode_prompt(query, max_src_len=max_src_len)
    answer = [*tokenizer.encode_answer(row["output"]), tokenizer.eos_token_id]
    room = max_len - len(prompt)
    ids = prompt + answer[:room]
    return ids, ((len(prompt), len(ids)),), prompt != tokenizer.encode_prompt(query), len(answer) > room


@modes
def test_many_rows_at_once_are_what_each_alone_is(tokenizers, mode):
    tokenizer, rows = tokenizers[mode], odd_rows(150)
    samples = encode_samples(tokenizer, [to_dialogue(row) for row in rows], 70, 40, threads=2)
    assert [tuple(sample)[:4] for sample in samples] == [plain_sample(tokenizer, row, 70, 40) for row in rows]
    assert list(samples) == [encode_sample(tokenizer, row, 70, 40) for row in rows]
    for kind in ("prompt_cut", "answer_cut"):
        assert 20 < sum(getattr(sample, kind) for sample in samples) < 130
    ids = tokenizer.sp_model.encode("水泵漏水")  # the batched call of the library against its plain one
    assert tokenizer.encode_text("水泵漏水")[-len(ids) :] == [
        i + getattr(tokenizer, "num_image_tokens", 0) for i in ids
    ]


@pytest.mark.parametrize("mode", ["glm", "glm2"])
def test_asking_about_the_ends_of_a_query_is_asking_about_all_of_it(tokenizers, mode):
    """The short cut against the long way, which must not be taken always."""
    tokenizer = tokenizers[mode]
    before, after = "[Round 1]\n\n问：", "\n\n答："
    spared = 0
    for row in odd_rows(150):
        query = row["instruction"] + row["input"]
        ids = np.array(tokenizer.sp_model.encode(before + query + after))
        find = Mock(wraps=tokenizer._find_template)
        expected = tokenizer._find_template(before, query, after)[:2]
        assert tokenizer._template_pieces(before, query, after, ids, find) == expected
        spared += call(before, query, after) not in find.mock_calls
    assert spared > 75


@modes
@pytest.mark.parametrize(("is_skip", "processes"), [(False, 1), (True, 1), (False, 3)])
def test_a_prepared_file_holds_what_the_rows_give_in_any_pieces(
    tokenizers, mode, is_skip, processes, write, tmp_path, monkeypatch
):
    tokenizer, rows = tokenizers[mode], odd_rows(60)
    path = write(["", *rows])  # the empty line counts
    monkeypatch.setattr(row_files, "PIECE_ROWS", 7)
    monkeypatch.setattr(dataset, "processes_for", lambda *_: processes)
    settings = DataSettings(path, 70, 40, is_skip, True)
    data = InstructionData(settings, tokenizer, prepare(settings, tokenizer, str(tmp_path / "new" / "cache")))
    each = [(i, encode_sample(tokenizer, row, 70, 40)) for i, row in enumerate(rows, 2)]
    cut = sum(sample.prompt_cut or sample.answer_cut for _, sample in each)
    assert data.prompts_cut == sum(sample.prompt_cut for _, sample in each)
    assert data.answers_cut == sum(sample.answer_cut for _, sample in each)
    assert data.skipped == (cut if is_skip else 0)
    kept = [(i, s) for i, s in each if not is_skip or not (s.prompt_cut or s.answer_cut)]
    assert 0 < cut < len(rows)
    assert list(zip(data.lines.tolist(), data.samples, strict=True)) == kept
    assert data.lengths.tolist() == [len(sample.input_ids) for _, sample in kept]
    assert data.answer_tokens([0, 3]) == sum(len(s.learnt) for _, s in (kept[0], kept[3]))
    assert f"{len(kept)} samples, {data.lengths.sum()} tokens" in data.summary()
    # and in one piece, not kept on disk
    monkeypatch.setattr(row_files, "PIECE_ROWS", 1000)
    assert list(InstructionData(settings, tokenizer).samples) == list(data.samples)


def test_several_processes_write_the_very_file_of_one(tokenizers, write, tmp_path, monkeypatch):
    """With all that is counted beside the samples: broken rows, repeats, special tokens, keys that nothing reads."""
    rows = odd_rows(100)
    rows[50:53] = [rows[3], rows[4] | {"output": "other"}, "{"]
    rows[70] |= {"source": "a", "output": "<|user|>"}
    settings = DataSettings(write(rows), 70, 40, empty_outputs=True, skip_bad=True)
    monkeypatch.setattr(row_files, "PIECE_ROWS", 7)
    files = []
    for processes in (1, 3):
        monkeypatch.setattr(dataset, "processes_for", lambda *_, processes=processes: processes)
        path = prepare(settings, tokenizers["glm3"], str(tmp_path / str(processes)))
        with open(path, "rb") as file:
            files.append(file.read())
    assert files[0] == files[1]
    header = json.loads(files[0][: cache.HEADER])["counts"]
    assert header["findings"].keys() == {"json", "duplicate", "contradiction", "special_tokens"}
    assert header["unused"] == {"source": 1}


def test_pieces_are_all_rows_of_a_file_in_order_and_none_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "PIECE_ROWS", 9)
    monkeypatch.setattr(row_files, "PIECE_BYTES", 2000)
    rows = [{"instruction": f"{i}", "input": "", "output": "水" * (1500 * (i % 40 == 20) + 1)} for i in range(100)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = "instruction,input,output\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    files = {"a.json": lines.encode(), "b.json": lines.encode("utf-16"), "c.json": gzip.compress(lines.encode())}
    files |= {"d.csv": table.encode(), "e.csv": table.encode("gb18030"), "f.json": json.dumps(rows).encode()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        pieces = list(row_files.cut_file(path))
        assert max(len(piece.rows) for piece in pieces) == 9
        assert [row["instruction"] for _, row in row_files.read_rows(path)] == list(map(str, range(100)))
        if "json" in name and name != "f.json":  # an array is read a block at a time
            long = [piece for piece in pieces if any(len(line) > 2000 for _, line, _ in piece.rows)]
            assert len(long) == 2 and all(len(piece.rows[-1][1]) > 2000 for piece in long)


# The cache


class Untouched:
    """A tokenizer that must not be asked to encode."""

    def __init__(self, tokenizer):
        self.fingerprint = tokenizer.fingerprint
        self.pad_token_id = tokenizer.pad_token_id


def test_a_second_start_encodes_nothing(tokenizers, write, tmp_path):
    rows = odd_rows(20)
    path, tokenizer = write(rows), tokenizers["glm3"]
    settings, folder = DataSettings(path, 70, 40, empty_outputs=True), str(tmp_path / "cache")
    file = prepare(settings, tokenizer, folder)
    assert prepare(settings, Untouched(tokenizer), folder) == file
    moved = replace(settings, path=write(rows, "moved.json"))  # content counts, not the name
    assert prepare(moved, Untouched(tokenizer), folder) == file
    assert os.listdir(tmp_path / "cache") == [os.path.basename(file)]
    with pytest.raises(AttributeError):  # the test can fail
        prepare(replace(settings, max_len=71), Untouched(tokenizer), folder)


def test_whatever_changes_the_samples_changes_the_file(tokenizers, write, tmp_path):
    rows = odd_rows(20)
    usual, folder = DataSettings(write(rows), 70, 40, empty_outputs=True), str(tmp_path / "cache")
    changes = [
        {},
        {"max_len": 71},
        {"max_src_len": 41},
        {"skip_cut": True},
        {"skip_bad": True},
        {"several_outputs": True},
    ]
    files = [prepare(replace(usual, **change), tokenizers["glm3"], folder) for change in changes]
    files.append(prepare(usual, tokenizers["glm2"], folder))  # the same vocabulary, another prompt
    files.append(prepare(replace(usual, path=write([*rows, rows[-1]], "more.json")), tokenizers["glm3"], folder))
    assert len(set(files)) == len(files)
    # rows without an answer are refused though they lie prepared for a run that allows them
    with pytest.raises(DataError, match="line 1: output is empty"):
        prepare(replace(usual, empty_outputs=False), tokenizers["glm3"], folder)


@modes
def test_another_vocabulary_is_another_fingerprint(tiny, tokenizers, mode, tmp_path):
    tokenizer = MODE[mode].tokenizer.from_pretrained(tiny[mode])
    assert tokenizer.fingerprint() == tokenizers[mode].fingerprint()
    changed = tmp_path / "vocabulary"
    with open(tokenizer.vocab_file, "rb") as file:
        changed.write_bytes(file.read() + b"\n")
    tokenizer.vocab_file = str(changed)
    assert tokenizer.fingerprint() != tokenizers[mode].fingerprint()
    assert len({tok.fingerprint() for tok in tokenizers.values()}) == 3
    if mode == "glm":
        shifted = MODE[mode].tokenizer.from_pretrained(tiny[mode], num_image_tokens=5)
        assert shifted.fingerprint() != tokenizers[mode].fingerprint()


@pytest.mark.parametrize("damage", ["empty", "header", "cut", "longer", "ids", "records", "counts"])
def test_a_damaged_file_is_made_anew(tokenizers, write, tmp_path, damage):
    settings = (DataSettings(write(odd_rows(20)), 70, 40, False, True), tokenizers["glm3"])
    file = prepare(*settings, cache_dir=str(tmp_path / "cache"))
    with open(file, "rb") as opened:
        good = opened.read()
    bad = bytearray(good)
    if damage in ("header", "ids", "records"):
        bad[{"header": 3, "ids": cache.HEADER + 8, "records": -20}[damage]] ^= 1
    bad = {
        "empty": b"",
        "cut": good[:-24],
        "longer": good + b"\0" * 24,
        "counts": good.replace(b'"skipped": 0', b'"skipped": 7'),
    }.get(damage, bytes(bad))
    assert bad != good
    with open(file, "wb") as opened:
        opened.write(bad)
    assert not cache.is_whole(file, dataset.COUNTS)
    assert prepare(*settings, cache_dir=str(tmp_path / "cache")) == file
    with open(file, "rb") as opened:
        assert opened.read() == good


def test_a_failed_start_leaves_nothing_and_old_debris_goes(tokenizers, write, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "abc.samples.0123.partial").touch()
    (cache / "new.samples.0123.partial").touch()
    (cache / "somebody else's.partial").touch()
    for name in ("abc.samples.0123.partial", "somebody else's.partial"):
        os.utime(cache / name, (1, 1))
    with pytest.raises(DataError, match="line 21: not valid JSON"):
        prepare(DataSettings(write([*odd_rows(20), "{"]), 70, 40, False, True), tokenizers["glm3"], str(cache))
    assert sorted(os.listdir(cache)) == ["new.samples.0123.partial", "somebody else's.partial"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tokenizers, write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the data cache in .*file.*; --data_cache names another folder"):
        prepare(
            DataSettings(write(odd_rows(20)), 70, 40, False, True), tokenizers["glm3"], str(tmp_path / "file" / "below")
        )


def test_a_file_that_changes_meanwhile_is_refused(tokenizers, write, tmp_path, monkeypatch):
    path = write(odd_rows(20))

    def read_and_append(*args, **kwargs):
        yield from cut_file(*args, **kwargs)
        with open(path, "a") as file:
            file.write("\n")

    cut_file = dataset.cut_file
    monkeypatch.setattr(dataset, "cut_file", read_and_append)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(DataSettings(path, 70, 40, False, True), tokenizers["glm3"], str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == []


def test_the_bar_has_a_total_only_where_lines_can_be_counted(tmp_path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in odd_rows(5))
    for content, total in [
        (text.encode(), 6),
        (text.encode("utf-8-sig"), 6),
        (text.encode("gb18030"), 6),
        (text.encode("utf-16"), None),
        (gzip.compress(text.encode()), None),
        (lzma.compress(text.encode()), None),
    ]:
        (tmp_path / "rows").write_bytes(content)
        assert dataset._count_lines(str(tmp_path / "rows"), content.count(b"\n")) == total


def build(start, settings, cache, results):
    start.wait()
    results.put(prepare(*settings, cache_dir=cache))


def test_two_processes_that_build_at_once_both_end_right(tokenizers, write, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "PIECE_ROWS", 3)  # many writes that could mix
    fork = multiprocessing.get_context("fork")
    settings = (DataSettings(write(odd_rows(300)), 70, 40, False, True), tokenizers["glm3"])
    cache, start, results = str(tmp_path / "cache"), fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=build, args=(start, settings, cache, results)) for _ in range(2)]
    for process in processes:
        process.start()
    files = {results.get(timeout=300) for _ in processes}
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert os.listdir(cache) == [os.path.basename(file) for file in files]
    kept = InstructionData(*settings, prepared=files.pop())
    assert list(kept.samples) == list(InstructionData(*settings).samples)


# Errors


@modes
@pytest.mark.parametrize(("piece_rows", "processes"), [(1, 1), (3, 1), (1000, 1), (1, 2)])
def test_the_first_broken_row_of_the_file_is_named(tokenizers, mode, write, monkeypatch, piece_rows, processes):
    monkeypatch.setattr(row_files, "PIECE_ROWS", piece_rows)
    monkeypatch.setattr(dataset, "processes_for", lambda *_: processes)
    good = {"instruction": "问", "input": "水泵", "output": "漏水"}
    long, half = {**good, "input": "水泵" * 40}, {**good, "input": "a\ud83db"}
    wrong = {**good, "output": None}
    for rows, message in [
        ([good, good, long, wrong], "line 3: the prompt's 5"),
        ([good, wrong, long], "line 2: output must be a string"),
        ([good, long, "{", long], "line 2: the prompt's 5"),
        ([good] * 5 + ["{"], "line 6: not valid JSON"),
        ([good, good, json.dumps(half), "{"], "line 3: a text has an unpaired surrogate"),
    ]:
        with pytest.raises(DataError) as error:
            InstructionData(DataSettings(write(rows), 50, 49), tokenizers[mode])
        assert f"rows.json {message}" in str(error.value)


def test_a_file_of_rows_that_are_all_too_long_is_refused(tokenizers, write):
    with pytest.raises(DataError, match=r"rows\.json: every row is longer than --max_src_len or --max_len allow"):
        InstructionData(
            DataSettings(write(odd_rows(20)[1:2]), 70, 10, skip_cut=True, empty_outputs=True), tokenizers["glm3"]
        )
