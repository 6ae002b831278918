"""Twins of padding, nonlinearity and pooling: the same numbers with fewer passes over memory."""

import math
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fast.dispatch import gradient_of_linear, gradients, needs_formula
from fields import (
    Fields, cross_cut, largest_magnitude, sample_norms, sign_beyond_rounding, sign_channels,
    signed_extremum,
)


# --------------------------------------------------------------------------------------------------
# Transport padding


def pad_columns(formula: Callable, x: Tensor, pad: int, fields: Fields) -> Tensor:
    return _PadColumns.apply(x, partial(formula, pad=pad, fields=fields), pad, fields) if pad else x


class _PadColumns(Function):
    """Autograd's own gradient would fill three feature maps with zeros, to add them up."""

    @staticmethod
    def forward(ctx, x: Tensor, formula: Callable, pad: int, fields: Fields) -> Tensor:
        ctx.formula, ctx.pad, ctx.fields, ctx.shape = formula, pad, fields, x.shape
        return formula(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if needs_formula(grad):
            return gradient_of_linear(ctx.formula, ctx.shape, grad), None, None, None
        pad, fields, length = ctx.pad, ctx.fields, ctx.shape[3]
        # Columns beside the strip are added where they came from; rho(s) is its own transpose.
        inner = grad.narrow(3, pad, length).clone()
        inner.narrow(3, length - pad, pad).add_(cross_cut(grad.narrow(3, 0, pad), fields))
        inner.narrow(3, 0, pad).add_(cross_cut(grad.narrow(3, pad + length, pad), fields))
        return inner, None, None, None


# --------------------------------------------------------------------------------------------------
# Nonlinearity


def equiv_elu(formula: Callable, x: Tensor, b: Tensor, fields: Fields) -> Tensor:
    return _EquivELU.apply(x, b, partial(formula, fields=fields), fields)


class _EquivELU(Function):
    """Keeps its input only.

    ELU is computed everywhere and replaced in sign-flip fields: whole feature maps are read faster
    than some of their channels.
    """

    @staticmethod
    def _parts(b: Tensor, fields: Fields, *tensors: Tensor):
        """b for each pixel, and the sign-flip channels of an eighth of the batch at a time.

        Intermediate results then stay in the cache.
        """
        x = sign_channels(tensors[0], fields)
        # In bfloat16, adding b itself takes 5 times as long.
        bias = torch.empty_like(x[:1]).copy_(b)
        size = max(1, math.ceil(len(x) / 8))
        return bias, zip(*(sign_channels(x, fields).split(size) for x in tensors))

    @staticmethod
    def forward(ctx, x: Tensor, b: Tensor, formula: Callable, fields: Fields) -> Tensor:
        ctx.formula, ctx.fields = formula, fields
        y = torch.empty_like(x) if fields.sign == fields.channels else F.elu(x)
        bias, parts = _EquivELU._parts(b, fields, x, y)
        scales = []
        for x_sign, y_sign in parts:
            magnitude = x_sign.abs()
            scales.append(largest_magnitude(magnitude))
            sign = sign_beyond_rounding(x_sign, scales[-1])
            torch.mul(F.elu_(magnitude.add_(bias)), sign, out=y_sign)
        ctx.save_for_backward(x, b, *scales)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, b, *scales = ctx.saved_tensors
        if needs_formula(grad):
            return *gradients(ctx.formula, (x, b), ctx.needs_input_grad[:2], grad), None, None
        only_sign = ctx.fields.sign == ctx.fields.channels
        if only_sign:
            grad_x = torch.empty_like(x)
        else:
            grad_x = torch.ops.aten.elu_backward(grad, 1, 1, 1, False, x)
        grad_b = torch.zeros_like(b)
        bias, parts = _EquivELU._parts(b, ctx.fields, x, grad, grad_x)
        for (x_sign, grad_sign, grad_x_sign), scale in zip(parts, scales):
            sign = sign_beyond_rounding(x_sign, scale)
            slope = x_sign.abs().add_(bias).clamp_(max=0).exp_()  # ELU'(a) = exp(min(a, 0))
            slope.mul_(sign).mul_(grad_sign)
            grad_b += slope.sum(dim=(0, 2, 3), keepdim=True, dtype=b.dtype)
            torch.mul(slope, sign, out=grad_x_sign)
        return grad_x, grad_b, None, None


# --------------------------------------------------------------------------------------------------
# Pooling


def max_pool(
    formula: Callable, x: Tensor, fields: Fields, stride: tuple[int, int],
    padding: tuple[int, int], ceil_mode: bool,
) -> Tensor:
    if not fields.sign:
        return NotImplemented
    return _MaxPool.apply(x, fields, stride, padding, ceil_mode)


class _MaxPool(Function):
    """Keeps the index of the entry that won each window."""

    @staticmethod
    def forward(
        ctx, x: Tensor, fields: Fields, stride: tuple[int, int], padding: tuple[int, int],
        ceil_mode: bool,
    ) -> Tensor:
        pool = partial(
            F.max_pool2d, kernel_size=2, stride=stride, padding=padding, ceil_mode=ceil_mode,
            return_indices=True,
        )
        y, index = pool(x)
        negated_smallest, at_smallest = pool(-sign_channels(x, fields))
        y_sign, index_sign = sign_channels(y, fields), sign_channels(index, fields)
        # index = at_smallest where the smallest entry wins; arithmetic is several times faster than
        # where()
        index_sign += at_smallest.sub_(index_sign).mul_((y_sign - negated_smallest).signbit())
        y_sign.copy_(signed_extremum(y_sign, negated_smallest))
        ctx.save_for_backward(index, y_sign.sign().square_())
        ctx.fields, ctx.alignment, ctx.shape = fields, (stride, padding, (1, 1), ceil_mode), x.shape
        is_channels_last = x.stride(1) == 1
        ctx.format = torch.channels_last if is_channels_last else torch.contiguous_format
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, is_not_zero = ctx.saved_tensors
        grad = grad.clone()
        sign_channels(grad, ctx.fields).mul_(is_not_zero)
        # Only the shape and the format of the input are read.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(grad, x, (2, 2), *ctx.alignment, index), None, None, None, None


# --------------------------------------------------------------------------------------------------
# Polyphase pooling


def polyphase_pool(formula: Callable, x: Tensor, fields: Fields) -> Tensor:
    """With gradients to record, it shifts by -p and pools: cheaper to differentiate."""
    if x.shape[2] % 2:
        return NotImplemented
    even, odd = _both_grids(x.detach(), fields)
    p = sample_norms(odd) > sample_norms(even)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.where(p[:, None, None, None], odd, even)
    x = _ShiftBack.apply(x, p, fields)
    return _MaxPool.apply(x, fields, (2, 2), (0, 0), False) if fields.sign else F.max_pool2d(x, 2)


def _both_grids(x: Tensor, fields: Fields) -> tuple[Tensor, Tensor]:
    """Pooled from the even and from the odd columns, by comparing whole feature maps."""
    x = torch.cat([x, cross_cut(x.narrow(3, 0, 1), fields)], dim=3)

    def of_windows(x: Tensor) -> Tensor:
        rows = torch.maximum(x[:, :, 0::2], x[:, :, 1::2])
        return torch.maximum(rows[..., :-1], rows[..., 1:])

    windows = of_windows(x)
    if fields.sign:
        largest = sign_channels(windows, fields)
        negated_smallest = of_windows(-sign_channels(x, fields))
        largest.copy_(signed_extremum(largest, negated_smallest))
    return windows[..., 0::2], windows[..., 1::2]


class _ShiftBack(Function):
    """Each sample shifted by -p. Only shifted samples are rearranged."""

    @staticmethod
    def forward(ctx, x: Tensor, p: Tensor, fields: Fields) -> Tensor:
        ctx.save_for_backward(p)
        ctx.fields, ctx.shape = fields, x.shape
        y = x.clone()
        y[p] = _one_column_back(x[p], fields)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (p,), fields = ctx.saved_tensors, ctx.fields
        if needs_formula(grad):
            def formula(x: Tensor) -> Tensor:
                return torch.where(p[:, None, None, None], _one_column_back(x, fields), x)

            return gradient_of_linear(formula, ctx.shape, grad), None, None
        grad_x, some = grad.clone(), grad[p]
        grad_x[p] = torch.cat([cross_cut(some[..., -1:], fields), some[..., :-1]], dim=3)
        return grad_x, None, None


def _one_column_back(x: Tensor, fields: Fields) -> Tensor:
    """The isometry action by a shift of -1."""
    return torch.cat([x[..., 1:], cross_cut(x[..., :1], fields)], dim=3)
