"""merge_lora.py: right results from every layout of a base, one clear refusal for everything that cannot be right,
wrong results found before they get their name, and memory that does not grow with the model.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import enliven, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import merge_lora
from glm_models import MODE, CheckpointError
from glm_models.checkpoint import read_weights, weight_layout, write_json
from glm_models.identify import describe_base
from glm_models.streamed import QUESTIONS
from tuning.engine.loading import load_result
from tuning.errors import FolderError, UserError
from tuning.folders import new_folder
from tuning.lora.adapter import BASE_FILE, check_base, read_adapter, record_base

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/benchmark"))
REFUSALS = (UserError, CheckpointError, FolderError)
TARGETS = ["query_key_value", "dense_h_to_4h"]


def make_base(tiny, mode: str, folder: Path, dtype=torch.float32, shard=200_000, as_bin=False) -> str:
    """The tiny checkpoint in another type and layout."""
    shutil.copytree(tiny[mode], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_model(MODE[mode].model.from_pretrained(tiny[mode]).to(dtype), str(folder), max_shard_bytes=shard)
    index = folder / "model.safetensors.index.json"
    if as_bin:
        for path in folder.glob("*.safetensors"):
            torch.save(load_file(path), path.with_suffix(".bin") if index.exists() else folder / "pytorch_model.bin")
            path.unlink()
        if index.exists():
            text = index.read_text().replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    return str(folder)


def make_adapter(mode: str, base: str, folder: Path, targets=TARGETS, std=0.05, record=True, **config) -> str:
    """A random adapter as train.py saves it."""
    model = MODE[mode].model.from_pretrained(base)
    model.name_or_path = base
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    if record:
        write_json(str(folder / BASE_FILE), record_base(mode, base, torch.float32))
    return str(folder)


@pytest.fixture(scope="module")
def glm3(tiny, tmp_path_factory):
    """A float16 ChatGLM3 in shards, and an adapter; copied by tests that change them."""
    folder = tmp_path_factory.mktemp("merge")
    base = make_base(tiny, "glm3", folder / "base", torch.float16)
    return Path(base), Path(make_adapter("glm3", base, folder / "adapter"))


@pytest.fixture
def copies(glm3, tmp_path):
    """Base and adapter to spoil."""
    return tuple(Path(shutil.copytree(path, tmp_path / path.name)) for path in glm3)


LAYOUTS = {
    "one file": {"shard": 2**30},
    "shards in half precision": {"dtype": torch.float16},
    "one .bin": {"shard": 2**30, "as_bin": True},
    ".bin shards in bf16": {"dtype": torch.bfloat16, "as_bin": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODE)
def test_the_merged_model_is_the_unmerged_one_in_the_layout_of_the_base(tiny, tmp_path, capsys, mode, layout):
    base = make_base(tiny, mode, tmp_path / "base", **LAYOUTS[layout])
    head = "lm_head" if mode == "glm" else "output_layer"
    adapter = make_adapter(mode, base, tmp_path / "adapter", [*TARGETS, head], use_rslora=layout == "one .bin")
    merge_lora.merge(mode, base, adapter, str(tmp_path / "merged"))
    said = capsys.readouterr().out
    assert "has the fingerprint" in said
    assert said.count("verified: ") == 2

    files = weight_layout(str(tmp_path / "merged"))
    assert [dict(names) for names in files.values()] == [dict(names) for names in weight_layout(base).values()]
    assert all(path.endswith(".safetensors") for path in files)
    assert not (tmp_path / "merged.partial").exists()

    family = MODE[mode]
    untied = family.config.from_pretrained(base, tie_word_embeddings=False)  # else peft changes the embedding too
    unmerged = family.model.from_pretrained(base, dtype=torch.float32, config=untied)
    expected = PeftModel.from_pretrained(unmerged, adapter).merge_and_unload().state_dict()  # float32, by peft
    found = family.model.from_pretrained(tmp_path / "merged").state_dict()
    was = dict(read_weights(base))
    eps = torch.finfo(LAYOUTS[layout].get("dtype", torch.float32)).eps
    changed = 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=eps / 2 + 2e-6, atol=1e-6)
        changed += not torch.equal(tensor, was[name])
    assert changed == 4 * len(TARGETS) + 1


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not KeyError}))


def change_adapter(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def config(**changes):
    return lambda base, adapter: change_json(adapter / "adapter_config.json", **changes)


def weights(change):
    return lambda base, adapter: change_adapter(adapter, change)


def index(change):
    def spoil(base, adapter):
        path = base / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return spoil


def first(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def truncate(which, end: int):
    """Cut a file of the base or the adapter, `end` bytes before its end."""

    def spoil(base, adapter):
        path = first(base) if which == "base" else adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-end])

    return spoil


def retrain(base, adapter):
    """Another base of the same shapes."""
    model = MODE["glm3"].model.from_pretrained(base)
    enliven(model, seed=8)
    for path in base.glob("model*"):
        path.unlink()
    write_model(model, str(base))


def as_bin(content):
    def spoil(base, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(content, adapter / "adapter_model.bin")

    return spoil


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def rename(tensors: dict, old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


A = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
B = A.replace("lora_A", "lora_B")

REFUSED = {
    "another base": (retrain, "another base than .*: names, types or values of the weights differ"),
    "another config": (
        lambda base, adapter: change_json(base / "config.json", rope_ratio=50),
        "another base than .*: config.json has rope_ratio 50, not 1.0",
    ),
    "another family": (
        lambda base, adapter: change_json(adapter / BASE_FILE, mode="glm2"),
        "--mode glm2.*, not on a model of --mode glm3",
    ),
    "broken record": (
        lambda base, adapter: (adapter / BASE_FILE).write_text('{"mode": "glm3"}'),
        "base.json is not a record of a base model",
    ),
    "zeros in B": (
        weights(lambda t: [x.zero_() for n, x in t.items() if "lora_B" in n]),
        "every lora_B is zero; the adapter was never trained, or saved empty",
    ),
    "zeros in A": (weights(lambda t: [x.zero_() for n, x in t.items() if "lora_A" in n]), "every lora_A is zero"),
    "NaN": (weights(lambda t: t[A].fill_(float("nan"))), f"{A} holds NaN or infinity"),
    "infinity": (weights(lambda t: t[B].fill_(float("inf"))), f"{B} holds NaN or infinity"),
    "unknown module": (
        weights(lambda t: rename(t, "layers.3.", "layers.9.")),
        "layers.9.*, but .* has no such linear layer: another base",
    ),
    "embedding": (
        weights(lambda t: rename(t, "layers.0.self_attention.query_key_value", "word_embeddings")),
        "word_embeddings.weight, but .* has no such linear layer",
    ),
    "unknown target": (
        config(target_modules=["query_key_value", "q_proj"]),
        "target_modules of its config names q_proj, but",
    ),
    "no targets": (config(target_modules=[]), "target_modules must be names of modules"),
    "targets of numbers": (config(target_modules={"a": 1}), "target_modules must be names of modules"),
    "another shape": (
        weights(lambda t: t.__setitem__(A, torch.ones(4, 32))),
        r"adds \[.*, 32\] to .*, which is \[.*, 64\]",
    ),
    "lone A": (weights(lambda t: t.pop(B)), "lora_A.weight has no lora_B beside it"),
    "lone B": (weights(lambda t: t.pop(A)), "lora_B.weight has no lora_A beside it"),
    "other tensor": (weights(lambda t: t.update(x=torch.ones(2))), "x is not a LoRA weight"),
    "whole numbers": (weights(lambda t: t.__setitem__(A, torch.ones(4, 64, dtype=torch.int32))), "int32"),
    "overflow": (weights(lambda t: t[A].fill_(1e30)), "NaN or too large for torch.float16"),
    "r of 0": (config(r=0), "r must be a whole number of at least 1, not 0"),
    "r as text": (config(r="8"), "r must be a whole number of at least 1, not '8'"),
    "r below 0": (config(r=-4), "r must be a whole number of at least 1, not -4"),
    "another r": (config(r=8), "not of rank 8 as"),
    "no alpha": (config(lora_alpha=KeyError), "lora_alpha must be a number above 0, not None"),
    "alpha as text": (config(lora_alpha="16"), "lora_alpha must be a number above 0, not '16'"),
    "infinite alpha": (config(lora_alpha=float("inf")), "lora_alpha must be a number above 0, not inf"),
    "strange rslora": (config(use_rslora="no"), "use_rslora must be true or false"),
    "DoRA without lengths": (config(use_dora=True), ".weight has no lora_magnitude_vector of"),
    "trained biases": (config(lora_bias=True), "lora_bias is True; only plain LoRA and DoRA can be merged"),
    "a module without weights": (config(modules_to_save=["output_layer"]), "has no weights of output_layer, which"),
    "modules by a pattern": (config(modules_to_save="norm"), "modules_to_save must be names of modules, not 'norm'"),
    "PiSSA": (config(init_lora_weights="pissa"), "'pissa', which changes the base's weights as well"),
    "not LoRA": (config(peft_type="IA3"), "peft_type is 'IA3', not LORA"),
    "no config": (lambda base, adapter: (adapter / "adapter_config.json").unlink(), "no adapter_config.json"),
    "broken config": (lambda base, adapter: (adapter / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "no weights": (lambda base, adapter: (adapter / "adapter_model.safetensors").unlink(), "no adapter_model"),
    "truncated adapter": (truncate("adapter", 8), "adapter_model.safetensors is broken"),
    "pickle": (as_bin({A: Evil()}), "is broken, or holds more than tensors; not loaded"),
    "pickled list": (as_bin([torch.ones(2)]), "does not hold tensors by name"),
    "pickled number": (as_bin({A: 3}), "is a int, not a dense tensor"),
    "expanded": (as_bin({A: torch.ones(1).expand(4, 64)}), "is larger than its storage"),
    "sparse": (as_bin({A: torch.ones(4, 64).to_sparse()}), "not a dense tensor|holds more than tensors"),
    "truncated shard": (truncate("base", 8), "model-00001.* is broken"),
    "much truncated shard": (truncate("base", 50_000), "model-00001.* is broken"),
    "missing shard": (lambda base, adapter: first(base).unlink(), "names model-00001.*, which is missing"),
    "index: out of the folder": (
        index(lambda m: m.update(dict.fromkeys(m, "../base/" + next(iter(m.values()))))),
        "which is not a .safetensors file of this folder",
    ),
    "index: a number": (index(lambda m: m.update(x=3)), "x should be in 3"),
    "index: not there": (index(lambda m: m.update(x=next(iter(m.values())))), "does not hold x, although the index"),
    "index: empty": (index(lambda m: m.clear()), '"weight_map" must name'),
    "base without a weight": (
        lambda base, adapter: change_shard(base, lambda t: t.pop(sorted(t)[0])),
        "does not hold|is nothing, its config.json expects",
    ),
}


def change_shard(base: Path, change) -> None:
    tensors = load_file(first(base))
    change(tensors)
    save_file(tensors, first(base))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(copies, tmp_path, capfd, kind):
    spoil, message = REFUSED[kind]
    spoil(*copies)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(REFUSALS, match=message) as error:
        merge_lora.merge("glm3", *map(str, copies), str(tmp_path / "merged"))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert "must not run" not in capfd.readouterr().out


def test_outputs_that_are_not_empty_folders_are_refused(glm3, tmp_path):
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for output, message in (
        (full, "is not empty"),
        (glm3[0], "is not empty"),
        (file, "not a folder"),
        (link, "not a fol"),
    ):
        with pytest.raises(UserError, match=message):
            merge_lora.merge("glm3", *map(str, glm3), str(output))
    assert (full / "notes.txt").read_text() == file.read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    merge_lora.merge("glm3", *map(str, glm3), str(empty), verify=False)
    assert (empty / "config.json").exists()


def test_a_disk_without_room_is_refused(glm3, tmp_path, monkeypatch):
    monkeypatch.setattr("tuning.folders.free_space", lambda folder: 1000)
    with pytest.raises(FolderError, match="no room for the merged model"):
        merge_lora.merge("glm3", *map(str, glm3), str(tmp_path / "merged"))


def test_an_adapter_that_is_not_as_train_saved_it_is_refused(copies, tmp_path):
    with new_folder(str(tmp_path / "saved")) as partial:
        shutil.copytree(copies[1], partial, dirs_exist_ok=True)
    path = tmp_path / "saved/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # one bit of one number
    path.write_bytes(content)
    with pytest.raises(FolderError, match="is not as it was written"):
        merge_lora.merge("glm3", str(copies[0]), str(tmp_path / "saved"), str(tmp_path / "merged"))


def test_the_command_ends_with_one_line(copies, tmp_path):
    retrain(*copies)
    command = f"merge_lora.py --mode glm3 --ori_model_dir {copies[0]} --model_dir {copies[1]}".split()
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    # what DeepSpeed and torch say where there is no GPU is not ours
    lines = [line for line in run.stderr.splitlines() if "WARNING" not in line and "cpp_extension" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "another base" in lines[0]


@pytest.mark.parametrize("which", ["adapter", "adapter config", "base", "base index"])
def test_random_damage_never_ends_in_a_traceback(glm3, tmp_path, which):
    """Bits flipped and ends cut off: a refusal, or a merge of what is there then."""
    chance = random.Random(which)
    outcomes = set()
    for i in range(150):
        base, adapter = (shutil.copytree(path, tmp_path / f"{i}-{path.name}") for path in glm3)
        (adapter / BASE_FILE).unlink()  # it would find most of it
        path = {
            "adapter": adapter / "adapter_model.safetensors",
            "adapter config": adapter / "adapter_config.json",
            "base": first(base),
            "base index": base / "model.safetensors.index.json",
        }[which]
        content = bytearray(path.read_bytes())
        if i % 4 == 0:
            del content[chance.randrange(len(content)) :]
        else:  # mostly in the header, where there is one
            for _ in range(chance.choice((1, 3, 30))):
                content[chance.randrange(min(len(content), chance.choice((8, 1500, len(content)))))] ^= (
                    1 << chance.randrange(8)
                )
        path.write_bytes(content)
        try:
            merge_lora.merge("glm3", str(base), str(adapter), str(tmp_path / f"{i}-merged"), verify=False)
            outcomes.add("merged")
        except REFUSALS as error:
            assert "\n" not in str(error)
            assert not list(tmp_path.glob("*merged*"))
            outcomes.add("refused")
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
    assert "refused" in outcomes


# The fingerprint


def test_the_fingerprint_knows_a_model_in_any_layout(tiny, tmp_path):
    for mode in MODE:
        whole = describe_base(mode, make_base(tiny, mode, tmp_path / f"{mode}-one", shard=2**30))
        for name, layout in (("shards", {}), ("bin", {"as_bin": True}), ("bin-one", {"as_bin": True, "shard": 2**30})):
            assert describe_base(mode, make_base(tiny, mode, tmp_path / f"{mode}-{name}", **layout)) == whole
        half = describe_base(mode, make_base(tiny, mode, tmp_path / f"{mode}-half", torch.float16))
        assert half["fingerprint"] != whole["fingerprint"]
        assert half["config"] == whole["config"]


def test_every_weight_counts_in_the_fingerprint(tiny, tmp_path):
    base = tmp_path / "base"
    make_base(tiny, "glm2", base, shard=2**30)
    path = base / "model.safetensors"
    tensors = load_file(path)
    seen = {describe_base("glm2", str(base))["fingerprint"]}
    for name in tensors:
        save_file(tensors | {name: tensors[name] * 1.001}, path, metadata={"format": "pt"})
        seen.add(describe_base("glm2", str(base))["fingerprint"])
    computed = sum(name.endswith("inv_freq") for name in tensors)
    assert computed == 1
    assert len(seen) == 1 + len(tensors) - computed


def test_an_adapter_without_a_record_is_taken_with_a_note(glm3, copies, tmp_path, capsys):
    (copies[1] / BASE_FILE).unlink()
    assert "only names and shapes" in check_base(str(copies[1]), "glm3", str(glm3[0]))
    merge_lora.merge("glm3", str(glm3[0]), str(copies[1]), str(tmp_path / "merged"))
    assert "has no base.json" in capsys.readouterr().out


# Verification


def test_no_verify_says_so(glm3, tmp_path, capsys):
    command = f"--mode glm3 --ori_model_dir {glm3[0]} --model_dir {glm3[1]} --output_dir {tmp_path / 'merged'}"
    merge_lora.main([*command.split(), "--no_verify"])
    said = capsys.readouterr().out
    assert "not verified (--no_verify)" in said
    assert "verified: " not in said


def wrong(kind):
    """`merge_lora.merged`, but not quite."""
    right = merge_lora.merged

    def merged(name, weight, adapter, dtype):
        if kind == "scale":
            yield from right(name, weight, adapter._replace(scale=adapter.scale * 1.1), dtype)
        elif kind == "forgotten":
            yield weight
        else:
            for part in right(name, weight, adapter, dtype):
                if name.endswith("layers.1.mlp.dense_4h_to_h.weight"):  # no adapter's
                    part = part.clone()
                    part[3, 5] += 0.01
                yield part

    return merged


@pytest.mark.parametrize("kind", ["scale", "forgotten", "one number"])
def test_a_wrong_result_never_gets_its_name(glm3, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(merge_lora, "merged", wrong(kind))
    with pytest.raises(CheckpointError, match=r"is not the base's|is not base \+ adapter"):
        merge_lora.merge("glm3", *map(str, glm3), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["scale", "forgotten"])
def test_logits_alone_tell_a_wrong_result(glm3, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(merge_lora, "merged", wrong(kind))
    monkeypatch.setattr(merge_lora, "compare_weights", lambda files, adapter, weights: 1.0)
    with pytest.raises(CheckpointError, match="the merged model is not the unmerged one, nothing was kept; logits"):
        merge_lora.merge("glm3", *map(str, glm3), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_lost_in_rounding_is_told(glm3, tmp_path, capsys):
    adapter = make_adapter("glm3", str(glm3[0]), tmp_path / "adapter", std=1e-5)
    merge_lora.merge("glm3", str(glm3[0]), adapter, str(tmp_path / "merged"))
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODE)
def test_probe_logits_are_those_of_the_model(tiny, tokenizers, tmp_path, mode):
    from tuning.lora import verify

    base = make_base(tiny, mode, tmp_path / "base")
    head = "lm_head" if mode == "glm" else "output_layer"
    adapter = make_adapter(mode, base, tmp_path / "adapter", [*TARGETS, head])
    model = MODE[mode].model.from_pretrained(base).eval()
    batch = tokenizers[mode].pad(
        {"input_ids": [tokenizers[mode].encode_prompt(text) for text in QUESTIONS]}, return_tensors="pt"
    )
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(verify.logits(mode, base, batch), model(**batch).logits[real])
        want = PeftModel.from_pretrained(model, adapter).eval()(**batch).logits[real]
    torch.testing.assert_close(verify.logits(mode, base, batch, read_adapter(adapter)), want)


# predict.py


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another base", "another base than"),
        ("zeros in B", "every lora_B is zero"),
        ("NaN", "holds NaN"),
        ("truncated adapter", "is broken"),
        ("truncated shard", "is broken"),
        ("pickle", "not loaded"),
        ("unknown target", "is not an adapter for"),
        ("another shape", "is not an adapter for"),
        ("index: out of the folder", "which is not a .safetensors file of this folder"),
    ],
)
def test_predict_refuses_adapters_that_do_not_belong_to_the_base(copies, kind, message):
    REFUSED[kind][0](*copies)
    if kind == "unknown target":  # peft minds only if it knows none of them
        change_json(copies[1] / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(REFUSALS, match=message):
        load_result("glm3", str(copies[1]), str(copies[0]), torch.device("cpu"))


def test_predict_says_what_the_base_is(glm3, capsys):
    load_result("glm3", str(glm3[1]), None, torch.device("cpu"))
    said = capsys.readouterr().out
    assert f"its base model is {glm3[0]}" in said
    assert "has the fingerprint" in said


def test_predict_with_an_adapter_on_a_tied_output_layer_is_the_merged_model(tiny, tmp_path):
    base = make_base(tiny, "glm", tmp_path / "base")
    adapter = make_adapter("glm", base, tmp_path / "adapter", ["lm_head"])
    merge_lora.merge("glm", base, adapter, str(tmp_path / "merged"))
    ids = torch.arange(20, 40)[None]
    outputs = []
    for folder in (adapter, str(tmp_path / "merged")):
        _, model = load_result("glm", folder, None, torch.device("cpu"))
        with torch.no_grad():
            outputs.append(model(ids).logits)
    torch.testing.assert_close(*outputs)


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A short form of tests/benchmark/merge_memory.py: a float16 model of 0.6 GB in shards of 0.14 GB."""
    import merge_memory

    merge_memory.make("glm3", tmp_path, 10, 1024, int(0.14e9), False)
    shards = [path.stat().st_size for path in map(Path, weight_layout(str(tmp_path / "base")))]
    adapter = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert sum(shards) > 3 * max(shards)
    command = f"merge_lora.py --mode glm3 --ori_model_dir {tmp_path}/base --model_dir {tmp_path}/adapter --no_verify"
    most = merge_memory.measure([*command.split(), "--output_dir", str(tmp_path / "merged")])
    imports = merge_memory.measure(["-c", "import merge_lora"])
    # 0.4 GB without, 0.9 with CUDA's libraries
    assert most["rss"] < imports["rss"] + 1.3 * max(shards) + adapter + 0.1e9
    assert most["private"] < imports["private"] + 0.5 * max(shards) + 0.1e9
