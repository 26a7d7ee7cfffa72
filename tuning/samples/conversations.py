"""Conversations in a row: ChatGLM3's official form, `messages` of the OpenAI API, and ShareGPT, read into a `Dialogue`.

    {"conversations": [{"role": "user", "content": ...}, {"role": "tool", "name": ..., "parameters": ...,
                       "observation": ...}, {"role": "assistant", "content": ..., "loss": false}], "tools": [...]}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "tool_calls": [...]}, {"role": "tool", ...}]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "function_call", "value": ...}, ...], "tools": "[...]"}

A tool call becomes an assistant's message with the tool's name as metadata, as ChatGLM3's chat writes it, and what the
tool returned becomes an observation right behind it.
"""

from typing import NamedTuple

from glm_models.messages import short_repr
from glm_models.tools import JSON, NO_TOOLS, ToolCallError, write_call, write_observation
from tuning.samples.dialogue import Dialogue, Message
from tuning.samples.flaws import HALF_PAIR, BadRow, has_half_pair, kind_of_value, says_something, shown_key
from tuning.samples.strict_json import WRITTEN

LISTS = ("conversations", "messages", "conversation")  # keys of a list of messages
READ = frozenset({*LISTS, "tools", "functions", "system", "output"})  # keys of a row that are read
ROLES = {  # as they stand in files -> what such a message is
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    "observation": "observation",
}
NAMES = {True: ("from", "value"), False: ("role", "content")}  # of role and text in ShareGPT's form, in the others
MARKS = frozenset({"loss", "weight"})  # see _Reader._learn
OF_ROLE = {  # keys that are read of a message of each kind, besides its role, its text and MARKS
    "system": {"tools"},
    "user": set(),
    "assistant": {"metadata", "tool_calls", "function_call"},
    "tool": {"name", "parameters", "observation", "tool_call_id"},
    "call": {"name", "arguments", "parameters"},
    "observation": {"name", "tool_call_id"},
}
# those of them, and texts, that would be lost where they are not read
MEANT = {
    "tools",
    "metadata",
    "tool_calls",
    "function_call",
    "parameters",
    "arguments",
    "observation",
    "content",
    "value",
}
_READ_OF = {  # role as it stands in a file -> all keys that are read of its message, by whether it is ShareGPT's form
    sharegpt: {role: MARKS | OF_ROLE[kind] | {*names} for role, kind in ROLES.items()}
    for sharegpt, names in NAMES.items()
}
MOST_TOOLS = 256  # descriptions that are kept
NOT_TEXT = frozenset({"images", "image", "audio", "video", "videos", "input_audio"})


class Call(NamedTuple):
    """A tool call that waits for what the tool returns."""

    id: str | None
    message: Message


def conversation_key(row: dict) -> str | None:
    """The key under which a row has a list of messages, None if there is none."""
    for key in LISTS:
        value = row.get(key)
        if value and isinstance(value, list):
            first = value[0]
            if (isinstance(first, dict) and any(first.values())) or says_something(value):
                return key
    return None


def style_of(row: dict, key: str) -> str:
    """What the users of a row's form call it; key is its `conversation_key`."""
    if is_sharegpt(row, key):
        return f"ShareGPT ({key} with from and value)"
    return "OpenAI messages" if key == "messages" else "ChatGLM3 conversations"


def is_sharegpt(row: dict, key: str) -> bool:
    """Whether the messages of a row have `from` and `value`; key is its `conversation_key`."""
    first = row[key][0]
    return isinstance(first, dict) and (first.get("from") is not None or first.get("value") is not None)


