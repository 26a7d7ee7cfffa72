"""What half precision would round away or not hold: numbers that are larger or finer than those around them."""

from types import SimpleNamespace

import pytest
import torch

from glm_models import attention, ops

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("factor", [1 / 3, 1 / 1000, 70_000.0])  # float16 ends at 65,504: a loss scale may be more
def test_the_factor_of_a_loss_is_not_rounded_to_the_type_of_its_gradients(dtype, factor):
    torch.manual_seed(0)
    layer = ops.OutputLayer(8, 20, bias=False, dtype=dtype)
    hidden = (0.1 * torch.randn(5, 8)).to(dtype).requires_grad_()
    targets = torch.arange(5)

    def gradients(by: float):
        return torch.autograd.grad(layer(hidden, targets) * by, (hidden, layer.weight))

    for found, plain in zip(gradients(factor), gradients(1.0), strict=True):
        assert found.isfinite().all() and found.any()
        assert found.equal((plain.double() * factor).to(dtype))


def test_plain_attention_in_float16_holds_products_beyond_its_largest_number():
    torch.manual_seed(0)
    q, k, v = (40 + torch.randn(1, heads, 6, 128) for heads in (4, 2, 2))
    assert (q @ k.repeat_interleave(2, 1).transpose(2, 3)).min() > 2 * torch.finfo(torch.float16).max
    module = SimpleNamespace()
    scaling = 128**-0.5
    found, _ = attention.eager_attention(module, q.half(), k.half(), v.half(), None, scaling)
    assert found.isfinite().all()
    assert found.amin() > 35 and found.amax() < 45  # means of values
