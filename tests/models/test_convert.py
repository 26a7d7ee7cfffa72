"""glm_models.convert: transformers' own class with the same weights, logits, ids, prompts; and back, byte for byte.

python tests/models/test_convert.py --texts 20000 --conversations 10000    # of each family; pytest takes some hundreds
python tests/models/test_convert.py --results    # of real trainings: base, freeze, all, merged, LoRA; two rope_ratios
"""

import argparse
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

# run as a script, and by pytest
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "support")]

from conftest import TINY, make_lively_checkpoint, write_model
from jinja2 import TemplateError
from official_chat import prompt_ids
from peft import LoraConfig, PeftModel, get_peft_model
from random_talks import random_talk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_models import MODE
from glm_models.checkpoint import read_json, read_weights, weight_layout, write_json
from glm_models.convert.__main__ import main
from glm_models.generation import generate_answers
from glm_models.tools import write_call
from tuning.samples.dialogue import Dialogue, Message

MODES = ("glm2", "glm3")
# what decides how weights are cut, and what positions are: a few of each family
VARIANTS = {
    "as it is": {},
    "rope_ratio 50": {"rope_ratio": 50.0},
    "all heads have keys": {"multi_query_attention": False},
    "no biases, odd heads": {"add_qkv_bias": False, "kv_channels": 24, "layernorm_epsilon": 1e-3},
}


def make(tiny, mode: str, folder: Path, dtype=torch.float32, shard=2**30, **config) -> Path:
    """The tiny checkpoint with other keys in config.json, weights that fit them, another type and layout."""
    shutil.copytree(tiny[mode], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = read_json(str(folder / "config.json")) | config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(str(folder / "config.json"), content)
    torch.manual_seed(5)
    model = MODE[mode].model(MODE[mode].config.from_pretrained(folder))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3 if weight.ndim > 1 else 1)
    write_model(model.to(dtype), str(folder), max_shard_bytes=shard)
    return folder


def convert(mode: str, folder, output, *flags: str) -> Path:
    main(["--mode", mode, "--model_path", str(folder), "--output_dir", str(output), *flags])
    return Path(output)


def refusal(capsys, mode: str, folder, output, *flags: str, command=convert) -> str:
    """The line with which a folder is refused; nothing may be written."""
    with pytest.raises(SystemExit) as ended:
        command(mode, folder, output, *flags)
    assert ended.value.code == 2 and not Path(output).exists() and not Path(f"{output}.partial").exists()
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    """converted[mode]: the tiny checkpoint as a GlmForCausalLM."""
    folder = tmp_path_factory.mktemp("converted")
    return {mode: convert(mode, tiny[mode], folder / mode) for mode in MODES}


@pytest.fixture(scope="module")
def fast(converted):
    return {mode: AutoTokenizer.from_pretrained(converted[mode], trust_remote_code=False) for mode in MODES}


# Weights and config


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_logits_are_the_same_and_the_way_back_gives_the_same_files(tiny, tmp_path, capsys, mode, variant):
    folder = make(tiny, mode, tmp_path / "base", shard=300_000, **VARIANTS[variant])
    native = convert(mode, folder, tmp_path / "native")
    assert "the likeliest next token is the same for" in capsys.readouterr().out
    ids = torch.randint(3, 900, (2, 40), generator=torch.Generator().manual_seed(1))
    model, info = AutoModelForCausalLM.from_pretrained(native, output_loading_info=True)
    assert not any(info.values()), info
    expected = MODE[mode].model.from_pretrained(folder).eval()(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits.argmax(-1), expected.argmax(-1))
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)

    back = convert(mode, native, tmp_path / "back")
    names = [name for name in os.listdir(folder) if name != "manifest.json"]
    assert sum(name.startswith("model-0") for name in names) > 2
    assert filecmp.cmpfiles(folder, back, names, shallow=False)[1:] == ([], [])


