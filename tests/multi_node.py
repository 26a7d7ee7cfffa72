"""Trainings on two "machines" of two processes each, and what happens when one of them is different or dies.

    python tests/multi_node.py                     # everything but the launchers; about 15 minutes on 2 CPU cores
    python tests/multi_node.py --only losses       # or: deaths, refusals, more
    python tests/multi_node.py --launchers         # deepspeed with a hostfile, torchrun on each node, srun's variables

The machines are network namespaces of this one, with a virtual cable between them, host names of their own, and a
folder that each has for itself (support/machines.py). It needs root. pdsh and ssh are stand-ins that enter the
namespace; srun is simulated: its variables are set for each process.
"""

import argparse
import importlib.metadata as importlib_metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
from machines import ADDRESSES, NAMES, Machines, kill_all, wait_for_end, why_not
from runs import LIMIT, ROOT, STAGES, Launched, allow_bf16, command, make_base, make_rows, read_losses, write_bf16_file
from safetensors.torch import load_file

import predict
from tuning.run import nodes

METHODS = {2: "lora", 3: "all"}  # by ZeRO stage
BOUND = 1e-5  # for losses and weights, against as many ranks on one machine


def flags(folder: Path, stage: int, output: Path, *more: str, method: str | None = None, **paths) -> list[str]:
    """Arguments of train.py; `paths` are in place of base and rows in `folder`."""
    base, rows = paths.get("base", folder / "base"), paths.get("rows", folder / "rows.json")
    argv = command("glm3", method or METHODS[stage], stage, False, base, rows, output)
    argv[argv.index("--gradient_accumulation_steps") + 1] = "1"
    argv[argv.index("--num_train_epochs") + 1] = "2"
    return [*argv, *(["--lora_dropout", "0"] if "lora" in argv else []), *more]


def values(losses: Path) -> dict[int, float]:
    return {step: float.fromhex(loss) for step, loss in read_losses(losses)}