def read_conversation(row: dict, key: str) -> Dialogue:
    """The dialogue of a row. Every answer is learnt that is not marked otherwise.

    Args:
        key: the row's `conversation_key`.

    Raises:
        BadRow: a message or the tools cannot be read, or an order of messages means nothing.
    """
    for name in LISTS:
        if name != key and name in row and says_something(row[name]):
            raise BadRow("format", f"a row with {key} and {name}: a row has one conversation")
    reader = _Reader(key, style_of(row, key))
    for number, turn in enumerate(row[key]):
        reader.read(number, turn)
    messages, tools = reader.finish(), reader.tools
    if "system" in row and says_something(row["system"]):
        if not isinstance(row["system"], str):
            raise BadRow("type", f"system must be a string, not {kind_of_value(row['system'])}")
        if messages[0].role == "system":
            raise BadRow("format", f"a system message under 'system' and another one in {key}")
        messages.insert(0, Message("system", row["system"]))
    for name in ("tools", "functions"):
        if row.get(name) is not None and (written := _tools(row[name], name)) is not None:
            if tools is not None:
                raise BadRow("format", "tools in two places of a row")
            tools = written
    if tools == NO_TOOLS and not reader.style.startswith("ChatGLM3"):
        tools = None  # in ChatGLM3's form an empty list is written, as the official chat does
    _check_order(messages, key)
    if has_half_pair("".join([text for message in messages for text in message[1:3]])):  # content, metadata
        raise BadRow(*HALF_PAIR[:2])
    return Dialogue(tuple(messages), tools)


def unread_keys(row: dict, key: str) -> set[str]:
    """Keys of a conversation's row and of its messages that nothing reads, those of messages as `messages[].id`.

    Args:
        key: the row's `conversation_key`; its messages can be read.
    """
    sharegpt = is_sharegpt(row, key)
    who, read = NAMES[sharegpt][0], _READ_OF[sharegpt]
    unread = row.keys() - READ
    for turn in row[key]:
        if not turn.keys() <= read[turn[who]]:
            names = turn.keys() - read[turn[who]]
            unread |= {f"{key}[].{name}" for name in names if says_something(turn[name])}
    return unread


