"""Tool calls of ChatGLM3: writing them as the official chat has them, and reading them without running anything.

A call is an assistant message whose metadata is the tool's name and whose content is a Python block:

    <|assistant|>weather
    ```python
    tool_call(city='北京', days=3)
    ```

What the tool returns follows as an `<|observation|>` message. The official parser runs `eval` on the block; here the
block is parsed, and only literals are accepted (ast.literal_eval's rule). No torch import.
"""

import ast
import functools
import json
import keyword
import math
import sys
import unicodedata
import warnings
from typing import Any, NamedTuple

from .messages import short_repr

# The official example has this text before the tools in the system message.
TOOLS_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"
NO_TOOLS = "[]"  # descriptions of tools, where there are none
FUNCTION = "tool_call"
OPENING, CLOSING = "```python", "```"
ROLE_TOKEN = "<|assistant|>"  # separates the messages of one reply
INFINITY = f"1e{sys.float_info.max_10_exp + 1}"  # a literal that Python reads as infinity; `inf` would be a name
MAX_DEPTH = 50  # nested lists and objects; Python's parser gives up somewhere below 200 brackets
MAX_CHARACTERS = 100_000  # of a block to read: far more than a model writes
JSON = json.JSONEncoder(ensure_ascii=False)  # (json.dumps would make one for each value)


class ToolCallError(ValueError):
    """A tool call that cannot be written, or text that cannot be read as one. The message says why."""


class ToolCall(NamedTuple):
    """A tool's name and its parameters (JSON values by name)."""

    name: str
    parameters: dict[str, Any]


# ---- writing


def write_call(name: str, parameters: dict[str, Any]) -> dict[str, str]:
    """The assistant message of a call, in the form of the official history: role, metadata, content.

    Raises:
        ToolCallError: the name cannot stand as metadata, or a parameter is not a JSON value.
    """
    check_name(name)
    return {"role": "assistant", "metadata": name, "content": write_parameters(parameters)}


def check_name(name: str) -> None:
    """Make sure that a tool's name is read back as it is: one line of text without spaces at its ends.

    Raises:
        ToolCallError: it would not be.
    """
    if not isinstance(name, str) or not name.strip():
        raise ToolCallError(f"a tool's name must be a text that is not empty, not {short_repr(name)}")
    if name != name.strip() or "\n" in name or ROLE_TOKEN in name:
        wanted = f"must be one line, without spaces at its ends and without {ROLE_TOKEN}"
        raise ToolCallError(f"the tool's name {short_repr(name)} {wanted}")


def write_parameters(parameters: dict[str, Any]) -> str:
    """The content of a call: the Python block with `tool_call(key=value, ...)`.

    Values are written as Python literals, as the official preprocessing does (`repr`). A key that Python does not take
    as a keyword (`class`, `user-id`, or one that Python's parser would normalise) is written as `**{'user-id': 1}`,
    which the official parser reads back. The text `<|assistant|>` in a value gets its first character escaped: the
    official parser would split the reply there.

    Raises:
        ToolCallError: parameters is not a dict with text keys, or a value is not a JSON value.
    """
    if not isinstance(parameters, dict):
        raise ToolCallError(f"parameters must be an object of names and values, not {short_repr(parameters)}")
    words = []
    for key, value in parameters.items():
        literal = _literal(value, key)
        words.append(f"{key}={literal}" if _is_keyword(key) else f"**{{{key!r}: {literal}}}")
    call = f"{FUNCTION}({', '.join(words)})".replace(ROLE_TOKEN, "\\x3c" + ROLE_TOKEN[1:])
    return f"{OPENING}\n{call}\n{CLOSING}"


def write_observation(observation: Any) -> str:
    """What a tool returned, as the text of an observation message: text as it is, anything else as JSON.

    Raises:
        ToolCallError: it is neither text nor a JSON value.
    """
    if isinstance(observation, str):
        return observation
    try:
        return JSON.encode(observation)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolCallError(f"the observation is neither text nor a JSON value: {error}") from None


@functools.lru_cache(maxsize=1024)
def _is_keyword(key) -> bool:
    """Whether Python's parser takes `key=value` in a call and gives the key back unchanged."""
    if not isinstance(key, str):
        raise ToolCallError(f"parameter names must be texts, not {short_repr(key)}")
    usable = key.isidentifier() and not keyword.iskeyword(key) and key != "__debug__"
    return usable and unicodedata.normalize("NFKC", key) == key


