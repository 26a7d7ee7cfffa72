"""Numbers of the original code, run unchanged on tiny checkpoints, against this project's.

The golden folder is not part of the project (its tokenizers and texts come from public data sets): the environment
variable GLM_GOLDEN_DIR names it. Tolerances are those of its README. Where the project differs from the original on
purpose, a table at the top of the test names the difference and the reason, and the test asserts what happens instead.
"""

import hashlib
import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from glm_models import MODE
from glm_models.attention import visible_mask
from glm_models.convert.__main__ import main as convert

if not os.environ.get("GLM_GOLDEN_DIR"):
    pytest.skip("GLM_GOLDEN_DIR does not name the folder of golden data", allow_module_level=True)
GOLDEN = Path(os.environ["GLM_GOLDEN_DIR"])

LOGITS = {"atol": 1e-4, "rtol": 0}
LOSS = {"atol": 1e-5, "rtol": 0}
GRADIENT = {"atol": 5e-6, "rtol": 1e-4}
HIDDEN = {"glm": {"atol": 5e-4, "rtol": 0}, "glm2": {"atol": 1e-4, "rtol": 0}, "glm3": {"atol": 1e-4, "rtol": 0}}
GRADIENT_NORM = 2e-4  # relative
CLEAR_MARGIN = 1e-3  # argmax is compared where the two best logits are further apart

modes = pytest.mark.parametrize("mode", MODE)


@cache
def read(mode, name):
    return json.loads((GOLDEN / mode / name).read_text(encoding="utf-8"))


@cache
def tensors(mode, name):
    return load_file(GOLDEN / mode / name)


def load(mode, **config):
    """A fresh model in eval mode."""
    folder = GOLDEN / mode / "checkpoint"
    config = MODE[mode].config.from_pretrained(folder, **config)
    if config.num_layers != MODE[mode].config.from_pretrained(folder).num_layers:  # the first layers alone
        model = MODE[mode].model(config)
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return model.eval()
    return MODE[mode].model.from_pretrained(folder, config=config).eval()


@cache
def base(mode):
    """The model as it is; not to be changed."""
    return load(mode)


@cache
def tokenizer(mode, **kwargs):
    return MODE[mode].tokenizer.from_pretrained(GOLDEN / mode / "checkpoint", **kwargs)


def part(mode, name, prefix):
    """The tensors of one case, without its prefix."""
    found = tensors(mode, name)
    case = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return {**case, "vocab_cols": found["vocab_cols"]}


def call_arguments(mode, case):
    """The model's arguments: glm takes a 2-D mask and makes its positions itself."""
    names = ("input_ids", "labels") if mode == "glm" else ("input_ids", "labels", "attention_mask", "position_ids")
    arguments = {name: case[name] for name in names if name in case}
    if mode == "glm" and "attention_mask" in case:
        arguments["attention_mask"] = (case["input_ids"] != 3).long()
    return arguments


def assert_logits(logits, case):
    valid = case.get("valid", torch.ones(logits.shape[:2])).bool()
    if "logits" in case:
        torch.testing.assert_close(logits[valid], case["logits"][valid], **LOGITS)
        return
    torch.testing.assert_close(logits[..., case["vocab_cols"]][valid], case["logits_cols"][valid], **LOGITS)
    torch.testing.assert_close(logits.logsumexp(-1)[valid], case["logsumexp"][valid], **LOGITS)
    clear = valid & (case["margin"] > CLEAR_MARGIN)
    assert clear.any()
    assert logits.argmax(-1)[clear].equal(case["argmax"][clear])


def assert_norms(named_parameters, norms):
    """Gradients of exactly these parameters, with these norms."""
    mine = {name: p.grad.norm().item() for name, p in named_parameters if p.grad is not None}
    assert mine.keys() == norms.keys()
    assert mine == pytest.approx(norms, rel=GRADIENT_NORM)


