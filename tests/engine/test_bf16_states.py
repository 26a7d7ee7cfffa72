"""Masters and moments in bf16: each kind of ds file on one rank and on two, saved, resumed and merged; refusals."""

import json
import math

import ds_keys_losses
import pytest
import torch
from jobs import run_jobs
from runs import METHOD_FLAGS, make_lively_bases
from safetensors import safe_open
from test_train import RATES, ROOT, ROWS

import merge_lora
import train
from tuning.engine import ds_check, ds_config, patches
from tuning.engine.ds_config import ds_notes, ds_values, load_ds_config, split_groups
from tuning.errors import UserError

STATES = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
FILES = {
    "zero2": "ds_zero2_no_offload.json",
    "zero2-offload": "ds_zero2_offload_bf16_states.json",
    "zero3": "ds_zero3_bf16_states.json",
    "zero3-offload": "ds_zero3_offload.json",
}
WITHOUT_AVX512 = ds_check.CPUAdamBuilder().simd_width() == "-D__AVX256__"
METHODS = {"zero2": ("glm", "all"), "zero2-offload": ("glm2", "all"), "zero3": ("glm3", "all")}
METHODS |= {"zero3-offload": ("glm3", "lora")}
STATE = "states/step-00000002"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def bases(folder):
    return make_lively_bases(folder)


def write_ds(folder, name: str, sums: str) -> str:
    """A ds file with everything in bf16 and gradients summed in the type `sums`."""
    content = json.loads((ROOT / FILES[name]).read_text()) | {"bf16": STATES, "data_types": {"grad_accum_dtype": sums}}
    path = folder / f"{name}-{sums}.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="module")
def losses(folder, bases):
    """{name: losses} of runs, FILE of two ranks with one micro-batch each, of which gradients are not summed.

    FILE-resumed and FILE-on-1 go on from its second step's state, on two ranks and on one with two micro-batches;
    FILE-fp32 sums in float32.
    """
    rows = folder / "rows.json"
    keys = ("instruction", "input", "output")
    rows.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in ROWS[:4]))

    def job(name: str, suffix: str, ranks: int = 2, sums: str = "auto") -> dict[str, list[str]]:
        mode, method = METHODS[name]
        argv = f"""
            --mode {mode} --train_type {method} {METHOD_FLAGS[method]} --model_name_or_path {bases[mode]}
            --train_path {rows} --data_cache {folder}/cache --output_dir {folder}/{name}{suffix} --max_len 128
            --max_src_len 96 --ds_file {write_ds(folder, name, sums)} --num_train_epochs 2
            --gradient_accumulation_steps {2 // ranks} --learning_rate {RATES[method]} --show_loss_step 1
            --save_state_steps 1 --save_total_limit 3
            {"--lora_dropout 0" * (method == "lora")}
            {f"--resume_from_checkpoint {folder}/{name}/{STATE}" * suffix.endswith(("resumed", "on-1"))}
        """
        return {f"{name}{suffix}": argv.split()}

    two, one = {}, {}
    for name in FILES:
        if "offload" in name and WITHOUT_AVX512:
            continue
        two |= job(name, "") | job(name, "-resumed")
        if "offload" not in name:
            two |= job(name, "-fp32", sums="fp32")
        one |= job(name, "-on-1", ranks=1)
    return run_jobs(folder, 2, two) | run_jobs(folder, 1, one)


def states_of(state) -> list[torch.Tensor]:
    """Masters and moments in DeepSpeed's files of a training state."""
    found = []
    for path in state.glob("deepspeed/*optim_states.pt"):
        content = torch.load(path, weights_only=False)["optimizer_state_dict"]
        masters = content.get("single_partition_of_fp32_groups") or content["fp32_flat_groups"]
        moments = content.get("base_optimizer_state") or content["optimizer_state_dict"]
        moments = [one[name] for one in moments["state"].values() for name in ("exp_avg", "exp_avg_sq")]
        found += [*masters, *moments]
    return found


@pytest.mark.parametrize("name", FILES)
def test_it_trains_and_goes_on_from_a_state(losses, folder, name):
    if name not in losses:
        pytest.skip("DeepSpeed's CPU Adam needs AVX-512 to compute in bf16")
    whole = losses[name]
    assert len(whole) == 4 and all(map(math.isfinite, whole))
    assert sum(whole[2:]) < sum(whole[:2])  # the same rows, an epoch later
    assert losses[f"{name}-resumed"] == whole[2:]  # to the last bit
    assert losses[f"{name}-on-1"] == pytest.approx(whole[2:], rel=0.01)
    for run in (name, f"{name}-on-1"):
        found = states_of(folder / run / "states/step-00000003")
        assert len(found) >= 3 and {one.dtype for one in found} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_gradient_of_one_micro_batch_needs_no_float32_sum(losses, name):
    assert losses[f"{name}-fp32"] == losses[name]


