"""Operations for which plain autograd would keep more tensors than the backward pass needs.

Each computes the same as a plain expression, keeps at most one tensor for the backward pass, and recomputes the others
there, which costs a few passes over memory and no matrix product.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (weight * (x32 * scale)).to(x.dtype)  # rounded once, as in the official models

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            toward = grad.float() * weight
            # no gradient along the normed vector: its length is constant
            along = (toward * normed).mean(-1, keepdim=True)
            grad_x = toward.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, rounded once; keeps only x."""
    if x.is_cuda:  # one kernel forward and one or two backward, which keep the same; only CUDA has them
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        toward = grad * up
        # in place of x, the widest tensor: nothing else needs it, and autograd refuses a second backward pass
        torch.mul(F.silu(gate), grad, out=up)
        torch.ops.aten.silu_backward.grad_input(toward, gate, grad_input=gate)
        return x.detach()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension; keeps only x.

    Nothing else may use x: its gradient overwrites it.
    """
    return _SwiGLU.apply(x)


def linear_of_recomputed(function, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(function(x)), where function(x) is not kept for the backward pass but recomputed from x.

    Not for use inside a checkpoint, which has its own hooks on saved tensors: the hooks here would replace them.
    """
    middle = function(x)
    storage, numbers = middle.untyped_storage()._cdata, middle.numel()

    def pack(tensor):
        whole = tensor.untyped_storage()._cdata == storage and tensor.numel() == numbers
        return tensor.shape if whole else tensor

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        with torch.no_grad():
            return function(x).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return module(middle)


class _AddedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, x, weight, scale):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        # detached: autograd refuses to change the output of another function in place, which it is under ZeRO-3
        total = total.detach()
        total.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t(), alpha=scale)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        tokens, rows, nothing = grad.flatten(0, -2), x.flatten(0, -2), grad.new_empty(())
        grad_x = grad_weight = None

        def product(a, b):  # of matrices, times the scale
            if grad.device.type != "cpu":
                return torch.addmm(nothing, a, b, beta=0, alpha=ctx.scale)  # beta 0: `nothing` is not read
            # transposed: with so few rows or columns a CPU is three times as fast. But autograd copies such a gradient
            return torch.addmm(nothing, b.t(), a.t(), beta=0, alpha=ctx.scale).t()

        if ctx.needs_input_grad[1]:
            grad_x = product(tokens, weight).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_weight = product(tokens.t(), rows)
        return grad, grad_x, grad_weight, None


