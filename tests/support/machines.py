"""Two "machines" on this one: network namespaces with a cable between them, host names and folders of their own.

Needs the right to make namespaces, as root has it. They end with the process that holds them.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from runs import AFTER_STEP, BEFORE_STEP, Forked, record_losses, step_hooks

import train

NAMES, ADDRESSES = ("node-a", "node-b"), ("10.99.7.1", "10.99.7.2")
KINDS = ("net", "uts", "mnt")
SETNS = ctypes.CDLL(None, use_errno=True).setns


def why_not() -> str | None:
    """Why no namespaces can be made here; None if they can."""
    for program in ("unshare", "ip", "nsenter", "mount"):
        if not shutil.which(program):
            return f"{program} is missing"
    made = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    if made.returncode:
        return f"namespaces are not permitted: {made.stderr.strip()}"
    name = f"try{os.getpid()}"
    made = subprocess.run(
        ["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}b"], capture_output=True, text=True
    )
    if made.returncode:
        return f"no virtual network: {made.stderr.strip()}"
    subprocess.run(["ip", "link", "del", name], check=True)
    return None


class Machines:
    """A context manager; `local` is a folder that each machine has for itself, all others are shared."""

    def __init__(self, folder: Path):
        self.local, self.holders = folder / "local", []
        self.disks = [folder / f"disk-of-{name}" for name in NAMES]
        for path in (self.local, *self.disks):
            path.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        for name, disk in zip(NAMES, self.disks, strict=True):
            start = f"hostname {name} && mount --bind {disk} {self.local} && ip link set lo up && echo up"
            start += " && exec sleep 7200"
            command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", start]
            self.holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert self.holders[-1].stdout.readline() == "up\n"
        ends = [f"v{os.getpid()}{letter}" for letter in "ab"]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for holder, end, address in zip(self.holders, ends, ADDRESSES, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", str(holder.pid), "name", "eth0"], check=True)
            self.call(self.holders.index(holder), f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
        return self

    def __exit__(self, *error):
        for holder in self.holders:
            holder.kill()
            holder.wait()

    def words(self, node: int) -> list[str]:
        """What starts a program on a machine."""
        return ["nsenter", "-t", str(self.holders[node].pid), "--net", "--uts", "--mount"]

    def call(self, node: int, command: str) -> None:
        subprocess.run([*self.words(node), "sh", "-c", command], check=True)

    def cut_cable(self, node: int = 1) -> None:
        """Take a machine off the network; nothing is closed."""
        self.call(node, "ip link set eth0 down")

    def mend_cable(self, node: int = 1) -> None:
        self.call(node, "ip link set eth0 up")

    def enter(self, node: int) -> None:
        """Move this process, which has one thread, to a machine."""
        for kind in KINDS:
            handle = os.open(f"/proc/{self.holders[node].pid}/ns/{kind}", os.O_RDONLY)
            where = os.getcwd()
            if SETNS(handle, 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
            os.close(handle)
            os.chdir(where)  # entering a mount namespace leads to its root

    def fork(self, log: Path, action: Callable[[int], None], per_node: int = 2) -> Forked:
        """Processes on both machines, `per_node` on each, rank by rank."""

        def enter(rank: int) -> None:
            node, local_rank = divmod(rank, per_node)
            self.enter(node)
            os.environ |= {"LOCAL_RANK": str(local_rank), "MASTER_ADDR": ADDRESSES[0]}
            action(rank)

        return Forked(2 * per_node, log, enter)

    def train(self, argv: list[str], losses: Path, log: Path, prepare=lambda node: None, per_node: int = 2) -> Forked:
        """A training on both machines; `prepare` gets the number of the machine."""

        def training(rank: int) -> None:
            BEFORE_STEP.clear()
            AFTER_STEP[:] = [record_losses(losses)] if rank == 0 else []
            prepare(rank // per_node)
            train.main(argv, step_hooks())

        return self.fork(log, training, per_node)


def wait_for_end(run: Forked, ranks: range, limit: float) -> float:
    """Seconds until these ranks have ended. AssertionError: they have not."""
    start = time.monotonic()
    while run.running() and not run.codes.keys() >= set(ranks):
        assert time.monotonic() < start + limit, f"still running:\n{run.log.read_text()[-3000:]}"
        time.sleep(0.05)
    return time.monotonic() - start


def kill_all(run: Forked) -> None:
    with contextlib.suppress(ProcessLookupError):
        run.kill(signal.SIGKILL)
    run.wait(30)
