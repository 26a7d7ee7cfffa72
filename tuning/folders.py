"""Folders that are complete or do not exist: written under another name, flushed, listed in a manifest, then renamed.

If the process is killed at any time, an earlier folder of that name is unchanged. What remains under `PARTIAL` or
`REPLACED` is cleaned up by `sweep` at the next start.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil

from safetensors import SafetensorError

from tuning.errors import FolderError, UserError

MANIFEST = "manifest.json"
WRITTEN_BY = "chatglm-tuning"  # marks manifests of this project
PARTIAL, REPLACED = ".partial", ".replaced"  # suffixes of folders that are being written or replaced
BLOCK = 1 << 22  # bytes read at once


# Writing


def start_folder(folder: str) -> str:
    """Make an empty folder to be filled and then passed to `finish_folder`. Returns its path."""
    partial = folder.rstrip("/") + PARTIAL
    _clear(partial)
    os.makedirs(partial)
    return partial


def _clear(path: str) -> None:
    """Remove a folder; of a link only the link, since its target may still be needed."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)


def list_files(folder: str) -> list[str]:
    """Sorted relative paths of all files in a folder and below, except the manifest."""
    found = [
        os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names
    ]
    return sorted(name for name in found if name != MANIFEST)


def seal_files(folder: str, names: list[str]) -> dict[str, dict]:
    """Flush files to the disk. Returns the manifest's entry of each: size in bytes, SHA-256."""
    return {name: _describe(os.path.join(folder, name), flush=True) for name in names}


