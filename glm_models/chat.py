"""`chat` and `stream_chat` of the three families, on top of transformers' `generate`."""

import contextlib
import queue
import threading

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer


class TokenQueue(BaseStreamer):
    """Hands generated ids, one at a time, to another thread."""

    def __init__(self):
        self.queue = queue.SimpleQueue()
        self.is_prompt = True

    def put(self, value: torch.Tensor):
        if self.is_prompt:  # generate sends the prompt first
            self.is_prompt = False
            return
        self.queue.put(int(value.reshape(-1)[0]))

    def end(self):
        pass  # stream_ids sends the end itself, after an error too


class Abandoned(StoppingCriteria):
    """Stops generation once nobody reads it any more."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream_ids(model, stop_ids: list[int], **kwargs):
    """Yield the ids that `model.generate(**kwargs)` makes for a batch of one, as they come, stop id included.

    generate runs in a thread of its own; its errors are raised here, and leaving this generator early stops it.
    """
    tokens, abandoned = TokenQueue(), Abandoned()
    criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or []), abandoned])

    def run():
        outcome = None
        try:
            model.generate(streamer=tokens, stopping_criteria=criteria, eos_token_id=stop_ids, **kwargs)
        except BaseException as error:  # handed over, not swallowed
            outcome = error
        tokens.queue.put(outcome)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while isinstance(item := tokens.queue.get(), int):
            yield item
        if item is not None:
            raise item
    finally:
        abandoned.event.set()
        thread.join()


@contextlib.contextmanager
def padded_batches(config):
    """Attention that takes the masks of padded batches. flash-attn's does not: training never has any."""
    before = config._attn_implementation
    if before == "flash_attention_2":
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def generate_ids(
    model, tokenizer, prompts: list[list[int]], limits: list[int], **options
) -> list[tuple[list[int], bool]]:
    """Ids of answers to a batch of prompts, each with whether it ended by itself; greedy unless options say otherwise.

    The token that ended it is not among them.

    A row's answer does not depend on the rows beside it.

    Args:
        prompts: ids, of any lengths.
        limits: most ids of each answer, at least 1.
        options: further arguments of `generate`.
    """
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    stop = tokenizer.stop_token_ids
    options = {"do_sample": False, "use_cache": True, "max_new_tokens": max(limits)} | options
    with padded_batches(model.config):
        output = model.generate(**batch, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, **options)
    answers = []
    for limit, ids in zip(limits, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        ids = ids[:limit]
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        answers.append((ids[:end], end is not None))
    return answers


def generate_answers(model, tokenizer, prompts, limits, **options) -> list[tuple[str, bool]]:
    """`generate_ids`, as texts."""
    answers = generate_ids(model, tokenizer, prompts, limits, **options)
    return [(tokenizer.decode_answer(ids), ended) for ids, ended in answers]


class ChatMixin:
    """Turns prompts into replies. The families add the official signatures, and their ways with history."""

    @staticmethod
    def sampling(do_sample: bool, top_p: float, temperature: float) -> dict:
        """generate's arguments; greedy decoding has no top_p and temperature."""
        if not do_sample:
            return {"do_sample": False}
        return {"do_sample": True, "top_p": top_p, "temperature": temperature}

    def extend_history(self, history, query: str, response: str):
        """The answer as shown, and a new history that holds it."""
        response = self.process_response(response)
        return response, [*(history or []), (query, response)]

    def _inputs(self, tokenizer, query, history, max_length, logits_processor, **role):
        """generate's arguments for a prompt; max_length counts prompt and answer."""
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
    def reply(self, tokenizer, query, history, max_length, logits_processor, role=None, **kwargs):
        """Generate one answer. Returns it and the new history."""
        role = {"role": role} if role else {}
        inputs = self._inputs(tokenizer, query, history, max_length, logits_processor, **role)
        stop_ids = tokenizer.stop_token_ids
        ids = self.generate(**inputs, eos_token_id=stop_ids, **kwargs)[0].tolist()[inputs["input_ids"].shape[1] :]
        if ids and ids[-1] in stop_ids:  # only then: at max_length the last id belongs to the answer
            ids = ids[:-1]
        return self.extend_history(history, query, tokenizer.decode(ids), **role)

    def stream_reply(self, tokenizer, query, history, max_length, logits_processor, cache=None, role=None, **kwargs):
        """Yield (answer so far, history with it, key/value cache) after each token."""
        role = {"role": role} if role else {}
        inputs = self._inputs(tokenizer, query, history, max_length, logits_processor, **role)
        prompt = inputs["input_ids"][0].tolist()
        cache = _continue(cache, prompt)
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
        if held_back:  # max_length came there: the last answer is the one that `chat` gives
            yield *self.extend_history(history, query, text, **role), cache


def _continue(cache, prompt: list[int]) -> DynamicCache:
    """Cut a cache of an earlier turn back to what it has in common with this prompt; a new one for None.

    Raises:
        ValueError: the cache is not one that stream_chat returned.
    """
    if cache is None:
        return DynamicCache()
    if not hasattr(cache, "input_ids"):
        raise ValueError("past_key_values must be a cache that stream_chat returned with return_past_key_values=True")
    common = 0
    # at least the last token of the prompt must be computed anew: its logits are wanted
    for mine, theirs in zip(prompt[:-1], cache.input_ids[: cache.get_seq_length()], strict=False):
        if mine != theirs:
            break
        common += 1
    cache.crop(common - cache.get_seq_length())  # a negative number: so many tokens less
    return cache
