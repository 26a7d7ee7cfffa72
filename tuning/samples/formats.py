"""Formats of rows: which ones are read, what is wrong with a row, and its normal form, a `Dialogue`.

`read_row` checks a parsed row, gives it our keys, and makes its dialogue; nothing else does. Read are:

- instruction, input, output, with `history` ([[question, answer], ...]) and `system` where there are any;
- FLAT: the same under the names of other programs, and columns that flags name (`Columns`);
- conversations of several messages, see conversations.py.

foreign.py lists formats that are recognised and not read; LOST lists keys that mean something to other programs and
that are not read here. In the commands FILE and NEW stand for the user's own file names, KEY for a key too long to
show; the commands work on JSON lines and on arrays.
"""

import collections
import difflib
import functools
from collections.abc import Iterable
from typing import NamedTuple

from tuning.samples import conversations
from tuning.samples.conversations import conversation_key, read_conversation, style_of
from tuning.samples.dialogue import Dialogue, Message
from tuning.samples.flaws import (
    EACH,
    HALF_PAIR,
    BadRow,
    Flaw,
    as_string,
    has_half_pair,
    holds_text,
    jq_name,
    kind_of_value,
    plain_name,
    says_something,
    shown_key,
)
from tuning.samples.foreign import (
    FLAT,
    FORMATS,
    KEYS,
    LOST,
    NEAR,
    OPTIONAL,
    Lost,
    names_text,
    nearest_format,
    recognise,
)
from tuning.samples.text import KEY, is_text, text_dialogue, text_problem

ROW_FORMAT = 6  # part of a cache file's key: increase it when other rows are accepted, or read in another way
SHOWN_KEYS = 8  # that are not used
DEEPEST = 100  # maximum nesting of objects and lists
# keys that may hold the input's text where there is no input
NAMES_OF_INPUT = {"inputs", "context", "query", "question", "text", "prompt", "content", "passage", "document"}


class Columns(NamedTuple):
    """Names of the keys of a file's rows, by --prompt_column, --response_column and --history_column."""

    prompt: str
    response: str | None = None
    history: str | None = None

    @classmethod
    def of(cls, args) -> "Columns | None":
        """What the flags of a script name; None if they name nothing."""
        return cls(args.prompt_column, args.response_column, args.history_column) if args.prompt_column else None


def read_row(
    row,
    *,
    several_outputs: bool = False,
    empty_outputs: bool = False,
    missing_outputs: bool = False,
    columns: Columns | None = None,
    texts: bool = False,
    train_on: str | None = None,
) -> Dialogue | Flaw:
    """The normal form of a value from a file, or why it is no valid row.

    It changes the row: a question and an answer under other names get ours; a missing or null input becomes ""; with
    missing_outputs a null output is removed; a conversation that ends with an answer gets that as output.

    Args:
        train_on: see `to_dialogue`; for the others see `row_files.scan_rows`.
    """
    if not isinstance(row, dict):
        return Flaw("type", f"a row must be an object with instruction, input and output, not {kind_of_value(row)}")
    if columns is not None and (flaw := _name_columns(row, columns, missing_outputs)):
        return flaw
    if row.keys() != KEYS:
        if key := conversation_key(row):
            found = _read_conversation(row, key, empty_outputs, missing_outputs)
            return _learn_last(found) if train_on == "last" and isinstance(found, Dialogue) else found
        if flaw := _name_fields(row, missing_outputs):
            return flaw
    if missing_outputs and row.get("output", "") is None:
        del row["output"]
    if texts and is_text(row, KEYS):
        return _flaw_of_text(row) or text_dialogue(row)
    if row.keys() != KEYS and (flaw := _flaw_of_keys(row, missing_outputs)):
        return flaw
    if row.get("input") is None:
        row["input"] = ""
    if flaw := _flaw_of_texts(row, several_outputs, empty_outputs):
        return flaw
    earlier = row["history"] if train_on == "all" and says_something(row.get("history")) else ()
    if earlier and not empty_outputs and not all(answer.strip() for _, answer in earlier):
        return Flaw("empty", "an answer of history is empty; --allow_empty_output trains such rows to answer nothing")
    return _dialogue_of_fields(row, train_on)


