"""glm_models.convert --check: what each program finds in a folder, and what it says if something is taken away."""

import json
import shutil
from pathlib import Path

import pytest
from test_convert import ALL_FOUR, convert, make_adapter

from glm_models import MODE
from glm_models.checkpoint import CheckpointError, read_json, write_json
from glm_models.convert.__main__ import main
from glm_models.convert.clients import CLIENTS, CODE, check


def lines_of(folder, mode=None) -> dict[str, str]:
    """What `check` says of each program, by the first word of its name."""
    _, *lines = check(str(folder), mode)
    return {line.split(":")[0].split()[0]: line for line in lines}


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
    assert serving(lines_of(native)) == {"vLLM", "SGLang", "transformers"}
    (native / "tokenizer.json").unlink()
    assert "tokenizer.json" in lines_of(native)["transformers"] and not serving(lines_of(native))


def test_a_plain_official_folder_is_told_its_commands(tiny):
    found = lines_of(tiny["glm2"], "glm2")
    assert "--tokenizer_only" in found["vLLM"] and "glm_models.convert" in found["transformers"]


def test_p_tuning_and_broken_weights(complete):
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
    write_json(str(path), config | {"use_dora": True})
    assert "use_dora" in lines_of(adapter)["vLLM"]
    write_json(str(path), {key: value for key, value in config.items() if key != "r"})
    assert "adapter_config.json: r" in lines_of(adapter)["vLLM"]


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
