"""Formats of rows by their keys: ours, those that are read under other names, and those of other programs.

`recognise` says what a row without our keys is, and what to do with it.
"""

import difflib
from dataclasses import dataclass

from tuning.samples import conversations
from tuning.samples.flaws import EACH, Flaw, jq_name, kind_of_value, plain_name, shown_key
from tuning.samples.text import KEY, almost_text

KEYS = frozenset({"instruction", "input", "output"})
OPTIONAL = frozenset({"history", "system"})  # keys of our format that a row may have too
WANTED = "a row has instruction, input and output"
NEAR = 0.8  # similarity (difflib's ratio) from which a name counts as a misspelling of another
# question and answer in formats with one text each; `history` and `system` may stand beside them
FLAT = (("prompt", "response"), ("content", "summary"), ("query", "response"))


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


def recognise(row: dict) -> Flaw | None:
    """The format of a row without our keys, if it is a known one, and what to do with it."""
    names = {plain_name(key): key for key in reversed(row)}
    for name in (one for one in conversations.LISTS if one in names):
        key, value = names[name], row[names[name]]
        if key != name:
            return Flaw("type", f"the key {shown_key(key)} must be written {name!r}")
        if value is not None:
            problem = (
                "is empty" if isinstance(value, list) else f"must be a list of messages, not {kind_of_value(value)}"
            )
            return Flaw("type", f"{name} {problem}")
    known = next((one for one in FORMATS if names.keys() >= {*one.keys}), None)
    if known is None:
        return wrapper_flaw(row)
    if known.keys == (KEY,) and (problem := almost_text(row, names[KEY], KEYS)):
        return Flaw(*problem)
    if known.fields is None:
        return Flaw("format", f"a row of {known.name}: {known.why}; {WANTED}")
    pairs = zip(("instruction", "input", "output"), known.fields, strict=True)
    texts = ", ".join(f"{ours}: .[{jq_name(names[key])}]" if key in names else f'{ours}: ""' for ours, key in pairs)
    gone = ", ".join(f".[{jq_name(names[key])}]" for key in known.fields if key in names and names[key] not in KEYS)
    # other keys are kept, so that the new file is checked for them too
    command = f"jq -c '{EACH} | del({gone}) + {{{texts}}}' FILE > NEW"
    return Flaw("format", f"a row of {known.name}; {WANTED}; convert it: {command}")


def nearest_format(row: dict) -> str:
    """The format with the most keys in common with a row, and what the row lacks of it."""
    names = {plain_name(key) for key in row}
    known = [("instruction", "output"), *FLAT, ("conversations",), ("messages",)]
    best = max(known, key=lambda keys: len(names & {*keys}))
    if not names & {*best}:
        near = {name: difflib.get_close_matches(name, sorted(names), 1, NEAR) for keys in known for name in keys}
        best = max(known, key=lambda keys: sum(bool(near[name]) for name in keys))
        if not any(near[name] for name in best):
            return f"{WANTED}, or 'conversations' or 'messages', or the columns that --prompt_column and others name"
    lacks = names_text(name for name in best if name not in names)
    return (
        f"the nearest format is {names_text(best)}, of which it lacks {lacks}" if best[0] != "instruction" else WANTED
    )


def wrapper_flaw(row: dict) -> Flaw | None:
    """One object around all rows, as {"data": [...]} or {"0": {...}, "1": {...}}."""
    if row.keys() & KEYS:
        return None
    for key, value in row.items():
        if isinstance(value, list) and value and all(map(_is_row, value)):
            command = f"jq -c '.[{jq_name(key)}][]' FILE > NEW"
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


def names_text(keys) -> str:
    """As `prompt and response`."""
    return " and ".join(keys)