def assert_gradients(named_parameters, case):
    expected = {key.removeprefix("grad."): value for key, value in case.items() if key.startswith("grad.")}
    assert expected
    named = dict(named_parameters)
    for name, gradient in expected.items():
        torch.testing.assert_close(named[name].grad, gradient, **GRADIENT, msg=lambda text, n=name: f"{n}: {text}")


def tuples(history):
    """History as chat takes it, from json: pairs are tuples, messages dicts."""
    return [tuple(turn) if isinstance(turn, list) else dict(turn) for turn in history]


def test_files_are_the_golden_ones():
    lines = (GOLDEN / "SHA256SUMS").read_text().splitlines()
    assert lines
    for line in lines:
        digest, name = line.split(maxsplit=1)
        assert hashlib.sha256((GOLDEN / name.lstrip("*")).read_bytes()).hexdigest() == digest, name


# Forward and backward.

# case: (what the project computes: the golden case it must equal, why)
FORWARD_DIFFERENCES = {
    "layers3_alpha_as_is": ("layers3_alpha_config", "the original takes 28 layers for the residual scale, always"),
    "mask_and_gmask_tokenizer": ("mask_and_gmask_model", "the original's tokenizer and model choose different masks"),
}
FORWARD_CASES = [(mode, case) for mode in MODE for case in read(mode, "forward.json")["cases"]]


@pytest.mark.parametrize(("mode", "name"), FORWARD_CASES)
def test_forward(mode, name):
    overrides = read(mode, "forward.json")["cases"][name]["config_overrides"]
    case = part(mode, "forward.safetensors", f"{name}.")
    model = load(mode, **overrides) if overrides else base(mode)
    with torch.no_grad():
        output = model(**call_arguments(mode, case), output_hidden_states=True, use_cache=False)
    if name in FORWARD_DIFFERENCES:
        other, reason = FORWARD_DIFFERENCES[name]
        expected = part(mode, "forward.safetensors", f"{other}.")
        assert expected["input_ids"].equal(case["input_ids"])
        assert (expected["logits_cols"] - case["logits_cols"]).abs().max() > 0.1, f"no difference: {reason}"
        case = expected
    assert_logits(output.logits, case)
    if "labels" in case:
        torch.testing.assert_close(output.loss, case["loss"], **LOSS)
    hidden = {int(key.split(".")[1]): value for key, value in case.items() if key.startswith("hidden_states.")}
    if name == "single":
        assert sorted(hidden) == list(range(model.config.num_layers + 1)) and len(output.hidden_states) == len(hidden)
    for i, expected in hidden.items():
        torch.testing.assert_close(output.hidden_states[i], expected.transpose(0, 1), **HIDDEN[mode])


@pytest.mark.parametrize("name", [name for mode, name in FORWARD_CASES if mode == "glm"])
def test_glm_positions_and_mask(name):
    """The original hands 4-D masks (True: hidden) and 2-D positions around; here the model makes both from ids."""
    case = part("glm", "forward.safetensors", f"{FORWARD_DIFFERENCES.get(name, [name])[0]}.")
    overrides = read("glm", "forward.json")["cases"][name]["config_overrides"]
    transformer = (load("glm", **overrides) if overrides else base("glm")).transformer
    ids = case["input_ids"]
    real = (ids != 3).long().cummax(1).values
    positions = case.get("position_ids", case.get("position_ids_from_get_position_ids"))
    hidden = case.get("attention_mask", case.get("mask_from_get_masks"))
    valid = case.get("valid", torch.ones_like(ids)).bool()
    if positions is not None:
        mine = transformer.position_ids(ids, real).transpose(1, 2)
        positions = positions[:, None] if positions.dim() == 2 else positions  # one row without position_encoding_2d
        assert mine[valid].equal(positions.transpose(1, 2)[valid])
    if hidden is not None:
        context = transformer.context_lengths(ids)
        mine = visible_mask(ids.shape[1], real, transformer.config, torch.float32, context=context)
        assert mine.dtype == torch.bool
        assert mine[:, 0][valid].equal(~hidden[:, 0][valid])