def test_results_are_what_was_trained(losses, folder, bases):
    adapter, merged = folder / "zero3-offload" / "epoch-2-step-4", folder / "merged"
    if "zero3-offload" in losses:  # see WITHOUT_AVX512
        argv = f"--mode glm3 --ori_model_dir {bases['glm3']} --model_dir {adapter} --output_dir {merged}"
        merge_lora.main(argv.split())  # verifies what it writes
        assert (merged / "config.json").is_file()
    with safe_open(folder / "zero2" / "epoch-2-step-4" / "model.safetensors", "pt") as result:
        written = {name: result.get_tensor(name) for name in result.keys()}  # noqa: SIM118
    assert {one.dtype for name, one in written.items() if "inv_freq" not in name} == {torch.bfloat16}


# What DeepSpeed would ignore, or stop on


def load(path, changes: dict, stage: int = 2, accumulation: int = 1) -> dict:
    flags = f"--mode glm3 --model_name_or_path . --train_path {__file__}"
    args = train.parse_args([*flags.split(), "--gradient_accumulation_steps", str(accumulation)])
    ds_keys_losses.write(path, stage, {f"bf16.{name}": value for name, value in STATES.items()} | changes)
    return load_ds_config(str(path), ds_values(args, 1, 10, 64))


OFFLOAD = {"zero_optimization.offload_optimizer": {"device": "cpu"}}
CPU_ADAM = {"optimizer.params": {"lr": "auto"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16.bf16_optimizer_states": False}, "bf16_master_weights_and_grads is refused: .* go together"),
        ({"bf16.bf16_master_weights_and_grads": None}, "bf16_optimizer_states is refused: .* go together"),
        ({"bf16.enabled": False}, 'needs "enabled": true beside it; this training computes in fp32'),
        ({"zero_optimization.stage": 1}, "not at ZeRO stage 1; stage 2 does the same"),
        ({"optimizer.type": "Lion", **OFFLOAD, **CPU_ADAM}, "goes with Adam and AdamW, not with Lion"),
        (OFFLOAD, 'CPU Adam: leave out "torch_adam" and "fused"'),
        (OFFLOAD | CPU_ADAM, "needs a processor with AVX-512 for it, and this one has AVX2"),
        ({"optimizer.params.betas": [0.9, 0.999]}, r"betas \[0.9, 0.999\]: a moment in bf16 would never fall"),
        ({"optimizer.params.fp32_optimizer_states": False}, "fp32_optimizer_states false is refused"),
    ],
)
def test_what_deepspeed_would_ignore_or_stop_on_is_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(ds_check.CPUAdamBuilder, "simd_width", lambda _: "-D__AVX256__")
    monkeypatch.setattr(ds_config, "supports_bf16", lambda: True)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "ds.json", changes)
    assert "\n" not in str(error.value)


def test_what_is_rounded_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(ds_config, "supports_bf16", lambda: True)
    file = tmp_path / "ds.json"
    for accumulation, sums in ((1, "bf16"), (2, "fp32")):
        config = load(file, {}, accumulation=accumulation)
        assert config["data_types"]["grad_accum_dtype"] == sums
        (line,) = ds_notes(config)
        assert "held in bf16 alone" in line and "1/512" in line
    rounded = load(file, {"data_types.grad_accum_dtype": "bf16"}, stage=3, accumulation=2)
    assert "gradients of 2 micro-batches are summed in bf16, rounded after each" in ds_notes(rounded)[1]


def test_large_groups_are_cut_for_offload_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ds_config, "supports_bf16", lambda: True)
    monkeypatch.setattr(ds_check.CPUAdamBuilder, "simd_width", lambda _: "-D__AVX512__")
    monkeypatch.setattr(ds_config, "LARGEST_GROUP", 10)
    a, b, c, d = (torch.zeros(size) for size in (4, 6, 30, 1))
    groups = [{"params": [a, b, c], "weight_decay": 0.1}, {"params": [d], "weight_decay": 0.0}]
    here = split_groups(groups, load(tmp_path / "ds.json", OFFLOAD | CPU_ADAM))
    assert [[len(one) for one in group["params"]] for group in here] == [[4, 6], [30], [1]]
    assert [group["weight_decay"] for group in here] == [0.1, 0.1, 0.0]
    for changes, stage in (({}, 2), (OFFLOAD | CPU_ADAM, 3)):
        assert split_groups(groups, load(tmp_path / "ds.json", changes, stage)) is groups


def test_masters_are_sent_as_they_are_if_they_have_the_type_of_the_weights():
    class Optimizer:
        single_partition_of_fp32_groups = [torch.ones(3, dtype=torch.bfloat16), torch.ones(3)]
        param_buffer_of_bit16_for_cpu_offload_groups = [torch.zeros(3, dtype=torch.bfloat16) for _ in range(2)]

    patches.drop_copies_of_masters(Optimizer)
    masters, sent = Optimizer.single_partition_of_fp32_groups, Optimizer.param_buffer_of_bit16_for_cpu_offload_groups
    assert [one.data_ptr() == other.data_ptr() for one, other in zip(masters, sent, strict=True)] == [True, False]
    patches.drop_copies_of_masters(object())  # of ZeRO-3


def test_a_moment_above_the_largest_beta_never_falls_and_one_below_does():
    moments = torch.linspace(1, 2, 129).bfloat16()  # all numbers of bf16 from 1 to 2
    assert (moments.float().mul(ds_check.LARGEST_BETA).bfloat16() < moments).all()
    assert not (moments.float().mul(1 - 2**-10).bfloat16() < moments)[1:].any()
