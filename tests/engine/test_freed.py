"""Gradients larger than a bucket: freed once they are reduced, and nothing computed differs."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
from freed import CASES, compare
from runs import Forked

from tuning.engine import patches


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """facts[ranks][case]: what came out with DeepSpeed's own way, and with this project's."""
    folder = tmp_path_factory.mktemp("freed")
    files = {ranks: folder / f"{ranks}.json" for ranks in (1, 2)}
    for ranks, file in files.items():
        run = Forked(ranks, folder / f"log-{ranks}", lambda rank, file=file: compare(file))
        assert set(run.wait().values()) == {0}, run.log.read_text()[-3000:]
    return {ranks: json.loads(file.read_text()) for ranks, file in files.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_weights_are_the_same_bit_by_bit(ranks, case, facts):
    before, after = facts[ranks][case]
    assert before == after
    assert before[0] != before[3]  # it trained


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_memory_is_not_given_back_while_another_stream_reads_it(overlap, compact, monkeypatch):
    """With stand-ins: streams are for GPUs."""
    seen = []
    gradient = SimpleNamespace(record_stream=lambda stream: seen.append(f"recorded on {stream}"))
    parameter = SimpleNamespace(grad=gradient)
    optimizer = SimpleNamespace(
        overlap_comm=overlap,
        cpu_offload=False,
        reduction_stream="the other stream",
        extra_large_param_to_reduce={"bf16": parameter},
        get_param_comm_dtype=lambda _: "bf16",
        get_gradient_for_reduction=lambda p: p.grad,
        reduce_ipg_grads=lambda comm_dtype: seen.append(f"reduced {comm_dtype}"),
        _use_compact_grad_partition_buffer=lambda group: compact,
        clear_grad_attribute=lambda p: seen.append("freed"),
    )
    accelerator = mock.Mock(**{"resolves_data_dependency.return_value": False})
    monkeypatch.setattr(patches, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(patches, "_put_in_bucket", lambda *_: None)
    patches._reduce_gradient(optimizer, parameter, 0)
    assert seen == ["recorded on the other stream"] * overlap + ["reduced bf16"] + ["freed"] * compact

    seen.clear()
    optimizer.extra_large_param_to_reduce = {}  # it fitted into the bucket
    patches._reduce_gradient(optimizer, parameter, 0)
    assert seen == []
