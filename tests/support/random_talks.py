"""Random conversations, and the rows that mean them in each of the formats that we read."""

import json
import random
from typing import NamedTuple

FAMILY_ROLES = {"glm": False, "glm2": False, "glm3": True}  # whether it has systems, tools and observations
WORDS = ["水泵漏水", "查继电器。", "发动机过热，怎么办？", "hello world", "x = [1, 2]", "12,5 %", "ÄÖ", "‮", "\u200b"]
ODD = ["<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>", "sop", "<eop>", "</s>", "<n>"]
ODD += [
    "[MASK]",
    "<|tab|>",
    "<|blank_3|>",
    "[Round 1]",
    "[Round 0]\n问：",
    "问：",
    "\n答：",
    "答：",
    "<unk>",
    "<s>",
    "<pad>",
]
ODD += [
    "\\ud83d",
    "\\u0041",
    "😀",
    "👩‍👩‍👧",
    "𠮷",
    "\0",
    "\x1b[31m",
    "\r\n",
    "\u2028",
    "\x85",
    "\x7f",
    "\ufeff",
    "\ufffd",
    "ｆｕｌｌ",
]
ODD += [
    "  ",
    " " * 81,
    "\n\n\n",
    "\t",
    "　",
    " \n \t ",
    "```python\ntool_call(a=1)\n```",
    '{"a": "b"}',
    "'",
    '"',
    "\\",
    "%s",
    "{}",
]
KEYS = [
    "city",
    "days",
    "参数",
    "class",
    "user-id",
    "a b",
    "",
    "\N{KELVIN SIGN}",
    "self",
    "x\n",
    "<|assistant|>",
    "__debug__",
    "ﬁ",
]
NAMES = ["get_weather", "time", "查询", "a-b", "print", "<|user|>", "x y", "f(1)"]
# question and answer under other names, with what else may stand there
FLAT = [("prompt", "response"), ("content", "summary"), ("query", "response")]


class Turn(NamedTuple):
    """One message. A call has a tool's name and parameters, and its content is how ChatGLM3's chat writes them."""

    role: str  # system, user, assistant, call or observation
    content: str = ""
    learn: bool = False
    name: str = ""
    parameters: dict | None = None


class Talk(NamedTuple):
    """A conversation, the row that means it, and which of its answers `train_on` has to say."""

    turns: list[Turn]
    tools: list | None
    row: dict
    train_on: str | None = None


def text(chance: random.Random, empty: bool = False) -> str:
    """A text that is not blank; with `empty` it may be."""
    if empty and chance.random() < 0.1:
        return chance.choice(("", " ", "\n", "　"))
    if chance.random() < 0.02:
        return "".join(chance.choice(WORDS) for _ in range(chance.randrange(100, 300)))
    parts = [chance.choice(ODD if chance.random() < 0.3 else WORDS) for _ in range(chance.choice((1, 1, 2, 3, 8)))]
    found = "".join(parts)
    return found if found.strip() else found + chance.choice(WORDS[:6])


def value(chance: random.Random, depth: int = 0):
    """Any JSON value."""
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return text(chance, empty=True)
    if kind == 2:
        return chance.choice((0, -7, 10**30, 2**63, True, False, None))
    if kind == 3:
        return chance.choice((0.5, -0.0, 1e22, 1e-320, 1.0, 3.14, 1e999, -1e999))
    if kind < 6:
        return chance.choice(("", "a", 1, None))
    if kind == 6:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(KEYS): value(chance, depth + 1) for _ in range(chance.randrange(4))}