def test_the_way_back_from_what_another_program_saved(tiny, converted, tmp_path, capsys):
    """It has no official files: --ori_model_dir names them. Half precision stays what it is."""
    model = AutoModelForCausalLM.from_pretrained(converted["glm3"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size=60_000)
    assert "--ori_model_dir" in refusal(capsys, "glm3", tmp_path / "saved", tmp_path / "back")
    back = convert("glm3", tmp_path / "saved", tmp_path / "back", "--ori_model_dir", tiny["glm3"])
    expected = dict(read_weights(tiny["glm3"]))
    assert all(names for names in weight_layout(str(back)).values()) and len(list(back.glob("*.safetensors"))) > 5
    for name, weight in read_weights(str(back)):
        assert torch.equal(weight, expected.pop(name).bfloat16())
    assert [name for name in expected if not name.endswith("inv_freq")] == []
    assert read_json(str(back / "config.json"))["torch_dtype"] == "bfloat16"
    other = make(tiny, "glm3", tmp_path / "other", layernorm_epsilon=1e-3)
    line = refusal(capsys, "glm3", tmp_path / "saved", tmp_path / "no", "--ori_model_dir", str(other))
    assert "rms_norm_eps" in line


def test_what_cannot_be_converted_is_refused_with_what_serves_it(tiny, tmp_path, capsys):
    assert "predict.py" in refusal(capsys, "glm", tiny["glm"], tmp_path / "no")
    tuned = make(tiny, "glm2", tmp_path / "tuned", pre_seq_len=4, prefix_projection=False)
    line = refusal(capsys, "glm2", tuned, tmp_path / "no")
    assert "P-Tuning" in line and "predict.py" in line
    assert "--mode glm " in refusal(capsys, "glm3", tiny["glm"], tmp_path / "no")
    quantised = tmp_path / "int4"
    shutil.copytree(tiny["glm3"], quantised)
    config = read_json(str(quantised / "config.json"))
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))
    assert "quantised" in refusal(capsys, "glm3", quantised, tmp_path / "no")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(SystemExit):
        convert("glm3", tiny["glm3"], tmp_path / "full")
    assert "not empty" in capsys.readouterr().err and os.listdir(tmp_path / "full") == ["file"]


def test_a_wrong_result_is_not_kept(tiny, tmp_path, capsys, monkeypatch):
    wrong = {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}
    monkeypatch.setattr("glm_models.convert.config.rope_of", lambda config: wrong)
    assert "the one it was made of" in refusal(capsys, "glm3", tiny["glm3"], tmp_path / "no")


# Adapters


