"""What tells the families apart, as data.

All three official configs say `"model_type": "chatglm"`, so the family is recognised by the keys of the config and the
name of the vocabulary file. ChatGLM2 and ChatGLM3 are one network with one vocabulary; only the names in their json
files and the tokenizer code beside the weights tell them apart.
"""

import re
from typing import NamedTuple


class Signs(NamedTuple):
    """How the official folder of a family looks.

    title: the model's name.
    config_keys: keys of config.json that no other network has.
    vocabulary: name of the vocabulary file.
    code: a word that only this family's tokenization_chatglm.py contains.
    """

    title: str
    config_keys: frozenset[str]
    vocabulary: str
    code: str


_GLM2_KEYS = frozenset(("padded_vocab_size", "ffn_hidden_size", "kv_channels"))

FAMILIES = {
    "glm": Signs(
        title="ChatGLM-6B",
        config_keys=frozenset(("inner_hidden_size", "max_sequence_length", "position_encoding_2d")),
        vocabulary="ice_text.model",
        code="ice_text",
    ),
    "glm2": Signs(title="ChatGLM2-6B", config_keys=_GLM2_KEYS, vocabulary="tokenizer.model", code="build_prompt"),
    "glm3": Signs(
        title="ChatGLM3-6B", config_keys=_GLM2_KEYS, vocabulary="tokenizer.model", code="build_single_message"
    ),
}


OWNERS = ("thudm", "zhipuai", "zai-org")  # of the official models on the hubs
MODELSCOPE = "modelscope"


class HubName(NamedTuple):
    """The name of a model on a hub.

    hub: "" for the Hugging Face Hub, else MODELSCOPE.
    repository: owner/name.
    revision: a branch, a tag or a commit; None for the main branch.
    """

    hub: str
    repository: str
    revision: str | None

    @property
    def official(self) -> bool:
        """Whether the owner is one of the official models'."""
        return self.repository.partition("/")[0].lower() in OWNERS


def parse_hub_name(text: str) -> HubName | None:
    """Read owner/name, owner/name@revision, or the same after "modelscope:"; None for all else."""
    part = r"[A-Za-z0-9](?:[\w.-]*\w)?"
    found = re.fullmatch(rf"(?:({MODELSCOPE}):)?({part}/{part})(?:@(\w[\w./-]*))?", text, re.ASCII)
    # what the hubs do not allow
    if not found or re.search(r"--|\.\.|\.git$", found[2]) or len(found[2]) > 96:
        return None
    return HubName(found[1] or "", found[2], found[3])


def how_to_download(mode: str) -> str:
    """How to get a family's official model, for messages about a missing folder."""
    name = FAMILIES[mode].title.lower()
    return (
        f"the scripts download the official model if they are given THUDM/{name} or modelscope:ZhipuAI/{name}; or "
        f"download its data files: `modelscope download --model ZhipuAI/{name} --local_dir {name}` or "
        f"`hf download THUDM/{name} --local-dir {name}`"
    )


# For messages of programs that have no class for ChatGLM-6B.
WHAT_SERVES_GLM = (
    "predict.py, its official code and chatglm.cpp serve its folders as they are (P-Tuning: not chatglm.cpp)"
)
NATIVE = "GlmForCausalLM"  # transformers' own class, which computes what ChatGLM2 and ChatGLM3 do


def architectures_of(content: dict) -> list[str]:
    """The names of classes in a config.json; of one that says something else, none."""
    names = content.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_native(content: dict) -> bool:
    """Whether a config.json is that of a GlmForCausalLM."""
    return content.get("model_type") == "glm" or NATIVE in architectures_of(content)


def convert_first(mode: str, folder: str) -> str:
    """What to do with the folder of a GlmForCausalLM where one of a family is needed."""
    return (
        f"{folder} is a {NATIVE}, and the official form is needed here; convert it first: python -m "
        f"glm_models.convert --mode {mode} --model_path {folder} --output_dir NEW"
    )
