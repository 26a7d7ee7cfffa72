"""Quantised bases: LoRA and P-Tuning on them compute what they would on the dequantised weights, in training, after a
stop, on two ranks, merged and in prediction."""

import json
import math
import weakref

import pytest
import torch
from conftest import enliven, write_model
from jobs import run_jobs
from runs import make_base
from test_train import ROOT, ROWS

import merge_lora
import predict
import train
from glm_models import MODE, quantized
from glm_models.checkpoint import CheckpointError
from glm_models.convert.clients import PEFT_KEYS
from tuning.arguments import quantization
from tuning.engine import source
from tuning.engine.ds_config import check_quantization
from tuning.engine.loading import Quantize, load_base, load_result
from tuning.errors import UserError
from tuning.lora import adapter
from tuning.methods import count_parameters
from tuning.run import resume
from tuning.samples.batches import MicroBatch, collate
from tuning.samples.encoding import Sample

LINEAR = "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"
FAMILIES_AND_BITS = [(mode, bits) for mode in MODE for bits in (4, 8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def bases(folder):
    """bases[mode]: two layers with lively weights; some have rows that end within one of nf4's blocks."""
    made = {mode: make_base(mode, folder / mode, hidden_size=64) for mode in MODE}
    for mode, path in made.items():
        model = MODE[mode].model.from_pretrained(path)
        enliven(model)
        write_model(model, str(path))
    return made


def flags(mode, base, method="lora", more="") -> list[str]:
    lora = f"--lora_module_name {LINEAR} --lora_dropout 0" if method == "lora" else "--pre_seq_len 4"
    fixed = f"--mode {mode} --model_name_or_path {base} --train_path {__file__} --train_type {method} {lora} {more}"
    return fixed.split()


def with_adapters(mode, base, bits):
    """LoRA, not at its start, on a quantised base; with bits None on a base whose weights were quantised and back."""
    torch.manual_seed(0)
    args = train.parse_args(flags(mode, base))

    def load(**config):
        model = load_base(mode, str(base), torch.float32, quantize=Quantize(bits, "cpu"), **config)
        return model

    def load_dequantised(**config):
        model = load_base(mode, str(base), torch.float32, **config)
        with torch.no_grad():
            for name in quantized.quantized_names(model):
                weight = model.get_submodule(name).weight
                weight.copy_(quantized.round_trip(weight, bits))
        return model

    models = []
    for one in (load, load_dequantised):
        torch.manual_seed(1)
        model = train.build_model(args, one).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        models.append(model)
    return models


def batch_of(*samples):
    rows = [Sample(list(ids), ((3, len(ids)),), False, False) for ids in samples]
    return collate(rows, lambda _: 3, MicroBatch(list(range(len(rows))), 1.0)).to("cpu")


@pytest.mark.parametrize(("mode", "bits"), FAMILIES_AND_BITS)
def test_gradients_are_those_on_the_dequantised_base(mode, bits, bases):
    """With each saving of memory; several samples in a row count as each alone."""
    packed, dequantised = with_adapters(mode, bases[mode], bits)
    one, other = list(range(10, 40)), list(range(20, 35))
    losses, gradients = [], []
    for model, batches in (
        (dequantised, [batch_of(one, other)]),
        (packed, [batch_of(one, other)]),
        (packed, [batch_of(one), batch_of(other)]),
        ("checkpointing", [batch_of(one, other)]),
    ):
        if model == "checkpointing":
            model = packed
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        model.zero_grad()
        total = [model(**batch).loss for batch in batches]
        sum(total).backward()
        losses.append(sum(total).item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys() and len(found) == 2 * 4 * 2
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
    original = load_base(mode, str(bases[mode]), torch.float32)
    name = quantized.quantized_names(original)[0]
    before = original.get_submodule(name).weight
    error = (quantized.round_trip(before, bits) - before).abs().mean() / before.abs().mean()
    assert (0.05 if bits == 4 else 0.001) < error < (0.12 if bits == 4 else 0.02)  # it is quantised indeed


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_is_quantised_as_it_is_read(bits, bases, monkeypatch):
    """In one pass; when a weight is read, those before the last one are gone."""
    reads, read, alive = [], source.read_weights, []

    def watched(path):
        for name, tensor in read(path):
            copy = tensor.clone()
            reads.append(name)
            alive.append(weakref.ref(copy))
            assert sum(ref() is not None for ref in alive) <= 2
            yield name, copy

    monkeypatch.setattr(source, "read_weights", watched)
    model = load_base("glm3", str(bases["glm3"]), torch.bfloat16, quantize=Quantize(bits, "cpu"))
    assert len(reads) == len(set(reads)) > 8
    for layer in quantized.quantized_layers(model):  # and nothing larger is kept behind a view
        for tensor in layer.stored():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("mode", MODE)
def test_only_the_linear_layers_of_the_blocks_are_quantised(mode, bases):
    model = load_base(mode, str(bases[mode]), torch.bfloat16, quantize=Quantize(4, "cpu"))
    assert len(quantized.quantized_layers(model)) == 4 * 2 == len(quantized.quantized_names(model))
    plain = MODE[mode].model.from_pretrained(bases[mode])
    assert count_parameters(model)[1] == sum(p.numel() for p in plain.parameters())
    assert {p.dtype for p in model.parameters() if p.dtype.is_floating_point} == {torch.bfloat16}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight)
    assert model.state_dict().keys() == plain.state_dict().keys()  # no scales, which a training state would keep


# Trainings


RUNS = {  # name: mode, method, bits or none, type, more flags
    "lora-glm": ("glm", "lora", 4, "bf16", ""),
    "lora-glm2": ("glm2", "lora", 4, "bf16", "--gradient_checkpointing"),
    "lora-glm3": ("glm3", "lora", 4, "float32", ""),
    "lora-16-glm3": ("glm3", "lora", None, "float32", ""),
    "ptuning-glm3": ("glm3", "ptuning", 4, "bf16", ""),
    "eight-glm2": ("glm2", "lora", 8, "bf16", "--tiled_mlp"),
}


@pytest.fixture(scope="module")
def runs(bases, folder):
    """{ranks: {name: losses}}; on two ranks also with "-resumed", of one that goes on from the second step's state."""
    rows = folder / "rows.json"
    keys = ("instruction", "input", "output")
    rows.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in ROWS[:4]))
    content = json.loads((ROOT / "ds_zero2_no_offload.json").read_text())
    content["bf16"]["enabled"] = True
    (folder / "bf16.json").write_text(json.dumps(content))
    files = {"bf16": folder / "bf16.json", "float32": "ds_zero2_no_offload.json"}
    losses = {}
    for ranks in (1, 2):
        jobs = {}
        for name, (mode, method, bits, kind, more) in RUNS.items():
            if (ranks == 1 and kind == "bf16") or (ranks == 2 and not bits):
                continue
            for resumed in (False, True)[:ranks]:
                output = folder / f"{name}-{ranks}{'-resumed' * resumed}"
                state = folder / f"{name}-{ranks}" / "states/step-00000002"
                more_flags = f"""{more} --max_len 128 --max_src_len 96 --ds_file {files[kind]} --num_train_epochs 2
                    --gradient_accumulation_steps {2 // ranks} --learning_rate 2e-3 --show_loss_step 1
                    --data_cache {folder}/cache --output_dir {output} {f"--quantization_bit {bits}" if bits else ""}
                    {f"--resume_from_checkpoint {state}" if resumed else "--save_state_steps 2"}"""
                argv = flags(mode, bases[mode], method, more_flags)
                argv[argv.index("--train_path") + 1] = str(rows)
                jobs[name + "-resumed" * resumed] = argv
        losses[ranks] = run_jobs(folder, ranks, jobs)
    return losses


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[2]])
def test_training_goes_on_exactly(runs, name):
    whole, resumed = runs[2][name], runs[2][f"{name}-resumed"]
    assert len(whole) == len(resumed) * 2 and all(map(math.isfinite, whole))
    assert resumed == whole[len(resumed) :]  # to the last bit
    assert sum(resumed) < sum(whole[: len(resumed)])


