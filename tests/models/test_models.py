"""The three networks against independent oracles and against themselves, on tiny checkpoints.

ChatGLM2 and ChatGLM3 are compared with transformers' own GlmForCausalLM, ChatGLM-6B with a float64 re-derivation
written here. Then come the promises that hold whatever the numbers are: padding changes nothing, neither does the
key/value cache, gradient checkpointing or the attention implementation; checkpoints load completely or not at all.
"""

import itertools
import json
import math
import os
import shutil
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import enliven, write_model
from native import native_model, native_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessor, TextIteratorStreamer

from glm_models import MODE, CheckpointError, attention, modeling, ops
from glm_models.families import FAMILIES
from glm_models.generation import generate_ids
from tuning.engine.loading import load_base
from tuning.run.flops import needed_flops
from tuning.samples.batches import MicroBatch, collate
from tuning.samples.encoding import Sample

EXACT = {"atol": 0, "rtol": 0}
CLOSE = {"atol": 2e-5, "rtol": 0}  # float32 rounding at logits of about 1.5

modes = pytest.mark.parametrize("mode", MODE)
newer_modes = pytest.mark.parametrize("mode", ["glm2", "glm3"])
# P-Tuning off, with projection, without
prefixes = pytest.mark.parametrize(
    "prefix",
    [{}, {"pre_seq_len": 3, "prefix_projection": True}, {"pre_seq_len": 3, "prefix_projection": False}],
    ids=["no_prefix", "projected", "unprojected"],
)
QUERIES = ["你好", "发动机水温高，怎么办？", "The water pump leaks, what now?"]
ANSWERS = ["先检查水泵。", "好", "Replace it"]


def samples(tokenizer):
    """(prompt ids, answer ids) of three different lengths."""
    return [
        (tokenizer.encode_prompt(query), tokenizer.encode_answer(answer) + [tokenizer.eos_token_id])
        for query, answer in zip(QUERIES, ANSWERS, strict=True)
    ]


def pad(rows, value, side):
    width = max(map(len, rows))
    filled = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([fill + row if side == "left" else row + fill for row, fill in zip(rows, filled, strict=True)])


def training_batch(tokenizer, side="right"):
    """input_ids, attention_mask and labels of `samples`."""
    rows = [prompt + answer for prompt, answer in samples(tokenizer)]
    labels = [[-100] * len(prompt) + answer for prompt, answer in samples(tokenizer)]
    return {
        "input_ids": pad(rows, tokenizer.pad_token_id, side),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, side),
        "labels": pad(labels, -100, side),
    }


def prompt_batch(tokenizer):
    rows = [prompt for prompt, _ in samples(tokenizer)]
    return {
        "input_ids": pad(rows, tokenizer.pad_token_id, "left"),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, "left"),
        "pad_token_id": tokenizer.pad_token_id,
    }


# ChatGLM2 and ChatGLM3 against transformers' GlmForCausalLM.

NATIVE_VARIANTS = {
    "official": {},
    "long_context": {"rope_ratio": 50},
    "all_heads": {"multi_query_attention": False},
    "no_qkv_bias": {"add_qkv_bias": False},
}


