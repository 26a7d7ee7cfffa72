"""How a training starts and how it ends: variables of launchers, nodes and containers, ports, the device line; exit
codes and the one line beside them; logs that cannot be written; the last lines.
"""

import errno
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch

import utils
from tuning import exits, folders
from tuning.errors import DataError, StopTraining, UserError
from tuning.exits import exit_on_user_errors
from tuning.run import health, launch, log, resume
from tuning.run.launch import rank_variables

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
FOURTH = {"RANK": "3", "WORLD_SIZE": "4"} | ADDRESS


# Variables of launchers


@pytest.mark.parametrize(
    ("environ", "devices", "local_rank", "expected"),
    [
        ({}, 4, -1, ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "x"}, 1, -1, ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}),
        (ALONE | ADDRESS, 1, -1, ALONE | ADDRESS),
        # platforms give each pod these, and no LOCAL_RANK
        ({"RANK": "0", "WORLD_SIZE": "1"} | ADDRESS, 8, -1, ALONE | ADDRESS),
        (FOURTH, 1, -1, FOURTH | {"LOCAL_RANK": "0"}),
        (FOURTH, 8, 2, FOURTH | {"LOCAL_RANK": "2"}),
        # srun, Open MPI and MPICH have names of their own
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"} | ADDRESS, 4, -1,
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | ADDRESS,
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"} | ADDRESS,
            4, -1,
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | ADDRESS,
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"} | ADDRESS, 4, -1,
         {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | ADDRESS),
        # one task is no training of several; an interactive shell of Slurm has these
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, 1, -1,
         ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}),
    ],
)  # fmt: skip
def test_what_a_launcher_left_out_is_derived(environ, devices, local_rank, expected):
    assert rank_variables(environ, devices, local_rank) == expected


@pytest.mark.parametrize(
    ("environ", "devices", "said"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"} | ADDRESS, 2, "LOCAL_RANK is not: start with deepspeed or torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 2, "MASTER_ADDR, MASTER_PORT are not"),
        ({"RANK": "0"}, 1, "RANK=0 is set, but WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, 2, "LOCAL_RANK=1 is set, but RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not"),
        ({"WORLD_SIZE": "2"}, 1, "WORLD_SIZE=2 is set, but RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | ADDRESS, 2, "RANK=2 must be from 0 to 1"),
        ({"RANK": "a", "WORLD_SIZE": "2"} | ADDRESS, 2, "RANK=a must be an integer"),
        (ALONE | ADDRESS | {"MASTER_PORT": "70000"}, 1, "MASTER_PORT=70000 must be a port number"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}, 2, "srun started 2 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"} | ADDRESS, 2, "mpirun (Open MPI) started 2 tasks"),
    ],
)  # fmt: skip
def test_what_cannot_be_derived_is_named(environ, devices, said):
    with pytest.raises(UserError) as error:
        rank_variables(environ, devices)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def two_processes(monkeypatch):
    """The environment of rank 0 of two, which a start writes to."""
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | ADDRESS)


def test_a_port_in_use_is_one_line(two_processes, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        os.environ["MASTER_PORT"] = str(port)
        store = lambda **_: torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True)  # noqa: E731
        monkeypatch.setattr(deepspeed, "init_distributed", store)
        with pytest.raises(UserError, match=f"^port {port} is in use.*--master_port"):
            launch.start_distributed(verbose=False)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("bind on port 520 failed: EACCES (13), Permission denied", "port 29500 needs root"),
        (
            "The client socket has timed out\nafter 600000ms",
            "at node-0:29500 .*: The client socket has timed out after",
        ),
    ],
)
def test_processes_that_cannot_meet_are_one_line(two_processes, monkeypatch, reason, said):
    def fail(**_):
        raise torch.distributed.DistNetworkError(reason)

    monkeypatch.setattr(deepspeed, "init_distributed", fail)
    with pytest.raises(UserError, match=said):
        launch.start_distributed(verbose=False)


# Nodes and containers


