"""Networks that hold one module's weights at a time, to compare the logits of models larger than the memory."""

import ctypes
from collections.abc import Callable

import torch
from torch import nn

from . import MODE
from .checkpoint import CheckpointError, weight_shapes
from .pretrained import check_prefix

# Questions for the comparison of two models, put into the family's template.
QUESTIONS = (
    "你好，请用一句话介绍一下你自己。",
    "抽取下面文本里的部件和故障：发动机怠速不稳，拆开水泵以后发现密封圈老化。",
    "What should be checked first when the engine does not start on a cold morning?",
    "写一个 Python 函数，返回列表中最大的两个数。",
)


def return_freed_memory() -> None:
    """Have malloc give blocks of 1 MiB and more back to the system as soon as they are freed.

    glibc raises that limit to 32 MiB as blocks are freed; what is smaller then stays in a heap that only grows: 0.3 GB
    for each network of 2 GB. (An option of mallopt(3); other C libraries have none.)
    """
    libc, mmap_threshold = ctypes.CDLL(None), -3
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**20)


def meta_network(mode: str, folder: str, **config) -> nn.Module:
    """The network that a folder's config.json describes, on the meta device, in eval mode.

    Args:
        config: keys of config.json to override.

    Raises:
        CheckpointError: config.json is broken.
    """
    config = MODE[mode].config.from_pretrained(folder, **config)
    with torch.device("meta"):
        return MODE[mode].model(config).eval().requires_grad_(False)


def skeleton(mode: str, folder: str, **config) -> nn.Module:
    """`meta_network` of a folder that has its weights.

    Raises:
        CheckpointError: the weights do not fit config.json.
    """
    model = meta_network(mode, folder, **config)
    found = weight_shapes(folder)
    check_prefix(folder, model.config, found)
    check_names(folder, model, found)
    return model


def check_names(folder: str, model: nn.Module, found: dict[str, torch.Size]) -> None:
    """Check that a folder's weights are those of a network.

    Args:
        found: the shapes of the folder's weights, by name.

    Raises:
        CheckpointError: one is missing, unknown or of another shape.
    """
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if name.endswith("inv_freq") or (name not in found and name in tied_weights(model)):
            continue
        if expected.get(name) != found.get(name):
            asked, there = (list(of[name]) if name in of else "nothing" for of in (expected, found))
            raise CheckpointError(f"{folder}: {name} is {there}, its config.json expects {asked}")


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Weights that share the memory of others, with the names of these: an output layer tied to the embedding."""
    return (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


@torch.no_grad()
def stream_logits(
    model: nn.Module, batch, read: Callable[[str], torch.Tensor], change: Callable | None = None
) -> torch.Tensor:
    """Logits of all tokens of a batch, padding left out: [tokens, vocabulary].

    Each module reads its weights when it is called, and frees them after.

    Args:
        model: on the meta device.
        batch: input_ids, attention_mask and position_ids, as from the tokenizer's `pad`.
        read: name of a weight -> the weight. If it is not float32, it is converted some rows at a time.
        change: (module, name of its weight, input, output) -> output, of the modules that have weights.
    """

    def fill(module: nn.Module, prefix: str) -> None:
        for key, _ in list(module.named_parameters(recurse=False)):
            weight = read(prefix + key)
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                weight = weight.float()
            setattr(module, key, nn.Parameter(weight, requires_grad=False))

    def empty(module: nn.Module, prefix: str, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.float()  # of an embedding
        if change is not None:
            output = change(module, prefix + "weight", inputs[0], output)
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
        return output

    for name, module in model.named_modules():
        if list(module.named_parameters(recurse=False)):
            prefix = name + "."
            if isinstance(module, nn.Linear):
                module.forward = lambda x, module=module: linear_by_rows(x, module.weight, module.bias)
            module.register_forward_pre_hook(lambda m, _, prefix=prefix: fill(m, prefix))
            module.register_forward_hook(lambda m, inputs, out, prefix=prefix: empty(m, prefix, inputs, out))
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


ROWS = 2**24  # values of a weight that are float32 at a time: 64 MiB


def linear_by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer [out, in] in float32, without a copy of the whole weight in float32."""
    rows, output = max(1, ROWS // weight.shape[1]), x.new_empty(*x.shape[:-1], len(weight))
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        output[..., some] = nn.functional.linear(x, weight[some].float(), None if bias is None else bias[some].float())
    return output


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: -0.0 is not 0.0, and a NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def rms(x: torch.Tensor) -> float:
    """Root mean square."""
    return x.square().mean().sqrt().item()


def differences(found: torch.Tensor, expected: torch.Tensor, note: str = "") -> str:
    """How far logits [tokens, vocabulary] of QUESTIONS differ, as text."""
    difference = found - expected
    same = (found.argmax(-1) == expected.argmax(-1)).sum().item()
    return (
        f"{len(QUESTIONS)} prompts, {len(found)} tokens: "
        f"they differ by at most {difference.abs().max():.2g}, root mean square {rms(difference):.2g}{note}; "
        f"the largest is {expected.abs().max():.3g}; "
        f"the likeliest next token is the same for {same} of {len(found)}"
    )