class _Reader:
    """Reads messages one after another. Calls of tools wait until there is what the tool returned."""

    def __init__(self, key: str, style: str):
        self.key, self.style = key, style
        sharegpt = style.startswith("ShareGPT")
        self.names, self.read_of = NAMES[sharegpt], _READ_OF[sharegpt]
        self.number = 0  # of the message that is read
        self.messages: list[Message] = []
        self.calls: list[Call] = []  # that wait
        self.tools: str | None = None

    @property
    def where(self) -> str:
        """The message that is read, for errors."""
        return f"{self.key}[{self.number}]"

    def read(self, number: int, turn) -> None:
        """One more message."""
        self.number = number
        if not isinstance(turn, dict):
            raise BadRow("type", f"{self.where} must be an object with a role and a text, not {kind_of_value(turn)}")
        who, text = self.names
        if who not in turn:
            other = {"from": "role", "role": "from"}[who]
            mixed = f"; it has {other!r}, of another format" if other in turn else ""
            raise BadRow("format", f"{self.where} has no {who!r}, as a row of {self.style} has it{mixed}")
        role = ROLES.get(turn[who]) if isinstance(turn[who], str) else None
        if role in ("user", "assistant"):
            content = turn.get(text)
            if len(turn) == 2 and isinstance(content, str) and not self.calls:  # most messages
                self.messages.append(Message(role, content, "", role == "assistant"))
                return
        if role is None or not turn.keys() <= self.read_of[turn[who]]:
            self._check_keys(turn, role, turn[who])
        self.READ[role](self, turn, self._learn(turn, role), text)

    def _check_keys(self, turn, role, who):
        """Refuse a message of an unknown role, or one that says something under a key that is not read of it."""
        self._refuse(turn, NOT_TEXT & turn.keys(), "but the models read text alone")
        if role is None:
            wanted = f"must be one of {', '.join(ROLES)}"
            raise BadRow("type", f"the {self.names[0]} of {self.where} {wanted}, not {short_repr(who)}")
        unread = MEANT & turn.keys() - self.read_of[who]
        self._refuse(turn, unread, f"which would be lost: it is not read of a message of {who}")

    def _refuse(self, turn, names, why):
        """Refuse a message that says something under one of some names."""
        for name in sorted(names):
            if says_something(turn[name]):
                raise BadRow("keys", f"{self.where} has {shown_key(name)}, {why}")

    def finish(self) -> list[Message]:
        """All messages. A call may stand at the end: the model learns to write it."""
        if len(self.calls) > 1:
            raise BadRow("format", f"{self.key} ends with several tool calls; at the end one can be learnt")
        return [*self.messages, *(call.message for call in self.calls)]

    # What stands in a message, by its role

    def _system(self, turn, learn, text):
        if turn.get("tools") is not None:
            self.tools = _tools(turn["tools"], f"tools in {self.where}")
        self._add("system", self._text(turn, text))

    def _user(self, turn, learn, text):
        self._add("user", self._text(turn, text))

    def _assistant(self, turn, learn, text):
        calls = turn.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadRow("type", f"tool_calls of {self.where} must be a list of objects")
        if turn.get("function_call"):
            calls = [*calls, {"function": turn["function_call"]}]
        content = self._text(turn, text, missing=bool(calls))
        metadata = turn.get("metadata") or ""
        if not isinstance(metadata, str):
            raise BadRow("type", f"metadata of {self.where} must be a string, not {kind_of_value(metadata)}")
        if "\n" in metadata.strip():
            raise BadRow("type", f"metadata of {self.where}, the name of a tool, has a line break")
        if calls and metadata.strip():
            raise BadRow("keys", f"{self.where} has metadata, the name of a tool, and tool calls too")
        if content.strip() or not calls:
            self._add("assistant", content, metadata.strip(), learn)
        for call in calls:
            self._call(call, learn, text)

    def _call(self, turn, learn, text):
        """A call: ShareGPT's function_call message, or one of OpenAI's tool_calls."""
        value = turn
        if turn.get(text) is not None:
            self._refuse(turn, OF_ROLE["call"] & turn.keys(), f"and a call under {text!r} too")
            value = _json(turn[text], f"{text} of {self.where}")
        for one in value if isinstance(value, list) and value else [value]:
            call = (one.get("function") or one) if isinstance(one, dict) else one
            if not isinstance(call, dict) or not {"name"} <= call.keys():
                raise BadRow("type", f"a tool call of {self.where} must have name and arguments, not {short_repr(one)}")
            given = [call[name] for name in ("arguments", "parameters") if call.get(name) not in (None, "")]
            if len(given) > 1:
                raise BadRow("type", f"a tool call of {self.where} has both arguments and parameters")
            arguments = _json(given[0], f"arguments of {self.where}") if given else {}
            self.calls.append(Call(one.get("id"), self._written(call["name"], arguments, learn)))

    def _tool(self, turn, learn, text):
        """ChatGLM3's tool message, which is a call and what it returned; elsewhere what a tool returned."""
        if not _holds_call(turn):
            self._refuse(turn, {"observation"} & turn.keys(), "but no parameters, so it is no call")
            self._observation(turn, learn, text)
            return
        if turn.get("observation") is None:
            raise BadRow("type", f"the tool message {self.where} has no observation")
        if text in turn:
            self._refuse(turn, (text,), "and what the tool returned under 'observation' too")
        parameters = {} if turn["parameters"] is None else turn["parameters"]
        self._no_calls()
        self.messages.append(self._written(turn.get("name"), parameters, learn))
        self.messages.append(Message("observation", self._returned(turn["observation"])))

    def _observation(self, turn, learn, text):
        if turn.get(text) is None:
            raise BadRow("type", f"{self.where} has no {text!r}")
        content = turn[text]
        content = self._text(turn, text) if _is_parts(content) else self._returned(content)
        if self.calls:
            wanted = turn.get("tool_call_id") or None
            place = next((i for i, call in enumerate(self.calls) if call.id == wanted), None)
            if place is None and wanted is not None and self.calls[0].id is not None:
                raise BadRow("type", f"{self.where} answers the call {short_repr(wanted)}, which is not there")
            self.messages.append(self.calls.pop(place or 0).message)
        elif not self.messages or self.messages[-1].role != "assistant":
            raise BadRow("format", f"{self.where} is what a tool returned, without a call before it")
        self.messages.append(Message("observation", content))

    def _add(self, role, content, metadata="", learn=False):
        self._no_calls()
        self.messages.append(Message(role, content, metadata, learn))

    def _no_calls(self):
        if self.calls:
            name = self.calls[0].message.metadata
            raise BadRow("format", f"before {self.where} stands nothing that the tool {short_repr(name)} returned")

    READ = {"system": _system, "user": _user, "assistant": _assistant, "call": _call, "tool": _tool}
    READ |= {"observation": _observation}

    # Parts of a message

    def _learn(self, turn, role) -> bool:
        """Whether a message is learnt: `loss`, or OpenAI's `weight` of 0 or 1."""
        answer = role in ("assistant", "call") or (role == "tool" and _holds_call(turn))
        if MARKS.isdisjoint(turn):
            return answer
        loss, weight = turn.get("loss"), turn.get("weight")
        if loss is not None and not isinstance(loss, bool):
            raise BadRow("type", f"loss of {self.where} must be true or false, not {short_repr(loss)}")
        if weight is not None and weight not in (0, 1):
            raise BadRow(
                "keys", f"weight of {self.where} must be 0 or 1, not {short_repr(weight)}: answers count alike"
            )
        if (loss or weight) and not answer:
            raise BadRow("keys", f"{self.where} asks to learn a message of the role {role}; only answers are learnt")
        return answer and loss is not False and (weight is None or bool(weight))

    def _text(self, turn, key, missing=False) -> str:
        value = turn.get(key)
        if isinstance(value, str):
            return value
        if value is None and missing:
            return ""
        if _is_parts(value):
            if other := [part for part in value if part.get("type") != "text" or not isinstance(part.get("text"), str)]:
                kind = short_repr(other[0].get("type"))
                raise BadRow("keys", f"{key} of {self.where} has a part of type {kind}, but the models read text alone")
            return "".join(part["text"] for part in value)
        raise BadRow("type", f"{key} of {self.where} must be a string, not {kind_of_value(value)}")

    def _written(self, name, parameters, learn) -> Message:
        try:
            call = write_call(name, parameters)
        except ToolCallError as error:
            raise BadRow("type", f"a tool call of {self.where}: {error}") from None
        return Message("assistant", call["content"], call["metadata"], learn)

    def _returned(self, value) -> str:
        try:
            return write_observation(value)
        except ToolCallError as error:
            raise BadRow("type", f"{self.where}: {error}") from None


