"""How a process joins a training: the variables of launchers, the process group, the devices.

deepspeed, torchrun, torch.distributed.launch and accelerate set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Some platforms set a part of them; srun and mpirun set their own variables. Missing values are derived if
that is safe; otherwise the run stops and names them, so that no process silently trains alone.
"""

import contextlib
import datetime
import errno
import ipaddress
import json
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from tuning.errors import ExitCode, UserError
from tuning.terminal import print_error
from utils import control_group, local_rank, on_rank_0, tell_all

# Variables of srun and mpirun: rank, number of tasks, rank on this machine.
TASKS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
LOCAL_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}
VISIBLE_WITHIN = 15.0  # seconds until another node sees a new file: network file systems cache directory listings


# The variables of a launcher


def rank_variables(environ: Mapping[str, str], devices: int, local_rank: int = -1) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process.

    Args:
        environ: the environment.
        devices: number of devices that this process sees.
        local_rank: value of --local_rank, which old launchers pass; -1 without.

    Raises:
        UserError: some are missing and cannot be derived, or they contradict each other.
    """
    found = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if environ.get(name)}
    address = {name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environ.get(name)}
    if "RANK" not in found and found.get("WORLD_SIZE", "1") == "1":
        found |= _task(environ, address)
    numbers = {name: _number(name, text) for name, text in found.items()}
    size = numbers.get("WORLD_SIZE", 1)
    single = size == 1 and ("RANK" not in numbers or "WORLD_SIZE" in numbers)
    if single and not any(numbers.get(name) for name in ("RANK", "LOCAL_RANK")):
        numbers |= {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        # port 0: any free one is chosen when it is bound, since another training may start at the same moment
        address = address if len(address) == 2 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "LOCAL_RANK" not in numbers and local_rank >= 0:
        numbers["LOCAL_RANK"] = local_rank
    if {"RANK", "WORLD_SIZE"} <= numbers.keys() and "LOCAL_RANK" not in numbers and devices <= 1:
        numbers["LOCAL_RANK"] = 0  # there is only one device here
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in numbers]
    missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in address]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in (found | address).items())
        raise UserError(
            f"{there} {'is' if len(found | address) == 1 else 'are'} set, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: start with deepspeed or torchrun, which set all of them, "
            "or set them yourself (LOCAL_RANK: number of the process on its machine; 0 if it is the only one there)"
        )
    if not 0 <= numbers["RANK"] < size:
        raise UserError(f"RANK={numbers['RANK']} must be from 0 to {size - 1}, since WORLD_SIZE={size}")
    if not 0 <= _number("MASTER_PORT", address["MASTER_PORT"]) < 2**16:
        raise UserError(f"MASTER_PORT={address['MASTER_PORT']} must be a port number from 1024 to 65535")
    return {name: str(number) for name, number in numbers.items()} | address


def _task(environ: Mapping[str, str], address: dict[str, str]) -> dict[str, str]:
    """The variables of srun or mpirun, if they started several tasks.

    Raises:
        UserError: the address of rank 0 is not known.
    """
    for program, names in TASKS.items():
        if not environ.get(names[1], "").isdecimal() or int(environ[names[1]]) < 2:
            continue
        values = dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), map(environ.get, names), strict=True))
        if len(address) == 2 and all(values.values()):
            return values
        raise UserError(
            f"{program} started {environ[names[1]]} tasks that do not know each other: set MASTER_ADDR (the first "
            "node's name) and MASTER_PORT (a free port) for all of them, or start one task a node with torchrun in it"
        )
    return {}


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name}={text} must be an integer of at least 0")
    return int(text)


# The process group


def start_distributed(verbose: bool, local_rank: int = -1) -> tuple[int, int]:
    """Make the process group; without a launcher, a group of one process. Returns rank and world size.

    Raises:
        UserError: see `rank_variables`; other processes cannot be reached; there are fewer devices than processes.
    """
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    os.environ |= rank_variables(os.environ, 0 if on_cpu else accelerator.device_count(), local_rank)
    if not on_cpu:
        local_rank, count = int(os.environ["LOCAL_RANK"]), accelerator.device_count()
        if local_rank >= count:
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {count} "
                "(CUDA_VISIBLE_DEVICES and the launcher's number of processes must agree)"
            )
        accelerator.set_device(local_rank)
    choose_interface()
    try:
        with _heeding_refusals():
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=verbose)
    except (torch.distributed.DistError, ValueError, OSError) as error:
        raise UserError(_start_problem(error)) from None
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _check_addresses(rank, size)
    _check_nodes(rank, size)
    return rank, size


REFUSED = "a process does not come"  # key in the store where processes meet
REACH = 30.0  # seconds in which rank 0, which imports as much, must have opened the store


def _meeting_place(opens: bool, seconds: float) -> torch.distributed.TCPStore:
    """The store where the processes meet, for messages before they have met."""
    return torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=opens, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=seconds), multi_tenant=True,
    )  # fmt: skip


@contextlib.contextmanager
def telling_others():
    """If the block fails, tell the processes of other nodes why: they would wait ten minutes for this one.

    They cannot be told by rank 0, without which there is no store.
    """
    try:
        yield
    except UserError as error:
        with contextlib.suppress(UserError, RuntimeError, ValueError, OSError, KeyError):
            os.environ |= rank_variables(os.environ, 1)
            if int(os.environ["RANK"]):
                text = f"rank {os.environ['RANK']} on node {socket.gethostname()}: {error}"
                _meeting_place(False, REACH).set(REFUSED, text)
        raise


@contextlib.contextmanager
def _heeding_refusals():
    """While the block waits for the other processes, end this one if one of them has told why it does not come."""
    over = threading.Event()

    def look():
        opens = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        with contextlib.suppress(RuntimeError, ValueError, OSError):  # making the process group will report it
            store = _meeting_place(opens, 600)
            while not over.wait(0.5):
                if store.check([REFUSED]):
                    text = store.get(REFUSED).decode(errors="replace")
                    if local_rank() == 0:
                        print_error(f"error: {text}")
                    time.sleep(2)  # until the others have read it, from rank 0
                    os._exit(ExitCode.USER_ERROR)

    if int(os.environ["WORLD_SIZE"]) > 1:
        threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _start_problem(error: Exception) -> str:
    """An error of the start, and what to do about it."""
    if isinstance(error, OSError) and error.filename:
        return (
            f"cannot write {error.filename}: {error.strerror}; operations are compiled there; set "
            "TORCH_EXTENSIONS_DIR to another folder"
        )
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "too many open files for this process's limit: raise it (ulimit -n 1024)"
    return _connection(str(error))


INTERFACE = "GLOO_SOCKET_IFNAME"  # network interface of gloo, which ranks use for messages on the CPU


def choose_interface() -> None:
    """Let gloo use the interface through which this node reaches MASTER_ADDR, unless the user has set one.

    By default gloo uses the address of the host name: on Debian and Ubuntu 127.0.1.1, which other nodes cannot reach.
    """
    if os.environ.get(INTERFACE) or int(os.environ["WORLD_SIZE"]) == 1:
        return
    try:
        kind, _, _, _, where = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # looks up the route; nothing is sent
            address = probe.getsockname()[0]
    except OSError:
        return  # making the process group will report it
    if ipaddress.ip_address(address).is_loopback:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ[INTERFACE] = name


def gloo_address() -> str:
    """The address at which gloo listens in this process."""
    with contextlib.suppress(OSError):
        if not (name := os.environ.get(INTERFACE)):
            return socket.gethostbyname(socket.gethostname())
        addresses = psutil.net_if_addrs().get(name.split(",")[0], [])
        return next((one.address for one in addresses if one.family == socket.AF_INET), "")
    return "127.0.0.1"


def _check_addresses(rank: int, size: int) -> None:
    """Make sure that gloo can reach the ranks of other nodes; otherwise they would wait for each other forever.

    Raises:
        UserError: a rank listens at an address that only its own node reaches.
    """
    if size == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"address-{rank}", json.dumps([machine()[1] or machine()[0], socket.gethostname(), gloo_address()]))
    everyone = [json.loads(store.get(f"address-{number}")) for number in range(size)]
    store.set(f"has-read-{rank}", "")
    if rank == 0:  # it holds the store, and may end below
        store.wait([f"has-read-{number}" for number in range(size)])
    if len({node for node, _, _ in everyone}) == 1:
        return
    for number, (_, host, address) in enumerate(everyone):
        if address and ipaddress.ip_address(address).is_loopback:
            raise UserError(
                f"rank {number} on {host} listens at {address}, which other nodes cannot reach: set {INTERFACE} and "
                "NCCL_SOCKET_IFNAME on each node to the network interface that the nodes share (see `ip addr`; for "
                "deepspeed's launcher in a file .deepspeed_env), or give the host its real address in /etc/hosts"
            )


def _connection(reason: str) -> str:
    """Why the process group cannot be made, and what to do."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    first = " ".join(reason.split())[:200]
    if "EADDRINUSE" in reason or "already in use" in reason:
        return (
            f"port {os.environ['MASTER_PORT']} is in use, perhaps by another training: name another with the "
            "launcher's --master_port (scripts: PORT), or MASTER_PORT"
        )
    if "EACCES" in reason or "ermission denied" in reason:
        return f"port {os.environ['MASTER_PORT']} needs root: name one of 1024 or above with --master_port"
    return f"the processes of this run cannot reach each other at {where} (MASTER_ADDR:MASTER_PORT): {first}"


