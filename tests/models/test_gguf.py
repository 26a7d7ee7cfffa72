"""glm_models.convert.gguf: what is in the file is what the model has. tests/serving.py asks llama.cpp itself."""

import functools
import json
import os
from pathlib import Path

import jinja2
import numpy as np
import pytest
import test_convert
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from peft import LoraConfig, get_peft_model
from test_convert import VARIANTS, convert, make
from transformers import AutoTokenizer

from glm_models import MODE
from glm_models.checkpoint import read_json, read_weights, write_json
from glm_models.convert import gguf
from glm_models.convert.names import FUSED, native_names
from tuning.lora.adapter import read_adapter

gguf_package = pytest.importorskip("gguf")
MODES = ("glm2", "glm3")


def write(mode: str, folder, output, *flags: str):
    """The GGUF file of a folder, opened."""
    gguf.main(["--mode", mode, "--model_path", str(folder), "--output_dir", str(output), *flags])
    (path,) = Path(output).glob("*.gguf")
    return gguf_package.GGUFReader(path)


refusal = functools.partial(test_convert.refusal, command=write)


def tensors_of(reader) -> dict[str, torch.Tensor]:
    """The tensors of a file, in the shapes that torch has; bfloat16 too."""
    found = {}
    for tensor in reader.tensors:
        data = torch.from_numpy(np.array(tensor.data))
        found[tensor.name] = data.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else data
    return found


