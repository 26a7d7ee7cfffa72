"""Losses of two ranks with each obeyed key of the ds file set, against losses without it.

    python tests/ds_keys_losses.py            every obeyed key, at every ZeRO stage that reads it; ten minutes
    python tests/ds_keys_losses.py bucket     keys whose name holds one of the words

A key is set to a value that is not DeepSpeed's default. Losses may differ by 1e-5; keys that are meant to change what
is trained stand in MAY_DIFFER with the reason. Each optimizer has the same losses at each stage.
"""

import copy
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

from runs import METHOD_FLAGS, Forked, make_base, make_rows

import train
import utils
from tuning.engine.ds_keys import (
    BOOL,
    LATE,
    OPTIMIZERS,
    POSITIVE,
    REFUSED,
    SCHEDULERS,
    TEXT,
    TEXTS,
    UNTESTED,
    Key,
    walk,
)

ROOT = Path(__file__).resolve().parent.parent
BOUND = 1e-5
MAY_DIFFER = {
    "train_batch_size": "must be what the command line says",
    "train_micro_batch_size_per_gpu": "must be what the command line says",
    "gradient_accumulation_steps": "must be what the command line says",
    "gradient_clipping": "clips",
    "optimizer.type": "another optimizer",
    "optimizer.params.lr": "must be what the command line says",
    "optimizer.params.betas": "of Adam",
    "optimizer.params.eps": "of Adam",
    "optimizer.params.weight_decay": "must be what the command line says",
    "optimizer.params.adam_w_mode": "false: weight decay goes through the moments, with Adam",
    "optimizer.params.bias_correction": "of Adam",
    "scheduler.type": "another lr at each step",
    "scheduler.params.warmup_min_lr": "another lr in the warm-up",
    "scheduler.params.warmup_max_lr": "must be what the command line says",
    "scheduler.params.warmup_num_steps": "must be what the command line says",
    "scheduler.params.warmup_type": "another lr in the warm-up",
    "scheduler.params.total_num_steps": "must be what the command line says",
    "scheduler.params.warmup_min_ratio": "another lr in the warm-up",
    "scheduler.params.cos_min_ratio": "another lr at the end",
    "bf16.enabled": "rounds",
    "bf16.bf16_master_weights_and_grads": "rounds",
    "bf16.bf16_optimizer_states": "rounds",
    "fp16.enabled": "rounds",
    "fp16.loss_scale": "rounds; of fp16, which not every CPU has",
    "fp16.initial_scale_power": "as fp16.loss_scale",
    "fp16.loss_scale_window": "as fp16.loss_scale",
    "fp16.hysteresis": "as fp16.loss_scale",
    "fp16.consecutive_hysteresis": "as fp16.loss_scale",
    "fp16.min_loss_scale": "as fp16.loss_scale",
    "data_types.grad_accum_dtype": "bf16 sums round",
    "communication_data_type": "with bf16, fp32 rounds less",
    "zero_optimization.stage": "a key of all runs here",
    **{name: "of --pipeline_stages" for name, _ in walk() if name.startswith("pipeline.")},
    **{name: "needs the package and an account" for name, _ in walk() if name.startswith(("wandb.", "comet."))},
}
CPU_ADAM = {"optimizer.params": {"lr": "auto", "weight_decay": "auto"}}
TO_CPU = {"device": "cpu", "pin_memory": False}
OFFLOAD = {"zero_optimization.offload_optimizer": TO_CPU} | CPU_ADAM
OFFLOAD_BOTH = OFFLOAD | {"zero_optimization.offload_param": TO_CPU}
# Changes to the file that a key needs beside it; they are in the run without it too.
WITH = {
    "zero_optimization.offload_optimizer.": OFFLOAD,
    "zero_optimization.offload_param.": OFFLOAD_BOTH,
    "bf16.immediate_grad_update": {"bf16.enabled": True},
    **{f"{one}.": {f"{one}.enabled": True} for one in ("tensorboard", "csv_monitor", "comms_logger", "flops_profiler")},
}
# Values to try, where `other` finds none. The runs are in a folder of their own: paths are relative.
VALUES = {
    "zero_optimization.offload_optimizer.device": "cpu",
    "zero_optimization.offload_param.device": "cpu",
    "zero_optimization.reduce_bucket_size": 2000,
    "zero_optimization.allgather_bucket_size": 2000,
    "zero_optimization.sub_group_size": 3000,
    "zero_optimization.stage3_prefetch_bucket_size": 0,
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_model_persistence_threshold": 0,
    "zero_optimization.stage3_max_live_parameters": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "zero_optimization.stage3_module_granularity_threshold": 100,
    "zero_optimization.zero_hpz_partition_size": 2,
    "zero_optimization.leaf_module.classes": ["glm_models.glm2.SelfAttention"],
    "zero_optimization.leaf_module.names": ["transformer.encoder.layers.0.mlp"],
    "zero_optimization.leaf_module.name_suffixes": ["mlp"],
    "optimizer.params.torch_adam": False,
    "optimizer.params.fused": False,
    "optimizer.params.foreach": False,
    "steps_per_print": 1,
    "log_level": "error",
    "comms_logger.prof_ops": ["all_reduce"],
    "checkpoint.tag_validation": "Fail",
    "timers.throughput.enabled": True,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": 0.4,
    "flops_profiler.profile_step": 2,
    "flops_profiler.output_file": "profile.txt",
}
NEEDED = {  # must go with a value
    "optimizer.params.torch_adam": {"optimizer.params.fused": None},
    "optimizer.params.foreach": {"optimizer.params.fused": None},
}
STAGE_KEYS = {"bf16.immediate_grad_update": (1,)}  # DeepSpeed's bf16 optimizer is of stage 1