def machine() -> tuple[str, str, int]:
    """Host name, boot id and process-id namespace: equal for processes that see each other's process ids.

    The host name is not enough: containers and cloned machines can share one.
    """
    boot, namespace = "", 0
    with contextlib.suppress(OSError):  # not Linux
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return socket.gethostname(), boot, namespace


def _check_nodes(rank: int, size: int) -> None:
    """Make sure that the ranks of a node are consecutive, as `utils.once_per_node` assumes.

    Raises:
        UserError: they are not.
    """
    if size == 1:
        return
    everyone = tell_all((machine(), local_rank()))
    for number, (where, place) in enumerate(everyone):
        first = number - place
        if first < 0 or everyone[first] != (where, 0):
            raise UserError(
                f"rank {number} is process {place} of its node, but rank {first} is not the first one there: RANK "
                "must count the processes node by node, as deepspeed and torchrun do (srun: --distribution=block)"
            )


@contextlib.contextmanager
def leaving_distributed():
    """Destroy the process group after the block; if there is one process, also when the block fails.

    A process that fails among others does not, since it could hang here while they wait in a collective.
    """
    try:
        yield
    except BaseException:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
            with contextlib.suppress(Exception):  # a broken device; the first error is the one to report
                end_distributed()
        raise
    end_distributed()


