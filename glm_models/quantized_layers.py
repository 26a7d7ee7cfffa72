"""bitsandbytes' linear layers as this project uses them: see QuantizedLinear. Needs the package bitsandbytes."""

import bitsandbytes as bnb
import torch

from .quantized import QuantizedLinear

BLOCK = 64  # weights that share a scale; QLoRA's value
with torch.device("cpu"):  # bitsandbytes makes a table at its first use and keeps it: on the meta device an empty one
    bnb.functional.quantize_blockwise(torch.zeros(1))

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # types that bitsandbytes quantises


def as_float(weight: torch.Tensor) -> torch.Tensor:
    return (weight if weight.dtype in FLOATS else weight.float()).contiguous()


class Linear4bit(QuantizedLinear, bnb.nn.Linear4bit):
    """nf4: 4 bits a weight; a scale of 8 bits for 64 weights, and one of 32 bits for 256 of these scales (QLoRA)."""

    def __init__(self, size: int, out: int, bias: bool, dtype: torch.dtype):
        bnb.nn.Linear4bit.__init__(self, size, out, bias, compute_dtype=dtype, quant_type="nf4", device="meta")
        # in prediction on some CPUs bitsandbytes would pack weights anew, for a product in bfloat16 without gradient
        self.support_avx512bf16_for_cpu = False

    def quantize(self, weight):
        packed, state = bnb.functional.quantize_4bit(
            as_float(weight), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        state.dtype = self.compute_dtype
        self.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True
        )
        self.quant_state = state

    def dequantized(self, dtype):
        state, numbers = self.quant_state, self.in_features * self.out_features
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
        scales += state.offset
        # as rows of one block: of longer rows that end within a block, bitsandbytes' code for CPUs mixes up the scales
        rows = (numbers // BLOCK, BLOCK) if numbers % BLOCK == 0 else (1, numbers)
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.weight.data.view(-1, 1), scales, BLOCK, "nf4", rows, dtype
        )
        return flat.view(self.out_features, self.in_features)

    def stored(self):
        state = self.quant_state
        scales = [state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
        return [self.weight.data, *scales]

    def infer(self, x):
        # a GPU has kernels that multiply a few tokens without dequantising the whole weight
        return bnb.nn.Linear4bit.forward(self, x) if x.is_cuda else super().infer(x)


class Linear8bit(QuantizedLinear, bnb.nn.Linear8bitLt):
    """int8: 8 bits a weight, and a scale of 32 bits for each row. Inputs are not quantised."""

    def __init__(self, size: int, out: int, bias: bool, dtype: torch.dtype):
        bnb.nn.Linear8bitLt.__init__(self, size, out, bias, has_fp16_weights=False, device="meta")
        self.compute_dtype = dtype

    def quantize(self, weight):
        values, self.state.SCB, _ = bnb.functional.int8_vectorwise_quant(as_float(weight).to(torch.float16))
        self.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)

    def dequantized(self, dtype):
        return self.weight.data.to(dtype).mul_(self.state.SCB[:, None] / 127)

    def stored(self):
        return [self.weight.data, self.state.SCB]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.state.SCB = self.state.SCB.to(self.weight.device)  # no buffer: it stays in float32
        return self


KINDS = {4: Linear4bit, 8: Linear8bit}
