"""Models by their name on a hub, against a small hub on loopback: in the cache, downloaded, or refused in a line."""

import importlib
import json
import os
import shutil
import socket
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import write_model
from hub_server import COMMIT, OTHER, Hub
from huggingface_hub import close_session, constants
from runs import ROOT, Forked, make_rows
from safetensors.torch import load_file

import merge_lora
import predict
import train
import utils
from glm_models import MODE
from glm_models.checkpoint import CheckpointError, read_json, write_json
from glm_models.convert import __main__ as convert
from glm_models.families import parse_hub_name
from tuning import hub
from tuning.arguments.compare import parse_args as compare_args
from tuning.arguments.models import Model
from tuning.engine.loading import load_result
from tuning.errors import UserError
from tuning.evaluate import forgetting
from tuning.hub import CONFIG, TOKENIZER, find_model
from tuning.methods import count_parameters

NAME = "THUDM/chatglm3-6b"
VARIABLES = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_HOME", "TRANSFORMERS_OFFLINE")
VARIABLES += ("HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")


@pytest.fixture(scope="module")
def repository(tiny, tmp_path_factory):
    """A repository as the official ones are: weights in two formats, and code, which would leave a mark."""
    folder = tmp_path_factory.mktemp("repository") / "chatglm3-6b"
    shutil.copytree(tiny["glm3"], folder)
    mark = folder.parent / "ran"
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "setup.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\nclass ChatGLMConfig: pass\n")
    config = read_json(str(folder / "config.json"))
    auto = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMModel"}
    write_json(str(folder / "config.json"), config | {"auto_map": auto, "_name_or_path": NAME})
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    model = MODE["glm3"].model.from_pretrained(tiny["glm3"])
    write_model(model, str(folder), max_shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "MODEL_LICENSE").write_text("terms")
    (folder / "README.md").write_text("not needed")
    return folder


def settings(url: str, cache: Path) -> dict[str, str]:
    """What the library has read from HF_ENDPOINT and HF_HUB_CACHE."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    return {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}


@pytest.fixture
def server(repository, tmp_path, monkeypatch):
    """The hub, with an empty cache; no variable of the machine counts."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    server = Hub()
    server.repositories[NAME] = {"main": repository, COMMIT: repository}
    for name, value in settings(server.url, tmp_path / "cache").items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def refused(name: str = NAME, **more) -> str:
    with pytest.raises(UserError) as error:
        find_model(name, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def whole(folder: str, repository: Path) -> bool:
    names = set(os.listdir(folder))
    return all((repository / name).read_bytes() == Path(folder, name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (NAME, ("", NAME, None)),
        (f"{NAME}@v1.0", ("", NAME, "v1.0")),
        (f"{NAME}@refs/pr/3", ("", NAME, "refs/pr/3")),
        ("modelscope:ZhipuAI/chatglm3-6b", ("modelscope", "ZhipuAI/chatglm3-6b", None)),
        ("ChatGLM3-6B", None),
        ("ChatGLM3-6B/", None),
        ("./THUDM/chatglm3-6b", None),
        ("../THUDM/chatglm3-6b", None),
        ("/data/chatglm3-6b", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/b@../../etc", None),
        ("-a/b", None),
        ("hub:a/b", None),
        ("a/b\n", None),
        ("a--b/c", None),
        ("a/b..c", None),
        ("a/b.git", None),
        ("a/" + "b" * 96, None),
    ],
)
def test_names(text, name):
    assert parse_hub_name(text) == name


def test_a_folder_wins_and_a_slip_in_a_path_is_no_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "find_commit", None)  # a hub must not be asked
    (tmp_path / NAME).mkdir(parents=True)
    assert Model()(NAME) == NAME and find_model(NAME) == NAME
    assert f"{NAME} is a folder here, and is used; a hub is not asked" in capsys.readouterr().out
    for slip in ("THUDM/chatglm2-6b", "./no/such", "ChatGLM3-6B/", "no-such", "output/best", "out/epoch-1-step-9"):
        with pytest.raises(ValueError, match="no such folder"):
            Model()(slip)
    assert Model()("owner/model@main") == "owner/model@main"


def test_a_model_is_downloaded_once_and_loaded(server, repository, tiny, capsys):
    folder = find_model(NAME)
    said = capsys.readouterr().out
    assert f"from {server.url}" in said and "its 4 .py files are left there, none of them runs" in said
    assert f"{NAME} is {folder}" in said
    names = os.listdir(folder)
    assert not [name for name in names if name.endswith((".py", ".bin", ".md"))] and "MODEL_LICENSE" in names
    assert sorted(server.files(NAME)) == sorted(names) and whole(folder, repository)
    _, model = load_result("glm3", NAME, device="cpu")
    _, expected = load_result("glm3", tiny["glm3"], device="cpu")
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert not (repository.parent / "ran").exists()
    asked = len(server.requests)
    assert find_model(NAME) == folder and len(server.requests) == asked  # the cache does


def test_offline_the_cache_is_used(server, monkeypatch):
    folder = find_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.requests)
    assert find_model(NAME) == folder == find_model(f"{NAME}@{COMMIT}")
    assert "HF_HUB_OFFLINE is set" in refused("THUDM/chatglm2-6b")
    os.unlink(next(Path(folder).glob("model-00002-*")))
    assert "or not all of it, and HF_HUB_OFFLINE is set" in refused()
    assert len(server.requests) == asked


