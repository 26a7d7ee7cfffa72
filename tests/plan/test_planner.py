"""The planner against reality, as far as a CPU has it: a step traced on the meta device against what torch's CPU
allocator counts in the same step, and DeepSpeed's part against what DeepSpeed itself allocates. The model of the CUDA
allocator against cases worked out by hand.
"""

import json
import time

import pytest
import torch
from measured import (
    PURE,
    ROOT,
    SETTINGS,
    SIZES,
    SUMS,
    arguments,
    build,
    ds_config,
    measure_all,
    peak_of,
    setting,
    sums_of,
)
from runs import Forked
from torch import nn

import train
from glm_models import MODE, ops
from glm_models.quantized import quantized_layers
from tuning import methods
from tuning.errors import UserError
from tuning.plan import planner
from tuning.plan.allocator import MIB, CachingAllocator
from tuning.plan.trace import Event, StorageTracker, host_bytes, meta_kernels, peak_bytes, pinned_size, trace_step
from tuning.plan.zero import Zero12Simulator
from tuning.plan.zero3 import Zero3Simulator
from tuning.samples.batches import MicroBatch, collate
from tuning.samples.encoding import Sample

FP32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}


def on_meta(batch) -> dict:
    return {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}


# The tracker


@pytest.mark.parametrize("flags", ["", "--gradient_checkpointing", "--gradient_checkpointing --keep_attention"])
@pytest.mark.parametrize("method", methods.TRAIN_TYPE)
@pytest.mark.parametrize("mode", MODE)
def test_tracker_agrees_with_the_cpu_allocator(mode, method, flags):
    args = arguments(f"--mode {mode} --train_type {method} {flags}")
    config = ds_config(args, 2, **FP32)
    real = build(args, config, "cpu")
    measured = peak_of(lambda: real.model(**real.batch).loss.backward())

    meta = build(args, config, "meta")
    trace = trace_step(meta.model, on_meta(meta.batch), on_gpu=False, engine=False)
    assert peak_bytes(trace) == pytest.approx(measured, rel=0.01)

    again = build(args, config, "cpu")
    assert peak_bytes(trace_step(again.model, again.batch, engine=False)) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("kind", [FP32, {}])
@pytest.mark.parametrize("flags", ["--quantization_bit 4", "--quantization_bit 4 --gradient_checkpointing"])
@pytest.mark.parametrize("mode", MODE)
def test_tracker_agrees_with_the_cpu_allocator_on_a_quantised_base(mode, flags, kind, monkeypatch):
    # oneDNN's products in bf16 have workspaces, which no GPU has; how large they are depends on the CPU
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear, eight = "query_key_value,dense,dense_h_to_4h,dense_4h_to_h", flags.replace("4", "8")
    for more in (f"--train_type lora --lora_module_name {linear} {flags}", f"--train_type ptuning {eight}"):
        args = arguments(f"--mode {mode} {more}")
        config = ds_config(args, 2, **kind)
        real, meta = build(args, config, "cpu"), build(args, config, "meta")
        measured = peak_of(lambda real=real: real.model(**real.batch).loss.backward())
        trace = trace_step(meta.model, on_meta(meta.batch), on_gpu=False, engine=False)
        assert peak_bytes(trace) == pytest.approx(measured, rel=0.01)