def fields_of(reader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("variant", ["as it is", "rope_ratio 50", "all heads have keys"])
@pytest.mark.parametrize("mode", MODES)
def test_the_file_has_the_weights_and_the_network(tiny, tmp_path, mode, variant):
    dtype = torch.bfloat16 if variant == "as it is" else torch.float32
    folder = make(tiny, mode, tmp_path / "base", dtype, shard=300_000, **VARIANTS[variant])
    reader = write(mode, folder, tmp_path / "gguf")
    found, fields = tensors_of(reader), fields_of(reader)
    config = MODE[mode].config.from_pretrained(folder)
    native = dict(read_weights(str(convert(mode, folder, tmp_path / "native"))))
    for name, weight in read_weights(str(folder)):
        if name.endswith("inv_freq"):
            continue
        parts = [native[part] for part in native_names(name)]  # llama.cpp takes q, k and v in this order
        expected = torch.cat(parts) if FUSED in name else weight
        there = found.pop(gguf.tensor_names([name], config.num_layers)[name])
        assert there.dtype == (dtype if weight.ndim == 2 else torch.float32)
        assert torch.equal(there, expected.to(there.dtype)), name
    assert not found
    assert fields["general.architecture"] == "chatglm" and fields["chatglm.block_count"] == config.num_layers
    assert fields["chatglm.attention.head_count_kv"] == config.num_groups
    assert fields["chatglm.rope.dimension_count"] == config.kv_channels // 2
    ratio = config.rope_ratio
    assert fields["chatglm.rope.freq_base"] == 10000 * (ratio if mode == "glm3" else 1)
    assert fields.get("chatglm.rope.scaling.factor") == (ratio if mode == "glm2" and ratio != 1 else None)

    again = write(mode, tmp_path / "native", tmp_path / "again")
    other = fields_of(again)
    assert other.pop("general.name") == "native" and fields.pop("general.name") == "base" and other == fields
    there, here = tensors_of(again), tensors_of(reader)
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize("mode", MODES)
def test_the_file_has_the_vocabulary_and_the_stops(tiny, tokenizers, tmp_path, mode):
    fields, pieces = (
        fields_of(write(mode, tiny[mode], tmp_path / "gguf", "--dtype", "float16")),
        tokenizers[mode].sp_model,
    )
    tokens, count = fields["tokenizer.ggml.tokens"], pieces.GetPieceSize()
    assert tokens[:count] == [pieces.IdToPiece(i) for i in range(count)] and len(set(tokens)) == len(tokens)
    assert fields["tokenizer.ggml.scores"][:count] == [pieces.GetScore(i) for i in range(count)]
    assert len(tokens) == read_json(f"{tiny[mode]}/config.json")["padded_vocab_size"]
    assert tokens.index("<sop>") == tokenizers[mode].get_command("sop") and "sop" not in tokens[count:]
    types = fields["tokenizer.ggml.token_type"]
    assert types[tokens.index("\n")] == gguf.NORMAL and types[tokens.index("[gMASK]")] == gguf.CONTROL
    stops = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    assert [stop for stop in stops if stop is not None] == tokenizers[mode].stop_token_ids
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.add_space_prefix"] is True


# By these llama.cpp would recognise templates of its own where it does not run a template: src/llama-chat.cpp
WORDS = ("[gMASK]<sop>", "[gMASK]sop", "<|assistant|>", "<|user|>", "<|im_start|>", "[INST]", "<|end|>")


@pytest.mark.parametrize("mode", MODES)
def test_the_template_writes_the_same_prompts_and_looks_like_no_other(tiny, tmp_path, mode):
    fast = AutoTokenizer.from_pretrained(convert(mode, tiny[mode], tmp_path / "tokenizer", "--tokenizer_only"))
    template = gguf.chat_template(mode)
    assert not any(word in template for word in WORDS) and "//" not in template  # which llama.cpp does not divide by
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    turns = [("user", "水泵漏水"), ("assistant", " 先查。\n"), ("user", "")]
    talk = [{"role": role, "content": content} for role, content in turns]
    talks = [(talk[:1], None), (talk, None), (talk[:2], None)]
    if mode == "glm3":
        talks += [([{"role": "system", "content": "助手"}, *talk], [{"name": "查询"}]), (talk[:1], [{"name": "f"}])]
    for messages, tools in talks:
        for asks in (True, False) if messages[-1]["role"] == "user" else (False,):
            expected = fast.apply_chat_template(messages, tools=tools, add_generation_prompt=asks, tokenize=False)
            made = environment.from_string(template).render(messages=messages, tools=tools, add_generation_prompt=asks)
            assert made == expected


def test_an_adapter_adds_the_same(tiny, load, tmp_path, capsys):
    for mode, more in (("glm2", {}), ("glm3", {"use_rslora": True})):
        base = make(tiny, mode, tmp_path / mode, multi_query_attention=mode == "glm2")
        names = ["query_key_value", "dense_4h_to_h"]
        model = get_peft_model(
            MODE[mode].model.from_pretrained(base), LoraConfig(r=3, lora_alpha=5, target_modules=names, **more)
        )
        for weight in model.parameters():
            torch.nn.init.normal_(weight)
        model.save_pretrained(tmp_path / f"{mode}-adapter")
        adapter = read_adapter(str(tmp_path / f"{mode}-adapter"))
        reader = write(mode, adapter.folder, tmp_path / f"{mode}-gguf", "--ori_model_dir", str(base))
        found, fields = tensors_of(reader), fields_of(reader)
        assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
        whole = tensors_of(write(mode, base, tmp_path / f"{mode}-base"))
        native = convert(mode, base, tmp_path / f"{mode}-native")
        moved = convert(mode, adapter.folder, tmp_path / f"{mode}-moved", "--ori_model_dir", str(native))
        moved = read_adapter(str(moved))
        assert len(found) == 2 * len(adapter.pairs)
        for name in adapter.pairs:
            there = gguf.tensor_names([name], 4)[name]
            a, b = found[f"{there}.lora_a"], found[f"{there}.lora_b"]
            update = fields["adapter.lora.alpha"] / len(a) * (b @ a)
            expected = torch.cat([moved.update(part) for part in native_names(name)])
            assert update.shape == whole[there].shape and torch.allclose(update, expected, rtol=1e-4, atol=1e-4)
        again = tensors_of(write(mode, moved.folder, tmp_path / f"{mode}-again", "--ori_model_dir", str(native)))
        assert again.keys() == found.keys() and all(torch.equal(again[name], found[name]) for name in found)
        assert "--dtype" in refusal(capsys, mode, adapter.folder, tmp_path / "no", "--dtype", "float16")


def test_what_llama_cpp_cannot_have_is_refused(tiny, tmp_path, capsys, monkeypatch):
    assert "chatglm.cpp" in refusal(capsys, "glm", tiny["glm"], tmp_path / "no")
    tuned = make(tiny, "glm3", tmp_path / "tuned", pre_seq_len=4, prefix_projection=False)
    assert "llama.cpp has no place for its prefix" in refusal(capsys, "glm3", tuned, tmp_path / "no")
    wide = make(tiny, "glm3", tmp_path / "wide", kv_channels=24)
    assert "hidden_size" in refusal(capsys, "glm3", wide, tmp_path / "no")
    large = make(tiny, "glm3", tmp_path / "large")
    model = MODE["glm3"].model.from_pretrained(large)
    model.transformer.output_layer.weight.data[5] = 1e6
    model.save_pretrained(large)
    assert "output_layer.weight has values" in refusal(capsys, "glm3", large, tmp_path / "no", "--dtype", "float16")
    dora = get_peft_model(model, LoraConfig(r=2, target_modules=["dense"], use_dora=True, init_lora_weights=False))
    dora.save_pretrained(tmp_path / "dora")
    flags = ("--ori_model_dir", tiny["glm3"])
    assert "DoRA" in refusal(capsys, "glm3", tmp_path / "dora", tmp_path / "no", *flags)
    write_json(str(tmp_path / "dora/base.json"), {"quantization_bit": 4})
    assert "4 bits" in refusal(capsys, "glm3", tmp_path / "dora", tmp_path / "no", *flags)
    assert "does nothing" in refusal(capsys, "glm3", tiny["glm3"], tmp_path / "no", *flags)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(capsys, "glm3", tmp_path / "empty", tmp_path / "no")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert f"pip install {gguf.PACKAGE}" in refusal(capsys, "glm3", tiny["glm3"], tmp_path / "no")
    assert os.listdir(tmp_path / "empty") == []
