"""The official chats, written anew from what is published of them: what our prompts and samples are compared with.

Of a tokenizer nothing is used but its SentencePiece model. A history is a list of messages: role, content, and where
there are any metadata and tools.
"""

import json
from bisect import bisect_left, bisect_right

MORE_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>")
MORE_TOKENS += ("<|observation|>",)  # of ChatGLM3; the first five are those of ChatGLM2 too, behind the pieces


def special(mode: str, pieces, token: str) -> int:
    """The id of a special token."""
    if mode == "glm" or token == "</s>":
        return pieces.piece_to_id(token)
    return pieces.get_piece_size() + MORE_TOKENS.index(token)


def text_ids(mode: str, pieces, text: str) -> list[int]:
    """The ids of plain text. ChatGLM-6B has pieces of its own for white space."""
    if mode == "glm":
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(80, 1, -1):
            text = text.replace(" " * length, f"<|blank_{length}|>")
    return pieces.encode(text)


def message_ids(pieces, message: dict) -> list[int]:
    """ChatGLM3's message: its role, a line of metadata, its content."""
    content = message["content"]
    if "tools" in message:
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    head = special("glm3", pieces, f"<|{message['role']}|>")
    return [head, *pieces.encode(message.get("metadata", "") + "\n"), *pieces.encode(content)]


def rounds(mode: str, history: list[dict]) -> tuple[str, str, str]:
    """The prompt of ChatGLM and ChatGLM2: the text before the last question, the question, the text after it."""
    questions, answers = ([m["content"] for m in history if m["role"] == role] for role in ("user", "assistant"))
    line, first = ("\n", 0) if mode == "glm" else ("\n\n", 1)
    if mode == "glm" and not answers:
        return "", questions[0], ""
    before = "".join(
        f"[Round {number}]{line}问：{question}{line}答：{answer}{line}"
        for number, (question, answer) in enumerate(zip(questions, answers, strict=False), first)
    )
    return f"{before}[Round {first + len(answers)}]{line}问：", questions[-1], f"{line}答："


def counted_ids(mode: str, pieces, history: list[dict]) -> list[int]:
    """What --max_src_len counts of the prompt of an answer: everything but the special tokens at its ends."""
    if mode == "glm3":
        return [token for message in history for token in message_ids(pieces, message)]
    return text_ids(mode, pieces, "".join(rounds(mode, history)))


def prompt_ids(mode: str, pieces, history: list[dict], counted: list[int] | None = None) -> list[int]:
    """What the model sees before it answers the last message of a history.

    Args:
        counted: see `counted_ids`, if it is known or was cut.
    """
    counted = counted_ids(mode, pieces, history) if counted is None else counted
    before, after = {
        "glm": ((), ("[gMASK]", "<sop>")),
        "glm2": (("[gMASK]", "sop"), ()),
        "glm3": (("[gMASK]", "sop"), ("<|assistant|>",)),
    }[mode]
    ids = [special(mode, pieces, token) for token in before], [special(mode, pieces, token) for token in after]
    return [*ids[0], *counted, *ids[1]]


def cut_ids(mode: str, pieces, history: list[dict], most: int) -> list[int]:
    """`counted_ids`, of which the end of the last message is cut to fit, and nothing of the template."""
    ids = counted_ids(mode, pieces, history)
    if len(ids) <= most:
        return ids
    if mode == "glm3":
        return ids[:most]
    before, question, after = rounds(mode, history)
    found = pieces.encode(before + question + after, out_type="proto").pieces if mode == "glm2" else ()
    if not found:  # a first question of ChatGLM-6B has no template
        return ids[:most]
    start, end = len(before.encode()), len((before + question).encode())
    head = bisect_left(found, start, key=lambda piece: piece.begin)
    tail = len(found) - bisect_right(found, end, key=lambda piece: max(piece.begin + 1, piece.end))
    assert "".join(piece.surface for piece in found[:head]).startswith(before)
    assert "".join(piece.surface for piece in found[len(found) - tail :]).endswith(after)
    return ids[: most - tail] + ids[len(ids) - tail :]


def answer_ids(mode: str, pieces, message: dict, following: dict | None) -> list[int]:
    """What the model writes: the answer up to and including the token at which its chat stops.

    Args:
        following: the next message, None if there is none.
    """
    if mode != "glm3":
        end = special(mode, pieces, "<eop>" if mode == "glm" else "</s>")
        return [*text_ids(mode, pieces, message["content"]), end]
    stop = "<|observation|>" if message.get("metadata") else "</s>"
    stop = f"<|{following['role']}|>" if following else stop
    return [*message_ids(pieces, message)[1:], special(mode, pieces, stop)]


def read_call(content: str) -> dict:
    """The parameters of a call, by the official parser: it runs what the model wrote."""
    code = "\n".join(content.split("\n")[1:-1])
    return eval(code, {"__builtins__": {}, "tool_call": lambda **parameters: parameters})


def drop_turns(mode: str, pieces, history: list[dict], learnt: list[int], most: int, most_before: int):
    """The conversation without the turns that are too many, by the documented rule; found one turn at a time.

    Args:
        learnt: places of the learnt answers. Of ChatGLM and ChatGLM2 there is one, at the end.
        most: maximum ids of the sample.
        most_before: maximum ids before the first learnt answer that is left, as `counted_ids`.

    Returns:
        The messages left, places of the learnt ones among them, and how many turns are gone.
    """
    system = int(history[0]["role"] == "system")
    questions = [i for i, m in enumerate(history[: learnt[-1]]) if m["role"] == "user"]
    for gone, start in enumerate(questions):
        left = history[:system] + history[start:]
        still = [i - start + system for i in learnt if i >= start]
        whole = len(sample_ids(mode, pieces, left))
        before = len(counted_ids(mode, pieces, left[: still[0]]))
        if start == questions[-1] or (whole <= most and before <= most_before):
            return left, still, gone


def sample_ids(mode: str, pieces, messages: list[dict]) -> list[int]:
    """A whole sample: of ChatGLM and ChatGLM2 with the last message as its answer."""
    if mode != "glm3":
        prompt, end = messages[:-1], messages[-1]
        return prompt_ids(mode, pieces, prompt) + answer_ids(mode, pieces, end, None)
    ids = prompt_ids(mode, pieces, messages)[:-1]
    last = messages[-1]
    return [*ids, answer_ids(mode, pieces, last, None)[-1]]
