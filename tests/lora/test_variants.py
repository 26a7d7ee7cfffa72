"""DoRA, rsLoRA, initial values, modules trained whole, LoRA+: training is plain peft's, and what is saved is read by
plain peft, merged, verified, answered with and started from alike.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from deepspeed.runtime import lr_schedules
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

import merge_lora
import train
from glm_models import MODE
from glm_models.checkpoint import CheckpointError
from tuning.engine.ds_config import ds_values, fit_schedule, load_ds_config
from tuning.engine.loading import load_result
from tuning.errors import UserError
from tuning.lora import verify
from tuning.lora.adapter import read_adapter, record_base, write_adapter
from tuning.lora.earlier import take_lora_flags
from tuning.lora.layers import LoraLinear
from tuning.lora.starts import Start, make_start
from tuning.methods import build_model, check_method, check_zero3, parameter_groups
from tuning.plan import planner

IDS = torch.arange(20, 60)[None]
ALL = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
LAYERS = "--lora_module_name query_key_value,dense"
# name -> flags, and the same in peft's words
KINDS = {
    "rsLoRA": ("--use_rslora", {"use_rslora": True}),
    "DoRA": ("--use_dora", {"use_dora": True}),
    "gaussian": ("--init_lora_weights gaussian", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("--init_lora_weights orthogonal", {"init_lora_weights": "orthogonal"}),
    "olora": ("--init_lora_weights olora", {"init_lora_weights": "olora"}),
    "pissa": ("--init_lora_weights pissa --use_rslora", {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa_niter": ("--init_lora_weights pissa_niter_4", {"init_lora_weights": "pissa_niter_4"}),
    "norms whole": ("--modules_to_save input_layernorm", {"modules_to_save": ["input_layernorm"]}),
    "DoRA, pissa, whole": (
        "--use_dora --init_lora_weights pissa --modules_to_save dense_4h_to_h",
        {"use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["dense_4h_to_h"]},
    ),
}
CASES = [("glm3", kind) for kind in KINDS]
CASES += [(mode, kind) for mode in ("glm", "glm2") for kind in ("DoRA", "pissa", "DoRA, pissa, whole")]


def arguments(mode: str, base: str, *flags: str):
    words = ["--mode", mode, "--model_name_or_path", str(base), "--train_path", __file__]
    words += [word for text in flags for word in text.split()]
    return train.parse_args([*words, *([] if "--train_type" in words else ["--lora_dropout", "0"])])


def built(args):
    """The model that a training begins with."""
    torch.manual_seed(5)
    return build_model(args, lambda **more: MODE[args.mode].model.from_pretrained(args.model_name_or_path, **more))


def learn(model, mode: str, steps: int = 3) -> list[float]:
    """Losses of some steps of Adam."""
    batch = MODE[mode].model.worst_case_batch(model.config, 2, 24, 8)
    batch["num_items_in_batch"] = 46.0
    batch["input_ids"] = batch["input_ids"] + torch.arange(48) % 40 * (batch["input_ids"] == 1)
    batch["labels"] = torch.where(batch["labels"] == 1, batch["input_ids"], batch["labels"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def written(model, args, folder: Path, start: Start | None) -> str:
    """The model's adapter, as train.py writes it."""
    folder.mkdir()
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    record = record_base(args.mode, args.model_name_or_path, torch.float32)
    write_adapter(str(folder), model, tensors, args.model_name_or_path, record, start)
    return str(folder)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize(("mode", "kind"), CASES)