def add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """total + scale * x @ weight.t(), for x and weight of a low rank; overwrites `total`, which nothing else may use.

    Args:
        total: [..., out], contiguous.
        x: [..., rank].
        weight: [out, rank].
    """
    return _AddedProduct.apply(total, x, weight, scale)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_skip):
        return torch.add(grad, grad_skip, alpha=ctx.alpha), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, skip, alpha):
        return torch.add(result, skip, alpha=alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, grad, None  # scaled in _Fork


def fork(x: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x for a function, and for the way around it, see `join`; one kernel in the backward pass, where autograd's own
    takes two and keeps one more tensor while it computes the function's gradient.
    """
    return _Fork.apply(x, alpha)


def join(result: torch.Tensor, skip: torch.Tensor, alpha: float) -> torch.Tensor:
    """result + alpha * skip, where skip is the second tensor of `fork` with the same alpha, or some rows of it."""
    return _Join.apply(result, skip, alpha)


def has_fused_dropout(device: torch.device) -> bool:
    """Whether the device has one kernel for the random mask and the product with it; a CPU has none."""
    return device.type != "cpu"


class _DroppedFork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        if has_fused_dropout(x.device):
            dropped, factors = torch.native_dropout(x, p, True)  # factors: bool
            ctx.scale = 1 / (1 - p)
        else:
            factors = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
            dropped, ctx.scale = x * factors, 1
        ctx.save_for_backward(factors)
        return x.view_as(x), dropped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_dropped):
        (factors,) = ctx.saved_tensors
        # into the gradient that the other function has just computed: nothing else uses it
        return torch.addcmul(grad, grad_dropped, factors, value=ctx.scale, out=grad_dropped), None


def fork_dropped(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x for one function, and dropout(x, p) for another, which must be a product: its gradient is overwritten. One
    kernel in the backward pass, where autograd's own takes two.

    Args:
        p: probability of a zero, 0 < p < 1.
    """
    return _DroppedFork.apply(x, p)


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask, one, other):
        ctx.save_for_backward(mask)
        return torch.where(mask, one, other)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        grad_one = grad * mask
        return None, grad_one, grad - grad_one


def choose(mask: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """torch.where, whose own backward pass takes twice as many kernels."""
    return _Choice.apply(mask, one, other)


# Long rows

TILE = 1024  # tokens


class TiledMLP(nn.Module):
    """An MLP that can process TILE tokens at a time and then keeps only its input for the backward pass.

    All tiles are processed in one call of the module: under ZeRO-3 each call gathers the weights from all ranks, and
    ranks have different numbers of tokens. (There it must be a leaf module, see deepspeed.utils.set_z3_leaf_modules.)
    """

    tiled = False

    def transform(self, x: torch.Tensor, in_checkpoint: bool) -> torch.Tensor:
        """The MLP itself: [batch, tokens, hidden] -> the same shape, each token by itself."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, in_checkpoint: bool = False) -> torch.Tensor:
        if not (self.tiled and self.training and torch.is_grad_enabled() and x.shape[1] > TILE):
            return self.transform(x, in_checkpoint)
        parts = [checkpoint(self.transform, part, True, use_reentrant=False) for part in x.split(TILE, dim=1)]
        return torch.cat(parts, dim=1)


def offload_checkpoint_input(x: torch.Tensor):
    """Context for the call of a checkpointed layer: its saved input x is kept in pinned main memory.

    Only the saved copy moves; x itself and its gradient stay on the device. On a CPU this does nothing.
    """
    return contextlib.nullcontext() if x.device.type == "cpu" else offload_saved_tensor(x)


def offload_saved_tensor(x: torch.Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """Context in which autograd saves x, and no other tensor, in main memory."""
    storage, shape = x.untyped_storage()._cdata, x.shape

    def pack(kept: torch.Tensor):
        if kept.untyped_storage()._cdata != storage or kept.shape != shape:
            return kept
        copy = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
        return kept.device, copy.copy_(kept, non_blocking=True)

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        device, copy = packed
        return copy.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# Loss

CHUNK = 2**25  # number of logits computed at a time: 128 MiB in float32


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradients are computed together with the loss, chunk by chunk, so logits are neither kept nor recomputed."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        to_hidden, to_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight) if to_weight else None
        rows, minus_one = max(1, CHUNK // len(weight)), hidden.new_full((1, 1), -1.0, dtype=torch.float32)
        # of each token, in float32: the target's logit, and the sum of all exp(logit)
        target_logits, sums = hidden.new_empty((2, len(hidden), 1), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            target, whole = targets[start : start + rows, None], sums[start : start + rows]
            logits = (part @ weight.t()).float()
            logits -= logits.amax(-1, keepdim=True)
            torch.gather(logits, -1, target, out=target_logits[start : start + rows])
            torch.sum(logits.exp_(), -1, keepdim=True, out=whole)
            if not (to_hidden or to_weight):
                continue
            # probability, minus 1 at the target; in float32, because the difference is small where the model is sure
            logits.div_(whole).scatter_add_(-1, target, minus_one.expand_as(target))
            grad = logits.to(hidden.dtype)
            del logits
            if to_hidden:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if to_weight:
                grad_weight.addmm_(grad.t(), part)
            del grad
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (sums.log_() - target_logits).sum(dtype=torch.float64).float()  # float64: there may be a million tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # in place, because grad_weight is as large as the output layer; the factor is in float32, not rounded before
        return *(saved if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors), None


class OutputLayer(nn.Linear):
    """From hidden states to logits; with targets, to the summed loss, without holding all logits in memory."""

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]; with targets [n] of hidden states [n, hidden] the
        cross entropy in float32, summed."""
        if targets is None:
            return super().forward(hidden_states)
        # requires_grad of a weight is also true while gradients are disabled
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _SummedCrossEntropy.apply(hidden_states, weight, targets)


def summed_cross_entropy(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy, in float32, of the logits head(hidden_states [n, hidden]), chunk by chunk.

    For a head that is not an OutputLayer (for example with LoRA), each chunk is recomputed in the backward pass.
    """
    if isinstance(head, OutputLayer):
        return head(hidden_states, targets)

    def loss(part, target):
        return F.cross_entropy(head(part).float(), target, reduction="sum")

    chunks = max(1, -(-len(targets) * head.out_features // CHUNK))
    if any(hasattr(p, "ds_id") for p in head.parameters()):
        # ZeRO-3 gathers weights from all ranks at every call, so all ranks need the same number of chunks, some empty
        maximum = torch.tensor(chunks, device=targets.device)
        torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
        chunks = maximum.item()
    parts = zip(hidden_states.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()