@modes
def test_right_pad_gradients(mode):
    case = part(mode, "forward.safetensors", "right_pad.")
    model = load(mode)
    model(**call_arguments(mode, case)).loss.backward()
    assert_norms(model.named_parameters(), read(mode, "forward.json")["cases"]["right_pad"]["grad_norms"])
    assert_gradients(model.named_parameters(), case)


def test_glm_gradients_without_tying():
    """lm_head of its own: an explicit false in the config."""
    case = part("glm", "forward.safetensors", "right_pad.")
    model = load("glm", tie_word_embeddings=False)
    model(**call_arguments("glm", case)).loss.backward()
    golden = read("glm", "forward.json")["cases"]["right_pad"]
    assert_norms(model.named_parameters(), golden["grad_norms"] | golden["grad_norms_if_untied"])


@modes
def test_rotary_frequencies(mode):
    """What export writes for the original code: its own numbers."""
    if mode != "glm":
        weights = load_file(GOLDEN / mode / "checkpoint" / "model.safetensors")
        buffers = base(mode).official_buffers()
        assert len(buffers) == 1
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, weights[name], atol=0, rtol=0)
        return
    for axes, two_axes in (("1d", False), ("2d", True)):
        buffers = load(mode, position_encoding_2d=two_axes).official_buffers()
        assert len(buffers) == 28
        for buffer in buffers.values():
            assert buffer.float().equal(tensors(mode, "forward.safetensors")[f"rotary_inv_freq_{axes}"].float())


def test_bin_shards_equal_safetensors():
    folder = GOLDEN / "glm" / "checkpoint_bin"
    model = MODE["glm"].model.from_pretrained(folder, dtype=torch.float32)
    expected = base("glm").state_dict()
    mine = model.state_dict()
    assert mine.keys() == expected.keys()
    for name, weight in mine.items():
        assert weight.dtype == torch.float32 and weight.equal(expected[name]), name


# P-Tuning.


def load_prefix(mode, kind):
    found = tensors(mode, f"{kind}.safetensors")
    model = load(mode, **read(mode, "ptuning.json")[kind]["config_overrides"])
    weights = {key: value for key, value in found.items() if key.startswith("transformer.prefix_encoder.")}
    assert weights.keys() == {name for name, _ in model.named_parameters() if "prefix_encoder" in name}
    model.load_state_dict(weights, strict=False)
    model.requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(True)
    return model


def assert_trains_alike(model, case, grad_norms):
    """Logits, loss, and the gradients of what trains. Returns the model's output."""
    output = model(input_ids=case["input_ids"], labels=case["labels"])
    assert_logits(output.logits, case)
    torch.testing.assert_close(output.loss, case["loss"], **LOSS)
    output.loss.backward()
    assert_norms(model.named_parameters(), grad_norms)
    assert_gradients(model.named_parameters(), case)
    return output


@modes
@pytest.mark.parametrize("kind", ["ptuning_proj", "ptuning_noproj"])
def test_ptuning(mode, kind):
    golden = read(mode, "ptuning.json")[kind]
    model = load_prefix(mode, kind)
    case = part(mode, f"{kind}.safetensors", "")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == golden["trainable_parameters"]

    assert_trains_alike(model, case, golden["grad_norms"])

    left = part(mode, f"{kind}.safetensors", "left_pad.")
    with torch.no_grad():
        assert_logits(model(**call_arguments(mode, left)).logits, left)
        prefixes = model.transformer.prefix_key_values(1)
    for layer in (0, model.config.num_layers - 1):  # [2, batch, heads, pre_seq_len, head_dim]
        expected = case[f"past_key_values.{layer}"].permute(0, 2, 3, 1, 4)
        torch.testing.assert_close(prefixes[layer], expected, atol=1e-5, rtol=0)

    want = golden["generate"]
    tok = tokenizer(mode)
    assert tok(want["prompt"], return_tensors="pt").input_ids.tolist() == want["input_ids"]
    ids = torch.tensor(want["input_ids"])
    for use_cache in (True, False):
        out = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=-1, use_cache=use_cache)
        assert out.tolist() == want["output_ids"]