def random_talk(chance: random.Random, mode: str) -> Talk:
    """A conversation that the family can take, in a format of ours."""
    roles = FAMILY_ROLES[mode]
    style = chance.choice((chatglm3, openai, sharegpt, with_history))
    turns, calls = [], roles and style is not with_history
    if roles and chance.random() < 0.4:
        turns.append(Turn("system", text(chance)))
    count = chance.choice((1, 1, 2, 3, 5))
    for number in range(count):
        turns.append(Turn("user", text(chance)))
        while calls and chance.random() < 0.35:
            if chance.random() < 0.2:
                turns.append(answer(chance))
            turns += (call(chance), Turn("observation", text(chance, empty=True)))
        if number == count - 1 and calls and chance.random() < 0.1:
            turns.append(call(chance))  # at the end, with nothing that it returned
            break
        turns.append(answer(chance))
        if roles and calls and chance.random() < 0.05:
            turns.append(Turn("user", text(chance)))  # two questions one after the other
    if not any(turn.learn for turn in turns):
        turns[-1] = turns[-1]._replace(learn=True) if turns[-1].role != "user" else turns[-1]
        turns += [] if turns[-1].learn else [answer(chance)._replace(learn=True)]
    tools = [tool(chance) for _ in range(chance.randrange(3))] if calls and chance.random() < 0.6 else None
    talk = style(chance, turns, tools)
    if style is with_history or chance.random() < 0.8:
        return talk
    last = max(i for i, turn in enumerate(turns) if turn.learn)
    return talk._replace(turns=[turn._replace(learn=i == last) for i, turn in enumerate(turns)], train_on="last")


def answer(chance: random.Random) -> Turn:
    return Turn("assistant", text(chance, empty=True), chance.random() < 0.7)


def call(chance: random.Random) -> Turn:
    parameters = {chance.choice(KEYS): value(chance) for _ in range(chance.randrange(4))}
    return Turn("call", "", chance.random() < 0.7, chance.choice(NAMES), parameters)


def tool(chance: random.Random) -> dict:
    return {"name": chance.choice(NAMES), "description": text(chance), "parameters": {"a": value(chance, 2)}}


def mark(chance: random.Random, turn: Turn, name: str = "loss") -> dict:
    """How a row says whether a message is learnt; nothing where that is what is meant without a word."""
    if turn.role not in ("assistant", "call") or (turn.learn and chance.random() < 0.7):
        return {}
    return {name: turn.learn if name == "loss" else int(turn.learn)}


def metadata(chance: random.Random) -> dict:
    """Keys that nothing reads."""
    return {"id": 3, "source": text(chance)} if chance.random() < 0.2 else {}


# Formats: the row of a conversation


def chatglm3(chance: random.Random, turns: list[Turn], tools: list | None) -> Talk:
    messages, rest = [], list(turns)
    while rest:
        turn = rest.pop(0)
        one = {"role": turn.role, "content": turn.content, **mark(chance, turn), **metadata(chance)}
        if turn.role == "call" and rest and chance.random() < 0.8:
            one = {"role": "tool", "name": turn.name, "parameters": turn.parameters, "observation": rest.pop(0).content}
            one |= mark(chance, turn)
        elif turn.role == "call":
            one = {"role": "assistant", "content": written(turn), "metadata": turn.name, **mark(chance, turn)}
        elif turn.role == "assistant" and chance.random() < 0.3:
            one["metadata"] = ""
        messages.append(one)
    row = {"conversations": messages, **metadata(chance)}
    if tools is not None and turns[0].role == "system" and chance.random() < 0.5:
        messages[0]["tools"] = tools
    elif tools is not None:
        row["tools"] = tools
    return Talk(turns, tools, row)


def written(turn: Turn) -> str:
    """A call as Python code, for a row that has it as text."""
    words = ", ".join(f"{key!a}: {ascii(one).replace('inf', '1e999')}" for key, one in turn.parameters.items())
    return f"```python\ntool_call(**{{{words}}})\n```".replace("<|assistant|>", "\\x3c|assistant|>")


