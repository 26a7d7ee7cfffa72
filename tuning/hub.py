"""Models by their name on a hub: a snapshot in the cache of that hub's library, or downloaded there.

    --model_name_or_path THUDM/chatglm3-6b            the Hugging Face Hub
    --model_name_or_path THUDM/chatglm3-6b@REVISION   a branch, a tag or a commit of it
    --model_name_or_path modelscope:ZhipuAI/chatglm3-6b

Only data files are downloaded: json, vocabulary, and weights in one format. Code of a repository stays there. The
libraries' own variables hold: HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and so on; MODELSCOPE_CACHE.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors

from glm_models.checkpoint import CheckpointError, printable, weight_files
from glm_models.families import HubName, parse_hub_name
from tuning.errors import UserError
from utils import on_rank_0, once_per_node, print_rank_0

# What a run needs of a model.
CONFIG, TOKENIZER, WEIGHTS = "config", "tokenizer", "weights"
DATA = re.compile(r"[^/]+\.(json|model|jinja)|(MODEL_)?LICENSE[^/]*")  # side files, at the top of a repository
WEIGHTS_NAMES = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")
BLOCK = 1 << 22  # bytes read at once


class File(NamedTuple):
    """A file of a repository.

    size: bytes.
    sha256: of its content, if git-lfs keeps it, as with all large files.
    git: git's own hash of a small one.
    """

    name: str
    size: int
    sha256: str | None
    git: str | None


# Flags


def find_models(args, *names: str, need: str = WEIGHTS) -> None:
    """Put folders in the place of hub names in some flags. Called on every rank.

    Args:
        names: of the flags, without dashes.
        need: see find_model.

    Raises:
        UserError: see find_model.
    """
    for name in names:
        if getattr(args, name) is not None:
            setattr(args, name, find_model(getattr(args, name), need))


def find_model(path: str, need: str = WEIGHTS) -> str:
    """The folder of a model: the path itself, or the snapshot of a hub name, downloaded once on each node.

    All nodes get the same commit. Called on every rank.

    Args:
        path: a folder wins over a hub name.
        need: CONFIG, TOKENIZER (with the config) or WEIGHTS (everything).

    Raises:
        UserError: it cannot be found or downloaded; the message is one line.
    """
    name = parse_hub_name(path)
    if name is None:
        return path
    if on_rank_0(lambda: os.path.exists(path)):  # the same on all nodes, which must all go on in the same way
        if name.official:
            print_rank_0(f"{path} is a folder here, and is used; a hub is not asked")
        return path
    if name.hub:
        folder = once_per_node(lambda: modelscope_snapshot(name, need))
    else:
        commit = on_rank_0(lambda: find_commit(name, need))
        folder = once_per_node(lambda: get_snapshot(name, commit, need))
    print_rank_0(f"{path} is {folder}")
    return folder


def find_here(path) -> str | None:
    """The folder of a model that another file names, if it is on this machine: a path, or a hub name that is cached."""
    if not isinstance(path, str) or os.path.isdir(path):
        return path if isinstance(path, str) else None
    name = parse_hub_name(path)
    return cached_snapshot(name, name.revision, WEIGHTS) if name and not name.hub else None


# The Hugging Face Hub


def cached_snapshot(name: HubName, revision: str | None, need: str) -> str | None:
    """The folder of a snapshot that is in the cache with all that is needed; None without.

    Args:
        revision: None for the main branch, as it was when it was last asked for.
    """
    path = huggingface_hub.try_to_load_from_cache(name.repository, "config.json", revision=revision)
    folder = os.path.dirname(path) if isinstance(path, str) else None
    return folder if folder and lacks(folder, need) is None else None


def lacks(folder: str, need: str) -> str | None:
    """What a snapshot lacks; None for nothing."""
    names = os.listdir(folder)
    if "config.json" not in names:
        return "config.json"
    if need != CONFIG and not any(map(is_vocabulary, names)):
        return "the vocabulary"
    if need == WEIGHTS:
        try:
            weight_files(folder)
        except CheckpointError as error:
            return str(error)
    return None


def is_vocabulary(name: str) -> bool:
    """Whether a file is that of a vocabulary, by its name."""
    return name.endswith(".model") or name == "tokenizer.json"


def find_commit(name: HubName, need: str) -> str:
    """The commit of the snapshot to use: what is cached, else what the hub has.

    Raises:
        UserError: neither.
    """
    with explaining(name):
        if folder := cached_snapshot(name, name.revision, need):
            return os.path.basename(folder)
        if constants.is_offline_mode():
            raise UserError(
                f"{name.repository} is not in {constants.HF_HUB_CACHE}, or not all of it, and HF_HUB_OFFLINE is set: "
                "download it where there is a network, or name a folder"
            )
        return ask_hub(name, name.revision).sha


def get_snapshot(name: HubName, commit: str, need: str) -> str:
    """The folder of a snapshot: the cached one, or downloaded.

    Raises:
        UserError: it cannot be downloaded; what is cached of it is complete files.
    """
    with explaining(name):
        if folder := cached_snapshot(name, commit, need):
            return folder
        branch = name.revision or constants.DEFAULT_REVISION
        info = ask_hub(name, branch)
        if info.sha != commit:  # another node has an earlier one, which is still the one to use
            branch, info = commit, ask_hub(name, commit)
        everything = [describe(file) for file in info.siblings]
        wanted = choose(name, everything, need)
        missing = [file for file in wanted if not cached_file(name, file, commit)]
        if need == WEIGHTS:
            left = sum(file.name.endswith(".py") for file in everything)
            print_rank_0(printable(
                f"downloading {name.repository} at {commit[:12]} from {constants.ENDPOINT}: {len(missing)} files, "
                f"{sum(file.size for file in missing) / 2**30:.2f} GiB"
                + (f"; its {left} .py files are left there, none of them runs" if left else "")
            ))  # fmt: skip
        check_room(name, missing)
        # the first file by the name of the branch: the library notes which commit that is
        paths = [get_file(name, wanted[0], branch)]
        # one after the other: Ctrl-C would have to wait for threads
        paths += [get_file(name, file, commit) for file in wanted[1:]]
    folder = os.path.dirname(paths[-1])
    if {os.path.dirname(path) for path in paths} != {folder}:
        raise UserError(f"{name.repository} has changed on the hub during the download: start again")
    if lost := lacks(folder, need):
        raise UserError(printable(f"{name.repository} on {constants.ENDPOINT} is not a whole model: {lost}"))
    return folder


def ask_hub(name: HubName, revision: str | None) -> huggingface_hub.ModelInfo:
    """The commit and the files of a revision."""
    api, wait = huggingface_hub.HfApi(), constants.HF_HUB_ETAG_TIMEOUT
    return api.model_info(name.repository, revision=revision, files_metadata=True, timeout=wait)


def describe(sibling) -> File:
    """A file as the library describes it."""
    lfs = sibling.lfs
    return File(sibling.rfilename, sibling.size or 0, lfs.sha256 if lfs else None, None if lfs else sibling.blob_id)


def choose(name: HubName, files: list[File], need: str) -> list[File]:
    """The files to download, config.json first: side files, and weights in one format, safetensors before .bin.

    Raises:
        UserError: the repository has no config.json, or no weights.
    """
    by_name = {file.name: file for file in files}
    if "config.json" not in by_name:
        raise UserError(f"{name.repository} has no config.json: not a model's repository")
    if need == CONFIG:
        return [by_name["config.json"]]
    chosen = ["config.json"]
    chosen += [one for one in by_name if DATA.fullmatch(one) and not one.endswith(".index.json") and one not in chosen]
    # the vocabulary last: `lacks` takes a snapshot that has it for one with all side files
    chosen.sort(key=is_vocabulary)
    if need == TOKENIZER:
        return [by_name[one] for one in chosen]
    for pattern, single in zip(WEIGHTS_NAMES, ("model.safetensors", "pytorch_model.bin"), strict=True):
        index = f"{single}.index.json"
        if single in by_name:
            return [by_name[one] for one in (*chosen, single)]
        if index in by_name:
            shards = [one for one in by_name if re.fullmatch(pattern, one)]
            return [by_name[one] for one in (*chosen, index, *shards)]
    raise UserError(
        f"{name.repository} has no weights that are read here: neither model.safetensors nor pytorch_model.bin, nor an "
        "index of them"
    )


def cached_file(name: HubName, file: File, commit: str) -> bool:
    """Whether a file is in the cache."""
    return isinstance(huggingface_hub.try_to_load_from_cache(name.repository, file.name, revision=commit), str)


def check_room(name: HubName, missing: list[File]) -> None:
    """Make sure that the cache's disk has room for the files to download.

    Raises:
        UserError: it has not.
    """
    folder, needed = constants.HF_HUB_CACHE, sum(file.size for file in missing)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"no room for {name.repository} in {constants.HF_HUB_CACHE} (HF_HUB_CACHE): it takes {needed / 2**30:.2f} "
            f"GiB, {free / 2**30:.2f} GiB are free"
        )


def get_file(name: HubName, file: File, revision: str) -> str:
    """Download a file to the cache, unless it is there, and compare it with the hash that the hub gives.

    A wrong one is removed and downloaded once more. The library continues broken downloads, and gives a file its name
    when it has all bytes.

    Raises:
        UserError: it is wrong again.
    """
    for _ in range(2):
        known = cached_file(name, file, revision)
        path = huggingface_hub.hf_hub_download(name.repository, file.name, revision=revision)
        if known or is_whole(path, file):
            return path
        for one in {os.path.realpath(path), path}:
            os.unlink(one)
    raise UserError(
        printable(f"{file.name} of {name.repository} is not what {constants.ENDPOINT} says of it (size or hash), also "
                  "after a second download: nothing was kept of it; try another HF_ENDPOINT")
    )  # fmt: skip


def is_whole(path: str, file: File) -> bool:
    """Whether a downloaded file has the size and the hash that the hub gives for it."""
    size = os.path.getsize(path)
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {size}\0".encode())
    with open(path, "rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    expected = file.sha256 or file.git
    return (not file.size or size == file.size) and expected in (None, digest.hexdigest())


@contextlib.contextmanager
def explaining(name: HubName):
    """Turns what goes wrong with a hub into one UserError."""
    try:
        yield
    except UserError:
        raise
    # RuntimeError: of Xet, where the hub keeps large files; ImportError: a package for a kind of proxy is missing
    except (errors.HTTPError, OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(printable(explain(error, name))) from None


def explain(error: Exception, name: HubName) -> str:
    """What went wrong with a hub, and what to do, in one line."""
    where, repository = constants.ENDPOINT, name.repository
    status = getattr(getattr(error, "response", None), "status_code", None)
    access = "accept its terms on its page there, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{repository} on {where} is not open to everybody ({status}): {access}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} on {where} has no revision {name.revision}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"no folder {repository} here, and no such repository on {where} ({status}); if it is private: {access}"
    if status is not None:
        return f"{where} answered {status} for {repository}: try again later, or another HF_ENDPOINT"
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"cannot write {repository} to {constants.HF_HUB_CACHE} (HF_HUB_CACHE): {error.strerror}"
    reason = " ".join(str(error.__cause__ or error).split())[:200]
    if isinstance(error, ImportError):
        socks = ": pip install socksio, or set another proxy" if "SOCKS" in reason else ""
        return f"{repository} cannot be downloaded from {where}, a package is missing ({reason}){socks}"
    if isinstance(error, RuntimeError):
        return (
            f"{repository} could not be downloaded from where {where} keeps large files (Xet: {reason}): "
            "start again, which continues with the files that are missing; HF_HUB_DISABLE_XET=1 does without them"
        )
    return (
        f"no folder {repository} here, and it could not be downloaded from {where} ({type(error).__name__}: {reason}): "
        "start again, which continues with the files that are missing, set HF_ENDPOINT to a mirror, or name a folder"
    )


# ModelScope


def modelscope_snapshot(name: HubName, need: str) -> str:
    """The folder of a model of ModelScope, downloaded if its library has not done so before.

    Raises:
        UserError: the library is missing, or it fails.
    """
    try:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi
    except ImportError:
        raise UserError(
            f"modelscope:{name.repository} needs the package modelscope: pip install modelscope; or name the model "
            "as on the Hugging Face Hub"
        ) from None
    ask = functools.partial(snapshot_download, name.repository, revision=name.revision)
    with contextlib.suppress(Exception):  # of the library's own many kinds: it is not in the cache
        if lacks(folder := ask(local_files_only=True), need) is None:
            return folder
    try:
        there = HubApi().get_model_files(name.repository, revision=name.revision, recursive=False)
        wanted = choose(name, [File(one["Path"], one.get("Size") or 0, None, None) for one in there], need)
        folder = ask(allow_patterns=[file.name for file in wanted])
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            printable(f"modelscope:{name.repository} cannot be downloaded ({type(error).__name__}: {reason})")
        ) from None
    if lost := lacks(folder, need):
        raise UserError(printable(f"modelscope:{name.repository} is not a whole model: {lost}"))
    return folder
