"""Formats of rows: the same conversations in each of them give the same samples; labels cover what is to be learnt;
each kind of broken row has its one line.
"""

import argparse
import json
from pathlib import Path

import pytest

import train
from glm_models import MODE
from glm_models.tools import write_parameters
from tuning.errors import DataError
from tuning.run.validation import Validation
from tuning.samples.check import FILE, check_data
from tuning.samples.conversations import read_conversation
from tuning.samples.dataset import DataSettings, InstructionData
from tuning.samples.dialogue import Dialogue
from tuning.samples.encoding import IGNORE_INDEX
from tuning.samples.formats import Columns, read_row, unused_keys
from tuning.samples.row_files import read_rows, scan_rows

FILES = Path(__file__).resolve().parent / "formats"
COLUMNS = {"columns.jsonl": Columns("问", "答", "前文")}
FLAT = ["instruction", "prompt_response", "content_summary", "query_response", "columns"]
CONVERSATIONS = ["chatglm3", "openai", "sharegpt"]
modes = pytest.mark.parametrize("mode", MODE)


def read(tokenizer, name, **more) -> InstructionData:
    return InstructionData(DataSettings(str(FILES / name), 900, 800, columns=COLUMNS.get(name), **more), tokenizer)


def samples_of(tokenizer, name, **more) -> list:
    data = read(tokenizer, name, **more)
    assert "not used" not in data.summary()
    return [(int(line), sample) for line, sample in zip(data.lines, data.samples, strict=True)]


@modes
@pytest.mark.parametrize("train_on", [None, "all", "last"])
def test_all_formats_give_the_same_samples(tokenizers, mode, train_on):
    tokenizer, how = tokenizers[mode], {"train_on": train_on}
    wanted = samples_of(tokenizer, "instruction.jsonl", **how)
    for name in FLAT:
        assert samples_of(tokenizer, f"{name}.jsonl", **how) == wanted
    if train_on is None:  # a history is read, all of a conversation is learnt
        assert [line for line, _ in wanted] == [1, 2]
        assert wanted == samples_of(tokenizer, "instruction.jsonl", train_on="last")
        wanted = samples_of(tokenizer, "instruction.jsonl", train_on="all")
    for name in CONVERSATIONS:
        assert samples_of(tokenizer, f"{name}.jsonl", **how) == wanted
    count = 3 if train_on != "last" and mode != "glm3" else 2
    assert len(wanted) == count and sum(len(sample.spans) for _, sample in wanted) == 3 - (train_on == "last")


