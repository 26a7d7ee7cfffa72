"""Pipelines beside one process: the same losses, weights and files. All cases, from the project's folder:

    python tests/pipelines.py [--only "glm lora"]
    python tests/pipelines.py --bytes      # what ranks hand over to each other, counted and as --plan computes it

Each family, all parameters and LoRA, rows packed or not, accumulation 1, 4 and 8, in float32: on one process; in 2 and
in 4 stages; and in 2 stages twice, which take half of the micro-batches each. Prints the largest differences of losses
and weights. Takes about 8 minutes on 2 CPU cores.

Adam's eps is 1e-5: the biases of keys have no gradient but rounding, since attention does not depend on them where
keys are not rotated, and with a smaller eps Adam would take whole steps after it.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
import torch
from conftest import make_lively_checkpoint
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from jobs import run_jobs
from runs import METHOD_FLAGS, ROOT, Forked, make_rows
from safetensors.torch import load_file

import train
from glm_models import MODE
from tuning.plan.traffic import Part, stage_traffic, used_numbers, zero_traffic
from tuning.run.health import StepHooks

FLAGS = METHOD_FLAGS | {"freeze": "--freeze_module_name word_embeddings,layers."}  # on every stage
FLAGS["lora"] += " --lora_dropout 0"  # each stage draws its own
FLAGS["ptuning"] += " --prefix_dropout 0"
LAYOUTS = {(2, 2): "2 stages", (4, 4): "4 stages", (4, 2): "2 stages x 2"}  # (ranks, stages)


class Case(NamedTuple):
    """What a run trains; `micro_batches` are those of a step on all ranks together."""

    mode: str
    method: str
    packing: bool
    micro_batches: int

    def name(self, ranks: int, stages: int) -> str:
        packed = "packed" if self.packing else "plain"
        return f"{self.mode}-{self.method}-{packed}-{self.micro_batches}-on-{ranks}-in-{stages}"


def job(folder: Path, case: Case, ranks: int, stages: int) -> dict[str, list[str]]:
    """A training for run_jobs, by its name: also that of its output in `folder`, where the base and the rows are."""
    name = case.name(ranks, stages)
    argv = f"""
        --mode {case.mode} --train_type {case.method} {FLAGS[case.method]} --model_name_or_path
        {folder / case.mode} --train_path {folder}/rows.json --data_cache {folder}/cache --output_dir {folder / name}
        --max_len 128 --max_src_len 96 --ds_file {folder}/ds.json --max_steps 4 --learning_rate 1e-3
        --gradient_accumulation_steps {case.micro_batches * stages // ranks} --show_loss_step 1
        {"--packing" * case.packing}
        {f"--pipeline_stages {stages}" * (stages > 1)}
    """
    return {name: argv.split()}


def make_inputs(folder: Path, layers: int = 4) -> None:
    """A base of each family, a ds file, and rows: so many that a last step cannot fill all of its micro-batches."""
    for mode in MODE:
        make_lively_checkpoint(mode, str(folder / mode), layers=layers, hidden_size=32, heads=2, vocab_size=1000)
    make_rows(folder / "rows.json", 29)
    content = json.loads((ROOT / "ds_zero2_no_offload.json").read_text())
    content["optimizer"]["params"]["eps"] = 1e-5
    (folder / "ds.json").write_text(json.dumps(content))


def result(output: Path) -> Path:
    """The last result of a training."""
    return max(output.glob("epoch-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def weights_of(folder: Path) -> dict:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def compare(one: Path, other: Path) -> float:
    """The largest difference of the weights of two results. AssertionError: files, names, shapes or types differ."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    first, second = weights_of(one), weights_of(other)
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {n: (t.shape, t.dtype) for n, t in second.items()}
    for name in ("config.json", "adapter_config.json"):
        if (one / name).exists():
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
    return max((first[name] - second[name]).abs().max().item() for name in first)


def differences(folder: Path, losses: dict[str, list[float]], case: Case, ranks: int, stages: int) -> tuple:
    """The largest differences of losses and of weights between one process and a pipeline."""
    one, other = case.name(1, 1), case.name(ranks, stages)
    assert len(losses[one]) == len(losses[other]) == 4
    difference = max(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))
    return difference, compare(result(folder / one), result(folder / other))


# Bytes

