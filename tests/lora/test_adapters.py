"""Adapters beside their base: what prediction loads, in which type and how exactly; what is written for other programs;
which layers are ours. (merge_lora.py has test_merge.py.)
"""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from adapter_errors import ALL, CPU, rms, wide_and_half
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners import lora as peft_lora
from safetensors.torch import load_file, save_file
from test_merge import B, change_json, make_adapter, make_base, rename
from torch import nn
from torch.nn import functional as F

import merge_lora
from glm_models import MODE, CheckpointError
from glm_models.convert.clients import PEFT_KEYS
from glm_models.ops import OutputLayer
from tuning.engine import loading
from tuning.engine.loading import load_result, prediction_dtype, stored_dtype
from tuning.errors import UserError
from tuning.lora import layers as lora_layers
from tuning.lora.adapter import BASE_FILE, write_adapter
from tuning.lora.layers import LoraLinear, PredictionLinear, use_own_layers

HALF = [torch.bfloat16, torch.float16]


# The type


@pytest.mark.parametrize(
    ("device", "stored", "bf16", "expected"),
    [
        ("cpu", torch.float16, True, torch.float32),
        ("cpu", torch.bfloat16, False, torch.float32),
        ("cuda", torch.float16, True, torch.float16),
        ("cuda", torch.float16, False, torch.float16),
        ("cuda", torch.bfloat16, True, torch.bfloat16),
        ("cuda", torch.bfloat16, False, torch.float16),
        ("cuda", torch.float32, True, torch.bfloat16),
        ("cuda", torch.float32, False, torch.float16),
        ("cuda", torch.float64, True, torch.bfloat16),
        ("cuda", None, False, torch.float16),
    ],
)
def test_a_checkpoint_answers_in_its_own_type_if_the_device_can(device, stored, bf16, expected):
    dtype, reason = prediction_dtype(device, stored, bf16)
    assert dtype == expected
    assert ("type of the checkpoint" in reason) == (dtype == stored)
    assert ("does not compute in bfloat16" in reason) == (dtype == torch.float16 != stored)