# LoRA.


@modes
@pytest.mark.parametrize("kind", ["lora_qkv", "lora_all"])
def test_lora(mode, kind):
    """Adapters of an old peft load in plain peft: nothing of this project stands between."""
    golden = read(mode, "lora.json")[kind]
    case = part(mode, f"{kind}.safetensors", "")
    model = PeftModel.from_pretrained(load(mode), GOLDEN / mode / kind, is_trainable=True).eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == golden["trainable_parameters"]
    assert len(trainable) == 2 * golden["targeted_module_count"]

    output = assert_trains_alike(model, case, golden["grad_norms"])

    merged = model.merge_and_unload()
    with torch.no_grad():
        logits = merged(input_ids=case["input_ids"]).logits
    assert_logits(logits, part(mode, f"{kind}.safetensors", "merged."))
    torch.testing.assert_close(logits, output.logits.detach(), **LOGITS)
    names = [key for key in case if key.startswith("merged.transformer.")]
    assert names
    for key in names:
        weight = merged.state_dict()[key.removeprefix("merged.")]
        torch.testing.assert_close(weight, case[key], atol=1e-6, rtol=1e-5)


@modes
def test_lora_bin_adapter(mode, tmp_path):
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(GOLDEN / mode / "lora_qkv" / name, tmp_path)
    model = PeftModel.from_pretrained(load(mode), tmp_path).eval()
    case = part(mode, "lora_qkv.safetensors", "")
    with torch.no_grad():
        assert_logits(model(input_ids=case["input_ids"]).logits, case)


# Generation and chat.


@modes
def test_greedy(mode):
    for want in read(mode, "generate.json")["prompts"]:
        ids = tokenizer(mode)([want["prompt"]], return_tensors="pt").input_ids
        assert ids.tolist() == [want["input_ids"]]
        length = ids.shape[1]
        for use_cache, limit in ((True, {"max_new_tokens": 24}), (False, {"max_length": length + 24})):
            out = base(mode).generate(ids, do_sample=False, use_cache=use_cache, **limit)
            assert out[0, length:].tolist() == want["generated_ids"], (want["prompt"], limit)


