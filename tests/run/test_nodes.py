"""Several nodes, as far as one machine can stand for them; and what torch is told of a GPU's memory."""

import os
import socket
from types import SimpleNamespace

import pytest
from runs import Launched, command, make_base, make_rows

import utils
from tuning import environment
from tuning.run import health, launch

LOOPBACK = SimpleNamespace(address="127.0.0.1", family=socket.AF_INET)
CARD = SimpleNamespace(address="10.1.2.3", family=socket.AF_INET)


class Probe:
    """A socket that finds its way from the address `own`."""

    own = CARD.address

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def connect(self, where):
        pass

    def getsockname(self):
        return self.own, 12345


@pytest.fixture
def host(monkeypatch):
    """A host of Debian's kind: its own name leads to itself; it has one network card."""
    monkeypatch.setattr(launch.psutil, "net_if_addrs", lambda: {"lo": [LOOPBACK], "eth7": [CARD]})
    monkeypatch.setattr(launch.socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 0, 0, "", ("10.1.2.9", 9))])
    monkeypatch.setattr(launch.socket, "gethostbyname", lambda _: "127.0.1.1")
    monkeypatch.setattr(launch.socket, "socket", Probe)
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2", "MASTER_ADDR": "node-0"})
    return monkeypatch


def test_gloo_listens_where_the_first_node_is_reached_from(host):
    assert launch.gloo_address() == "127.0.1.1"
    launch.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert launch.gloo_address() == "10.1.2.3"


@pytest.mark.parametrize(
    ("change", "interface"),
    [
        ({"GLOO_SOCKET_IFNAME": "mine"}, "mine"),  # the user knows best
        ({"WORLD_SIZE": "1"}, None),
        ({}, None),
    ],
)
def test_gloo_is_left_alone_where_there_is_nothing_to_choose(host, change, interface):
    host.setattr(Probe, "own", "127.0.0.1" if not change else CARD.address)
    os.environ.update(change)
    launch.choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


def test_a_first_node_that_is_not_known_is_left_to_the_process_group(host):
    def unknown(*_, **__):
        raise socket.gaierror("Name or service not known")

    host.setattr(launch.socket, "getaddrinfo", unknown)
    launch.choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("reachable", [False, True])
def test_a_rank_that_other_nodes_cannot_reach_ends_all_at_once(tmp_path, reachable):
    """On two nodes gloo would wait for days."""

    def prepare():
        number = os.environ["RANK"]
        launch.machine = lambda: ("same name", f"start of node {number}", 0)
        launch.gloo_address = lambda: CARD.address if number == "0" or reachable else "127.0.1.1"

    base, rows = make_base("glm3", tmp_path / "base"), make_rows(tmp_path / "rows")
    argv = command("glm3", "lora", 2, False, base, rows, tmp_path / "output")
    run = Launched(argv, 2, tmp_path / "losses", tmp_path / "log", prepare)
    assert run.wait() == {0: 2, 1: 2}
    text = (tmp_path / "log").read_text()
    error = next(line for line in text.splitlines() if "error:" in line)  # rank 0 speaks first
    if reachable:  # they come one check further: LOCAL_RANK says that they are on one node
        assert "rank 1 is process 1 of its node, but rank 0" in error
    else:
        assert "error: rank 1 on " in error and "listens at 127.0.1.1" in error and "GLOO_SOCKET_IFNAME" in error


HERE = ("same name", "start 1", 11)


@pytest.mark.parametrize(
    ("where", "watched"),
    [(HERE, True), (("same name", "start 2", 11), False), (("same name", "start 1", 12), False)],
)
def test_processes_of_other_machines_and_containers_are_not_watched(monkeypatch, where, watched):
    """Their process ids mean nothing here, whatever the host is called."""
    monkeypatch.setattr(health, "machine", lambda: HERE)
    monkeypatch.setattr(utils, "control_group", lambda: None)
    monkeypatch.setattr(health, "NodeWatch", lambda: None)
    monkeypatch.setattr(health.threading, "Thread", lambda target, daemon: SimpleNamespace(start=lambda: None))
    group = {"get_world_size": lambda: 2, "get_rank": lambda: 0, "barrier": lambda group: None}
    group["is_initialized"] = lambda: True
    group["all_gather_object"] = lambda found, mine, group: found.__setitem__(slice(None), [mine, (where, 4321)])
    for name, function in group.items():
        monkeypatch.setattr(health.torch.distributed, name, function)
    assert health.PeerWatchdog().others == ({1: 4321} if watched else {})


# Memory


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_allocator_is_told_unless_the_user_has(monkeypatch, before, after):
    monkeypatch.setattr(os, "environ", dict(before))
    environment.let_segments_grow()
    assert os.environ == after
