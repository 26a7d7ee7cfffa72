"""Formats of rows: which ones are recognised, what is wrong with a row, and its normal form, a `Dialogue`.

`find_flaw` checks a parsed row, `to_dialogue` reads its fields; nothing else does. FORMATS lists the formats that are
recognised besides our own; LOST lists keys that mean something to other programs and that are not read here. In the
commands FILE and NEW stand for the user's own file names, KEY for a key too long to show; the commands work on JSON
lines and on arrays.
"""

import collections
import difflib
import functools
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tuning.samples.dialogue import Dialogue, Message
from tuning.samples.text import KEY, almost_text, is_text, text_dialogue, text_problem

ROW_FORMAT = 3  # part of a cache file's key: increase it when other rows are accepted, or read in another way
KEYS = frozenset({"instruction", "input", "output"})
WANTED = "a row has instruction, input and output"
EACH = "(arrays[], objects)"  # jq: each row, of JSON lines or of an array
SHOWN_KEYS, SHOWN_CHARACTERS = 8, 24  # of keys that are not used
DEEPEST = 100  # maximum nesting of objects and lists
NEAR = 0.8  # similarity (difflib's ratio) from which a name counts as a misspelling of another
# keys that may hold the input's text where there is no input
NAMES_OF_INPUT = {"inputs", "context", "query", "question", "text", "prompt", "content", "passage", "document"}


class Flaw(NamedTuple):
    """Why a row cannot be used."""

    kind: str  # one of findings.BROKEN
    problem: str
    ends: bool = False  # the rest of the file cannot be read


_HALF_PAIR = Flaw("json", "a text has an unpaired surrogate, which is not valid Unicode")


@dataclass(frozen=True)
class Format:
    """A row format of other programs.

    Args:
        name: what its users call it.
        keys: that such a row has, as `plain_name` gives them.
        fields: instruction, input and output in terms of its keys, for formats whose rows of one turn can be converted;
            "" for an empty one.
        why: why its rows cannot be trained as they are, if they cannot be converted.
    """

    name: str
    keys: tuple[str, ...]
    fields: tuple[str, str, str] | None = None
    why: str = ""


FORMATS = (
    Format(
        "Dolly (instruction, context, response)", ("instruction", "response"), ("instruction", "context", "response")
    ),
    Format("preference data (chosen, rejected)", ("chosen", "rejected"), why="preferences cannot be trained here"),
    Format("the official ChatGLM p-tuning (prompt, response)", ("prompt", "response"), ("prompt", "", "response")),
    Format("AdvertiseGen (content, summary)", ("content", "summary"), ("content", "", "summary")),
    Format("query, response", ("query", "response"), ("query", "", "response")),
    Format("prompt, completion", ("prompt", "completion"), ("prompt", "", "completion")),
    Format("question, answer", ("question", "answer"), ("question", "", "answer")),
    Format("classification (text, label)", ("text", "label"), ("text", "", "label")),
    Format(
        "plain text (text)",
        (KEY,),
        why="it asks nothing; it is for --train_path, --eval_path and --replay_path of train.py",
    ),
)
TURNS_WHY = "rows of several turns cannot be trained yet"


@dataclass(frozen=True)
class Lost:
    """A key that is not read here, though it changes what a row means.

    Args:
        holds: its content, such as "earlier turns".
        way_out: what the user can do.
        neutral: values that mean the same as no such key, besides empty ones.
        nested: also look for it inside the values of other keys.
    """

    holds: str
    way_out: str
    neutral: tuple = (False, 0)
    nested: bool = True


