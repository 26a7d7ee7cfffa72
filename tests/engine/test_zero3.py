"""Loading under ZeRO-3, on three ranks, so that weights do not divide evenly: the same model, the same random numbers
and the same errors as without it.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import ROOT, STAGES, Forked
from safetensors.torch import load_file

import train
import utils
from glm_models import MODE, CheckpointError
from tuning.engine import ds_config, loading, patches, saving
from tuning.engine.ds_config import load_ds_config
from tuning.run import launch

RANKS = 3
PREFIX = {"pre_seq_len": 3, "prefix_projection": True}


# What runs on the ranks


def load_all(cases: dict[str, list], results: Path) -> None:
    """Write {name of a case: what differs, by rank}.

    Args:
        cases: {name: [mode, folder, changes of config.json]}.
    """
    utils.silence_libraries(verbose=False)
    patches.apply()
    _, world_size = launch.start_distributed(verbose=False)
    found = {}
    for name, (mode, folder, changes) in cases.items():
        args = train.parse_args(f"--mode {mode} --model_name_or_path {folder} --train_path {__file__}".split())
        values = ds_config.ds_values(args, world_size, 10, 64)
        plain, zero3 = (
            outcome(lambda: loading.load_base(mode, folder, torch.float32, config, **changes))  # noqa: B023
            for config in (load_ds_config(str(ROOT / STAGES[stage]), values) for stage in (2, 3))
        )
        mine = differences(saving.gathered, plain, zero3)
        everyone = [None] * world_size
        torch.distributed.all_gather_object(everyone, mine)
        found[name] = everyone
    if utils.is_rank_0():
        results.write_text(json.dumps(found))


def outcome(load):
    """What loading gives: the model, or the error's text; and the random number that comes next."""
    torch.manual_seed(5)
    try:
        return load(), torch.rand(1).item()
    except CheckpointError as error:
        return str(error), None


