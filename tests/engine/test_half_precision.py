"""bfloat16 and float16 end to end: every family, method and ds file, on one rank and on two: trains, saves, resumes
with the very losses of the run that was not stopped, and its results answer.

Types that differ between weights, adapters, gradients and buffers stop a run in half precision alone, and under ZeRO-3
in other places than under ZeRO-2; tests in float32 see nothing of it.
"""

import json
import math

import pytest
import torch
from jobs import run_jobs
from runs import METHOD_FLAGS, make_lively_bases
from safetensors import safe_open
from test_train import DS_FILES, PAIRS, RATES, ROOT, ROWS

import predict

RANKS = (1, 2)
TYPES = ("bf16", "fp16")
STATE = "states/step-00000002"
# fp16 is the same code but for the loss scale: each method once on each ds file, on two ranks
MATRIX = [("bf16", *pair, ds, ranks) for ranks in RANKS for pair in PAIRS for ds in DS_FILES]
MATRIX += [("fp16", mode, method, ds, 2) for mode, method in PAIRS if mode == "glm3" for ds in DS_FILES]


def name_of(case) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("half")


@pytest.fixture(scope="module")
def rows(folder):
    path = folder / "rows.json"
    path.write_text(
        "\n".join(json.dumps(dict(zip(("instruction", "input", "output"), row, strict=True))) for row in ROWS[:4])
    )
    return path


@pytest.fixture(scope="module")
def bases(folder):
    return make_lively_bases(folder)


@pytest.fixture(scope="module")
def ds_files(folder):
    """ds_files[type, name]: the project's ds files with a type that is not chosen by the device."""
    paths = {}
    for kind in TYPES:
        for name, file in DS_FILES.items():
            content = json.loads((ROOT / file).read_text())
            content[kind]["enabled"] = True
            content["fp16"]["initial_scale_power"] = 8  # else the first steps would be left out
            paths[kind, name] = folder / f"{kind}-{file}"
            paths[kind, name].write_text(json.dumps(content))
    return paths


@pytest.fixture(scope="module")
def losses(bases, folder, rows, ds_files):
    """{name: losses of all steps}, and with "-resumed" those of a run that went on from the second step's state."""
    losses = {}
    for ranks in RANKS:
        jobs = {}
        for case in MATRIX:
            if case[-1] != ranks:
                continue
            kind, mode, method, ds, _ = case
            for resumed in (False, True):
                output = folder / (name_of(case) + "-resumed" * resumed)
                state = folder / name_of(case) / STATE
                argv = f"""
                    --mode {mode} --train_type {method} {METHOD_FLAGS[method]} --model_name_or_path {bases[mode]}
                    --train_path {rows} --data_cache {folder}/cache --output_dir {output} --max_len 128 --max_src_len 96
                    --ds_file {ds_files[kind, ds]} --num_train_epochs 2 --per_device_train_batch_size 1
                    --gradient_accumulation_steps {2 // ranks} --learning_rate {RATES[method]} --show_loss_step 1
                    {f"--resume_from_checkpoint {state}" if resumed else "--save_state_steps 2"}
                """
                jobs[output.name] = argv.split()
        losses |= run_jobs(folder, ranks, jobs)
    return losses


@pytest.mark.parametrize("case", MATRIX, ids=name_of)
def test_half_precision_trains_and_goes_on_from_a_state(losses, case):
    whole, resumed = losses[name_of(case)], losses[name_of(case) + "-resumed"]
    assert len(whole) == 4 and all(map(math.isfinite, whole))
    assert sum(whole[2:]) < sum(whole[:2])  # the same rows, an epoch later
    assert resumed == whole[2:]  # to the last bit


@pytest.mark.parametrize("case", MATRIX, ids=name_of)
def test_results_in_half_precision_answer(losses, folder, rows, case):
    kind, mode, method, _, _ = case
    result = folder / name_of(case) / "epoch-2-step-4"
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    with safe_open(result / file, "pt") as weights:
        types = {weights.get_tensor(name).dtype for name in weights.keys() if "inv_freq" not in name}  # noqa: SIM118
    assert types == {torch.bfloat16 if kind == "bf16" else torch.float16}
    few = "--max_length 100 --max_new_tokens 8 --device cpu"
    predict.main(f"--mode {mode} --model_path {result} --predict_path {rows} {few}".split())
    answers = [json.loads(line) for line in (result / "predictions-rows.jsonl").read_text().splitlines()]
    assert [row["output"] for row in answers] == [row[2] for row in ROWS[:4]]
