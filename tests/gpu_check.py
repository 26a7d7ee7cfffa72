"""Try on this machine's accelerator what the other tests try on a CPU, and what only a GPU can show.

    bash scripts/gpu_check.sh [--short] [--folder DIR]

Random models: tiny ones for what must work, and two layers of the official widths for memory and speed. No weights are
downloaded. Takes under 20 minutes on one GPU; on a CPU the short form runs, so that this file keeps working.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import train
import utils
from glm_models import MODE, attention, ops, quantized
from glm_models.modeling import Block
from glm_models.tiny import make_tiny_checkpoint
from tuning.arguments.quantization import missing_package
from tuning.engine import loading
from tuning.plan import planner

DS_FILES = {
    "zero2": "ds_zero2_no_offload.json",
    "zero3": "ds_zero3_no_offload.json",
    "offload": "ds_zero3_offload.json",
}
METHODS = {
    "freeze": "--freeze_module_name layers.1.",
    "ptuning": "--pre_seq_len 4 --prefix_dropout 0",
    "lora": "--lora_dim 4 --lora_dropout 0 --lora_module_name query_key_value,dense_h_to_4h",
    "all": "",
}
TEXT = [
    f"第{i}辆车的水泵漏水，发动机怠速不稳，换上新的密封圈以后恢复正常。 The pump number {i} leaks." for i in range(60)
]
WIDE = {  # the official widths
    "glm": {"inner_hidden_size": 16384},
    "glm2": {"ffn_hidden_size": 13696},
    "glm3": {"ffn_hidden_size": 13696},
}
VOCABULARY = {"glm": 130528, "glm2": 65024, "glm3": 65024}
# Memory and speed of two wide layers: name -> family and flags. A dozen, of all methods and stages.
SETTINGS = {
    "lora": ("glm3", "lora --gradient_checkpointing"),
    "lora, no checkpointing": ("glm3", "lora"),
    "lora, 4 rows": ("glm2", "lora --gradient_checkpointing --per_device_train_batch_size 4"),
    "lora, ChatGLM-6B": ("glm", "lora --gradient_checkpointing"),
    "lora, ZeRO-3": ("glm3", "lora --gradient_checkpointing --ds_file ds_zero3_no_offload.json"),
    "lora, tiled and offloaded": ("glm3", "lora --gradient_checkpointing --tiled_mlp --offload_inputs --max_len 4096"),
    "ptuning": ("glm2", "ptuning --gradient_checkpointing"),
    "ptuning, ChatGLM-6B": ("glm", "ptuning --gradient_checkpointing"),
    "freeze": ("glm3", "freeze --freeze_module_name layers.1."),
    "freeze, ChatGLM-6B": ("glm", "freeze --freeze_module_name layers.1."),
    "all": ("glm3", "all --gradient_checkpointing"),
    "all, ZeRO-3": ("glm2", "all --gradient_checkpointing --ds_file ds_zero3_no_offload.json"),
}
PLANNED = 0.05  # share by which memory may be above or below what was planned


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Skip(Exception):
    """Why a check is not made here."""


@dataclass
class Machine:
    """Where and how the checks run: a folder for all files, whether in short, the type with tensor cores."""

    folder: Path
    short: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def base(self, mode: str, wide: bool = False) -> Path:
        """A random checkpoint of two layers; made once."""
        folder = self.folder / f"{mode}{'-wide' * wide}"
        if not folder.exists():
            sizes = {"hidden_size": 32, "heads": 2}
            if wide and not self.short:
                sizes = {"hidden_size": 4096, "heads": 32, "embedding_rows": VOCABULARY[mode], **WIDE[mode]}
            make_tiny_checkpoint(mode, str(folder), TEXT, layers=2, **sizes)
        return folder

    def rows(self, name: str, count: int, words: Callable[[int], int]) -> Path:
        """An instruction file; row i's output has words(i) sentences."""
        path = self.folder / f"{name}.json"
        lines = [
            {"instruction": "写一句话：", "input": TEXT[i % 60], "output": "".join(TEXT[: words(i)])}
            for i in range(count)
        ]
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        return path

    def ds_file(self, name: str, dtype: torch.dtype | None = None) -> Path:
        """One of the project's ds files, in a given type, or "auto"."""
        path = self.folder / f"{name}-{dtype}.json"
        content = json.loads((ROOT / DS_FILES[name]).read_text())
        if dtype is not None:
            content["bf16"]["enabled"] = dtype == torch.bfloat16
            content["fp16"]["enabled"] = dtype == torch.float16
            content["fp16"]["initial_scale_power"] = 8  # else the first steps would be left out
        path.write_text(json.dumps(content))
        return path

    def train_flags(self, mode: str, method: str, data: Path, output: str, *more, wide: bool = False) -> list[str]:
        fixed = f"--mode {mode} --train_type {method} --model_name_or_path {self.base(mode, wide)} --train_path {data} "
        fixed += f"--output_dir {self.folder / output} --data_cache {self.folder}/cache --show_loss_step 1 "
        return [*fixed.split(), *map(str, more)]

    def run(self, name: str, jobs: dict, ranks: int = 1) -> dict[str, dict]:
        """Run jobs of support/gpu_jobs.py. Returns their results by name; of one that killed its process an error."""
        results, left = {}, dict(jobs)
        path, done = self.folder / f"{name}.json", self.folder / f"{name}.jsonl"
        while left:
            path.write_text(json.dumps(left))
            done.unlink(missing_ok=True)
            command = [sys.executable, "tests/support/gpu_jobs.py", path, done]
            if ranks > 1:
                command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", ranks, *command[1:]]
            run = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900)
            lines = done.read_text().splitlines() if done.exists() else []
            ended = {row.pop("name"): row for row in map(json.loads, lines)}
            results |= ended
            left = {name: job for name, job in left.items() if name not in ended}
            if left and run.returncode == 0:
                raise AssertionError(f"no results of {', '.join(left)}")
            if left and not any("error" in row for row in ended.values()):
                culprit, last = next(iter(left)), (run.stderr.strip() or "no message").splitlines()[-1]
                results[culprit] = {"error": f"exit code {run.returncode}: {last[:300]}"}
                del left[culprit]
        return results


