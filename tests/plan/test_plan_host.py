"""Main memory and disk of a plan: counted for what is advised, and held against what this machine has."""

from types import SimpleNamespace

import pytest
import torch
from measured import arguments, build, ds_config

import train
from glm_models import MODE
from tuning.engine import saving
from tuning.plan import host, planner
from tuning.plan.host import GIB, MIB, HostPlan, free_memory, host_text, plan_disk, plan_host, shown_size
from tuning.plan.zero import Zero12Simulator
from tuning.plan.zero3 import Zero3Simulator


def test_a_new_best_model_or_state_is_there_before_an_old_one_goes():
    host = HostPlan(0, "loading", result=10, state=70)
    plain = arguments("--mode glm2 --num_train_epochs 3")
    assert plan_disk(host, plain) == (30, 0, 0)
    more = arguments("--mode glm2 --num_train_epochs 3 --eval_ratio 0.1 --save_state_steps 5 --save_total_limit 4")
    assert plan_disk(host, more) == (30, 20, 350)
    assert plan_disk(host, more).total == 400


def test_results_of_parts_of_an_epoch_are_counted():
    host = HostPlan(0, "loading", result=10, state=70)
    for flags, size, text in (
        ("--num_train_epochs 0.42", 10, "for 0.42 epochs"),
        ("--num_train_epochs 2.5", 30, "for 2.5 epochs"),
        ("--num_train_epochs 1", 10, "for 1 epoch,"),
        ("--max_steps 3000", 10, "for the result after 3000 steps, plus one after each epoch before"),
    ):
        args = arguments(f"--mode glm2 {flags} --save_model_step 5")
        assert plan_disk(host, args).results == size and text in host_text(host, args)


@pytest.mark.parametrize("method", ["lora", "all", "ptuning", "ptuning --save_prefix_only"])
def test_folders_and_states_are_as_large_as_training_makes_them(method):
    args = arguments(f"--mode glm --train_type {method}")
    setup = build(args, ds_config(args, 2), "meta")
    run = Zero12Simulator(setup, 2, planner.CachingAllocator())
    host = plan_host(run)
    trained = sum(p.numel() for p in run.trained)
    assert host.result == saving.result_size(setup.model, torch.bfloat16, args.save_prefix_only)
    tied = setup.model.get_output_embeddings().weight.numel()  # written twice
    whole = sum(p.numel() for p in run.parameters)
    assert host.result == 2 * (whole + tied if method in ("all", "ptuning") else trained)
    assert host.state == 14 * trained + MIB


def test_each_rank_makes_the_model_in_its_own_main_memory_but_under_zero_3():
    args = arguments("--mode glm2 --train_type all")
    for stage, simulator, models in ((2, Zero12Simulator, 4), (3, Zero3Simulator, 1)):
        setup = build(args, ds_config(args, stage, 4), "meta")
        run = simulator(setup, 4, planner.CachingAllocator())
        size = 2 * sum(p.numel() for p in run.parameters)
        files = host.READ * (1 if stage == 2 else 4)
        assert plan_host(run) == (4 * host.PROCESS + models * size + files, "loading", size, 7 * size + MIB)
        run.cpu = 100 * GIB
        assert plan_host(run).phase == "saving"
        assert plan_host(run).memory == 4 * (host.PROCESS + 100 * GIB) + size


@pytest.mark.parametrize(
    ("size", "text"), [(7.4 * MIB, "7.4 MiB"), (300 * MIB, "300 MiB"), (11.634 * GIB, "11.63 GiB"), (0, "0.0 MiB")]
)
def test_small_sizes_are_not_nothing(size, text):
    assert shown_size(size) == text


# This machine

V2 = {"memory.max": 8 * GIB, "memory.current": 5 * GIB, "memory.stat": f"anon 3\ninactive_file {GIB}\n"}
V1 = {"memory.limit_in_bytes": 8 * GIB, "memory.usage_in_bytes": 5 * GIB, "memory.stat": f"total_inactive_file {GIB}"}