_TURNS = Lost("turns of a conversation", f"{TURNS_WHY}: keep what the model must know of them in instruction or input")
_HISTORY = Lost("earlier turns", f"{TURNS_WHY}: keep what the model must know of them in instruction or input")
_SYSTEM = Lost("a system message", "it cannot be trained as such yet: write it into instruction")
_TOOLS = Lost("tools", "tool calls cannot be trained yet")
_WEIGHT = Lost("a weight for the loss", "all rows count alike", neutral=(True, 1))
_LABEL = Lost("a label", "what is to be learnt stands in output", neutral=(), nested=False)
_TOKENS = Lost("encoded text", "rows are texts, which are encoded here", neutral=(), nested=False)
_PREFERENCE = Lost("preferences", "they cannot be trained here", nested=False)
_MEDIA = Lost("images or sound", "the models read text alone", nested=False)
LOST = {  # by `plain_name`
    **dict.fromkeys(("history", "chathistory", "histories"), _HISTORY),
    **dict.fromkeys(("messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "turns"), _TURNS),
    **dict.fromkeys(("system", "systemprompt", "systemmessage"), _SYSTEM),
    **dict.fromkeys(("tools", "functions", "toolcalls", "functioncall", "observation", "observations"), _TOOLS),
    **dict.fromkeys(("loss", "weight", "weights", "sampleweight", "lossweight", "lossmask"), _WEIGHT),
    **dict.fromkeys(("label", "labels"), _LABEL),
    **dict.fromkeys(("inputids", "attentionmask", "tokentypeids"), _TOKENS),
    **dict.fromkeys(("chosen", "rejected"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
}


def find_flaw(
    row,
    several_outputs: bool = False,
    empty_outputs: bool = False,
    missing_outputs: bool = False,
    texts: bool = False,
) -> Flaw | None:
    """Why a value from a file is not a valid row, None if it is one; for the arguments see `row_files.scan_rows`.

    It changes the row: a missing or null input becomes ""; with missing_outputs a null output is removed.
    """
    if not isinstance(row, dict):
        return Flaw("type", f"a row must be an object with instruction, input and output, not {_kind(row)}")
    if missing_outputs and row.get("output", "") is None:
        del row["output"]
    if texts and is_text(row, KEYS):
        return _flaw_of_text(row)
    if row.keys() != KEYS and (flaw := _flaw_of_keys(row, missing_outputs)):
        return flaw
    if row.get("input") is None:
        row["input"] = ""
    for key in ("instruction", "input"):
        if not isinstance(row[key], str):
            return Flaw("type", f"{key} must be a string, not {_kind(row[key])}")
    output = row.get("output", "")
    outputs = output if several_outputs and isinstance(output, list) else [output]
    if not outputs or not all(isinstance(one, str) for one in outputs):
        wanted = "a string or a list of strings" if several_outputs else "a string"
        return Flaw("type", f"output must be {wanted}, not {_kind(output)}{_as_string(output)}")
    query = row["instruction"] + row["input"]
    if not query.strip():
        return Flaw("empty", "instruction and input are both empty")
    if not empty_outputs and "output" in row and not all(one.strip() for one in outputs):
        return Flaw("empty", "output is empty; --allow_empty_output trains such rows to answer nothing")
    if has_half_pair(query + "".join(outputs)):
        return _HALF_PAIR
    return None


def to_dialogue(row: dict) -> Dialogue:
    """The normal form of a row in which `find_flaw` finds none: the one place that reads its fields.

    Of several outputs the first is learnt. A row without output becomes a question.
    """
    if is_text(row, KEYS):
        return text_dialogue(row)
    question = Message("user", row["instruction"] + row["input"])
    output = row.get("output")
    if output is None:
        return Dialogue((question,))
    return Dialogue((question, Message("assistant", output if isinstance(output, str) else output[0], learn=True)))


def question_of(row: dict) -> str:
    """The text that a row asks the model to answer."""
    return to_dialogue(row).prompt


def has_half_pair(text: str) -> bool:
    """Whether a text has an unpaired surrogate, which is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _kind(value) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )


def _as_string(value) -> str:
    """How to make an output a string that is not one."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return "; training takes one answer: join several parts into one string, with \\n between them"
    if isinstance(value, int | float):
        return f'; write it in quotes: "{value}"' if not isinstance(value, bool) else "; write it as text"
    return ""


# Keys


def plain_name(key: str) -> str:
    """A key without the differences between spellings: case, blanks, - and _."""
    return unicodedata.normalize("NFKC", key).casefold().translate({ord(c): None for c in "_- \t\ufeff"})


class _Keys(NamedTuple):
    """The keys of a row, sorted by what to report about them."""

    misspelt: tuple[tuple[str, str], ...]  # as it stands there, as it should be
    lost: tuple[str, ...]  # that are in LOST
    others: tuple[str, ...]  # neither read nor in LOST
    meant: tuple[tuple[str, str], ...]  # of `others`: as it stands there, which of KEYS it may be


@functools.lru_cache(maxsize=4096)
def _sort_keys(keys: tuple[str, ...]) -> _Keys:
    names = {key: plain_name(key) for key in keys if key not in KEYS}
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
    if lacking and (flaw := recognise(row)):
        return flaw
    if flaw := _flaw_of_unread(row, keys):
        return flaw
    for key, meant in keys.meant:
        if _holds_text(row[key]):
            name = _jq_name(key)
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
        return Flaw("type", f"the key {lacking[0]!r} is missing; {WANTED}")
    return None


def _flaw_of_unread(row: dict, keys: _Keys) -> Flaw | None:
    """A key that is not read, but changes what the row means."""
    for key in keys.lost:
        if _says_something(row[key], LOST[plain_name(key)]):
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
        return Flaw("type", f"text must be a string of plain text, not {_kind(row[KEY])}")
    if problem := text_problem(row, names):
        return Flaw(*problem)
    if flaw := _flaw_of_unread(row, _sort_keys(tuple(row))):
        return flaw
    return _HALF_PAIR if has_half_pair(row[KEY]) else None


def _says_something(value, lost: Lost) -> bool:
    """Whether the value of such a key means anything: it is not empty and not neutral."""
    leaves = _leaves(value)
    return any(one.strip() if isinstance(one, str) else one is not None and one not in lost.neutral for one in leaves)


def _holds_text(value) -> bool:
    return any(isinstance(one, str) and one.strip() for one in _leaves(value))


def _leaves(value) -> Iterator:
    """All values in a value that are no object or list."""
    waiting = [value]  # not recursive: values may be nested as deep as the interpreter's stack
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        else:
            yield value


def _flaw_inside(outer: str, value) -> Flaw | None:
    """A flaw inside the value of a key: a key of LOST that means something, or too deep nesting."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            return Flaw("json", f"the value of {shown_key(outer)} is nested too deeply")
        for key in value if isinstance(value, dict) else ():
            lost = LOST.get(plain_name(key))
            if lost and lost.nested and _says_something(value[key], lost):
                return _lost(outer, lost, inside=key)
        inner = value.values() if isinstance(value, dict) else value
        waiting += [(one, depth + 1) for one in inner if isinstance(one, dict | list)]
    return None


def _lost(key: str, lost: Lost, inside: str = "") -> Flaw:
    where = f"{shown_key(inside)} in {shown_key(key)}" if inside else shown_key(key)
    return Flaw(
        "keys",
        f"the key {where} holds {lost.holds}, which would be lost; {lost.way_out}. Rows without the key: "
        f"jq -c '{EACH} | del(.[{_jq_name(key)}])' FILE > NEW",
    )


def shown_key(key: str) -> str:
    """A key for a message: shortened, and without control characters for the terminal."""
    return repr(key if len(key) <= SHOWN_CHARACTERS else key[:SHOWN_CHARACTERS] + "...")


def _jq_name(key: str) -> str:
    """A key for a command, without characters special to a terminal or a shell; KEY for a very long one."""
    if len(key) > SHOWN_CHARACTERS**2:
        return '"KEY"'
    return json.dumps(key, ensure_ascii=not key.isprintable()).replace("'", "\\u0027").replace("\x7f", "\\u007f")


# Other formats


def recognise(row: dict) -> Flaw | None:
    """The format of a row without our keys, if it is a known one, and what to do with it."""
    names = {plain_name(key): key for key in reversed(row)}
    for name in ("conversations", "messages"):
        if isinstance(row.get(names.get(name)), list):
            return _conversation(names[name], row[names[name]])
    known = next((one for one in FORMATS if names.keys() >= {*one.keys}), None)
    if known is None:
        return wrapper_flaw(row)
    if known.keys == (KEY,) and (problem := almost_text(row, names[KEY], KEYS)):
        return Flaw(*problem)
    if known.fields is None:
        return Flaw("format", f"a row of {known.name}: {known.why}; {WANTED}")
    pairs = zip(("instruction", "input", "output"), known.fields, strict=True)
    texts = ", ".join(f"{ours}: .[{_jq_name(names[key])}]" if key in names else f'{ours}: ""' for ours, key in pairs)
    gone = ", ".join(f".[{_jq_name(names[key])}]" for key in known.fields if key in names and names[key] not in KEYS)
    # other keys are kept, so that the new file is checked for them too
    command = f"jq -c '{EACH} | del({gone}) + {{{texts}}}' FILE > NEW"
    has_turns = "history" in names and _says_something(row[names["history"]], _HISTORY)
    turns = f"; {TURNS_WHY}, and it has a history" if has_turns else ""
    return Flaw("format", f"a row of {known.name}{turns}; {WANTED}; convert it: {command}")


def _conversation(key: str, turns: list) -> Flaw:
    """A list of turns: from and value in ShareGPT, role and content in OpenAI's and ChatGLM3's."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if "from" in first or "value" in first:
        name, who, text, pair = "ShareGPT", "from", "value", ("human", "gpt")
    elif plain_name(key) == "messages":
        name, who, text, pair = "OpenAI messages", "role", "content", ("user", "assistant")
    else:
        name, who, text, pair = "ChatGLM3 conversations", "role", "content", ("user", "assistant")
    at = f".[{_jq_name(key)}]"
    pairs = f"select([{at}[].{who}] == {json.dumps(pair)} and {at}[1].loss != false)"
    texts = f'{{instruction: {at}[0].{text}, input: "", output: {at}[1].{text}}}'
    return Flaw(
        "format",
        f"a row of {name} ({shown_key(key)} with {who} and {text}): {TURNS_WHY}. Keep those of one question and one "
        f"answer, and leave the others out: jq -c '{EACH} | {pairs} | del({at}) + {texts}' FILE > NEW",
    )


def wrapper_flaw(row: dict) -> Flaw | None:
    """One object around all rows, as {"data": [...]} or {"0": {...}, "1": {...}}."""
    if row.keys() & KEYS:
        return None
    for key, value in row.items():
        if isinstance(value, list) and value and all(map(_is_row, value)):
            command = f"jq -c '.[{_jq_name(key)}][]' FILE > NEW"
            return Flaw("format", f"an object with all rows in a list under {shown_key(key)}; take them out: {command}")
    if row and all(map(_is_row, row.values())):
        return Flaw("format", "an object with all rows under names or numbers; take them out: jq -c '.[]' FILE > NEW")
    return None


def _is_row(value) -> bool:
    """Whether a value looks like a row of our format or of another one."""
    if not isinstance(value, dict):
        return False
    names = {plain_name(key) for key in value}
    return bool(names & {"instruction", "messages", "conversations"}) or any(names >= {*one.keys} for one in FORMATS)


# Keys that are not used


def count_unused(rows: Iterable[dict], counts: collections.Counter, read: frozenset[str] = KEYS) -> None:
    """For each key that is not read, count the rows that have it."""
    for row in rows:
        if is_text(row, KEYS):
            counts.update(row.keys() - {KEY})
        elif len(row) > len(KEYS):
            counts.update(row.keys() - read)


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