def weights(output: Path) -> dict:
    last = max(output.glob("epoch-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return {name: tensor for path in last.glob("*.safetensors") for name, tensor in load_file(path).items()}


def difference(one: dict, other: dict) -> float:
    """The largest difference of two dicts of numbers or tensors. AssertionError: their keys differ."""
    assert one.keys() == other.keys(), (sorted(one), sorted(other))
    return max(float(abs(one[key] - other[key]).max() if hasattr(one[key], "max") else abs(one[key] - other[key]))
               for key in one)  # fmt: skip


def wait_for_step(run, losses: Path, step: int) -> None:
    end = time.monotonic() + LIMIT
    while run.running() and len(read_losses(losses)) < step and time.monotonic() < end:
        time.sleep(0.005)


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "error:" in line]


# Losses


def run_and_resume(machines: Machines, folder: Path, name: str, argv: list[str], output: Path, per_node: int = 2):
    """A training that is killed on all machines after its third step, and started again. Returns its losses."""
    losses, log = folder / f"{name}-losses", folder / f"{name}-log"
    run = machines.train(argv, losses, log, per_node=per_node)
    wait_for_step(run, losses, 3)
    assert run.running(), log.read_text()[-3000:]
    kill_all(run)
    run = machines.train(argv, losses, log, per_node=per_node)
    codes = run.wait()
    text = log.read_text()
    assert set(codes.values()) == {0}, text[-3000:]
    assert f"going on from {output}/states/step-" in text, text[-3000:]
    return values(losses)


def compare_losses(machines: Machines, folder: Path, stage: int, shared: bool, *more: str, kind: str = ""):
    """Differences of losses and of weights from four ranks on one machine, in which nothing was killed.

    Args:
        more: arguments of train.py, and `kind` a name for them.
    """
    name = f"stage-{stage}-{'shared' if shared else 'own'}{kind}"
    alone = folder / f"alone-{stage}{kind}"
    if not alone.exists():
        run = Launched(flags(folder, stage, alone, *more), 4, folder / f"{alone.name}-losses", folder / "log")
        assert set(run.wait().values()) == {0}, (folder / "log").read_text()[-3000:]
    output = (folder if shared else machines.local) / name
    found = run_and_resume(machines, folder, name, flags(folder, stage, output, *more), output)
    disk = output if shared else machines.disks[0] / name
    text = (folder / f"{name}-log").read_text()
    assert ("is on a disk that all nodes share" if shared else "is not on a shared disk") in text
    if not shared:
        left = [path for path in machines.disks[1].glob(f"{name}/**/*") if path.is_file()]
        assert not left, left
    assert not list(disk.glob("states/*.partial"))
    return difference(values(folder / f"{alone.name}-losses"), found), difference(weights(alone), weights(disk))


def print_losses(machines: Machines, folder: Path) -> None:
    for stage in STAGES:
        for shared in (False, True):
            loss, weight = compare_losses(machines, folder, stage, shared)
            where = "shared disk" if shared else "own disks"
            print(f"ZeRO-{stage} {METHODS[stage]}, {where}: losses within {loss:.1e}, weights {weight:.1e}", flush=True)
            assert max(loss, weight) <= BOUND


# Deaths


def end_one(machines: Machines, folder: Path, how: str, limit: float = 60, per_node: int = 2):
    """Kill all processes of the second machine, or take it off the network, in the third step.

    Returns:
        Seconds until the processes of the first machine have ended, and their error lines.
    """
    losses, log, output = folder / f"{how}-losses", folder / f"{how}-log", folder / how
    argv = flags(folder, 2, output, "--num_train_epochs", "40", "--show_loss_step", "1000")
    del argv[argv.index("--num_train_epochs") : argv.index("--num_train_epochs") + 2]
    run = machines.train(argv, losses, log, per_node=per_node)
    wait_for_step(run, losses, 3)
    assert run.running(), log.read_text()[-3000:]
    if how == "killed":
        run.kill(signal.SIGKILL, range(per_node, 2 * per_node))
        seconds = wait_for_end(run, range(per_node), limit)
    else:
        machines.cut_cable()
        seconds = wait_for_end(run, range(2 * per_node), limit)
        machines.mend_cable()
    run.wait(30)
    assert all(run.codes[rank] == 1 for rank in range(per_node)), run.codes
    return seconds, errors(log)


def print_deaths(machines: Machines, folder: Path) -> None:
    for how in ("killed", "unplugged"):
        seconds, lines = end_one(machines, folder, how)
        print(f"second machine {how}: the first ended after {seconds:.1f} s:", *lines, sep="\n  ", flush=True)


# Refusals


def copy_of_code(folder: Path) -> Path:
    """The project's programs, one of them changed."""
    for name in ("tuning", "glm_models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder / path.name)
    with open(folder / "tuning/methods.py", "a") as file:
        file.write("# changed\n")
    return folder


def refusal(machines: Machines, folder: Path, what: str, per_node: int = 2) -> str:
    """The error of a training whose second machine has something else. AssertionError: it trained."""
    local, paths = machines.local, {}
    for disk in machines.disks:
        shutil.copy(folder / "rows.json", disk)
        shutil.copytree(folder / "base", disk / "base", dirs_exist_ok=True)
    if what == "data":
        make_rows(machines.disks[1] / "rows.json", 23)
        paths["rows"] = local / "rows.json"
    if what == "no data":
        (machines.disks[1] / "rows.json").unlink()
        paths["rows"] = local / "rows.json"
    if what == "base":
        shutil.rmtree(machines.disks[1] / "base")
        make_base("glm3", machines.disks[1] / "base", layers=3)
        paths["base"] = local / "base"
    code = copy_of_code(folder / "other-code") if what == "code" else None

    def prepare(node: int) -> None:
        if node == 1 and code:
            nodes.ROOT = str(code)
        if node == 1 and what == "library":
            known = importlib_metadata.version
            importlib_metadata.version = lambda name: "0.18.0" if name == "deepspeed" else known(name)
        if node == 1 and what == "flag":
            argv[argv.index("--learning_rate") + 1] = "1e-3"

    argv = flags(folder, 2, folder / f"refused-{what.replace(' ', '-')}", **paths)
    losses, log = folder / "refused-losses", folder / f"refused-{what.replace(' ', '-')}-log"
    run = machines.train(argv, losses, log, prepare, per_node)
    codes, text = run.wait(), log.read_text()
    assert set(codes.values()) == {2} and not losses.exists(), (codes, text[-3000:])
    assert "Traceback" not in text, text
    return text[text.index("error:") :].rstrip()


WANTED = {  # what differs -> words of its error
    "data": ("node node-b", "rows.json"),
    "no data": ("node node-b", "rows.json"),
    "base": ("node node-b", "local/base"),
    "code": ("node node-b", "tuning/methods.py"),
    "library": ("node node-b", "version of deepspeed", "0.18.0"),
    "flag": ("node node-b", "--learning_rate"),
}


def print_refusals(machines: Machines, folder: Path) -> None:
    for what, words in WANTED.items():
        text = refusal(machines, folder, what)
        assert all(word in text for word in words), text
        print(f"{what}: {text}", flush=True)


# Pipeline, prediction, bfloat16


def print_more(machines: Machines, folder: Path) -> None:
    allow_bf16()
    for stage in STAGES:
        write_bf16_file(stage, folder / f"bf16-{stage}.json")
        loss, weight = compare_losses(
            machines, folder, stage, False, "--ds_file", f"{folder}/bf16-{stage}.json", kind="-bf16"
        )
        print(f"ZeRO-{stage} in bfloat16, own disks: losses within {loss:.1e}, weights {weight:.1e}", flush=True)
    more = ("--pipeline_stages", "2")
    loss, weight = compare_losses(machines, folder, 2, False, *more, kind="-pipeline")
    print(f"2 stages x 2, own disks: losses within {loss:.1e}, weights {weight:.1e}", flush=True)
    argv = ["--mode", "glm3", "--model_path", str(folder / "base"), "--predict_path", str(folder / "rows.json")]
    argv += ["--device", "cpu", "--max_new_tokens", "5", "--output_path"]
    predict.main([*argv, str(folder / "one.jsonl")])
    run = machines.fork(folder / "predict-log", lambda rank: predict.main([*argv, str(machines.local / "two.jsonl")]))
    assert set(run.wait().values()) == {0}, (folder / "predict-log").read_text()[-3000:]
    assert (machines.disks[0] / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    print("predict.py on both machines: the file of one process", flush=True)


# Launchers

SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o || $1 == -p ]] && shift; shift; done
host=$1; shift
exec nsenter -t "$(cat {pids}/$host)" --net --uts --mount --wd="$PWD" bash -c "$*"
"""
PDSH = """#!/bin/bash
while [[ $1 != -w ]]; do shift; done
hosts=$2; shift 2
[[ $1 == pkill* ]] && exit 0
number=0
for host in ${{hosts//,/ }}; do
  command="$*"
  ssh "$host" "${{command//%n/$number}}" & number=$((number + 1))
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""


def make_stand_ins(machines: Machines, folder: Path) -> Path:
    """A folder with `ssh` and `pdsh` for PATH, and a hostfile."""
    programs, pids = folder / "bin", folder / "pids"
    for path in (programs, pids):
        path.mkdir()
    for address, holder in zip(ADDRESSES, machines.holders, strict=True):
        (pids / address).write_text(str(holder.pid))
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (programs / name).write_text(text.format(pids=pids))
        (programs / name).chmod(0o755)
    (folder / "hostfile").write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    return programs


def launched(machines: Machines, folder: Path, launcher: str, stage: int, output: Path) -> list[subprocess.Popen]:
    """The programs of a launcher, on the machines."""
    train = ["train.py", *flags(folder, stage, output, "--show_loss_step", "1")]
    train.remove("--show_loss_step")
    train.remove("3")
    python, environment = Path(sys.executable).parent, os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{folder / 'bin'}:{python}:{environment['PATH']}"
    address = ["--master_addr", ADDRESSES[0], "--master_port", "29611"]
    commands = []
    if launcher == "deepspeed":
        words = ["deepspeed", "--hostfile", str(folder / "hostfile"), *address, *train]
        commands = [(0, words, {})]
    elif launcher == "torchrun":
        for node in range(2):
            commands.append((node, ["torchrun", "--nnodes", "2", "--nproc_per_node", "2", "--node_rank", str(node),
                                    *address, *train], {}))  # fmt: skip
    else:
        for rank in range(4):
            task = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 4, "SLURM_NTASKS": 4, "SLURM_LOCALID": rank % 2}
            task |= {"SLURM_NODEID": rank // 2, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29611}
            commands.append((rank // 2, [sys.executable, *train], {name: str(value) for name, value in task.items()}))
    log = open(folder / f"{launcher}-{stage}-log", "a")  # noqa: SIM115 - the programs write to it
    wd = [f"--wd={ROOT}"]
    return [
        subprocess.Popen([*machines.words(node), *wd, *words], env=environment | more, stdout=log, stderr=log)
        for node, words, more in commands
    ]


def print_launchers(machines: Machines, folder: Path, only: str) -> None:
    make_stand_ins(machines, folder)
    for launcher in ("deepspeed", "torchrun", "srun"):
        for stage in STAGES:
            if only not in f"{launcher} {stage}":
                continue
            alone = folder / f"alone-{stage}-losses"
            if not alone.exists():
                run = Launched(flags(folder, stage, folder / f"alone-{stage}"), 4, alone, folder / "log")
                assert set(run.wait().values()) == {0}, (folder / "log").read_text()[-3000:]
            name = f"{launcher}-{stage}"
            started = time.monotonic()
            codes = [one.wait(600) for one in launched(machines, folder, launcher, stage, machines.local / name)]
            text = (folder / f"{name}-log").read_text()
            assert set(codes) == {0}, (codes, text[-3000:])
            lines = map(json.loads, (machines.disks[0] / name / "log.jsonl").read_text().splitlines())
            found = {line["step"]: line["loss"] for line in lines}
            worst = difference(values(alone), found)
            print(
                f"{name} on {', '.join(NAMES)}: losses within {worst:.1e} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
            assert worst <= BOUND


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="losses, deaths, refusals, more; or a launcher and a ZeRO stage")
    parser.add_argument("--launchers", action="store_true")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"two machines cannot be made here: {reason}")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_base("glm3", folder / "base")
        make_rows(folder / "rows.json", 24)
        with Machines(folder / "machines") as machines:
            if args.launchers:
                print_launchers(machines, folder, args.only)
                return
            for name, part in {"losses": print_losses, "deaths": print_deaths, "refusals": print_refusals,
                               "more": print_more}.items():  # fmt: skip
                if args.only in name:
                    part(machines, folder)


if __name__ == "__main__":
    main()
