"""One function on many items in several processes: `in_order`."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tuning.errors import DataError

MOST = 8  # processes: more of them would wait for the one that hands out the items
AHEAD = 2  # items for each process: the one it works on, and the next
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def processes_for(work: int, least: int) -> int:
    """How many processes to start for so much work.

    Args:
        least: work that is worth a second process, in the same unit.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return min(available_cpus(), MOST) if work >= least and can_fork else 1


def available_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable, items: Iterable, processes: int) -> Iterator:
    """function(item) of each item, in the order of the items, of which only a few are read ahead.

    The processes are forked from this one. So they have `function` and all that it refers to without a start of their
    own, and Python's hashes are the same in all of them. `function` must not use torch or an accelerator: there is none
    of the threads that these need, and none of their devices.

    Args:
        items: sent to a process, and the results back; a DataError in reading them is raised in its turn, after the
            results of the items before it.
        processes: with 1 everything is done here.

    Raises:
        DataError: processes cannot be started, or one was killed; or as `items` and `function`.
    """
    if processes < 2:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _begin, (function, os.getpid()))

    def jobs():
        try:
            for item in items:
                yield pool.submit(_run, item)
        except DataError as error:
            broken = Future()
            broken.set_exception(error)
            yield broken

    waiting: deque[Future] = deque()
    try:
        for job in jobs():
            waiting.append(job)
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {processes} processes that prepared data was killed, perhaps for lack of memory; start again, "
            "with fewer CPUs where memory is short: taskset -c 0 COMMAND"
        ) from None
    except OSError as error:
        raise DataError(f"cannot start {processes} processes to prepare data: {error.strerror}") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable  # of a process that `in_order` started


def _begin(function: Callable, parent: int) -> None:
    """In a new process: nothing of it may outlive its parent, whose signal handlers are not for it."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _run(item):
    return _function(item)
