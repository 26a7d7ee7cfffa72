"""Processes that must end by themselves."""

import os
import time


def assert_they_end(pids: list[int], limit: float = 30) -> None:
    """Wait until none of some processes is there any more. AssertionError: one is, after `limit` seconds."""
    end = time.monotonic() + limit
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < end, f"still there after {limit} s: {left}"
        time.sleep(0.05)
