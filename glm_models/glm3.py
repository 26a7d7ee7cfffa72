"""ChatGLM3-6B: the network of ChatGLM2-6B, a chat of roles, and tool calls."""

import contextlib
import copy
import functools
import itertools
import json
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from transformers import BatchEncoding

from .checkpoint import CheckpointError
from .families import FAMILIES
from .glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLM2Tokenizer
from .messages import short_repr
from .tokenization import Encoded, Prompt
from .tools import CLOSING, TOOLS_SYSTEM, ToolCallError, read_parameters


class ChatGLM3Config(ChatGLM2Config):
    """config.json of ChatGLM3-6B: the keys of ChatGLM2-6B."""

    title: ClassVar[str] = FAMILIES["glm3"].title
    rope_ratio_scales_base: ClassVar[bool] = True


@functools.lru_cache(maxsize=1024)
def _system_text(content: str, tools: str) -> str:
    """A system message with tools, as the official chat writes it; rows have the same tools again and again.

    Args:
        tools: JSON.
    """
    return f"{content}\n{json.dumps(json.loads(tools), indent=4, ensure_ascii=False)}"


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """ChatGLM2's tokenizer with four more special tokens: the roles of a conversation."""

    mode = "glm3"
    roles = ("system", "user", "assistant", "observation")
    special_tokens = (*ChatGLM2Tokenizer.special_tokens, *(f"<|{role}|>" for role in roles))

    def __init__(self, vocab_file, encode_special_tokens=False, **kwargs):
        self.encode_special_tokens = encode_special_tokens
        super().__init__(vocab_file, **kwargs)
        self.init_kwargs["encode_special_tokens"] = encode_special_tokens

    @classmethod
    def read_settings(cls, settings: dict) -> dict:
        encode = settings.get("encode_special_tokens", False)
        if type(encode) is not bool:
            raise CheckpointError(f"encode_special_tokens {short_repr(encode)} must be true or false")
        return {"encode_special_tokens": encode}

    @property
    def stop_token_ids(self) -> list[int]:
        return [self.get_command(token) for token in ("<eos>", "<|user|>", "<|observation|>")]

    @property
    def _silent_tokens(self) -> set[str]:
        return {"<unk>", "<s>", "</s>", ""}  # special tokens stay visible: a reply may hold several messages

    def _tokenize(self, text: str) -> list[str]:
        if not self.encode_special_tokens:
            return super()._tokenize(text)
        pieces = []
        while text:
            found = [(text.index(f"<|{role}|>"), f"<|{role}|>") for role in self.roles if f"<|{role}|>" in text]
            start, token = min(found, default=(len(text), ""))
            if start:
                pieces += super()._tokenize(text[:start])
            pieces += [token] if token else []
            text = text[start + len(token) :]
        return pieces

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Ids of one message: role, metadata and a line break, content."""
        if role not in self.roles:
            raise ValueError(f"role {role!r} is not one of {', '.join(self.roles)}")
        head = self.encode_text(f"{metadata}\n") if metadata else self.line_break
        return [self.get_command(f"<|{role}|>"), *head, *(self.encode_text(message) if message else ())]

    def check_messages(self, history) -> None:
        """Check that earlier turns are messages of the official form and have no key that would be ignored.

        Raises:
            ValueError: they are not, or have one.
        """
        expected = 'the history of ChatGLM3-6B is a list of messages {"role": ..., "content": ...}'
        if not isinstance(history, (list, tuple)):
            raise ValueError(f"{expected}, not {short_repr(history)}")
        for number, turn in enumerate(history):
            where = f"history[{number}]"
            if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
                raise ValueError(f"{expected}; {where} is {short_repr(turn)}")
            if turn["role"] not in self.roles:
                raise ValueError(f"role {short_repr(turn['role'])} of {where} is not one of {', '.join(self.roles)}")
            if not isinstance(turn["content"], str) or not isinstance(turn.get("metadata") or "", str):
                raise ValueError(f"content and metadata of {where} must be texts: {short_repr(turn)}")
            # tools are read in system messages only, as in the official chat
            if unknown := sorted(map(str, turn.keys() - {"role", "content", "metadata", "tools"})):
                raise ValueError(
                    f"{where} has {', '.join(map(short_repr, unknown))}, which ChatGLM3-6B's chat does not read"
                )

    @functools.cached_property
    def line_break(self) -> list[int]:
        """Ids of empty metadata."""
        return self.encode_text("\n")

    def encode_prompts(self, queries, history=None, max_src_len=None, threads=1, role="user") -> list[Prompt]:
        ids = []
        self.check_messages(history or [])
        for turn in history or []:
            content = turn["content"]
            if turn["role"] == "system" and "tools" in turn:
                content += "\n" + json.dumps(turn["tools"], indent=4, ensure_ascii=False)
            ids += self.build_single_message(turn["role"], turn.get("metadata", ""), content)
        ids += self.build_single_message(role, "", "")
        if max_src_len is not None and max_src_len < len(ids):
            raise ValueError(f"max_src_len {max_src_len} is less than the {len(ids)} ids of the prompt's template")
        room = None if max_src_len is None else max_src_len - len(ids)
        begin = np.array(self.get_prefix_tokens() + ids, np.int32)
        end = np.array([self.get_command("<|assistant|>")], np.int32)
        return [
            Prompt(begin, text[:room], end, room is not None and len(text) > room)
            for text in self.encode_texts(queries, threads)
        ]

    def encode_answers(self, answers, threads=1) -> list[np.ndarray]:
        line_break = np.array(self.line_break, np.int32)  # the line break that ends the (empty) metadata comes first
        return [np.concatenate((line_break, ids)) for ids in self.encode_texts(answers, threads)]

    def dialogue_problem(self, dialogue) -> None:
        return None

    def encode_dialogues(self, dialogues, max_src_len=None, threads=1, max_len=None) -> list[Encoded]:
        """Samples of conversations: one per conversation, in which every learnt answer is a span.

        An answer is learnt with the token that ends it: the role of the next message, as in the official chat, or the
        end token; of a tool call at the end it is the role of an observation. max_src_len limits the tokens before the
        first learnt answer. A conversation that is longer than a limit loses as few turns as necessary from its
        beginning: a question and everything up to the next one. The system message with the tools, and the turn of the
        last learnt answer, are kept.
        """
        most_before = max_src_len if max_src_len is not None else math.inf
        most = max_len if max_len is not None else math.inf
        encoded = []
        for number, messages, contents in self._encode_messages(dialogues, threads):
            if len(messages) == 2 and (one := self._encode_turn(number, messages, contents, max_src_len)):
                encoded.append(one)
                continue
            before, one = self._encode_conversation(number, messages, contents)
            if not one.spans:
                continue
            if before > most_before or one.length > most:
                messages, contents, dropped = self._drop_turns(messages, contents, max_src_len, max_len)
                first = next(i for i, message in enumerate(messages) if message.learn)
                parts, _, cut = self._lay_out(messages[:first], contents, max_src_len)
                if first:
                    contents = [*contents[: first - 1], parts[-1], *contents[first:]]
                _, one = self._encode_conversation(number, messages, contents)
                one = one._replace(cut=cut, dropped=dropped)
            encoded.append(one)
        return encoded

    def _encode_conversation(self, number: int, messages, contents) -> tuple[int, Encoded]:
        """What --max_src_len counts (the tokens before the first learnt answer, without the prefix), and the sample."""
        prefix, end = self._frame
        head_of = self._heads
        parts, spans = [prefix], []
        length, start, before = len(prefix), 0, 0
        for (role, _, metadata, learn), ids in zip(messages, contents, strict=True):
            head = head_of(role, metadata)
            if start:  # the answer before is learnt with the role of this message, at which the chat stops
                spans.append((start, length + 1))
                start = 0
            if learn:
                start = length + 1
                before = before or length
            parts += (head, ids)
            length += len(head) + len(ids)
        # the chat stops at an observation's role after a call
        parts.append(self._roles["observation"] if messages[-1].metadata else end)
        length += 1
        if start:
            spans.append((start, length))
        return before - len(prefix), Encoded(number, tuple(parts), length, tuple(spans), False)

    def _encode_turn(self, number: int, messages, contents, max_src_len) -> Encoded | None:
        """One question and its learnt answer, if nothing is cut: what most data has, in a third of the time."""
        question, answer = messages
        begin, head, end = self._turn_frame
        counted = len(begin) - len(self._frame[0]) + len(contents[0])
        if (question.role, answer.role, answer.learn) != ("user", "assistant", True):
            return None
        if question.metadata or answer.metadata or (max_src_len is not None and counted > max_src_len):
            return None
        start = len(begin) + len(contents[0]) + 1
        length = start + len(head) + len(contents[1])
        return Encoded(number, (begin, contents[0], head, contents[1], end), length, ((start, length),), False)

    @functools.cached_property
    def _turn_frame(self) -> tuple[np.ndarray, ...]:
        """Ids before a first question, of the assistant's role and line break, and of the end token."""
        prefix, end = self._frame
        return np.concatenate((prefix, self._heads("user", ""))), self._heads("assistant", ""), end

    def _drop_turns(self, messages, contents, max_src_len, max_len, question=False):
        """Messages and contents without the turns that are too much, and how many turns these are.

        Args:
            question: nothing is learnt, and max_src_len limits all messages.
        """
        learnt = [len(messages)] if question else [i for i, message in enumerate(messages) if message.learn]
        system = int(messages[0].role == "system")
        starts = [i for i, message in enumerate(messages[: learnt[-1]]) if message.role == "user"]
        if len(starts) < 2 or (max_src_len is None and max_len is None):
            return messages, contents, 0
        # tokens before each message, without those of the frame
        sizes = [
            len(self._heads(m.role, m.metadata)) + len(content) for m, content in zip(messages, contents, strict=True)
        ]
        ends = [0, *itertools.accumulate(sizes)]
        frame = len(self._frame[0]) + 1
        starts[0] = system  # what may stand before the first question goes with it
        for start in starts:
            gone = ends[start] - ends[system]
            first = next(i for i in learnt if i >= start)
            fits = max_src_len is None or ends[first] - gone <= max_src_len
            if fits and (max_len is None or frame + ends[-1] - gone <= max_len):
                break
        return (*messages[:system], *messages[start:]), contents[:system] + contents[start:], starts.index(start)

    def encode_questions(self, dialogues, max_src_len=None, threads=1) -> list[Prompt]:
        prompts = []
        for _, messages, contents in self._encode_messages(dialogues, threads):
            messages, contents, dropped = self._drop_turns(messages, contents, max_src_len, None, question=True)
            parts, _, cut = self._lay_out(messages, contents, max_src_len)
            prompts.append(Prompt(np.concatenate(parts[:-1]), parts[-1], self._roles["assistant"], cut, dropped))
        return prompts

    def _encode_messages(self, dialogues, threads):
        """Yield index, messages and the ids of their contents for each dialogue; tools are in a system message."""
        each = [self._with_tools(dialogue) for dialogue in dialogues]
        texts = {message.content: None for messages in each for message in messages}  # tools come again in many rows
        ids = dict(zip(texts, self.encode_texts([*texts], threads), strict=True))
        for number, messages in enumerate(each):
            yield number, messages, [ids[message.content] for message in messages]

    @staticmethod
    def _with_tools(dialogue):
        """The messages; tools are written into the system message as in the official chat."""
        if dialogue.tools is None:
            return dialogue.messages
        first, rest = dialogue.messages[0], dialogue.messages
        text, rest = (first.content, rest[1:]) if first.role == "system" else (TOOLS_SYSTEM, rest)
        return (type(first)("system", _system_text(text, dialogue.tools), "", False), *rest)

    def _lay_out(self, messages, contents, max_src_len):
        """Ids and number of tokens of the messages before an answer, and whether the last was cut to max_src_len."""
        parts, counted = [self._frame[0]], 0
        for message, content in zip(messages, contents, strict=False):
            parts += (self._heads(message.role, message.metadata), content)
            counted += sum(map(len, parts[-2:]))
        template = counted - len(parts[-1]) * (len(parts) > 1)
        if max_src_len is not None and max_src_len < template:
            what = "of what stands before the last message" if len(parts) > 3 else "of the prompt's template"
            raise ValueError(f"max_src_len {max_src_len} is less than the {template} ids {what}")
        cut = max_src_len is not None and counted > max_src_len
        if cut:
            parts[-1] = parts[-1][: max_src_len - template]
            counted = max_src_len
        return parts, len(parts[0]) + counted, cut

    @functools.cached_property
    def _heads(self) -> Callable[[str, str], np.ndarray]:
        """Ids of a role, and of metadata with its line break; a file names few tools, but often."""

        @functools.lru_cache(maxsize=1024)
        def head(role: str, metadata: str) -> np.ndarray:
            if role not in self.roles:
                raise ValueError(f"role {role!r} is not one of {', '.join(self.roles)}")
            return np.concatenate((self._roles[role], self.encode_texts([f"{metadata}\n"])[0]))

        return head

    @functools.cached_property
    def _roles(self) -> dict[str, np.ndarray]:
        """The id of each role."""
        return {role: np.array([self.get_command(f"<|{role}|>")], np.int32) for role in self.roles}

    @functools.cached_property
    def _frame(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids with which a sample begins, and its end token."""
        return np.array(self.get_prefix_tokens(), np.int32), np.array([self.eos_token_id], np.int32)

    def decode_answer(self, ids: list[int]) -> str:
        text = self.decode(ids)
        if not text.startswith("\n"):  # metadata: the name of a tool; the space begins the text of the call
            return text.removeprefix(" ").replace(f"\n {CLOSING}", f"\n{CLOSING}", 1)
        return text.removeprefix("\n").removeprefix(" ")  # empty metadata, and the space with which a text begins

    def build_prompt(self, query, history=None):
        raise NotImplementedError("ChatGLM3 prompts are ids, not text: use build_chat_input or encode_prompt")

    def build_chat_input(self, query: str, history: list[dict] | None = None, role: str = "user") -> BatchEncoding:
        """The official chat prompt as a batch of one, tensors [1, tokens]."""
        ids = self.encode_prompt(query, history, role=role)
        encoded = self._pad({"input_ids": ids})
        return BatchEncoding(encoded, tensor_type="pt", prepend_batch_axis=True)


class ChatGLM3ForConditionalGeneration(ChatGLM2ForConditionalGeneration):
    """ChatGLM3-6B with loss, `generate`, `chat` and `stream_chat`. History is a list of messages:
    {"role": "user", "content": ...}, {"role": "assistant", "metadata": ..., "content": ...}, and "tools" in a system
    message."""

    mode = "glm3"
    config_class = ChatGLM3Config
    config: ChatGLM3Config

    def chat(self, tokenizer, query: str, history: list[dict] | None = None, role: str = "user", *official, **kwargs):
        """See ChatMixin. Where the model calls a tool, the answer is a dict with name and parameters.

        Args:
            official: max_length, num_beams, do_sample, top_p, temperature, logits_processor, in the official order.
        """
        return super().chat(tokenizer, query, history, *official, role=role, **kwargs)

    def stream_chat(
        self, tokenizer, query: str, history: list[dict] | None = None, role: str = "user", *official, **kwargs
    ):
        """See ChatMixin.

        Args:
            official: past_key_values, max_length, do_sample, top_p, temperature, logits_processor,
                return_past_key_values, in the official order.
        """
        return super().stream_chat(tokenizer, query, history, *official, role=role, **kwargs)

    def extend_history(self, history, query: str, response: str, role: str = "user"):
        history = copy.deepcopy(history or []) + [{"role": role, "content": query}]
        return self.process_response(response, history)

    @staticmethod
    def process_response(output: str, history: list[dict]):
        """Split a reply into messages and read the tool call in the last one, without executing it.

        Args:
            output: the text after `<|assistant|>`: metadata, a line break, content; it may hold several messages.
            history: the conversation up to the question; not changed.

        Returns:
            The last message's answer and the history with all messages of the reply. With metadata the answer is a
            dict: {"name", "parameters"} where the first message offers tools and `read_parameters` reads the call, else
            {"name", "content"}.
        """
        history = copy.deepcopy(history)
        content = ""
        for message in output.split("<|assistant|>"):
            metadata, newline, content = message.partition("\n")
            if not newline:
                metadata, content = "", message
            name = metadata.strip()
            if not name:
                content = content.strip()
                history.append({"role": "assistant", "metadata": metadata, "content": content})
                content = content.replace("[[训练时间]]", "2023年")
                continue
            history.append({"role": "assistant", "metadata": metadata, "content": content})
            called = {"name": name, "content": content}
            if history[0]["role"] == "system" and "tools" in history[0]:
                with contextlib.suppress(ToolCallError):
                    called = {"name": name, "parameters": read_parameters(content)}
            content = called
        return content, history