@pytest.mark.parametrize(("stored", "bf16"), [(torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("as_bin", [False, True])
def test_the_type_is_read_off_the_weights_not_off_the_config(tiny, tmp_path, monkeypatch, capsys, stored, bf16, as_bin):
    base = make_base(tiny, "glm2", tmp_path / "base", stored, as_bin=as_bin)
    change_json(Path(base) / "config.json", torch_dtype="float32")
    assert stored_dtype(base) == stored
    adapter = make_adapter("glm2", base, tmp_path / "adapter")
    monkeypatch.setattr(loading, "supports_bf16", lambda: bf16)
    for folder in (base, adapter):
        _, model = load_result("glm2", folder, device=torch.device("meta"))  # a device that is no CPU
        assert model.dtype == (stored if bf16 else torch.float16)
        name = str(model.dtype).removeprefix("torch.")
        assert f"{folder} on meta in {name} (" in capsys.readouterr().out


# How exactly


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [0.03, 0.01, 0.003])  # of the weights' size: 1e-3, 3e-4, 1e-4 of 3e-2
@pytest.mark.parametrize("dtype", HALF)
def test_a_layer_with_an_adapter_is_as_exact_as_its_base_alone(dtype, share, bias):
    torch.manual_seed(0)
    base = nn.Linear(512, 512, bias).to(dtype)
    nn.init.normal_(base.weight, std=0.03)
    x = torch.randn(512, 512, dtype=dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    use_own_layers(config, PredictionLinear)
    layer = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    nn.init.normal_(b, std=0.1)
    b.mul_(share * 0.03 / rms(layer.get_delta_weight("default").float()))

    def exact(adapted: bool) -> torch.Tensor:
        weight = base.weight.double() + adapted * layer.scaling["default"] * (b.double() @ a.double())
        return x.double() @ weight.t() + (base.bias.double() if bias else 0)

    with torch.no_grad():
        own, found = rms(base(x) - exact(False)), rms(layer(x) - exact(True))
        merged = (base.weight.float() + layer.scaling["default"] * (b.float() @ a.float())).to(dtype)
        lost = rms(nn.functional.linear(x, merged, base.bias) - exact(True))
    assert found < 1.05 * own
    assert lost > 1.2 * own  # what this is for


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mode", MODE)
def test_adapters_in_half_precision_answer_as_exactly_as_the_base_does(tiny, tokenizers, tmp_path, mode, dtype):
    """Logits and greedy answers against the unmerged model in float32, beside those of the base against itself.

    How many answers are the same is luck: at some token of most answers this random model hardly decides.
    """
    base = make_base(tiny, mode, tmp_path / "base", dtype)
    alone = wide_and_half(mode, base, base, tokenizers[mode], dtype)
    error = alone.error()
    for std in (0.03, 0.01):
        adapter = make_adapter(mode, base, tmp_path / f"adapter-{std}", ALL, std)
        found = wide_and_half(mode, base, adapter, tokenizers[mode], dtype)
        assert found.model.dtype == dtype
        assert any(isinstance(module, PredictionLinear) for module in found.model.modules())
        assert rms(found.wide.logits - alone.wide.logits) > error / 4  # the adapter does something
        assert found.error() < 1.15 * error  # 0.93 to 1.07: other roundings, as many
        # answers part only where float32 prefers its token by little: up to 4.9 times the error; most margins are wider
        assert max(found.margins, default=0) < 8 * error


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [0.001, 0.03, 1])  # of the adapter's product, beside the base's
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapted_layer_rounds_no_more_than_its_base(dtype, scale, bias, monkeypatch):
    """Against float64, on the same numbers; so also where an adapter is as large as the base."""
    monkeypatch.setattr(lora_layers, "ROWS", 7)  # of 20: the last piece is a smaller one
    torch.manual_seed(0)
    base, rank = nn.Linear(96, 200, bias=bias).to(dtype), 4
    config = LoraConfig(r=rank, lora_alpha=3 * rank, lora_dropout=0.5)
    layer = PredictionLinear(base, "default", config=config, r=rank, lora_alpha=3 * rank).to(dtype).eval()
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    x = torch.randn(2, 10, 96).to(dtype)
    with torch.no_grad():
        b.normal_(0, scale / 3 / rank**0.5)
        own = F.linear(x.double(), base.weight.double(), None if base.bias is None else base.bias.double())
        added = 3 * F.linear(F.linear(x.double(), a.double()), b.double())
        for found, exact in ((base(x), own), (layer(x), own + added)):
            # the least that an output in this type can have; 3 %: other roundings of the sum within
            assert rms(found.double() - exact) < 1.03 * rms(exact.to(dtype).double() - exact)


def test_the_weight_of_a_layer_stands_once_and_may_move():
    layer = PredictionLinear(nn.Linear(16, 24, dtype=torch.bfloat16), "default", config=LoraConfig(r=2), r=2).eval()
    before, x = layer.base_layer.weight.detach().clone(), torch.randn(3, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        nn.init.normal_(layer.lora_B["default"].weight)
        answer = layer(x)
        assert layer.base_layer.weight.equal(before) and layer.base_layer.weight.data_ptr() == layer.wide.data_ptr()
        layer.base_layer.weight.data = before * 2  # as a move to another device: other memory
        assert not layer(x).equal(answer)
        layer.base_layer.weight.data = before.clone()
        assert layer(x).equal(answer)


def foreign(**config):
    """Kinds of peft that are more than plain LoRA, or scaled otherwise."""
    return {"targets": ALL, "std": 0.05, **config}


KINDS = {
    "plain": foreign(),
    "rank-stabilised": foreign(use_rslora=True),
    "DoRA": foreign(use_dora=True),
    "ranks and alphas of their own": foreign(rank_pattern={"dense": 2}, alpha_pattern={"dense_4h_to_h": 40}),
    "a pattern": foreign(targets=r".*layers\.[12]\.mlp\.dense_h_to_4h"),
    "some layers": foreign(layers_to_transform=[0, 2]),
    "a bias of its own": foreign(targets=["query_key_value"], lora_bias=True),
    "a layer saved whole": foreign(modules_to_save=["dense_4h_to_h"], targets=["query_key_value"]),
    "embedding and output layer": foreign(targets=["word_embeddings", "output_layer"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_peft_loads_answers_as_with_peft(tiny, tmp_path, kind, dtype):
    base = make_base(tiny, "glm3", tmp_path / "base", dtype)
    adapter = make_adapter("glm3", base, tmp_path / "adapter", **KINDS[kind])
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        plain = MODE["glm3"].model.from_pretrained(base, dtype=torch.float32).eval()
        own, half = plain(ids).logits, MODE["glm3"].model.from_pretrained(base, dtype=dtype).eval()(ids).logits
        expected = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        found = load_result("glm3", adapter, device="cpu", dtype=dtype)[1](ids).logits
    assert rms(expected - own) > 0.1
    assert rms(found - expected) < max(1.5 * rms(half - own), 1e-5)


def test_nothing_is_warned_of_that_is_no_fault(tiny, tmp_path):
    base = make_base(tiny, "glm2", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        adapter = make_adapter("glm2", base, tmp_path / "adapter")
        load_result("glm2", adapter, device="cpu")


# What does not fit


@pytest.fixture(scope="module")
def glm3(tiny, tmp_path_factory):
    """A base, and an adapter of it without a record; copied by tests that change them."""
    folder = tmp_path_factory.mktemp("adapters")
    base = make_base(tiny, "glm3", folder / "base")
    return Path(base), Path(make_adapter("glm3", base, folder / "adapter", record=False))


def drop(part: str):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


LOST = {
    "wrapped": lambda tensors: rename(tensors, "base_model.model.", "base_model.model.model."),
    "wrapped by DDP": lambda tensors: rename(tensors, "base_model.model.", "base_model.model.module."),
    "without a prefix": lambda tensors: rename(tensors, "base_model.model.", ""),
    "another family's names": lambda tensors: rename(tensors, "transformer.encoder.", "transformer."),
    "other names of A and B": lambda tensors: (
        rename(tensors, "lora_A", "lora_a"),
        rename(tensors, "lora_B", "lora_b"),
    ),
    "another adapter's name": lambda tensors: rename(tensors, ".weight", ".other.weight"),
    "a layer that is not there": lambda tensors: tensors.update({B.replace("layers.0", "layers.9"): tensors[B] + 0}),
    "a layer without weights": drop("layers.2."),
    "a kind of layer without weights": drop("dense_h_to_4h"),
    "A alone": drop("layers.1.self_attention.query_key_value.lora_B"),
}


@pytest.mark.parametrize("how", ["predict", "merge"])
@pytest.mark.parametrize("kind", LOST)
def test_all_weights_have_a_place_and_all_places_have_weights(glm3, tmp_path, monkeypatch, kind, how):
    adapter = Path(shutil.copytree(glm3[1], tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    LOST[kind](tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    monkeypatch.setattr(loading, "load_base", lambda *args, **kwargs: pytest.fail("12 GB are read before the refusal"))
    with pytest.raises(CheckpointError) as error:
        if how == "predict":
            load_result("glm3", str(adapter), str(glm3[0]), CPU)
        else:
            merge_lora.merge("glm3", str(glm3[0]), str(adapter), str(tmp_path / "merged"))
    assert str(adapter) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_config_says_beyond_peft_is_named_and_printed_safely(glm3, tmp_path, capsys):
    adapter = Path(shutil.copytree(glm3[1], tmp_path / "adapter"))
    config = adapter / "adapter_config.json"
    change_json(config, of_next_year=True, nothing=None, **{"\x1b[31mred": 1})
    for use in (
        lambda: load_result("glm3", str(adapter), None, CPU),
        lambda: merge_lora.merge("glm3", str(glm3[0]), str(adapter), str(tmp_path / "merged"), verify=False),
    ):
        use()
        said = capsys.readouterr().out
        assert r"keys that this peft does not know: \x1b[31mred, of_next_year" in said
        assert "\x1b" not in said
    for key, value in (("alora_invocation_tokens", [1]), ("arrow_config", {"top_k": 1}), ("megatron_config", {"a": 1})):
        change_json(config, **{key: value})
        with pytest.raises(UserError, match=f"{key} .*; not loaded"):
            load_result("glm3", str(adapter), None, CPU)
        change_json(config, **{key: None})
    change_json(config, base_model_name_or_path="\x1b[31mx")
    with pytest.raises(UserError, match=r"base model \\x1b\[31mx is not here"):
        load_result("glm3", str(adapter), None, CPU)
    (adapter / BASE_FILE).write_text(json.dumps({"mode": "x", "path": "\x1b[31my", "config": {}, "fingerprint": ""}))
    with pytest.raises(CheckpointError, match=r"was trained on \\x1b\[31my"):
        load_result("glm3", str(adapter), str(glm3[0]), CPU)


def test_an_adapter_among_a_model_s_files_is_not_guessed_at(glm3, tmp_path):
    both = Path(shutil.copytree(glm3[0], tmp_path / "both"))
    shutil.copytree(glm3[1], both, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="holds a model and a LoRA adapter"):
        load_result("glm3", str(both), None, CPU)


def test_the_folder_of_a_run_is_answered_with_the_adapters_in_it(glm3, tmp_path):
    for name in ("epoch-1-step-2", "best", "epoch-2-step-4"):
        shutil.copytree(glm3[1], tmp_path / "run" / name)
    (tmp_path / "run/states").mkdir()
    with pytest.raises(CheckpointError) as error:
        merge_lora.merge("glm3", str(glm3[0]), str(tmp_path / "run"), str(tmp_path / "merged"))
    names = [Path(part).name for part in str(error.value).split("name one of ")[1].split(", ")]
    assert names[0] == "best"
    assert set(names[1:]) == {"epoch-1-step-2", "epoch-2-step-4"}
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        merge_lora.merge("glm3", str(glm3[0]), str(tmp_path / "nowhere"), str(tmp_path / "merged"))


# What is written


def trained(tiny, **config):
    """A model with an adapter as in training, and what is to be saved of it."""
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["dense", "query_key_value"], task_type="CAUSAL_LM", **config
    )
    use_own_layers(config)
    model = get_peft_model(MODE["glm2"].model.from_pretrained(tiny["glm2"]), config)
    return model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_folder_is_what_peft_writes_less_its_defaults(tiny, tmp_path):
    model, tensors = trained(tiny)
    for name in ("ours", "peft"):
        (tmp_path / name).mkdir()
    write_adapter(str(tmp_path / "ours"), model, tensors, tiny["glm2"], {"mode": "glm2"})
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json",
    ]  # fmt: skip
    ours, by_peft = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == by_peft.keys()
    assert all(torch.equal(ours[name], by_peft[name]) for name in ours)
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert written.keys() == PEFT_KEYS  # what peft 0.5 knew
    assert written["base_model_name_or_path"] == tiny["glm2"]
    assert written["inference_mode"] is True
    read, expected = (PeftConfig.from_pretrained(str(tmp_path / name)).to_dict() for name in ("ours", "peft"))
    assert {**read, "target_modules": set(read["target_modules"])} == expected | {
        "target_modules": set(expected["target_modules"])
    }


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"dense": 2}}])
def test_a_key_that_says_something_is_written(tiny, tmp_path, config):
    write_adapter(str(tmp_path), *trained(tiny, **config), tiny["glm2"], {})
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() - PEFT_KEYS == config.keys()
    assert config.items() <= PeftConfig.from_pretrained(str(tmp_path)).to_dict().items()


# Whose layers


class Quantised(nn.Linear):
    """Stands for bitsandbytes' layers: a subclass whose weight is not what it computes with."""

    def forward(self, x):
        return super().forward(x) + 1


def layers(**config):
    """What peft makes of a plain layer, an output layer and a quantised one, with ours where they fit."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), OutputLayer(8, 8), Quantised(8, 8))
    models = []
    for own in (False, True):
        torch.manual_seed(1)
        settings = LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False, **config)
        if own:
            use_own_layers(settings)
        models.append(get_peft_model(copy.deepcopy(base), settings))
    return models


@pytest.mark.parametrize(
    ("config", "ours"),
    [({}, True), ({"use_rslora": True}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)],
)
def test_only_plain_lora_on_plain_layers_is_ours(config, ours):
    peft, model = layers(**config)
    kinds = [type(layer) for layer in model.base_model.model]
    assert kinds == ([LoraLinear, LoraLinear, peft_lora.Linear] if ours else [peft_lora.Linear] * 3)
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), peft(x))
    assert model.state_dict().keys() == peft.state_dict().keys()
    magnitudes = [name for name in model.state_dict() if "lora_magnitude_vector" in name]
    assert len(magnitudes) == (3 if "use_dora" in config else 0)
    if "use_dora" in config:  # really DoRA, not LoRA under its name
        with torch.no_grad():
            before = model(x)
            model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(2)
            assert (model(x) - before).abs().max() > 0.01


def test_our_layer_refuses_what_it_does_not_compute():
    for config in ({"use_dora": True}, {"lora_bias": True}):
        settings = LoraConfig(r=2, target_modules=["0"], **config)
        settings._register_custom_module({nn.Linear: LoraLinear})
        with pytest.raises(ValueError, match="others need peft's own layer"):
            get_peft_model(nn.Sequential(nn.Linear(8, 8)), settings)
