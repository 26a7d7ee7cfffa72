"""How a script ends: one clear line and an exit code for what the user can put right, a traceback for bugs alone.

Exit codes, see docs/resume.md: 0 done; 1 a bug, or another process died; 2 something the user can put right; 3 the loss
or the gradients went wrong; 4 out of memory; 75 stopped by a signal, go on later; 128 + n ended at once by signal n.

Nothing slow is imported here: a script comes here first, so that Ctrl-C is one line from its first second on.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback

from tuning.errors import FolderError, UserError
from tuning.terminal import drop_output, visible

ENDING = threading.Event()  # this process is about to end with an error that it tells itself
LATER = 75  # exit code of a run that can go on; "temporary failure" in sysexits.h
INTERRUPTED = 130  # 128 + SIGINT


class StopTraining(Exception):
    """The run ends here.

    exit_code: of the process; see the module.
    everyone: all ranks end so, together, and rank 0 says why.
    """

    def __init__(self, exit_code: int, message: str, everyone: bool = True):
        super().__init__(message)
        self.exit_code, self.everyone = exit_code, everyone


def start_script() -> None:
    """Before anything else in a script: what a terminal cannot show is escaped, and Ctrl-C is told in one line.

    Not for `main`, which may be called from a notebook.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a print must not end a training
    sys.excepthook = _show


def _show(kind, error, trace) -> None:
    """Python's hook for an exception that nobody caught."""
    if issubclass(kind, KeyboardInterrupt):
        # Python then lets SIGINT end the process: shells see that, and end a loop around it
        _tell("stopped by Ctrl-C (SIGINT)")
    else:
        sys.__excepthook__(kind, error, trace)


def _tell(message: str) -> None:
    """Write a line to the terminal, not behind a progress bar."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stdout.flush()  # else a report in a pipe would be lost
    with contextlib.suppress(OSError, ValueError):
        print(visible(message), file=sys.stderr, flush=True)


@contextlib.contextmanager
def clear_errors(*kinds: type[Exception]):
    """End with one line and exit code 2 on errors that the user can put right, and as a StopTraining says; others keep
    their traceback.

    Most such errors meet every rank at once; then rank 0 speaks for all. One that meets a single other rank is told by
    that rank after a moment, in which the launcher would have ended it if rank 0 had failed too.

    Raises:
        SystemExit: with the code, where no other rank waits: a notebook lives on.
        KeyboardInterrupt: the same.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    alone = not size.isdigit() or int(size) == 1
    try:
        yield
        return
    except KeyboardInterrupt:
        if alone:
            raise
        code, message, everyone = INTERRUPTED, "stopped by Ctrl-C (SIGINT)", True
    except StopTraining as stop:
        code, message, everyone = stop.exit_code, f"{'error: ' * (stop.exit_code < LATER)}{stop}", stop.everyone
    except Exception as error:
        if isinstance(error, (*_clear(), *kinds)):
            code, message, everyone = 2, f"error: {error}", False
        elif isinstance(error, BrokenPipeError) and alone:
            drop_output()
            code, message, everyone = (
                1,
                "error: what is printed was to be read by another program, which is gone",
                False,
            )
        elif alone:
            raise
        else:
            code, message, everyone = 1, traceback.format_exc().rstrip(), False
            if re.search("closed by peer|connection reset|broken pipe", str(error), re.IGNORECASE):
                message = "error: the connection to another process of this training is lost; see what that one says"
    _end(code, message, everyone, alone)


def _clear() -> tuple[type[Exception], ...]:
    """Errors whose message is all that the user needs."""
    from glm_models.checkpoint import CheckpointError

    return UserError, CheckpointError, FolderError


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
    # a process group whose other ranks wait in a collective would not let the interpreter end
    os._exit(code)
