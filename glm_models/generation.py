"""Generation on top of transformers' `generate`: answers to a batch of prompts, and ids as they come."""

import contextlib
import queue
import threading
from collections.abc import Iterator

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class TokenQueue(BaseStreamer):
    """Passes generated ids, one at a time, to another thread."""

    def __init__(self):
        self.queue = queue.SimpleQueue()
        self.is_prompt = True

    def put(self, value: torch.Tensor):
        if self.is_prompt:  # generate puts the prompt first
            self.is_prompt = False
            return
        self.queue.put(int(value.reshape(-1)[0]))

    def end(self):
        pass  # stream_ids puts the end itself, also after an error


class StopWhenUnread(StoppingCriteria):
    """Stops generation when nobody reads its output any more."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream_ids(model, stop_ids: list[int], **kwargs) -> Iterator[int]:
    """Yield the ids that `model.generate(**kwargs)` makes for a batch of one, as they come, including the stop id.

    generate runs in its own thread; its errors are raised here. Closing this generator early stops the thread.
    """
    tokens, unread = TokenQueue(), StopWhenUnread()
    criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or []), unread])

    def run():
        outcome = None
        try:
            model.generate(streamer=tokens, stopping_criteria=criteria, eos_token_id=stop_ids, **kwargs)
        except BaseException as error:  # raised again below
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
        unread.event.set()
        thread.join()


@contextlib.contextmanager
def padded_batches(config):
    """Context in which attention accepts the masks of padded batches: flash-attn, for training only, does not."""
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
    """Answers to a batch of prompts as ids; greedy unless the options say otherwise.

    A row's answer does not depend on the other rows of the batch.

    Args:
        prompts: ids, of any lengths.
        limits: maximum ids of each answer, at least 1.
        options: further arguments of `generate`.

    Returns:
        For each prompt the ids without the stop token, and whether the answer ended with one.
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
    """As `generate_ids`, but the answers are texts."""
    answers = generate_ids(model, tokenizer, prompts, limits, **options)
    return [(tokenizer.decode_answer(ids), ended) for ids, ended in answers]