def test_a_variant_trains_as_in_peft_and_its_adapter_is_understood_everywhere(tiny, tmp_path, mode, kind):
    base, (flags, config) = tiny[mode], KINDS[kind]
    args = arguments(mode, base, flags, LAYERS)
    check_method(args)
    model, plain = built(args), MODE[mode].model.from_pretrained(base)
    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=30, target_modules=["query_key_value", "dense"], **config)
    by_peft = get_peft_model(copy.deepcopy(plain), config)
    assert any(isinstance(module, LoraLinear) for module in model.modules()) == (not config.use_dora)
    start = make_start(args, model)
    assert (start is not None) == ("olora" in kind or "pissa" in kind)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)  # it starts as the base
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = learn(model, mode)
    assert losses == pytest.approx(learn(by_peft, mode), rel=1e-6)
    assert all((p - before[name]).abs().max() > 1e-4 for name, p in model.named_parameters() if p.requires_grad)

    folder, expected = written(model, args, tmp_path / "adapter", start), logits(model)
    assert (expected - logits(plain)).abs().max() > 0.1
    close = {"rtol": 1e-4, "atol": 1e-4 * expected.abs().max().item()}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(plain), folder)), expected, **close)
    torch.testing.assert_close(logits(load_result(mode, folder, device="cpu")[1]), expected, **close)
    found = verify.logits(mode, base, {"input_ids": IDS, "attention_mask": IDS * 0 + 1}, read_adapter(folder))
    torch.testing.assert_close(found, expected[0], **close)
    merge_lora.merge(mode, base, folder, str(tmp_path / "merged"))
    torch.testing.assert_close(logits(MODE[mode].model.from_pretrained(tmp_path / "merged")), expected, **close)

    second = arguments(mode, base, "--adapter_path", folder)
    take_lora_flags(second)
    check_method(second)
    torch.testing.assert_close(logits(built(second)), expected, **close)


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
def test_embedding_and_output_layer_are_trained_whole_and_merged(tiny, tmp_path, mode):
    base, names = tiny[mode], ["word_embeddings", "output_layer"]
    args = arguments(mode, base, LAYERS, "--modules_to_save", ",".join(names))
    model = built(args)
    losses = learn(model, mode)
    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=30, target_modules=["query_key_value", "dense"], modules_to_save=names)
    by_peft = get_peft_model(MODE[mode].model.from_pretrained(base), config)
    assert losses == pytest.approx(learn(by_peft, mode), rel=1e-6)
    folder, expected = written(model, args, tmp_path / "adapter", None), logits(model)
    plain = PeftModel.from_pretrained(MODE[mode].model.from_pretrained(base), folder)
    assert torch.equal(logits(plain), logits(by_peft)) or (logits(plain) - expected).abs().max() < 1e-3
    merge_lora.merge(mode, base, folder, str(tmp_path / "merged"))
    merged = MODE[mode].model.from_pretrained(tmp_path / "merged")
    for get in ("get_input_embeddings", "get_output_embeddings"):
        trained = getattr(model, get)().modules_to_save["default"].weight
        assert torch.equal(getattr(merged, get)().weight, trained)