def _is_parts(value) -> bool:
    """Whether a text is in parts, as OpenAI's `[{"type": "text", "text": ...}]`."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def _holds_call(turn: dict) -> bool:
    """Whether a tool's message is ChatGLM3's, with the call in it. Programs that give all messages the same keys write
    null under those of others."""
    return "parameters" in turn and (turn["parameters"] is not None or turn.get("observation") is not None)


def _json(value, where: str):
    """A value that may also be written as JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return WRITTEN.decode(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("json", f"{where} is not valid JSON: {error}") from None


def _tools(value, where: str) -> str | None:
    """Descriptions of tools as JSON, without the wrapper {"type": "function", "function": ...} of the OpenAI API.

    None for a string that is empty or blank, as an empty cell of a table is: no tools, not an empty list of them.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _json(value, where)
    try:
        written = repr(value)
    except RecursionError:
        written = None
    if written not in _TOOLS:
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise BadRow("type", f"{where} must be a list of objects, one a tool, not {kind_of_value(value)}")
        if written is None:
            raise BadRow("json", f"{where} is nested too deeply")
        text = JSON.encode(
            [
                tool["function"] if tool.get("type") == "function" and isinstance(tool.get("function"), dict) else tool
                for tool in value
            ]
        )
        if has_half_pair(text):
            raise BadRow(*HALF_PAIR[:2])
        if len(_TOOLS) >= MOST_TOOLS:
            _TOOLS.clear()
        _TOOLS[written] = text
    return _TOOLS[written]


_TOOLS: dict[str, str] = {}  # descriptions as they are read -> as JSON; rows have the same ones again and again


def _check_order(messages: list[Message], key: str) -> None:
    """Make sure that a system message stands first alone, and that somebody asks before something is answered."""
    rest = messages[messages[0].role == "system" :]
    if not rest:
        raise BadRow("empty", f"{key} has a system message alone")
    if rest[0].role not in ("user", "system"):
        raise BadRow("format", f"{key} begins with a message of {rest[0].role}; it must begin with one of the user")
    for message in rest:
        if message.role == "system":
            raise BadRow("format", f"{key} has a system message that does not stand first")
        if message.role == "user" and not message.content.strip():
            raise BadRow("empty", f"{key} has an empty message of the user")