def test_one_and_two_ranks_train_the_same_and_close_to_16_bits(runs):
    assert runs[1]["lora-glm3"] == pytest.approx(runs[2]["lora-glm3"], rel=1e-4)
    assert runs[1]["lora-glm3"] == pytest.approx(runs[1]["lora-16-glm3"], rel=0.1)
    assert runs[1]["lora-glm3"] != pytest.approx(runs[1]["lora-16-glm3"], rel=1e-4)


def test_a_state_holds_no_base(runs, folder):
    """Neither packed weights nor scales: what is trained, its masters and moments."""
    for path in (
        folder / "lora-glm3-2/states/step-00000004/deepspeed",
        folder / "lora-glm3-2/states/step-00000002/deepspeed",
    ):
        if path.is_dir():
            names = torch.load(path / "mp_rank_00_model_states.pt", weights_only=False)["module"].keys()
            assert all("lora_" in name for name in names)
            return
    raise AssertionError("no state")


def test_another_quantisation_is_no_resume(runs, folder):
    record = json.loads((folder / "lora-glm3-2/run.json").read_text())["starts"][-1]
    assert record["flags"]["quantization_bit"] == 4 and "bitsandbytes" in record["versions"]
    state = str(folder / "lora-glm3-2/states/step-00000002")
    run = resume.read_run(state)
    for bits in (8, None):
        other = run._replace(settings=run.settings | {"--quantization_bit": bits})
        with pytest.raises(UserError, match=f"--quantization_bit: 4 before, {bits} now"):
            resume.check_run(state, other, False)