@newer_modes
@pytest.mark.parametrize("variant", NATIVE_VARIANTS)
def test_newer_models_equal_native_glm(mode, variant, tiny, tokenizers):
    tokenizer = tokenizers[mode]
    model = MODE[mode].model(MODE[mode].config.from_pretrained(tiny[mode], **NATIVE_VARIANTS[variant])).eval()
    enliven(model)
    native = native_model(model)
    model.double(), native.double()  # in float32 the kernels of different CPUs differ by as much as the bounds here

    batch = training_batch(tokenizer)
    mine, theirs = model(**batch), native(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(mine.logits[real], theirs.logits[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-6, rtol=0)
    mine.loss.backward()
    theirs.loss.backward()
    gradients = native_weights(model, {name: p.grad for name, p in model.named_parameters()})
    assert gradients.keys() == dict(native.named_parameters()).keys()
    for name, p in native.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")

    left = training_batch(tokenizer, "left")
    real = left["attention_mask"].bool()
    position_ids = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = native(**left, position_ids=position_ids)
        for positions in ({}, {"position_ids": position_ids}):
            mine = model(**left, **positions)
            torch.testing.assert_close(mine.logits[real], theirs.logits[real], atol=1e-5, rtol=0)
    prompts = prompt_batch(tokenizer)
    mine = model.generate(**prompts, do_sample=False, max_new_tokens=12)
    assert mine.equal(native.generate(**prompts, do_sample=False, max_new_tokens=12))


# ChatGLM-6B against a re-derivation.


def glm_positions(config, ids):
    """Position pairs of one row without padding, and the length of its context."""
    pairs = list(itertools.pairwise(ids))
    if (config.gmask_token_id, config.bos_token_id) in pairs:
        context = pairs.index((config.gmask_token_id, config.bos_token_id)) + 1
    else:
        context = ids.index(config.bos_token_id) if config.bos_token_id in ids else len(ids)
    with_gmask = config.gmask_token_id in ids
    positions = []
    for i in range(len(ids)):
        if i < context:
            positions.append((i, 0) if config.position_encoding_2d else (i,))
            continue
        mask = ids.index(config.gmask_token_id if with_gmask else config.mask_token_id)
        if config.position_encoding_2d:
            positions.append((mask, i - context + 1))
        else:
            positions.append((i if with_gmask else mask,))
    return positions, context


def turn(vector, positions):
    """Rotate one head's vector: a part for each position; in a part, element j pairs with element j + half."""
    parts = []
    for part, position in zip(vector.chunk(len(positions)), positions, strict=True):
        half = len(part) // 2
        turned = part.clone()
        for j in range(half):
            frequency = torch.tensor(1.0 / 10000 ** (2 * j / len(part))).half().double()
            cos, sin = torch.cos(position * frequency), torch.sin(position * frequency)
            turned[j] = part[j] * cos - part[j + half] * sin
            turned[j + half] = part[j + half] * cos + part[j] * sin
        parts.append(turned)
    return torch.cat(parts)


def glm_reference(config, weights, ids):
    """Logits [tokens, vocabulary] of one row without padding, in float64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    positions, context = glm_positions(config, ids)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    alpha = math.sqrt(2 * config.num_layers)
    x = weights["transformer.word_embeddings.weight"][ids]
    for n in range(config.num_layers):
        layer = f"transformer.layers.{n}"
        normed = norm(x, f"{layer}.input_layernorm")
        mixed = linear(normed, f"{layer}.attention.query_key_value")
        attended = torch.zeros_like(normed)
        for head in range(heads):
            q, k, v = mixed[:, 3 * head * width : 3 * (head + 1) * width].split(width, dim=1)
            q = torch.stack([turn(*pair) for pair in zip(q, positions, strict=True)])
            k = torch.stack([turn(*pair) for pair in zip(k, positions, strict=True)])
            for i in range(len(ids)):
                seen = max(context, i + 1)
                attention = torch.softmax(k[:seen] @ q[i] / math.sqrt(width), 0)
                attended[i, head * width : (head + 1) * width] = attention @ v[:seen]
        x = alpha * normed + linear(attended, f"{layer}.attention.dense")
        normed = norm(x, f"{layer}.post_attention_layernorm")
        inner = linear(normed, f"{layer}.mlp.dense_h_to_4h")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = alpha * normed + linear(inner, f"{layer}.mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("num_layers", [4, 2])
@pytest.mark.parametrize("two_axes", [True, False])
def test_glm_equals_rederivation(two_axes, num_layers, tiny, tokenizers):
    tok = tokenizers["glm"]
    config = MODE["glm"].config.from_pretrained(tiny["glm"], position_encoding_2d=two_axes, num_layers=num_layers)
    model = MODE["glm"].model(config).eval()
    enliven(model)
    mask, gmask, sop, eop = tok.convert_tokens_to_ids(["[MASK]", "[gMASK]", "<sop>", "<eop>"])
    a, b, c = (tok.encode_text(text) for text in ("发动机水温高", "你好，", "water pump"))
    rows = [
        a + [gmask, sop] + b + [eop],
        a + [mask] + b + [sop] + c + [eop],  # the answer belongs inside the context
        b + [mask] + c + [gmask, sop] + a,  # [gMASK] counts
        b + [sop] + a + [gmask, sop] + c,  # the boundary is the <sop> after [gMASK]
        c + a,  # all context, no <sop>
    ]
    weights = model.state_dict()
    expected = [glm_reference(config, weights, row) for row in rows]
    model = model.double()
    for side in ("left", "right"):
        ids = pad(rows, tok.pad_token_id, side)
        real = pad([[1] * len(row) for row in rows], 0, side)
        for given in (real, None):  # without a mask, padding on the left is known by its id
            with torch.no_grad():
                logits = model(ids, attention_mask=given).logits
            for row, keep, want in zip(logits, real.bool(), expected, strict=True):
                torch.testing.assert_close(row[keep], want, atol=2e-5, rtol=0)


# Padding and the key/value cache change nothing.


@modes
@prefixes
def test_rows_alone_equal_rows_in_a_batch(mode, prefix, load, tokenizers):
    model, tok = load(mode, **prefix), tokenizers[mode]
    rows = [prompt + answer for prompt, answer in samples(tok)]
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
        if prefix:
            assert (load(mode)(torch.tensor(rows[:1])).logits[0] - alone[0]).abs().max() > 0.1
        for side in ("left", "right"):
            batch = training_batch(tok, side)
            real = batch["attention_mask"].bool()
            calls = [batch]
            if side == "right" or mode == "glm":  # no mask needed
                calls.append({**batch, "attention_mask": None})
            for call in calls:
                logits = model(**call).logits
                for row, keep, want in zip(logits, real, alone, strict=True):
                    torch.testing.assert_close(row[keep], want, **CLOSE)


@modes
@prefixes
def test_cache_changes_no_generated_id(mode, prefix, load, tokenizers):
    model, tok = load(mode, **prefix), tokenizers[mode]
    batch = prompt_batch(tok)
    width = batch["input_ids"].shape[1]
    for options in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.9},
    ):
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            outputs.append(model.generate(**batch, max_new_tokens=10, use_cache=use_cache, **options))
        assert outputs[0].equal(outputs[1]), options
        assert len({tuple(row) for row in outputs[0][:, width:].tolist()}) == len(QUERIES)


@modes
@prefixes
def test_greedy_generation_is_the_argmax_of_whole_forwards(mode, prefix, load, tokenizers):
    model, tok = load(mode, **prefix), tokenizers[mode]
    out = model.generate(**prompt_batch(tok), do_sample=False, max_new_tokens=10)
    width = prompt_batch(tok)["input_ids"].shape[1]
    for (prompt, _), row in zip(samples(tok), out, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 10 and ids[-1] not in (model.config.eos_token_id,):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert row[width:].tolist()[: len(ids) - len(prompt)] == ids[len(prompt) :]
        # without a mask of its own generate finds the same
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10)
        assert alone[0].tolist() == ids


@newer_modes
@prefixes
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_in_pieces_equals_whole_forward(mode, prefix, attention, tiny, load, tokenizers):
    """Positions and mask go on from the cache without being told."""
    model = load(mode, **prefix)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    prompt, answer = samples(tokenizers[mode])[1]
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:8], cache=first.cache)
        third = model(ids[:, 8:9], cache=second.cache)
        rest = model(ids[:, 9:], cache=third.cache)
    pieces = torch.cat([part.logits for part in (first, second, third, rest)], dim=1)
    torch.testing.assert_close(pieces, whole, **CLOSE)


def test_glm_forward_with_cache_needs_positions(load, tokenizers):
    model = load("glm")
    ids = torch.tensor([samples(tokenizers["glm"])[0][0]])
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="position_ids"):
        model(ids[:, :1], cache=cache)


@modes
def test_text_iterator_streamer(mode, load, tokenizers):
    model, tok = load(mode), tokenizers[mode]
    ids = torch.tensor([samples(tok)[1][0]])
    want = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    streamer = TextIteratorStreamer(tok, skip_prompt=True, timeout=300)
    thread = threading.Thread(
        target=model.generate, args=(ids,), kwargs={"do_sample": False, "max_new_tokens": 12, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text and text == tok.decode(want)


# Chat.


def history_of(mode, pairs):
    if mode != "glm3":
        return pairs
    messages = []
    for question, answer in pairs:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "metadata": "", "content": answer})
    return messages


@modes
@prefixes
@pytest.mark.parametrize("do_sample", [False, True])
def test_stream_chat_ends_as_chat(mode, prefix, do_sample, load, tokenizers):
    model, tok = load(mode, **prefix), tokenizers[mode]
    history = history_of(mode, [("你好", "你好！")])
    before = json.dumps(history)
    limit = len(tok.encode_prompt(QUERIES[1], history)) + 15
    torch.manual_seed(3)
    want = model.chat(tok, QUERIES[1], history=history, max_length=limit, do_sample=do_sample)
    torch.manual_seed(3)
    parts = list(model.stream_chat(tok, QUERIES[1], history=history, max_length=limit, do_sample=do_sample))
    assert parts[-1] == want
    assert len(parts) > 3 and len({str(answer) for answer, _ in parts}) > 3
    assert json.dumps(history) == before
    turns = len(history_of(mode, [(0, 0)]))
    assert want[1][: len(history)] == history and len(want[1]) >= len(history) + turns


@newer_modes
@prefixes
def test_stream_chat_reuses_the_cache(mode, prefix, load, tokenizers):
    model, tok = load(mode, **prefix), tokenizers[mode]
    lengths = []
    model.transformer.embedding.word_embeddings.register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape[1])
    )
    cache, history = None, []
    for turn_number, query in enumerate(QUERIES):
        prompt = tok.encode_prompt(query, history)
        options = {"history": history, "max_length": len(prompt) + 8, "do_sample": False}
        *_, want = model.stream_chat(tok, query, **options)
        lengths.clear()
        *_, (answer, new_history, cache) = model.stream_chat(
            tok, query, past_key_values=cache, return_past_key_values=True, **options
        )
        assert (answer, new_history) == want
        assert lengths[1:] == [1] * (len(lengths) - 1)
        if turn_number:
            assert lengths[0] < len(prompt) - 5  # only what is new
        *_, again = model.stream_chat(tok, query, past_key_values=cache, return_past_key_values=True, **options)
        assert again[:2] == want  # the same prompt: its last token is computed anew
        history = new_history


@newer_modes
def test_stream_chat_refuses_a_foreign_cache(mode, load, tokenizers):
    model, tok = load(mode), tokenizers[mode]
    foreign = model(torch.tensor([[5, 6, 7]]), use_cache=True).cache
    with pytest.raises(ValueError, match="past_key_values"):
        next(model.stream_chat(tok, "你好", past_key_values=foreign))


@pytest.mark.parametrize("key", ["past_key_values", "return_past_key_values"])
def test_stream_chat_of_glm_refuses_any_cache(key, load, tokenizers):
    """Its context is seen in both directions, so the keys and values of an earlier turn are wrong in a longer one."""
    with pytest.raises(ValueError, match=key):
        load("glm").stream_chat(tokenizers["glm"], "你好", **{key: True})


@modes
def test_chat_takes_arguments_in_the_official_order(mode, load, tokenizers):
    model, role = load(mode), ["user"] if mode == "glm3" else []
    cache = [] if mode == "glm" else [None]
    for chat, order in ((model.chat, role), (lambda *args: next(model.stream_chat(*args)), role + cache)):
        with pytest.raises(ValueError, match="max_length is 2: no room"):
            chat(tokenizers[mode], "你好", [], *order, 2)


class Endless(LogitsProcessor):
    """Never lets an answer end, and counts its tokens; or fails after `limit` of them."""

    def __init__(self, stop_ids, limit=None):
        self.stop_ids, self.limit, self.calls = stop_ids, limit, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == self.limit:
            raise ArithmeticError("from inside generation")
        scores[:, self.stop_ids] = -torch.inf
        return scores


@modes
def test_stream_chat_leaves_no_thread(mode, load, tokenizers):
    model, tok = load(mode), tokenizers[mode]
    before = set(threading.enumerate())
    endless = Endless(tok.stop_token_ids)
    stream = model.stream_chat(tok, "你好", do_sample=False, max_length=2000, logits_processor=[endless])
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    assert set(threading.enumerate()) <= before
    assert endless.calls < 500  # stopped, not waited for


@modes
def test_errors_inside_generation_reach_the_caller(mode, load, tokenizers):
    model, tok = load(mode), tokenizers[mode]
    before = set(threading.enumerate())
    for chat in (model.chat, lambda *args, **kwargs: list(model.stream_chat(*args, **kwargs))):
        with pytest.raises(ArithmeticError, match="from inside generation"):
            chat(tok, "你好", max_length=200, do_sample=False, logits_processor=[Endless(tok.stop_token_ids, limit=3)])
    assert set(threading.enumerate()) <= before


@modes
def test_prompt_without_room_for_an_answer(mode, load, tokenizers):
    tok = tokenizers[mode]
    length = len(tok.encode_prompt("你好"))
    with pytest.raises(ValueError, match=f"{length} tokens"):
        load(mode).chat(tok, "你好", max_length=length)


# Training.


@modes
@prefixes
def test_gradient_checkpointing_changes_no_gradient(mode, prefix, load, tokenizers):
    batch = training_batch(tokenizers[mode])
    gradients = []
    for checkpointing in (False, True):
        model = load(mode, **prefix, prefix_dropout=0.0).train()
        if prefix:  # only the prefix learns
            model.requires_grad_(False)
            model.transformer.prefix_encoder.requires_grad_(True)
        calls = []
        for name, module in model.named_modules():
            if name.endswith("0.input_layernorm"):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        assert len(calls) == 1 + checkpointing  # once more in the backward pass
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)
        assert gradient.abs().max() > 0, name


@modes
def test_prefix_dropout_acts_in_training_only(mode, load, tokenizers):
    model = load(mode, pre_seq_len=3, prefix_dropout=0.5)
    assert model.transformer.prefix_key_values(2).equal(model.transformer.prefix_key_values(2))
    model.train()
    dropped = (model.transformer.prefix_key_values(2) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    first, second = model.transformer.prefix_key_values(2).unbind(2)
    assert not first.equal(second)


@modes
@prefixes
def test_eager_attention_equals_sdpa(mode, prefix, load, tiny, tokenizers):
    sdpa = load(mode, **prefix)
    config = MODE[mode].config.from_pretrained(tiny[mode], **prefix)
    eager = MODE[mode].model.from_pretrained(tiny[mode], config=config, attn_implementation="eager").eval()
    eager.load_state_dict(sdpa.state_dict())
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    with torch.no_grad():
        for side in ("left", "right"):
            batch = training_batch(tokenizers[mode], side)
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(eager(**batch).logits[real], sdpa(**batch).logits[real], **CLOSE)
        ids = batch["input_ids"][:1, :8]
        torch.testing.assert_close(eager(ids).logits, sdpa(ids).logits, **CLOSE)
    prompts = prompt_batch(tokenizers[mode])
    assert eager.generate(**prompts, do_sample=False, max_new_tokens=8).equal(
        sdpa.generate(**prompts, do_sample=False, max_new_tokens=8)
    )


@modes
@prefixes
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16(mode, prefix, attention, load, tokenizers):
    model = load(mode, **prefix)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    batch = training_batch(tokenizers[mode], "left")
    with torch.no_grad():
        want = model(**batch).loss
        output = model.bfloat16()(**batch)
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()
    assert output.loss.dtype == torch.float32  # not rounded
    torch.testing.assert_close(output.loss, want, atol=0, rtol=0.05)


@modes
def test_loss_is_the_mean_over_labelled_positions(mode, load, tokenizers):
    model, batch = load(mode), training_batch(tokenizers[mode])
    with torch.no_grad():
        output = model(**batch)
        total, count = 0.0, 0
        for row, labels in zip(output.logits.double(), batch["labels"].tolist(), strict=True):
            for position, label in enumerate(labels[1:]):  # position t says what comes at t + 1
                if label != -100:
                    total -= F.log_softmax(row[position], dim=0)[label].item()
                    count += 1
        assert output.loss.item() == pytest.approx(total / count, abs=1e-5)
        assert model(**batch, num_items_in_batch=7).loss.item() == pytest.approx(total / 7, rel=1e-5)
        model.train()
        training = model(**batch)
        assert training.logits is None  # only the answer's positions see the output layer
        assert training.loss.item() == pytest.approx(output.loss.item(), abs=1e-6)
        assert model(batch["input_ids"]).logits.shape == output.logits.shape


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, batch, other_model, other_batch):
    (loss, gradients), (other_loss, others) = (
        loss_and_gradients(model, batch),
        loss_and_gradients(other_model, other_batch),
    )
    torch.testing.assert_close(loss, other_loss, atol=0, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-5 * others[name].abs().max().item(), rtol=0)


def packed_batch(tokenizer, count=3):
    rows = [
        Sample(prompt + answer, ((len(prompt), len(prompt + answer)),), False, False)
        for prompt, answer in samples(tokenizer)[:count]
    ]
    return collate(rows, tokenizer.context_length, MicroBatch([], 5.0))


@modes
@prefixes
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_samples_end_to_end_train_as_padded_ones(mode, prefix, attention, load, tokenizers):
    model = load(mode, **prefix, prefix_dropout=0.0).train()
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    padded = {**training_batch(tokenizers[mode]), "num_items_in_batch": 5.0}
    assert_same_training(model, packed_batch(tokenizers[mode]), model, padded)


METHODS = {
    "all": lambda model: model,
    "top layer": lambda model: train_only(model, f"layers.{model.config.num_layers - 1}."),
    "prefix": lambda model: train_only(model, "prefix_encoder"),
    "lora": lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["query_key_value", "dense_4h_to_h"])),
}


def train_only(model, part):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


@modes
@pytest.mark.parametrize("method", METHODS)
def test_operations_of_a_step_are_those_counted(method, mode, load, tokenizers):
    prefix = {"pre_seq_len": 3, "prefix_projection": False, "prefix_dropout": 0.0} if method == "prefix" else {}
    model = METHODS[method](load(mode, **prefix).train())
    batch, flops = packed_batch(tokenizers[mode]), needed_flops(model)
    adds = {torch.ops.aten.addmm_: lambda total, one, other, **_: 2 * one[0] * one[1] * other[1]}  # torch forgot it
    with FlopCounterMode(display=False, custom_mapping=adds) as counter:
        model(**batch).loss.backward()
    # attention on a CPU is not counted: only products with weights are
    expected = flops.token * batch["input_ids"].numel() + flops.answer_token * len(batch["answer_positions"])
    assert counter.get_total_flops() == expected


@modes
@prefixes
def test_segments_may_come_as_a_tensor(mode, prefix, load, tokenizers):
    """So a pipeline stage gets them from another."""
    model, batch = load(mode, **prefix, prefix_dropout=0.0).train(), packed_batch(tokenizers[mode])
    segments = attention.segments_tensor(batch["segments"])
    assert attention.as_segments(segments) == attention.as_segments(batch["segments"])
    loss, gradients = loss_and_gradients(model, batch)
    other, others = loss_and_gradients(model, {**batch, "segments": segments})
    assert torch.equal(loss, other) and gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


@modes
def test_a_layer_gets_its_part_of_the_inputs(mode, load, tokenizers):
    """Its own prefix; and only the last one selects tokens."""
    model = load(mode, pre_seq_len=3, prefix_projection=False, prefix_dropout=0.0).train()
    batch, prefix, seen = packed_batch(tokenizers[mode]), model.transformer.prefix_key_values(len(ANSWERS)), []
    for layer in model.transformer.blocks:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(**batch)
    assert len(seen) == model.config.num_layers
    assert all(inputs.prefix.equal(prefix[i]) for i, inputs in enumerate(seen))
    keep = batch["answer_positions"] - 1
    assert [inputs.keep_positions is not None for inputs in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1].keep_positions.equal(keep) and seen[0].mask is None


@modes
def test_biases_and_norms_have_no_weight_decay(mode, load):
    model = load(mode, pre_seq_len=3)
    without = {name for name, _ in model.named_parameters() if not model.has_weight_decay(name)}
    expected = set()
    for name, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__
        own = [key for key, _ in module.named_parameters(recurse=False)]
        expected |= {f"{name}.{key}" for key in own if is_norm or key == "bias"}
    assert without == expected


@modes
def test_other_samples_of_a_row_are_not_seen(mode, load, tokenizers):
    model, batch = load(mode).train(), packed_batch(tokenizers[mode])
    first = batch["segments"][0][0]
    hidden = model.transformer(batch["input_ids"], segments=batch["segments"]).last_hidden_state[:, :first]
    batch["input_ids"][:, first:] = 7
    others = model.transformer(batch["input_ids"], segments=batch["segments"]).last_hidden_state
    torch.testing.assert_close(others[:, :first], hidden, **EXACT)


@modes
@prefixes
@pytest.mark.parametrize(
    "options", [{"tiled_mlp": True}, {"offload_inputs": True}, {"tiled_mlp": True, "offload_inputs": True}]
)
@pytest.mark.parametrize("keeps", [False, True])
def test_ways_to_save_memory_change_nothing(mode, prefix, options, keeps, load, tokenizers, monkeypatch):
    monkeypatch.setattr(ops, "TILE", 7)
    monkeypatch.setattr(ops, "CHUNK", 3 * 1000)  # a few rows of logits
    batch = packed_batch(tokenizers[mode])
    plain, saving = (load(mode, **prefix, prefix_dropout=0.0).train() for _ in range(2))
    saving.save_memory(**options)
    saving.gradient_checkpointing_enable(
        {"use_reentrant": False, **({"context_fn": attention.keep_attention} if keeps else {})}
    )
    moved = []

    def offload_saved_tensor(x):  # else a CPU would have nothing to do
        hooks = ops.offload_saved_tensor(x)
        pack = hooks.pack_hook
        hooks.pack_hook = lambda kept: moved.append(packed := pack(kept)) or packed
        return hooks

    monkeypatch.setattr(modeling, "offload_checkpoint_input", offload_saved_tensor)
    assert_same_training(saving, batch, plain, batch)
    copies = [copy for copy in moved if isinstance(copy, tuple)]
    # one a layer whose input anything is learnt from
    assert len(copies) == (plain.config.num_layers if options.get("offload_inputs") else 0)


class CountAttention(TorchDispatchMode):
    """Counts the calls of torch's fused kernels."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in attention.FUSED
        return func(*args, **(kwargs or {}))


@modes
@prefixes
def test_kept_attention_is_not_computed_again(mode, prefix, load, tokenizers):
    calls = []
    for more in ({}, {"context_fn": attention.keep_attention}):
        model = load(mode, **prefix).train()
        model.gradient_checkpointing_enable({"use_reentrant": False, **more})
        with CountAttention() as count:
            loss_and_gradients(model, packed_batch(tokenizers[mode]))
        calls.append(count.calls)
    assert calls[0] == 2 * calls[1] > 0


def test_only_a_copy_of_the_kept_input_moves():
    """The gradient must not make the journey: on a GPU it would wait for the copy, twice a layer."""
    x = torch.randn(2, 3, requires_grad=True)
    with ops.offload_saved_tensor(x):
        y = checkpoint(lambda t: t.sin(), x, use_reentrant=False)
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert names == {"SinBackward0", "AccumulateGrad"}


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", torch.float32, (9, 0), False),
        ("cuda", torch.float16, (7, 5), False),
        ("cpu", torch.float32, None, True),
    ],
)
def test_which_gpus_take_grouped_keys(monkeypatch, device, dtype, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.has_grouped_kernel(torch.device(device), dtype) is expected


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
@prefixes
def test_without_a_kernel_for_groups_keys_are_repeated(mode, prefix, load, tokenizers, monkeypatch):
    batch = packed_batch(tokenizers[mode])
    grouped, repeated = (load(mode, **prefix, prefix_dropout=0.0).train() for _ in range(2))
    want = loss_and_gradients(grouped, batch)
    heads = []
    plain = F.scaled_dot_product_attention

    def watched(q, k, v, *args, **kwargs):
        heads.append((q.shape[1], k.shape[1], kwargs.get("enable_gqa", False)))
        return plain(q, k, v, *args, **kwargs)

    monkeypatch.setattr(attention, "has_grouped_kernel", lambda device, dtype: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    loss, gradients = loss_and_gradients(repeated, batch)
    assert set(heads) == {(4, 4, False)}
    torch.testing.assert_close(loss, want[0], **CLOSE)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want[1][name], **CLOSE)


@modes
def test_padded_batches_are_generated_without_flash_attention(mode, load, tokenizers):
    """flash-attn takes no mask: with --attn_implementation flash_attention_2 validation would end in a crash."""
    model, tokenizer = load(mode), tokenizers[mode]
    prompts = [tokenizer.encode_prompt(query) for query in QUERIES]
    want = generate_ids(model, tokenizer, prompts, [6, 6, 6])
    model.config._attn_implementation = "flash_attention_2"
    assert generate_ids(model, tokenizer, prompts, [6, 6, 6]) == want
    assert model.config._attn_implementation == "flash_attention_2"  # for the next training step


@modes
def test_cudnn_attention_is_off(mode, tiny):
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_base(mode, tiny[mode], torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_norms_round_once():
    """In bfloat16, against float64: the error is that of one rounding, about half of what two make."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), 1 + 0.25 * torch.randn(512)
    x, weight = x.bfloat16(), weight.bfloat16()
    exact = F.rms_norm(x.double(), (512,), weight.double(), 1e-5)
    error = (ops.rms_norm(x, weight, 1e-5).double() - exact).norm() / exact.norm()
    assert error < 1.02 * (exact.bfloat16().double() - exact).norm() / exact.norm()


@modes
@pytest.mark.parametrize("trained", ["head", "body", "all"])
def test_loss_in_chunks(mode, trained, load, tokenizers, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK", 3 * 1000)
    model, batch = load(mode, tie_word_embeddings=False).train(), packed_batch(tokenizers[mode])
    head = model.get_output_embeddings()
    model.requires_grad_(trained != "head")
    head.requires_grad_(trained != "body")
    model.set_output_embeddings(plain := torch.nn.Linear(head.in_features, head.out_features, bias=False))
    plain.weight = head.weight
    want = loss_and_gradients(model, batch)
    model.set_output_embeddings(head)
    loss, gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(loss, want[0], atol=0, rtol=1e-6)
    assert gradients.keys() == want[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want[1][name], atol=1e-5 * want[1][name].abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hand_written_gradients(dtype):
    def residual(x):
        inner, skip = ops.fork(x, 3.0)
        return ops.join(inner.sin(), skip, 3.0)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(8, dtype=dtype, requires_grad=True)
    for mine, plain, inputs in (
        (lambda x, w: ops.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (8,), w, 1e-5), (x, weight)),
        (ops.swiglu, lambda x: F.silu(x[..., :4]) * x[..., 4:], (x,)),
        (residual, lambda x: x.sin() + 3 * x, (x,)),
        (lambda x, w: ops.choose(w > 0, x, x * w), lambda x, w: torch.where(w > 0, x, x * w), (x, weight)),
    ):
        results = []
        for function in (mine, plain):
            out = function(*(value * 1 for value in inputs))  # tensors of its own, which it may write over
            results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
        for one, other in zip(*results, strict=True):
            tolerance = 1e-5 if dtype == torch.float64 else 0.05  # (the norm itself is in float32)
            torch.testing.assert_close(one, other, atol=tolerance * other.abs().max().item(), rtol=0)


def test_a_second_backward_pass_over_what_is_written_over_is_refused():
    before, after = torch.nn.Linear(4, 8), torch.nn.Linear(4, 4)
    out = ops.linear_of_recomputed(ops.swiglu, after, before(torch.randn(3, 4))).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@modes
def test_no_labels_at_all_give_zero(mode, load, tokenizers):
    model, batch = load(mode).train(), training_batch(tokenizers[mode])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch).loss
    assert loss.item() == 0
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or not p.grad.any(), name


@modes
def test_logits_to_keep(mode, load, tokenizers):
    model, batch = load(mode), training_batch(tokenizers[mode])
    with torch.no_grad():
        whole = model(batch["input_ids"]).logits
        torch.testing.assert_close(model(batch["input_ids"], logits_to_keep=2).logits, whole[:, -2:], **CLOSE)


# Loading.


def copy_without_weights(folder, target):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(target)


def change_config(folder, drop=(), **changes):
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = {key: value for key, value in json.load(file).items() if key not in drop} | changes
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)


def assert_same_weights(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert weight.dtype == theirs[name].dtype and weight.equal(theirs[name]), name


@modes
@pytest.mark.parametrize("with_inv_freq", [True, False])
@pytest.mark.parametrize("layout", ["single", "shards", "bin"])
def test_layouts_of_weights(mode, layout, with_inv_freq, tiny, load, tmp_path):
    model = load(mode)
    folder = copy_without_weights(tiny[mode], tmp_path / "copy")
    if not with_inv_freq:
        model.official_buffers = dict
    if layout == "bin":
        tensors = {**model.state_dict(), **model.official_buffers()}
        halves = {i: dict(list(tensors.items())[i::2]) for i in range(2)}
        files = {i: f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)}
        for i, half in halves.items():
            torch.save(half, os.path.join(folder, files[i]))
        index = {"metadata": {}, "weight_map": {name: files[i] for i, half in halves.items() for name in half}}
        with open(os.path.join(folder, "pytorch_model.bin.index.json"), "w") as file:
            json.dump(index, file)
    else:
        write_model(model, folder, **({"max_shard_bytes": 100_000} if layout == "shards" else {}))
        names = sorted(name for name in os.listdir(folder) if "safetensors" in name)
        assert names == ["model.safetensors"] if layout == "single" else len(names) > 3
    if layout == "single":
        names = load_file(os.path.join(folder, "model.safetensors"))
        assert any(name.endswith("inv_freq") for name in names) == with_inv_freq
    assert_same_weights(MODE[mode].model.from_pretrained(folder), model)


@modes
def test_float16_files_into_float32(mode, tiny, load, tmp_path):
    model = load(mode).half()
    folder = copy_without_weights(tiny[mode], tmp_path / "copy")
    write_model(model, folder)
    change_config(folder, torch_dtype="float16")
    assert_same_weights(MODE[mode].model.from_pretrained(folder, dtype=torch.float32), model.float())


@modes
@pytest.mark.parametrize("kind", ["missing", "unknown", "misshapen"])
def test_weights_that_do_not_fit(mode, kind, tiny, tmp_path):
    folder = copy_without_weights(tiny[mode], tmp_path / "copy")
    weights = load_file(os.path.join(tiny[mode], "model.safetensors"))
    name = next(n for n in weights if ".1." in n and n.endswith("mlp.dense_4h_to_h.weight"))
    if kind == "missing":
        del weights[name]
    elif kind == "unknown":
        name = name.replace(".1.", ".9.")
        weights[name] = torch.zeros(3)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        MODE[mode].model.from_pretrained(folder)
    text = "of another shape" if kind == "misshapen" else kind
    assert folder in str(error.value) and name in str(error.value) and text in str(error.value)


@modes
def test_a_trained_prefix_is_never_lost(mode, load, tiny, tmp_path):
    load(mode, pre_seq_len=3).save_pretrained(tmp_path)
    for changed in ({"pre_seq_len": None}, {"pre_seq_len": 4}):
        config = MODE[mode].config.from_pretrained(tmp_path, **changed)
        with pytest.raises(CheckpointError, match="prefix_encoder"):
            MODE[mode].model.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize(("mode", "wrong"), [(mode, wrong) for mode in MODE for wrong in MODE if wrong != mode])
def test_wrong_mode_is_told_the_right_one(mode, wrong, tiny):
    for load_it in (MODE[wrong].model.from_pretrained, MODE[wrong].tokenizer.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            load_it(tiny[mode])
        assert tiny[mode] in str(error.value)
        fits = str(error.value).split("files fit")[1]
        assert f"--mode {mode} " in fits and f"--mode {wrong} " not in fits


def test_every_family_has_its_signs():
    """In the same order, and no two families have the same."""
    assert list(FAMILIES) == list(MODE)
    assert len(set(FAMILIES.values())) == len(FAMILIES)
    for mode, signs in FAMILIES.items():
        family = MODE[mode]
        assert (family.config.title, family.tokenizer.vocab_files_names["vocab_file"]) == (
            signs.title,
            signs.vocabulary,
        )
        assert family.model.mode == family.tokenizer.mode == mode
        assert signs.config_keys <= family.config.own_keys().keys()


def without_names(folder):
    """Drop what the json files say about where the folder came from."""
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        path = folder / name
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            del content[key]
            path.write_text(json.dumps(content), encoding="utf-8")


@newer_modes
def test_official_code_tells_the_newer_families_apart(mode, tiny, tmp_path):
    """ChatGLM2 and ChatGLM3 folders without names hold the same: either mode may be right, unless code lies there."""
    folder = shutil.copytree(tiny[mode], tmp_path / "copy")
    without_names(folder)
    for either in ("glm2", "glm3"):
        MODE[either].model.from_pretrained(folder)
    sign = {"glm2": "def build_prompt(self, query, history=None):", "glm3": "def build_single_message(self, role):"}[
        mode
    ]
    (folder / "tokenization_chatglm.py").write_text(f"class ChatGLMTokenizer:\n    {sign}\n        pass\n")
    MODE[mode].model.from_pretrained(folder)
    wrong = {"glm2": "glm3", "glm3": "glm2"}[mode]
    for load_it in (MODE[wrong].model.from_pretrained, MODE[wrong].tokenizer.from_pretrained):
        with pytest.raises(CheckpointError, match=f"--mode {mode} "):
            load_it(folder)


@pytest.mark.parametrize(("mode", "wrong"), [("glm", "glm2"), ("glm", "glm3"), ("glm2", "glm"), ("glm3", "glm")])
def test_config_keys_alone_tell_the_first_family(mode, wrong, tiny, tmp_path):
    folder = shutil.copytree(tiny[mode], tmp_path / "copy", ignore=shutil.ignore_patterns("*.model", "tokenizer*"))
    without_names(folder)
    MODE[mode].model.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=f"files fit .*--mode {mode} "):
        MODE[wrong].model.from_pretrained(folder)


@modes
def test_missing_folder_and_missing_files(mode, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        MODE[mode].model.from_pretrained(tmp_path / "nothing")
    folder = copy_without_weights(tiny[mode], tmp_path / "copy")
    os.remove(os.path.join(folder, "config.json"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MODE[mode].model.from_pretrained(folder)
    os.remove(os.path.join(folder, MODE[mode].tokenizer.vocab_files_names["vocab_file"]))
    with pytest.raises(CheckpointError, match="model: not a complete"):
        MODE[mode].tokenizer.from_pretrained(folder)


@modes
def test_python_files_of_a_checkpoint_are_never_run(mode, tiny, tmp_path):
    folder = shutil.copytree(tiny[mode], tmp_path / "copy")
    marker = tmp_path / "was-here"
    for name in ("configuration", "tokenization", "modeling"):
        (folder / f"{name}_chatglm.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_chatglm.ChatGLMConfig"
    MODE[mode].config.from_pretrained(folder)
    model, tok = MODE[mode].model.from_pretrained(folder), MODE[mode].tokenizer.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    tok.save_pretrained(tmp_path / "saved")
    assert not marker.exists()


@modes
def test_quantised_checkpoints_are_refused(mode, tiny, tmp_path):
    folder = shutil.copytree(tiny[mode], tmp_path / "copy")
    change_config(folder, quantization_bit=8)
    with pytest.raises(CheckpointError, match="8 bits"):
        MODE[mode].model.from_pretrained(folder)


@newer_modes
@pytest.mark.parametrize(
    "flag",
    [
        {"rmsnorm": False},
        {"post_layer_norm": False},
        {"apply_residual_connection_post_layernorm": True},
        {"add_bias_linear": True},
        {"original_rope": False},
        {"hidden_dropout": 0.1},
        {"attention_dropout": 0.1},
        {"fp32_residual_connection": True},
        {"tie_word_embeddings": True},
    ],
    ids=lambda flag: next(iter(flag)),
)
def test_configs_of_other_networks_are_refused(mode, flag, tiny, tmp_path):
    folder = shutil.copytree(tiny[mode], tmp_path / "copy")
    change_config(folder, **flag)
    with pytest.raises(CheckpointError, match=next(iter(flag))):
        MODE[mode].model.from_pretrained(folder)


OFFICIAL_DEFAULTS = {
    "glm": {
        "vocab_size": 130528,
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "inner_hidden_size": 16384,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 2048,
        "position_encoding_2d": True,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "pad_token_id": 3,
        "tie_word_embeddings": True,
        "use_cache": True,
    },
    "glm2": {
        "padded_vocab_size": 65024,
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "ffn_hidden_size": 13696,
        "layernorm_epsilon": 1e-5,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "original_rope": True,
        "rope_ratio": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
}
OFFICIAL_DEFAULTS["glm3"] = OFFICIAL_DEFAULTS["glm2"]


@modes
def test_missing_config_keys_mean_the_official_values(mode, tiny, load, tokenizers, tmp_path):
    config = MODE[mode].config()
    assert {key: getattr(config, key) for key in OFFICIAL_DEFAULTS[mode]} == OFFICIAL_DEFAULTS[mode]
    folder = shutil.copytree(tiny[mode], tmp_path / "copy")
    stated = json.loads((folder / "config.json").read_text())
    silent = [key for key, value in OFFICIAL_DEFAULTS[mode].items() if stated.get(key, value) == value]
    assert "use_cache" in silent and len(silent) > 3
    change_config(folder, drop=[*silent, "rope_ratio", "original_rope"])
    model, batch = MODE[mode].model.from_pretrained(folder).eval(), training_batch(tokenizers[mode])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, load(mode)(**batch).logits, **EXACT)


def test_glm_with_image_tokens_in_front(tiny, load, tokenizers, tmp_path):
    """The oldest checkpoints: every id is higher by the number of image tokens, and nothing else differs."""
    shift = 20
    model = load("glm")
    folder = copy_without_weights(tiny["glm"], tmp_path / "copy")
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(settings | {"num_image_tokens": shift}, file)
    names = [f"{name}_token_id" for name in ("bos", "eos", "mask", "gmask", "pad")]
    moved = {name: getattr(model.config, name) + shift for name in names}
    change_config(folder, vocab_size=model.config.vocab_size + shift, **moved)
    weights = load_file(os.path.join(tiny["glm"], "model.safetensors"))
    images = 0.01 * torch.ones(shift, model.config.hidden_size)
    rows = torch.cat((images, weights["transformer.word_embeddings.weight"]))
    weights |= {"transformer.word_embeddings.weight": rows, "lm_head.weight": rows.clone()}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})

    old = MODE["glm"].model.from_pretrained(folder).eval()
    tok, old_tok = tokenizers["glm"], MODE["glm"].tokenizer.from_pretrained(folder)
    batch, old_batch = training_batch(tok, "left"), training_batch(old_tok, "left")
    assert old_batch["input_ids"].equal(batch["input_ids"] + shift)
    with torch.no_grad():
        output, old_output = model(**batch), old(**old_batch)
    torch.testing.assert_close(old_output.logits[..., shift:], output.logits, **CLOSE)
    out = model.generate(**prompt_batch(tok), do_sample=False, max_new_tokens=8)
    old_out = old.generate(**prompt_batch(old_tok), do_sample=False, max_new_tokens=8)
    assert [old_tok.decode(row) for row in old_out] == [tok.decode(row) for row in out]


# Initialisation.


def assert_initialised(named_parameters):
    """Of a prefix encoder as torch does it and the official models did, else initializer_range; no bias anywhere."""
    for name, p in named_parameters:
        assert p.isfinite().all(), name
        if "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
            continue
        if name.endswith("bias"):
            assert (p == 0).all(), name
            continue
        std = 0.02
        if "prefix_encoder" in name:
            std = 1 if "embedding" in name else 1 / math.sqrt(3 * p.shape[1])
        assert p.std().item() == pytest.approx(std, rel=0.25) and abs(p.mean()) < std / 3, name


@modes
@prefixes
def test_model_from_a_config(mode, prefix, tiny):
    torch.manual_seed(0)
    model = MODE[mode].model(MODE[mode].config.from_pretrained(tiny[mode], **prefix))
    assert_initialised(model.named_parameters())
    assert model(torch.tensor([[5, 6, 7, 8]])).logits.isfinite().all()


@modes
@pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("projection", [True, False])
def test_new_prefix_on_a_base_checkpoint(mode, projection, how, tiny, load):
    torch.manual_seed(0)
    config = MODE[mode].config.from_pretrained(tiny[mode], pre_seq_len=8, prefix_projection=projection)
    model = MODE[mode].model.from_pretrained(tiny[mode], config=config, **how)
    parameters = [pair for pair in model.named_parameters() if "prefix_encoder" in pair[0]]
    assert len(parameters) == (5 if projection else 1)
    assert_initialised(parameters)
    if "dtype" not in how:
        base = load(mode).state_dict()
        for name, weight in model.state_dict().items():
            assert "prefix_encoder" in name or weight.equal(base[name]), name


# Saving.


@modes
@prefixes
def test_save_and_load(mode, prefix, load, tiny, tokenizers, tmp_path):
    model, tok = load(mode, **prefix), tokenizers[mode]
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again = MODE[mode].model.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    own = json.loads((tmp_path / "config.json").read_text())
    with open(os.path.join(tiny[mode], "config.json"), encoding="utf-8") as file:
        stated = json.load(file) | prefix
    for key in MODE[mode].config.__annotations__.keys() & stated.keys() | prefix.keys():
        assert own[key] == stated[key] == getattr(again.config, key), key
    tok_again = MODE[mode].tokenizer.from_pretrained(tmp_path)
    assert tok_again.get_vocab() == tok.get_vocab() and len(tok_again) == len(tok)
    for text in [*QUERIES, "a  b\n\t c", "<|user|><sop>[gMASK]</s>"]:
        assert tok_again.encode_prompt(text) == tok.encode_prompt(text)
        assert tok_again(text)["input_ids"] == tok(text)["input_ids"]
    assert (tok_again.pad_token_id, tok_again.eos_token_id) == (tok.pad_token_id, tok.eos_token_id)
    out = model.generate(**prompt_batch(tok), do_sample=False, max_new_tokens=5)
    assert again.eval().generate(**prompt_batch(tok_again), do_sample=False, max_new_tokens=5).equal(out)


def test_glm_ties_its_output_layer_unless_told_otherwise(tiny, load, tmp_path):
    model = load("glm")
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    folder = shutil.copytree(tiny["glm"], tmp_path / "copy")
    change_config(folder, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    untied = MODE["glm"].model.from_pretrained(folder)
    assert untied.lm_head.weight.equal(model.lm_head.weight + 1)
    assert untied.transformer.word_embeddings.weight.equal(model.lm_head.weight)
    untied.save_pretrained(tmp_path / "saved")
    again = MODE["glm"].model.from_pretrained(tmp_path / "saved")
    assert_same_weights(again, untied)
    assert again.lm_head.weight is not again.transformer.word_embeddings.weight


@newer_modes
def test_newer_models_never_tie(mode, load):
    model = load(mode)
    assert not model.transformer.output_layer.weight.equal(model.transformer.embedding.word_embeddings.weight)
