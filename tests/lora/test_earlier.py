"""--adapter_path: LoRA starts as the adapter that is named, or says why not."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import train
from glm_models import MODE
from glm_models.checkpoint import CheckpointError, write_json
from tuning.errors import UserError
from tuning.lora.adapter import BASE_FILE, add_adapter, config_to_write, open_adapter, record_base
from tuning.lora.earlier import start_from_adapter, take_lora_flags
from tuning.methods import build_model

ADAPTERS = {
    "as train.py makes it": {"target_modules": ["query_key_value", "dense_4h_to_h"]},
    "of one layer": {"target_modules": ["query_key_value"], "layers_to_transform": [1]},
    "by a pattern": {"target_modules": r".*\.0\..*\.dense"},
    "rsLoRA": {"target_modules": ["dense"], "use_rslora": True},
}


def make_adapter(mode: str, base: str, folder: Path, **config) -> str:
    """A random adapter of peft's own."""
    model = MODE[mode].model.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 10, **config}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def arguments(mode: str, base: str, adapter: str, *more: str):
    fixed = ["--mode", mode, "--model_name_or_path", base, "--train_path", __file__, "--adapter_path", adapter]
    return train.parse_args([*fixed, "--lora_dropout", "0", *more])


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("mode", MODE)
def test_training_starts_as_the_adapter(tiny, tmp_path, mode, kind):
    base = str(tiny[mode])
    folder = make_adapter(mode, base, tmp_path / "adapter", **ADAPTERS[kind])
    args = arguments(mode, base, folder)
    take_lora_flags(args)
    assert (args.lora_dim, args.lora_alpha) == (4, 10)
    model = build_model(args, lambda: MODE[mode].model.from_pretrained(base)).eval()
    reference = add_adapter(MODE[mode].model.from_pretrained(base), folder, open_adapter(folder))
    mine = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in mine)
    batch = MODE[mode].model.worst_case_batch(model.config, 1, 12, 6)
    torch.testing.assert_close(model(**batch).loss, reference(**batch).loss, rtol=1e-5, atol=1e-5)
    written = config_to_write(model.peft_config["default"])
    assert bool(written.get("use_rslora")) == (kind == "rsLoRA")
    assert not isinstance(written["target_modules"], str)


def test_a_plan_has_the_adapters_layers(tiny, tmp_path):
    folder = make_adapter("glm3", str(tiny["glm3"]), tmp_path / "adapter", **ADAPTERS["of one layer"])
    args = arguments("glm3", str(tiny["glm3"]), folder, "--plan")
    take_lora_flags(args)
    with torch.device("meta"):
        model = build_model(args, lambda: MODE["glm3"].model(MODE["glm3"].config.from_pretrained(tiny["glm3"])))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 and all(parameter.is_meta for parameter in trained)


@pytest.mark.parametrize(
    ("flags", "config", "line"),
    [
        ("--lora_dim 8", {}, "--lora_dim is 8, the adapter has 4; leave these flags out"),
        ("--lora_alpha 30 --lora_dim 1", {}, "is 1, the adapter has 4; --lora_alpha is 30.0, the adapter has 10"),
        ("--lora_module_name dense", {}, "--lora_module_name is dense, the adapter has query_key_value"),
        ("", {"lora_bias": True}, "lora_bias is True; only plain LoRA and DoRA a training can start from"),
        ("", {"use_dora": True}, "has no lora_magnitude_vector of"),
        ("--use_rslora", {}, "--use_rslora is True, the adapter has False"),
        ("--use_dora", {}, "--use_dora is True, the adapter has False"),
        ("--modules_to_save output_layer", {}, "--modules_to_save is output_layer, the adapter has none"),
        ("", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights"),
        ("", {"r": 8}, "not of rank 8 as"),
        ("", {"peft_type": "IA3"}, "not LORA"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_adapter_is_refused(tiny, tmp_path, flags, config, line):
    folder = make_adapter("glm3", str(tiny["glm3"]), tmp_path / "adapter", target_modules=["query_key_value"])
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises((UserError, CheckpointError)) as error:
        take_lora_flags(arguments("glm3", str(tiny["glm3"]), folder, *flags.split()))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_flags_that_say_what_the_adapter_has_are_fine(tiny, tmp_path):
    folder = make_adapter("glm3", str(tiny["glm3"]), tmp_path / "adapter", target_modules=["query_key_value", "dense"])
    flags = ["--lora_dim", "4", "--lora_alpha", "10", "--lora_module_name", "query_key_value,dense"]
    args = arguments("glm3", str(tiny["glm3"]), folder, *flags)
    take_lora_flags(args)
    assert args.lora_module_name == "dense,query_key_value"


def test_another_base_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tuning.lora.earlier.on_rank_0", lambda action: action())
    folder = make_adapter("glm3", str(tiny["glm3"]), tmp_path / "adapter", target_modules=["query_key_value"])
    monkeypatch.setattr("tuning.lora.earlier.print_rank_0", print)
    start_from_adapter(arguments("glm3", str(tiny["glm3"]), folder))
    said = capsys.readouterr().out
    assert f"LoRA starts from {folder}: rank 4, alpha 10, query_key_value" in said and "only names and shapes" in said
    write_json(str(Path(folder, BASE_FILE)), record_base("glm3", str(tiny["glm3"]), torch.float32))
    assert start_from_adapter(arguments("glm3", str(tiny["glm3"]), folder)).keys() == {"SHA-256 of --adapter_path"}
    assert "has the fingerprint of the base" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not on a model of --mode glm2"):
        start_from_adapter(arguments("glm2", str(tiny["glm2"]), folder))


def test_a_base_of_another_shape_is_refused(tiny, tmp_path):
    folder = make_adapter("glm3", str(tiny["glm3"]), tmp_path / "adapter", target_modules=["query_key_value"])
    args = arguments("glm3", str(tiny["glm3"]), folder)
    take_lora_flags(args)
    config = MODE["glm3"].config.from_pretrained(tiny["glm3"])
    for change, line in (
        ({"num_layers": 1}, "it has no linear layer "),
        ({"kv_channels": 2 * config.kv_channels}, "lora_B of "),
    ):

        def load(change=change):
            return MODE["glm3"].model(MODE["glm3"].config.from_pretrained(tiny["glm3"], **change))

        with torch.device("meta"), pytest.raises(CheckpointError, match=f"does not fit the base: {line}"):
            build_model(args, load)
