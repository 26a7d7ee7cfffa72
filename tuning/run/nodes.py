"""Several nodes: what must be the same on all of them, how files go from one to another, how a dead one is noticed."""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import torch

from tuning import ROOT
from tuning.errors import UserError
from tuning.exits import ENDING, WATCHED
from tuning.folders import file_hash, list_files, start_folder
from tuning.run.launch import gloo_address, machine
from tuning.terminal import print_error
from utils import check_same, control_group, is_rank_0, local_rank, on_rank_0, once_per_node, tell_all

BLOCK = 1 << 24  # bytes of a file in one message
# A node that no longer answers is given up after IDLE + INTERVAL * PROBES = 30 seconds.
IDLE, INTERVAL, PROBES = 10, 5, 4
CONNECT = 120.0  # seconds in which all ranks must have reached rank 0
GREETING = 10.0  # seconds in which what has connected must have said that it is a rank


def first_here() -> int:
    """Rank of the first process of this node."""
    return torch.distributed.get_rank() - local_rank()


def first_ranks() -> list[int]:
    """Ranks of the first process of each node. Called on every rank."""
    return sorted(set(tell_all(first_here())))


def several_nodes() -> bool:
    """Whether the processes are on more than one node. Called on every rank."""
    return len(first_ranks()) > 1


# What must be the same


def check_same_run(args, settings: dict, ds_config: dict) -> None:
    """Make sure that base, starting weights and ds file are the same on all nodes. Called on every rank.

    Args:
        settings: of resume.Run.
        ds_config: as DeepSpeed gets it.

    Raises:
        UserError: see check_same.
    """
    check_settings(settings | {f"{name} of {args.ds_file}": value for name, value in ds_config.items()}, args)


def check_settings(settings: dict, args) -> None:
    """Compare settings between nodes; a flag in a name becomes what it names, as the folder of the base.

    Called on every rank.

    Raises:
        UserError: see check_same.
    """
    check_same({_named(name, args): _short(value) for name, value in settings.items()})


def _named(name: str, args) -> str:
    for flag in ("model_name_or_path", "adapter_path", "ptuning_checkpoint", "predict_path"):
        name = name.replace(f"of --{flag}", f"of {getattr(args, flag, '')}")
    return name


def _short(value) -> str:
    """A value for a message; of a long one also a hash, which tells it from others."""
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) < 80 else f"{text[:60]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def code_hashes() -> dict[str, str]:
    """A short SHA-256 of each of this project's programs, by path."""
    root, found = Path(ROOT), {}
    for path in sorted([*root.glob("*.py"), *root.glob("tuning/**/*.py"), *root.glob("glm_models/**/*.py")]):
        found[str(path.relative_to(root))] = short_hash(path)
    return found


def short_hash(path: str | Path) -> str:
    """The first digits of a file's SHA-256, or why it cannot be read."""
    try:
        return "SHA-256 " + file_hash(path)[:12]
    except OSError as error:
        return error.strerror


def check_start(args, versions: dict[str, str], own: tuple[str, ...] = ("data_cache",)) -> None:
    """Make sure that all nodes run the same code with the same flags and libraries. Called on every rank.

    Args:
        own: flags in which nodes may differ.

    Raises:
        UserError: see check_same.
    """
    if not several_nodes():
        return
    flags = {f"--{name}": json.dumps(value, default=str) for name, value in vars(args).items()}
    for name in ("local_rank", *own):
        flags.pop(f"--{name}", None)
    files = {path: short_hash(path) for path in [getattr(args, "ds_file", None)] if path}
    check_same(flags | files | {f"version of {name}": version for name, version in versions.items()} | code_hashes())


# Files


def is_everywhere(path: str) -> bool:
    """Whether each node has a file with the content that it has on rank 0. Called on every rank."""
    mine = None
    with contextlib.suppress(OSError):
        mine = file_hash(path)
    everyone = tell_all(mine)
    return everyone[0] is not None and len(set(everyone)) == 1