# Checks. Each returns what is worth telling, raises Skip where it cannot be made, and AssertionError where it fails.


def versions(machine: Machine) -> str:
    wanted = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line[1:])
    found = {"torch": torch.__version__.split("+")[0], "deepspeed": deepspeed.__version__.split("+")[0]}
    others = [
        f"{name} {version} instead of {wanted[name]}" for name, version in found.items() if version != wanted[name]
    ]
    assert tuple(map(int, found["torch"].split(".")[:2])) >= (2, 11), f"torch {found['torch']} is older than 2.11"
    return "; ".join(others) or "as in requirements.txt"


def attention_kernels(machine: Machine) -> str:
    """Which kernels attention takes: none that holds the scores, and not cuDNN's."""
    chosen = {}
    for mode in MODE:
        for dtype in {machine.dtype, torch.float32}:
            model = loading.load_base(mode, str(machine.base(mode)), dtype).to(machine.device)
            module = next(m for m in model.modules() if hasattr(m, "num_heads") and hasattr(m, "scaling"))
            groups = getattr(module, "num_groups", 32)
            module.num_key_value_groups = 32 // groups  # as many query heads as the official models have
            q, k, v = (
                torch.randn(1, 256, heads, 128, device=machine.device, dtype=dtype) for heads in (32, groups, groups)
            )
            segments = attention.as_segments([(200, 0), (56, 5)])
            inputs = attention.LayerInputs(rotation=None, segments=segments)  # the rotation is not read here
            with profile(activities=[ProfilerActivity.CPU]) as events:
                attention.attention_forward(module, q, k, v, inputs)
            names = {event.key.removeprefix("aten::") for event in events.key_averages()}
            kernels = {name.removeprefix("_scaled_dot_product_") for name in names if "_scaled_dot_product_" in name}
            chosen[f"{mode} {short_name(dtype)}"] = kernels
    for name, kernels in chosen.items():
        assert kernels and not any("cudnn" in kernel or "math" in kernel for kernel in kernels), f"{name}: {kernels}"
    return "; ".join(f"{name}: {', '.join(sorted(kernels))}" for name, kernels in chosen.items())


