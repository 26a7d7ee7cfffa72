"""The normal form of a row: a conversation, of which some messages are learnt.

`formats.to_dialogue` makes one of each row, and tokenizers encode it (`encode_dialogues`, `encode_questions`).
"""

from collections.abc import Hashable
from operator import itemgetter
from typing import NamedTuple

from glm_models.tools import answer_text


class Message(NamedTuple):
    """One message.

    role: system, user, assistant or observation; or text, alone in its dialogue: plain text, see text.py.
    metadata: of an assistant's message that calls a tool, the tool's name.
    learn: whether the model learns to write it; only an assistant's message and plain text can be learnt.
    """

    role: str
    content: str
    metadata: str = ""
    learn: bool = False


WITHOUT_LEARN = itemgetter(slice(3))  # of a message


class Dialogue(NamedTuple):
    """A conversation. Without an assistant's message at its end it is a question, for prediction.

    tools: descriptions of the tools that the model may call, a list as JSON; an empty one is written too, None is not.
    """

    messages: tuple[Message, ...]
    tools: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether this is plain text, without question and answer; then `prompt` has it, and `answer` is empty."""
        return self.messages[0].role == "text"

    @property
    def is_single_turn(self) -> bool:
        """Whether this is one question with its answer and nothing else, as most rows are; every family takes it."""
        if len(self.messages) != 2 or self.tools is not None:
            return False
        question, answer = self.messages
        return (question.role, answer.role) == ("user", "assistant") and not (question.metadata or answer.metadata)

    @property
    def asked(self) -> tuple[Message, ...]:
        """The messages before the last answer."""
        return self.messages[: -1 if self.messages[-1].role == "assistant" else None]

    @property
    def prompt(self) -> str:
        """The text before the last answer; messages are separated by line breaks."""
        asked = self.asked
        return asked[0].content if len(asked) == 1 else "\n".join([message.content for message in asked])

    @property
    def answer(self) -> str:
        """The text of the last answer, of a tool call with the tool's name above it; "" in a question."""
        last = self.messages[-1]
        return answer_text(last.metadata, last.content) if last.role == "assistant" else ""

    @property
    def prompt_key(self) -> Hashable:
        """Equal for two dialogues that ask the same: the question alone where that is all."""
        asked = self.asked
        if len(asked) == 1 and asked[0].role == "user" and self.tools is None:
            return asked[0].content
        return *map(WITHOUT_LEARN, asked), self.tools