@pytest.mark.parametrize(
    ("line", "folder", "files", "room"),
    [
        ("0::/job/step", "sys/fs/cgroup/job/step", V2, 4 * GIB),
        ("0::/job/step", "sys/fs/cgroup/job", V2, 4 * GIB),  # the limit is the job's
        ("0::/../../job", "sys/fs/cgroup", V2, 4 * GIB),  # in a container, from outside its own namespace
        ("0::/", "sys/fs/cgroup", {**V2, "memory.max": "max"}, 20 * GIB),
        ("5:cpu,memory:/job", "sys/fs/cgroup/memory/job", V1, 4 * GIB),
        ("5:cpu:/job", "sys/fs/cgroup/memory/job", V1, 20 * GIB),
        ("0::/", "sys/fs/cgroup", {**V2, "memory.max": 100 * GIB}, 20 * GIB),
        (None, "sys/fs/cgroup", {}, 20 * GIB),
    ],
)
def test_a_container_may_have_less_than_the_machine(line, folder, files, room, tmp_path, monkeypatch):
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / folder).mkdir(parents=True)
    if line:
        (tmp_path / "proc/self/cgroup").write_text(f"1:name=systemd:/elsewhere\n{line}\n")
    for name, content in files.items():
        (tmp_path / folder / name).write_text(str(content))
    assert free_memory(str(tmp_path)) == room


# What is printed


@pytest.fixture
def small_machine(tmp_path, monkeypatch):
    """Flags of ChatGLM2 with two layers; 64 GiB of main memory and 20 of disk are free."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(host, "free_memory", lambda: 64 * GIB)
    monkeypatch.setattr(host, "free_space", lambda folder: 20 * GIB)
    MODE["glm2"].config(num_layers=2).save_pretrained(tmp_path)
    flags = f"--mode glm2 --model_name_or_path {tmp_path} --train_path {__file__} --plan"
    return f"{flags} --max_len 512 --max_src_len 256".split()


def printed(argv, capsys) -> str:
    planner.plan(train.parse_args(argv), planner.plan_setup)
    return capsys.readouterr().out


def test_what_is_advised_is_counted_with_its_main_memory(small_machine, capsys):
    argv = [*small_machine, "--train_type", "all", "--max_memory", "6"]
    text = printed(argv, capsys)
    assert "with: --ds_file ds_zero3_offload.json" in text
    args = train.parse_args(argv)
    args.ds_file = "ds_zero3_offload.json"
    advised = planner.Plans(planner.plan_setup, 1)(args).host
    assert f"main memory of a node with all ranks: about {advised.memory / GIB:.0f} GiB" in text
    assert text.count("main memory of a node") == 1  # not that of flags which do not fit
    assert advised.memory > 16 * 0.9e9
    assert "warning" not in text
    (other,) = [line for line in text.splitlines() if line.startswith("or, with ")]
    assert "_bf16_states.json" in other and "(rounds: weights and moments in bf16 alone)" in other
    assert int(other.split()[2]) < advised.memory / GIB

    plans = planner.Plans(planner.plan_setup, 1)
    rows = planner.advice(train.parse_args(argv), plans).splitlines()
    (row,) = [row for row in rows if row.endswith("ds_zero3_offload.json")]
    assert f", {advised.memory / GIB:4.0f}  --ds_file" in row


def test_a_machine_with_less_is_warned_of_once(small_machine, capsys, monkeypatch):
    more = ["--train_type", "all", "--num_train_epochs", "9", "--eval_ratio", "0.1", "--save_state_steps", "9"]
    text = printed([*small_machine, *more], capsys)
    assert text.count("warning: this machine has less free: 20.00 GiB on the disk of ") == 1
    assert "for the best model, old and new" in text and "for 3 training states" in text
    assert "an interrupted run" not in text
    monkeypatch.setattr(host, "free_memory", lambda: 2 * GIB)
    text = printed([*small_machine, *more], capsys)
    assert text.count("warning: this machine has less free: 2 GiB of main memory and 20.00 GiB on the disk of ") == 1


def test_an_adapter_has_a_size_and_the_context_a_meaning(small_machine, capsys):
    text = printed([*small_machine, "--train_type", "lora"], capsys)
    assert "MiB per saved folder" in text and "0.00 GiB per saved" not in text
    assert "an interrupted run saves a training state" in text
    assert "CUDA context: memory of CUDA, its kernels and NCCL" in text and "capability 8.0 or newer" in text
    assert "warning" not in text


def test_a_small_difference_is_not_shown_as_none():
    assert [host.lowered(by * host.GIB) for by in (3.456, 0.006, 0.004)] == ["-3.46", "-0.01", "by less than 0.01"]