def gathers(monkeypatch, everyone, rank=0):
    """Let this process be one of several that have told each other `everyone`."""

    def gather(found, mine, group):
        found[:] = everyone

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(everyone))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    for module in (launch, health, utils):
        monkeypatch.setattr(module, "control_group", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_processes_of_two_nodes_follow_each_other(monkeypatch):
    gathers(monkeypatch, [("a", 0), ("a", 1), ("b", 0), ("b", 1)])
    launch._check_nodes(0, 4)
    gathers(monkeypatch, [("a", 0), ("b", 0), ("a", 1), ("b", 1)])  # srun --distribution=cyclic
    with pytest.raises(UserError, match="rank 2 is process 1 of its node, but rank 1 is not the first one there"):
        launch._check_nodes(0, 4)
    gathers(monkeypatch, [("a", 1), ("a", 0)])
    with pytest.raises(UserError, match="rank 0 is process 1 of its node"):
        launch._check_nodes(0, 2)


def test_containers_of_one_name_are_told_apart(monkeypatch):
    """Hostname and start of the machine are the same in two containers; process ids count in one's own only."""
    mine = launch.machine()
    assert mine == launch.machine() and mine[0] == socket.gethostname()
    stat = os.stat
    other = lambda path, *rest: SimpleNamespace(st_ino=1) if path == "/proc/self/ns/pid" else stat(path, *rest)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", other)
        elsewhere = launch.machine()
    assert elsewhere[:2] == mine[:2] and elsewhere != mine
    monkeypatch.setattr(health, "NodeWatch", lambda: None)
    gathers(monkeypatch, [(mine, os.getpid()), (elsewhere, 2**22 + 1)])
    assert health.PeerWatchdog().others == {}  # no such process here, and yet it lives
    gathers(monkeypatch, [(mine, os.getpid()), (mine, os.getppid())])
    peers = health.PeerWatchdog()
    peers.over = True
    assert peers.others == {1: os.getppid()}


@pytest.mark.parametrize("blind", [False, True])
def test_an_output_folder_that_another_node_does_not_see(monkeypatch, tmp_path, blind):
    gathers(monkeypatch, [True, not blind])
    monkeypatch.setattr(launch, "on_rank_0", lambda action: action())
    assert launch.is_shared(str(tmp_path)) is not blind
    assert not list(tmp_path.iterdir())


# The device line


def accelerator(monkeypatch, name: str):
    found = SimpleNamespace(
        device_name=lambda: name, current_device_name=lambda: f"{name}:0", total_memory=lambda: 24 * 2**30
    )
    monkeypatch.setattr(launch, "get_accelerator", lambda: found)


@pytest.mark.parametrize(
    ("variables", "cuda", "why"),
    [
        ({}, None, "is built for CPUs"),
        ({}, "13.0", "torch found none; does nvidia-smi work"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "13.0", "CUDA_VISIBLE_DEVICES is ''"),
        ({"DS_ACCELERATOR": "cpu"}, "13.0", "DS_ACCELERATOR is cpu"),
    ],
)
def test_no_gpu_is_said_loudly_and_why(monkeypatch, variables, cuda, why):
    accelerator(monkeypatch, "cpu")
    gathers(monkeypatch, ["", ""])
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    line = launch.describe_devices(torch.float32)
    assert "NO GPU IS USED" in line and why in line and "2 processes, float32" in line


def test_gpus_are_counted_by_name(monkeypatch):
    accelerator(monkeypatch, "cuda")
    gathers(monkeypatch, ["A40 (44.4 GiB)", "A40 (44.4 GiB)", "L4 (22.0 GiB)"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="A40"))
    assert launch.describe_devices(torch.bfloat16) == "device: 2 x A40 (44.4 GiB), 1 x L4 (22.0 GiB), bfloat16"


def test_more_processes_than_gpus_is_one_line(two_processes, monkeypatch):
    found = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 1, set_device=lambda _: None)
    monkeypatch.setattr(launch, "get_accelerator", lambda: found)
    os.environ |= {"RANK": "1", "LOCAL_RANK": "1"}
    with pytest.raises(UserError, match=r"process 1 of this machine has no GPU: there are 1 .*CUDA_VISIBLE_DEVICES"):
        launch.start_distributed(verbose=False)


# Ends


@pytest.mark.parametrize(
    ("ranks", "error", "ended"),
    [(1, None, 1), (1, UserError, 1), (1, KeyboardInterrupt, 1), (2, None, 1), (2, UserError, 0)],
)
def test_the_process_group_is_left_where_that_cannot_hang(monkeypatch, ranks, error, ended):
    count = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    monkeypatch.setattr(launch, "end_distributed", lambda: count.append(1))
    with pytest.raises(error) if error else launch.contextlib.nullcontext(), launch.leaving_distributed():
        if error:
            raise error("x")
    assert len(count) == ended


