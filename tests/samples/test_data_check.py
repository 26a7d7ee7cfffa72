"""--check_data, the warnings before each training, and --on_bad_row: every kind of bad row is found in one pass, on its
line, and in no other row; rows that are left out never come out as samples.
"""

import io
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from runs import Forked

import train
from glm_models import MODE
from tuning.errors import DataError
from tuning.samples import check as data_check
from tuning.samples.check import FILE, check_data, histogram, sample_lines
from tuning.samples.dataset import DataSettings, InstructionData, prepare
from tuning.samples.encoding import encode_sample
from tuning.samples.findings import BROKEN, WARNINGS, Findings
from tuning.samples.flaws import Flaw
from tuning.samples.formats import to_dialogue
from tuning.samples.row_files import RowError, scan_rows

modes = pytest.mark.parametrize("mode", MODE)
MAX_LEN, MAX_SRC_LEN = 90, 60


def row(number, **change) -> dict:
    return {"instruction": "抽取故障：", "input": f"第{number}辆车水泵漏水。", "output": f"水泵_漏水{number}"} | change


def dump(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def bad_rows() -> dict[str, list[bytes]]:
    """Kind of finding -> lines of a file that have it, each for another reason; NUMBER is to make them differ."""
    whole = dump(row(0))
    return {
        "json": [
            b'{"instruction": "NUMBER", "input": "a"',
            whole[:-1] + b"}}",
            whole.replace(b"}", b", }"),
            whole.replace(b"}", b', "more": NaN}'),
            whole.replace(b"}", b', "more": -Infinity}'),
            whole.replace(b"}", b', "output": "other"}'),
            whole.replace(b"}", b', "more": {"a": 1, "a": 2}}'),
            whole.replace(b'"input"', b"'input'"),
            whole.replace("第".encode(), b"\0"),
            whole.replace("第".encode(), b"\\ud83d"),
            whole.replace("第".encode(), b"\t"),
            whole.replace("第".encode(), b"\\x"),
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'{"more": ' + b"9" * 5000 + b"," + whole[1:],
            b"NUMBER nonsense",
            b"\xef\xbb\xbf" + whole,  # a byte order mark is one at the start of the file only
            b"\0",
        ],
        "encoding": [
            whole.replace("第".encode(), b"\xff\xfe"),
            whole.replace("水".encode(), "水".encode()[:2]),
            dump(row(0)).decode().encode("gb18030"),
        ],
        "format": [
            dump({"prompt": "NUMBER", "response": "a", "content": "b", "summary": "c"}),
            dump({"messages": [{"role": "user", "content": "NUMBER"}, {"from": "gpt", "value": "a"}]}),
            dump({"data": [row(0)]}),
        ],
        "keys": [
            dump(row("NUMBER", chat_history=[["a", "b"]])),
            dump(row("NUMBER", System="a")),
            dump(row("NUMBER", more={"tools": ["a"]})),
            dump(row("NUMBER", weight=2)),
        ],
        "type": [
            b"3",
            b"null",
            b'"text"',
            b"[" + whole + b"]",
            b"{}",
            *(dump({k: v for k, v in row(0).items() if k != key}) for key in ("instruction", "output")),
            *(dump(row(0, **{key: value})) for key in row(0) for value in (3, True, {}, ["a"])),
            *(dump(row(0, **{key: None})) for key in ("instruction", "output")),
            dump({key.title(): value for key, value in row(0).items()}),
        ],
        "empty": [dump(row(0, instruction=" ", input="\n")), dump(row(0, output="")), dump(row(0, output=" \u3000\n"))],
        "list_text": [dump(row("NUMBER", output="['NUMBER', 'b']"))],
        "special_tokens": [dump(row("NUMBER", input="NUMBER</s>")), dump(row("NUMBER", output="a[gMASK]b"))],
        "prompt_cut": [dump(row("NUMBER", input="水泵漏水，" * 60 + "NUMBER"))],
        "answer_cut": [dump(row("NUMBER", output="水泵漏水，" * 60 + "NUMBER"))],
        "duplicate": [dump(row(1)), dump(row(1, more=["not looked at"]))],
        "contradiction": [dump(row(2, output="NUMBER")), dump(row(2, output="NUMBER, or not"))],
    }


def bad_file(path, rows: int, spread: int, mode: str) -> dict[str, list[int]]:
    """Write good rows with bad ones among them. Returns the lines of each kind."""
    kinds = bad_rows()
    if mode == "glm":  # the others represent all characters
        kinds["lost_characters"] = [dump(row("NUMBER", output="a\x01b")), dump(row("NUMBER", input="NUMBER\x7f"))]
        # a finding a character, with the first line that has it
        kinds["changed_characters"] = []
    bad = [(kind, line) for kind, lines in kinds.items() for line in lines]
    expected: dict[str, list[int]] = {kind: [] for kind in kinds}
    with open(path, "wb") as file:
        for number in range(1, rows + 1):
            place, rest = divmod(number, spread)
            if (rest == 0 and place <= len(bad)) or number > rows - 20:
                kind, line = bad[(place if rest == 0 else number) % len(bad)]
                expected[kind].append(number)
                file.write(line.replace(b"NUMBER", str(number).encode()) + b"\n")
            else:
                file.write(dump(row(number)) + b"\n")
    if mode == "glm":
        commas = min(expected["prompt_cut"] + expected["answer_cut"])
        expected["changed_characters"] = sorted([1, commas])  # ： in the first row, ，
    return expected


def findings_of(folder) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for line in (Path(folder) / FILE).read_text(encoding="utf-8").splitlines():
        finding = json.loads(line)
        if finding["kind"] == "format_of_rows":
            continue
        found.setdefault(finding["kind"], []).append(finding["line"])
    return {kind: sorted(lines) for kind, lines in found.items()}


def check(path, tokenizer, output, said=None, max_len=MAX_LEN, max_src_len=MAX_SRC_LEN, skip_bad=True, **more):
    test_path = more.pop("test_path", None)
    settings = DataSettings(str(path), max_len, max_src_len, skip_bad=skip_bad, **more)
    check_data([settings], tokenizer, test_path, str(output), (said if said is not None else []).append)


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.json"):
        path = tmp_path / name
        path.write_bytes(b"\n".join(one if isinstance(one, bytes) else dump(one) for one in rows) + b"\n")
        return str(path)

    return write_rows


@modes
def test_every_kind_of_bad_row_is_found_on_its_line_and_nowhere_else(tokenizers, mode, tmp_path):
    expected = bad_file(tmp_path / "rows.json", 3000, 37, mode)
    assert all(expected.values())
    said = []
    check(tmp_path / "rows.json", tokenizers[mode], tmp_path / "out", said)
    assert findings_of(tmp_path / "out") == expected
    broken = sum(len(expected[kind]) for kind in BROKEN if kind in expected)
    assert f"3000 rows, {3000 - broken} of them usable" in said[0]
    for kind, lines in ((kind, lines) for kind, lines in expected.items() if kind != "changed_characters"):
        first = ", ".join(map(str, lines[:3]))
        assert any(f"{len(lines)} rows (lines {first}" in text or f"1 row (line {first})" in text for text in said), (
            kind
        )
    with pytest.raises(DataError, match=f"{broken} rows are broken"):
        check(tmp_path / "rows.json", tokenizers[mode], tmp_path / "out", skip_bad=False)
    # and what is left out is left out of the training too, all else is in it
    data = InstructionData(
        DataSettings(str(tmp_path / "rows.json"), MAX_LEN, MAX_SRC_LEN, skip_bad=True), tokenizers[mode]
    )
    bad = {line for kind in BROKEN for line in expected.get(kind, [])}
    assert data.lines.tolist() == [line for line in range(1, 3001) if line not in bad]
    for kind in expected.keys() & (BROKEN.keys() | WARNINGS.keys()):
        assert data.findings[kind] == [len(expected[kind]), expected[kind][:3]]


@modes
def test_a_row_whose_prompt_leaves_no_room_is_broken(tokenizers, mode, write, tmp_path):
    path = write([row(1), row(2, input="水泵漏水，" * 60), row(3)])
    check(path, tokenizers[mode], tmp_path / "out", max_len=61)
    assert findings_of(tmp_path / "out")["no_room"] == [2]
    data = InstructionData(DataSettings(path, 61, 60, skip_bad=True), tokenizers[mode])
    assert data.lines.tolist() == [1, 3]
    assert list(data.samples) == [encode_sample(tokenizers[mode], row(i), 61, 60) for i in (1, 3)]
    with pytest.raises(DataError, match="line 2: the prompt's 6"):
        InstructionData(DataSettings(path, 61, 60), tokenizers[mode])
    only = write([row(2, input="水泵漏水，" * 60)], "only.json")
    with pytest.raises(DataError, match="every row is broken"):
        InstructionData(DataSettings(only, 61, 60, skip_bad=True), tokenizers[mode])
    with pytest.raises(DataError, match="every row is broken"):
        check(only, tokenizers[mode], tmp_path / "out", max_len=61)


def test_a_broken_row_of_an_array_is_left_out_and_a_broken_array_ends(tokenizers, write, tmp_path):
    tokenizer, good = tokenizers["glm3"], [dump(row(i)) for i in range(9)]
    flawed = [dump(row(3, output=None)), good[0].replace(b"}", b', "x": NaN}'), b"7", good[0].replace(b"_", b"\xff")]
    flawed += [good[0].replace(b"_", b"\t"), good[0].replace(b"}", b', "input": "b"}')]
    rows = [part for pair in zip(good, flawed, strict=False) for part in pair] + [good[6]]
    path = write([b"\xef\xbb\xbf[", *(part + b"," for part in rows[:-1]), rows[-1], b"]"])
    assert [line for line, one in scan_rows(path) if isinstance(one, RowError)] == [3, 5, 7, 9, 11, 13]
    data = InstructionData(DataSettings(path, 90, 60, skip_bad=True), tokenizer)
    assert data.lines.tolist() == [2, 4, 6, 8, 10, 12, 14]
    assert [s.input_ids for s in data.samples] == [encode_sample(tokenizer, row(i), 90, 60).input_ids for i in range(7)]
    # a syntax error hides what follows, so it cannot be skipped
    for middle, line in ((b'{"instruction": }', 3), (b"oops", 3), (good[3] + b"\n" + good[4], 4), (b"[" * 5000, 3)):
        path = write([b"[", good[0] + b",", middle + b",", good[1], b"]"])
        with pytest.raises(DataError, match=rf"line {line}: .*the rest of (it|the array) cannot be read"):
            InstructionData(DataSettings(path, 90, 60, skip_bad=True), tokenizer)
        with pytest.raises(DataError, match=rf"line {line}: "):
            check(path, tokenizer, tmp_path / "out")
        assert findings_of(tmp_path / "out") == {"json": [line]}


def test_windows_files_are_read(tokenizers, write):
    lines = [b"\xef\xbb\xbf" + dump(row(1)) + b"\r", b"\r", dump(row(2)) + b"\r"]
    assert list(scan_rows(write(lines))) == [(1, row(1)), (3, row(2))]


def test_warnings_stay_with_the_prepared_file(tokenizers, write, tmp_path):
    rows = [row(1), row(2), row(1), row(2, output="no"), b"{", row(5, output="<|user|>"), row(2, output="no"), row(1)]
    settings, tokenizer = DataSettings(write(rows), MAX_LEN, MAX_SRC_LEN, skip_bad=True), tokenizers["glm3"]
    for _ in range(2):
        file = prepare(settings, tokenizer, str(tmp_path / "cache"))
        summary = InstructionData(settings, tokenizer, file).summary()
        assert "7 samples" in summary
        assert "left out as broken (--on_bad_row skip): 1 row (line 5)" in summary
        assert "warning: repeats of an earlier row: 3 rows (lines 3, 7, 8)" in summary
        assert "warning: an earlier row's prompt with another answer: 1 row (line 4)" in summary
        assert "warning: special tokens written out in the text: 1 row (line 6)" in summary
    with pytest.raises(DataError, match="line 5: not valid JSON"):  # though there is a file for a run that skips it
        prepare(replace(settings, skip_bad=False), tokenizer, str(tmp_path / "cache"))
    plain = replace(settings, path=write([row(1), row(2)], "plain.json"))
    assert InstructionData(plain, tokenizer).summary().count(";") == 0


def test_memory_of_the_check_is_24_bytes_a_row(tokenizers):
    findings = Findings(tokenizers["glm3"])
    rows = [row(i, input="x" * 1000 + str(i)) for i in range(1000)]
    findings.feed(range(1, 1001), rows, list(map(to_dialogue, rows)))
    assert sum(array.nbytes for array in (*findings.lines, *findings.hashes)) == 24 * 1000
    assert findings.finish() == {}


@modes
def test_the_special_tokens_of_each_family(tokenizers, mode):
    texts = {"glm": ["<sop>", "[gMASK]", "<n>", "<|tab|>", "<|blank_80|>", "</s>", "<unk>"]}
    texts["glm2"] = ["[gMASK]", "[sMASK]", "</s>", "<unk>", "<s>"]
    texts["glm3"] = [*texts["glm2"], "<|user|>", "<|observation|>"]
    tokenizer, plain = tokenizers[mode], ["sop", "eop", "[n]", "a < b", "<|blank_81|>"]
    rows = [row(i, output=text) for i, text in enumerate([*texts[mode], *plain])]
    findings = Findings(tokenizer)
    findings.feed(range(len(rows)), rows, list(map(to_dialogue, rows)))
    assert findings.tally["special_tokens"][0] == len(texts[mode])


@modes
def test_lost_characters_are_those_that_do_not_come_back(tokenizers, mode):
    tokenizer, lost = tokenizers[mode], {"\x01", "\x7f"} if mode == "glm" else set()
    characters = "a，\x01\x7f😀é水\n\t \x00"
    assert tokenizer.lost_characters(characters) == lost
    for character in characters:
        again = tokenizer.decode_answer(tokenizer.encode_answer(f"a{character}b"))
        assert (again == "ab") == (character in lost)


def test_the_unknown_token_is_a_lost_character(tokenizers, tmp_path, tiny):
    folder = tmp_path / "glm3"
    shutil.copytree(tiny["glm3"], folder)
    model, alphabet = io.BytesIO(), ["abc水泵漏水 ab ca bc"] * 50
    sentencepiece.SentencePieceTrainer.train(  # no byte_fallback
        sentence_iterator=iter(alphabet), model_writer=model, model_type="char", vocab_size=11, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(folder)
    assert tokenizer.lost_characters("a泵修😀b") == {"修", "😀"}


@modes
def test_lengths_and_what_the_cuts_take(tokenizers, mode, write, tmp_path):
    tokenizer, said = tokenizers[mode], []
    rows = [row(i, input="水泵。" * (3 * i), output="漏水，" * (i * i % 31 + 1)) for i in range(1, 40)]
    check(write(rows), tokenizer, tmp_path / "out", said)
    kept = [encode_sample(tokenizer, one, MAX_LEN, MAX_SRC_LEN) for one in rows]
    whole = [encode_sample(tokenizer, one, 10**6, 10**5) for one in rows]
    prompt_lost = sum(len(b.prompt) - len(a.prompt) for a, b in zip(kept, whole, strict=True))
    answer_lost = sum(len(b.input_ids) - len(a.input_ids) for a, b in zip(kept, whole, strict=True)) - prompt_lost
    assert prompt_lost > 0 and answer_lost > 0
    text = "\n".join(said)
    assert f"tokens: {sum(len(sample.input_ids) for sample in whole)} (" in text
    assert (
        f"cuts take {prompt_lost} of the prompts (--max_src_len) and {answer_lost} of the answers (--max_len)" in text
    )
    assert f"<- --max_src_len {MAX_SRC_LEN}" in text and f"<- --max_len {MAX_LEN}" in text
    for line, tokens, lost in (
        (one["line"], one["tokens"], one["lost"])
        for one in map(json.loads, (tmp_path / "out" / FILE).read_text().splitlines())
        if one["kind"] == "answer_cut"
    ):
        a, b = kept[line - 1], whole[line - 1]
        assert tokens == len(b.learnt)
        assert lost == tokens - (len(a.learnt))


def test_a_histogram_counts_all_and_marks_the_limit():
    lengths = np.array([3] * 10 + [25] * 20 + [111] + [9000])
    lines = histogram(lengths, 50, "--max_len")
    assert sum(int(line.split()[1]) for line in lines) == len(lengths)
    assert [line for line in lines if "<- --max_len 50" in line]
    assert lines[-1].split()[0].endswith("-9000")
    assert "longer than all" in histogram(lengths, 10_000, "--max_len")[-1]
    assert histogram(np.array([0, 0])) == [f"  {'0-0':>13} {2:>9} {'#' * 40}"]


@modes
def test_a_sample_is_shown_token_by_token(tokenizers, mode, monkeypatch):
    tokenizer = tokenizers[mode]
    long = sample_lines(tokenizer, encode_sample(tokenizer, row(1, input="水泵" * 300), 1000, 900))
    assert len(long) < 60 and sum("more" in line for line in long) == 1
    monkeypatch.setattr(data_check, "ENDS", 100)
    sample = encode_sample(tokenizer, row(1), MAX_LEN, MAX_SRC_LEN)
    shown = [line.split(maxsplit=3) for line in sample_lines(tokenizer, sample)[1:]]
    assert len(shown) == len(sample.input_ids)
    assert [int(cells[1]) for cells in shown] == sample.input_ids
    labels = [-100 if cells[2] == "-" else int(cells[2]) for cells in shown]
    assert labels == sample.labels
    assert [json.loads(cells[3]) for cells in shown] == tokenizer.convert_ids_to_tokens(sample.input_ids)


def test_test_rows_that_stand_in_the_training_file_are_named(tokenizers, write, tmp_path):
    path = write([row(i) for i in range(5, 50)])
    test = [row(3), row(7), row(8, output=["a", "b"]), b"{", row(9, output=""), row(70)]
    check(path, tokenizers["glm3"], tmp_path / "out", test_path=write(test, "test.json"))
    assert findings_of(tmp_path / "out") == {"test_in_training": [2, 3, 5], "test_broken": [4]}
    findings = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()]
    assert [one["training_line"] for one in findings if one["kind"] == "test_in_training"] == [3, 4, 5]


def test_a_report_that_cannot_be_written_is_one_clear_error(tokenizers, write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*--output_dir names another"):
        check(write([row(1)]), tokenizers["glm3"], tmp_path / "file" / "below")


def test_row_errors_reach_other_processes_whole():
    error = pickle.loads(pickle.dumps(RowError("rows.json line 3: wrong", 3, Flaw("type", "wrong"))))
    assert (str(error), error.line, error.flaw.kind) == ("rows.json line 3: wrong", 3, "type")


def test_train_py_checks_and_starts_nothing(tiny, write, tmp_path):
    command = ["--mode", "glm2", "--model_name_or_path", tiny["glm2"], "--check_data"]
    command += ["--output_dir", str(tmp_path / "out"), "--max_len", "90", "--max_src_len", "60"]
    path = write([row(1), b"{", row(3)])
    for flags, code in (([], 2), (["--on_bad_row", "skip"], 0)):
        log = tmp_path / f"log-{code}"
        argv = [*command, "--train_path", path, *flags]
        assert Forked(1, log, lambda rank, argv=argv: train.main(argv)).wait() == {0: code}
        text = log.read_text()
        assert "3 rows, 2 of them usable" in text
        assert "first sample (line 1), token by token:" in text
        assert "Traceback" not in text
        if code:
            last = text.strip().splitlines()[-1]
            assert last.endswith("1 rows are broken; fix them, or train without them: --on_bad_row skip")
    assert os.listdir(tmp_path / "out") == [FILE]
