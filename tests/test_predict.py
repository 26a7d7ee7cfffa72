"""predict.py's answer files: answers of one model, with one set of flags, to one file, by one process; and what is said
of rows that cannot be scored or are cut.
"""

import fcntl
import itertools
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from conftest import TEXT

import predict
from glm_models.refill import Answer
from glm_models.tiny import make_tiny_checkpoint
from tuning.errors import DataError, FolderError, UserError
from tuning.evaluate import answers, inputs, page
from tuning.lora.adapter import find_base


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models that differ in their random weights alone."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        size = {"layers": 1, "hidden_size": 32, "heads": 2, "vocab_size": 1000}
        make_tiny_checkpoint("glm3", str(folder / name), TEXT, **size, seed=seed)
    return folder


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch):
    """exit_on_user_errors ends the process; here errors are looked at."""
    import contextlib

    monkeypatch.setattr(predict, "exit_on_user_errors", lambda *kinds: contextlib.nullcontext())


def write_rows(path: Path, count: int = 5, **change) -> Path:
    rows = [{"instruction": "写：", "input": TEXT[i], "output": TEXT[i][:4]} | change for i in range(count)]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


class Work:
    """A file to answer, and where its answers go."""

    def __init__(self, folder: Path, models: Path):
        self.models, self.rows, self.output = models, write_rows(folder / "rows.json"), folder / "new" / "out.jsonl"

    def predict(self, *more, model="a"):
        command = ["--mode", "glm3", "--model_path", self.models / model, "--predict_path", self.rows]
        command += ["--output_path", self.output, "--device", "cpu", "--max_length", "100", *more]
        predict.main([str(part) for part in command])

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def work(tmp_path, models):
    return Work(tmp_path, models)


@pytest.fixture
def echo(monkeypatch):
    """A model that answers at once, and says how often it was loaded."""
    loaded = []

    def load_model(args):
        loaded.append(args.model_path)
        return None, Path(args.model_path).name

    monkeypatch.setattr(predict, "load_model", load_model)
    answer_by(monkeypatch, lambda model, row, question: f"{model}:{question.prompt}")
    return loaded


def answer_by(monkeypatch, reply) -> None:
    """Put `reply(model, row, question)` in the place of generation."""

    def answer_groups(model, _, rows, groups, answered, args):
        for group in groups:
            for row in group:
                if row not in answered:
                    yield row, reply(model, row, predict.question_in(rows[row])), True

    monkeypatch.setattr(predict, "answer_groups", answer_groups)


def test_answers_of_a_real_model_go_on_after_a_stop(work, capsys):
    work.predict()
    whole = work.output.read_bytes()
    first, second, third, *_ = whole.splitlines(keepends=True)
    work.output.write_bytes(first + second + third[:20])
    work.predict("--batch_size", "2")
    assert work.output.read_bytes() == whole
    assert "holds 2 of 5 answers; continuing from there" in capsys.readouterr().out


def test_an_answer_has_a_limit_of_its_own(work, models, capsys):
    work.predict()
    tokenizer = predict.load_tokenizer("glm3", str(models / "a"))
    whole = [tokenizer.encode_texts([row["prediction"]])[0].tolist() for row in work.lines()]
    assert max(map(len, whole)) > 9
    work.predict("--max_new_tokens", "2", "--overwrite")
    assert all(len(row["prediction"]) <= 40 and not row["ended"] for row in work.lines())
    assert "5 cut at --max_length 100 or --max_new_tokens 2" in capsys.readouterr().out


def test_drawn_answers_are_those_of_a_run_without_a_stop(work):
    flags = ("--do_sample", "--temperature", "3", "--batch_size", "2", "--max_length", "60")
    work.predict(*flags)
    whole = work.output.read_bytes()
    work.output.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    work.predict(*flags)
    assert work.output.read_bytes() == whole


def test_a_whole_file_needs_no_model(work, echo):
    work.predict()
    work.predict()
    assert len(echo) == 1