class Gone(BaseException):
    """In the place of os._exit."""


@pytest.fixture
def ranks(monkeypatch):
    """ranks(rank, size): be one of a training; an end of the process is a Gone with its exit code."""

    def be(rank, size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))

    def leave(code):
        raise Gone(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(exits.time, "sleep", lambda _: None)
    monkeypatch.setattr(exits, "ENDING", exits.threading.Event())
    return be


ENDS = [
    (UserError("name another"), 2, "error: name another"),
    (DataError("rows.json line 3"), 2, "error: rows.json line 3"),
    (StopTraining(3, "the loss is nan"), 3, "error: the loss is nan"),
    (StopTraining(4, "out of memory"), 4, "error: out of memory"),
    (StopTraining(75, "stopped by SIGTERM"), 75, "stopped by SIGTERM"),
    (UserError("a\x1b[2Jb\udc80"), 2, r"error: a\x1b[2Jb\udc80"),
]


@pytest.mark.parametrize(("error", "code", "line"), ENDS)
def test_each_end_is_one_line_and_its_exit_code(ranks, capsys, error, code, line):
    ranks(0, 1)
    with pytest.raises(SystemExit) as end, exit_on_user_errors():
        raise error
    assert (end.value.code, capsys.readouterr().err) == (code, line + "\n")
    ranks(0, 2)  # where the interpreter could not end: others wait for this process
    with pytest.raises(Gone) as end, exit_on_user_errors():
        raise error
    assert (end.value.args[0], capsys.readouterr().err) == (code, line + "\n")


def test_rank_0_speaks_for_all_and_another_one_for_itself(ranks, capsys):
    ranks(1, 2)
    for error, said in ((StopTraining(75, "stopped"), ""), (UserError("no room"), "[rank 1] error: no room\n")):
        with pytest.raises(Gone), exit_on_user_errors():
            raise error
        assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(ranks, capsys):
    ranks(0, 1)
    with pytest.raises(ZeroDivisionError), exit_on_user_errors():
        1 / 0  # noqa: B018
    ranks(0, 2)
    with pytest.raises(Gone) as end, exit_on_user_errors():
        1 / 0  # noqa: B018
    assert end.value.args[0] == 1 and "Traceback" in capsys.readouterr().err


def test_ctrl_c_of_a_training_on_several_devices(ranks, capsys):
    ranks(0, 2)
    with pytest.raises(Gone) as end, exit_on_user_errors():
        raise KeyboardInterrupt
    assert (end.value.args[0], capsys.readouterr().err) == (130, "stopped by Ctrl-C (SIGINT)\n")
    ranks(0, 1)  # a notebook has its own way to show it, and lives on
    with pytest.raises(KeyboardInterrupt), exit_on_user_errors():
        raise KeyboardInterrupt


def test_a_script_ends_by_ctrl_c_in_one_line_and_prints_what_the_terminal_cannot_show():
    program = "from tuning import exits; exits.start_script(); print('答\\U0001f600'); raise KeyboardInterrupt"
    environment = os.environ | {"PYTHONIOENCODING": "gbk:strict", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
    assert run.stdout.decode("gbk") == "答\\U0001f600\n"
    assert run.stderr == b"stopped by Ctrl-C (SIGINT)\n"
    assert run.returncode == -signal.SIGINT  # 130 in a shell, which then ends a loop around it


def test_a_reader_that_is_gone_is_one_line(ranks, capsys, monkeypatch):
    ranks(0, 1)
    monkeypatch.setattr(exits, "drop_output", lambda: None)
    with pytest.raises(SystemExit) as end, exit_on_user_errors():
        raise BrokenPipeError
    assert end.value.code == 1 and "the program that reads this output has ended" in capsys.readouterr().err


# States that were moved to another disk, with a link in their place


def test_of_a_state_that_is_a_link_only_the_link_goes(tmp_path, monkeypatch, capsys):
    parent, elsewhere = tmp_path / "states", tmp_path / "elsewhere"
    (elsewhere / "step-00000001").mkdir(parents=True)
    (elsewhere / "step-00000001" / "kept").write_text("x")
    parent.mkdir()
    (parent / "step-00000001").symlink_to(elsewhere / "step-00000001")
    saver = SimpleNamespace(parent=str(parent), keep=1)
    for step in (2, 3):
        partial = folders.start_folder(str(parent / f"step-0000000{step}"))
        (Path(partial) / "run.json").write_text("{}")
        files = folders.seal_files(partial, folders.list_files(partial))
        resume.Checkpoints._publish(saver, partial, str(parent / f"step-0000000{step}"), files)
    assert sorted(path.name for path in parent.iterdir()) == ["latest", "step-00000003"]
    assert (elsewhere / "step-00000001" / "kept").read_text() == "x"
    assert capsys.readouterr().out.count("is a link: only the link is removed") == 1


def test_a_state_is_written_in_the_place_of_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    for end in ("", folders.PARTIAL, folders.REPLACED):
        (tmp_path / f"step-00000001{end}").symlink_to(elsewhere)
    with folders.new_folder(str(tmp_path / "step-00000001")) as partial:
        (Path(partial) / "new").write_text("y")
    assert (tmp_path / "step-00000001" / "new").read_text() == "y" and not (tmp_path / "step-00000001").is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]


# Logs


def test_a_log_that_a_full_disk_does_not_take_is_tried_again(tmp_path, capsys, monkeypatch):
    path = tmp_path / "log.jsonl"
    lines = log.JsonLines(str(path), 0)
    lines.add(step=1)

    class Full(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log, "open", lambda path, *_, **__: Full(path, "a"), raising=False)
        lines.add(step=2)
        lines.add(step=3)
    assert path.read_text() == '{"step": 1}\n'  # no half of a line
    assert capsys.readouterr().out.count("No space left on device") == 1
    lines.add(step=4)
    assert path.read_text() == "".join(f'{{"step": {i}}}\n' for i in (1, 2, 3, 4))


def test_curves_that_cannot_be_written_end_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    curves = log.Curves(str(tmp_path / "file"), 0)
    curves.add("train", {"loss": 1.0}, 1)
    curves.close()
    assert capsys.readouterr().out.count("the training goes on without them") == 1


@pytest.mark.parametrize("best", [None, "best: f1 0.9 at step 4"])
def test_the_last_lines_are_commands_that_are_accepted(tmp_path, monkeypatch, best):
    import shlex

    import merge_lora
    from tuning.arguments import predict as predict_arguments

    monkeypatch.chdir(tmp_path)
    base, rows = tmp_path / "my base", tmp_path / "测试.json"
    base.mkdir()
    rows.write_text("")
    args = SimpleNamespace(output_dir="out put", mode="glm3", eval_path=[str(rows)], max_src_len=96, train_type="lora",
                           model_name_or_path=str(base))  # fmt: skip
    result = tmp_path / "out put" / ("best" if best else "epoch-1-step-4")
    result.mkdir(parents=True)
    lines = log.next_steps(args, os.path.join("out put", "epoch-1-step-4"), best)
    assert [line for line in lines if line.startswith("best: ")] == ([f"{best}, in out put/best"] if best else [])
    predict, merge = (shlex.split(line.removeprefix("next: ")) for line in lines[-1].split("\n"))
    assert predict[0] == merge[0] == "python"
    assert [os.path.realpath(each[1]) for each in (predict, merge)] == [
        str(ROOT / f) for f in ("predict.py", "merge_lora.py")
    ]
    assert os.path.samefile(predict_arguments.parse_args(predict[2:]).model_path, result)
    merged = merge_lora.parse_args(merge[2:])
    assert os.path.samefile(merged.model_dir, result) and merged.ori_model_dir == str(base)


def test_of_settings_that_changed_only_the_parts_that_did_are_said(tmp_path):
    adam = {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}}
    saved = resume.Run({"optimizer of --ds_file": adam, "--seed": 1}, 1, 2)
    run = resume.Run({"optimizer of --ds_file": adam | {"params": {"lr": 2e-4, "betas": [0.9, 0.95]}}}, 1, 2)
    (tmp_path / "run.json").write_text(resume.json.dumps({"format": resume.FORMAT, **saved._asdict()}))
    assert resume.check_run(str(tmp_path), run, True) == [
        "optimizer of --ds_file, params, lr: 0.0001 before, 0.0002 now",
        "--seed: 1 before, None now",
    ]