def test_revisions(server, repository, tmp_path):
    other = shutil.copytree(repository, tmp_path / "other")
    write_json(str(other / "generation_config.json"), {"eos_token_id": 2, "other": 1})
    server.repositories[NAME] |= {OTHER: other}
    folder = find_model(f"{NAME}@{OTHER}")
    assert os.path.basename(folder) == OTHER and whole(folder, other)
    assert os.path.basename(find_model(NAME)) == COMMIT
    assert "has no revision v9" in refused(f"{NAME}@v9")
    shutil.rmtree(constants.HF_HUB_CACHE)
    server.head = OTHER  # the hub has gone on, and another node has the earlier commit
    folder = hub.get_snapshot(parse_hub_name(NAME), COMMIT, hub.WEIGHTS)
    assert os.path.basename(folder) == COMMIT and whole(folder, repository)


def test_only_what_is_needed(server):
    folder = find_model(NAME, CONFIG)
    assert os.listdir(folder) == ["config.json"]
    find_model(NAME, TOKENIZER)
    assert "tokenizer.model" in os.listdir(folder) and not list(Path(folder).glob("*.safetensors*"))
    assert find_model(NAME) == folder and list(Path(folder).glob("*.safetensors"))
    assert server.files(NAME).count("config.json") == 1


def test_a_tokenizer_is_taken_for_whole_with_all_its_files_only(server, monkeypatch):
    wanted, get_file, left = set(os.listdir(find_model(NAME, TOKENIZER))), hub.get_file, []

    def stops(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return get_file(*args)

    assert len(wanted) > 2
    for count in range(1, len(wanted)):
        shutil.rmtree(constants.HF_HUB_CACHE)
        left[:] = range(count)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(hub, "get_file", stops)
            find_model(NAME, TOKENIZER)
        assert set(os.listdir(find_model(NAME, TOKENIZER))) == wanted


def test_bin_files_do_where_there_are_no_others(server, repository, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(repository, old, ignore=shutil.ignore_patterns("*.safetensors*"))
    server.repositories[NAME] = {"main": old, COMMIT: old}
    assert "pytorch_model.bin" in os.listdir(find_model(NAME))
    (old / "pytorch_model.bin").unlink()
    server.repositories["THUDM/empty"] = {"main": old, COMMIT: old}
    assert "THUDM/empty has no weights that are read here" in refused("THUDM/empty")
    (old / "config.json").unlink()
    assert "has no config.json: not a model's repository" in refused("THUDM/empty", need=CONFIG)


# What goes wrong


def test_a_broken_connection_goes_on_where_it_stopped(server, repository):
    name = next(repository.glob("model-00001-*")).name
    server.cuts = {name: 3, "config.json": 1}
    assert whole(find_model(NAME), repository)
    assert server.files(NAME).count(name) == 4


def test_wrong_bytes_are_fetched_again_then_refused(server, repository):
    name = next(repository.glob("model-00001-*")).name
    server.lies = {name: 1, "tokenizer_config.json": 1}
    folder = find_model(NAME)
    assert whole(folder, repository) and server.files(NAME).count(name) == 2
    shutil.rmtree(constants.HF_HUB_CACHE)
    server.lies = {name: 2}
    said = refused()
    assert f"{name} of {NAME} is not what {server.url} says of it (size or hash)" in said
    kept = [path.name for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()]
    assert name not in kept and not [one for one in kept if one.endswith(".incomplete")]
    blobs = [path.read_bytes() for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*")]
    right = [path.read_bytes() for path in repository.iterdir()]
    assert blobs and all(blob in right for blob in blobs)
    assert whole(find_model(NAME), repository)  # the next start goes on


def test_a_short_file_is_not_taken_for_a_whole_one(server, repository, monkeypatch):
    name = next(repository.glob("model-00001-*")).name
    server.short = {name: 100}
    said = refused()
    assert "could not be downloaded" in said and "start again" in said
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.name in (name, ".incomplete")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not all of it" in refused()


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(server, repository, tmp_path, monkeypatch):
    server.stalls = next(repository.glob("model-00002-*")).name
    run = Forked(1, tmp_path / "log", lambda rank: find_model(NAME))
    assert server.stalled.wait(60)
    run.kill()
    assert run.wait() == {0: -9}
    server.stalls = ""
    server.released.set()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "not all of it" in refused()
    before = len(server.files(NAME))
    assert whole(find_model(NAME), repository)
    assert len(server.files(NAME)) < before + 10  # what was there already is not fetched again


def test_what_the_hub_refuses_is_said_in_a_line(server, monkeypatch):
    assert f"no folder THUDM/no-such here, and no such repository on {server.url}" in refused("THUDM/no-such")
    server.gated = True
    assert "is not open to everybody (403): accept its terms" in refused() and "HF_TOKEN" in refused()
    server.gated, server.token = False, "hf_secret"
    assert "if it is private: accept its terms" in refused()
    server.down, server.token = True, ""
    assert "answered 500" in refused()
    server.down, server.token = False, "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert os.path.isdir(find_model(NAME))


def test_comparisons_and_forgetting_take_names_too(tmp_path):
    rows = str(make_rows(tmp_path / "rows.json", 2))
    files = ["--train_path", rows, "--test_path", rows]
    assert compare_args(["--model", f"glm3={NAME}@v1", *files]).model == {"glm3": f"{NAME}@v1"}
    with pytest.raises(UserError, match="no such folder"):
        compare_args(["--model", "glm3=./no/such", *files])
    args = forgetting.parse_args(["--mode", "glm3", "--base", NAME, "--tuned", str(tmp_path)])
    assert args.base == NAME


def test_without_a_network_it_says_what_to_do(server, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for name, value in settings(f"http://127.0.0.1:{free.getsockname()[1]}", Path("cache")).items():
            monkeypatch.setattr(constants, name, value)
    said = refused()
    assert "could not be downloaded from http://127.0.0.1" in said and "set HF_ENDPOINT to a mirror" in said


def test_other_ways_to_large_files_and_proxies(server, repository, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.xet = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    said = refused()
    assert "start again" in said and "HF_HUB_DISABLE_XET=1 does without" in said
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert whole(find_model(NAME), repository)
    close_session()
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setitem(sys.modules, "socksio", None)
    assert "pip install socksio" in refused("THUDM/another")
    close_session()


def test_disks(server, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
        assert "no room for THUDM/chatglm3-6b in" in refused() and "0.00 GiB are free" in refused()
    assert not server.files(NAME)
    (tmp_path / "cache").write_text("a file is in the way")
    assert f"cannot write {NAME} to" in refused()


def test_pickles_that_run_code_are_refused(server, repository, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    evil = tmp_path / "evil"
    shutil.copytree(repository, evil, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save({"weight": torch.ones(2), "more": Runs()}, evil / "pytorch_model.bin")
    server.repositories[NAME] = {"main": evil, COMMIT: evil}
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is broken, or holds more than tensors; not loaded"):
        load_result("glm3", NAME, device="cpu")
    assert not (tmp_path / "ran").exists() and not (repository.parent / "ran").exists()
    torch.load(evil / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


# The scripts


@pytest.fixture(scope="module")
def trained(repository, tmp_path_factory):
    """Two ranks train LoRA on a hub's model, are started again after a state, once with another place of the cache."""
    top = tmp_path_factory.mktemp("hub-runs")
    server = Hub()
    server.repositories[NAME] = {"main": repository, COMMIT: repository}
    rows = make_rows(top / "rows.json", 12)
    fixed = f"--mode glm3 --train_path {rows} --data_cache none --max_len 96 --max_src_len 64 --show_loss_step 1"
    fixed += f" --lora_dim 4 --max_steps 3 --save_state_steps 2 --ds_file {ROOT}/ds_zero2_no_offload.json"
    outcome = {}
    state = f"{top}/first/states/step-00000002"
    for name, model, more in (
        ("first", NAME, ""),
        ("cached", NAME, f"--resume_from_checkpoint {state}"),
        ("moved", NAME, f"--resume_from_checkpoint {state}"),
        ("folder", repository, f"--resume_from_checkpoint {state}"),
    ):
        argv = f"{fixed} --model_name_or_path {model} --output_dir {top / name} {more}".split()
        cache = top / ("other-cache" if name == "moved" else "cache")

        def training(rank: int, argv=argv, cache=cache, name=name) -> None:
            for variable in VARIABLES:
                os.environ.pop(variable, None)
            for variable, value in settings(server.url, cache).items():
                setattr(constants, variable, value)
            constants.HF_HUB_OFFLINE = name == "cached"
            utils.silence_libraries(verbose=False)
            history = train.train(train.parse_args(argv))
            if rank == 0:
                (top / f"{name}.json").write_text(json.dumps(history))

        codes = Forked(2, top / f"{name}.log", training).wait()
        assert codes == {0: 0, 1: 0}, (top / f"{name}.log").read_text()[-3000:]
        outcome[name] = json.loads((top / f"{name}.json").read_text()), (top / f"{name}.log").read_text()
    yield outcome, top, server
    server.shutdown()
    server.server_close()


def test_training_on_ranks_and_resuming_do_not_depend_on_the_place_of_the_cache(trained, repository):
    outcome, _, server = trained
    history, said = outcome["first"]
    assert said.count(f"downloading {NAME} at") == 1 and len(history) == 3
    for name in ("cached", "moved", "folder"):
        assert outcome[name][0] == history[2:], name
        assert "changed since" not in outcome[name][1]
    files = server.files(NAME)  # two downloads of all files, by one process each
    assert files and all(files.count(one) == 2 for one in files)
    assert not [one for one in files if one.endswith(".py")]
    assert not (repository.parent / "ran").exists()


def test_the_scripts_take_hub_names(trained, server, tmp_path, capsys, monkeypatch):
    (adapter,) = trained[1].glob("first/epoch-*-step-3")
    mode = ["--mode", "glm3"]
    merge_lora.main([*mode, "--ori_model_dir", NAME, "--model_dir", str(adapter), "--output_dir", "merged"])
    assert "verified" in capsys.readouterr().out
    convert.main([*mode, "--model_path", NAME, "--output_dir", "native"])
    convert.main([*mode, "--model_path", NAME, "--tokenizer_only", "--output_dir", "tokenizer"])
    rows = make_rows(tmp_path / "rows.json", 2)
    few = ["--predict_path", str(rows), "--max_new_tokens", "4"]
    predict.main([*mode, "--model_path", str(adapter), "--ori_model_dir", NAME, *few, "--output_path", "adapter.jsonl"])
    predict.main([*mode, "--model_path", NAME, *few])
    assert (tmp_path / "predictions-rows.jsonl").exists()  # not in the cache
    train.main([*mode, "--model_name_or_path", NAME, "--train_path", str(rows), "--check_data"])
    written = [path.name for path in Path("cache").rglob("snapshots/*/*")]
    assert sorted(written) == sorted(set(server.files(NAME)))
    # an adapter whose config has the hub's name, as peft writes it
    config = read_json(str(adapter / "adapter_config.json"))
    plain = shutil.copytree(adapter, tmp_path / "plain")
    (plain / "manifest.json").unlink()
    write_json(str(plain / "adapter_config.json"), config | {"base_model_name_or_path": NAME})
    capsys.readouterr()
    load_result("glm3", str(plain), device="cpu")
    assert f"its base model is {find_model(NAME)}" in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=f"its base model {NAME} is not here; name it with --ori_model_dir"):
        load_result("glm3", str(plain), device="cpu")


def test_a_plan_needs_the_config_alone_and_variables_are_obeyed(server, tmp_path):
    """A process of its own: the library reads its variables when it is imported."""
    rows = make_rows(tmp_path / "rows.json", 2)
    server.token = "hf_mine"
    own = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "own-cache"), "HF_TOKEN": "hf_mine"}
    argv = ["--mode", "glm3", "--model_name_or_path", NAME, "--train_path", str(rows), "--max_len", "96"]
    argv += ["--max_src_len", "64", "--ds_file", f"{ROOT}/ds_zero2_no_offload.json", "--plan"]

    def plan(rank: int) -> None:
        for variable in VARIABLES:
            os.environ.pop(variable, None)
        os.environ.update(own)
        importlib.reload(constants)
        train.planner.plan = lambda args, build: print(count_parameters(build(args, 1).model))  # takes long
        train.main(argv)

    codes = Forked(1, tmp_path / "log", plan).wait()
    assert codes == {0: 0}, (tmp_path / "log").read_text()
    assert server.files(NAME) == ["config.json"]
    assert list((tmp_path / "own-cache").rglob("config.json"))


# ModelScope


def test_modelscope(repository, monkeypatch, capsys):
    """With a stand-in for its library, whose functions have the arguments of modelscope 1.40."""
    name = "modelscope:ZhipuAI/chatglm3-6b"
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "needs the package modelscope: pip install modelscope" in refused(name)
    asked = []

    def snapshot_download(model_id, revision=None, local_files_only=False, allow_patterns=None):
        asked.append((model_id, revision, local_files_only, allow_patterns))
        if local_files_only:
            raise ValueError("not cached")
        return str(repository)

    class HubApi:
        def get_model_files(self, model_id, revision=None, root=None, recursive=True):
            return [{"Path": path.name, "Size": path.stat().st_size} for path in repository.iterdir()]

    library, api = types.ModuleType("modelscope"), types.ModuleType("modelscope.hub.api")
    library.snapshot_download, api.HubApi = snapshot_download, HubApi
    for module, there in (("modelscope", library), ("modelscope.hub", types.ModuleType("hub")), (api.__name__, api)):
        monkeypatch.setitem(sys.modules, module, there)
    assert find_model(f"{name}@v1") == str(repository)
    assert [one[:3] for one in asked] == [("ZhipuAI/chatglm3-6b", "v1", cached) for cached in (True, False)]
    patterns = asked[1][3]
    assert "config.json" in patterns and not [one for one in patterns if one.endswith((".py", ".bin"))]

    def fails(*args, **more):
        raise RuntimeError("first line\nsecond \x1b[31mline")

    library.snapshot_download = fails
    assert "cannot be downloaded (RuntimeError: first line second \\x1b[31mline)" in refused(name)
