"""Variants of LoRA, LoRA+ and NEFTune in bfloat16 on two ranks, under ZeRO-2 and ZeRO-3: they train, resume with the
very losses of the run that was not stopped, and their results are read by plain peft on the base.
"""

import json
import os
import shutil

import pytest
import torch
from conftest import enliven, write_model
from peft import PeftModel
from runs import AFTER_STEP, ROOT, STAGES, Launched, make_base, make_rows, read_losses
from safetensors.torch import load_file

from glm_models import MODE
from glm_models.checkpoint import read_weights
from tuning.engine.loading import load_result

CHANGED = "--init_lora_weights pissa_niter_4 --use_rslora --modules_to_save input_layernorm"
DORA = "--use_dora --modules_to_save word_embeddings,output_layer --gradient_checkpointing"
CASES = {2: CHANGED, 3: DORA}  # by ZeRO stage
STEPS, RATIO = 4, 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Base, rows and folder of the runs."""
    folder = tmp_path_factory.mktemp("variants")
    base = make_base("glm3", folder / "base")
    model = MODE["glm3"].model.from_pretrained(base)
    enliven(model)
    write_model(model, str(base))
    return base, make_rows(folder / "rows.json", 12), folder


def record(folder):
    """A hook after each step: its rates of learning, and a sum of the frozen weights, of each rank."""

    def after(watch, step):
        engine = watch.engine
        frozen = [p for p in engine.module.parameters() if not p.requires_grad and not hasattr(p, "ds_id")]
        line = {
            "step": engine.global_steps,
            "rates": [group["lr"] for group in engine.optimizer.param_groups],
            "frozen": sum(p.double().sum().item() for p in frozen),
        }
        with open(folder / f"rank-{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    return lambda: AFTER_STEP.append(after)


def run(files, stage: int, name: str, *more: str):
    """Losses of a run, and what `record` wrote of each rank."""
    base, rows, folder = files
    folder = folder / f"{name}-{stage}"
    folder.mkdir()
    content = json.loads((ROOT / STAGES[stage]).read_text())
    content["bf16"]["enabled"] = True
    (folder / "ds.json").write_text(json.dumps(content))
    argv = f"""
        --mode glm3 --model_name_or_path {base} --train_path {rows} --data_cache {rows.parent}/cache --lora_dim 4
        --output_dir {folder / "output"} --ds_file {folder / "ds.json"} --max_len 160 --max_src_len 96
        --per_device_train_batch_size 2 --max_steps {STEPS} --learning_rate 2e-3 --lora_module_name all-linear
        --loraplus_lr_ratio {RATIO} --neftune_noise_alpha 5 {CASES[stage]}
    """
    ranks = Launched([*argv.split(), *more], 2, folder / "losses", folder / "log", record(folder))
    assert ranks.wait() == {0: 0, 1: 0}, (folder / "log").read_text()[-3000:]
    notes = [[json.loads(line) for line in (folder / f"rank-{i}.jsonl").read_text().splitlines()] for i in (0, 1)]
    return read_losses(folder / "losses"), notes, folder


@pytest.mark.parametrize("stage", CASES)
def test_variants_on_two_ranks(files, stage):
    losses, notes, folder = run(files, stage, "whole", "--save_state_steps", "2")
    assert len(losses) == STEPS
    assert notes[0] == notes[1]  # also the base that PiSSA changes, at random
    for note in notes[0]:
        slow, *fast = note["rates"]
        assert fast and fast == pytest.approx([RATIO * slow] * len(fast))
    state = shutil.copytree(folder / "output/states/step-00000002", folder / "copy/step-00000002")
    resumed, again, other = run(files, stage, "resumed", "--resume_from_checkpoint", str(state))
    assert resumed == losses[2:]  # to the last bit
    assert again[0] == notes[0][2:]
    results = [one / f"output/epoch-2-step-{STEPS}" for one in (folder, other)]
    tensors, same = (load_file(result / "adapter_model.safetensors") for result in results)
    assert tensors.keys() == same.keys() and all(torch.equal(tensors[name], same[name]) for name in tensors)
    check_result(files[0], str(results[0]), tensors)


def check_result(base, result: str, tensors: dict[str, torch.Tensor]) -> None:
    """Plain peft answers with it as predict.py does; DoRA's lengths and whole modules have moved."""
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        model = PeftModel.from_pretrained(MODE["glm3"].model.from_pretrained(base), result)
        expected = model.eval()(ids).logits
        found = load_result("glm3", result, device="cpu")[1](ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    weights = dict(read_weights(str(base)))
    moved = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("base_model.model.")
        if path in weights:
            moved[path] = (tensor - weights[path].bfloat16()).abs().max().item()
        elif path.endswith("lora_magnitude_vector"):
            length = weights[path.replace("lora_magnitude_vector", "weight")].bfloat16().norm(dim=1)
            moved[path] = (tensor - length).abs().max().item()
    assert moved and min(moved.values()) > 1e-3
