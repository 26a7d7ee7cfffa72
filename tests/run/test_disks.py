"""Disks that are full, links in the place of folders, what killed writers leave: nothing is lost, no traceback."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest

from tuning import ROOT, folders
from tuning.errors import FolderError
from tuning.folders import MANIFEST
from tuning.run import launch, log
from tuning.samples import cache


@pytest.fixture
def said(monkeypatch):
    """What the log says on the terminal."""
    lines = []
    monkeypatch.setattr(log, "print_rank_0", lines.append)
    return lines


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# A log that cannot be written ends no training


class HalfFull:
    """A file on a disk that takes four bytes more."""

    def __init__(self, path, mode, buffering):
        self.file = open(path, mode, buffering=buffering)  # noqa: SIM115 - __exit__ closes it

    def write(self, content):
        return self.file.write(content[:4])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("disk", [full, HalfFull])
def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path, monkeypatch, said, disk):
    path = tmp_path / "log.jsonl"
    lines = log.JsonLines(str(path), 0)
    lines.add(step=1)
    with monkeypatch.context() as patch:
        patch.setattr(log, "open", disk, raising=False)
        lines.add(step=2)
        lines.add(step=3)
        assert path.read_text() == '{"step": 1}\n'  # no half line
    assert len(said) == 1 and "No space left" in said[0] and str(path) in said[0]
    lines.add(step=4)
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4] and len(said) == 1


def test_lines_that_are_lost_are_counted(tmp_path, monkeypatch, said):
    lines = log.JsonLines(str(tmp_path / "log.jsonl"), 0)
    monkeypatch.setattr(log, "open", full, raising=False)
    lines.add(step=1)
    lines.add(step=2)
    lines.close()
    assert "lacks its last 2 lines" in said[-1]


@pytest.mark.parametrize("where", ["__init__", "add_scalar", "flush", "close"])
def test_curves_that_cannot_be_written_end_nothing(tmp_path, monkeypatch, said, where):
    from torch.utils.tensorboard import SummaryWriter

    real = getattr(SummaryWriter, where)

    def fails(self, *args, **kwargs):
        if where == "close":
            real(self)
        full()

    monkeypatch.setattr(SummaryWriter, where, fails)
    curves = log.Curves(str(tmp_path / "tensorboard"), 0)
    for step in (1, 2):
        curves.add("train", {"loss": 1.0}, step)
    curves.close()
    assert len(said) == 1 and "No space left" in said[0] and "goes on without them" in said[0]


# The start


def test_a_start_without_a_folder_for_operations_or_open_files_is_one_line():
    text = launch._start_problem(FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/nope"))
    assert "cannot write /proc/nope: No such file or directory" in text and "TORCH_EXTENSIONS_DIR" in text
    assert "ulimit -n" in launch._start_problem(OSError(errno.EMFILE, "Too many open files"))


# Folders


def test_reasons_of_torch_and_safetensors_are_the_disk_s():
    text = "[enforce fail at inline_container.cc:747] . open file failed with strerror: No space left on device"
    for error in (RuntimeError(text), RuntimeError("unexpected pos 64 vs 0"), OSError(errno.EFBIG, "File too large")):
        with pytest.raises(FolderError, match="cannot write"), folders.write_errors("x"):
            raise error
    with pytest.raises(RuntimeError, match="a bug"), folders.write_errors("x"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("end", ["", folders.PARTIAL, folders.REPLACED])
def test_of_a_link_only_the_link_goes(tmp_path, end):
    elsewhere, states = tmp_path / "elsewhere", tmp_path / "states"
    elsewhere.mkdir()
    states.mkdir()
    (elsewhere / "weights").write_text("wanted")
    link = states / f"step-00000002{end}"
    link.symlink_to(elsewhere)
    if end:
        (states / "step-00000002").mkdir()
        folders.sweep(str(states))
    else:
        folders.remove_folder(str(link))
    assert not os.path.lexists(link) and (elsewhere / "weights").read_text() == "wanted"
    link.symlink_to(elsewhere)
    with folders.new_folder(str(states / "step-00000002")) as partial, open(f"{partial}/new", "w") as file:
        file.write("new")
    assert (states / "step-00000002" / "new").is_file() and os.listdir(elsewhere) == ["weights"]


def test_a_manifest_nested_deeply_is_broken(tmp_path):
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(FolderError, match="is broken"):
        folders.check_folder(str(tmp_path))


# The data cache


def whole_cache(path):
    cache.write_cache(str(path), [], {"skipped": 0})
    assert cache.is_whole(str(path), ["skipped"])
    return path


def test_what_is_no_cache_is_not_whole(tmp_path):
    path = whole_cache(tmp_path / "a.samples")
    assert not cache.is_whole(str(path), ["skipped", "another"])  # of a version that counted less
    path.write_bytes(b"[" * cache.HEADER)
    assert not cache.is_whole(str(path), ["skipped"])
    path.unlink()
    os.mkfifo(path)
    assert not cache.is_whole(str(path), ["skipped"])  # and does not wait for a writer
    assert cache.is_whole(str(whole_cache(path)), ["skipped"])


def test_a_mapped_cache_that_became_shorter_is_known(tmp_path):
    import numpy as np

    path = tmp_path / "a.samples"
    records = np.zeros(3, cache.RECORD)
    cache.write_cache(str(path), [(np.arange(5, dtype="<i4"), np.zeros((3, 2), "<i4"), records)], {})
    mapped = cache.open_cache(str(path)).records
    assert not cache.is_cut(mapped)
    os.truncate(path, cache.HEADER)
    assert cache.is_cut(mapped)


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    code = f"""
import os, signal
from tuning.samples import cache
with cache.whole_file({str(tmp_path / "b.samples")!r}, "xb") as file:
    file.write(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60)
    (dead,) = os.listdir(tmp_path)
    with contextlib.ExitStack() as alive:
        alive.enter_context(cache.whole_file(str(tmp_path / "c.samples"), "xb"))
        whole_cache(tmp_path / "a.samples")
        left = sorted(os.listdir(tmp_path))
        assert dead not in left and left[0] == "a.samples" and left[1].startswith("c.samples.") and len(left) == 2