@pytest.mark.parametrize(
    ("flags", "model", "said"),
    [
        ((), "b", "weights of --model_path"),
        (("--max_length", "80"), "a", "--max_length (100 before, 80 now); --max_src_len (84 before, 64 now)"),
        (("--max_src_len", "50"), "a", "--max_src_len (84 before, 50 now)"),
        (("--do_sample",), "a", "--do_sample (False before, True now); --seed (None before, 1234 now)"),
        (("--num_beams", "2"), "a", "--num_beams (1 before, 2 now)"),
        (("--max_new_tokens", "9"), "a", "--max_new_tokens (None before, 9 now)"),
        (("--repetition_penalty", "1.1"), "a", "--repetition_penalty (1.0 before, 1.1 now)"),
    ],
)
def test_answers_that_were_made_otherwise_are_refused_and_overwritten_if_asked(work, echo, flags, model, said):
    work.predict()
    before = work.output.read_bytes()
    with pytest.raises(UserError, match=r"out.jsonl holds 5 answers of .*/a that were produced differently: ") as error:
        work.predict(*flags, model=model)
    assert said in str(error.value)
    assert "--overwrite" in str(error.value)
    assert "\n" not in str(error.value)
    assert work.output.read_bytes() == before
    assert len(echo) == 1  # refused before the model was loaded
    work.predict(*flags, "--overwrite", model=model)
    assert [row["prediction"] for row in work.lines()] == [f"{model}:写：{text}" for text in TEXT[:5]]
    work.predict(*flags, model=model)


def test_another_file_to_answer_is_refused(work, echo):
    work.predict()
    write_rows(work.rows, 6)
    with pytest.raises(UserError, match="SHA-256 of --predict_path"):
        work.predict()


def test_what_does_not_change_answers_may_change(work, echo):
    work.predict()
    lines = work.output.read_text().splitlines(keepends=True)
    work.output.write_text("".join(lines[:1]))
    work.predict("--batch_size", "3", "--metrics", "text")
    assert len(work.lines()) == 5


def test_config_tokenizer_manifest_and_adapter_are_part_of_a_model(models, tmp_path):
    folder = shutil.copytree(models / "a", tmp_path / "m")
    tokenizer = predict.load_tokenizer("glm3", str(folder))

    def described():
        return answers.describe_model("glm3", str(folder), str(folder), tokenizer)

    first = described()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layernorm_epsilon": 0.1}))
    (changed,) = answers.compare(first, described())
    assert changed == "layernorm_epsilon in config.json of --model_path (1e-05 before, 0.1 now)"
    (folder / "manifest.json").write_text("{}")
    assert "manifest.json of --model_path" in " ".join(answers.compare(first, described()))

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nowhere"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    with pytest.raises(UserError, match="its base model nowhere is not here; name it with --ori_model_dir"):
        find_base(str(adapter), None)
    assert find_base(str(adapter), str(folder)) == str(folder)
    one = answers.describe_model("glm3", str(adapter), str(folder), tokenizer)
    (adapter / "adapter_model.safetensors").write_bytes(b"2")
    (changed,) = answers.compare(one, answers.describe_model("glm3", str(adapter), str(folder), tokenizer))
    assert changed.startswith("adapter_model.safetensors of --model_path")


def test_answers_without_a_record_are_refused(work, echo):
    work.predict()
    record = Path(f"{work.output}.run.json")
    for content in (None, "{", "[]", '{"format": 99, "settings": {}, "rows": 5, "model": "a"}'):
        record.unlink()
        if content:
            record.write_text(content)
        with pytest.raises(
            UserError, match=r"holds answers without out.jsonl.run.json, so it is unknown what produced them"
        ):
            work.predict(model="b")
        work.predict("--overwrite")