def _flaw_of_texts(row: dict, several_outputs: bool, empty_outputs: bool) -> Flaw | None:
    """What is wrong with the values of a row that has our keys."""
    for key in ("instruction", "input"):
        if not isinstance(row[key], str):
            return Flaw("type", f"{key} must be a string, not {kind_of_value(row[key])}")
    output = row.get("output", "")
    outputs = output if several_outputs and isinstance(output, list) else [output]
    if not isinstance(output, str) and not (outputs and all(isinstance(one, str) for one in outputs)):
        wanted = "a string or a list of strings" if several_outputs else "a string"
        return Flaw("type", f"output must be {wanted}, not {kind_of_value(output)}{as_string(output)}")
    query = row["instruction"] + row["input"]
    if not query.strip():
        return Flaw("empty", "instruction and input are both empty")
    if not empty_outputs and "output" in row and not all(map(str.strip, outputs)):
        return Flaw("empty", "output is empty; --allow_empty_output trains such rows to answer nothing")
    if row.keys() != KEYS and (flaw := _flaw_of_earlier(row)):
        return flaw
    if has_half_pair(query + "".join(outputs)):
        return HALF_PAIR
    return None


def _flaw_of_earlier(row: dict) -> Flaw | None:
    """What is wrong with the history and the system message of a row."""
    texts = []
    if says_something(system := row.get("system")):
        if not isinstance(system, str):
            return Flaw("type", f"system must be a string, not {kind_of_value(system)}")
        texts.append(system)
    if says_something(history := row.get("history")):
        wanted = "history must be a list of pairs [question, answer]"
        if not isinstance(history, list):
            return Flaw("type", f"{wanted}, not {kind_of_value(history)}")
        for number, pair in enumerate(history):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                return Flaw("type", f"{wanted} of strings; history[{number}] is {kind_of_value(pair)} of another form")
            texts += pair
    if has_half_pair("".join(texts)):
        return HALF_PAIR
    return None


def _read_conversation(row: dict, key: str, empty_outputs: bool, missing_outputs: bool) -> Dialogue | Flaw:
    """As `read_row`, of a row that has a `conversation_key`."""
    if not row.keys() <= conversations.READ and (flaw := _flaw_beside_conversation(row, style_of(row, key))):
        return flaw
    try:
        dialogue = read_conversation(row, key)
    except BadRow as error:
        return error.flaw._replace(problem=f"a row of {style_of(row, key)}: {error}")
    learnt = [message.content for message in dialogue.messages if message.learn]  # answers: no other is learnt
    if not learnt and not missing_outputs:
        answers = any(message.role == "assistant" for message in dialogue.messages)
        why = "every one has loss false" if answers else "it has no answer"
        return Flaw("empty", f"a row of {style_of(row, key)} of which nothing is learnt: {why}")
    if not empty_outputs and not all(map(str.strip, learnt)):
        return Flaw("empty", "an answer is empty; --allow_empty_output trains such rows to answer nothing")
    last = dialogue.answer if dialogue.messages[-1].role == "assistant" else None
    if "output" in row and says_something(row["output"]) and row["output"] != last:
        mixed = "output" if last is None else "an output that is not its last answer"
        return Flaw("format", f"a row that mixes two formats: {style_of(row, key)}, and {mixed}")
    if last is not None:
        row["output"] = last
    return dialogue


def _flaw_beside_conversation(row: dict, style: str) -> Flaw | None:
    """What is wrong with the other keys of a conversation's row."""
    beside = [name for name in ("instruction", "input", "history", KEY) if says_something(row.get(name))]
    if beside or any(one in row and holds_text(row[one]) and holds_text(row.get(other)) for one, other in FLAT):
        return Flaw(
            "format", f"a row that mixes two formats: {style}, and {names_text(beside) or 'question and answer'}"
        )
    for name in _sort_keys(tuple(row)).lost:
        lost = LOST[plain_name(name)]
        if name not in conversations.READ and says_something(row[name], lost.neutral):
            return _lost(name, lost)
    return None


