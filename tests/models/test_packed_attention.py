"""One call of attention for a whole row of samples, as on a GPU, against one call for each sample.

The kernel runs on a GPU only. In its place stands a plain loop in float64, with the same arguments.
"""

from types import SimpleNamespace

import pytest
import torch
from test_models import loss_and_gradients, modes, packed_batch, prefixes

from glm_models import attention, modeling
from glm_models.attention import LayerInputs, Segment, pack_row, why_one_by_one


def plain_varlen(query, key, value, starts, key_starts, longest, longest_keys, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn computes: a window is aligned at the last query and the last key."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert type(longest) is int and type(longest_keys) is int
    lengths, key_lengths = starts.diff().tolist(), key_starts.diff().tolist()
    assert (sum(lengths), sum(key_lengths)) == (len(query), len(key))
    assert (max(lengths), max(key_lengths)) == (longest, longest_keys)
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa is (groups > 1)
    before, after = window_size
    assert before == -1
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths), strict=True):
        k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
        last = torch.arange(len(q))[:, None] + len(k) - len(q)  # of the keys before a query, and itself
        hidden = torch.arange(len(k)) > last + after if after >= 0 else torch.zeros(len(q), len(k), dtype=torch.bool)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype))
    return torch.cat(outputs)


@pytest.fixture
def calls(monkeypatch):
    """Takes the way of a GPU; the windows of the calls so far."""
    windows = []

    def watched(*args, **kwargs):
        windows.append(kwargs["window_size"])
        return plain_varlen(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", watched)
    monkeypatch.setattr(modeling, "why_one_by_one", lambda *_: None)
    monkeypatch.setattr(attention, "PIECE", 4)  # the answers of the tests are short
    return windows


def a_module(groups):
    config = SimpleNamespace(_attn_implementation="sdpa")
    return SimpleNamespace(config=config, scaling=0.3, is_causal=True, num_key_value_groups=4 // groups)


ROWS = {
    "one sample": [(9, 5)],
    "samples": [(7, 3), (1, 0), (12, 5), (3, 3), (2, 1)],
    "without a context": [(7, 0), (1, 0), (4, 0)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_in_one_call_gives_what_its_samples_give_alone(row, before, groups, dtype, calls):
    """Outputs and gradients, of queries, keys, values and prefix; in bf16 as near to float64's as one by one."""
    torch.manual_seed(0)
    segments = tuple(Segment(*pair) for pair in ROWS[row])
    tokens = sum(segment.tokens for segment in segments)
    sizes = [(1, tokens, 4, 8), (1, tokens, groups, 8), (1, tokens, groups, 8)]
    sizes += [(2, len(segments), groups, before, 8)] if before else []
    inputs = [torch.randn(size).to(dtype) for size in sizes]
    toward = torch.randn(1, tokens, 32).to(dtype)
    module = a_module(groups)

    def results(packed, dtype):
        q, k, v, *prefix = leaves = [x.to(dtype).requires_grad_() for x in inputs]
        layer = LayerInputs(None, segments=segments, packed=packed, prefix=prefix[0] if prefix else None)
        out = attention.attention_forward(module, q, k, v, layer)
        return [out, *torch.autograd.grad(out, leaves, toward.to(dtype))]

    exact = results(None, torch.float64)
    found = results(pack_row(segments, before, torch.device("cpu")), dtype)
    assert calls == ([(-1, 0)] if row == "without a context" else [(-1, 0), (-1, -1)])
    for one, other, own in zip(found, exact, results(None, dtype), strict=True):
        error = (one.double() - other).abs().max()
        assert error < 1e-6 if dtype == torch.float64 else error <= 1.5 * (own.double() - other).abs().max()


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("row", ROWS)
def test_torchs_own_function_takes_these_arguments(row, groups):
    """On the meta device, where it has shapes and no kernel."""
    segments = tuple(Segment(*pair) for pair in ROWS[row])
    tokens = sum(segment.tokens for segment in segments)
    sizes = [(1, tokens, 4, 8), *2 * [(1, tokens, groups, 8)], (2, len(segments), groups, 3, 8)]
    leaves = [torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in sizes]
    layer = LayerInputs(None, segments=segments, packed=pack_row(segments, 3, leaves[0].device), prefix=leaves[3])
    out = attention.attention_forward(a_module(groups), *leaves[:3], layer)
    assert out.shape == (1, tokens, 32)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]


def one_by_one(model, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "why_one_by_one", why_one_by_one)  # the CPU has no kernel for a row
        return loss_and_gradients(model, batch)


@modes
@prefixes
@pytest.mark.parametrize("samples", [1, 3])
def test_models_train_as_with_one_call_a_sample(mode, prefix, samples, load, tokenizers, calls):
    model = load(mode, **prefix, prefix_dropout=0.0).train().double()
    batch = packed_batch(tokenizers[mode], samples)
    want, others = one_by_one(model, batch)
    assert not calls
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, batch)
        forward_passes = 2 if model.is_gradient_checkpointing else 1
        assert len(calls) == forward_passes * model.config.num_layers * (2 if mode == "glm" else 1)
        torch.testing.assert_close(loss, want, atol=0, rtol=1e-6)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, others[name], atol=1e-6 * others[name].abs().max().item(), rtol=0)
        calls.clear()
        model.gradient_checkpointing_enable()


@modes
@prefixes
def test_models_in_bf16_train_as_exactly_as_with_one_call_a_sample(mode, prefix, load, tokenizers, calls):
    model = load(mode, **prefix, prefix_dropout=0.0).train().bfloat16()
    model.gradient_checkpointing_enable()
    batch = packed_batch(tokenizers[mode])
    found, own, exact = (
        way(model.to(dtype), batch)[1]
        for way, dtype in (
            (loss_and_gradients, torch.bfloat16),
            (one_by_one, torch.bfloat16),
            (one_by_one, torch.float64),
        )
    )
    error, own_error = (
        sum(((some[name].double() - exact[name]) / exact[name].norm()).square().sum() for name in exact) ** 0.5
        for some in (found, own)
    )
    assert calls and error < 1.5 * own_error  # 0.90 to 1.23: other roundings


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "head_dim", "capability", "reason"),
    [
        ("sdpa", "cuda", torch.bfloat16, 128, (8, 0), None),
        ("sdpa", "cuda", torch.float16, 64, (9, 0), None),
        ("sdpa", "cuda", torch.float32, 128, (9, 0), "half precision"),
        ("sdpa", "cuda", torch.float16, 128, (7, 5), "compute capability 8.0"),
        ("sdpa", "cuda", torch.bfloat16, 20, (9, 0), "heads of 20"),
        ("sdpa", "cpu", torch.bfloat16, 128, None, "NVIDIA"),
        ("eager", "cuda", torch.bfloat16, 128, (9, 0), "--attn_implementation is eager"),
        ("flash_attention_2", "cuda", torch.bfloat16, 128, (9, 0), "--attn_implementation is flash_attention_2"),
    ],
)
def test_where_a_row_takes_one_call(monkeypatch, implementation, device, dtype, head_dim, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    found = why_one_by_one(implementation, torch.device(device), dtype, head_dim)
    assert found is None if reason is None else reason in found
