"""Several data files and folders: what flags name, with weights; what is said, dumped, checked and compared."""

import gzip
import json
import os

import pytest
from conftest import TEXT

import data_set
import utils
from tuning.arguments.train import parse_args
from tuning.errors import DataError, UserError
from tuning.samples import mixture
from tuning.samples.check import FILE, check_data
from tuning.samples.data_files import find_files
from tuning.samples.dataset import DataSettings, InstructionData, split_rows
from tuning.samples.epochs import Packs
from tuning.samples.mixture import Mixture, shared_samples, weigh


def write_rows(path, texts) -> str:
    rows = [{"instruction": "写：", "input": text, "output": text[:5]} for text in texts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    one, two = write_rows(tmp_path / "a.json", TEXT[:20]), tmp_path / "b.csv.gz"
    cells = "".join(f'写：,"{text}","{text[:5]}"\n' for text in TEXT[18:30])
    two.write_bytes(gzip.compress(("instruction,input,output\n" + cells).encode("gb18030")))
    return one, str(two)


def parse(*paths, more=()):
    return parse_args(["--mode", "glm3", "--model_name_or_path", ".", "--train_path", *map(str, paths), *more])


def test_paths_weights_and_folders(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("b.json", "a.csv.gz", ".hidden.json", "README.md", "c.JSONL"):
        (folder / name).write_text("{}")
    (folder / "inner").mkdir()
    (tmp_path / "x:2").write_text("{}")
    (tmp_path / "x").write_text("{}")
    found, notes = find_files([f"{folder}:0.5", "x:2", "x:.25", "x:2:3"], True, base=str(tmp_path))
    where = [(os.path.relpath(path, tmp_path), weight) for path, weight in found]
    names = ["a.csv.gz", "b.json", "c.JSONL"]
    assert where == [*((f"data/{name}", 0.5) for name in names), ("x:2", 1), ("x", 0.25), ("x:2", 3)]
    assert notes == [f"{folder}: not read: README.md, inner"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.json").write_text("{}")
    x = tmp_path / "x"
    for path, says in [
        (tmp_path / "empty", "the folder has no data files"),
        (tmp_path / "results", "is no folder of data: with run.json it is one of a model or of results"),
        (f"{x}:0", "the weight '0' must be a number above 0"),
        (f"{x}:-1", "the weight '-1' must be"),
        (f"{x}:nan", "the weight 'nan' must be"),
        (f"{x}:1e9", "the weight '1e9' must be"),
        (tmp_path / "none:2", "no such file"),
        (tmp_path / "none", "no such file"),
    ]:
        with pytest.raises(UserError, match=f"--train_path {path}: .*{says}"):
            parse(path)
    with pytest.raises(UserError, match=f"weights are for --train_path alone, so name {x}"):
        parse(x, more=["--eval_path", f"{x}:3"])


def load(args, tokenizer, monkeypatch):
    """The sources of a run of one process, and what was printed."""
    said = []
    for name in ("on_rank_0", "once_per_node"):
        monkeypatch.setattr(data_set, name, lambda action: action())
    monkeypatch.setattr(data_set, "print_rank_0", said.append)
    assert utils.is_rank_0()
    return data_set.load_sources(args, tokenizer), "\n".join(said)


def test_a_run_says_what_it_reads_and_is_compared_by_files_and_weights(files, tmp_path, tokenizers, monkeypatch):
    more = ["--data_cache", str(tmp_path / "cache")]
    tokenizer = tokenizers["glm3"]
    alone, said = load(parse(files[0], more=more), tokenizer, monkeypatch)
    assert isinstance(alone.contents["SHA-256 of --train_path"], str) and "an epoch:" not in said
    assert list(alone.packs(1)) == [[row] for row in range(20)]
    both, said = load(parse(files[0], f"{files[1]}:2", more=[*more, "--eval_path", *files]), tokenizer, monkeypatch)
    assert f"{files[1]}: a CSV table, gzip, GB18030 text" in said and f"data: {files[1]}: 12 samples" in said
    assert f"an epoch: 44 rows, of {files[0]} x 1, {files[1]} x 2" in said
    assert f"warning: 2 samples of {files[1]} are in {files[0]} too" in said
    assert "warning: --eval_path has the very rows of --train_path" in said
    kept = sorted(os.path.splitext(name)[1] for name in os.listdir(tmp_path / "cache"))
    assert len(both.held_out.rows) == 32 and kept == [*[".samples"] * 4, *[".shared"] * 2]  # two files, for two uses
    with monkeypatch.context() as patch:  # the second start counts nothing
        patch.setattr(mixture, "_count_shared", None)
        again, said_again = load(parse(files[0], f"{files[1]}:2", more=more), tokenizer, monkeypatch)
    assert (
        "2 samples of" in said_again
        and again.contents["SHA-256 of --train_path"] == both.contents["SHA-256 of --train_path"]
    )
    for path in (tmp_path / "cache").glob("*.shared"):
        path.write_text('[[1, 5, "2"]]')  # damaged: counted again
    assert both.contents["weights of --train_path"] == [1, 2]
    assert (
        list(both.contents["SHA-256 of --train_path"])
        == ["file 1", "file 2"]
        == list(both.contents["SHA-256 of --eval_path"])
    )
    assert sorted(row for pack in both.packs(1) for row in pack) == sorted([*range(20), *range(20, 32), *range(20, 32)])
    assert both.data.place(25) == (files[1], 7)
    _, said = load(parse(files[0], f"{files[1]}:2", more=more), tokenizer, monkeypatch)
    assert f"warning: 2 samples of {files[1]} are in {files[0]} too" in said
    _, said = load(parse(files[0], files[0], more=more), tokenizer, monkeypatch)
    assert f"warning: {files[0]} has the very rows of {files[0]}: they come from both" in said


def test_rows_with_the_same_prompt_are_on_one_side_in_all_files(files, tokenizers):
    parts = [InstructionData(DataSettings(path, 200, 100), tokenizers["glm2"]) for path in files]
    both = Mixture(parts)
    held = set(split_rows(both, 0.4)[1].tolist())
    assert {18, 19} & held == {row - 2 for row in {20, 21} & held}
    assert held == {*split_rows(parts[0], 0.4)[1].tolist(), *(split_rows(parts[1], 0.4)[1] + 20).tolist()}
    weigh(both, [0.5, 1], split_rows(both, 0.4)[0], Packs, 2, 1)
    assert {row for epoch in (1, 2, 3) for pack in both.epoch_packs(epoch) for row in pack}.isdisjoint(held)
    assert shared_samples(parts[:1], None) == []


def test_dumps_and_checks_name_the_file(files, tmp_path, tokenizers, capsys):
    target = tmp_path / "dump.jsonl"
    data_set.dump(parse(*files, more=["--dump_samples", str(target), "--data_cache", "none"]), tokenizers["glm3"])
    dumped = [json.loads(line) for line in target.read_text().splitlines()]
    places = [(files[0], line) for line in range(1, 21)] + [(files[1], line) for line in range(2, 14)]
    assert [(one["file"], one["line"]) for one in dumped] == places
    said = []
    settings = [DataSettings(path, 200, 100) for path in files]
    check_data(settings, tokenizers["glm3"], None, str(tmp_path / "output"), said.append)
    text = "\n".join(said)
    assert f"{files[0]}: 20 rows" in text and f"{files[1]}: 12 rows" in text
    assert "rows that stand in an earlier file too: 2 rows (lines 2, 3)" in text
    found = [json.loads(line) for line in (tmp_path / "output" / FILE).read_text().splitlines()]
    assert {"file": files[1], "line": 3, "kind": "other_file", "file_too": files[0]} in found
    broken = write_rows(tmp_path / "c.json", ["", TEXT[40]])
    with open(broken, "a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=f"^{broken}: 1 rows are broken"):
        check_data([settings[0], DataSettings(broken, 200, 100, empty_outputs=True)], tokenizers["glm3"], None,
                   str(tmp_path / "output"), said.append)  # fmt: skip
