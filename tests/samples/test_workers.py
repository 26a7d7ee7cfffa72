"""Several processes do what one does, in the same order; what goes wrong there is said; none outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endings import assert_they_end

from tuning.errors import DataError
from tuning.samples import workers
from tuning.samples.workers import in_order, processes_for

ROOT = Path(__file__).resolve().parent.parent.parent


def test_results_come_in_order_from_other_processes_which_know_what_is_here():
    here = object()

    def work(number):
        time.sleep(0.02 * (number % 3))
        return number, os.getpid(), hash("text"), id(here)

    numbers, pids, hashes, ids = zip(*in_order(work, range(12), 3), strict=True)
    assert numbers == tuple(range(12))
    assert len(set(pids)) > 1 and os.getpid() not in pids
    assert {*hashes} == {hash("text")} and {*ids} == {id(here)}
    assert [pid for _, pid, *_ in in_order(work, range(2), 1)] == [os.getpid()] * 2


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_comes_after_the_results_before_it(processes):
    def work(number):
        if number == 3:
            raise DataError("three")
        return number

    def items():
        yield from range(9)
        raise DataError("no more")

    for start, error in ((0, "three"), (4, "no more")):
        seen = []
        with pytest.raises(DataError, match=error):
            for one in in_order(work, (item for item in items() if item >= start), processes):
                seen.append(one)
        assert seen == (list(range(3)) if start == 0 else list(range(4, 9)))


def test_few_items_are_read_ahead():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    results = in_order(str, items(), 2)
    assert next(results) == "0"
    assert len(taken) <= 2 * workers.AHEAD + 1
    results.close()  # ends the processes, without working on the rest
    assert len(taken) <= 2 * workers.AHEAD + 1


def test_a_killed_process_is_one_error():
    def work(number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(DataError, match="one of 2 processes that prepared data was killed"):
        list(in_order(work, range(20), 2))


def test_no_process_outlives_a_killed_parent():
    """SIGKILL leaves the parent no time to end them, and their copies of its sockets would keep connections open."""
    code = """
import os, time
from tuning.samples.workers import in_order
def work(number):
    if number == 2:
        time.sleep(600)
    return os.getpid()
for pid in in_order(work, range(20), 2):
    print(pid, flush=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    assert_they_end(pids)
    assert parent.stdout.read() == ""  # nobody else holds its end


def test_small_work_and_one_cpu_need_no_other_process(monkeypatch):
    monkeypatch.setattr(workers, "available_cpus", lambda: 64)
    assert processes_for(99, 100) == 1
    assert processes_for(100, 100) == workers.MOST
    monkeypatch.setattr(workers, "available_cpus", lambda: 1)
    assert processes_for(100, 100) == 1