def differences(gathered, plain, zero3) -> list[str]:
    """What is not equal, or the error that both loadings end with."""
    (plain, number), (zero3, other_number) = plain, zero3
    if isinstance(plain, str) or isinstance(zero3, str):
        return [plain] if plain == zero3 else [f"without ZeRO-3: {plain}", f"with it: {zero3}"]
    wrong = [] if number == other_number else ["the next random number"]
    for what in ("config", "generation_config"):
        one, other = (getattr(model, what).to_dict() for model in (plain, zero3))
        wrong += [f"{what} {key}" for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    wrong += ["training mode"] * (zero3.training or plain.training)
    wrong += ["a whole weight"] * any(p.numel() for p in zero3.parameters())
    wrong += ["ties"] * (len(list(plain.parameters())) != len(list(zero3.parameters())))
    expected = dict(plain.named_parameters(remove_duplicate=False))
    for name, tensor in gathered(zero3.named_parameters(remove_duplicate=False)):
        if not (tensor.equal(expected.pop(name)) and tensor.dtype == torch.float32):
            wrong.append(name)
    return wrong + list(expected)


# Cases


def other_weights(base: str, folder: Path, change=lambda weights: weights, shard_bytes: int = 2**30) -> str:
    """A copy of a checkpoint whose weights are what `change` makes of them."""
    from glm_models.checkpoint import write_weights

    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = change(load_file(os.path.join(base, "model.safetensors")))
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    write_weights(str(folder), weights.items(), size, max_shard_bytes=shard_bytes)
    return str(folder)


def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


def with_(name, make):
    return lambda weights: weights | {name: make(weights)}


def good_cases(tiny, folder) -> dict[str, list]:
    cases = {}
    for mode, base in tiny.items():
        half = other_weights(base, folder / f"{mode}-half", lambda weights: {n: t.half() for n, t in weights.items()})
        prefixed = folder / f"{mode}-prefix"
        MODE[mode].model.from_pretrained(
            base, config=MODE[mode].config.from_pretrained(base, **PREFIX)
        ).save_pretrained(prefixed)
        shutil.copy(next(Path(base).glob("*.model")), prefixed)
        old = shutil.copytree(base, folder / f"{mode}-bin", ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(load_file(f"{base}/model.safetensors"), old / "pytorch_model.bin")
        (old / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 3}')
        cases |= {
            f"{mode}-shards": [mode, other_weights(base, folder / f"{mode}-shards", shard_bytes=100_000), {}],
            f"{mode}-half": [mode, half, {}],
            f"{mode}-bin": [mode, str(old), {}],
            f"{mode}-new_prefix": [mode, base, {"pre_seq_len": 5}],
            f"{mode}-new_projected_prefix": [mode, base, PREFIX],
            f"{mode}-trained_prefix": [mode, str(prefixed), {}],
        }
    head, rows = "lm_head.weight", "transformer.word_embeddings.weight"
    changes = {
        "tied_once": without(head),
        "tied_the_other_way": lambda weights: without(rows)(weights) | {head: weights[rows]},
        "not_tied": with_(head, lambda weights: weights[rows] + 1),
        "tied_twice": with_(head, lambda weights: weights[rows].clone()),
    }
    for name, change in changes.items():
        cases[f"glm-{name}"] = ["glm", other_weights(tiny["glm"], folder / f"glm-{name}", change), {}]
    return cases


def bad_cases(tiny, folder) -> dict[str, list]:
    """With them, by name, what the message must say."""
    cases = {}
    for mode, base in tiny.items():
        weights = load_file(f"{base}/model.safetensors")
        name = next(n for n in weights if ".1." in n and n.endswith("mlp.dense_4h_to_h.weight"))
        changes = {
            "missing": without(name),
            "unknown": with_(name.replace(".1.", ".9."), lambda weights: torch.zeros(3)),
            "misshapen": with_(name, lambda weights, name=name: weights[name][:-1].clone()),
        }
        for kind, change in changes.items():
            cases[f"{mode}-{kind}"] = [mode, other_weights(base, folder / f"{mode}-{kind}", change), {}]
        trained = with_("transformer.prefix_encoder.embedding.weight", lambda weights: torch.zeros(3, 128))
        cases[f"{mode}-lost_prefix"] = [mode, other_weights(base, folder / f"{mode}-lost", trained), {}]
        asked = {"pre_seq_len": 3, "prefix_projection": False}
        for name, change in {"no_prefix": lambda weights: weights, "short_prefix": trained}.items():
            changed = Path(other_weights(base, folder / f"{mode}-{name}", change))
            content = json.loads((changed / "config.json").read_text())
            (changed / "config.json").write_text(json.dumps(content | asked))
            cases[f"{mode}-{name}"] = [mode, str(changed), {"pre_seq_len": 5} if name == "short_prefix" else {}]
        broken = shutil.copytree(base, folder / f"{mode}-broken")
        os.truncate(broken / "model.safetensors", 5000)
        cases[f"{mode}-broken"] = [mode, str(broken), {}]
    return cases


SAYS = {
    "missing": "1 missing (first: ",
    "unknown": "1 unknown (first: ",
    "misshapen": "1 of another shape (first: ",
    "lost_prefix": "1 unknown (first: transformer.prefix_encoder.embedding.weight)",
    "no_prefix": "there is none among the weights",
    "short_prefix": "has pre_seq_len 3",
    "broken": "model.safetensors is broken",
}


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    cases, results = good_cases(tiny, folder) | bad_cases(tiny, folder), folder / "results.json"
    run = Forked(RANKS, folder / "log", lambda rank: load_all(cases, results))
    assert set(run.wait().values()) == {0}, run.log.read_text()[-3000:]
    return json.loads(results.read_text())


GOOD = ["shards", "half", "bin", "new_prefix", "new_projected_prefix", "trained_prefix"]
TIES = ["tied_once", "tied_the_other_way", "not_tied", "tied_twice"]


@pytest.mark.parametrize("case", [*(f"{mode}-{kind}" for mode in MODE for kind in GOOD), *(f"glm-{t}" for t in TIES)])
def test_the_same_model_as_without(found, case):
    # transformers draws numbers for embeddings that a file lacks, and then ties them away
    expected = ["the next random number"] if case == "glm-tied_the_other_way" else []
    assert found[case] == [expected] * RANKS


@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize("mode", MODE)
def test_the_same_errors_as_without(found, mode, kind):
    for errors in found[f"{mode}-{kind}"]:
        assert len(errors) == 1, errors
        assert SAYS[kind] in errors[0]
