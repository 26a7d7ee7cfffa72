"""Two network namespaces as two machines, one process on each: the short form of tests/multi_node.py."""

import pytest
from machines import Machines, why_not
from multi_node import (
    BOUND,
    WANTED,
    difference,
    end_one,
    flags,
    refusal,
    run_and_resume,
    values,
    weights,
)
from runs import Launched, make_base, make_rows

from tuning.run import nodes

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=f"two machines cannot be made here: {reason}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("machines")
    make_base("glm3", path / "base")
    make_rows(path / "rows.json", 16)
    return path


@pytest.fixture(scope="module")
def machines(folder):
    with Machines(folder / "machines") as two:
        yield two


@pytest.mark.parametrize("stage", [2, 3])
def test_without_a_shared_disk_a_killed_training_goes_on_with_the_losses_of_one_machine(stage, machines, folder):
    alone = Launched(flags(folder, stage, folder / f"alone-{stage}"), 2, folder / f"losses-{stage}", folder / "log")
    assert alone.wait() == {0: 0, 1: 0}, (folder / "log").read_text()[-3000:]
    name = f"own-{stage}"
    argv = flags(folder, stage, machines.local / name)
    found = run_and_resume(machines, folder, name, argv, machines.local / name, per_node=1)
    assert "is not on a shared disk" in (folder / f"{name}-log").read_text()
    assert difference(values(folder / f"losses-{stage}"), found) <= BOUND
    assert difference(weights(folder / f"alone-{stage}"), weights(machines.disks[0] / name)) <= BOUND
    assert not [path for path in machines.disks[1].glob(f"{name}/**/*") if path.is_file()]


def test_a_shared_folder_is_used_as_one(machines, folder):
    run = machines.train(flags(folder, 2, folder / "shared"), folder / "shared-losses", folder / "log-2", per_node=1)
    assert run.wait() == {0: 0, 1: 0}, run.log.read_text()[-3000:]
    assert f"{folder}/shared is on a disk that all nodes share" in run.log.read_text()


@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_a_machine_that_dies_ends_the_other(how, machines, folder, monkeypatch):
    for name, seconds in (("IDLE", 2), ("INTERVAL", 1), ("PROBES", 2)):  # 4 seconds in place of 30
        monkeypatch.setattr(nodes, name, seconds)
    _, lines = end_one(machines, folder, how, per_node=1)
    said = "has ended or was killed" if how == "killed" else "has not answered for 4 seconds"
    first = [line for line in lines if "rank 1 on node node-b" in line]
    assert len(first) == 1 and said in first[0], lines
    assert len(lines) == (1 if how == "killed" else 2), lines  # the other machine says it too


@pytest.mark.parametrize("what", WANTED)
def test_a_machine_with_something_else_is_refused_by_name(what, machines, folder):
    text = refusal(machines, folder, what, per_node=1)
    assert all(word in text for word in WANTED[what]), text