def packed_rows(machine: Machine) -> str:
    """Attention of a packed row in one call, and its gradients: as near to float64 as one call for each sample."""
    ratios = []
    for mode in MODE:
        model = loading.load_base(mode, str(machine.base(mode)), machine.dtype).to(machine.device)
        if reason := model.transformer.why_one_by_one(machine.device, machine.dtype):
            raise Skip(reason)
        module = model.transformer.blocks[0].get_attention()
        groups = getattr(module, "num_groups", 32)
        module.num_key_value_groups = 32 // groups
        contexts = (130, 5, 0, 1) if mode == "glm" else (0, 0, 0, 0)
        segments = attention.as_segments(tuple(zip((200, 56, 300, 1), contexts, strict=True)))
        for before in (0, 16):
            torch.manual_seed(0)
            shapes = [(1, 557, heads, 128) for heads in (32, groups, groups)]
            shapes += [(2, len(segments), groups, before, 128)] if before else []
            leaves = [torch.randn(shape, device=machine.device).to(machine.dtype) for shape in shapes]
            toward = torch.randn(1, 557, 32 * 128, device=machine.device).to(machine.dtype)

            def results(packed, dtype, leaves=leaves, toward=toward, module=module, segments=segments):
                inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
                prefix = inputs[3] if len(inputs) > 3 else None
                layer = attention.LayerInputs(None, segments=segments, packed=packed, prefix=prefix)
                out = attention.attention_forward(module, *inputs[:3], layer)
                return [out, *torch.autograd.grad(out, inputs, toward.to(dtype))]

            packed = attention.pack_row(segments, before, machine.device)
            exact = results(None, torch.float64)
            for one, own, right in zip(
                results(packed, machine.dtype), results(None, machine.dtype), exact, strict=True
            ):
                ratios.append(((one - right).norm() / (own - right).norm()).item())
    assert max(ratios) < 1.2, f"errors {', '.join(f'{ratio:.2f}' for ratio in ratios)} times those of single calls"
    return f"one call a row: {min(ratios):.2f} to {max(ratios):.2f} times the errors of a call a sample"


def norms(machine: Machine) -> str:
    """RMSNorm and its gradients against float64: no more than the rounding of the result."""
    torch.manual_seed(0)
    x, weight, toward = (torch.randn(shape, device=machine.device) for shape in ((64, 4096), (4096,), (64, 4096)))
    x, weight, toward = (t.to(machine.dtype).requires_grad_() for t in (x, weight, toward))
    with profile(activities=[ProfilerActivity.CPU]) as events:
        y = ops.rms_norm(x, weight, 1e-5)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.rms_norm(exact_x, (4096,), exact_weight, 1e-5)
    y.backward(toward)
    exact.backward(toward.double())
    for name, mine, right in (
        ("output", y, exact),
        ("x", x.grad, exact_x.grad),
        ("weight", weight.grad, exact_weight.grad),
    ):
        error = ((mine.double() - right).norm() / right.norm()).item()
        assert error < 4 * torch.finfo(machine.dtype).eps, f"{name}: {error:.1e} off"
    fused = any("fused_rms_norm" in event.key for event in events.key_averages())
    assert fused or not machine.cuda, "torch's fused kernel was not taken"
    return "fused" if fused else "by this project's own function, as on every CPU"