@pytest.mark.parametrize("content", ["[1]\n", "my notes\n", '{"prediction": 3}\n', "[" * 100_000 + "\n", "no end"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_other_files_are_never_overwritten(work, echo, content, flags):
    work.output.parent.mkdir()
    work.output.write_text(content)
    with pytest.raises(UserError, match=r"out.jsonl is not an answer file; choose another one"):
        work.predict(*flags)
    assert work.output.read_text() == content
    assert not echo


def test_lines_that_are_no_answers_after_some_that_are_do_not_vanish(work, echo):
    work.predict()
    text = work.output.read_text() + "my notes\n"
    work.output.write_text(text)
    with pytest.raises(UserError, match="does not hold the rows of --predict_path in their order"):
        work.predict()
    assert work.output.read_text() == text


def test_the_file_to_answer_is_not_the_file_of_answers(work, echo):
    text = work.rows.read_text()
    work.output = work.rows
    with pytest.raises(UserError, match="--output_path and --predict_path are one file"):
        work.predict("--overwrite")
    assert work.rows.read_text() == text


def test_one_process_at_a_time(work, echo):
    work.output.parent.mkdir()
    with open(work.output, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another predict.py is writing to .*out.jsonl"):
            work.predict()
    assert not echo
    work.predict()
    assert len(work.lines()) == 5


def test_what_cannot_be_written_is_found_before_the_model_is_loaded(work, echo, monkeypatch):
    work.output.mkdir(parents=True)
    with pytest.raises(UserError, match=r"out.jsonl is not a regular file"):
        work.predict()
    work.output = Path(os.devnull)
    with pytest.raises(UserError, match="null is not a regular file"):
        work.predict()
    work.output = work.rows / "folder" / "out.jsonl"
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory; choose another --output_path"):
        work.predict()

    def read_only(path, *args, **kwargs):
        raise OSError(30, "Read-only file system", path)

    work.output = work.rows.parent / "out.jsonl"
    monkeypatch.setattr(answers, "open", read_only, raising=False)
    with pytest.raises(UserError, match=r"cannot write .*: Read-only file system; choose another --output_path"):
        answers._open_locked(str(work.output))
    assert not echo


def test_a_full_disk_keeps_the_answers_so_far(work, echo, monkeypatch):
    work.predict()
    whole = work.output.read_bytes()
    part, before = Path(f"{work.output}.part-0"), resource.getrlimit(resource.RLIMIT_FSIZE)
    room = []  # what a file may have when three rows are answered: not all of the answer file, or none of the next line

    def reply(model, row, question) -> str:
        if room and part.read_text().count("\n") == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room.pop() or part.stat().st_size + 9, before[1]))
        return f"{model}:{question.prompt}"

    answer_by(monkeypatch, reply)
    for more, kept in ((len(whole) - 10, 5), (None, 3)):
        room.append(more)
        try:
            with pytest.raises(FolderError, match="and the same command continues from there"):
                work.predict("--overwrite")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert work.output.read_bytes() == b"" and part.read_text().count("\n") == kept
        work.predict()
        assert work.output.read_bytes() == whole and not part.exists()


# Rows


def test_rows_without_references_are_answered_and_not_scored(work, echo, capsys):
    write_rows(work.rows, output=None)
    work.predict()
    out = capsys.readouterr().out
    assert "no scores: the file has no references (output); outputs: 100.0% end by themselves" in out
    assert "exact match" not in out
    assert "output" not in work.lines()[0]
    with pytest.raises(UserError, match="has no references"):
        inputs.read_answers(str(work.output))
    write_rows(work.rows, output="")
    work.predict("--overwrite")
    assert "no scores: every output is empty" in capsys.readouterr().out
    work.predict("--metrics", "text")
    assert "exact match 0.0000" in capsys.readouterr().out


def test_only_rows_with_references_are_scored(work, echo, capsys):
    rows = [{"instruction": "写：", "input": text} for text in TEXT[:4]]
    rows[1]["output"], rows[2]["output"] = f"a:写：{TEXT[1]}", ["x", ""]
    work.rows.write_text("\n".join(map(json.dumps, rows)))
    work.predict("--metrics", "text")
    out = capsys.readouterr().out
    assert "scored: the 2 of 4 rows that have references (output)" in out
    assert "exact match 0.5000" in out


def test_queries_that_are_cut_are_named(work, echo, capsys):
    rows = [{"instruction": "写：", "input": text} for text in ("短", TEXT[0] * 3, "短", TEXT[0] * 4)]
    work.rows.write_text("\n\n".join(map(json.dumps, rows)))
    work.predict("--max_src_len", "40")
    assert "the end of the query is cut at --max_src_len 40 in 2 rows (lines 3, 7)" in capsys.readouterr().out
    work.predict("--max_src_len", "900", "--overwrite", "--max_length", "1000")
    assert "is cut" not in capsys.readouterr().out


def test_a_single_query_that_is_cut_is_named(models, capsys):
    command = ["--mode", "glm3", "--model_path", str(models / "a"), "--device", "cpu", "--max_length", "60"]
    predict.main([*command, "--input", TEXT[0] * 3])
    assert "warning: the end of the query is cut at --max_src_len 44" in capsys.readouterr().err
    predict.main([*command, "--input", "短"])
    assert "cut" not in capsys.readouterr().err


# Conversations

FORMATS = Path(__file__).parent / "samples" / "formats"
TOOLS = [{"name": "weather", "description": "查天气"}]
ASKS = [{"role": "system", "content": "说话简短。"}, {"role": "user", "content": "青河天气？"}]
CALL = {
    "role": "tool",
    "name": "weather",
    "parameters": {"city": "青河", "n": [1, None]},
    "observation": {"天气": "晴"},
}
CALL_TEXT = "weather\n```python\ntool_call(city='青河', n=[1, None])\n```"


def write_conversations(path: Path) -> list[dict]:
    """A call to make, an answer to give from an observation, a later question, and one without a reference."""
    calls = [{"function": {"name": "weather", "arguments": json.dumps(CALL["parameters"])}}]
    rows = [
        {"id": 1, "tools": TOOLS, "messages": [*ASKS, {"role": "assistant", "content": None, "tool_calls": calls}]},
        {"id": 2, "tools": TOOLS, "conversations": [*ASKS, CALL, {"role": "assistant", "content": "晴。"}]},
        {"id": 3, "instruction": "梅江呢？", "output": "雨。", "history": [["青河天气？", "晴。"]], "system": "短。"},
        {"id": 4, "tools": TOOLS, "conversations": [*ASKS, CALL]},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return rows


def test_the_last_turn_of_each_conversation_is_asked_as_the_official_chat_asks_it(work, monkeypatch):
    asked = {}
    monkeypatch.setattr(predict, "load_model", lambda args: (predict.load_tokenizer(args.mode, args.model_path), None))

    def generate_in_slots(model, tokenizer, groups, slots, **options):
        for request in itertools.chain.from_iterable(groups):
            asked[request.row] = request.prompt
            yield Answer(request.row, [], True)

    monkeypatch.setattr(predict, "generate_in_slots", generate_in_slots)
    rows = write_conversations(work.rows)
    work.predict("--max_length", "900")
    encode = predict.load_tokenizer("glm3", str(work.models / "a")).encode_prompt
    system = {"role": "system", "content": "说话简短。", "tools": TOOLS}
    call = {"role": "assistant", "metadata": "weather", "content": CALL_TEXT.split("\n", 1)[1]}
    history = [system, ASKS[1], call]
    earlier = [{"role": "system", "content": "短。"}, ASKS[1], {"role": "assistant", "content": "晴。"}]
    observed = encode('{"天气": "晴"}', history, role="observation")
    assert asked == dict(enumerate([encode("青河天气？", [system]), observed, encode("梅江呢？", earlier), observed]))
    answered = work.lines()
    assert [{key: row[key] for key in before} for row, before in zip(answered, rows, strict=True)] == rows
    assert [row.get("output") for row in answered] == [CALL_TEXT, "晴。", "雨。", None]
    assert not any("tool_call" in row for row in answered)


def test_calls_stand_beside_the_prediction_and_are_scored(work, echo, monkeypatch, capsys):
    replies = [CALL_TEXT, "晴。", "time\n```python\ntool_call()\n```", CALL_TEXT[:-4]]
    answer_by(monkeypatch, lambda model, row, question: replies[row])
    write_conversations(work.rows)
    with pytest.raises(UserError, match=r"rows\.json line 2: --max_src_len: .* less than the \d+ ids of what stands"):
        work.predict()
    work.predict("--batch_size", "2", "--max_length", "900")
    calls = [row.get("tool_call") for row in work.lines()]
    parameters = CALL["parameters"]
    assert calls == [{"name": "weather", "parameters": parameters}, None, {"name": "time", "parameters": {}}, None]
    out = capsys.readouterr().out
    assert "keys not used: id (4 rows)" in out and "scored: the 3 of 4 rows" in out
    assert "tool_calls: right 0.6667 (name 0.6667, parameters 0.6667)" in out
    # the answers are rows that can be answered again, by the same command and as a file of their own
    work.predict("--max_length", "900")
    assert len(echo) == 1
    work.rows = work.output.rename(work.rows.parent / "again.jsonl")
    replies[:] = ["a"] * 4
    work.predict("--max_length", "900")
    assert [row["prediction"] for row in work.lines()] == ["a"] * 4 and "tool_call" not in work.lines()[0]


def test_a_report_reads_answers_to_conversations(work, echo):
    work.rows.write_text("\n".join((FORMATS / f"{name}.jsonl").read_text() for name in ("chatglm3", "sharegpt")))
    work.predict("--max_length", "900")
    rows, _, references, _ = inputs.read_answers(str(work.output))
    assert references == [["查继电器，\n再查供电。"], ["看刹车片。"]] * 2
    assert inputs.asked_in(rows[0]) == inputs.asked_in(rows[2]) != inputs.asked_in(rows[1])
    assert page.input_text(rows[0]).split("\n")[0] == "发动机水温高，怎么办？"
    rows[0]["conversations"][0]["role"] = "nobody"
    work.output.write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(UserError, match="line 1: a row of ChatGLM3 conversations"):
        inputs.read_answers(str(work.output))


def test_messages_that_a_family_lacks_are_refused_with_their_line(work, echo, tmp_path):
    make_tiny_checkpoint("glm2", str(tmp_path / "c"), TEXT, layers=1, hidden_size=32, heads=2, vocab_size=1000)
    work.models = tmp_path
    write_conversations(work.rows)
    with pytest.raises(DataError, match=r"rows\.json line 1: glm2 has no tools: train --mode glm3"):
        work.predict("--mode", "glm2", model="c")
    assert not echo


def test_conversations_that_lose_turns_are_named(work, echo, capsys):
    history = [[text, text] for text in TEXT[:4]]
    write_rows(work.rows, 2, history=history)
    work.predict("--max_src_len", "90", "--max_length", "120")
    told = "conversations lose turns from their beginning to --max_src_len 90 in 2 rows (lines 1, 2)"
    assert told in capsys.readouterr().out


# Reports


def test_reports_take_whole_files_only(work, echo):
    work.predict()
    assert len(inputs.read_answers(str(work.output))[0]) == 5
    text = work.output.read_text()
    lines = text.splitlines(keepends=True)
    work.output.write_text("".join(lines[:3]))
    with pytest.raises(UserError, match=r"holds 3 of 5 answers; the same predict.py command continues"):
        inputs.read_answers(str(work.output))
    twice = "".join(line * 2 for line in lines)
    work.output.write_text(twice)
    with pytest.raises(UserError, match="holds 10 answers to 5 rows"):
        inputs.read_answers(str(work.output))
    Path(f"{work.output}.run.json").unlink()
    with pytest.raises(UserError, match="answers each row 2 times"):
        inputs.read_answers(str(work.output))
    work.output.write_text(text + lines[0])  # a file may hold a row twice
    assert len(inputs.read_answers(str(work.output))[0]) == 6