# Results


def test_results_say_how_their_base_was_quantised(runs, folder, bases, capsys):
    results = {name: folder / f"{name}-2/epoch-2-step-4" for name in ("lora-glm2", "ptuning-glm3", "eight-glm2")}
    for name, bits in (("lora-glm2", 4), ("ptuning-glm3", 4), ("eight-glm2", 8)):
        assert adapter.trained_bits(str(results[name])) == bits
    keys = json.loads((results["lora-glm2"] / "adapter_config.json").read_text()).keys()
    assert keys <= PEFT_KEYS  # peft 0.5 to 0.21 read it
    _, model = load_result("glm3", str(results["ptuning-glm3"]))
    assert "in its training" in (said := capsys.readouterr().out) and "quantised to 4 bits (nf4)" in said
    assert len(quantized.quantized_layers(model)) == 8
    # the prefix's folder is a whole model, with the weights of before
    plain, trained = (MODE["glm3"].model.from_pretrained(f) for f in (bases["glm3"], results["ptuning-glm3"]))
    name = quantized.quantized_names(plain)[0]
    expected = plain.get_submodule(name).weight.to(torch.bfloat16)
    assert torch.equal(trained.get_submodule(name).weight.to(torch.bfloat16), expected)
    _, model = load_result("glm2", str(results["lora-glm2"]), bits=0)
    assert "not quantised (as asked; in its training they were quantised to 4 bits)" in capsys.readouterr().out
    assert not quantized.quantized_layers(model)