def tool_sample(tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of the conversation in tools_*.jsonl, message by message as the official chat writes it."""
    row = json.loads((FILES / "tools_chatglm3.jsonl").read_text(encoding="utf-8"))
    system, user, said, tool, answer = row["conversations"]
    text = f"{system['content']}\n{json.dumps(row['tools'], indent=4, ensure_ascii=False)}"
    messages = [("system", "", text, False), ("user", "", user["content"], False)]
    messages += [("assistant", "", said["content"], False)]
    messages += [("assistant", tool["name"], write_parameters(tool["parameters"]), True)]
    messages += [("observation", "", json.dumps(tool["observation"], ensure_ascii=False), False)]
    messages += [("assistant", "", answer["content"], True)]
    ids, learnt = tokenizer.get_prefix_tokens(), [False, False]
    for role, metadata, content, learn in messages:
        one = tokenizer.build_single_message(role, metadata, content)
        ends = learnt[-1]  # the role that stops the chat
        ids, learnt = ids + one, [*learnt, ends, *[learn] * (len(one) - 1)]
    ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, learnt[-1]]
    return ids, [token if learn else IGNORE_INDEX for token, learn in zip(ids, learnt, strict=True)]


def test_tool_conversations_of_all_formats_are_what_the_official_chat_writes(tokenizers):
    ids, labels = tool_sample(tokenizers["glm3"])
    for name in CONVERSATIONS:
        ((_, sample),) = samples_of(tokenizers["glm3"], f"tools_{name}.jsonl")
        assert (sample.input_ids, sample.labels) == (ids, labels)


def test_dump_samples_writes_what_training_sees(tokenizers, tiny, tmp_path, capsys):
    out = tmp_path / "new" / "samples.jsonl"
    paths = {name: FILES / f"{name}.jsonl" for name in ("tools_openai", "columns")}
    flags = ["--mode", "glm3", "--model_name_or_path", tiny["glm3"], "--data_cache", "none", "--max_src_len", "900"]
    flags += ["--dump_samples", str(out)]
    train.main([*flags, "--train_path", str(paths["tools_openai"])])
    assert f"1 samples: {out}" in capsys.readouterr().out
    ids, labels = tool_sample(tokenizers["glm3"])
    wanted = {"file": str(paths["tools_openai"]), "line": 1, "input_ids": ids, "labels": labels}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [wanted]
    with pytest.raises(SystemExit):
        train.main([*flags, "--train_path", str(paths["tools_openai"])])
    assert "is there already; name a new one" in capsys.readouterr().err
    out.unlink()
    columns = ["--prompt_column", "问", "--response_column", "答", "--history_column", "前文", "--train_on", "all"]
    train.main([*flags, *columns, "--train_path", str(paths["columns"])])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = samples_of(tokenizers["glm3"], "openai.jsonl")
    assert [(one["line"], one["input_ids"], one["labels"]) for one in found] == [
        (line, sample.input_ids, sample.labels) for line, sample in wanted
    ]


def test_check_data_says_which_format_each_row_has(tokenizers, tmp_path):
    path = tmp_path / "rows.jsonl"
    names = ("instruction", "openai", "sharegpt")
    path.write_text("".join((FILES / f"{name}.jsonl").read_text(encoding="utf-8") for name in names), encoding="utf-8")
    said = []
    check_data([DataSettings(str(path), 900, 800)], tokenizers["glm3"], None, str(tmp_path), said.append)
    assert (
        "formats: question and answer, history: 1 row (line 1); question and answer: 1 row (line 2); "
        "OpenAI messages: 2 rows (lines 3, 4); ShareGPT (conversations with from and value): 2 rows (lines 5, 6)"
    ) in said
    findings = [json.loads(line) for line in (tmp_path / FILE).read_text(encoding="utf-8").splitlines()]
    runs = [(one["line"], one["to_line"], one["format"][:8]) for one in findings if one["kind"] == "format_of_rows"]
    assert runs == [(1, 1, "question"), (2, 2, "question"), (3, 4, "OpenAI m"), (5, 6, "ShareGPT")]


# Rows that cannot be read

USER, ANSWER = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
BAD = [
    ({"messages": [USER, {"from": "gpt", "value": "答"}]}, "messages[1] has no 'role'"),
    ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}, "a row has one conversation"),
    ({"messages": [USER, ANSWER], "instruction": "问"}, "mixes two formats: OpenAI messages, and instruction"),
    ({"messages": [USER, ANSWER], "output": "其他"}, "an output that is not its last answer"),
    ({"messages": [USER, ANSWER], "images": ["a.png"]}, "the key 'images' holds images or sound"),
    ({"messages": [USER]}, "nothing is learnt: it has no answer"),
    ({"messages": [USER, ANSWER | {"loss": False}]}, "nothing is learnt: every one has loss false"),
    ({"messages": [USER | {"loss": True}, ANSWER]}, "asks to learn a message of the role user"),
    ({"messages": [USER, ANSWER | {"loss": 0.5}]}, "loss of messages[1] must be true or false, not 0.5"),
    ({"messages": [USER, ANSWER | {"weight": 2}]}, "weight of messages[1] must be 0 or 1, not 2"),
    ({"messages": [ANSWER, USER, ANSWER]}, "begins with a message of assistant"),
    ({"messages": [USER, ANSWER, {"role": "system", "content": "x"}]}, "a system message that does not stand first"),
    ({"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"}, "and another one in messages"),
    ({"messages": [USER, ANSWER | {"content": None}]}, "content of messages[1] must be a string, not null"),
    ({"messages": [USER, ANSWER | {"content": " "}]}, "an answer is empty; --allow_empty_output"),
    ({"messages": [USER | {"content": ""}, ANSWER]}, "an empty message of the user"),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]}, "has a part of type 'image_url'"),
    ({"messages": [USER, {"role": "bot2", "content": "答"}]}, "the role of messages[1] must be one of system, "),
    ({"messages": [USER, "答"]}, "messages[1] must be an object with a role and a text, not a string"),
    ({"messages": [USER, CALL, ANSWER]}, "before messages[2] stands nothing that the tool 'f' returned"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "what a tool returned, without a call before it"),
    (
        {"messages": [USER, CALL, {"role": "tool", "tool_call_id": "b", "content": "x"}, ANSWER]},
        "answers the call 'b', which is not there",
    ),
    (
        {"messages": [USER, CALL | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, ANSWER]},
        "arguments of messages[1] is not valid JSON",
    ),
    (
        {"conversations": [USER, {"role": "tool", "name": "", "parameters": {}, "observation": 1}, ANSWER]},
        "a tool's name must be a text that is not empty",
    ),
    (
        {"conversations": [USER, {"role": "tool", "name": "f", "parameters": {}}, ANSWER]},
        "the tool message conversations[1] has no observation",
    ),
    (
        {"messages": [USER, CALL | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]}]},
        "arguments of messages[1] is not valid JSON: the key 'a' stands twice in an object",
    ),
    (
        {"messages": [USER, CALL | {"tool_calls": [{"name": "f", "arguments": "{}", "parameters": {}}]}]},
        "a tool call of messages[1] has both arguments and parameters",
    ),
    (
        {"conversations": [USER, {"role": "tool", "name": "f", "parameters": {}, "observation": 1, "content": "x"}]},
        "conversations[1] has 'content', and what the tool returned under 'observation' too",
    ),
    (
        {"messages": [USER, {"role": "tool_call", "content": "{}", "arguments": "{}"}]},
        "messages[1] has 'arguments', and a call under 'content' too",
    ),
    (
        {"conversations": [USER, {"role": "tool", "name": "f", "parameters": {}, "observation": None}]},
        "the tool message conversations[1] has no observation",
    ),
    (
        {"messages": [USER, CALL, {"role": "tool", "content": "r", "observation": "other"}, ANSWER]},
        "messages[2] has 'observation', but no parameters, so it is no call",
    ),
    ({"messages": [USER, ANSWER | {"arguments": "{}"}]}, "messages[1] has 'arguments', which would be lost"),
    ({"messages": [USER, ANSWER | {"metadata": "f\ng"}]}, "metadata of messages[1], the name of a tool, has a line"),
    ({"messages": [USER | {"metadata": "f"}, ANSWER]}, "messages[0] has 'metadata', which would be lost: it is not "),
    ({"messages": [USER | {"tools": [{"name": "f"}]}, ANSWER]}, "messages[0] has 'tools', which would be lost: it is"),
    ({"messages": [USER | {"tool_calls": [{"id": 1}]}, ANSWER]}, "messages[0] has 'tool_calls', which would be lost"),
    ({"messages": [USER, ANSWER | {"observation": "x"}]}, "messages[1] has 'observation', which would be lost"),
    ({"messages": [USER, CALL | {"metadata": "g"}]}, "messages[1] has metadata, the name of a tool, and tool calls"),
    ({"messages": [USER, ANSWER | {"value": "x"}]}, "messages[1] has 'value', which would be lost: it is not read of"),
    ({"conversations": [USER, ANSWER], "tools": [3]}, "tools must be a list of objects"),
    ({"conversations": [USER, ANSWER | {"content": "\ud83d"}]}, "an unpaired surrogate"),
    ({"conversations": "user: 问"}, "conversations must be a list of messages, not a string"),
    ({"conversations": []}, "conversations is empty"),
    ({"Messages": [USER, ANSWER]}, "the key 'Messages' must be written 'messages'"),
    (
        {"prompt": "问", "response": "答", "content": "问", "summary": "答"},
        "mixes two formats: prompt and response, and",
    ),
    ({"prompt": "问", "response": "答", "input": "x"}, "mixes two formats: prompt and response, and input"),
    (
        {"instruction": "问", "output": "答", "prompt": "x", "response": "y"},
        "mixes two formats: instruction and output",
    ),
    ({"prompt": "问", "response": ["答"]}, "response must be a string, not a list"),
    ({"prompt": "问", "respnse": "答"}, "the nearest format is prompt and response, of which it lacks response"),
    ({"anything": "问", "else": "答"}, "or the columns that --prompt_column and others name"),
    (
        {"prompt": "问", "response": "答", "history": "你好"},
        "history must be a list of pairs [question, answer], not a s",
    ),
    ({"instruction": "问", "output": "答", "history": [["a"]]}, "history[0] is a list of another form"),
    ({"instruction": "问", "output": "答", "system": ["a"]}, "system must be a string, not a list"),
]


@pytest.mark.parametrize(("row", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_a_row_that_cannot_be_read_has_one_line(tmp_path, row, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "问", "response": "答"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        list(read_rows(str(path)))
    message = str(error.value)
    assert message.startswith(f"{path} line 2: ") and says in message and message.isprintable() and len(message) < 600


def test_the_history_of_a_question_without_an_answer_is_checked():
    row = {"instruction": "问", "history": [["a"]]}
    assert "history[0] is a list of another form" in str(read_row(dict(row), missing_outputs=True))
    assert "history[0] is a list of another form" in str(read_row(row | {"output": None}, missing_outputs=True))


NULLS = dict.fromkeys(("metadata", "tools", "tool_calls", "function_call", "name", "tool_call_id", "weight", "loss"))
NULLS |= dict.fromkeys(("parameters", "observation", "images", "role", "content", "from", "value", "id", "refusal"))
ROW_NULLS = dict.fromkeys(("tools", "functions", "system", "id", "parallel_tool_calls", "history", "instruction"))
ROW_NULLS |= dict.fromkeys(("input", "output", "conversations", "messages", "text", "label", "function_call"))


@pytest.mark.parametrize("name", [*CONVERSATIONS, *(f"tools_{name}" for name in CONVERSATIONS)])
def test_null_is_as_no_such_key(name):
    """Programs that give all rows and messages the same keys write null under those of others."""
    for line in (FILES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row, full = json.loads(line), ROW_NULLS | json.loads(line)
        key = "messages" if "messages" in row else "conversations"
        full[key] = [NULLS | message for message in full[key]]
        for message in full[key]:
            if message["tool_calls"]:
                message["tool_calls"] = [{"content": None, "index": 0} | call for call in message["tool_calls"]]
        plain = read_row(row)
        assert isinstance(plain, Dialogue) and read_row(full) == plain
        assert unused_keys([full]) == unused_keys([dict.fromkeys(full.keys() - {"tools"}) | row])


def test_an_empty_answer_of_a_history_is_learnt_only_if_asked():
    row = {"instruction": "问", "output": "答", "history": [["问", " "]]}
    assert isinstance(read_row(dict(row)), Dialogue)
    assert "an answer of history is empty; --allow_empty_output" in str(read_row(dict(row), train_on="all"))
    assert isinstance(read_row(dict(row), train_on="all", empty_outputs=True), Dialogue)


def test_keys_of_messages_that_nothing_reads_are_named():
    messages = [USER | {"name": "Eva", "tool_call_id": "a", "seed": 1}, ANSWER | {"name": None, "refusal": None}]
    row = {"messages": messages, "parallel_tool_calls": False, "id": 7}
    assert isinstance(read_row(row), Dialogue)
    named = ["id", "messages[].name", "messages[].seed", "messages[].tool_call_id", "parallel_tool_calls"]
    assert unused_keys([row]) == "keys not used: " + ", ".join(f"{name} (1 row)" for name in named)


def test_columns_that_are_not_there_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row, says in (
        ({"问": "a"}, "there is no '答' (--response_column); the row has '问'"),
        ({"问": 3, "答": "b"}, "'问' (--prompt_column) must be a string, not a number"),
        ({"问": "a", "答": "b", "input": "c"}, "mixes two formats: the columns of the flags, and input"),
    ):
        path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        ((_, error),) = scan_rows(str(path), columns=Columns("问", "答"))
        assert says in str(error)


def test_a_family_without_a_role_refuses_the_row_alone(tokenizers, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [(FILES / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("tools_openai", "openai")]
    path.write_text("".join(rows), encoding="utf-8")
    for mode in ("glm", "glm2"):
        with pytest.raises(DataError, match=f"line 1: {mode} has no tools: train --mode glm3"):
            InstructionData(DataSettings(str(path), 900, 800), tokenizers[mode])
        data = InstructionData(DataSettings(str(path), 900, 800, skip_bad=True), tokenizers[mode])
        assert {*data.lines.tolist()} == {2, 3}


def test_a_call_in_a_row_of_few_keys_is_refused_alone_too(tokenizers, tmp_path):
    path = tmp_path / "rows.jsonl"
    call = {"role": "tool", "name": "time", "parameters": {}, "observation": "10:30"}
    turns = [{"role": "user", "content": "几点？"}, call, {"role": "assistant", "content": "十点半。"}]
    rows = [{"conversations": turns}, {"instruction": "问", "input": "", "output": "答"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    for mode in ("glm", "glm2"):
        data = InstructionData(DataSettings(str(path), 900, 800, skip_bad=True), tokenizers[mode])
        assert data.lines.tolist() == [2] and data.findings["family"] == [1, [1]]


def test_turns_that_are_lost_are_reported(tokenizers):
    for mode in MODE:
        limits = int(read(tokenizers[mode], "openai.jsonl").lengths.max()) - 1, 60
        long = InstructionData(DataSettings(str(FILES / "openai.jsonl"), *limits), tokenizers[mode])
        assert long.turns_lost == 1
        assert "; 1 conversations lost 1 turns from their beginning, to fit" in long.summary()
        skipped = InstructionData(DataSettings(str(FILES / "openai.jsonl"), *limits, skip_cut=True), tokenizers[mode])
        assert len(skipped) == len(long) - 1 and skipped.turns_lost == 1


@modes
def test_validation_knows_each_learnt_answer_of_a_conversation(tokenizers, mode):
    validation = object.__new__(Validation)
    validation.tokenizer = tokenizers[mode]
    validation.args = argparse.Namespace(max_len=900, max_src_len=800, train_on=None)
    found = [pair for _, row in read_rows(str(FILES / "sharegpt.jsonl")) for pair in validation._answers(row)]
    data = read(tokenizers[mode], "sharegpt.jsonl")
    answers = [(sample, span) for sample in data.samples for span in sample.spans]
    assert [place for place, _ in found] == [(tuple(sample.input_ids), start) for sample, (start, _) in answers]
    for (sample, (start, end)), (_, row) in zip(answers, found, strict=True):
        written = tokenizers[mode].as_written([row["output"]])[0]
        assert tokenizers[mode].decode_answer(sample.input_ids[start : end - 1]) == written


@pytest.mark.parametrize("blank", ["", "  ", "\n", None])
def test_blank_tools_are_no_tools_and_not_an_empty_list(blank):
    """Under the row, and in ChatGLM3's own form under the system message, where an empty list would be written."""
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    inside = [talk[0] | {"tools": blank}, *talk[1:]]
    for row in ({"messages": talk, "tools": blank}, {"conversations": talk, "tools": blank}, {"conversations": inside}):
        assert read_conversation(row, next(iter(row))).tools is None
    assert read_conversation({"conversations": [talk[0] | {"tools": []}, *talk[1:]]}, "conversations").tools == "[]"
