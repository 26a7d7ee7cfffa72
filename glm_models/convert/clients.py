"""What other programs read in a model folder, as tables, and a check of a folder against them. Nothing is run.

Each table says where it was looked up. A program that is not told a key may take a default of its own without a word:
then the key is listed here although the program would start without it.
"""

import os
from typing import NamedTuple

from .. import MODE
from ..checkpoint import CheckpointError, read_json
from ..families import FAMILIES, NATIVE, is_native
from ..identify import possible_modes
from ..prefix import find_prefix
from ..streamed import skeleton
from .tokenizer import TOKENIZER_FILES

LOOKED_UP = "2026-11-27"
OFFICIAL, PTUNING, NATIVE_FORM, ADAPTER = "official model", "P-Tuning result", NATIVE, "LoRA adapter"
BOTH = ("ChatGLMModel", "ChatGLMForConditionalGeneration")

# Keys of config.json of which programs compute the network.
NETWORK = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
NETWORK += ("multi_query_attention", "multi_query_group_num", "seq_length", "layernorm_epsilon", "add_qkv_bias")
SWITCHES = ("rmsnorm", "post_layer_norm", "add_bias_linear", "apply_residual_connection_post_layernorm")
GLM_NETWORK = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size")
GLM_NETWORK += ("max_sequence_length", "layernorm_epsilon", "position_encoding_2d")
NATIVE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
NATIVE_KEYS += ("num_key_value_heads", "attention_bias", "rms_norm_eps", "eos_token_id", "pad_token_id")
CODE = ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py")
AUTO = ("AutoConfig", "AutoModel")


# Keys of adapter_config.json in peft 0.5, the first with which the official code works. peft 0.6 to 0.13 refuse a
# config with a key that they do not know.
PEFT_KEYS = {"auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"}
PEFT_KEYS |= {"layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type"}
PEFT_KEYS |= {"r", "revision", "target_modules", "task_type"}


class Client(NamedTuple):
    """A program that serves or converts models.

    source: file in its repository, or in its package.
    architectures: names of which config.json must have one; () if it reads another key.
    keys: of config.json, official form of ChatGLM2 and ChatGLM3.
    files: that the official form must have.
    auto_map: keys that auto_map of config.json must have.
    fast: it reads the tokenizer files of transformers, not the official code.
    native: it serves GlmForCausalLM.
    prefix: families whose P-Tuning results it serves; families: whose whole models.
    scales_base: it reads rope_ratio as ChatGLM3 does, and one layout of query_key_value.
    adapters: it reads LoRA adapters itself.
    gguf: glm_models.convert.gguf writes its files, without its own converter.
    """

    name: str
    source: str
    families: tuple[str, ...] = ("glm2", "glm3")
    architectures: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    auto_map: tuple[str, ...] = ()
    fast: bool = False
    native: bool = False
    prefix: tuple[str, ...] = ()
    scales_base: bool = True
    adapters: bool = True
    gguf: bool = False


CLIENTS = (
    Client(
        "vLLM 0.32.0", "vllm/model_executor/models/{chatglm,registry}.py, vllm/lora/peft_helper.py",
        architectures=BOTH, keys=(*NETWORK, *SWITCHES, "original_rope"), fast=True, native=True,
    ),
    Client(
        "SGLang", "python/sglang/srt/{models/chatglm,model_loader/utils}.py", architectures=("ChatGLMModel",),
        keys=(*NETWORK, *SWITCHES), fast=True, native=True,
    ),
    Client(
        "LMDeploy", "lmdeploy/pytorch/models/{module_map,patch,chatglm2}.py, configurations/chatglm.py",
        architectures=("ChatGLMForConditionalGeneration",), keys=(*NETWORK, *SWITCHES),
        files=("tokenizer.model", "tokenizer_config.json", "configuration_chatglm.py", "tokenization_chatglm.py"),
        auto_map=("AutoConfig",),
    ),
    Client(
        "llama.cpp (converter in llama-cpp-python 0.3.36)", "conversion/chatglm.py", families=("glm3",),
        architectures=BOTH, keys=("_name_or_path", *NETWORK),
        files=("tokenizer.model", "tokenizer_config.json", "tokenization_chatglm.py", "configuration_chatglm.py"),
        gguf=True,
    ),
    Client(
        "chatglm.cpp 0.4.2", "chatglm_cpp/convert.py", families=("glm", "glm2", "glm3"),
        keys=(*NETWORK, *SWITCHES, "original_rope"), files=("tokenizer_config.json", *CODE), auto_map=AUTO,
        prefix=("glm2", "glm3"),
    ),
    Client(
        "transformers 5.24.0, 4.57.6 without remote code", "src/transformers/models/glm/configuration_glm.py",
        families=(), native=True, adapters=False,
    ),
    Client(
        "official code with transformers 4.33.0", "config.json and modeling_chatglm.py of the official folders",
        families=("glm", "glm2", "glm3"), keys=(*NETWORK, *SWITCHES), files=("tokenizer_config.json", *CODE),
        auto_map=AUTO, prefix=("glm", "glm2", "glm3"), scales_base=False,
    ),
)  # fmt: skip