def other(key: Key):
    """A value that is not the default."""
    if isinstance(key.takes, tuple):
        return next(value for value in key.takes if value != key.default)
    if isinstance(key.default, bool):
        return not key.default
    if isinstance(key.default, int | float):
        return key.default + 1 if key.default < 1 or isinstance(key.default, int) else key.default / 2
    return {BOOL: True, TEXT: "text", TEXTS: [], POSITIVE: 7}[key.takes]


def write(path: Path, stage: int, changes: dict) -> None:
    """A ds file of a stage, with keys by dotted name; None takes one out."""
    config = json.loads((ROOT / f"ds_zero{max(stage, 2)}_no_offload.json").read_text())
    config["zero_optimization"]["stage"] = stage
    for dotted, value in changes.items():
        *sections, name = dotted.split(".")
        holder, value = config, copy.deepcopy(value)
        for one in sections:
            holder = holder.setdefault(one, {})
        holder[name] = value
        if value is None:
            del holder[name]
    path.write_text(json.dumps(config))


def cases(words: list[str] = ()) -> dict[str, tuple[int, dict, dict]]:
    """Name of a run -> stage, changes of the run without the key, changes with it."""
    found = {}
    for dotted, key in walk():
        if not isinstance(key, Key) or key.kind == REFUSED or dotted in MAY_DIFFER:
            continue
        if words and not any(word in dotted for word in words):
            continue
        value = VALUES[dotted] if dotted in VALUES else other(key)
        stages = LATE if "offload_param" in dotted or "leaf_module" in dotted else STAGE_KEYS.get(dotted, key.stages)
        for stage in stages:
            before = next((more for start, more in WITH.items() if dotted.startswith(start)), {})
            if dotted.startswith("zero_optimization.offload_optimizer.device") or dotted.endswith("param.device"):
                before = CPU_ADAM
            after = before | NEEDED.get(dotted, {}) | {dotted: value}
            if dotted.endswith("offload_param.device"):
                after |= OFFLOAD_BOTH
            found[f"{dotted} {json.dumps(value)}, stage {stage}"] = (stage, before, after)
    return found


