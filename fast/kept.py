"""Expanded kernels that are kept while no gradient is recorded."""

import functools
import weakref
from typing import Callable

import torch
from torch import nn

from fast.dispatch import is_plain

_KEPT = weakref.WeakKeyDictionary()  # module -> (values of its parameters, result of expand())


def kept_without_gradients(expand: Callable) -> Callable:
    """Decorate a method that computes tensors from a module's parameters, named by its
    `parameter_names`.

    While no gradient is recorded, it computes anew only when a parameter has another value. Values
    are compared, since version counters miss edits by ``.data`` and by NumPy; that is some hundred
    times cheaper than a convolution. What is kept has a dictionary `derived`, for what else is
    computed from it.
    """
    @functools.wraps(expand)
    def keeping(module: nn.Module):
        parameters = [getattr(module, name) for name in module.parameter_names]
        recorded = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if recorded or not is_plain(*parameters):
            return expand(module)
        kept = _KEPT.get(module)
        if kept is None or not all(map(_same, parameters, kept[0])):
            # Tensors made in inference mode could not take part in autograd outside of it.
            with torch.inference_mode(False), torch.no_grad():
                kept = _KEPT[module] = [p.detach().clone() for p in parameters], expand(module)
            for tensor in kept[1]:
                if tensor is not None:
                    tensor.derived = {}
        return kept[1]

    return keeping


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