def make_adapter(model, folder: Path, targets: list[str], **config) -> Path:
    """An adapter as peft saves it, with random values."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def adapted_logits(model, folder) -> torch.Tensor:
    ids = torch.randint(3, 900, (2, 20), generator=torch.Generator().manual_seed(1))
    return PeftModel.from_pretrained(model.eval(), folder).eval()(input_ids=ids).logits


ALL_FOUR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
NATIVE_KINDS = {  # modules, rank of the official adapter
    "all": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"], {}, 12),
    "q and v, rsLoRA": (["q_proj", "v_proj", "down_proj"], {"use_rslora": True}, 8),
    "no attention": (["o_proj", "gate_up_proj"], {}, 4),
}


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_adapters_add_the_same_in_both_forms_and_keep_their_rank(tiny, converted, tmp_path, config):
    load = lambda: MODE["glm3"].model.from_pretrained(tiny["glm3"])  # noqa: E731 - peft changes the model
    adapter = make_adapter(load(), tmp_path / "adapter", ALL_FOUR, **config)
    native = convert("glm3", adapter, tmp_path / "native", "--ori_model_dir", str(converted["glm3"]))
    expected = adapted_logits(load(), adapter)
    found = adapted_logits(AutoModelForCausalLM.from_pretrained(converted["glm3"]), native)
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    back = convert("glm3", native, tmp_path / "back", "--ori_model_dir", tiny["glm3"])
    assert read_json(str(back / "adapter_config.json"))["r"] == 4
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, back)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_adapters_of_other_programs_become_ours(tiny, converted, tmp_path, capsys, kind):
    targets, config, rank = NATIVE_KINDS[kind]
    load = lambda: AutoModelForCausalLM.from_pretrained(converted["glm2"])  # noqa: E731 - peft changes the model
    adapter = make_adapter(load(), tmp_path / "adapter", targets, **config)
    ours = convert("glm2", adapter, tmp_path / "ours", "--ori_model_dir", tiny["glm2"])
    assert ("became" in capsys.readouterr().out) == (rank > 4)
    assert read_json(str(ours / "adapter_config.json"))["r"] == rank
    expected = adapted_logits(load(), adapter)
    found = adapted_logits(MODE["glm2"].model.from_pretrained(tiny["glm2"]), ours)
    assert torch.allclose(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_adapters_that_cannot_be_converted_are_refused(tiny, converted, tmp_path, capsys):
    adapter = make_adapter(MODE["glm3"].model.from_pretrained(tiny["glm3"]), tmp_path / "adapter", ALL_FOUR)
    base = ("--ori_model_dir", str(converted["glm3"]))
    assert "--ori_model_dir is missing" in refusal(capsys, "glm3", adapter, tmp_path / "no")
    assert "already" in refusal(capsys, "glm3", adapter, tmp_path / "no", "--ori_model_dir", tiny["glm3"])
    write_json(str(adapter / "base.json"), {"quantization_bit": 4})
    line = refusal(capsys, "glm3", adapter, tmp_path / "no", *base)
    assert "4 bits" in line and "merge_lora.py" in line


# Tokenizer and template


def random_texts(chance: random.Random, count: int) -> list[str]:
    """Half of them random characters, half the contents of random conversations; and one of each piece's length."""
    alphabet = "水泵漏，。问答\n\n  \t aAzZ09_=[]▁　😀𠮷é\x00\x1b\u2028\u200b\ufeffｆ"
    texts = ["".join(chance.choice(alphabet) for _ in range(chance.randrange(1, 40))) for _ in range(count // 2)]
    while len(texts) < count:
        texts += [turn.content for turn in random_talk(chance, "glm3").turns]
    return texts[:count]


def compare_texts(tokenizer, fast, texts: list[str]) -> None:
    """Ids, and what they decode to."""
    found = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, ids, right in zip(texts, found, tokenizer.encode_texts(texts), strict=True):
        assert ids == right.tolist(), ascii(text)
        assert fast.decode(ids) == tokenizer.sp_model.decode(ids), ascii(text)


def test_ids_and_text_are_those_of_the_official_tokenizer(tokenizers, fast):
    texts = random_texts(random.Random(7), 1500)
    for mode in MODES:
        compare_texts(tokenizers[mode], fast[mode], texts)
        assert fast[mode]("people say sop")["input_ids"] == tokenizers[mode]("people say sop")["input_ids"]


def compare_prompts(mode: str, tokenizer, fast, chance: random.Random, count: int) -> None:
    """Prompts of random conversations against those of the official code."""
    pieces, names = tokenizer.sp_model, [name for name in fast.all_special_tokens if name.strip()]
    compared = 0
    while compared < count:
        talk = random_talk(chance, mode)
        history = []
        for turn in talk.turns:
            one = {"role": turn.role, "content": turn.content}
            if turn.role == "call":
                one = {"role": "assistant", "content": "```python\ntool_call(a=1)\n```", "metadata": turn.name}
            history.append(one)
        if any(name in f"{one}" for one in history for name in names):
            continue  # such text becomes a special token: see the next test
        while history and history[-1]["role"] not in ("user", "observation"):
            history.pop()
        if mode == "glm3" and history[0]["role"] == "system" and chance.random() < 0.5:
            history[0]["tools"] = [{"name": "查询", "parameters": {"a": [1, None, "é"]}}]
        found = fast.apply_chat_template(history, add_generation_prompt=True)["input_ids"]
        assert found == prompt_ids(mode, pieces, history), history
        compared += 1


@pytest.mark.parametrize("mode", MODES)
def test_the_template_gives_the_official_prompts(tokenizers, fast, mode):
    compare_prompts(mode, tokenizers[mode], fast[mode], random.Random(11), 150)


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_conversation_is_the_sample_of_training(tokenizers, fast, mode):
    """With its last answer and the token that ends it; in ChatGLM3 with tools and a call."""
    texts = ["水泵漏水", "先查继电器。", "hello  world", "x = [1, 2]\n 😀"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    tools = [{"name": "查询", "parameters": {"a": 1}}] if mode == "glm3" else None
    calls = [{"role": "user", "content": "查"}, {"role": "assistant", "content": "```python\n```", "metadata": "查询"}]
    for talk in (messages, calls) if mode == "glm3" else (messages,):
        learnt = [message["role"] == "assistant" and message is talk[-1] for message in talk]
        turns = [Message(**message, learn=learn) for message, learn in zip(talk, learnt, strict=True)]
        (sample,) = tokenizers[mode].encode_dialogues([Dialogue(tuple(turns), tools and json.dumps(tools))])
        wrapped = tools and [{"type": "function", "function": tool} for tool in tools]
        found = fast[mode].apply_chat_template(talk, tools=wrapped)["input_ids"]
        assert found == [token for part in sample.parts for token in part]


def test_a_call_may_be_one_of_tool_calls(fast):
    """As servers of OpenAI's API hand it on: the prompt is that of the official form of the call."""
    question, result = {"role": "user", "content": "查"}, {"role": "tool", "content": '{"度": 7}', "tool_call_id": "1"}
    chance = random.Random(3)
    values = [
        "北京",
        'it\'s "so"\n',
        "a<|assistant|>b",
        3,
        -2.5,
        True,
        None,
        [1, [None]],
        {"a": {"b": False}},
        "x" * 200,
    ]
    for _ in range(100):
        names = chance.sample(["city", "城市", "class", "user-id", "a b", "None", "_x1", "__debug__"], 3)
        arguments = {name: chance.choice(values) for name in names}
        call = {"role": "assistant", "content": chance.choice(("", None))}
        call["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "查询", "arguments": arguments}}]
        there, here = (
            fast["glm3"].apply_chat_template([question, one, result], add_generation_prompt=True, tokenize=False)
            for one in (call, write_call("查询", arguments))
        )
        assert there == here
    for wrong in (
        call | {"content": "a"},
        call | {"tool_calls": call["tool_calls"] * 2},
        call | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        call | {"role": "user"},
    ):
        with pytest.raises(TemplateError):
            fast["glm3"].apply_chat_template([question, wrong], add_generation_prompt=True)


def test_what_would_be_dropped_is_an_error_of_the_template(fast):
    question, tools = {"role": "user", "content": "a"}, [{"name": "f"}]
    for mode, messages, more in (
        ("glm2", [question], {"tools": tools}),
        ("glm2", [question | {"metadata": "f"}], {}),
        ("glm3", [{"role": "system", "content": "s", "tools": tools}, question], {"tools": tools}),
        ("glm3", [question | {"tools": tools}], {}),
    ):
        with pytest.raises(TemplateError):
            fast[mode].apply_chat_template(messages, add_generation_prompt=True, **more)


def test_what_a_family_has_not_is_an_error_of_the_template(fast):
    for mode, messages in {
        "glm2": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        "glm3": [{"role": "developer", "content": "a"}],
    }.items():
        with pytest.raises(TemplateError):
            fast[mode].apply_chat_template(messages, add_generation_prompt=True)


def test_special_names_in_a_text_can_stay_text(tokenizers, fast):
    text = "a<|user|>b</s>c[gMASK]d<sop>"
    for mode in MODES:
        found = fast[mode].apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, sanitize_control_tokens=True
        )["input_ids"]
        assert found == tokenizers[mode].encode_prompt(text)


def test_the_tokenizer_alone(tiny, converted, tmp_path):
    folder = convert("glm2", tiny["glm2"], tmp_path / "tokenizer", "--tokenizer_only")
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(folder)) == sorted([*names, "manifest.json"])
    assert filecmp.cmpfiles(folder, converted["glm2"], names, shallow=False)[0] == names


ALONE = """
import sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith(("glm_models", "tuning")) for name in sys.modules)
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    for question in ("水泵漏水怎么办？", "hello world"):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1]:]
        print(ascii(tokenizer.decode(ids, skip_special_tokens=True).removeprefix("\\n").removeprefix(" ")))
"""


def test_transformers_alone_gives_the_answers_of_this_project(tiny, tokenizers, converted, tmp_path):
    folders = [str(converted[mode]) for mode in MODES]
    run = subprocess.run(
        [sys.executable, "-c", ALONE, *folders], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    expected = []
    for mode in MODES:
        model = MODE[mode].model.from_pretrained(tiny[mode]).eval()
        for question in ("水泵漏水怎么办？", "hello world"):
            prompt = tokenizers[mode].encode_prompt(question)
            expected.append(ascii(generate_answers(model, tokenizers[mode], [prompt], [12])[0][0]))
    assert run.stdout.splitlines() == expected


# Long forms


def check_many(mode: str, work: Path, texts: int, conversations: int) -> None:
    """Tokenizer and template on as many random texts and conversations."""
    make_lively_checkpoint(mode, str(work / mode), **TINY[mode])
    tokenizer = MODE[mode].tokenizer.from_pretrained(work / mode)
    folder = convert(mode, work / mode, work / f"{mode}-tokenizer", "--tokenizer_only")
    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    chance, start = random.Random(f"{mode} long"), time.time()
    for done in range(0, texts, 1000):
        compare_texts(tokenizer, fast, random_texts(chance, min(1000, texts - done)))
    compare_prompts(mode, tokenizer, fast, chance, conversations)
    print(f"{mode}: {texts} texts: ids and decoded texts equal; {conversations} conversations: prompts equal; "
          f"{time.time() - start:.0f} s", flush=True)  # fmt: skip


def check_results(mode: str, work: Path, ratio: float) -> None:
    """What trainings and merge_lora.py write, to the native form and back; the adapter to the native base and back."""
    from jobs import run_jobs
    from runs import ROOT, STAGES, make_rows

    import merge_lora

    top = work / f"{mode}-{ratio:g}"
    top.mkdir()
    make_lively_checkpoint(mode, str(top / "base"), **TINY[mode])
    write_json(str(top / "base/config.json"), read_json(str(top / "base/config.json")) | {"rope_ratio": ratio})
    rows = make_rows(top / "rows.json", 12)
    fixed = f"--mode {mode} --model_name_or_path {top}/base --train_path {rows} --data_cache none --max_len 96"
    fixed += f" --max_src_len 64 --max_steps 3 --learning_rate 1e-2 --ds_file {ROOT / STAGES[2]} --train_type"
    methods = {"freeze": "--train_last_layers 1", "all": "", "lora": "--lora_dim 4 --lora_module_name all-linear"}
    jobs = {name: f"{fixed} {name} {flags} --output_dir {top}/{name}".split() for name, flags in methods.items()}
    run_jobs(top, 1, jobs)
    results = {name: str(next(top.glob(f"{name}/epoch-*-step-3"))) for name in methods} | {"base": f"{top}/base"}
    adapter, results["merged"] = results.pop("lora"), f"{top}/merged"
    argv = f"--mode {mode} --ori_model_dir {top}/base --model_dir {adapter} --output_dir {top}/merged"
    merge_lora.main(argv.split())
    for name, folder in results.items():
        native = convert(mode, folder, top / f"{name}-native")  # compares the logits
        back = convert(mode, native, top / f"{name}-back")
        names = [file for file in os.listdir(folder) if file != "manifest.json"]
        assert filecmp.cmpfiles(folder, back, names, shallow=False)[1:] == ([], []), name
        print(f"{mode}, rope_ratio {ratio:g}, {name}: {len(names)} files, the same after both conversions", flush=True)
    other = convert(mode, adapter, top / "adapter-native", "--ori_model_dir", f"{top}/base-native")
    back = convert(mode, other, top / "adapter-back", "--ori_model_dir", f"{top}/base")
    tensors = [load_file(Path(folder) / "adapter_model.safetensors") for folder in (adapter, back)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    expected = adapted_logits(MODE[mode].model.from_pretrained(top / "base"), adapter)
    found = adapted_logits(AutoModelForCausalLM.from_pretrained(top / "base-native"), other)
    difference = (found - expected).abs().max().item()
    assert difference <= 1e-5 * expected.abs().max().item()
    print(
        f"{mode}, rope_ratio {ratio:g}, adapter: logits differ by at most {difference:.2g}; back: the same", flush=True
    )


def long_forms() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--conversations", type=int, default=0)
    parser.add_argument("--results", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for mode in MODES:
            if args.texts or args.conversations:
                check_many(mode, Path(work), args.texts, args.conversations)
            for ratio in (1.0, 50.0) if args.results else ():
                check_results(mode, Path(work), ratio)


if __name__ == "__main__":
    long_forms()
