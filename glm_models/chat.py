"""The official chat methods of the three families: `chat` and `stream_chat`."""

from typing import ClassVar

import torch
from transformers.cache_utils import DynamicCache

from .generation import stream_ids

OFFICIAL = object()  # default of an argument whose official value differs between the families


class ChatMixin:
    """`chat` and `stream_chat` for a model that can `generate`.

    The families give the official values in `chat_defaults`, `process_response`, and other forms of history.
    """

    chat_defaults: ClassVar[dict]  # official max_length, top_p and temperature

    def chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        max_length: int | None = OFFICIAL,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = OFFICIAL,
        temperature: float = OFFICIAL,
        logits_processor=None,
        *,
        role: str | None = None,
        **kwargs,
    ) -> tuple:
        """Answer one query, as the official model does.

        Args:
            history: earlier turns, in the family's form; see its tokenizer's `encode_prompts`.
            max_length: maximum tokens of prompt and answer together; None for no limit.
            role: who asks, for families with roles.
            kwargs: more arguments of `generate`.

        Returns:
            The answer and a new history; the history passed in is not changed.

        Raises:
            ValueError: the prompt leaves no room for an answer, or the history has another form.
        """
        options = self._chat_options(max_length, do_sample, top_p, temperature) | kwargs
        return self._reply(tokenizer, query, history, logits_processor, role, num_beams=num_beams, **options)

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        past_key_values: DynamicCache | None = None,
        max_length: int | None = OFFICIAL,
        do_sample: bool = True,
        top_p: float = OFFICIAL,
        temperature: float = OFFICIAL,
        logits_processor=None,
        return_past_key_values: bool = False,
        *,
        role: str | None = None,
        **kwargs,
    ):
        """As `chat`, but a generator of (answer so far, new history) after each token.

        With `return_past_key_values` the key/value cache comes third. Passed back as `past_key_values` with the next
        query, only the new part of the conversation is computed.
        """
        options = self._chat_options(max_length, do_sample, top_p, temperature) | kwargs
        for *answer, cache in self._stream_reply(
            tokenizer, query, history, logits_processor, role, past_key_values, **options
        ):
            yield (*answer, cache) if return_past_key_values else tuple(answer)

    def extend_history(self, history, query: str, response: str):
        """The answer as shown to the user, and a new history that includes it."""
        response = self.process_response(response)
        return response, [*(history or []), (query, response)]

    def _chat_options(self, max_length, do_sample: bool, top_p, temperature) -> dict:
        """Arguments of `generate`, official where not given; greedy decoding has no top_p and temperature."""
        given = {"max_length": max_length, "top_p": top_p, "temperature": temperature}
        values = {key: self.chat_defaults[key] if value is OFFICIAL else value for key, value in given.items()}
        if not do_sample:
            values = {"max_length": values["max_length"]}
        return values | {"do_sample": do_sample}

    def _inputs(self, tokenizer, query, history, max_length, logits_processor, **role) -> dict:
        """Arguments of `generate` for a prompt; max_length counts prompt and answer."""
        ids = tokenizer.encode_prompt(query, history, **role)
        input_ids = torch.tensor([ids], device=self.device)
        pad = tokenizer.pad_token_id
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pad_token_id": pad}
        if max_length is not None:
            if len(ids) >= max_length:
                raise ValueError(f"the prompt has {len(ids)} tokens, max_length is {max_length}: no room for an answer")
            inputs["max_length"] = max_length
        if logits_processor:
            inputs["logits_processor"] = logits_processor
        return inputs

    @torch.inference_mode()
    def _reply(self, tokenizer, query, history, logits_processor, role, *, max_length, **kwargs):
        """Generate one answer. Returns it and the new history."""
        role = {"role": role} if role else {}
        inputs = self._inputs(tokenizer, query, history, max_length, logits_processor, **role)
        stop_ids = tokenizer.stop_token_ids
        ids = self.generate(**inputs, eos_token_id=stop_ids, **kwargs)[0].tolist()[inputs["input_ids"].shape[1] :]
        if ids and ids[-1] in stop_ids:  # at max_length the last id belongs to the answer
            ids = ids[:-1]
        return self.extend_history(history, query, tokenizer.decode(ids), **role)

    def _stream_reply(self, tokenizer, query, history, logits_processor, role, cache, *, max_length, **kwargs):
        """Yield (answer so far, history with it, key/value cache) after each token."""
        role = {"role": role} if role else {}
        inputs = self._inputs(tokenizer, query, history, max_length, logits_processor, **role)
        prompt = inputs["input_ids"][0].tolist()
        cache = _reuse_cache(cache, prompt)
        stop_ids = tokenizer.stop_token_ids
        ids = []
        held_back = False
        for token in stream_ids(self, stop_ids, cache=cache, **inputs, **kwargs):
            ids.append(token)
            cache.input_ids = prompt + ids
            answer = ids[:-1] if token in stop_ids else ids
            text = tokenizer.decode(answer)
            held_back = text.endswith("\ufffd") and token not in stop_ids  # in the middle of a character
            if not held_back:
                yield *self.extend_history(history, query, text, **role), cache
        if held_back:  # max_length was reached there: the last answer must be the one that `chat` gives
            yield *self.extend_history(history, query, text, **role), cache


def _reuse_cache(cache: DynamicCache | None, prompt: list[int]) -> DynamicCache:
    """Cut the cache of an earlier turn back to what it has in common with this prompt; a new cache for None.

    Raises:
        ValueError: the cache is not one that stream_chat returned.
    """
    if cache is None:
        return DynamicCache()
    if not hasattr(cache, "input_ids"):
        raise ValueError("past_key_values must be a cache that stream_chat returned with return_past_key_values=True")
    common = 0
    # the last token of the prompt must always be computed: its logits give the first token of the answer
    for mine, theirs in zip(prompt[:-1], cache.input_ids[: cache.get_seq_length()], strict=False):
        if mine != theirs:
            break
        common += 1
    cache.crop(common - cache.get_seq_length())  # a negative number: remove that many tokens
    return cache
