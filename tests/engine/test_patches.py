"""Every patch still replaces what its library calls; see test_freed.py for what the patches compute."""

import importlib.metadata
import inspect

import pytest
import torch
import torch.utils.file_baton
from deepspeed.runtime.zero import utils as zero_utils

from tuning.engine import patches

NAMES = [patch.name for patch in patches.PATCHES]


@pytest.fixture
def unpatched(monkeypatch):
    """Undo afterwards what a test applies."""
    for patch in patches.PATCHES:
        monkeypatch.setattr(patch.owner, patch.name, inspect.getattr_static(patch.owner, patch.name))


@pytest.mark.parametrize("patch", patches.PATCHES, ids=NAMES)
def test_the_library_calls_what_is_replaced(patch):
    assert patch.name in patch.used_by.__code__.co_names
    assert all(name in dir(patch.owner) for name in patch.needs)
    package, version = patch.version
    assert importlib.metadata.version(package).startswith(f"{version}."), "read it again, then change the table"


@pytest.mark.parametrize("patch", patches.PATCHES, ids=NAMES)
def test_all_are_put_in_place_and_twice_is_once(patch, unpatched):
    patches.apply()
    patches.apply()
    assert inspect.getattr_static(patch.owner, patch.name) is patch.new


@pytest.mark.parametrize("patch", patches.PATCHES, ids=NAMES)
def test_a_name_that_is_gone_is_loud(patch, unpatched, monkeypatch):
    class Empty:
        pass

    monkeypatch.setattr(patches, "PATCHES", (patch._replace(owner=Empty()),))
    with pytest.raises(RuntimeError, match=f"has no {patch.name}.*{patch.version[0]} {patch.version[1]}"):
        patches.apply()


def test_patches_take_the_arguments_that_they_are_given():
    optimizer = patches.DeepSpeedZeroOptimizer
    assert list(inspect.signature(patches._put_in_bucket).parameters) == ["self", "param", "i"]
    assert len(inspect.signature(patches._reduce_gradient).parameters) == 3
    assert list(inspect.signature(optimizer._add_to_grad_partition_buffer).parameters) == ["output", "source"]
    methods = {name for name in vars(torch.utils.file_baton.FileBaton) if not name.startswith("_")}
    assert methods == {"try_acquire", "wait", "release"} <= set(dir(patches.CompileLock))


def test_gradients_are_added_across_types_and_norms_are_float32(unpatched):
    patches.apply()
    assert zero_utils.get_norm_dtype() is torch.float
    output, source = torch.ones(3), torch.full((3,), 0.5, dtype=torch.bfloat16)
    patches.DeepSpeedZeroOptimizer._add_to_grad_partition_buffer(output, source)
    assert output.tolist() == [1.5] * 3
    patches.DeepSpeedZeroOptimizer._add_to_grad_partition_buffer(None, source)


def test_a_start_compiles_nothing_for_shared_memory(unpatched):
    patches.apply()
    assert patches.comm_backend.TorchBackend.__init__.__globals__["build_shm_op"]() is None


def test_a_lock_that_nobody_holds_stops_nobody(tmp_path):
    path = tmp_path / "lock"
    path.touch()  # what a killed process left
    lock, other = patches.CompileLock(str(path)), patches.CompileLock(str(path))
    assert lock.try_acquire() and not other.try_acquire()
    lock.release()
    assert not path.exists()
    other.wait()
    assert other.try_acquire()
    other.release()