def matrix(machine: Machine) -> str:
    """Families x methods x ds files in half precision: train, save, resume with the same losses; results answer."""
    modes, methods, files = (["glm3"], ["lora"], ["zero2"]) if machine.short else (MODE, METHODS, DS_FILES)
    if shutil.which("c++") is None:
        files = [name for name in files if name != "offload"]
    data, problems, count = machine.rows("matrix", 4, lambda i: 1), [], 0
    types = [torch.bfloat16, torch.float16] if utils.supports_bf16() else [torch.float16]
    for stage3 in (False, True):  # DeepSpeed's ZeRO-3 changes how modules are made: a process of its own
        jobs = {}
        for mode in modes:
            for method in methods:
                for file in (file for file in files if (file != "zero2") == stage3):
                    for dtype in types if mode == "glm3" and not machine.short else types[:1]:
                        name = f"{mode}-{method}-{file}-{short_name(dtype)}"
                        flags = f"{METHODS[method]} --num_train_epochs 2 --gradient_accumulation_steps 2"
                        flags += f" --learning_rate 5e-3 --ds_file {machine.ds_file(file, dtype)}"
                        first = [*flags.split(), "--save_state_steps", "2"]
                        second = [
                            *flags.split(),
                            "--resume_from_checkpoint",
                            machine.folder / name / "states/step-00000002",
                        ]
                        jobs[name] = ("train", machine.train_flags(mode, method, data, name, *first))
                        jobs[f"{name} resumed"] = (
                            "train",
                            machine.train_flags(mode, method, data, f"{name}-r", *second),
                        )
                        result = machine.folder / name / "epoch-2-step-4"
                        answers = ["--mode", mode, "--model_path", result, "--predict_path", data, "--max_length", 120]
                        jobs[f"{name} answers"] = ("predict", [*map(str, answers)])
        results = machine.run(f"matrix-{'zero3' if stage3 else 'zero2'}", jobs) if jobs else {}
        problems += [f"{name}: {row['error']}" for name, row in results.items() if "error" in row]
        for name, row in results.items():
            count += 1
            resumed = results.get(f"{name} resumed", {})
            if "losses" in row and "losses" in resumed:
                # sums of gradients may come in another order on a GPU
                same = all(
                    math.isclose(a, b, rel_tol=2e-3) for a, b in zip(row["losses"][2:], resumed["losses"], strict=True)
                )
                problems += [] if same else [f"{name}: resumed with {resumed['losses']} instead of {row['losses'][2:]}"]
                problems += [] if row["fused"] or "offload" in name else [f"{name}: AdamW is not fused"]
    assert not problems, "; ".join(problems)
    left_out = "" if shutil.which("c++") else "; offload left out: no C++ compiler for DeepSpeed's CPU optimizer"
    return f"{count} trainings, resumed trainings and predictions{left_out}"


def wide_runs(machine: Machine) -> dict[str, dict]:
    """Results of SETTINGS and of packed and unpacked rows; run once, for several checks."""
    path = machine.folder / "wide.json"
    if path.exists():
        return json.loads(path.read_text())
    long = machine.rows("long", 4, lambda i: 60)
    settings = dict(list(SETTINGS.items())[:1]) if machine.short else SETTINGS
    jobs = {}
    for name, (mode, flags) in settings.items():
        method, *more = flags.split()
        length = [] if "--max_len" in more else ["--max_len", "1024"]
        argv = machine.train_flags(
            mode, method, long, f"wide-{len(jobs)}", "--max_src_len", 512, *length, *more, wide=True
        )
        jobs[name] = ("train", argv)
    mixed = machine.rows("mixed", 24 if machine.short else 200, lambda i: 1 + i % 9)
    for name, more in (("rows", ["--per_device_train_batch_size", "1"]), ("packed rows", ["--packing"])):
        flags = ["--max_len", 2048, "--max_src_len", 512, "--gradient_checkpointing", *more]
        jobs[name] = ("train", machine.train_flags("glm3", "lora", mixed, f"wide-{len(jobs)}", *flags, wide=True))
    stage3 = {name: job for name, job in jobs.items() if "ds_zero3_no_offload.json" in job[1]}
    others = {name: job for name, job in jobs.items() if name not in stage3}
    results = {}
    for part, some in (("wide-zero2", others), ("wide-zero3", stage3)):
        results |= machine.run(part, some) if some else {}
    for name, row in results.items():
        row["argv"] = jobs[name][1]
    path.write_text(json.dumps(results))
    return results


