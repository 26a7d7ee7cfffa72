"""How a script ends: one clear line and an exit code (errors.ExitCode) for what the user can fix, a traceback for bugs.

Nothing slow is imported here: scripts import this first, so that Ctrl-C gives one line from the first second on.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback

from tuning.errors import DataError, ExitCode, FolderError, StopTraining, UserError
from tuning.terminal import drop_output, print_error, visible

# how gloo and torch's store say that another process has gone
LOST = "closed by peer|connection reset|broken pipe|got 0 bytes|connection was likely closed"
ENDING = threading.Event()  # set when this process is about to print its error and end
WATCHED = threading.Event()  # set while other nodes are watched: what looks at them knows which one has gone
WATCH_TIME = 45.0  # seconds until it has said so and ended this process


def start_script() -> None:
    """The first call of a script: characters that the terminal cannot show are escaped, and Ctrl-C gives one line.

    Not part of `main`, which a notebook may call.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a print must not end a training
    sys.excepthook = _show


def _show(kind, error, trace) -> None:
    """Python's hook for an uncaught exception."""
    if issubclass(kind, KeyboardInterrupt):
        # Python then lets SIGINT end the process; a shell sees that and stops a loop around it
        _tell("stopped by Ctrl-C (SIGINT)")
    else:
        sys.__excepthook__(kind, error, trace)


def _tell(message: str) -> None:
    """Print to the terminal, after closing progress bars."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stdout.flush()  # otherwise a report in a pipe could be lost
    print_error(visible(message))


@contextlib.contextmanager
def exit_on_user_errors():
    """End with one line and an exit code on StopTraining and on errors of the user; bugs keep their traceback.

    Most such errors occur on every rank at once: then rank 0 prints for all. If one occurs on another rank, that rank
    prints it after a moment, in which the launcher would have ended it if rank 0 had failed too.

    Raises:
        SystemExit: with the code, if no other rank waits, so that a notebook goes on.
        KeyboardInterrupt: for the same reason.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    alone = not size.isdigit() or int(size) == 1
    try:
        yield
        return
    except KeyboardInterrupt:
        if alone:
            raise
        code, message, everyone = ExitCode.INTERRUPTED, "stopped by Ctrl-C (SIGINT)", True
    except StopTraining as stop:
        code, everyone = stop.exit_code, stop.everyone
        message = str(stop) if code == ExitCode.RESUMABLE else f"error: {stop}"
    except Exception as error:
        if isinstance(error, _clear()):
            code, message, everyone = ExitCode.USER_ERROR, f"error: {error}", False
        elif isinstance(error, BrokenPipeError) and alone:
            drop_output()
            code, message = ExitCode.FAILED, "error: the program that reads this output has ended"
            everyone = False
        elif alone:
            raise
        else:
            code, message, everyone = ExitCode.FAILED, traceback.format_exc().rstrip(), False
            if re.search(LOST, str(error), re.IGNORECASE):
                if WATCHED.is_set():
                    time.sleep(WATCH_TIME)
                message = (
                    "error: lost the connection to another process of this run, which has ended or was killed; see its "
                    "own message, if there is one"
                )
    _end(code, message, everyone, alone)


def _clear() -> tuple[type[Exception], ...]:
    """Errors whose message is all the user needs."""
    from glm_models.checkpoint import CheckpointError

    return UserError, DataError, CheckpointError, FolderError


def _end(code: int, message: str, everyone: bool, alone: bool) -> None:
    if not alone:
        ENDING.set()
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not everyone:
        if rank != "0" and not alone:
            time.sleep(3)
            message = f"[rank {rank}] {message}"
        _tell(message)
    if alone:
        raise SystemExit(code)
    # os._exit: the interpreter cannot end normally while other ranks wait in a collective
    os._exit(code)