def end_distributed() -> None:
    """Destroy the process group: NCCL warns if one is left at the end."""
    deepspeed.comm.destroy_process_group()
    control_group.cache_clear()


# The shared folder, and the devices


def is_shared(folder: str) -> bool:
    """Whether all nodes see the same folder, which is there on rank 0. Called on every rank."""
    if torch.distributed.get_world_size() == 1:
        return True
    mark = on_rank_0(lambda: _make_mark(folder))
    end = time.monotonic() + (0 if _is_local(folder) else VISIBLE_WITHIN)
    while not (seen := os.path.exists(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    everyone = tell_all(seen)
    on_rank_0(lambda: os.unlink(mark))
    return all(everyone)


def _is_local(folder: str) -> bool:
    """Whether a folder, which need not exist, is on a disk of this node, where a new file is seen at once."""
    where, kinds = os.path.realpath(folder), {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    while where not in kinds and where != os.path.dirname(where):
        where = os.path.dirname(where)
    return kinds.get(where) in LOCAL_DISKS


def _make_mark(folder: str) -> str:
    handle, path = tempfile.mkstemp(prefix=".seen-by-all-", dir=folder)
    os.close(handle)
    return path


def describe_devices(dtype: torch.dtype) -> str:
    """The line with the devices and the dtype of a training, in capitals without a GPU. Called on every rank."""
    accelerator, kind = get_accelerator(), str(dtype).removeprefix("torch.")
    size = torch.distributed.get_world_size()
    if accelerator.device_name() == "cpu":
        processes = f"{size} process" + "es" * (size > 1)
        return f"device: CPU (NO GPU IS USED: {why_no_gpu()}), {processes}, {kind}; fit for tiny models only"
    mine = "device"
    with contextlib.suppress(AttributeError, RuntimeError):
        mine = torch.cuda.get_device_properties(accelerator.current_device_name()).name
    memory = accelerator.total_memory() / 2**30
    everyone = Counter(tell_all(f"{mine} ({memory:.1f} GiB)"))
    found = ", ".join(f"{count} x {name}" for name, count in everyone.items())
    return f"device: {found}, {kind}"


def why_no_gpu() -> str:
    """The most likely reason why torch finds no GPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "DS_ACCELERATOR is cpu"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    return "torch found none; does nvidia-smi work, and is its CUDA version that of torch or newer?"