def test_merged_into_the_quantised_base_it_is_what_was_trained(runs, folder, bases, tmp_path, capsys):
    result = folder / "lora-glm3-1/epoch-2-step-4"
    output = tmp_path / "merged"
    base = str(bases["glm3"])
    merge_lora.main(["--mode", "glm3", "--ori_model_dir", base, "--model_dir", str(result),
                     "--output_dir", str(output), "--into_quantized"])  # fmt: skip
    assert "quantised to 4 bits and back, as in training" in capsys.readouterr().out
    tokenizer, trained = load_result("glm3", str(result))
    _, merged = load_result("glm3", str(output))
    assert not quantized.quantized_layers(merged)
    prompt = torch.tensor([tokenizer.encode_prompt("水泵漏水")])
    torch.testing.assert_close(trained(prompt).logits, merged(prompt).logits, rtol=1e-4, atol=1e-4)
    rows = folder / "rows.json"
    answers = []
    for path in (result, output):  # token for token
        file = tmp_path / f"{path.name}.jsonl"
        predict.main(["--mode", "glm3", "--model_path", str(path), "--predict_path", str(rows), "--device", "cpu",
                      "--max_length", "100", "--output_path", str(file)])  # fmt: skip
        answers.append([json.loads(line)["prediction"] for line in file.read_text().splitlines()])
    assert answers[0] == answers[1] and any(answers[0])

    merge_lora.merge("glm3", base, str(result), str(tmp_path / "plain"))
    said = capsys.readouterr().out
    assert "merging into the base as it is; in training it was quantised to 4 bits" in said
    assert "merged model, and adapter on the base in 4 bits as it was trained: on 4 prompts" in said
    with pytest.raises(UserError, match="was not trained on a quantised base"):
        merge_lora.check_quantization(str(tmp_path / "plain"), True)


def test_any_model_answers_in_few_bits_as_dequantised(bases):
    """Token for token."""
    for mode, base in bases.items():
        tokenizer, model = load_result(mode, str(base), bits=4)
        plain = load_base(mode, str(base), torch.float32)
        with torch.no_grad():
            for name in quantized.quantized_names(plain):
                weight = plain.get_submodule(name).weight
                weight.copy_(quantized.round_trip(weight, 4))
        prompt = torch.tensor([tokenizer.encode_prompt("发动机怠速不稳")])
        answers = [m.generate(prompt, max_new_tokens=12, do_sample=False).tolist() for m in (model, plain)]
        assert answers[0] == answers[1]


# Refusals


def test_what_does_not_go_together_is_refused(bases, monkeypatch, tmp_path):
    base = bases["glm3"]
    for method in ("all", "freeze"):
        argv = [*flags("glm3", base)[:6], "--train_type", method, "--quantization_bit", "4"]
        with pytest.raises(UserError, match=f"goes with --train_type lora or ptuning: .* {method} trains them"):
            train.parse_args(argv)
    for bits in ("3", "16"):
        with pytest.raises(UserError, match=f"--quantization_bit {bits}: choose from 4, 8"):
            train.parse_args(flags("glm3", base, "lora", f"--quantization_bit {bits}"))
    for more in ("--use_dora", "--init_lora_weights pissa", "--modules_to_save embedding"):
        with pytest.raises(UserError, match=f"goes with plain LoRA, without {more.split()[0]}"):
            train.parse_args(flags("glm3", base, "lora", f"--quantization_bit 4 {more}"))
    args = train.parse_args(flags("glm3", base, "lora", "--quantization_bit 4"))
    with pytest.raises(UserError, match="does not go with ZeRO-3"):
        check_quantization(args, {"zero_optimization": {"stage": 3}})
    check_quantization(args, {"zero_optimization": {"stage": 1}})
    monkeypatch.setattr(quantization, "PACKAGE", "no_such_package")
    install = r"pip install bitsandbytes==0\.50\.2"
    with pytest.raises(UserError, match=install):
        train.parse_args(flags("glm3", base, "lora", "--quantization_bit 4"))
    with pytest.raises(UserError, match=install):
        predict.parse_args(["--mode", "glm3", "--model_path", str(base), "--quantization_bit", "4"])
    with pytest.raises(UserError, match=install):
        load_result("glm3", str(base), bits=8)
    (tmp_path / adapter.BASE_FILE).write_text(json.dumps({adapter.QUANTIZATION: 3}))
    with pytest.raises(CheckpointError, match="quantization_bit is 3; known are 4, 8"):
        adapter.trained_bits(str(tmp_path))