def memory(machine: Machine) -> str:
    """Measured memory against what --plan says of the same flags."""
    results = {name: row for name, row in wide_runs(machine).items() if "rows" not in name}
    problems, lines = [f"{name}: {row['error']}" for name, row in results.items() if "error" in row], []
    for name, row in results.items():
        if "error" in row:
            continue
        needs = planner.Plans(planner.plan_setup, 1)(train.parse_args(row["argv"]))
        planned = (sum(needs.parts.values()), needs.peak - planner.CONTEXT)
        if not machine.cuda:
            continue
        measured = (row["allocated"], row["reserved"])
        lines.append(f"{name} {measured[0] / 2**30:.2f}/{planned[0] / 2**30:.2f} GiB")
        for kind, is_, want in zip(("allocated", "reserved"), measured, planned, strict=True):
            if abs(is_ / want - 1) > PLANNED:
                problems.append(f"{name}: {is_ / 2**30:.2f} GiB {kind}, {want / 2**30:.2f} planned")
    assert not problems, "; ".join(problems)
    if not machine.cuda:
        raise Skip("a CPU does not count the memory of a device; tests/plan/test_planner.py measures there")
    return "measured/planned: " + "; ".join(lines)


def waits(machine: Machine) -> str:
    """How often a micro-batch makes the CPU wait for the device."""
    if not machine.cuda:
        raise Skip("there is no device to wait for")
    counted = {name: row["waits"] for name, row in wide_runs(machine).items() if row.get("waits") is not None}
    assert counted, "no waits were counted"
    return "a micro-batch: " + "; ".join(f"{name} {count:.1f}" for name, count in counted.items())


def speed(machine: Machine) -> str:
    """Tokens a second with rows one by one, and packed."""
    results, lines = wide_runs(machine), []
    for name in ("rows", "packed rows"):
        row = results[name]
        assert "error" not in row, row["error"]
        output = Path(row["argv"][row["argv"].index("--output_dir") + 1])
        last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
        lines.append(f"{name} {last['tokens'] / last['seconds']:,.0f} tokens/s")
    return ", ".join(lines) + ("" if machine.short else " (two layers of 28)")


def stop_and_go_on(machine: Machine) -> str:
    """SIGTERM saves a state and ends with 75; the same command goes on to the end."""
    data = machine.rows("many", 400, lambda i: 2)
    argv = machine.train_flags(
        "glm3", "lora", data, "stopped", "--resume_from_checkpoint", "auto", *METHODS["lora"].split()
    )
    command = [sys.executable, "train.py", *argv]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        told = []
        for line in run.stdout:
            told.append(line)
            if " step 3/" in line:
                run.send_signal(signal.SIGTERM)
    assert run.returncode == 75, f"exit code {run.returncode} after SIGTERM: {told[-1].strip()}"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr.strip().splitlines()[-1]
    return "stopped at a step, and went on to the end"


def quantised_bases(machine: Machine) -> str:
    """4 and 8 bits: weights as a CPU quantises them, products and gradients with them; LoRA, its resume and answers."""
    if missing := missing_package():
        raise Skip(f"the package bitsandbytes is not installed: {missing}")
    torch.manual_seed(0)
    weight, x = torch.randn(192, 128), torch.randn(3, 5, 128)
    for bits, name in quantized.BITS.items():
        model = torch.nn.Sequential(OneLinear(weight.to(machine.device, machine.dtype)))
        layer = use_one(model, bits, machine.dtype)
        exact = quantized.round_trip(weight.to(machine.dtype), bits)
        dense = layer.dequantized(torch.float32)
        assert ((dense.cpu() - exact).norm() / exact.norm()).item() < 1e-2, f"{name}: other weights than on a CPU"
        inputs = x.to(machine.device, machine.dtype).requires_grad_()
        toward = torch.ones(3, 5, 192, device=machine.device, dtype=machine.dtype)
        (grad,) = torch.autograd.grad(layer(inputs), inputs, toward)
        pairs = [(layer(inputs.detach()), inputs.detach().float() @ dense.t()), (grad, toward.float() @ dense)]
        for one, right in pairs:
            error = ((one.float() - right).norm() / right.norm()).item()
            assert error < 8 * torch.finfo(machine.dtype).eps, f"{name}: {error:.1e} off"
    data, jobs = machine.rows("quantised", 4, lambda i: 2), {}
    for mode in ["glm3"] if machine.short else MODE:
        for bits in (None, 4) if machine.short else (None, 4, 8):
            name, more = f"{mode}-{bits}-bits", ["--quantization_bit", bits] if bits else []
            fixed = (
                f"{METHODS['lora']} --num_train_epochs 2 --ds_file {machine.ds_file('zero2', machine.dtype)}".split()
            )
            first = machine.train_flags(mode, "lora", data, f"bits-{name}", *fixed, "--save_state_steps", 4, *more)
            jobs[name] = ("train", first)
            if bits:
                state = machine.folder / f"bits-{name}" / "states/step-00000004"
                again = [*fixed, *more, "--resume_from_checkpoint", state]
                jobs[f"{name} resumed"] = ("train", machine.train_flags(mode, "lora", data, f"bits-{name}-r", *again))
                result = machine.folder / f"bits-{name}" / "epoch-2-step-8"
                answers = ["--mode", mode, "--model_path", result, "--predict_path", data, "--max_length", 120, *more]
                jobs[f"{name} answers"] = ("predict", [*map(str, answers)])
    results = machine.run("bits", jobs)
    problems = [f"{name}: {row['error']}" for name, row in results.items() if "error" in row]
    for name, row in results.items():
        losses, resumed = row.get("losses"), results.get(f"{name} resumed", {}).get("losses")
        whole = results[f"{name.split('-')[0]}-None-bits"].get("losses")
        if losses and resumed and not near(losses[4:], resumed, 2e-3):
            problems.append(f"{name}: resumed with {resumed} instead of {losses[4:]}")
        if losses and whole and len(losses) == len(whole) and not near(losses, whole, 0.1):
            problems.append(f"{name}: losses {losses}, those of the whole base {whole}")
    assert not problems, "; ".join(problems)
    return f"weights, products, gradients; {len(jobs)} trainings, resumed trainings and predictions"


class OneLinear(Block):
    """A block that is one linear layer."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.linear = torch.nn.Linear(*weight.t().shape, bias=False, device=weight.device, dtype=weight.dtype)
        self.linear.weight.data.copy_(weight)


def use_one(model: torch.nn.Module, bits: int, dtype: torch.dtype) -> quantized.QuantizedLinear:
    """Quantise the only linear layer of a model."""
    quantized.use_quantized_layers(model, bits, dtype)
    (layer,) = quantized.quantized_layers(model)
    return layer


def near(some: list[float], others: list[float], share: float) -> bool:
    return all(math.isclose(a, b, rel_tol=share) for a, b in zip(some, others, strict=True))


def pipelines_and_answers(machine: Machine) -> str:
    """Two processes: a pipeline of two stages has the losses of one process, and a file gets the same answers."""
    if machine.cuda and get_accelerator().device_count() < 2:
        raise Skip("one device; the tests run two processes on a CPU")
    modes = ["glm3"] if machine.short or machine.dtype == torch.float16 else MODE
    count = 4 if machine.short else 8
    data, results, files = machine.rows("stages", count, lambda i: 1 + i % 3), {}, {}
    for ranks in (1, 2):
        jobs = {}
        for mode in modes:
            flags = f"--gradient_accumulation_steps 4 --ds_file {machine.ds_file('zero2', machine.dtype)}".split()
            flags += ["--pipeline_stages", 2] if ranks == 2 else []
            jobs[f"{mode} losses"] = ("train", machine.train_flags(mode, "all", data, f"stages-{mode}-{ranks}", *flags))
            files[mode, ranks] = machine.folder / f"answers-{mode}-{ranks}.jsonl"
            # one row at a time: then a row's answer does not depend on those beside it
            limit = 60 if machine.short else 120
            answers = ["--mode", mode, "--model_path", machine.base(mode), "--predict_path", data]
            answers += ["--max_length", limit, "--batch_size", 1, "--output_path", files[mode, ranks]]
            jobs[f"{mode} answers"] = ("predict", [*map(str, answers)])
        results[ranks] = machine.run(f"stages-{ranks}", jobs, ranks)
    for name, row in results[1].items():
        other = results[2][name]
        assert "error" not in row and "error" not in other, f"{name}: {row}, {other}"
        assert "losses" not in row or near(row["losses"], other["losses"], 1e-2), f"{name}: {row}, {other}"
    for mode in modes:
        one, other = ([json.loads(line) for line in files[mode, ranks].read_text().splitlines()] for ranks in (1, 2))
        assert len(one) == count, f"{mode}: {len(one)} answers"
        assert [answer_of(row) for row in one] == [answer_of(row) for row in other], f"{mode}: other answers"
    return f"{', '.join(modes)}: two stages have the losses of one process within 1 %; two processes the same answers"


def answer_of(row: dict) -> dict:
    """A line of an answer file without what differs from run to run."""
    return {key: value for key, value in row.items() if "second" not in key and "time" not in key}


def flash_attention(machine: Machine) -> str:
    """--attn_implementation flash_attention_2: losses as with torch's own kernels."""
    if not machine.cuda:
        raise Skip("flash-attn is for GPUs")
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        raise Skip("the flash-attn package is not installed") from None
    data, jobs = machine.rows("flash", 8, lambda i: 3), {}
    for name in ("sdpa", "flash_attention_2"):
        flags = [
            *METHODS["lora"].split(),
            "--ds_file",
            machine.ds_file("zero2", machine.dtype),
            "--attn_implementation",
            name,
        ]
        jobs[name] = ("train", machine.train_flags("glm3", "lora", data, f"flash-{name}", *flags, wide=True))
    results = machine.run("flash", jobs)
    assert not any("error" in row for row in results.values()), str(results)
    pairs = list(zip(*(row["losses"] for row in results.values()), strict=True))
    assert all(math.isclose(a, b, rel_tol=1e-2) for a, b in pairs), str(pairs)
    return f"{len(pairs)} losses equal within 1 %"