def _name_columns(row: dict, columns: Columns, missing_outputs: bool) -> Flaw | None:
    """Give our names to the columns that flags name."""
    for flag, name in (("--prompt_column", columns.prompt), ("--response_column", columns.response)):
        if missing_outputs and name != columns.prompt and row.get(name) is None:
            continue
        if name not in row:
            there = ", ".join(map(shown_key, [*row][:SHOWN_KEYS]))
            return Flaw("type", f"there is no {shown_key(name)} ({flag}); the row has {there or 'nothing'}")
        if not isinstance(row[name], str):
            return Flaw("type", f"{shown_key(name)} ({flag}) must be a string, not {kind_of_value(row[name])}")
    others = {key: value for key, value in row.items() if key not in columns}
    if beside := [key for key in ("instruction", "input", "output") if says_something(others.get(key))]:
        return Flaw("format", f"a row that mixes two formats: the columns of the flags, and {names_text(beside)}")
    _set_fields(row, others, row[columns.prompt], row.get(columns.response), row.get(columns.history or "history"))
    return None


def _name_fields(row: dict, missing_outputs: bool) -> Flaw | None:
    """Give our names to question and answer of a format in FLAT."""
    found = [pair for pair in FLAT if pair[0] in row and pair[1] in row]
    if not found and missing_outputs and not row.keys() & KEYS:
        found = [pair for pair in FLAT if pair[0] in row]
    if not found:
        return None
    full = [pair for pair in found if all(holds_text(row.get(name)) for name in pair)]
    if "instruction" in row and "output" in row:
        if not full or not holds_text(row["output"]):
            return None
        return Flaw("format", f"a row that mixes two formats: instruction and output, and {names_text(full[0])}")
    if len(full) > 1:
        return Flaw("format", f"a row that mixes two formats: {names_text(full[0])}, and {names_text(full[1])}")
    question, answer = (full or found)[0]
    if beside := [key for key in ("instruction", "input", "output") if says_something(row.get(key))]:
        return Flaw("format", f"a row that mixes two formats: {question} and {answer}, and {names_text(beside)}")
    for key in (question, answer):
        value = row.get(key)
        if not isinstance(value, str) and not (missing_outputs and key == answer and value is None):
            return Flaw("type", f"{key} must be a string, not {kind_of_value(value)}{as_string(value)}")
    others = {key: value for key, value in row.items() if key not in (question, answer)}
    _set_fields(row, others, row[question], row.get(answer), row.get("history"))
    return None


def _set_fields(row: dict, others: dict, question: str, answer: str | None, history) -> None:
    ours = {"instruction": question, "input": ""}
    ours |= {} if answer is None else {"output": answer}
    ours |= {} if history is None else {"history": history}
    others = {key: value for key, value in others.items() if key not in ours}
    row.clear()
    row.update(ours | others)


def to_dialogue(row: dict, train_on: str | None = None) -> Dialogue:
    """The normal form of a row that `read_row` has read before.

    Of several outputs the first is learnt. A row without output becomes a question.

    Args:
        train_on: which answers are learnt: "all" of those that the row does not except, "last" the last one of them;
            None: all those of a conversation, and with a history the output alone.
    """
    if row.keys() != KEYS and (key := conversation_key(row)):
        dialogue = read_conversation(row, key)
        return _learn_last(dialogue) if train_on == "last" else dialogue
    return text_dialogue(row) if is_text(row, KEYS) else _dialogue_of_fields(row, train_on)