# Functions of DeepSpeed's communication through which tensors go, with the place of the tensor that counts.
COUNTED = {"send": 0, "all_reduce": 0, "reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}
SMALL = 1000  # bytes: norms and flags, of which sums are less, are not counted


def count_handed_over(done: Counter) -> None:
    """From now on, add to `done`, by function, the bytes that this process hands over to others."""
    for name, place in COUNTED.items():
        real = getattr(TorchBackend, name)

        def counted(self, *args, name=name, place=place, real=real, **kwargs):
            given = [*args, *kwargs.values()]
            tensor, groups = given[place], [one for one in given if isinstance(one, torch.distributed.ProcessGroup)]
            alone = groups and groups[0].size() == 1
            size = tensor.numel() * tensor.element_size()
            done[name] += size * (name == "send" or (size >= SMALL and not alone))
            return real(self, *args, **kwargs)

        setattr(TorchBackend, name, counted)


def hand_over(argv: list[str], rank: int, folder: Path) -> None:
    """A training in this process; writes what it has handed over in its steps, and what --plan says of it."""
    done, counted, expected = Counter(), Counter(), []
    done_before = Counter()

    def before(watch, batches):
        done_before.clear()
        done_before.update(done)

    def after(watch, step):
        counted.update(done - done_before)
        engine = watch.engine
        parameters = list(engine.module.parameters())
        trained, item = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad), 4
        if not isinstance(engine, PipelineEngine):
            stage, used = engine.zero_optimization_stage(), used_numbers(engine.module)
            expected.append(zero_traffic(stage, trained, used, len(step.batches), item))
            return
        assert not engine.timers(TRAIN_BATCH_TIMER).event_timers  # else two events a step are kept for ever
        tied = [weight.numel() for weight, _ in engine.module.get_tied_weights_and_groups()]
        rows = [(batch["input_ids"].numel(), len(batch["segments"])) for batch in step.batches]
        position, hidden = (engine.stage_id, engine.num_stages), 32
        part = Part(trained, sum(tied))
        expected.append(stage_traffic(part, position, rows, hidden, item, item, engine.dp_world_size))

    count_handed_over(done)
    train.train(train.parse_args(argv), StepHooks(before, after))
    sums = counted["all_reduce"] + counted["reduce"] + counted["reduce_scatter_tensor"]
    found = [counted["send"], sums, counted["all_gather_into_tensor"]]
    computed = [sum(parts) for parts in zip(*expected, strict=True)]
    (folder / f"bytes-{rank}.json").write_text(json.dumps([found, computed]))


def handed_over(folder: Path, argv: list[str], ranks: int) -> list[list[list[int]]]:
    """Of each rank of a training, bytes counted and computed: to other stages, to be summed, of weights gathered."""
    run = Forked(ranks, folder / "log", lambda rank: hand_over(argv, rank, folder))
    assert set(run.wait().values()) == {0}, (folder / "log").read_text()[-3000:]
    return [json.loads((folder / f"bytes-{rank}.json").read_text()) for rank in range(ranks)]


def print_bytes() -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_inputs(folder)
        content = json.loads((ROOT / "ds_zero3_no_offload.json").read_text())
        # all weights are gathered twice, as those of a model that does not fit are
        content["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        content["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
        (folder / "zero3.json").write_text(json.dumps(content))
        layouts = ((2, 2, "ds"), (4, 4, "ds"), (4, 2, "ds"), (2, 1, "ds"), (2, 1, "zero3"))
        for mode, (ranks, stages, ds_file) in itertools.product(("glm", "glm3"), layouts):
            ((name, argv),) = job(folder, Case(mode, "all", False, 4), ranks, stages).items()
            argv[argv.index("--ds_file") + 1] = f"{folder}/{ds_file}.json"
            argv += ["--overwrite_output_dir"]
            for rank, (counted, computed) in enumerate(handed_over(folder, argv, ranks)):
                figures = f"to other stages, sums, weights: {counted}, computed {computed}"
                print(f"{name} {ds_file}, rank {rank}: {figures}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="one family and method")
    parser.add_argument("--bytes", action="store_true", help="count bytes instead")
    args = parser.parse_args()
    if args.bytes:
        print_bytes()
        return
    for mode, method in itertools.product(MODE, ("all", "lora")):
        if args.only not in f"{mode} {method}":
            continue
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            make_inputs(folder)
            pairs = list(itertools.product((False, True), (1, 4, 8)))
            cases = {(*pair, *layout): Case(mode, method, pair[0], pair[1] * layout[0] // layout[1])
                     for pair in pairs for layout in LAYOUTS}  # fmt: skip
            losses = {}
            for ranks in (1, 2, 4):
                jobs = {}
                for (*_, there, stages), case in cases.items():
                    if ranks in (1, there):
                        jobs |= job(folder, case, ranks, stages if ranks > 1 else 1)
                losses |= run_jobs(folder, ranks, jobs)
            for layout, name in LAYOUTS.items():
                found = [differences(folder, losses, case, *layout) for key, case in cases.items() if key[2:] == layout]
                loss, weight = map(max, zip(*found, strict=True))
                print(
                    f"{mode} {method}, {name}: {len(found)} runs, losses {loss:.1e}, weights {weight:.1e}", flush=True
                )


if __name__ == "__main__":
    main()