def _literal(value, name: str, depth: int = 0) -> str:
    """A JSON value as a Python literal: its `repr`, with infinity written as a number.

    Args:
        name: of the parameter, for messages.
    """
    if depth > MAX_DEPTH:
        raise ToolCallError(
            f"parameter {short_repr(name)} has more than {MAX_DEPTH} levels of lists and objects inside each other"
        )
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return repr(value)
    if kind is int:
        try:
            return repr(value)
        except ValueError:  # Python's limit, which its parser has too
            raise ToolCallError(f"parameter {short_repr(name)} has a number of more digits than Python reads") from None
    if kind is float and not math.isnan(value):
        return repr(value).replace("inf", INFINITY)
    if kind is list:
        return f"[{', '.join(_literal(item, name, depth + 1) for item in value)}]"
    if kind is dict and all(type(key) is str for key in value):
        items = (f"{key!r}: {_literal(item, name, depth + 1)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    raise ToolCallError(f"parameter {short_repr(name)} is not a JSON value: {short_repr(value)}")


# ---- reading


def split_reply(reply: str) -> list[tuple[str, str]]:
    """The messages of a reply (what the model wrote after `<|assistant|>`), each as (metadata, content).

    Metadata is the first line, "" where there is none. A message without a line break is all content.
    """
    messages = []
    for message in reply.split(ROLE_TOKEN):
        metadata, line_break, content = message.partition("\n")
        messages.append((metadata.strip(), content) if line_break else ("", message))
    return messages


def answer_text(metadata: str, content: str) -> str:
    """A message of the model as the text of an answer: the content alone, or below a line with the metadata."""
    return f"{metadata}\n{content}" if metadata else content


def read_answer(text: str) -> ToolCall | None:
    """The call that an answer's text is (see `answer_text`), None for a plain answer, of one or of several lines.

    Raises:
        ToolCallError: the text begins like a call, but cannot be read as one; it may be cut.
    """
    name, content = split_reply(text)[-1]
    fence, _, code = content.strip().partition("\n")
    if not name or not fence.startswith(CLOSING) or not code.lstrip().startswith(f"{FUNCTION}("):
        return None
    return ToolCall(name, read_parameters(content))


def find_call(text: str) -> ToolCall | None:
    """As `read_answer`, but None too for what cannot be read."""
    try:
        return read_answer(text)
    except ToolCallError:
        return None


def read_call(reply: str) -> ToolCall | None:
    """The call in the last message of a reply; None where that message has no metadata, so is a plain answer.

    Raises:
        ToolCallError: there is metadata, but what follows is not a call (a code interpreter's block, broken code).
    """
    name, content = split_reply(reply)[-1]
    return ToolCall(name, read_parameters(content)) if name else None


def read_parameters(content: str) -> dict[str, Any]:
    """The parameters of a call from its content: keyword arguments of the one `tool_call(...)` in a fenced block.

    Nothing is executed: values must be literals. Tuples are read as lists, which JSON makes of them.

    Raises:
        ToolCallError: the content is not such a block, or a value is not a JSON value.
    """
    call = _parse_block(content)
    parameters: dict[str, Any] = {}
    for word in call.keywords:
        value = _value(word.value, "an argument" if word.arg is None else f"parameter {short_repr(word.arg)}")
        if word.arg is not None:
            value = {word.arg: value}
        elif not isinstance(value, dict):
            raise ToolCallError("what follows ** in the call is not an object")
        if repeated := value.keys() & parameters.keys():
            raise ToolCallError(f"parameter {short_repr(min(repeated))} is given twice")
        parameters |= value
    return parameters


def _parse_block(content: str) -> ast.Call:
    """The syntax tree of the call in a fenced block."""
    lines = content.strip().split("\n")
    if len(lines) < 3 or not lines[0].startswith(CLOSING) or lines[-1].strip() != CLOSING:
        raise ToolCallError(f"a call is a block between {OPENING} and {CLOSING}, not {short_repr(content)}")
    code = "\n".join(lines[1:-1]).strip()
    if len(code) > MAX_CHARACTERS:
        raise ToolCallError(f"the call has {len(code)} characters, more than {MAX_CHARACTERS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape such as \d keeps its backslash, as in eval
            call = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = ascii(getattr(error, "msg", None) or type(error).__name__)[1:-1]
        raise ToolCallError(f"the call cannot be parsed ({reason[:60]}): {short_repr(code)}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != FUNCTION:
        raise ToolCallError(f"the block is not one call of {FUNCTION}(...): {short_repr(code)}")
    if call.args:
        raise ToolCallError(f"the call has arguments without a name: {short_repr(code)}")
    return call


def _value(node: ast.expr, where: str):
    """The JSON value of a literal's syntax tree."""
    try:
        return _json(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ToolCallError(f"{where} is not a literal of a JSON value") from None


def _json(value):
    """A literal as JSON has it; raises TypeError for what JSON lacks (bytes, sets, complex numbers, odd keys)."""
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError
        return {key: _json(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError
