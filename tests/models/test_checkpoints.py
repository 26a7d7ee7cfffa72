"""Checkpoint folders as they come: of old releases, half downloaded, put together, with other programs' files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from test_models import change_config

from glm_models import MODE, CheckpointError, check_family
from glm_models.checkpoint import write_side_files
from glm_models.rotary import glm2_angles
from tuning.arguments.models import Model
from tuning.engine.loading import load_base, load_result, load_tokenizer
from tuning.errors import UserError

modes = pytest.mark.parametrize("mode", list(MODE))
newer = pytest.mark.parametrize("mode", ["glm2", "glm3"])
VOCABULARY = {mode: family.tokenizer.vocab_files_names["vocab_file"] for mode, family in MODE.items()}
TEXTS = ["你好，发动机怠速不稳", "a  b\n\tc", "水泵 漏水 12.6", "𠮷 é ☃", "[gMASK]<sop>你好<eop>", "", "   " * 40]


@pytest.fixture
def copy(tiny, tmp_path):
    """copy(mode, **config): a copy of a tiny checkpoint, keys of its config.json changed."""

    def copied(mode: str, **config) -> Path:
        folder = Path(shutil.copytree(tiny[mode], tmp_path / f"copy-{mode}"))
        change_config(folder, **config)
        return folder

    return copied


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def add_weights(folder: Path, weights: dict[str, torch.Tensor], alone: bool = False) -> None:
    path = folder / "model.safetensors"
    save_file(weights if alone else load_file(path) | weights, path, metadata={"format": "pt"})


def prefix_weights(mode: str, folder: Path, length: int, projection: bool) -> dict[str, torch.Tensor]:
    config = MODE[mode].config.from_pretrained(folder, pre_seq_len=length, prefix_projection=projection)
    with torch.device("meta"):
        model = MODE[mode].model(config)
    return {name: torch.ones(p.shape) for name, p in model.named_parameters() if "prefix_encoder" in name}


def logits(mode: str, folder) -> torch.Tensor:
    ids = torch.tensor([load_tokenizer(mode, str(folder)).encode_prompt("发动机怠速不稳")])
    with torch.no_grad():
        return load_base(mode, str(folder), torch.float32).eval()(ids).logits


def refused(mode: str, folder, **config) -> str:
    """What is said of a folder when its tokenizer and its model are loaded."""
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(mode, str(folder))
        load_base(mode, str(folder), torch.float32, **config)
    assert "\n" not in str(error.value)
    return str(error.value)


# Releases of ChatGLM-6B


def test_the_first_release_names_neither_mask_ids_nor_padding():
    first = MODE["glm"].config(vocab_size=150528, bos_token_id=150004, eos_token_id=150005)
    assert (first.mask_token_id, first.gmask_token_id, first.pad_token_id) == (150000, 150001, 20003)
    later = MODE["glm"].config()
    assert (later.mask_token_id, later.gmask_token_id, later.pad_token_id) == (130000, 130001, 3)


def fields_of(content: bytes) -> list[tuple[int, bytes]]:
    """Number and bytes of each field of a protocol buffer that has none but strings and messages."""
    found, start = [], 0
    while start < len(content):
        place, length, shift = start + 1, 0, 0
        while True:
            byte = content[place]
            length, place, shift = length | (byte & 127) << shift, place + 1, shift + 7
            if byte < 128:
                break
        found.append((content[start] >> 3, content[start : place + length]))
        start = place + length
    return found


def release_files(path: str, with_bytes: bool) -> tuple[bytes, bytes, int]:
    """An ice_text.model as the first release has it, as later ones do, and how many pieces of text both have.

    Args:
        with_bytes: the first one holds the 256 bytes among the pieces of text.
    """
    content, vocabulary = Path(path).read_bytes(), sentencepiece.SentencePieceProcessor(model_file=path)
    names = [vocabulary.IdToPiece(i) for i in range(vocabulary.GetPieceSize())]
    late = [*MODE["glm"].tokenizer.special_tokens, "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    late += [] if with_bytes else [f"<0x{n:02X}>" for n in range(256)]
    fields = fields_of(content)
    pieces = dict(zip(names, (part for field, part in fields if field == 1), strict=True))
    rest = b"".join(part for field, part in fields if field != 1)
    text = [part for name, part in pieces.items() if name not in late]
    no_bytes = b"" if with_bytes else b"\x12\x03\x98\x02\x00"  # trainer_spec { byte_fallback: false }
    first = b"".join(text) + rest + no_bytes
    return first, b"".join([*text, *(pieces[name] for name in late)]) + rest, len(text)


FIRST_TOKENS = {"bos_token": "<sop>", "eop_token": "<eop>", "eos_token": "</s>", "gmask_token": "[gMASK]"}
FIRST_TOKENS |= {"mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>", "do_lower_case": False}


@pytest.mark.parametrize("with_bytes", [False, True])
def test_the_first_release_adds_its_special_tokens_behind_the_pieces_of_text(with_bytes, tiny, tmp_path):
    first, later, size = release_files(f"{tiny['glm']}/ice_text.model", with_bytes)
    assert len(first) < len(later)
    tokenizers = []
    for content in (first, later):
        (tmp_path / "ice_text.model").write_bytes(content)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(FIRST_TOKENS))
        tokenizers.append(MODE["glm"].tokenizer.from_pretrained(tmp_path))
    one, other = tokenizers
    assert one.gmask_token_id == 20000 + size + 1 and one.stop_token_ids == [20000 + size + 5]
    assert one.get_vocab() == other.get_vocab()
    for text in TEXTS:
        assert one.encode_prompt(text) == other.encode_prompt(text)
        assert one(text)["input_ids"] == other(text)["input_ids"]
        assert one.decode(one.encode_text(text)) == other.decode(other.encode_text(text))


def test_the_first_release_has_the_right_positions(tiny, copy):
    first, _, size = release_files(f"{tiny['glm']}/ice_text.model", with_bytes=False)
    bos = 20000 + size + 4
    folder = copy("glm", vocab_size=bos + 400, bos_token_id=bos, eos_token_id=bos + 1, pad_token_id=20003, num_layers=1)
    change_config(folder, drop=["gmask_token_id", "mask_token_id"])
    (folder / "ice_text.model").write_bytes(first)
    (folder / "tokenizer_config.json").write_text(json.dumps(FIRST_TOKENS))
    tokenizer = load_tokenizer("glm", str(folder))
    model = MODE["glm"].model(MODE["glm"].config.from_pretrained(folder))
    ids = torch.tensor([[*tokenizer.encode_prompt("水泵"), *tokenizer.encode_answer("漏水"), tokenizer.eos_token_id]])
    context = tokenizer.context_length(ids[0].tolist())
    positions = model.transformer.position_ids(ids, torch.ones_like(ids))[0].tolist()
    answer = ids.shape[1] - context
    assert positions == [[*range(context), *[context - 1] * answer], [*[0] * context, *range(1, answer + 1)]]


def test_a_vocabulary_with_half_of_the_special_tokens_is_refused(tiny, copy):
    folder = copy("glm")
    content = (folder / "ice_text.model").read_bytes()
    (folder / "ice_text.model").write_bytes(content.replace(b"[gMASK]", b"[gMUSK]"))
    assert "ice_text.model has no [gMASK]" in refused("glm", folder)


# Ids of config.json and of the tokenizer


KEYS = {"glm": ["bos", "eos", "pad", "gmask", "mask"], "glm2": ["bos", "eos", "pad"], "glm3": ["bos", "eos", "pad"]}


@pytest.mark.parametrize(("mode", "key"), [(mode, key) for mode, keys in KEYS.items() for key in keys])
def test_ids_of_another_release_are_refused(mode, key, copy, tokenizers):
    folder = copy(mode, **{f"{key}_token_id": 77})
    message = refused(mode, folder)
    right = tokenizers[mode].config_ids()[f"{key}_token_id"]
    assert f"{key}_token_id is 77" in message and str(min(right)) in message and "different releases" in message
    if mode != "glm":  # nothing there reads what it is where it says nothing
        change_config(folder, **{f"{key}_token_id": None})
        load_tokenizer(mode, str(folder))


@modes
def test_lists_of_end_tokens_hold_those_that_end_an_answer(mode, copy, tokenizers):
    folder = copy(mode, eos_token_id=tokenizers[mode].stop_token_ids)
    load_tokenizer(mode, str(folder))
    change_config(folder, eos_token_id=[*tokenizers[mode].stop_token_ids, 77])
    assert "eos_token_id is [" in refused(mode, folder)


def test_text_ids_that_are_moved_in_one_place_only(copy):
    folder = copy("glm")
    change_json(folder / "tokenizer_config.json", num_image_tokens=20000)
    assert "different releases" in refused("glm", folder)


@modes
def test_vocabularies_larger_or_far_smaller_than_the_embedding(mode, copy, tokenizers, capsys):
    key = "vocab_size" if mode == "glm" else "padded_vocab_size"
    tokens = tokenizers[mode].vocab_size
    folder = copy(mode, **{key: tokens - 1})
    assert f"the embedding has {tokens - 1} rows, the largest id" in refused(mode, folder)
    change_config(folder, **{key: tokens + 1500})
    load_tokenizer(mode, str(folder))
    assert "may be another model's" in capsys.readouterr().out
    change_config(folder, **{key: tokens})
    load_tokenizer(mode, str(folder))
    assert not capsys.readouterr().out


# rope_ratio


def test_rope_ratio_has_two_meanings():
    """ChatGLM2-6B-32K divides positions by it; ChatGLM3 multiplies the base, which is 10000."""
    sizes = {"kv_channels": 16, "rope_ratio": 4.0}
    positions, steps = torch.tensor([[0, 7, 1000]]), torch.arange(0, 8, 2) / 8
    expected = {
        "glm2": positions[0, :, None] / 4 / 10000**steps,
        "glm3": positions[0, :, None] / 40000**steps,
    }
    for mode, angles in expected.items():
        found = glm2_angles(MODE[mode].config(**sizes), positions)[0, :, 0, 0]
        torch.testing.assert_close(found, angles, atol=1e-4, rtol=0)


@newer
def test_rope_ratio_with_a_cache_and_padding(mode, load, tokenizers):
    """Positions go on behind what the cache holds, and start at 0 behind padding."""
    model, tokenizer = load(mode, rope_ratio=3), tokenizers[mode]
    prompts = [tokenizer.encode_prompt(text) for text in ("水泵漏水", "发动机怠速不稳，拆开水泵")]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**batch, use_cache=True, **options)
    assert cached.equal(model.generate(**batch, use_cache=False, **options))
    alone = model.generate(torch.tensor([prompts[0]]), **options)
    assert alone[0, len(prompts[0]) :].equal(cached[0, batch["input_ids"].shape[1] :])


# tokenizer_config.json


@modes
def test_padding_is_on_the_left_whatever_the_file_says(mode, tiny, copy, tmp_path, tokenizers):
    folder = copy(mode)
    change_json(folder / "tokenizer_config.json", padding_side="right", truncation_side="left", init_inputs=[1])
    tokenizer = load_tokenizer(mode, str(folder))
    rows = {"input_ids": [[5, 6, 7], [8]]}
    assert tokenizer.pad(rows)["input_ids"] == tokenizers[mode].pad(rows)["input_ids"]
    assert tokenizer.pad(rows)["input_ids"][1][0] == tokenizer.pad_token_id
    (tmp_path / "result").mkdir()
    write_side_files(str(tmp_path / "result"), str(folder), mode, torch.float32, [2])
    kept = json.loads((tmp_path / "result" / "tokenizer_config.json").read_text())
    assert kept["padding_side"] == "left"  # official tokenizers stop at any other
    original = Path(tiny[mode], "tokenizer_config.json").read_bytes()
    write_side_files(str(tmp_path / "result"), tiny[mode], mode, torch.float32, [2])
    assert (tmp_path / "result" / "tokenizer_config.json").read_bytes() == original


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_lower_case", True),
        ("remove_space", True),
        ("eos_token", "</s>"),
        ("bos_token", {"content": "<s>"}),
        ("gmask_token", "[MASK]"),
        ("pad_token", 3),
        ("num_image_tokens", "0"),
        ("num_image_tokens", -1),
        ("num_image_tokens", True),
    ],
)
def test_settings_that_would_change_ids_are_refused(key, value, copy):
    folder = copy("glm")
    change_json(folder / "tokenizer_config.json", **{key: value})
    message = refused("glm", folder)
    assert "tokenizer_config.json" in message and key in message


def test_encode_special_tokens_must_be_true_or_false(copy):
    folder = copy("glm3")
    change_json(folder / "tokenizer_config.json", encode_special_tokens="yes")
    assert "encode_special_tokens 'yes' must be" in refused("glm3", folder)


@modes
def test_json_files_of_other_tokenizers_do_nothing(mode, copy, tokenizers):
    folder = copy(mode)
    for name in ("added_tokens.json", "tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).write_text('{"a":')
    assert load_tokenizer(mode, str(folder)).get_vocab() == tokenizers[mode].get_vocab()
    for content in ('{"a":', "[" * 100_000, "[1]", "\ufeff{}"):
        (folder / "tokenizer_config.json").write_text(content)
        assert "tokenizer_config.json" in refused(mode, folder)


# Prefixes


@modes
@pytest.mark.parametrize("projection", [False, True])
def test_only_ptuning_makes_a_prefix(mode, projection, copy, capsys):
    prefix = {"pre_seq_len": 4, "prefix_projection": projection}
    folder = copy(mode, **prefix)
    assert "there is none among the weights" in refused(mode, folder)
    with pytest.raises(CheckpointError, match="none among the weights"):
        load_result(mode, str(folder), None, torch.device("cpu"))
    load_base(mode, str(folder), torch.bfloat16, **prefix)
    assert "a new one is made" in capsys.readouterr().out
    change_config(folder, pre_seq_len=None)
    load_base(mode, str(folder), torch.float32, **prefix)
    assert not capsys.readouterr().out


@modes
def test_a_prefix_keeps_its_length_and_kind(mode, copy):
    folder = copy(mode, pre_seq_len=3, prefix_projection=True)
    weights = prefix_weights(mode, folder, 3, True)
    add_weights(folder, weights)
    load_base(mode, str(folder), torch.float32)
    load_base(mode, str(folder), torch.float32, pre_seq_len=3, prefix_projection=True)
    message = refused(mode, folder, pre_seq_len=16, prefix_projection=True)
    assert "has pre_seq_len 3" in message and "asked for are pre_seq_len 16" in message
    message = refused(mode, folder, pre_seq_len=3, prefix_projection=False)
    assert "prefix_projection true, but asked for are pre_seq_len 3, prefix_projection false" in message


@modes
def test_a_prefix_is_there_as_a_whole(mode, copy):
    folder = copy(mode, pre_seq_len=3, prefix_projection=True)
    weights = prefix_weights(mode, folder, 3, True)
    lost = next(name for name in weights if name.endswith("trans.2.bias"))
    add_weights(folder, {name: weight for name, weight in weights.items() if name != lost})
    assert "weights of the P-Tuning prefix are missing" in refused(mode, folder)


@modes
def test_a_prefix_alone_is_named(mode, copy):
    folder = copy(mode, pre_seq_len=3, prefix_projection=True, _name_or_path="base\x1b[31m")
    weights = prefix_weights(mode, folder, 3, True)
    add_weights(folder, weights, alone=True)
    for changes in ({}, {"pre_seq_len": 3, "prefix_projection": True}):
        message = refused(mode, folder, **changes)
        assert "holds a P-Tuning prefix alone" in message and "(--ori_model_dir)" in message
        assert "\\x1b[31m" in message and "\x1b" not in message


# Failed downloads, and folders that are something else


LEFT = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1018370\n", "git lfs pull"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page"),
    "error": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "is a web page"),
    "nothing": (b"", "is empty"),
}


@modes
@pytest.mark.parametrize("kind", LEFT)
def test_what_failed_downloads_leave_is_named(mode, kind, tiny, copy):
    content, says = LEFT[kind]
    folder = copy(mode)
    for name in (
        "config.json",
        "tokenizer_config.json",
        VOCABULARY[mode],
        "model.safetensors",
        "generation_config.json",
    ):
        (folder / name).write_bytes(content)
        message = refused(mode, folder)
        assert name in message and says in message
        if os.path.exists(f"{tiny[mode]}/{name}"):
            shutil.copy(f"{tiny[mode]}/{name}", folder / name)
        else:
            os.remove(folder / name)
    os.remove(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(content)
    assert says in refused(mode, folder)
    os.remove(folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_bytes(content)
    assert "index.json" in refused(mode, folder)


@modes
def test_vocabularies_that_are_none(mode, tiny, copy):
    folder = copy(mode)
    path = folder / VOCABULARY[mode]
    content = path.read_bytes()
    path.write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert "vocabulary of GLM-4" in refused(mode, folder)
    end = len(fields_of(content)[-1][1])  # the last field; without it SentencePiece still reads the file
    for broken in (content[:-end], content[: len(content) // 2], content[:100], b"\0" * 100, b"{}", b"\xff" * 300):
        path.write_bytes(broken)
        assert f"{VOCABULARY[mode]} is not a SentencePiece model" in refused(mode, folder)


@modes
def test_a_base_with_an_adapter_beside_it_is_refused(mode, tiny, copy):
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        folder = copy(mode)
        (folder / name).write_text("{}")
        assert f"holds a model and a LoRA adapter ({name})" in refused(mode, folder)
        with pytest.raises(CheckpointError, match="merge_lora"):
            MODE[mode].model.from_pretrained(folder)
        shutil.rmtree(folder)


@modes
def test_adapters_and_folders_of_runs_are_named(mode, tiny, tmp_path):
    run = tmp_path / "run"
    for name in ("best", "epoch-1-step-5"):
        (run / name).mkdir(parents=True)
    (run / "best" / "adapter_config.json").write_text("{}")
    shutil.copy(f"{tiny[mode]}/config.json", run / "epoch-1-step-5")
    with pytest.raises(CheckpointError, match=r"name one of them \(best, epoch-1-step-5\)"):
        check_family(str(run), mode)
    with pytest.raises(CheckpointError, match="is a LoRA adapter, not a model: merge it first"):
        check_family(str(run / "best"), mode)
    cache = tmp_path / "models--THUDM--chatglm3-6b"
    shutil.copytree(tiny[mode], cache / "snapshots" / "0f1e")
    with pytest.raises(CheckpointError, match="snapshots/0f1e"):
        check_family(str(cache), mode)


@modes
def test_a_model_that_is_not_here_is_told_how_to_get(mode):
    name = MODE[mode].config.title.lower()
    way_out = f"modelscope download --model ZhipuAI/{name} --local_dir {name}"
    for load in (
        lambda: load_result(mode, f"./THUDM/{name}", None, torch.device("cpu")),
        lambda: load_tokenizer(mode, f"THUDM/{name}"),
    ):
        with pytest.raises((UserError, CheckpointError), match=f"THUDM/{name}.*given THUDM/{name} or.*{way_out}"):
            load()
    with pytest.raises(ValueError, match="no such folder"):
        Model()(f"./THUDM/{name}")


# Keys of config.json and generation_config.json


@modes
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"load_in_4bit": True, "quant_method": "bitsandbytes"}),
        ("transformers_weights", "evil.safetensors"),
        ("transformers_weights", "../x"),
        ("configuration_files", ["config.4.0.0.json"]),
        ("_attn_implementation", "flex"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("num_hidden_layers", 2),
    ],
)
def test_keys_that_ask_for_another_model_are_refused(mode, key, value, copy):
    message = refused(mode, copy(mode, **{key: value}))
    assert "config.json" in message and key in message


ODD_KEYS = {"experts_implementation": "evil", "tp_plan": {"a": "b"}, "num_labels": 10**9, "id2label": {"a": 3}}
ODD_KEYS |= {"per_layer_config": [1], "is_encoder_decoder": True, "output_attentions": True, "num_groups": 3}
ODD_KEYS |= {"to_dict": 1, "name_or_path": 3, "_attn_implementation_internal": "x", "max_length": "x", "return_dict": 0}
ODD_KEYS |= {"base_model_tp_plan": 3, "_experts_implementation": "x", "a\x1b[31m": 1, "classifier_dropout": None}
ODD_GENERATION = {"assistant_model": "x", "max_new_tokens": "x", "cache_implementation": "evil", "stop_strings": ["a"]}
ODD_GENERATION |= {
    "watermarking_config": {"bias": 1},
    "num_beams": 7,
    "do_sample": True,
    "custom_generate": "evil/code",
}
ODD_GENERATION |= {"repetition_penalty": 9.0, "min_new_tokens": 40, "bad_words_ids": [[5]], "temperature": 0.1}


@modes
def test_other_keys_change_nothing_and_are_not_handed_on(mode, copy, tiny, tmp_path, tokenizers):
    folder = copy(mode, **ODD_KEYS)
    change_json(folder / "generation_config.json", **ODD_GENERATION)
    assert logits(mode, folder).equal(logits(mode, tiny[mode]))
    prompt, options = torch.tensor([tokenizers[mode].encode_prompt("水泵")]), {"do_sample": False, "max_new_tokens": 5}
    odd, clean = (load_base(mode, str(f), torch.float32).eval() for f in (folder, tiny[mode]))
    assert odd.generate(prompt, **options).equal(clean.generate(prompt, **options))
    (tmp_path / "result").mkdir()
    write_side_files(str(tmp_path / "result"), str(folder), mode, torch.float32, [2])
    kept = json.loads((tmp_path / "result" / "config.json").read_text()).keys()
    assert "auto_map" in kept and kept.isdisjoint({"experts_implementation", "tp_plan", "per_layer_config", "to_dict"})
    kept = json.loads((tmp_path / "result" / "generation_config.json").read_text()).keys()
    assert "do_sample" in kept and kept.isdisjoint({"assistant_model", "custom_generate", "watermarking_config"})


@modes
@pytest.mark.parametrize(
    ("content", "says"),
    [("[]", "JSON object"), ('{"eos_token_id": "x"}', "eos_token_id must be"), ('{"a":', "not valid JSON")]
    + [('{"pad_token_id": [0]}', "pad_token_id must be"), ('{"eos_token_id": []}', "eos_token_id must be")],
)
def test_broken_generation_configs(mode, content, says, copy):
    folder = copy(mode)
    (folder / "generation_config.json").write_text(content)
    message = refused(mode, folder)
    assert "generation_config.json" in message and says in message


@pytest.mark.parametrize(
    ("mode", "found", "kept"),
    [
        ("glm3", "THUDM/chatglm3-6b-32k", "THUDM/chatglm3-6b-32k"),
        ("glm3", "/home/me/models/chatglm3-6b", "THUDM/chatglm3-6b"),
        ("glm3", None, "THUDM/chatglm3-6b"),
        ("glm2", "zai-org/chatglm2-6b", "THUDM/chatglm2-6b"),
        ("glm", "THUDM/chatglm-6b", "THUDM/chatglm-6b"),
    ],
)
def test_results_name_the_official_model(mode, found, kept, copy, tmp_path):
    """llama.cpp's converter knows ChatGLM3's vocabulary by this key, and --mode is checked by it."""
    folder = copy(mode, _name_or_path=found)
    (tmp_path / "result").mkdir()
    write_side_files(str(tmp_path / "result"), str(folder), mode, torch.float32, [2])
    assert json.loads((tmp_path / "result" / "config.json").read_text())["_name_or_path"] == kept


# What is printed


@modes
def test_names_from_files_cannot_write_on_the_terminal(mode, copy):
    folder = copy(mode)
    add_weights(folder, {"\x1b[2J\n\u202eerror: x": torch.zeros(2)})
    message = refused(mode, folder)
    assert "\\x1b[2J\\n\\u202eerror" in message and message.isprintable()
    assert "模型" in str(CheckpointError("模型\t"))
