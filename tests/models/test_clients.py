"""glm_models.convert --check: what each program finds in a folder, and what it says if something is taken away."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_model
from test_convert import ALL_FOUR, convert, make_adapter
from transformers import GlmConfig

from glm_models import MODE
from glm_models.checkpoint import CheckpointError, read_json, write_json
from glm_models.convert.__main__ import main
from glm_models.convert.clients import CLIENTS, CODE, NATIVE_KEYS, PEFT_KEYS, check


def lines_of(folder, mode=None) -> dict[str, str]:
    """What `check` says of each program, by the first word of its name."""
    _, *lines = check(str(folder), mode)
    found = {
        " ".join(line.split(":")[0].split()[: 2 if line.startswith("transformers") else 1]): line for line in lines
    }
    assert len(found) == len(lines)
    return found


NEW, OLD = "transformers 5.24.0", "transformers 4.57.6"


@pytest.fixture
def complete(tiny, tmp_path):
    """complete(mode): a folder with all that any program asks for."""

    def make(mode: str) -> Path:
        folder = shutil.copytree(tiny[mode], tmp_path / f"complete-{mode}")
        for name in CODE:
            (folder / name).write_text("# ChatGLM\n")
        if mode != "glm":
            convert(mode, tiny[mode], tmp_path / f"tokenizer-{mode}", "--tokenizer_only")
            for name in ("tokenizer.json", "chat_template.jinja"):
                shutil.copyfile(tmp_path / f"tokenizer-{mode}" / name, folder / name)
        architectures = ["ChatGLMModel", "ChatGLMForConditionalGeneration"]
        write_json(
            str(folder / "config.json"), read_json(str(folder / "config.json")) | {"architectures": architectures}
        )
        return folder

    return make


SERVING = {
    "glm": {"chatglm.cpp", "official"},
    "glm2": {"vLLM", "SGLang", "LMDeploy", "chatglm.cpp", "official"},
    "glm3": {"vLLM", "SGLang", "LMDeploy", "llama.cpp", "chatglm.cpp", "official"},
}


def serving(found: dict[str, str]) -> set[str]:
    return {name for name, line in found.items() if "serves it as it is" in line}


@pytest.mark.parametrize("mode", MODE)
def test_a_complete_folder_serves_everywhere_it_can_and_what_is_taken_away_is_named(complete, mode):
    folder = complete(mode)
    assert serving(lines_of(folder, mode)) == SERVING[mode]
    config = read_json(str(folder / "config.json"))
    for client in CLIENTS:
        name = client.name.split()[0]
        if mode not in client.families:
            continue
        for key in set(client.keys) & config.keys() if mode == "glm3" else ["num_layers"]:
            # without these the folder is no checkpoint, or only a warning here: see the next test
            write_json(str(folder / "config.json"), {k: v for k, v in config.items() if k != key})
            found = lines_of(folder, mode)
            assert key in found.get(name, found.get("no", "")), (name, key)
        write_json(str(folder / "config.json"), config)
        for file in client.files:
            (folder / file).rename(folder / "away")
            assert f"{file}" in lines_of(folder, mode)[name]
            (folder / "away").rename(folder / file)
    assert serving(lines_of(folder, mode)) == SERVING[mode]


def test_names_in_the_config_decide(complete):
    folder = complete("glm3")
    path, config = str(folder / "config.json"), read_json(str(folder / "config.json"))
    write_json(path, config | {"_name_or_path": "/home/me/base"})
    assert serving(lines_of(folder, "glm3")) == SERVING["glm3"] - {"llama.cpp"}
    write_json(path, config | {"architectures": ["ChatGLMForConditionalGeneration"]})
    assert serving(lines_of(folder, "glm3")) == SERVING["glm3"] - {"SGLang"}
    write_json(path, config | {"architectures": ["ChatGLMModel"]})
    assert serving(lines_of(folder, "glm3")) == SERVING["glm3"] - {"LMDeploy"}
    write_json(path, config | {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}})
    assert serving(lines_of(folder, "glm3")) == SERVING["glm3"] - {"LMDeploy", "chatglm.cpp", "official"}


def test_positions_of_chatglm2_32k_are_read_wrongly(complete):
    folder = complete("glm2")
    write_json(str(folder / "config.json"), read_json(str(folder / "config.json")) | {"rope_ratio": 50})
    found = lines_of(folder, "glm2")
    assert serving(found) == {"official"}
    assert "rope_ratio" in found["vLLM"] and "--output_dir NEW makes one that it serves" in found["vLLM"]


def test_a_converted_folder(tiny, tmp_path):
    native = convert("glm3", tiny["glm3"], tmp_path / "native")
    assert serving(lines_of(native)) == {"vLLM", "SGLang", NEW, OLD}
    path = str(native / "config.json")
    config = read_json(path)
    for key in NATIVE_KEYS:
        write_json(path, {name: value for name, value in config.items() if name != key})
        found = lines_of(native)
        assert not serving(found) and all(
            f"config.json: {key}:" in found[name] for name in ("vLLM", "SGLang", NEW, OLD)
        )
    write_json(path, config)
    (native / "tokenizer.json").unlink()
    assert "tokenizer.json" in lines_of(native)[NEW] and not serving(lines_of(native))


def test_the_rotation_has_other_keys_in_transformers_4_and_5(tiny, tmp_path):
    native = convert("glm3", tiny["glm3"], tmp_path / "native")
    path = str(native / "config.json")
    config = read_json(path)
    of_4 = ("rope_theta", "partial_rotary_factor")
    of_5 = {key: value for key, value in config.items() if key not in of_4}  # as transformers 5 saves it
    write_json(path, of_5)
    assert serving(lines_of(native)) == {"vLLM", "SGLang", NEW}
    assert all(f"config.json: {key}" in lines_of(native)[OLD] for key in of_4)
    write_json(path, config | {"rope_parameters": config["rope_parameters"] | {"rope_type": "linear", "factor": 2.0}})
    assert "config.json: rope_scaling" in lines_of(native)[OLD]
    write_json(path, {key: value for key, value in config.items() if key != "rope_parameters"})  # as 4 saves it
    assert serving(lines_of(native)) == {"vLLM", "SGLang", NEW, OLD}
    write_json(path, {key: value for key, value in of_5.items() if key != "rope_parameters"})
    assert "config.json: rope_parameters" in lines_of(native)[NEW] and not serving(lines_of(native))


def test_transformers_reads_the_keys_of_4_where_rope_parameters_are_missing():
    """What the table says of it; the base of the default would be 10000."""
    assert GlmConfig(rope_theta=5e5, partial_rotary_factor=0.25).rope_parameters == {
        "rope_theta": 5e5, "partial_rotary_factor": 0.25, "rope_type": "default"
    }  # fmt: skip


def test_prompts_of_chatglm2_differ_in_lmdeploy(complete):
    assert "blank line" in lines_of(complete("glm2"), "glm2")["LMDeploy"]
    assert "blank line" not in lines_of(complete("glm3"), "glm3")["LMDeploy"]


def test_a_plain_official_folder_is_told_its_commands(tiny):
    found = lines_of(tiny["glm2"], "glm2")
    assert "--tokenizer_only" in found["vLLM"] and "glm_models.convert" in found[NEW]


@pytest.mark.parametrize("mode", MODE)
def test_a_p_tuning_result(complete, mode):
    folder = complete(mode)
    path = str(folder / "config.json")
    changes = {"pre_seq_len": 5, "prefix_projection": False}
    config = MODE[mode].config.from_pretrained(folder, **changes)
    write_model(MODE[mode].model.from_pretrained(folder, config=config, new_prefix=True), str(folder))
    write_json(path, read_json(path) | changes)
    assert check(str(folder), mode)[0].startswith(f"{folder}: P-Tuning result of ")
    found = lines_of(folder, mode)
    assert serving(found) == ({"official"} if mode == "glm" else {"official", "chatglm.cpp"})
    assert all("prefix" in line for name, line in found.items() if name not in serving(found))
    write_json(path, {key: value for key, value in read_json(path).items() if key != "num_layers"})
    assert not serving(lines_of(folder, mode))


def test_broken_weights(complete):
    folder = complete("glm3")
    path = str(folder / "config.json")
    write_json(path, read_json(path) | {"num_layers": 3})
    broken = lines_of(folder, "glm3")
    assert list(broken) == ["no"] and "transformer.encoder.layers.3." in broken["no"]


def test_adapters(tiny, tmp_path):
    adapter = make_adapter(MODE["glm3"].model.from_pretrained(tiny["glm3"]), tmp_path / "adapter", ALL_FOUR)
    path = adapter / "adapter_config.json"
    assert "0.6 to 0.13 refuse the keys" in lines_of(adapter)["peft"]  # as peft 0.21 writes it
    config = json.loads(path.read_text())

    def of(changes: dict) -> dict[str, str]:
        write_json(str(path), config | changes)
        return lines_of(adapter)

    plain = of({})
    assert all("its base" in plain[name] for name in ("vLLM", "LMDeploy", "llama.cpp", "chatglm.cpp", "official"))
    assert "does not serve it" in plain["SGLang"] and "--max-lora-rank" not in plain["vLLM"]
    refused_by_vllm = {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "init_lora_weights": "pissa"}
    for key, value in refused_by_vllm.items():
        assert f"does not serve it: {key} in adapter_config.json" in of({key: value})["vLLM"]
    assert "--max-lora-rank 32" in of({"r": 4, "rank_pattern": {"dense": 32}})["vLLM"]
    for key, value in {"use_rslora": True, "use_dora": True, "alpha_pattern": {"dense": 4}}.items():
        found = of({key: value})
        assert all(f"leaves out {key}" in found[name] for name in ("LMDeploy", "llama.cpp", "chatglm.cpp", "official"))
    for modules in (["q_proj", "v_proj"], r".*\.(q_proj|v_proj)"):
        found = of({"target_modules": modules})
        assert all("convert it back" in found[name] for name in ("LMDeploy", "llama.cpp", "chatglm.cpp", "official"))
        assert "beside its base" in found["vLLM"] and "not looked up" in found["SGLang"]
    write_json(str(path), {key: value for key, value in config.items() if key != "r"})
    assert "adapter_config.json: r" in lines_of(adapter)["vLLM"]


def test_keys_of_peft_by_version(tiny, tmp_path):
    adapter = make_adapter(MODE["glm3"].model.from_pretrained(tiny["glm3"]), tmp_path / "adapter", ALL_FOUR)
    path = adapter / "adapter_config.json"
    oldest = {key: value for key, value in json.loads(path.read_text()).items() if key in PEFT_KEYS}
    for more, said in (
        ({}, "peft: 0.5 to 0.21 read it"),
        ({"rank_pattern": {}}, "peft: 0.6 to 0.21 read it; 0.5 leaves out rank_pattern without a word"),
        ({"use_rslora": True}, "0.6 and some after it refuse the keys use_rslora"),
        ({"use_rslora": True, "qalora_group_size": 16}, "0.6 to 0.13 refuse the keys qalora_group_size"),
    ):
        write_json(str(path), oldest | more)
        assert said in lines_of(adapter)["peft"]


def test_the_command(tiny, capsys, tmp_path):
    main(["--check", tiny["glm3"], "--mode", "glm3"])
    assert capsys.readouterr().out.count("\n") == 1 + len(CLIENTS)
    with pytest.raises(CheckpointError, match="nothing to check"):
        check(str(tmp_path))
    for argv, word in (
        (["--check", tiny["glm3"], "--output_dir", "x"], "--output_dir"),
        (["--mode", "glm3"], "--model_path is missing"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert word in capsys.readouterr().err
