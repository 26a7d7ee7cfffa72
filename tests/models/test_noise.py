"""NEFTune: the noise is the paper's, on each sample's own tokens, in training alone."""

import pytest
import torch

from glm_models import MODE

ALPHA = 5.0
SIZE = 64  # hidden size of the tiny models


def noise_of(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """What a forward pass adds to the embeddings: [batch, tokens, hidden]."""
    seen = []
    transformer = model.transformer
    hook = transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    torch.manual_seed(3)
    model(input_ids=ids, use_cache=False, **kwargs)
    hook.remove()
    return seen[0] - transformer.get_input_embeddings()(ids).detach()


def uniform(shape) -> torch.Tensor:
    """The noise before it is scaled."""
    torch.manual_seed(3)
    return torch.empty(*shape).uniform_(-1, 1)


def scale(tokens: int) -> float:
    return ALPHA / (tokens * SIZE) ** 0.5


@pytest.fixture(params=MODE)
def model(request, load):
    model = load(request.param).train()
    model.add_embedding_noise(ALPHA)
    return model


def test_each_sample_of_a_row_has_noise_by_its_own_length(model):
    """Packed or one after the other, a sample's noise is as strong as if it were alone."""
    lengths = (5, 12, 3)
    ids = torch.arange(20, 40)[None]
    found = noise_of(model, ids, segments=[(length, 1) for length in lengths])
    start, raw = 0, uniform(found.shape)
    for length in lengths:
        part = slice(start, start + length)
        torch.testing.assert_close(found[:, part], raw[:, part] * scale(length), rtol=0, atol=1e-6)
        start += length
    assert found.abs().max() > 0.2


def test_padding_has_none_and_does_not_count(model):
    ids, mask = torch.arange(20, 40).view(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    found, raw = noise_of(model, ids, attention_mask=mask), uniform((2, 10, SIZE))
    torch.testing.assert_close(found[1], raw[1] * scale(10), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0, 4:], raw[0, 4:] * scale(6), rtol=0, atol=1e-6)
    assert not found[0, :4].any()
    alone = noise_of(model, ids[1:])
    torch.testing.assert_close(alone, uniform((1, 10, SIZE)) * scale(10), rtol=0, atol=1e-6)


def test_there_is_none_in_validation_nor_without_the_flag(model):
    ids = torch.arange(20, 40)[None]
    assert not noise_of(model.eval(), ids, segments=[(20, 1)]).any()
    model.add_embedding_noise(0.0)
    assert not noise_of(model.train(), ids, segments=[(20, 1)]).any()
