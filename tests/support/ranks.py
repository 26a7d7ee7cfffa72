"""Python programs as the ranks of a process group, without a launcher."""

import os
import socket
import subprocess
import sys


def start_ranks(ranks: int, *command: str) -> list[subprocess.Popen]:
    """Start a Python program once for each rank of a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def end_ranks(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