@modes
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_batch(mode, use_cache):
    want = read(mode, "generate.json")["batch"]
    tok = tokenizer(mode)
    batch = tok(want["prompts"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == want["input_ids"]
    out = base(mode).generate(
        **batch, do_sample=False, max_new_tokens=24, pad_token_id=tok.pad_token_id, use_cache=use_cache
    )
    assert out.tolist() == want["output_ids"]


CHATS = [(mode, i) for mode in MODE for i in range(len(read(mode, "generate.json")["chat"]))]
CHAT_DIFFERENCES = {
    "glm3": "the original always drops the last id, a real token where max_length was reached, not a stop id; "
    "and it appends the question to the caller's history"
}


@pytest.mark.parametrize(("mode", "i"), CHATS)
def test_chat(mode, i):
    want = read(mode, "generate.json")["chat"][i]
    tok = tokenizer(mode)
    history = tuples(want["history"])
    before = json.dumps(history)
    role = {"role": want["role"]} if "role" in want else {}
    assert tok.encode_prompt(want["query"], history, **role) == want["input_ids"]

    response, new_history = want["response"], tuples(want["new_history"])
    if not want.get("stopped_by_stop_id", True):  # CHAT_DIFFERENCES: the whole answer, its last token too
        assert mode in CHAT_DIFFERENCES and len(want["ids_decoded_by_chat"]) == len(want["generated_ids"]) - 1
        turns = [*history, {"role": want["role"], "content": want["query"]}]
        response, new_history = base(mode).process_response(tok.decode(want["generated_ids"]), turns)
        assert tok.decode(want["generated_ids"]) != want["raw_decoded"]
    if "prompt" in want:
        assert tok.build_prompt(want["query"], history) == want["prompt"]

    for _ in range(2):  # the second call finds the history as it was
        assert base(mode).chat(tok, want["query"], history=history, **role, **want["kwargs"]) == (response, new_history)
    *_, last = base(mode).stream_chat(tok, want["query"], history=history, **role, **want["kwargs"])
    assert last == (response, new_history)
    assert json.dumps(history) == before
    if "passed_history_object_after_call" in want:  # CHAT_DIFFERENCES
        assert json.dumps(want["passed_history_object_after_call"]) != before


@modes
def test_process_response(mode):
    for want in read(mode, "generate.json")["process_response"]:
        if mode == "glm3":
            history = want["history"]
            before = json.dumps(history)
            assert base(mode).process_response(want["in"], history) == (want["out"], want["new_history"])
            assert json.dumps(history) == before
        else:
            assert base(mode).process_response(want["in"]) == want["out"]


def test_glm2_build_prompt():
    for want in read("glm2", "generate.json")["build_prompt"] + read("glm2", "tokenizer.json")["build_prompt"]:
        history = tuples(want["history"] or [])
        assert tokenizer("glm2").build_prompt(want["query"], history) == want["prompt"]
        if "input_ids" in want:
            assert tokenizer("glm2").encode_prompt(want["query"], history) == want["input_ids"]


def test_glm3_build_chat_input():
    for want in read("glm3", "generate.json")["build_chat_input"]:
        mine = tokenizer("glm3").build_chat_input(want["query"], tuples(want["history"]), role=want["role"])
        for key in ("input_ids", "attention_mask", "position_ids"):
            assert mine[key].tolist() == [want[key]]


def test_glm3_build_single_message():
    found = (
        read("glm3", "generate.json")["build_single_message"] + read("glm3", "tokenizer.json")["build_single_message"]
    )
    for want in found:
        ids = tokenizer("glm3").build_single_message(want["role"], want["metadata"], want["message"])
        assert ids == want["ids"]


# Tokenizers.

TOKENIZER_DIFFERENCES = {
    "decode_default_args": "never eats spaces before punctuation, whatever the default of transformers is",
    "hf_version_dependent": "transformers 5 cuts more special tokens out of text than transformers 4 did",
    "id_to_token": "control and special ids of glm2 and glm3 have their names: the original gives '' for several",
    "special tokens": "glm2 and glm3 tell transformers about <unk> and </s>, which the original hid in properties; for "
    "glm transformers 5 counts gmask_token and end_token as special, transformers 4 did not",
    "inner decode": "of glm3 has no counterpart: it drops the word mark after a special token, decode() keeps it",
    "pad_cases": "with both masks present the original's tokenizer takes [MASK], its model and this project [gMASK]",
    "single": "glm returns its mask for one unpadded text too: the original leaves it out",
}


def decodes(tok, case):
    for key, ids, skip in (
        ("decode", case["ids"], False),
        ("decode_skip", case["ids"], True),
        ("decode_with_special", case["encode_with_special"], False),
        ("decode_with_special_skip", case["encode_with_special"], True),
    ):
        assert tok.decode(ids, skip_special_tokens=skip) == case[key], (key, case["text"])


@modes
def test_tokenizer_cases(mode):
    tok = tokenizer(mode)
    for case in read(mode, "tokenizer.json")["cases"]:
        text = case["text"]
        tokens, ids = case["tokens"], case["ids"]
        if case["hf_version_dependent"]:  # TOKENIZER_DIFFERENCES
            newer = case["transformers_5_24"]
            assert newer["ids"] != ids
            tokens, ids = newer["tokens"], newer["ids"]
        else:
            assert tok.encode(text) == case["encode_with_special"], text
            decodes(tok, case)
        assert tok.tokenize(text) == tokens, text
        assert tok.encode(text, add_special_tokens=False) == ids, text
        assert tok.decode(case["ids"]) == case["decode"], text  # TOKENIZER_DIFFERENCES: not decode_default_args


@modes
def test_encode_text_is_the_plain_tokenizer(mode):
    """Text without anything that transformers cuts: prompts are made of the same ids as the original's."""
    tok = tokenizer(mode)
    cases = [c for c in read(mode, "tokenizer.json")["cases"] if not c["hf_split"] and not c["hf_version_dependent"]]
    assert len(cases) > 50
    for case in cases:
        assert tok.encode_text(case["text"]) == case["ids"], case["text"]


def test_glm3_encode_special_tokens():
    tok = tokenizer("glm3", encode_special_tokens=True)
    changed = 0
    for case in read("glm3", "tokenizer.json")["cases"]:
        want = case["encode_special_tokens"]
        assert tok.tokenize(case["text"]) == want["tokens"]
        assert tok.encode(case["text"], add_special_tokens=False) == want["ids"]
        assert tok.decode(want["ids"]) == want["decode"]
        changed += want["ids"] != case["ids"]
    assert changed


@modes
def test_tokenizer_facts(mode):
    tok, want = tokenizer(mode), read(mode, "tokenizer.json")
    assert (tok.vocab_size, len(tok), tok.padding_side) == (want["vocab_size"], want["len"], want["padding_side"])
    assert tok.sp_model.GetPieceSize() == want["sp_vocab_size"]
    for name, (token, i) in want["special"].items():
        assert getattr(tok, name) == token
        assert tok.convert_tokens_to_ids(token) == i
        if name != "end_token":  # this one has no id of its own
            assert getattr(tok, f"{name}_id") == i
    more = {"[gMASK]", "</s>"} if mode == "glm" else {"<unk>", "</s>"}  # TOKENIZER_DIFFERENCES
    assert more.isdisjoint(want["all_special_tokens"])
    assert set(tok.all_special_tokens) == {*want["all_special_tokens"], *more}
    for token, i in want.get("get_command", {}).items():
        assert tok.get_command(token) == i
    if "get_prefix_tokens" in want:
        assert tok.get_prefix_tokens() == want["get_prefix_tokens"]
    for token, i in want["token_to_id"].items():
        assert tok.convert_tokens_to_ids(token) == i, token
    for i, token in want["id_to_token"]:
        mine = tok.convert_ids_to_tokens(i)
        if token == "":  # TOKENIZER_DIFFERENCES
            assert mine and tok.convert_tokens_to_ids(mine) == i
        else:
            assert mine == token
    for row in want["build_inputs_with_special_tokens"]:
        assert tok.build_inputs_with_special_tokens(row["ids0"], row["ids1"]) == row["out"]
    for row in want["pair"]:
        assert tok(row["text"], row["pair"])["input_ids"] == row["input_ids"]


@modes
def test_inner_tokenizer(mode):
    """The original's SPTokenizer has switches; those that have a counterpart here."""
    tok, want = tokenizer(mode), read(mode, "tokenizer.json")
    seen = 0
    for row in want["sp_tokenizer_encode"]:
        if mode != "glm":
            first = [tok.get_command("<bos>")] if row["bos"] else []
            last = [tok.get_command("<eos>")] if row["eos"] else []
            assert first + tok.encode_text(row["text"]) + last == row["ids"]
        elif row["linebreak"] and row["whitespaces"] and row["add_dummy_prefix"]:
            assert tok.encode_text(row["text"]) == row["ids"]
            assert tok.tokenize(row["text"]) == row["tokens"]
        else:
            continue
        seen += 1
    assert seen >= 4
    for row in want.get("sp_tokenizer_decode", []):
        text = tok.decode(row["ids"])
        if mode == "glm3":  # TOKENIZER_DIFFERENCES
            text = text.replace("|> ", "|>").replace("sop ", "sop")
        assert text == row["text"]


def assert_batch(mode, mine, want):
    """glm: the 4-D mask (1: hidden) and positions of the original against those that the model makes from the batch."""
    assert mine["input_ids"].tolist() == want["input_ids"]
    if mode != "glm":
        assert mine["attention_mask"].tolist() == want["attention_mask"]
        assert mine["position_ids"].tolist() == want["position_ids"]
        return
    ids, real = mine["input_ids"], mine["attention_mask"]
    transformer = base("glm").transformer
    valid = real.bool()
    positions = transformer.position_ids(ids, real).transpose(1, 2)
    assert positions[valid].equal(torch.tensor(want["position_ids"]).transpose(1, 2)[valid])
    if "attention_mask" in want:
        context = transformer.context_lengths(ids)
        visible = visible_mask(ids.shape[1], real, transformer.config, torch.float32, context=context)
        assert visible[:, 0][valid].equal(~torch.tensor(want["attention_mask"]).bool()[:, 0][valid])


@modes
def test_tokenizer_batches(mode):
    for want in read(mode, "tokenizer.json")["batches"]:
        mine = tokenizer(mode)(want["texts"], return_tensors="pt", **want["kwargs"])
        assert_batch(mode, mine, want)


@modes
def test_tokenizer_single(mode):
    want = read(mode, "tokenizer.json")
    plain, as_tensor = want["single_unpadded"], want["single_unpadded_return_tensors"]
    mine = tokenizer(mode)(plain["text"])
    mine_tensor = tokenizer(mode)(as_tensor["text"], return_tensors="pt")
    for key in plain["keys"]:
        assert mine[key] == plain[key]
        assert mine_tensor[key].tolist() == as_tensor[key]
    extra = set(mine) - set(plain["keys"])
    assert extra == ({"attention_mask"} if mode == "glm" else set())  # TOKENIZER_DIFFERENCES
    assert set(mine["attention_mask"]) == {1}


def test_glm_pad_cases():
    for want in read("glm", "tokenizer.json")["pad_cases"]:
        encoded = {"input_ids": [want["input_ids"]]}
        mine = tokenizer("glm").pad(encoded, padding="max_length", max_length=want["max_length"], return_tensors="pt")
        out = {key.removeprefix("out_"): value for key, value in want.items() if "out_" in key}
        if {1656, 1657} <= set(want["input_ids"]):  # TOKENIZER_DIFFERENCES
            positions, blocks = out["position_ids"][0]
            mask, gmask = (want["input_ids"].index(i) for i in (1656, 1657))
            assert {p for p, block in zip(positions, blocks, strict=True) if block} == {mask}
            out["position_ids"] = [[[gmask if b else p for p, b in zip(positions, blocks, strict=True)], blocks]]
        assert_batch("glm", mine, out)


@pytest.mark.parametrize("count", ["7", "20000"])
def test_glm_num_image_tokens(count):
    want = read("glm", "tokenizer.json")["num_image_tokens"][count]
    tok = tokenizer("glm", num_image_tokens=int(count))
    assert tok.vocab_size == want["vocab_size"]
    for token, i in want["token_to_id"].items():
        assert tok.convert_tokens_to_ids(token) == i, token
    for i, token in want["id_to_token"]:
        assert tok.convert_ids_to_tokens(i) == token
    for name, i in want["special_ids"].items():
        assert tok.convert_tokens_to_ids(getattr(tok, name)) == i
    for case in want["cases"]:
        assert tok.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tok.encode_text(case["text"]) == case["ids"]
        assert tok.encode(case["text"]) == case["encode_with_special"]
        assert tok.decode(case["ids"]) == case["decode"]
    for row in want["sp_tokenizer_decode_with_image_ids"]:
        assert tok.decode(row["ids"]) == row["text"]
    batch = tok(want["batch"]["texts"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == want["batch"]["input_ids"]
    shift = int(count)
    config = base("glm").config
    moved = {f"{name}_token_id": getattr(config, f"{name}_token_id") + shift for name in ("bos", "mask", "gmask")}
    config = type(config)(num_layers=1, hidden_size=32, num_attention_heads=4, inner_hidden_size=8, **moved)
    config.vocab_size = 16
    positions = MODE["glm"].model(config).transformer.position_ids(batch.input_ids, batch.attention_mask)
    valid = batch.attention_mask.bool()
    expected = torch.tensor(want["batch"]["position_ids"]).transpose(1, 2)
    assert positions.transpose(1, 2)[valid].equal(expected[valid])


@modes
def test_tokenizer_saved_by_transformers_4(mode, tmp_path):
    """The files that the original's save_pretrained wrote give the same ids."""
    want = read(mode, "tokenizer.json")
    name = MODE[mode].tokenizer.vocab_files_names["vocab_file"]
    shutil.copy(GOLDEN / mode / "checkpoint" / name, tmp_path)
    for file, key in (
        ("tokenizer_config", "saved_tokenizer_config"),
        ("special_tokens_map", "saved_special_tokens_map"),
    ):
        (tmp_path / f"{file}.json").write_text(json.dumps(want[key], ensure_ascii=False), encoding="utf-8")
    tok = MODE[mode].tokenizer.from_pretrained(tmp_path)
    for case in want["cases"]:
        if not case["hf_version_dependent"]:
            assert tok.encode(case["text"]) == case["encode_with_special"]
            decodes(tok, case)


@modes
def test_conversations_as_training_samples(mode, tmp_path):
    """Ids and labels of ChatGLM3's official conversations, through --dump_samples."""
    rows = (GOLDEN / "chat" / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    wanted = json.loads((GOLDEN / "chat" / f"{mode}.json").read_text(encoding="utf-8"))
    path, out = tmp_path / "rows.jsonl", tmp_path / "samples.jsonl"
    path.write_text("".join(rows[one["row"]] for one in wanted), encoding="utf-8")
    flags = ["--mode", mode, "--model_name_or_path", str(GOLDEN / mode / "checkpoint"), "--train_path", str(path)]
    flags += ["--max_len", "2000", "--max_src_len", "1900", "--data_cache", "none", "--dump_samples", str(out)]
    train.main(flags)
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    expected = [(line, sample) for line, one in enumerate(wanted, 1) for sample in one["samples"]]
    assert [one.pop("file") for one in found] == [str(path)] * len(expected)
    assert [(one.pop("line"), one) for one in found] == expected


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
def test_converted_for_transformers(mode, tmp_path):
    """GlmForCausalLM with tokenizer.json and chat template: the reference's logits, ids and conversations."""
    convert(["--mode", mode, "--model_path", str(GOLDEN / mode / "checkpoint"), "--output_dir", str(tmp_path / "new")])
    fast = AutoTokenizer.from_pretrained(tmp_path / "new")
    for want in read(mode, "tokenizer.json")["cases"]:
        if not (want.get("hf_split") or want.get("hf_version_dependent")):
            ids = fast(want["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert ids == want["ids"], want["text"]
    want = tensors(mode, "forward.safetensors")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
        found = model(input_ids=want["single.input_ids"]).logits
    torch.testing.assert_close(found, want["single.logits"], **LOGITS)
    if mode == "glm2":  # the golden samples are those of single answers
        return
    rows = [json.loads(line) for line in (GOLDEN / "chat/rows.jsonl").read_text(encoding="utf-8").splitlines()]
    compared = 0
    for want in json.loads((GOLDEN / "chat/glm3.json").read_text(encoding="utf-8")):
        talk, tools = (rows[want["row"]].get(key) for key in ("conversations", "tools"))
        # not: messages of tools, which this project reads; an empty list of tools, which it writes; special names
        texts = [message.get("content", "") for message in talk if message["role"] != "tool"]
        plain = len(texts) == len(talk) and tools != []
        if plain and not any(name in text for text in texts for name in fast.all_special_tokens):
            (sample,) = want["samples"]
            assert fast.apply_chat_template(talk, tools=tools)["input_ids"] == sample["input_ids"]
            compared += 1
    assert compared == 7
