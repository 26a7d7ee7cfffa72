"""ChatGLM3-6B: the network of ChatGLM2-6B, a chat of roles, and tool calls."""

import ast
import copy
import functools
import json
from typing import ClassVar

import numpy as np
from transformers import BatchEncoding

from .checkpoint import CheckpointError, shown
from .glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLM2Tokenizer
from .tokenization import Prompt, history_messages


class ChatGLM3Config(ChatGLM2Config):
    """config.json of ChatGLM3-6B: the keys of ChatGLM2-6B."""

    title: ClassVar[str] = "ChatGLM3-6B"
    rope_ratio_scales_base: ClassVar[bool] = True


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """As ChatGLM2's, with four more special tokens: the roles of a conversation."""

    mode = "glm3"
    code_sign = "build_single_message"
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
            raise CheckpointError(f"encode_special_tokens {shown(encode)} must be true or false")
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

    @functools.cached_property
    def line_break(self) -> list[int]:
        """Ids of empty metadata."""
        return self.encode_text("\n")

    def encode_prompts(self, queries, history=None, max_src_len=None, threads=1, role="user") -> list[Prompt]:
        ids = []
        for turn in history_messages(history):
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
        line_break = np.array(self.line_break, np.int32)  # no metadata: the line break that ends it comes first
        return [np.concatenate((line_break, ids)) for ids in self.encode_texts(answers, threads)]

    def decode_answer(self, ids: list[int]) -> str:
        return self.decode(ids).removeprefix("\n").removeprefix(" ")  # the line break, and what begins a text

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

    def chat(
        self,
        tokenizer,
        query: str,
        history: list[dict] | None = None,
        role: str = "user",
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor=None,
        **kwargs,
    ):
        """Answer one message, as the official model does.

        Returns:
            The answer (text; a dict with name and parameters where the model calls a tool) and a new history; the
            history passed in stays as it was.
        """
        sampling = self.sampling(do_sample, top_p, temperature)
        return self.reply(
            tokenizer,
            query,
            history,
            max_length,
            logits_processor,
            role=role,
            num_beams=num_beams,
            **sampling,
            **kwargs,
        )

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[dict] | None = None,
        role: str = "user",
        past_key_values=None,
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor=None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """As `chat`, but yields (answer so far, history) after each token; see ChatGLM2 for past_key_values."""
        sampling = self.sampling(do_sample, top_p, temperature)
        for *answer, cache in self.stream_reply(
            tokenizer,
            query,
            history,
            max_length,
            logits_processor,
            cache=past_key_values,
            role=role,
            **sampling,
            **kwargs,
        ):
            yield (*answer, cache) if return_past_key_values else tuple(answer)

    def extend_history(self, history, query: str, response: str, role: str = "user"):
        history = copy.deepcopy(history or []) + [{"role": role, "content": query}]
        return self.process_response(response, history)

    @staticmethod
    def process_response(output: str, history: list[dict]):
        """Split a reply into messages and read a tool call in the last one, without running anything of it.

        Args:
            output: what the model wrote after `<|assistant|>`: metadata, a line break, content; maybe several messages.
            history: the conversation up to the question; not changed.

        Returns:
            The last message's answer and the history with all messages of the reply. With metadata the answer is a
            dict: {"name", "parameters"} where the first message offers tools and the call can be read as keyword
            arguments of literals, else {"name", "content"}.
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
            has_tools = history[0]["role"] == "system" and "tools" in history[0]
            parameters = _tool_parameters(content) if has_tools else None
            content = (
                {"name": name, "content": content} if parameters is None else {"name": name, "parameters": parameters}
            )
        return content, history


def _tool_parameters(content: str) -> dict | None:
    """Keyword arguments of the one call `tool_call(...)` in a fenced code block, literals only; None for others."""
    lines = content.strip().split("\n")
    if len(lines) < 3 or not lines[0].startswith("```") or lines[-1].strip() != "```":
        return None
    try:
        call = ast.parse("\n".join(lines[1:-1]).strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "tool_call":
            return None
        names = [word.arg for word in call.keywords]
        if call.args or None in names or len(set(names)) < len(names):
            return None
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