def test_what_is_saved_of_pissa_is_what_peft_converts_it_to(tiny, tmp_path):
    args = arguments("glm3", tiny["glm3"], LAYERS, "--init_lora_weights pissa --use_rslora")
    model = built(args)
    start = make_start(args, model)
    model.peft_config["default"].init_lora_weights = True  # peft's own way to save the start
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = "pissa"
    learn(model, "glm3")
    ours = written(model, args, tmp_path / "ours", start)
    model.save_pretrained(
        tmp_path / "peft", path_initial_model_for_weight_conversion=tmp_path / "start", save_embedding_layers=False
    )
    files = [load_file(Path(folder, "adapter_model.safetensors")) for folder in (ours, tmp_path / "peft")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    configs = [json.loads(Path(folder, "adapter_config.json").read_text()) for folder in (ours, tmp_path / "peft")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora"):
        assert configs[0][key] == configs[1][key]


def test_a_start_that_this_machine_does_not_find_again_is_taken_from_the_state(tiny):
    args = arguments("glm3", tiny["glm3"], LAYERS, "--init_lora_weights pissa")
    model, other = built(args), built(args)
    state = {name: tensor.clone() for name, tensor in make_start(args, model).state().items()}
    with torch.no_grad():  # singular vectors are found but for their sign, and here the rest is rounded otherwise too
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-1.001)
    drifted = {name: tensor * -1.001 for name, tensor in state.items()}
    start = Start(other, tiny["glm3"])
    start.set_state(drifted)
    assert all(torch.equal(start.state()[name], drifted[name]) for name in drifted)
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    plain = MODE["glm3"].model.from_pretrained(tiny["glm3"])
    torch.testing.assert_close(logits(other), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODE)
def test_all_linear_is_what_peft_means_by_it(tiny, tmp_path, mode):
    args = arguments(mode, tiny[mode], "--lora_module_name all-linear")
    model = built(args)
    by_peft = get_peft_model(MODE[mode].model.from_pretrained(tiny[mode]), LoraConfig(target_modules="all-linear"))
    ours, theirs = (
        [name for name, module in one.named_modules() if hasattr(module, "lora_A")] for one in (model, by_peft)
    )
    assert ours == theirs and len(ours) == 16
    config = json.loads(Path(written(model, args, tmp_path / "a", None), "adapter_config.json").read_text())
    assert config["target_modules"] == ALL


REFUSED = [
    ("glm", "--modules_to_save word_embeddings", "embedding and output layer are one weight"),
    ("glm", "--modules_to_save lm_head", "embedding and output layer are one weight"),
    (
        "glm",
        "--init_lora_weights olora --lora_module_name lm_head",
        "would change the embedding, which is tied to",
    ),
    ("glm3", "--modules_to_save encoder", "--modules_to_save encoder: no such layer; there are dense, "),
    ("glm3", "--modules_to_save dense --lora_module_name all-linear", "dense: --lora_module_name adapts it already"),
    ("glm2", "--lora_module_name lm_head", "no such linear layer; there are dense, "),
    ("glm2", "--train_type freeze --train_last_layers 5", "--train_last_layers 5: the model has 4 transformer blocks"),
    (
        "glm2",
        "--train_type freeze",
        "--freeze_module_name layers.27., layers.26., layers.25., layers.24.: no",
    ),
]


@pytest.mark.parametrize(("mode", "flags", "line"), REFUSED)
def test_what_a_model_lacks_is_refused_without_its_weights(tiny, mode, flags, line):
    with pytest.raises(UserError) as error:
        check_method(arguments(mode, tiny[mode], flags))
    assert line in str(error.value)


@pytest.mark.parametrize("start", ["true", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2"])
def test_checking_draws_no_random_numbers(tiny, start):
    before = torch.get_rng_state()
    check_method(arguments("glm3", tiny["glm3"], "--init_lora_weights", start))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_needs_whole_weights_is_refused_under_zero_3(tiny):
    for start in ("pissa", "pissa_niter_8", "olora"):
        args = arguments("glm3", tiny["glm3"], "--init_lora_weights", start)
        check_zero3(args, 2)
        with pytest.raises(UserError, match=f"--init_lora_weights {start} decomposes whole weights"):
            check_zero3(args, 3)
        advised = [change(args, 2) for _, change in planner.CHANGES]  # by --plan
        assert not any("zero3" in flags.get("ds_file", "") for flags in advised if flags)
    for flags in ("--init_lora_weights orthogonal", "--use_dora", "--modules_to_save input_layernorm"):
        check_zero3(arguments("glm3", tiny["glm3"], flags), 3)


def test_a_weight_that_is_tied_is_not_merged_from_an_adapter_of_peft(tiny, tmp_path):
    config = LoraConfig(r=4, target_modules=["dense"], modules_to_save=["word_embeddings"])
    model = get_peft_model(MODE["glm"].model.from_pretrained(tiny["glm"]), config)
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(CheckpointError, match="the weight of embedding and output layer alike"):
        merge_lora.merge("glm", tiny["glm"], str(tmp_path / "adapter"), str(tmp_path / "merged"))


@pytest.mark.parametrize("mode", MODE)
def test_the_last_layers_are_those_of_their_names(tiny, mode):
    models = [
        built(arguments(mode, tiny[mode], "--train_type freeze", flags))
        for flags in ("--train_last_layers 2", "--freeze_module_name layers.2.,layers.3.")
    ]
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert trained[0] == trained[1] != set()


# LoRA+

LORAPLUS = "--use_dora --modules_to_save input_layernorm --loraplus_lr_ratio 16 --learning_rate 0.01 --warmup_ratio 0.5"


def test_the_groups_of_lora_plus_have_the_rates_of_peft(tiny):
    args = arguments("glm3", tiny["glm3"], LAYERS, LORAPLUS)
    model = built(args)
    by_peft = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=16.0)
    expected = {id(p): group["lr"] for group in by_peft.param_groups for p in group["params"]}
    groups = parameter_groups(model, args)
    assert {id(p): group["lr"] for group in groups for p in group["params"]} == expected
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        plain = {"lora_A" in names[id(p)] or "lora_B" in names[id(p)] for p in group["params"]}
        assert plain == {group["weight_decay"] > 0}  # magnitudes and norms have none
    assert groups[0]["lr"] == 0.01  # the rate in the log


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_each_group_keeps_its_own_rate_in_every_step(tiny, schedule):
    args = arguments("glm3", tiny["glm3"], LAYERS, LORAPLUS, "--lr_scheduler_type", schedule)
    config = load_ds_config("ds_zero2_no_offload.json", ds_values(args, 1, 8, 64))
    groups = parameter_groups(built(args), args)
    fit_schedule(config, groups)
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    section = config["scheduler"]
    scheduler = getattr(lr_schedules, section["type"])(optimizer, **section["params"])
    found = []
    for step in range(1, 9):
        scheduler.step(step)
        found.append([group["lr"] for group in optimizer.param_groups])
    after = {  # 8 steps, 4 of them warm-up; the 9th would be the end
        "linear": lambda step: (9 - step) / 5,
        "cosine": lambda step: 1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (step - 3) / 5)) / 2,
        "constant": lambda step: 1.0,
    }
    for step, (slow, *fast) in enumerate(found, 1):
        assert slow == pytest.approx(0.01 * (step / 4 if step < 4 else after[schedule](step)), rel=1e-6)
        assert fast == pytest.approx([16 * slow] * len(fast), rel=1e-6)
