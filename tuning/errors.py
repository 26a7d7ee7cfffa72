"""Exit codes, and errors that the user can fix. Imports nothing of ours: flags are checked before torch is loaded."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a script ended, for shells and job schedulers. 128 + n: ended at once by signal n."""

    DONE = 0
    FAILED = 1  # a bug, or another process died
    USER_ERROR = 2  # something that the user can fix
    DIVERGED = 3  # loss or gradients went wrong
    OUT_OF_MEMORY = 4
    RESUMABLE = 75  # stopped by a signal with its state saved; "temporary failure" in sysexits.h
    INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT


class UserError(ValueError):
    """Something the user can fix; shown as one line, without a traceback."""


class DataError(ValueError):
    """A row or file that cannot be used; the message names file and line and what is wrong."""


class FolderError(ValueError):
    """A folder that cannot be written, or that differs from what was written; the message names it and what to do."""


class StopTraining(Exception):
    """The run ends here.

    exit_code: of the process.
    everyone: all ranks end together with it, and rank 0 says why.
    """

    def __init__(self, exit_code: int, message: str, everyone: bool = True):
        super().__init__(message)
        self.exit_code, self.everyone = exit_code, everyone