def optimizers() -> dict[str, tuple[int, dict, dict]]:
    """The same for each optimizer and scheduler: other stages, where ZeRO cuts weights differently, against stage 2."""
    found = {}
    for name in (*OPTIMIZERS, *UNTESTED):
        changes = {"optimizer.type": name, "zero_allow_untested_optimizer": True}
        changes |= CPU_ADAM if name in UNTESTED else OFFLOAD
        for stage in (1, 3):
            found[f"optimizer {name}, stage {stage} against 2"] = (
                2,
                changes,
                changes | {"zero_optimization.stage": stage},
            )
    for name in SCHEDULERS:
        changes = {"scheduler": {"type": name}}
        found[f"scheduler {name}, stage 3 against 2"] = (2, changes, changes | {"zero_optimization.stage": 3})
    half = {"bf16.enabled": True}
    found["bf16 with float32 sums, stage 3 against 2"] = (2, half, half | {"zero_optimization.stage": 3})
    return found


def run_all(jobs: dict[str, list[str]], results: Path) -> None:
    """On each rank: all trainings, one after the other. An error of one is its result."""
    utils.silence_libraries(verbose=False)
    done = {}
    for name, argv in jobs.items():
        print("job", name, flush=True)
        try:
            done[name] = train.train(train.parse_args(argv))
        except Exception as error:
            traceback.print_exc()
            done[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        gc.collect()
        if utils.is_rank_0():
            results.write_text(json.dumps(done))


def losses(wanted: dict, folder: Path, limit: float) -> dict[str, float | str]:
    """Largest difference of losses, or the error, of each case."""
    base, rows = make_base("glm2", folder / "base"), make_rows(folder / "rows.json", 24)
    flags = f"""--mode glm2 --train_type all {METHOD_FLAGS["all"]} --model_name_or_path {base} --train_path {rows}
        --data_cache {folder}/cache --max_len 96 --max_src_len 64 --num_train_epochs 1 --per_device_train_batch_size 2
        --gradient_accumulation_steps 2 --learning_rate 5e-3 --show_loss_step 1"""
    jobs, names = {}, {}

    def job(stage: int, changes: dict) -> str:
        text = json.dumps([stage, changes])
        if text not in names:
            names[text] = f"run-{len(names)}"
            write(folder / f"{names[text]}.json", stage, changes)
            own = ["--ds_file", f"{folder}/{names[text]}.json", "--output_dir", f"{folder}/out-{names[text]}"]
            jobs[names[text]] = [*flags.split(), *own]
        return names[text]

    pairs = {name: (job(stage, before), job(stage, after)) for name, (stage, before, after) in wanted.items()}
    results, log = folder / "results.json", folder / "log.txt"
    Forked(2, log, lambda rank: run_all(jobs, results)).wait(limit)
    done = json.loads(results.read_text())
    return {name: difference(done[before], done[after]) for name, (before, after) in pairs.items()}


def difference(before, after) -> float | str:
    if isinstance(before, str) or isinstance(after, str):
        return before if isinstance(before, str) else after
    assert len(before) == len(after) > 2 and before[0][1] != before[-1][1]
    return max(abs(one - two) for (_, one), (_, two) in zip(before, after, strict=True))


def main() -> None:
    wanted = cases(sys.argv[1:]) if sys.argv[1:] else cases() | optimizers()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = losses(wanted, Path(folder), limit=3600)
        for name, value in found.items():
            good = not isinstance(value, str) and value <= BOUND
            print(f"{'ok ' if good else 'BAD'} {value if isinstance(value, str) else f'{value:.1e}'}  {name}")
    for name, reason in MAY_DIFFER.items():
        print(f"may differ  {name}: {reason}")
    good = sum(not isinstance(value, str) and value <= BOUND for value in found.values())
    print(f"{good} of {len(found)} runs have the losses that they are compared with")


if __name__ == "__main__":
    main()