def _dialogue_of_fields(row: dict, train_on: str | None) -> Dialogue:
    """`to_dialogue` of a row with our keys."""
    question = Message("user", row["instruction"] + row["input"])
    output = row.get("output")
    if output is not None:
        answer = Message("assistant", output if isinstance(output, str) else output[0], "", True)
        if len(row) == len(KEYS):  # most rows
            return Dialogue((question, answer))
    messages = []
    if says_something(row.get("system")):
        messages.append(Message("system", row["system"]))
    if says_something(row.get("history")):
        for asked, answered in row["history"]:
            messages += (Message("user", asked), Message("assistant", answered, learn=train_on == "all"))
    return Dialogue((*messages, question, *([] if output is None else [answer])))


def _learn_last(dialogue: Dialogue) -> Dialogue:
    """The dialogue, of which the last learnt answer alone is learnt."""
    last = max((i for i, message in enumerate(dialogue.messages) if message.learn), default=None)
    messages = (message._replace(learn=i == last) for i, message in enumerate(dialogue.messages))
    return dialogue._replace(messages=tuple(messages))


def format_of(row: dict) -> str:
    """The name of a valid row's format, after `read_row`."""
    if key := conversation_key(row):
        return style_of(row, key)
    if is_text(row, KEYS):
        return "plain text"
    more = [key for key in sorted(OPTIONAL) if says_something(row.get(key))]
    return ", ".join(("question and answer", *more))


def question_of(row: dict) -> str:
    """The text that a row asks the model to answer."""
    return to_dialogue(row).prompt


# Keys


class _Keys(NamedTuple):
    """The keys of a row, sorted by what to report about them."""

    misspelt: tuple[tuple[str, str], ...]  # as it stands there, as it should be
    lost: tuple[str, ...]  # that are in LOST
    others: tuple[str, ...]  # neither read nor in LOST
    meant: tuple[tuple[str, str], ...]  # of `others`: as it stands there, which of KEYS it may be


@functools.lru_cache(maxsize=4096)
def _sort_keys(keys: tuple[str, ...]) -> _Keys:
    names = {key: plain_name(key) for key in keys if key not in KEYS and key not in OPTIONAL}
    misspelt = tuple((key, name) for key, name in names.items() if name in KEYS)
    lost = tuple(key for key, name in names.items() if name in LOST)
    others = tuple(key for key, name in names.items() if name not in LOST and name not in KEYS)
    meant = tuple((key, name) for key in others if (name := _meant(names[key])) and name not in keys)
    return _Keys(misspelt, lost, others, meant)


def _meant(name: str) -> str | None:
    """Which of KEYS another name may mean: a similar one, or input."""
    if name in NAMES_OF_INPUT:
        return "input"
    return next(iter(difflib.get_close_matches(name, sorted(KEYS), 1, NEAR)), None)


def _flaw_of_keys(row: dict, missing_outputs: bool) -> Flaw | None:
    """What is wrong with a row that does not have exactly our keys."""
    keys = _sort_keys(tuple(row))
    if keys.misspelt:
        wrong = ", ".join(f"{shown_key(key)} must be written {name!r}" for key, name in keys.misspelt)
        return Flaw("type", f"the key {wrong}")
    lacking = [key for key in ("instruction", "output") if key not in row and not (missing_outputs and key == "output")]
    if not lacking and row.keys() <= KEYS | OPTIONAL:
        return None
    if lacking and (flaw := recognise(row)):
        return flaw
    if flaw := _flaw_of_unread(row, keys):
        return flaw
    for key, meant in keys.meant if row.keys() & KEYS else ():
        if holds_text(row[key]):
            name = jq_name(key)
            rename = f"jq -c '{EACH} | .{meant} = .[{name}] | del(.[{name}])' FILE > NEW"
            without = f'; if not, write "" as input: jq -c \'{EACH} | .input = ""\' FILE > NEW' * (meant == "input")
            return Flaw(
                "type",
                f"there is no {meant}, but text under the key {shown_key(key)}; if that is it: {rename}{without}",
            )
    if lacking == ["instruction"] and "input" in row:
        empty = f"jq -c '{EACH} | {{instruction: \"\"}} + .' FILE > NEW"
        return Flaw(
            "type", f"the key 'instruction' is missing, only input is there; where there is none, write {empty}"
        )
    if lacking:
        return Flaw("type", f"the key {lacking[0]!r} is missing; {nearest_format(row)}")
    return None