def file_hash(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(path: str, flush: bool = False) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(BLOCK):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def finish_folder(partial: str, folder: str, files: dict[str, dict], replace: bool = True) -> None:
    """Write the manifest and rename the folder to its final name.

    Args:
        files: entries of `seal_files` for all files.
        replace: whether to replace an existing folder; otherwise only an empty one may exist.

    Raises:
        OSError: a folder exists that must not be replaced.
    """
    write_file(os.path.join(partial, MANIFEST), json.dumps({"written_by": WRITTEN_BY, "files": files}, indent=1))
    for where, _, _ in os.walk(partial):
        _flush(where)
    folder = folder.rstrip("/")
    if replace and os.path.isdir(folder):
        _clear(folder + REPLACED)
        os.rename(folder, folder + REPLACED)
    os.rename(partial, folder)
    _flush(os.path.dirname(folder) or ".")
    if replace:
        _clear(folder + REPLACED)


def write_file(path: str, text: str) -> None:
    """Write a file atomically; it is on the disk when this returns."""
    with open(path + PARTIAL, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + PARTIAL, path)
    _flush(os.path.dirname(path) or ".")


def _flush(folder: str) -> None:
    """Flush a folder's directory entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(folder: str):
    """Write a folder atomically: the block fills another folder, which is renamed when it is on the disk.

    Raises:
        FolderError: it cannot be written; then nothing new is left, and an earlier folder is unchanged.
    """
    with write_errors(folder):
        partial = start_folder(folder)
        yield partial
        finish_folder(partial, folder, seal_files(partial, list_files(partial)))


@contextlib.contextmanager
def claimed_folder(folder: str):
    """Like `new_folder`, for a name that several processes may want: one of them gets it, and nothing is replaced.

    Raises:
        FolderError: another process is writing it, it is not empty, or it cannot be written.
    """
    folder = folder.rstrip("/")
    partial = folder + PARTIAL
    lock = _lock_partial(partial)
    try:
        with write_errors(folder):
            if os.path.isdir(folder) and os.listdir(folder):
                raise FolderError(f"{folder} is not empty: another process has just written it")
            for name in os.listdir(partial):  # left by a killed process
                path = os.path.join(partial, name)
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
            yield partial
            finish_folder(partial, folder, seal_files(partial, list_files(partial)), replace=False)
    finally:
        os.close(lock)


def _lock_partial(partial: str) -> int:
    """Make a folder and lock it for this process. Returns the handle that holds the lock.

    Raises:
        FolderError: another process holds the lock, or the folder cannot be made.
    """
    while True:
        try:
            os.makedirs(partial, exist_ok=True)
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process has just renamed or removed it
            continue
        except OSError as error:
            raise FolderError(f"cannot write {partial}: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FolderError(f"another process is writing {partial.removesuffix(PARTIAL)}; name another") from None
        except OSError:
            return handle  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                return handle
        os.close(handle)


def _is_locked(folder: str) -> bool:
    """Whether a process is writing a folder of `claimed_folder`."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(handle)
    return False


@contextlib.contextmanager
def write_errors(folder: str):
    """Turn errors while `folder` is written into one FolderError, and remove what was written so far."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        _drop(folder)
        raise FolderError(f"cannot write {folder}: {reason}; an earlier version is unchanged") from error
    except BaseException:
        _drop(folder)
        raise


def _drop(folder: str) -> None:
    """Remove a partly written file or folder, as far as possible."""
    partial = folder.rstrip("/") + PARTIAL
    if os.path.isfile(partial):
        with contextlib.suppress(OSError):
            os.unlink(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _reason(error: Exception) -> str | None:
    """Why the disk refused the write, or None if the error has another cause."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError):  # hidden by torch's zip writer
        return cause.strerror
    if number := re.search(r"os error (\d+)", str(error)):  # safetensors is written in Rust
        return os.strerror(int(number[1]))
    if words := re.search(r"failed with strerror: ([\w ]+)", str(error)):  # torch, opening a file
        return words[1].strip()
    for kind in ("PytorchStreamWriter failed", "unexpected pos", "I/O error"):
        if kind in str(error):
            return f"no space left, a quota or a limit on the size of files, most likely ({error})"
    return None


def remove_folder(folder: str) -> None:
    """Remove a folder so that no part of it is ever visible under its name. Of a link, only the link is removed."""
    partial = folder.rstrip("/") + PARTIAL
    _clear(partial)
    os.rename(folder.rstrip("/"), partial)
    _clear(partial)


# Before and after


def sweep(parent: str) -> list[str]:
    """Clean up what killed processes left in a folder. Returns the paths that were removed or restored."""
    found = []
    for name in sorted(os.listdir(parent)) if os.path.isdir(parent) else ():
        path = os.path.join(parent, name)
        if not name.endswith((PARTIAL, REPLACED)) or not (os.path.isdir(path) or os.path.islink(path)):
            continue
        if not os.path.islink(path) and _is_locked(path):
            continue
        if name.endswith(REPLACED) and not os.path.lexists(whole := path.removesuffix(REPLACED)):
            os.rename(path, whole)
        else:
            _clear(path)
        found.append(path)
    return found


def check_folder(folder: str, nothing_else: bool = False) -> None:
    """Check every byte of a folder against its manifest.

    Args:
        nothing_else: whether additional files are an error too.

    Raises:
        FolderError: there is no manifest of this project; a file is missing or has another size or content.
    """
    expected = _read_manifest(folder)
    for name, (size, digest) in expected.items():
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            raise FolderError(f"{folder} is not complete: {name} is missing")
        if os.path.getsize(file) != size:
            raise FolderError(f"{file} has {os.path.getsize(file)} bytes instead of {size}: it is broken")
        if _describe(file)["sha256"] != digest:
            raise FolderError(f"{file} is not as it was written (SHA-256 differs): it is broken")
    for name in list_files(folder):
        if nothing_else and name not in expected:
            raise FolderError(f"{folder} holds {name}, which is not in its {MANIFEST}")


def _read_manifest(folder: str) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file, by name.

    Raises:
        FolderError: there is no valid manifest of this project.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["written_by"] != WRITTEN_BY:
            raise FolderError(f"{path} was not written by this project")
        return {str(name): (item["size"], item["sha256"]) for name, item in manifest["files"].items()}
    except OSError as error:
        raise FolderError(f"{folder} is not complete: {MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, FolderError):
            raise
        raise FolderError(f"{path} is broken: {error!r}") from None


def foreign_files(folder: str) -> list[str]:
    """Files that were added to a folder later: those that its manifest does not list.

    Raises:
        FolderError: it has no manifest of this project.
    """
    return sorted(set(list_files(folder)) - _read_manifest(folder).keys())


def check_new_folder(folder: str) -> None:
    """Make sure that nothing would be replaced by the folder of --output_dir.

    Raises:
        UserError: it exists and is not an empty folder.
    """
    if os.path.lexists(folder) and (os.path.islink(folder) or not os.path.isdir(folder)):
        raise UserError(f"--output_dir {folder} is not a folder; name another")
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"--output_dir {folder} is not empty; name another")


def check_space(folder: str, needed: int, what: str) -> None:
    """Make sure that a disk has enough room.

    Args:
        folder: the destination; need not exist yet.
        needed: bytes.
        what: for the message.

    Raises:
        FolderError: there is not enough room.
    """
    free = free_space(folder)
    if free < needed:
        raise FolderError(
            f"no room for {what} in {folder}: it takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        )


def free_space(folder: str) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def lock_folder(folder: str):
    """Make a folder and lock it for this process, as long as the returned object lives.

    Raises:
        FolderError: another process holds the lock, or the folder cannot be made or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "a")  # noqa: SIM115 - open as long as the lock is held
    except OSError as error:
        raise FolderError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderError(f"another training is writing to {folder}; name another --output_dir") from None
    except OSError:
        pass  # a file system without locks
    return lock
