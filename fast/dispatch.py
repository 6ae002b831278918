"""When a twin stands in for its formula.

The only file of fast/ that uses private names of PyTorch.
"""

import contextlib
import functools
from contextvars import ContextVar
from typing import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

TWINS: dict[str, Callable] = {}  # the accelerated functions, by the name of their formula

_enabled = ContextVar("fast.enabled", default=True)


def accelerated(by: Callable) -> Callable:
    """Decorate a formula: its twin `by` stands in for it in an ordinary eager call on a CPU.

    The twin takes the formula and then its arguments. It returns NotImplemented where it does not
    pay.
    """
    def decorate(formula: Callable) -> Callable:
        @functools.wraps(formula)
        def function(*args):
            if is_plain(*args):
                result = by(formula, *args)
                if result is not NotImplemented:
                    return result
            return formula(*args)

        function.formula, function.twin = formula, by
        TWINS[formula.__name__] = function
        return function

    return decorate


@contextlib.contextmanager
def disabled():
    """Compute by the formulas alone, in this thread."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def is_plain(*args) -> bool:
    """Whether this is an ordinary eager call on ordinary CPU tensors.

    It is not under torch.compile, torch.export, torch.jit.trace, torch.func transforms,
    forward-mode AD and dispatch modes (fake tensors, FLOP counters), and for subclasses of Tensor:
    these look inside the computation.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not _enabled.get()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or any(
            type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu"
            for x in args if isinstance(x, Tensor)
        )
    )


def needs_formula(grad: Tensor) -> bool:
    """In a backward pass: whether `grad` will be differentiated, or is a batch of gradients."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def gradients(
    formula: Callable, inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """Autograd's gradients of ``formula(*inputs)``, None for inputs that are not `needed`."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one input can depend on another, and that path is not this function's.
        inputs = [
            None if x is None else x.view_as(x) if differentiable else x.detach().requires_grad_()
            for x in inputs
        ]
        wanted = [x for x, need in zip(inputs, needed) if need]
        y = formula(*inputs)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=differentiable))
    return [next(found) if need else None for need in needed]


def gradient_of_linear(formula: Callable, shape: torch.Size, grad: Tensor) -> Tensor:
    """Autograd's gradient of a linear function of one tensor: the same at every tensor."""
    zeros = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    return torch.func.vjp(formula, zeros)[1](grad)[0]
