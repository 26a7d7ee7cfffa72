"""What steps of small models really allocate, by torch's own CPU allocator, and the models themselves."""

import argparse
import gc
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import train
import utils
from glm_models import MODE
from glm_models.quantized import use_quantized_layers
from tuning.engine import patches
from tuning.engine.ds_check import STATES_IN_BF16
from tuning.engine.ds_config import compute_dtype, ds_values, load_ds_config
from tuning.plan import planner
from tuning.run import launch

ROOT = Path(__file__).resolve().parents[2]

# Small, and yet so that activations, not weights, are what a step allocates.
GLM = {"vocab_size": 1024, "hidden_size": 128, "num_layers": 3, "num_attention_heads": 4, "inner_hidden_size": 512}
GLM |= {"mask_token_id": 1000, "gmask_token_id": 1001, "bos_token_id": 1004, "eos_token_id": 1005}
GLM2 = {"padded_vocab_size": 1024, "hidden_size": 128, "num_layers": 3, "num_attention_heads": 4, "kv_channels": 32}
GLM2 |= {"ffn_hidden_size": 352}
SIZES = {"glm": GLM, "glm2": GLM2, "glm3": GLM2}

# name -> flags of train.py, for steps under DeepSpeed
SETTINGS = {
    "all": "--mode glm2 --train_type all --gradient_checkpointing",
    "all-plain": "--mode glm2 --train_type all --gradient_accumulation_steps 2",
    "freeze": "--mode glm --train_type freeze --gradient_accumulation_steps 2",
    "lora": "--mode glm3 --train_type lora --gradient_checkpointing",
    "variants": "--mode glm3 --train_type lora --use_dora --lora_module_name dense_4h_to_h --gradient_checkpointing "
    "--modules_to_save word_embeddings,output_layer --neftune_noise_alpha 5",
    "ptuning": "--mode glm2 --train_type ptuning --gradient_accumulation_steps 2 --gradient_checkpointing",
    # gradients that are larger than a bucket, and some that are not
    "large": "--mode glm2 --train_type freeze --gradient_accumulation_steps 2 --gradient_checkpointing "
    "--freeze_module_name layers.",
    "large-all": "--mode glm3 --train_type all --gradient_checkpointing",
}
SMALL_BUCKET = 10_000  # numbers; of the settings named "large"
# types of the sums of gradients, and with "pure" masters and moments in bf16
SUMS = ("bf16", "fp32", "pure bf16", "pure fp32")
PURE = dict.fromkeys(STATES_IN_BF16, True)


def sums_of(name: str) -> tuple[str, ...]:
    """Those of `SUMS` that a setting is measured with: the memory of masters does not depend on the method."""
    return SUMS if name in ("all", "all-plain", "large") else SUMS[:2]


def arguments(flags: str) -> argparse.Namespace:
    fixed = f"--model_name_or_path . --train_path {__file__} --max_len 256 --max_src_len 128 "
    fixed += "--per_device_train_batch_size 2 "
    if "--train_type freeze" in flags:
        fixed += "--freeze_module_name layers.2. "
    return train.parse_args((fixed + flags).split())


def setting(name: str, stage: int, gpus: int, sums: str) -> tuple[argparse.Namespace, dict]:
    """Arguments and ds config of one of `SETTINGS` with one of `SUMS`."""
    args = arguments(SETTINGS[name])
    sections = {"data_types": {"grad_accum_dtype": sums.removeprefix("pure ")}}
    sections["zero_optimization"] = {"reduce_bucket_size": SMALL_BUCKET} if name.startswith("large") else {}
    sections["bf16"] = PURE if sums.startswith("pure") else {}
    return args, ds_config(args, stage, gpus, **sections)


def ds_config(args: argparse.Namespace, stage: int, gpus: int = 1, **sections) -> dict:
    """The project's ds file of a stage, in bf16, with sections replaced."""
    path = ROOT / f"ds_zero{stage}_no_offload.json"
    config = load_ds_config(str(path), ds_values(args, gpus, 10, 128), as_gpu=True)
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    return config


def build(args: argparse.Namespace, config: dict, device: str) -> planner.Setup:
    """A small model as train.py would make it."""
    family = MODE[args.mode]

    def load(**changes):
        model = family.model(family.config(**SIZES[args.mode], use_cache=False, **changes))
        if args.quantization_bit:
            use_quantized_layers(model, args.quantization_bit, compute_dtype(config))
        return model

    with torch.device(device):
        model = train.build_model(args, load).to(compute_dtype(config)).train()
    groups = train.parameter_groups(model, args)
    train.fit_buckets(config, sum(p.numel() for group in groups for p in group["params"]))
    return planner.Setup(
        model, planner.longest_batch(args, family.config(**SIZES[args.mode])), config, groups, args.save_prefix_only
    )


def peak_of(step) -> int:
    """The most bytes by which `step` raised what torch's CPU allocator has given out."""
    gc.disable()  # garbage of before, freed meanwhile, would count against what the step takes
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        gc.enable()
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    found.sort(key=lambda one: one[0])
    return max(total for _, total, _ in found) - (found[0][1] - found[0][2])


def measure(args: argparse.Namespace, config: dict) -> list[int]:
    """Peaks of DeepSpeed's last backward of an optimizer step, and of that step itself, from the second on.

    The lowest of three: gloo's own thread frees its copy of a reduced bucket, of the CPU alone, at once or, on a busy
    machine, only after DeepSpeed has gone on.
    """
    import deepspeed

    gc.collect()  # the engine before this one has cycles
    setup = build(args, config, "cpu")
    engine, *_ = deepspeed.initialize(model=setup.model, model_parameters=setup.groups, config=config)

    def backward():
        engine.backward(engine(**setup.batch).loss)

    def step(watched) -> tuple:
        for _ in range(args.gradient_accumulation_steps - 1):
            backward()
            engine.step()
        return watched(backward), watched(engine.step)

    step(lambda part: part())  # makes the optimizer's state
    peaks = [step(peak_of) for _ in range(3)]
    engine.destroy()
    return [min(both) for both in zip(*peaks, strict=True)]


def measure_all(stage: int, names: Iterable[str], results: Path) -> None:
    """On each rank: run DeepSpeed's own steps of some `SETTINGS` under a ZeRO stage, as train.py trims it.

    Writes {name: [bytes of the backward, of the step]}; of several ranks, those of the one that needs most.
    """
    utils.silence_libraries(verbose=False)
    patches.apply()
    rank, ranks = launch.start_distributed(verbose=False)
    measured = {}
    for name in names:
        for sums in sums_of(name):
            peaks = [None] * ranks
            torch.distributed.all_gather_object(peaks, measure(*setting(name, stage, ranks, sums)))
            measured[f"{name} {sums}"] = [max(of_ranks) for of_ranks in zip(*peaks, strict=True)]
    if rank == 0:
        results.write_text(json.dumps(measured))
