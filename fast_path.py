"""When a gradient that is written out may stand in for autograd's, and what to do where it may not.

Some layers compute faster than by their plain formula, in an `autograd.Function` with a gradient of its own. PyTorch's
tools that look inside a computation (compilers, exporters, function transforms) are given the formula instead.
"""

from typing import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_plain(*tensors: Tensor) -> bool:
    """Whether this is an ordinary eager call on ordinary tensors.

    It is not under torch.compile, torch.export, torch.jit.trace, torch.func transforms, forward mode AD and dispatch modes
    (as of fake tensors or of a FLOP counter), and for subclasses of Tensor.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def needs_formula(grad: Tensor) -> bool:
    """In a backward pass: whether the gradient will itself be differentiated, or comes as a batch of gradients."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def gradients(formula: Callable, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], grad: Tensor) -> list[Tensor | None]:
    """Autograd's gradients of ``formula(*inputs)`` for the inputs that are `needed`, None for the others."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Other names for the inputs: one can depend on another, and that path is not this function's.
        inputs = [None if x is None else x.view_as(x) if differentiable else x.detach().requires_grad_() for x in inputs]
        wanted = [x for x, need in zip(inputs, needed) if need]
        found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=differentiable))
    return [next(found) if need else None for need in needed]
