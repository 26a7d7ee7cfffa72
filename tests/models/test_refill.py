"""Generation in slots: the answers of each row alone, whatever else is answered beside it."""

import random

import pytest
import torch
from conftest import TEXT

from glm_models import MODE
from glm_models.generation import generate_ids
from glm_models.refill import BLOCK, Request, SlotCache, _Chooser, generate_in_slots

LIMITS = [2, 9, 4, 1, 5, 12, 3, 7]
modes = pytest.mark.parametrize("mode", MODE)


def make_requests(tokenizer, limits=LIMITS) -> list[Request]:
    chance = random.Random(5)
    texts = ["".join(chance.choices(TEXT, k=1 + i % 3)) for i in range(len(limits))]
    return [Request(i, tokenizer.encode_prompt(texts[i]), limit, seed=i) for i, limit in enumerate(limits)]


def answers(model, tokenizer, groups, slots=3, **options) -> dict:
    return {
        one.row: (one.ids, one.ended) for one in generate_in_slots(model, tokenizer, iter(groups), slots, **options)
    }


@modes
@pytest.mark.parametrize("prefix", [None, 5])
def test_answers_are_those_of_each_row_alone(mode, prefix, load, tokenizers):
    model, tokenizer = load(mode, pre_seq_len=prefix), tokenizers[mode]
    requests = make_requests(tokenizer)
    used, i = max((len(r.prompt) % BLOCK, r.row) for r in requests)
    requests[i] = requests[i]._replace(limit=BLOCK - used + 3)  # goes on into another block of keys
    alone = {r.row: generate_ids(model, tokenizer, [r.prompt], [r.limit])[0] for r in requests}
    stop = max((ids for ids, _ in alone.values()), key=len)[4]  # a token that one answer has in its middle ends it

    class Ends:
        pad_token_id, stop_token_ids = tokenizer.pad_token_id, [stop]

    def cut(ids, ended):
        return (ids[: ids.index(stop)], True) if stop in ids else (ids, ended)

    assert answers(model, tokenizer, [requests[:4], requests[4:]]) == alone
    assert answers(model, Ends, [requests[:1], requests[1:]]) == {row: cut(*one) for row, one in alone.items()}


@modes
def test_random_numbers_and_penalties_are_those_of_each_row(mode, load, tokenizers):
    model, tokenizer = load(mode), tokenizers[mode]
    requests = make_requests(tokenizer, [6, 3, 8, 4])
    options = {"do_sample": True, "top_p": 0.95, "temperature": 1.5, "repetition_penalty": 1.3}
    groups = [requests[:2], requests[2:]]
    drawn = answers(model, tokenizer, groups, **options)
    assert answers(model, tokenizer, groups[::-1], **options) == drawn
    other = [[request._replace(seed=9) for request in group] for group in groups]
    assert answers(model, tokenizer, other, **options) != drawn
    penalty = {"repetition_penalty": 1.3}
    alone = {r.row: generate_ids(model, tokenizer, [r.prompt], [r.limit], **penalty)[0] for r in requests}
    assert answers(model, tokenizer, groups, **penalty) == alone


def test_keys_of_generation_config_count(load, tokenizers, monkeypatch):
    model, tokenizer = load("glm3"), tokenizers["glm3"]
    requests = make_requests(tokenizer, [6, 3, 8])
    usual = answers(model, tokenizer, [requests])
    monkeypatch.setattr(model.generation_config, "bad_words_ids", [[usual[0][0][0]]])
    alone = {r.row: generate_ids(model, tokenizer, [r.prompt], [r.limit])[0] for r in requests}
    assert answers(model, tokenizer, [requests]) == alone != usual


def test_sampling_is_among_the_50_likeliest_tokens(load, tokenizers):
    """transformers' `top_k` where nothing is said, now as in the official runs: scripts/adgen.sh relies on it."""
    chooser = _Chooser(load("glm"), tokenizers["glm"], {"do_sample": True, "temperature": 0.95})
    scores = torch.arange(300.0)[None] / 300
    kept = chooser.make(input_ids_seq_length=1)(torch.zeros(1, 1, dtype=torch.long), scores).isfinite()
    assert kept.nonzero()[:, 1].tolist() == [*range(250, 300)]


@modes
def test_in_bf16_the_rest_of_the_run_changes_nothing(mode, load, tokenizers):
    """As on another rank, or after a stop: other groups beside it, and a part of its group answered before."""
    model, tokenizer = load(mode, pre_seq_len=5).bfloat16(), tokenizers[mode]
    requests = make_requests(tokenizer)
    groups = [requests[:2], requests[2:5], requests[5:]]
    whole = answers(model, tokenizer, groups)
    some = [[r._replace(limit=0) if r.row == 3 else r for r in group] for group in groups[:0:-1]]
    again = answers(model, tokenizer, some)
    assert again.keys() == {2, 4, 5, 6, 7}
    assert again == {row: whole[row] for row in again}


def test_what_a_row_leaves_does_not_reach_the_next():
    """Keys that are hidden must be finite: 0 times infinity is no number."""
    cache = SlotCache(2, prefix=0)
    cache.fit(BLOCK)
    cache.put(1, [torch.full((2, 1, 40, 8), torch.inf)])
    cache.put(1, [torch.ones(2, 1, 10, 8)])
    assert cache.layers[0].isfinite().all()


def test_memory_follows_the_rows():
    cache = SlotCache(2, prefix=4)
    cache.fit(3 * BLOCK)
    assert cache.room + 4 == 4 * BLOCK
    prompt = torch.randn(2, 1, 2 * BLOCK, 8)
    cache.put(1, [prompt])
    for keys, room in ((2 * BLOCK, 4 * BLOCK), (BLOCK, 4 * BLOCK), (BLOCK - 4, BLOCK), (BLOCK, 2 * BLOCK)):
        cache.fit(keys)
        assert cache.layers[0].shape[3] + 4 == room
        torch.testing.assert_close(cache.layers[0][:, 1, :, : BLOCK - 4], prompt[:, :, : BLOCK - 4], rtol=0, atol=0)
