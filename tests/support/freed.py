"""Train tiny models twice, with DeepSpeed's own way to take a gradient and with patches._reduce_gradient.

Equal facts are equal numbers bit by bit.
"""

import hashlib
import json
from pathlib import Path
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

import utils
from tuning.engine import patches
from tuning.run import launch

TAKES = "reduce_independent_p_g_buckets_and_remove_grads"
BUCKET = 1000  # numbers: the 40 x 40 weights are larger, the 12 x 40 ones and the biases are not
# (type of the model, of sums of gradients)
TYPES = [("fp32", None), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", None), ("fp16", "fp32")]
CASES = {
    f"stage {stage}, {kind} summed in {sums}{', offload' * offload}": (stage, kind, sums, offload)
    for kind, sums in TYPES
    for stage, offload in ((1, False), (2, False), (2, True))
    if (stage, kind, sums) != (1, "bf16", "fp32")  # of these DeepSpeed makes an optimizer that sums by itself
}


def ds_config(stage: int, kind: str, sums: str | None, offload: bool) -> dict:
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "overlap_comm": True}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": sums},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    if kind != "fp32":
        config[kind] = {"enabled": True} | ({"initial_scale_power": 8} if kind == "fp16" else {})
    return config


def facts(config: dict) -> list:
    """Of two optimizer steps: each loss and norm of the gradient, and hashes of the masters at the end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 40), torch.nn.GELU(), torch.nn.Linear(40, 40), torch.nn.GELU(), torch.nn.Linear(40, 40)
    )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    found = []
    for _ in range(2 * config["gradient_accumulation_steps"]):
        x = torch.randn(2, 12, generator=generator).to(next(model.parameters()).dtype)
        loss = engine(x).float().pow(2).sum()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    found.append(float(engine.get_global_grad_norm()))
    masters = engine.optimizer.single_partition_of_fp32_groups
    found += [hashlib.sha256(master.detach().numpy().tobytes()).hexdigest() for master in masters]
    engine.destroy()
    return found


def compare(results: Path) -> None:
    """On each rank: write {name of a case: [facts of the first way, facts of the second]} of rank 0."""
    utils.silence_libraries(verbose=False)
    get_accelerator().is_fp16_supported = lambda: True  # slow, but any CPU can
    patches.apply()
    rank, _ = launch.start_distributed(verbose=False)
    found = {}
    for name, case in CASES.items():
        with mock.patch.object(DeepSpeedZeroOptimizer, TAKES, patches._put_in_bucket):
            found[name] = [facts(ds_config(*case))]
        found[name].append(facts(ds_config(*case)))
    if rank == 0:
        results.write_text(json.dumps(found))
