"""Our LoRA layers compute, train and save what peft's do; where they cannot, peft's own layers are used."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from glm_models import ops
from tuning.lora.layers import LoraLinear, use_own_layers


def pair(bias=True, dropout=0.0):
    """peft's layer and ours around one base layer, with equal additions that are not zero."""
    torch.manual_seed(0)
    base, models = nn.Sequential(nn.Linear(24, 40, bias)), []
    for own in (False, True):
        config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
        if own:
            config._register_custom_module({nn.Linear: LoraLinear})
        models.append(get_peft_model(copy.deepcopy(base), config).double())
    nn.init.normal_(models[0].base_model.model[0].lora_B["default"].weight)
    models[1].load_state_dict(models[0].state_dict())  # strict: the names are the same
    assert type(models[1].base_model.model[0]) is LoraLinear
    return models


def run(model, x):
    """Output, and gradients of the input and of what trains."""
    torch.manual_seed(1)  # for dropout
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("dropout", "fused"), [(0.0, False), (0.3, False), (0.3, True)])  # fused as on a GPU
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 24), (7, 24), (1, 1, 24), (0, 24)])
def test_output_and_gradients_are_those_of_peft(shape, bias, dropout, fused, monkeypatch):
    monkeypatch.setattr(ops, "has_fused_dropout", lambda _: fused)
    peft, ours = pair(bias, dropout)
    x = torch.randn(shape, dtype=torch.float64)
    results = [run(model, x) for model in (peft, ours)]
    assert len(results[1]) == 4
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_gradients_switched_off_and_merged():
    peft, ours = pair()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    base = ours.base_model.model[0].base_layer
    with torch.no_grad():
        plain = base(x)
        torch.testing.assert_close(ours(x), peft(x))
        assert (ours(x) - plain).abs().max() > 0.1
        with ours.disable_adapter():
            assert torch.equal(ours(x), plain)
        expected = peft(x)
        torch.testing.assert_close(ours.merge_and_unload()(x), expected, rtol=1e-10, atol=1e-10)


def test_additions_are_written_into_the_output_of_the_base():
    """Nothing else as large as the output is made, forward or backward."""
    _, ours = pair(bias=False)
    x = torch.randn(512, 24, dtype=torch.float64, requires_grad=True)
    places = []
    ours.base_model.model[0].base_layer.register_forward_hook(lambda _, __, output: places.append(output.data_ptr()))
    output, grad = ours(x), torch.ones(512, 40, dtype=torch.float64)
    assert places == [output.data_ptr()]
    with torch.profiler.profile(profile_memory=True) as profile:
        output.backward(grad)
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert max(sizes) >= x.nbytes  # memory is seen
    assert max(sizes) < output.nbytes


def test_dora_trains_its_magnitude():
    """Plain LoRA under its name would leave the magnitude as it is."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True)
    use_own_layers(config)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 40)), config)
    magnitude = model.base_model.model[0].lora_magnitude_vector["default"].weight
    before = magnitude.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(8, 24)).square().mean().backward()
    optimizer.step()
    assert (magnitude - before).abs().max() > 1e-4