def test_what_a_quantised_base_takes():
    """As bitsandbytes stores it: 4 bits, 8 for each 64 of them, 32 for 256 of these; a step keeps it all the same."""
    for bits, kept in (
        (4, lambda n, out: n / 2 + n / 64 + 4 * -(-n // (64 * 256)) + 4 * (1 + 16 + 256)),
        (8, lambda n, out: n + 4 * out),
    ):
        args = arguments(f"--mode glm3 --train_type lora --quantization_bit {bits}")
        for device in ("cpu", "meta"):
            setup = build(args, ds_config(args, 2), device)
            run = Zero12Simulator(setup, 1, Exact())
            run.allocate_states()
            layers = quantized_layers(setup.model)
            assert len(layers) == 4 * 3
            packed = sum(kept(x.in_features * x.out_features, x.out_features) for x in layers)
            assert sum(t.numel() * t.element_size() for x in layers for t in x.stored()) == packed
            rest = sum(2 * p.numel() for p in setup.model.parameters() if p.is_floating_point())
            assert run.memory.by_tag["weights"] == pytest.approx(packed + rest, abs=16)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODE)
def test_layers_below_the_lowest_trained_keep_nothing(mode, checkpointing, monkeypatch):
    args = arguments(f"--mode {mode} --train_type freeze --gradient_checkpointing {checkpointing}")
    peaks = []
    for layers in (2, 6):
        monkeypatch.setitem(SIZES[mode], "num_layers", layers)
        args.freeze_module_name = f"layers.{layers - 1}."
        meta = build(args, ds_config(args, 2, **FP32), "meta")
        peaks.append(peak_bytes(trace_step(meta.model, on_meta(meta.batch), on_gpu=False, engine=False)))
    assert peaks[0] == peaks[1]


def test_tracker_would_notice_attention_scores():
    """Else the test above would show nothing about the fused kernels."""
    args = arguments("--mode glm2 --train_type lora")
    peaks = []
    for attention in ("sdpa", "eager"):
        meta = build(args, ds_config(args, 2, **FP32), "meta")
        meta.model.config._attn_implementation = attention
        trace = trace_step(meta.model, on_meta(meta.batch), on_gpu=False, engine=False)
        peaks.append(peak_bytes(trace))
    scores = 2 * 4 * 256 * 256 * 4  # rows, heads, tokens, tokens, float32
    assert peaks[1] - peaks[0] > 2 * scores  # of three layers, those that live at the peak


def test_a_storage_counts_once():
    weight, tracker = torch.zeros(100, device="meta"), None
    tracker = StorageTracker([weight])
    with tracker:
        view = weight[:10].view(2, 5)  # of what was there before
        x = torch.empty(25, device="meta")
        y = x.view(5, 5).t()
        x.add_(1)
        del x
        z = y + 1
        del y
    assert [(e.what, e.key, e.size) for e in tracker.events] == [
        ("alloc", 1, 100),
        ("alloc", 2, 100),
        ("free", 1, 0),
    ]
    del view, z


def test_what_is_moved_to_main_memory_counts_there(monkeypatch):
    monkeypatch.setattr(ops, "CHUNK", 1024 * 16)  # logits are not kept, so never moved
    args = arguments("--mode glm2 --train_type all")
    plain, moved = (build(args, ds_config(args, 2), "meta") for _ in range(2))
    forward = moved.model.forward

    def offloaded(**batch):
        with torch.autograd.graph.save_on_cpu():
            return forward(**batch)

    moved.model.forward = offloaded
    before, after = planner.run_trace(plain), planner.run_trace(moved)
    assert host_bytes(before) < 1024  # a few numbers
    assert peak_bytes(after) < 0.6 * peak_bytes(before)
    assert host_bytes(after) > 0.5 * peak_bytes(before)


def test_tied_weights_count_once():
    args = arguments("--mode glm --train_type all")
    setup = build(args, ds_config(args, 2), "meta")
    memory = CachingAllocator()
    run = Zero12Simulator(setup, 1, memory)
    run.allocate_states()
    numel = sum(p.numel() for p in {id(p): p for p in setup.model.parameters()}.values())
    assert memory.by_tag["weights"] == pytest.approx(2 * numel, rel=0.01)
    assert setup.model.lm_head.weight is setup.model.transformer.word_embeddings.weight


def test_loss_and_gradients_have_their_names():
    args = arguments("--mode glm2 --train_type freeze")
    trace = planner.run_trace(build(args, ds_config(args, 2), "meta"))
    loss = max(e.size for e in trace if e.tag == "loss")
    assert loss == 2 * 255 * 1024 * 4  # all tokens of a row but the first, the vocabulary, float32
    marked = {e.block for e in trace if e.what == "gradient"}
    assert marked == {e.key for e in trace if e.tag == "gradients"} - {None}
    assert len(marked) == 7  # weights and biases of one layer


# The allocator


def allocator(*steps, **settings) -> CachingAllocator:
    """Play ("a", size) and -"a"."""
    memory = CachingAllocator(**settings)
    for step in steps:
        if isinstance(step, tuple):
            memory.alloc(*step)
        else:
            memory.free(step)
    return memory


def test_allocator_rounds_sizes_and_segments():
    assert allocator(("a", 1)).allocated == 512
    assert allocator(("a", 513)).allocated == 1024
    assert allocator(("a", 0)).reserved == 0
    assert allocator(("a", 1), ("b", MIB)).reserved == 2 * MIB  # small ones share 2 MiB
    assert allocator(("a", MIB), ("b", MIB), ("c", 1)).reserved == 4 * MIB
    assert allocator(("a", MIB + 1), ("b", 9 * MIB)).reserved == 20 * MIB  # medium ones share 20 MiB
    assert allocator(("a", 10 * MIB)).reserved == 10 * MIB
    assert allocator(("a", 11 * MIB - 5)).reserved == 12 * MIB  # large ones have their own, rounded up to 2 MiB


def test_allocator_splits_only_what_is_worth_it():
    # 11 of 12 MiB: the rest of 1 MiB is not split off, and counts as allocated
    assert allocator(("a", 11 * MIB)).allocated == 12 * MIB
    # a freed block of 20 MiB gives 12 and then 8
    memory = allocator(("a", 20 * MIB), "a", ("b", 12 * MIB), ("c", 8 * MIB))
    assert (memory.reserved, memory.allocated, memory.peak_allocated) == (20 * MIB, 20 * MIB, 20 * MIB)


def test_allocator_takes_the_smallest_block_that_fits():
    memory = allocator(("a", 30 * MIB), ("b", 20 * MIB), "a", "b", ("c", 15 * MIB), ("d", 30 * MIB))
    assert memory.reserved == 50 * MIB  # had c cut the 30, d would have needed a new segment


def test_allocator_joins_neighbours():
    parts = [(name, 5 * MIB) for name in "abcd"]  # one segment of 20 MiB
    for order in (["a", "b"], ["b", "a"]):
        memory = allocator(*parts, *order, ("e", 9 * MIB))
        assert memory.reserved == 20 * MIB
    assert allocator(*parts, "a", "c", ("e", 9 * MIB)).reserved == 40 * MIB  # these are no neighbours
    assert allocator(*parts, "a", "c", "b", ("e", 15 * MIB - 512)).reserved == 20 * MIB


def test_allocator_keeps_what_was_freed_and_fragments():
    memory = allocator(("a", 30 * MIB), "a", ("b", 40 * MIB))
    assert (memory.peak_allocated, memory.peak_reserved) == (40 * MIB, 70 * MIB)
    # with so much and no more, the free segment goes back to the driver first
    memory = allocator(("a", 30 * MIB), "a", ("b", 40 * MIB), capacity=50 * MIB)
    assert memory.reserved == 40 * MIB
    with pytest.raises(MemoryError):
        allocator(("a", 30 * MIB), ("b", 40 * MIB), capacity=50 * MIB)
    # a segment that can grow: the 30 MiB are part of the 40
    memory = allocator(("a", 30 * MIB), "a", ("b", 40 * MIB), expandable=True)
    assert memory.reserved == 40 * MIB
    memory = allocator(("a", 30 * MIB), ("b", 5 * MIB), "a", ("c", 40 * MIB), expandable=True)
    assert memory.reserved == 80 * MIB  # b stands between: pages of 20 MiB behind it


def test_allocator_counts_by_tag_at_the_peak():
    memory = allocator(("a", 2 * MIB, "weights"), ("b", 4 * MIB, "loss"), "b", ("c", 3 * MIB, "buffers"))
    assert memory.at_peak == {"weights": 2 * MIB, "loss": 4 * MIB}


# DeepSpeed


class Exact(CachingAllocator):
    """Counts bytes as a CPU's allocator does: no rounding, nothing kept."""

    def alloc(self, key, size, tag=""):
        self.blocks[key] = size, tag
        self.allocated += size
        self.by_tag[tag] = self.by_tag.get(tag, 0) + size
        if self.allocated > self.peak_allocated:
            self.peak_allocated, self.at_peak = self.allocated, dict(self.by_tag)

    def free(self, key):
        size, tag = self.blocks.pop(key, (0, ""))
        self.allocated -= size
        self.by_tag[tag] = self.by_tag.get(tag, 0) - size


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """measured[stage, ranks]: what DeepSpeed allocates. Stages have their own processes: stage 3 changes modules."""
    folder = tmp_path_factory.mktemp("measured")
    files = {(stage, ranks): folder / f"{stage}-{ranks}.json" for stage, ranks in ((2, 1), (3, 1), (2, 2))}
    for (stage, ranks), file in files.items():
        names = SETTINGS if ranks == 1 else ["large"]
        log = folder / f"log-{stage}-{ranks}"
        run = Forked(ranks, log, lambda rank, call=(stage, names, file): measure_all(*call))
        assert set(run.wait().values()) == {0}, log.read_text()[-3000:]
    return {key: json.loads(file.read_text()) for key, file in files.items()}


def planned_peaks(name: str, stage: int, ranks: int, sums: str) -> list[int]:
    """Planned for a CPU: bytes of the last backward pass of an optimizer step, and of that step."""
    args, config = setting(name, stage, ranks, sums)
    setup = build(args, config, "meta")
    peaks = []  # above what lives before the backward, and before the step
    memory = Exact()

    class Watched(Zero3Simulator if stage == 3 else Zero12Simulator):
        def allocate_states(self):
            super().allocate_states()
            self.before = memory.allocated

        def optimizer_step(self):
            peaks.append(memory.peak_allocated - self.before)
            self.before = memory.peak_allocated = memory.allocated
            super().optimizer_step()
            peaks.append(memory.peak_allocated - self.before)

    Watched(setup, ranks, memory, on_gpu=False).replay(planner.run_trace(setup, on_gpu=False))
    return peaks


@pytest.mark.parametrize(("name", "sums"), [(name, sums) for name in SETTINGS for sums in sums_of(name)])
@pytest.mark.parametrize("stage", [2, 3])
def test_accounting_agrees_with_deepspeed(stage, name, sums, measured):
    peaks, (backward, step) = planned_peaks(name, stage, 1, sums), measured[stage, 1][f"{name} {sums}"]
    assert peaks[0] == pytest.approx(backward, rel=0.02)
    assert peaks[1] == pytest.approx(step, rel=0.02, abs=4096)


@pytest.mark.parametrize("sums", SUMS)
def test_accounting_agrees_with_deepspeed_on_two_ranks(sums, measured):
    """The backward pass alone: in the step gloo gathers by copies of its own."""
    assert planned_peaks("large", 2, 2, sums)[0] == pytest.approx(measured[2, 2][f"large {sums}"][0], rel=0.02)


def play(flags: str, stage: int, gpus: int, **sections) -> Zero12Simulator:
    """A whole step, counted without an allocator's rounding."""
    args = arguments(flags)
    setup = build(args, ds_config(args, stage, gpus, **sections), "meta")
    run = (Zero3Simulator if stage == 3 else Zero12Simulator)(setup, gpus, Exact())
    run.replay(planner.run_trace(setup))
    return run


def test_ranks_and_stages_share_what_they_should():
    flags = "--mode glm2 --train_type all"
    one, four, three = play(flags, 2, 1), play(flags, 2, 4), play(flags, 3, 4)
    numel = sum(p.numel() for p in one.parameters)
    lives = one.memory.by_tag  # after the step
    assert lives["optimizer"] == 12 * numel  # master and two moments, float32
    assert lives["weights"] == 2 * numel
    assert lives["gradients"] == 4 * numel  # float32 sums, kept until the next step begins
    assert four.memory.by_tag["optimizer"] == 12 * numel // 4
    assert four.memory.by_tag["weights"] == 2 * numel
    assert three.memory.by_tag["optimizer"] == 12 * numel // 4
    small = sum(p.numel() for p in three.parameters if p.numel() <= 10 * 128)  # these are whole on each rank, too
    assert three.memory.by_tag["weights"] == 2 * numel // 4 + 2 * small
    assert three.memory.at_peak["gathered"] > 0
    assert three.memory.by_tag["gathered"] == 0
    assert four.memory.peak_allocated < one.memory.peak_allocated


def test_offload_moves_the_optimizer_to_main_memory():
    flags = "--mode glm2 --train_type all"
    device = {"device": "cpu", "pin_memory": False}
    run = play(flags, 3, 4, zero_optimization={"offload_optimizer": device, "offload_param": device})
    numel = sum(p.numel() for p in run.parameters)
    assert "optimizer" not in run.memory.by_tag
    assert run.cpu == pytest.approx((16 + 4 + 2) * numel / 4, rel=0.01)  # and its gradients, their sums, the weights
    assert run.cpu_once == 0
    # by default it is pinned, as far as DeepSpeed pins it: in powers of two, from a copy in common memory
    pinned = play(flags, 3, 4, zero_optimization={"offload_optimizer": {"device": "cpu"}})
    groups = [4 * sum(pieces) for pieces in pinned.sub_groups]
    expected = 3 * sum(groups) + sum(map(pinned_size, groups)) + pinned_size(sum(groups))
    assert pinned.cpu == pytest.approx(expected, abs=1024)  # a few numbers of the model's
    assert pinned.cpu_once == sum(groups)
    two = play(flags, 2, 2, zero_optimization={"offload_optimizer": {"device": "cpu"}})
    assert "optimizer" not in two.memory.by_tag
    assert two.memory.by_tag["weights"] == 2 * numel
    assert two.cpu > (12 + 4 + 2) * numel / 2 and two.cpu_once > 0


def test_a_step_has_float32_gradients_beside_sums_in_bf16():
    flags = "--mode glm2 --train_type all --gradient_checkpointing --max_len 8 --max_src_len 4"
    run = play(flags, 2, 1, data_types={"grad_accum_dtype": "bf16"})
    assert run.peak_phase == "optimizer step"
    decay, rest = (sum(p.numel() for p in group["params"]) for group in run.setup.groups)
    # bf16 sums of all, a flat copy of a group's and its float32
    assert run.memory.at_peak["gradients"] == 2 * (decay + rest) + (2 + 4) * decay


def test_states_in_bf16_take_two_bytes_a_number():
    flags = "--mode glm2 --train_type all"
    two, three = play(flags, 2, 1, bf16=PURE), play(flags, 3, 1, bf16=PURE)
    numel = sum(p.numel() for p in two.parameters)
    assert two.memory.by_tag["optimizer"] == 6 * numel
    assert three.memory.by_tag["optimizer"] == 4 * numel  # the weights are the masters
    device = {"device": "cpu", "pin_memory": False}
    buffer = {"zero_optimization": {"offload_optimizer": device}, "bf16": PURE}
    buffer["data_types"] = {"grad_accum_dtype": "bf16"}
    largest = 2 * max(p.numel() for p in two.trained)
    # masters, moments, gradients; the buffer between masters and weights only where torch would keep it
    assert play(flags, 2, 1, **buffer).cpu == pytest.approx(8 * numel + largest, rel=0.001)
    assert play(flags, 3, 1, **buffer).cpu == pytest.approx(10 * numel, rel=0.001)  # and sums
    device["pin_memory"] = True
    assert play(flags, 2, 1, **buffer).cpu > 10 * numel


# The command line


@pytest.fixture
def official(tmp_path, monkeypatch):
    """The flags of a full-size ChatGLM2-6B of which there is nothing but config.json."""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    MODE["glm2"].config().save_pretrained(tmp_path)
    return f"--mode glm2 --model_name_or_path {tmp_path} --train_path {__file__} --plan".split()


def test_plan_of_a_full_model_takes_seconds(official, capsys):
    start = time.process_time()  # of this process: others may keep the machine busy
    planner.plan(train.parse_args([*official, "--max_len", "1560", "--plan_gpus", "4"]), planner.plan_setup)
    assert time.process_time() - start < 30  # about 5, with six variations
    text = capsys.readouterr().out
    rows = dict(line.rsplit(maxsplit=1) for line in text.splitlines() if line.startswith("  ") and "(" not in line)
    parts = {name.strip(): float(size) for name, size in rows.items()}
    assert parts["weights"] == pytest.approx(6.24e9 * 2 / 2**30, abs=0.05)
    assert sum(size for name, size in parts.items() if name != "peak") == pytest.approx(parts["peak"], abs=0.05)
    for flag in ("--gradient_checkpointing True", "--ds_file ds_zero3_no_offload.json", "--max_len 780", "expandable"):
        assert flag in text


def test_max_memory_finds_the_cheapest_flags_that_fit(official, tmp_path, capsys, monkeypatch):
    MODE["glm2"].config(num_layers=2).save_pretrained(tmp_path)
    flags = [*official, "--max_len", "1560", "--per_device_train_batch_size", "8", "--max_memory"]
    alone = planner.Plans(planner.plan_setup, 1)
    args = train.parse_args([*flags, "9"])
    whole = alone(args).peak / planner.GIB
    args.per_device_train_batch_size = 1
    one_row = alone(args).peak / planner.GIB
    # nothing that changes the base
    monkeypatch.setattr("tuning.arguments.quantization.missing_package", lambda: "pip install it")
    for limit, found in (
        (whole + 0.1, "no change"),
        (one_row + 0.1, "--per_device_train_batch_size 1 --gradient_accumulation_steps 8"),
    ):
        planner.plan(train.parse_args([*flags, str(limit)]), planner.plan_setup)
        assert f"with: {found} " in capsys.readouterr().out
    least = r"nothing fits into 1\.6 GiB per GPU: the least .* is [0-9.]+ GiB, with --per_d"
    with pytest.raises(UserError, match=least):
        planner.plan(train.parse_args([*flags, "1.6"]), planner.plan_setup)
    monkeypatch.undo()
    assert "--quantization_bit 4" in [change for change, _ in planner.suggestions(args, alone)]
    sets = planner.all_changes(args, 4)
    assert {"quantization_bit": 4} in sets and {"ds_file": "ds_zero3_no_offload.json"} in sets
    quantised = [one for one in sets if "quantization_bit" in one]
    assert not any("zero3" in one.get("ds_file", "") for one in quantised)  # it would cut quantised weights


def test_flags_that_cannot_be_meant_are_refused(official, tmp_path):
    for flags, message in (
        (["--plan_gpus", "0"], "--plan_gpus 0: must be"),
        (["--max_memory", "1"], "--max_memory must"),
    ):
        with pytest.raises(UserError, match=message):
            planner.plan(train.parse_args([*official, *flags]), planner.plan_setup)
    with pytest.raises(UserError, match="--max_memory does nothing without --plan"):
        train.parse_args([*official[:-1], "--max_memory", "8"])


def test_a_plan_is_for_bf16_and_obeys_the_ds_file(official, tmp_path):
    args = train.parse_args(official)
    assert planner.plan_setup(args, 1).ds_config["bf16"]["enabled"] is True
    config = json.loads((ROOT / args.ds_file).read_text()) | FP32
    (tmp_path / "ds.json").write_text(json.dumps(config))
    args.ds_file = str(tmp_path / "ds.json")
    assert next(planner.plan_setup(args, 1).model.parameters()).dtype == torch.float32


def test_an_untested_deepspeed_is_refused(official, monkeypatch):
    pins = (ROOT / "requirements.txt").read_text()
    assert f"deepspeed=={planner.TESTED_DEEPSPEED[-1]}\n" in pins  # a new pin needs new comparisons, those above
    monkeypatch.setattr(planner.deepspeed, "__version__", "0.20.1+abc")
    with pytest.raises(UserError, match=r"DeepSpeed 0\.20\.1\+abc is installed, but --plan simulates"):
        planner.plan(train.parse_args(official), planner.plan_setup)
    assert "could not tell what would need less memory (DeepSpeed 0.20.1+abc" in planner.memory_advice(None)
    monkeypatch.setattr(planner.deepspeed, "__version__", f"{planner.TESTED_DEEPSPEED[-1]}+abc")
    planner.check_deepspeed()  # a local build of a tested version


def test_an_optimizer_that_is_not_planned_is_refused():
    args = arguments("--mode glm2 --train_type lora")
    setup = build(args, ds_config(args, 2, optimizer={"type": "Lion"}), "meta")
    with pytest.raises(UserError, match="Adam and AdamW, not Lion"):
        planner.simulate(setup, [], 1)


def test_real_tensors_are_left_alone():
    """The stand-ins for fused kernels serve the meta device only."""
    dropout = nn.Dropout(0.5)
    with meta_kernels(True):
        assert dropout(torch.ones(1000)).unique().tolist() == [0.0, 2.0]
    assert dropout(torch.ones(4, device="meta")).shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_has_as_many_heads_of_keys_as_of_queries(dtype):
    """On a GPU the kernel for it takes no groups."""
    q, k, v = (torch.empty(1, heads, 8, 16, dtype=dtype, device="meta") for heads in (4, 2, 2))
    repeated = {}
    for on_gpu in (True, False):
        with StorageTracker([q, k, v]) as tracker, meta_kernels(on_gpu):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        sizes = [event.size for event in tracker.events if event.what == "alloc"]
        repeated[on_gpu] = sizes.count(q.numel() * q.element_size()) - 1  # the output is as large
    assert repeated == {True: 2 if dtype == torch.float32 else 0, False: 0}


def test_pinned_memory_comes_in_powers_of_two():
    assert host_bytes([Event("alloc", 1, 5 * MIB, "host"), Event("alloc", 2, 4 * MIB, "host")]) == 12 * MIB


@pytest.mark.parametrize("mode", MODE)
def test_the_longest_batch_is_the_worst(mode):
    """Whatever share of a row its prompt has: the last block keeps most where nearly all is answer."""
    args = arguments(f"--mode {mode} --train_type all")
    setup = build(args, ds_config(args, 2), "meta")

    def peak(start):
        rows = [Sample([1] * args.max_len, ((start, args.max_len),), False, False)] * args.per_device_train_batch_size
        batch = collate(rows, lambda _: 0, MicroBatch(list(range(len(rows))), 1.0))
        return peak_bytes(planner.run_trace(setup._replace(batch=batch)))

    planned = peak_bytes(planner.run_trace(setup))
    assert all(peak(start) <= 1.001 * planned for start in (1, args.max_len // 2, args.max_len - 1))
    assert peak(args.max_len - 1) < 0.99 * planned
