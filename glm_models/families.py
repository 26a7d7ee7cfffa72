"""What tells the families apart, as data.

All three official configs say `"model_type": "chatglm"`, so the family is recognised by the keys of the config and the
name of the vocabulary file. ChatGLM2 and ChatGLM3 are one network with one vocabulary; only the names in their json
files and the tokenizer code beside the weights tell them apart.
"""

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


def how_to_download(mode: str) -> str:
    """Where to get a family's official model, for messages about a missing folder."""
    name = FAMILIES[mode].title.lower()
    return (
        f"only folders on this machine are read. To download the official model (its data files are enough): "
        f"`modelscope download --model ZhipuAI/{name} --local_dir {name}` or "
        f"`huggingface-cli download THUDM/{name} --local-dir {name}`"
    )