def _message(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _send(folder: str, sizes: dict[str, int], to: int) -> OSError | None:
    """Send files. What cannot be read is sent as zeros, since the other side waits for it, and is the result."""
    problem = None
    for name, size in sizes.items():
        path = os.path.join(folder, name)
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            problem, file = error, open(os.devnull, "rb")  # noqa: SIM115
        with file:
            for start in range(0, size, BLOCK):
                wanted = min(BLOCK, size - start)
                try:
                    content = file.read(wanted)
                except OSError as error:
                    problem, content = error, b""
                torch.distributed.send(_message(content.ljust(wanted, b"\0")), to, control_group())
    return problem


def _receive(folder: str, sizes: dict[str, int], sender: int) -> OSError | None:
    """Receive files into a folder. If they cannot be written, they are received all the same: the other side waits."""
    problem = None
    for name, size in sizes.items():
        path = os.path.join(folder, name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "wb")  # noqa: SIM115 - closed below
        except OSError as error:
            problem, file = error, open(os.devnull, "wb")  # noqa: SIM115
        with contextlib.suppress(OSError), file:
            for start in range(0, size, BLOCK):
                block = torch.empty(min(BLOCK, size - start), dtype=torch.uint8)
                torch.distributed.recv(block, sender, control_group())
                try:
                    file.write(block.numpy().tobytes())
                    file.flush()
                except OSError as error:
                    problem = error
    return problem


def file_sizes(folder: str) -> dict[str, int]:
    """Bytes of each file in a folder, by path, without its manifest."""
    return {name: os.path.getsize(os.path.join(folder, name)) for name in list_files(folder)}


def _raise_first(problem: OSError | None) -> None:
    for one in tell_all(problem):
        if one is not None:
            raise one


def gather_files(mine: str, folder: str) -> None:
    """Copy all files of a folder of each other node into one of rank 0. Called on every rank.

    Args:
        mine: of this node; on rank 0's node it is not read.
        folder: of rank 0.

    Raises:
        OSError: on all ranks.
    """
    leads = local_rank() == 0 and not is_rank_0()
    offers, problem = tell_all(file_sizes(mine) if leads else None), None
    if leads:
        problem = _send(mine, offers[torch.distributed.get_rank()], 0)
    elif is_rank_0():
        for rank, sizes in enumerate(offers):
            problem = _receive(folder, sizes, rank) or problem if sizes else problem
    _raise_first(problem)


def spread_files(folder: str, mine: str) -> str:
    """Copy all files of a folder of rank 0 to each other node. Called on every rank.

    Args:
        folder: of rank 0.
        mine: where they go on this node, but on that of rank 0; what is there is removed.

    Returns:
        Where they are on this node.

    Raises:
        OSError: on all ranks.
    """
    sizes, leaders, problem = on_rank_0(lambda: file_sizes(folder)), first_ranks(), None
    if first_here() == 0:
        mine = folder
    made = once_per_node(lambda: mine if mine == folder else start_folder(mine))
    if is_rank_0():
        for leader in leaders[1:]:
            problem = _send(folder, sizes, leader) or problem
    elif local_rank() == 0:
        problem = _receive(made, sizes, 0)
    _raise_first(problem)
    return made


# A node that dies


class NodeWatch:
    """Ends this process when one on another node has died, or when a node no longer answers.

    Each rank has a connection to rank 0 on which nothing is sent. When a process dies, the kernel of its node closes
    its connection; when a node or its network has gone, the kernels' probes (TCP keep-alive) are not answered for 30
    seconds. NCCL would wait for it for ten minutes, and gloo's control group for days.

    Called on every rank, if there are several nodes.
    """

    def __init__(self):
        self.over, self.lock = False, threading.Lock()
        self.peers: dict[int, socket.socket] = {}
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        listener = socket.create_server(("", 0), backlog=size) if rank == 0 else None
        port = listener.getsockname()[1] if listener else 0
        said = (socket.gethostname(), machine(), gloo_address(), port, secrets.token_hex(16))
        everyone = tell_all(said)
        self.hosts, self.places = [one[0] for one in everyone], [one[1] for one in everyone]
        _, _, address, port, secret = everyone[0]
        problem = None
        try:
            self._meet(listener, (address, port), secret.encode(), rank, size)
        except OSError as error:
            problem = f"rank {rank} on {socket.gethostname()} cannot connect to rank 0 at {address}:{port}: {error}"
        if problems := list(filter(None, tell_all(problem))):
            raise UserError(f"{problems[0]}; is a firewall between the nodes?")
        WATCHED.set()
        for number, peer in self.peers.items():
            threading.Thread(target=self._watch, args=(number, peer), daemon=True).start()

    def _meet(self, listener, where: tuple[str, int], secret: bytes, rank: int, size: int) -> None:
        if rank:
            peer = socket.create_connection(where, CONNECT)
            peer.sendall(secret + rank.to_bytes(4, "big"))
            self.peers[0] = peer
        else:
            listener.settimeout(CONNECT)
            with listener:
                while len(self.peers) < size - 1:
                    peer, _ = listener.accept()
                    peer.settimeout(GREETING)
                    greeting = b""
                    with contextlib.suppress(OSError):
                        greeting = peer.recv(len(secret) + 4, socket.MSG_WAITALL)
                    if greeting[:-4] == secret:  # else it is not one of us
                        self.peers[int.from_bytes(greeting[-4:], "big")] = peer
        for peer in self.peers.values():
            peer.settimeout(None)
            probe(peer)

    def _watch(self, rank: int, peer: socket.socket) -> None:
        said, what = b"", "has ended or was killed; see its own message, if there is one"
        try:
            while block := peer.recv(1 << 16):
                said += block
        except OSError as error:
            if not isinstance(error, ConnectionError):
                what = f"has not answered for {IDLE + INTERVAL * PROBES} seconds ({error.strerror}): its node or the "
                what += "network is down"
        if not said:
            time.sleep(2)  # an error of this process, or the end of the run, is the better message
        with self.lock:
            if self.over or ENDING.is_set():
                return
            ENDING.set()
            text = said.decode(errors="replace") or f"error: rank {rank} on node {self.hosts[rank]} {what}"
            self._end(text)

    def _end(self, text: str) -> None:
        """Say it once a node, hand it on, and end this process."""
        if local_rank() == 0:
            print_error(text)
        if is_rank_0():
            for peer in self.peers.values():
                with contextlib.suppress(OSError):
                    peer.settimeout(1)
                    peer.sendall(text.encode())
        time.sleep(2)  # until the others have it
        os._exit(1)

    def close(self) -> None:
        """From now on other processes may end."""
        self.over = True
        WATCHED.clear()


def probe(peer: socket.socket) -> None:
    """Have the kernel notice when the other end of a connection no longer answers."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):  # Linux
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