def openai(chance: random.Random, turns: list[Turn], tools: list | None) -> Talk:
    messages, name = [], chance.choice(("loss", "weight"))
    for number, turn in enumerate(turns):
        content = turn.content
        if turn.role == "user" and chance.random() < 0.2:
            cut = chance.randrange(len(content))
            content = [{"type": "text", "text": part} for part in (content[:cut], content[cut:])]
        if turn.role == "call":
            before = turns[number - 1]
            said = before.role == "assistant" and before.learn == turn.learn and before.content.strip()
            if said:  # what is said before a call, in one message with it
                messages[-1]["tool_calls"] = [openai_call(chance, turn, number)]
                continue
            one = {"role": "assistant", "tool_calls": [openai_call(chance, turn, number)]}
            one |= {"content": chance.choice((None, ""))} if chance.random() < 0.5 else {}
            messages.append(one | mark(chance, turn, name))
            continue
        role = {"observation": "tool", "system": chance.choice(("system", "developer"))}.get(turn.role, turn.role)
        one = {"role": role, "content": content, **mark(chance, turn, name), **metadata(chance)}
        if role == "tool" and chance.random() < 0.7:
            one["tool_call_id"] = f"c{number - 1}"
        messages.append(one)
    row = {"messages": join_calls(chance, messages), **metadata(chance)}
    if tools is not None:
        row["tools"] = [{"type": "function", "function": one} for one in tools]
    return Talk(turns, tools or None, row)


def openai_call(chance: random.Random, turn: Turn, number: int) -> dict:
    """A call; what the tool returns names its id."""
    arguments = json.dumps(turn.parameters, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.2:
        arguments = turn.parameters
    return {"id": f"c{number}", "type": "function", "function": {"name": turn.name, "arguments": arguments}}


def join_calls(chance: random.Random, messages: list[dict]) -> list[dict]:
    """Some calls that follow each other become one message with several; what the tools returned keeps its order."""
    joined = []
    for message in messages:
        before = joined[-2] if len(joined) > 1 else {}
        calls = before.get("tool_calls"), message.get("tool_calls")
        is_learnt = [one.get("loss", one.get("weight", True)) for one in (before, message)]
        can = all(calls) and len(calls[0]) == 1 and not message.get("content") and is_learnt[0] == is_learnt[1]
        if can and message is not messages[-1] and chance.random() < 0.5:
            joined[-1]["tool_call_id"] = calls[0][0]["id"]
            messages[messages.index(message) + 1]["tool_call_id"] = calls[1][0]["id"]
            before["tool_calls"] = chance.sample([*calls[0], *calls[1]], 2)
            continue
        joined.append(message)
    return joined


def sharegpt(chance: random.Random, turns: list[Turn], tools: list | None) -> Talk:
    messages, row = [], {}
    for turn in turns:
        content = turn.content
        role = {"user": "human", "assistant": "gpt", "call": "function_call"}.get(turn.role, turn.role)
        role = chance.choice(("tool", "observation")) if turn.role == "observation" else role
        if turn.role == "call":
            content = json.dumps({"name": turn.name, "arguments": turn.parameters}, ensure_ascii=chance.random() < 0.5)
        if turn.role == "system" and chance.random() < 0.5:
            row["system"] = content
            continue
        messages.append({"from": role, "value": content, **mark(chance, turn), **metadata(chance)})
    row |= {"conversations": messages, **metadata(chance)}
    if tools is not None:
        row["tools"] = json.dumps(tools) if chance.random() < 0.7 else tools
    return Talk(turns, tools or None, row)


def with_history(chance: random.Random, turns: list[Turn], tools: None) -> Talk:
    """Question and answer with a history, under our names or others; it has no mark for each answer."""
    train_on = chance.choice((None, "last", "all"))
    turns = [turn._replace(learn=turn.role == "assistant" and train_on == "all") for turn in turns]
    turns[-1] = turns[-1]._replace(learn=True)
    system = [turn.content for turn in turns if turn.role == "system"]
    pairs = [turn.content for turn in turns if turn.role != "system"]
    question, last = pairs[-2:]
    cut = chance.randrange(len(question) + 1)
    row = {"instruction": question[:cut], "input": question[cut:], "output": last}
    if chance.random() < 0.4:
        names = chance.choice(FLAT)
        row = dict(zip(names, (question, last if last.strip() else "好"), strict=True))
        turns[-1] = turns[-1]._replace(content=row[names[1]])
    history = [list(pair) for pair in zip(pairs[:-2:2], pairs[1:-2:2], strict=True)]
    row |= {"history": history} if history or chance.random() < 0.2 else {}
    row |= {"system": system[0]} if system else {}
    return Talk(turns, None, row, train_on)