def _flaw_of_unread(row: dict, keys: _Keys) -> Flaw | None:
    """A key that is not read, but changes what the row means."""
    for key in keys.lost:
        if says_something(row[key], LOST[plain_name(key)].neutral):
            return _lost(key, LOST[plain_name(key)])
    for key in keys.others:
        if isinstance(row[key], dict | list) and (flaw := _flaw_inside(key, row[key])):
            return flaw
    return None


def _flaw_of_text(row: dict) -> Flaw | None:
    """What is wrong with a row of plain text."""
    names = {plain_name(key): key for key in row}
    if any(names.keys() >= {*one.keys} for one in FORMATS if one.keys != (KEY,)):
        return recognise(row)
    if not isinstance(row[KEY], str):
        return Flaw("type", f"text must be a string of plain text, not {kind_of_value(row[KEY])}")
    if problem := text_problem(row, names):
        return Flaw(*problem)
    if flaw := _flaw_of_unread(row, _sort_keys(tuple(row))):
        return flaw
    return HALF_PAIR if has_half_pair(row[KEY]) else None


def _flaw_inside(outer: str, value) -> Flaw | None:
    """A flaw inside the value of a key: a key of LOST that means something, or too deep nesting."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            return Flaw("json", f"the value of {shown_key(outer)} is nested too deeply")
        for key in value if isinstance(value, dict) else ():
            lost = LOST.get(plain_name(key))
            if lost and lost.nested and says_something(value[key], lost.neutral):
                return _lost(outer, lost, inside=key)
        inner = value.values() if isinstance(value, dict) else value
        waiting += [(one, depth + 1) for one in inner if isinstance(one, dict | list)]
    return None


def _lost(key: str, lost: Lost, inside: str = "") -> Flaw:
    where = f"{shown_key(inside)} in {shown_key(key)}" if inside else shown_key(key)
    return Flaw(
        "keys",
        f"the key {where} holds {lost.holds}, which would be lost; {lost.way_out}. Rows without the key: "
        f"jq -c '{EACH} | del(.[{jq_name(key)}])' FILE > NEW",
    )


# Keys that are not used


def count_unused(rows: Iterable[dict], counts: collections.Counter, read: frozenset[str] = KEYS) -> None:
    """For each key that is not read, count the rows that have it."""
    for row in rows:
        if row.keys() <= KEYS:
            continue
        if key := conversation_key(row):
            if unread := conversations.unread_keys(row, key) - read:
                counts.update(unread)
        else:
            counts.update(row.keys() - {KEY} if is_text(row, KEYS) else row.keys() - OPTIONAL - read)


def unused_keys(rows: Iterable[dict], read: frozenset[str] = KEYS) -> str:
    """`unused_text` of some rows."""
    counts: collections.Counter[str] = collections.Counter()
    count_unused(rows, counts, read)
    return unused_text(few_unused(counts))


def few_unused(counts: collections.Counter) -> dict[str, int]:
    """The SHOWN_KEYS most frequent keys, names shortened; under "" the number of other keys."""
    few = {}
    for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_KEYS]:
        name = shown_key(key)[1:-1] or '""'
        few[name] = few.get(name, 0) + count
    if len(counts) > SHOWN_KEYS:
        few[""] = len(counts) - SHOWN_KEYS
    return few


def unused_text(few: dict[str, int]) -> str:
    """As `keys not used: id (1500 rows), source (3 rows)`; "" if all were used."""
    named = [f"{key} ({count} row{'s' * (count != 1)})" for key, count in few.items() if key]
    more = [f"{few['']} more"] if few.get("") else []
    return f"keys not used: {', '.join(named + more)}" if named else ""
