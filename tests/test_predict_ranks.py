"""predict.py on several ranks: the file of one process, byte by byte, also after one of them was killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from runs import Forked

import predict
from glm_models import MODE
from tuning.arguments.predict import parse_args
from tuning.engine import loading
from tuning.errors import UserError
from tuning.evaluate.parts import Part, read_parts
from tuning.evaluate.work import Work, plan_groups

ROWS = 14


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.json"
    some = [{"instruction": "写：", "input": TEXT[i] * (1 + i % 4), "output": TEXT[i]} for i in range(ROWS)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in some))
    return path


@pytest.mark.parametrize("mode", MODE)
def test_ranks_write_the_file_of_one_process_also_after_a_kill(mode, tiny, rows, tmp_path, monkeypatch):
    if mode == "glm2":
        for module in (predict, loading):
            monkeypatch.setattr(module, "choose_dtype", lambda *_: (torch.bfloat16, "as this test asks"))
    names = ("mode", mode, "model_path", tiny[mode], "predict_path", rows, "device", "cpu", "batch_size", 3)
    flags = [f"--{word}" if i % 2 == 0 else str(word) for i, word in enumerate((*names, "max_new_tokens", 7))]
    predict.main([*flags, "--output_path", str(tmp_path / "one.jsonl")])
    output, log = tmp_path / "two.jsonl", tmp_path / "log"
    add = Part.add

    def die_early(part, *answer):
        """Rank 1 is killed after its second answer, of which rank 0 waits for the first."""
        add(part, *answer)
        lines = Path(part.path).read_bytes().count(b"\n")
        if part.path.endswith("1") and lines == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while part.path.endswith("0") and not Path(f"{output}.part-1").exists():
            time.sleep(0.01)

    def answer(rank: int) -> None:
        predict.main([*flags, "--output_path", str(output)])

    monkeypatch.setattr(Part, "add", die_early)
    ranks = Forked(2, log, answer)
    codes = ranks.wait()
    assert codes == {0: 1, 1: -signal.SIGKILL}, log.read_text()
    # what looks at processes says which one; gloo may be faster
    ends = ("rank 1, is gone; this one ends too", "lost the connection to another process of this run")
    assert any(text in log.read_text() for text in ends) and "Traceback" not in log.read_text()
    known = read_parts(str(output))
    assert len(known) >= 2 and output.read_bytes() == b""
    monkeypatch.setattr(Part, "add", add)
    with open(f"{output}.part-1", "a") as file:
        file.write('{"row": 3, "predi')  # killed while it wrote
    if mode == "glm":
        predict.main([*flags, "--output_path", str(output)])
    else:
        codes = Forked(2, log, answer).wait()
        assert codes == {0: 0, 1: 0}, log.read_text()
        assert f"{output} holds {len(known)} of {ROWS} answers; continuing from there" in log.read_text()
        assert log.read_text().count("answers: ") == 1
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part-*"))


def test_a_kill_while_the_file_is_written_loses_nothing(tiny, rows, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    flags = ["--mode", "glm3", "--model_path", tiny["glm3"], "--predict_path", str(rows), "--device", "cpu"]
    flags += ["--max_new_tokens", "3", "--output_path", str(output)]
    predict.main(flags)
    whole = output.read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    monkeypatch.setattr(predict, "load_model", None)  # every answer is there
    for size in (0, len(whole) // 2, len(whole)):
        output.write_bytes(whole[:size])
        with Part(str(output), 4) as part:
            for i, row in enumerate(answers):
                part.add(i, row["prediction"], row["ended"])
        predict.main(flags)
        assert output.read_bytes() == whole
        assert not list(tmp_path.glob("*.part-*"))


def test_foreign_files_are_no_parts(tiny, rows, tmp_path):
    foreign = tmp_path / "out.jsonl.part-0"
    foreign.write_text("my notes\n")
    flags = ["--mode", "glm3", "--model_path", tiny["glm3"], "--predict_path", str(rows), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        predict.main([*flags, "--overwrite", "--output_path", str(tmp_path / "out.jsonl")])
    assert end.value.code == 2 and foreign.read_text() == "my notes\n"


def test_several_processes_answer_files_only(tiny, rows, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = ["--mode", "glm3", "--model_path", tiny["glm3"], "--local_rank=1"]
    for more, said in (
        ([], "2 processes answer a file"),
        (["--instruction", "a"], "for a chat or one sample: python predict.py"),
        (["--predict_path", str(rows), "--device", "1"], "--device 1 names one device; each of the 2 processes"),
    ):
        with pytest.raises(UserError, match=said):
            parse_args([*model, *more])
    assert parse_args([*model, "--predict_path", str(rows)]).local_rank == 1


def test_groups_hold_prompts_of_similar_length():
    lengths = [5, 700, 300, 6, 310, 5]
    assert plan_groups(lengths, 3) == [[1], [4, 2, 3], [0, 5]]
    assert plan_groups(lengths, 2) == [[1], [4, 2], [3, 0], [5]]
    assert plan_groups([5000, 400, 400, 400], 8) == [[0], [1, 2], [3]]
    assert plan_groups([5000, 400, 400, 400], 8, tokens=None) == [[0, 1, 2, 3]]


def test_a_second_file_in_the_same_processes_is_dealt_from_its_first_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    for _ in range(2):
        work = Work([[0, 2], [1]], set())
        assert (list(work.take()), work.count(3), work.count()) == ([[0, 2], [1]], 3, 3)
