"""Result folders of --output_dir: which exist, and which are removed, for a new run or because of --keep_results.

Only what trainings write is removed, identified by name and by the manifests of folders. Other files are never removed:
if one lies inside a result, that result stays, or the run is refused.
"""

import os
import re

from tuning.errors import FolderError, UserError
from tuning.folders import foreign_files, remove_folder
from tuning.run.resume import LATEST, list_states

BEST = "best"
LOGS = ("best.json", "validation.jsonl", "validation-predictions.jsonl", "log.jsonl", "summary.json")
EVENTS = "events.out.tfevents."  # how TensorBoard's files begin
SHOWN = 5  # at most this many names in a message


def step_of(folder: str) -> int:
    """Number of optimizer steps in the name of a result; -1 if the name is not that of a result."""
    match = re.fullmatch(r"epoch-\d+-step-(\d+)", os.path.basename(folder.rstrip("/")))
    return int(match[1]) if match else -1


def list_results(output_dir: str) -> list[str]:
    """Folders epoch-*-step-*, the newest first."""
    found = [os.path.join(output_dir, name) for name in _names(output_dir) if step_of(name) >= 0]
    return sorted(filter(os.path.isdir, found), key=step_of, reverse=True)


def _names(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _list_events(output_dir: str) -> list[str]:
    folder = os.path.join(output_dir, "tensorboard")
    return [os.path.join(folder, name) for name in sorted(_names(folder)) if name.startswith(EVENTS)]


# A second run


def find_traces(output_dir: str) -> list[str]:
    """Names of results, states and logs that an earlier run left; empty if it ended before its first logged step."""
    folders = [*list_states(output_dir), *list_results(output_dir), os.path.join(output_dir, BEST)]
    found = [os.path.relpath(path, output_dir) for path in folders if os.path.isdir(path)]
    for name in LOGS:
        path = os.path.join(output_dir, name)
        if os.path.isfile(path) and os.path.getsize(path):
            found.append(name)
    if _list_events(output_dir) and not os.path.isfile(os.path.join(output_dir, "log.jsonl")):
        found.append("tensorboard")
    return found


def check_second_run(output_dir: str, state: str | None, goes_on: bool, overwrite: bool) -> None:
    """Make sure that a run does not mix its results with those of an earlier one.

    Args:
        state: the training state from which it resumes.
        goes_on: it should resume the run of this folder, if there is one.
        overwrite: --overwrite_output_dir.

    Raises:
        UserError: the folder holds results of another run; or removing them would remove other files too.
    """
    inside = state is not None and os.path.realpath(state).startswith(os.path.realpath(output_dir) + os.sep)
    if overwrite and inside:
        raise UserError(f"--overwrite_output_dir would remove {state}, from which this run should resume")
    if overwrite:
        list_removable(output_dir)
    elif (traces := find_traces(output_dir)) and not goes_on and not inside:
        raise UserError(
            f"--output_dir {output_dir} holds results of an earlier run ({shorten(traces)}): name another folder; or "
            "--resume_from_checkpoint resumes that run, --overwrite_output_dir removes them and starts again"
        )


def shorten(names: list[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def list_removable(output_dir: str) -> list[str]:
    """Folders and files that trainings wrote to a folder, in the order of their removal: states come first, so that a
    run that is killed meanwhile leaves no state without its results.

    Raises:
        UserError: such a folder contains files that no training wrote.
    """
    folders = [*list_states(output_dir), *list_results(output_dir), os.path.join(output_dir, BEST)]
    folders = list(filter(os.path.isdir, folders))
    files = [os.path.join(output_dir, name) for name in (os.path.join("states", LATEST), *LOGS)]
    for folder in folders:
        try:
            foreign = [] if os.path.islink(folder) else foreign_files(folder)
        except FolderError as error:
            raise UserError(f"--overwrite_output_dir: {error}; remove it yourself") from None
        if foreign:
            raise UserError(
                f"--overwrite_output_dir would remove files that no training wrote from {folder}: {shorten(foreign)}; "
                "move them away, or name another --output_dir"
            )
    return [*folders, *filter(os.path.isfile, files), *_list_events(output_dir)]


def size_of(paths: list[str]) -> int:
    """Total bytes of files and folders."""
    total = 0
    for path in paths:
        inside = [os.path.join(where, name) for where, _, names in os.walk(path) for name in names]
        total += sum(os.lstat(file).st_size for file in (inside if os.path.isdir(path) else [path]))
    return total


def remove(paths: list[str]) -> None:
    """Remove files and folders that `list_removable` returned.

    Raises:
        FolderError: something cannot be removed.
    """
    for path in paths:
        try:
            remove_folder(path) if os.path.isdir(path) else os.unlink(path)
        except OSError as error:
            raise FolderError(f"cannot remove {path}: {error.strerror}") from None


def remove_events(output_dir: str) -> None:
    """Remove TensorBoard files of an earlier start: TensorBoard would draw both curves as one."""
    remove(_list_events(output_dir))


def remove_summary(output_dir: str) -> None:
    """Remove the summary of an earlier start: the file must exist only if the training has finished."""
    path = os.path.join(output_dir, "summary.json")
    remove([path] if os.path.isfile(path) else [])


# --keep_results


def prune(output_dir: str, step: int, keep: int) -> list[str]:
    """Keep the `keep` newest results up to a step and remove all others; best/ does not count.

    Results of later steps became invalid when the run resumed from an earlier state.

    Returns:
        A warning for each result that stays because it contains other files or cannot be removed.
    """
    found = list_results(output_dir)
    past = [folder for folder in found if step_of(folder) <= step]
    warnings = []
    for folder in [*past[keep:], *(folder for folder in found if step_of(folder) > step)]:
        try:
            foreign = [] if os.path.islink(folder) else foreign_files(folder)
            if foreign:
                warnings.append(f"{folder} stays: it holds {shorten(foreign)}, which this training did not write")
            else:
                remove_folder(folder)
        except FolderError as error:
            warnings.append(f"{folder} stays: {error}")
        except OSError as error:
            warnings.append(f"{folder} cannot be removed: {error.strerror}")
    return warnings