class Found(NamedTuple):
    """What a folder is."""

    folder: str
    kind: str
    mode: str
    config: dict
    files: frozenset[str]
    tokenizer: dict  # tokenizer_config.json
    broken: str  # what is wrong with its weights


def look(folder: str, mode: str | None) -> Found:
    """Find out what a folder is.

    Raises:
        CheckpointError: it is no model and no adapter, or its family cannot be told and is not named.
    """
    files = frozenset(os.listdir(folder))
    if "adapter_config.json" in files:
        return Found(folder, ADAPTER, mode or "", read_json(os.path.join(folder, "adapter_config.json")), files, {}, "")
    if find_prefix(folder) or "config.json" not in files:
        raise CheckpointError(f"{folder} is not the folder of a whole model or of an adapter: nothing to check")
    config = read_json(os.path.join(folder, "config.json"))
    native = is_native(config)
    modes = possible_modes(os.path.join(folder, "official") if native and "official" in files else folder)
    modes = modes - {"glm"} if native else modes
    if mode is None and len(modes) > 1 and not native:
        raise CheckpointError(f"{folder} may be of {' or '.join(sorted(modes))}: name the family with --mode")
    if mode and mode not in modes:
        raise CheckpointError(f"{folder} is not a folder of --mode {mode}; its files fit {' or '.join(sorted(modes))}")
    mode = mode or min(modes)
    path = os.path.join(folder, "tokenizer_config.json")
    tokenizer = read_json(path) if os.path.isfile(path) else {}
    kind = NATIVE_FORM if native else PTUNING if config.get("pre_seq_len") is not None else OFFICIAL
    broken = ""
    if not native:
        try:
            MODE[mode].config.from_pretrained(folder)
            skeleton(mode, folder)
        except CheckpointError as error:
            broken = str(error)
    return Found(folder, kind, mode, config, files, tokenizer, broken)


def check(folder: str, mode: str | None = None) -> list[str]:
    """One line for each program: whether it serves a folder, or what is missing and which command makes it."""
    found = look(folder, mode)
    title = f" of {FAMILIES[found.mode].title}" if found.mode else ""
    lines = [f"{folder}: {found.kind}{title}. Checked by names alone, as looked up on {LOOKED_UP}; nothing was run"]
    if found.broken:
        lost = [key for key in (GLM_NETWORK if found.mode == "glm" else NETWORK) if key not in found.config]
        why = f"config.json lacks {', '.join(lost)}; " if lost else ""
        lines.append(f"no program can read it: {why}{found.broken}")
        return lines
    lines += [f"{client.name}: {verdict(client, found)} [{client.source}]" for client in CLIENTS]
    return lines + ([f"peft: {peft_verdict(found)}"] if found.kind == ADAPTER else [])


def verdict(client: Client, found: Found) -> str:
    """What one program makes of a folder, with the command for GGUF where that helps."""
    said = own_verdict(client, found)
    if not client.gguf or said == SERVES or found.kind == PTUNING or found.mode == "glm":
        return said
    command = f"python -m glm_models.convert.gguf --mode {found.mode or 'MODE'} --model_path {found.folder}"
    return f"its own converter: {said}. {command} --output_dir NEW makes its file"