def several_gpus(machine: Machine) -> str:
    """Two GPUs give the losses of one."""
    if get_accelerator().device_count() < 2 or not machine.cuda:
        raise Skip("one device; the tests run two processes on a CPU")
    data, losses = machine.rows("two", 8, lambda i: 2), {}
    for ranks in (1, 2):
        for file in ("zero2", "zero3"):
            flags = f"--gradient_accumulation_steps {4 // ranks} --ds_file {machine.ds_file(file, machine.dtype)}"
            name = f"{ranks}-{file}"
            argv = machine.train_flags("glm3", "all", data, f"gpus-{name}", *flags.split())
            (row,) = machine.run(f"gpus-{name}", {name: ("train", argv)}, ranks).values()
            assert "error" not in row, f"{name}: {row['error']}"
            losses[name] = row["losses"]
    first = losses["1-zero2"]
    for name, others in losses.items():
        assert all(math.isclose(a, b, rel_tol=1e-2) for a, b in zip(first, others, strict=True)), (
            f"{name}: {others}, {first}"
        )
    return "2 GPUs, ZeRO-2 and ZeRO-3: losses of 1 GPU within 1 %"


CHECKS = {
    "versions": versions,
    "attention kernels": attention_kernels,
    "packed rows": packed_rows,
    "fused norm": norms,
    "half precision matrix": matrix,
    "signal and resume": stop_and_go_on,
    "memory against --plan": memory,
    "waits for the device": waits,
    "tokens a second": speed,
    "quantised bases": quantised_bases,
    "pipeline and answers": pipelines_and_answers,
    "flash_attention_2": flash_attention,
    "several GPUs": several_gpus,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one family and method, narrow models (always on a CPU)")
    parser.add_argument("--folder", help="where files go, and stay (default: a temporary folder)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    utils.silence_libraries(verbose=False)
    device = utils.device()
    dtype = torch.bfloat16 if utils.supports_bf16() else torch.float16
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU: no GPU was found"
    print(f"checking {name}, torch {torch.__version__}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        machine = Machine(folder, args.short or device.type == "cpu", dtype, device)
        for title, check in CHECKS.items():
            start = time.perf_counter()
            try:
                outcome, text = "ok", check(machine)
            except Skip as reason:
                outcome, text = "skipped", str(reason)
            except Exception as error:  # a check that breaks has failed
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                outcome, text = "FAILED", kind + " ".join(str(error).split())
            failed += outcome == "FAILED"
            print(f"{title:<24}{outcome:<9}{time.perf_counter() - start:6.0f} s  {text}", flush=True)
    print(f"{failed} of {len(CHECKS)} checks failed" if failed else "no check failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