def own_verdict(client: Client, found: Found) -> str:
    """What one program makes of a folder."""
    convert = f"python -m glm_models.convert --mode {found.mode} --model_path {found.folder}"
    if found.kind == ADAPTER:
        return adapter_verdict(client, found)
    if found.kind == NATIVE_FORM:
        if not client.native:
            return f"does not serve it: it has no {NATIVE} with this tokenizer; back: {convert} --output_dir NEW"
        return missing_parts(found, NATIVE_KEYS, TOKENIZER_FILES, "convert the official folder again")
    if found.mode not in client.families:
        if client.native and found.mode != "glm" and found.kind != PTUNING:
            return f"does not serve this form; {convert} --output_dir NEW makes one that it serves"
        return f"does not serve it: {no_family(client, found)}"
    if found.kind == PTUNING and found.mode not in client.prefix:
        return "does not serve it: it has no place for the P-Tuning prefix, or leaves it out without a word"
    if wrong := misread(client, found.config, found.mode):
        other = f"; {convert} --output_dir NEW makes one that it serves" if client.native else ""
        return f"does not serve it: {wrong}{other}"
    keys = GLM_NETWORK if found.mode == "glm" and client.keys else client.keys
    files = (*client.files, FAMILIES[found.mode].vocabulary) if client.files else ()
    code = f"take the files from the official {FAMILIES[found.mode].title} folder, and train or merge from it"
    if (problem := missing_parts(found, keys, files, code, client)) != SERVES:
        return problem
    if client.fast and not set(TOKENIZER_FILES) <= found.files:
        lost = ", ".join(name for name in TOKENIZER_FILES if name not in found.files)
        return (
            f"lacks tokenizer files ({lost}): {convert} --tokenizer_only --output_dir NEW makes them; serve with "
            "--tokenizer NEW (SGLang: --tokenizer-path NEW)"
        )
    return SERVES


SERVES = "serves it as it is"


def no_family(client: Client, found: Found) -> str:
    """Why a program does not serve a family."""
    if found.kind == PTUNING:
        return "it has no place for the P-Tuning prefix"
    if found.mode == "glm":
        return "it does not know the network of ChatGLM-6B"
    return f"it knows the vocabulary of {' and '.join(FAMILIES[mode].title for mode in client.families)} alone"


def misread(client: Client, config: dict, mode: str) -> str:
    """What a program would compute in another way than the official code."""
    if mode == "glm" or not client.scales_base:
        return ""
    if mode == "glm2" and config.get("rope_ratio", 1) != 1:
        return "it reads rope_ratio as ChatGLM3 does and would answer wrongly"
    if config.get("multi_query_attention") is False:
        return "multi_query_attention is false, and it reads query_key_value in the other layout"
    sizes = [config.get(key) for key in ("kv_channels", "num_attention_heads", "hidden_size")]
    if all(isinstance(size, int) for size in sizes) and sizes[0] * sizes[1] != sizes[2]:
        return "kv_channels is not hidden_size / num_attention_heads"
    return ""


def missing_parts(found: Found, keys, files, remedy: str, client: Client | None = None) -> str:
    """What a folder lacks of keys and files, and the remedy; SERVES if nothing."""
    lost = [f"config.json: {key}" for key in keys if key not in found.config]
    lost += [name for name in files if name not in found.files]
    if client is not None:
        there = found.config.get("architectures") or []
        auto_map = found.config.get("auto_map") or {}
        lmdeploy = str(auto_map.get("AutoModelForCausalLM")).rpartition(".")[2] in client.architectures
        if found.mode != "glm" and client.architectures and not {*there} & {*client.architectures} and not lmdeploy:
            lost.append(f"config.json: architectures with {' or '.join(client.architectures)}")
        lost += [f"config.json: auto_map with {key}" for key in client.auto_map if key not in auto_map]
        if client.files and "auto_map" not in found.tokenizer:
            lost.append("tokenizer_config.json: auto_map")
        name = str(found.config.get("_name_or_path"))
        if "_name_or_path" in keys and "_name_or_path" in found.config and "THUDM/chatglm3-6b" not in name:
            lost.append("config.json: _name_or_path with THUDM/chatglm3-6b")
    return f"lacks {', '.join(lost)}: {remedy}" if lost else SERVES


def adapter_verdict(client: Client, found: Found) -> str:
    """What a program makes of a LoRA adapter."""
    if not client.adapters:
        return "reads adapters through peft; see there"
    lost = [key for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in found.config]
    if lost:
        return f"lacks adapter_config.json: {', '.join(lost)}: save the adapter again"
    if client.fast and client.name.startswith("vLLM"):
        for key in ("use_dora", "modules_to_save", "lora_bias"):
            if found.config.get(key):
                return f"does not serve it: {key} in adapter_config.json; merge it (merge_lora.py)"
        return "serves it beside its base (--enable-lora), which is checked on its own"
    if client.name.startswith(("SGLang", "LMDeploy")):
        return "was not looked up for adapters; merge it (merge_lora.py)"
    return "takes it beside its base, which is checked on its own"


def peft_verdict(found: Found) -> str:
    """Which versions of peft read an adapter."""
    more = sorted(found.config.keys() - PEFT_KEYS)
    if more:
        return f"0.14 to 0.21 read it; 0.6 to 0.13 refuse the keys {', '.join(more)}, 0.5 does not act on them"
    return "0.5 to 0.21 read it"
