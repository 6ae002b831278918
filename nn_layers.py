"""Gauge equivariant layers on the Möbius strip, in the habits of torch.nn.

    transport_pad     pads a feature map over the cut by parallel transport
    MobiusConv        convolution with steerable (reflection equivariant) kernels
    EquivNonlin       a nonlinearity for each field type
    MobiusPool        2 x 2 pooling for each field type
    MobiusPadNaive    padding for conventional CNNs, which know nothing of frames

Every equivariant layer keeps the field types that it maps between as `in_fields` and `out_fields`.
Feature maps have the shape ``(N, C, W, L)`` and the channel layout of `fields.py`.

Source: arXiv:2106.06020, Section 5.
"""

from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fields import (
    REPRESENTATIONS,
    Fields,
    as_fields,
    as_integer,
    check_features,
    check_strip,
    cross_cut,
    interleave,
    map_pointwise,
)


def transport_pad(x: Tensor, pad: int, fields) -> Tensor:
    """Pad a feature map so that a convolution can read over the cut.

    Beside the first column stand the last `pad` columns and the other way round, as parallel transport
    over the cut brings them: flipped across the width and acted on by rho(s). Above and below, where the
    strip ends, stand `pad` rows of zeros, also beside the transported columns.

    Args:
        x: feature map ``(N, C, W, L)``.
        pad: number of rows and columns, 0 … L.
        fields: multiplicities ``(m_triv, m_sign, m_reg)`` with C channels in all.

    Returns:
        Tensor of shape ``(N, C, W + 2 pad, L + 2 pad)``.

    Raises:
        ValueError: if `x` is not 4-d with C channels, or `pad` is out of its range.
    """
    fields = as_fields(fields)
    check_features(x, fields)
    pad, length = as_integer(pad, "pad"), x.shape[3]
    if not 0 <= pad <= length:
        raise ValueError(f"padding by {pad} columns needs a strip of at least that length, got L = {length}")
    # narrow, not x[..., -pad:], which is everything when pad is 0.
    left = cross_cut(x.narrow(3, length - pad, pad), fields)
    right = cross_cut(x.narrow(3, 0, pad), fields)
    return F.pad(torch.cat([left, x, right], dim=3), (0, 0, pad, pad))


def _odd_kernel_size(kernel_size) -> int:
    allowed = "an odd positive integer"
    size = as_integer(kernel_size, "kernel_size", allowed)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel_size must be {allowed}, got {size}")
    return size


# ------------------------------------------------------------------------------------------------------
# Steerable kernels: K(s.v) = rho_out(s) K(v) rho_in(s)^-1, where s.v flips the kernel's width axis (dim 2).
# One half of such a kernel determines the other. What is stored of a block, and how the whole follows:


def _symmetric(upper: Tensor) -> Tensor:
    """K(s.v) = K(v): stored are the upper rows and the centre row."""
    return torch.cat([upper, upper.narrow(2, 0, upper.shape[2] - 1).flip(2)], dim=2)


def _antisymmetric(upper: Tensor) -> Tensor:
    """K(s.v) = -K(v): stored are the upper rows; the centre row is its own negative, thus zero."""
    o, i, _, k = upper.shape
    return torch.cat([upper, upper.new_zeros(o, i, 1, k), -upper.flip(2)], dim=2)


def _to_regular(first: Tensor, in_type: str) -> Tensor:
    """K₂(v) = K₁(s.v) rho_in(s): stored is the part K₁ that maps to the first channel of the output field."""
    return interleave(first, REPRESENTATIONS[in_type].rho_s(first.flip(2)), dim=0)


def _from_regular(first: Tensor, sign: int) -> Tensor:
    """K₂(v) = ± K₁(s.v): stored is the part K₁ that reads the first channel of the input field."""
    return interleave(first, sign * first.flip(2), dim=1)


class SteerableBlock(NamedTuple):
    """columns: stored input channels for each input field. rows: stored rows of k. expand: stored -> block."""

    columns: int
    rows: Callable[[int], int]
    expand: Callable[[Tensor], Tensor]


STEERABLE_BLOCKS = {
    # (in, out)      columns  rows stored of k     the whole block
    ("triv", "triv"): SteerableBlock(1, lambda k: k // 2 + 1, _symmetric),
    ("sign", "triv"): SteerableBlock(1, lambda k: k // 2, _antisymmetric),
    ("reg", "triv"): SteerableBlock(1, lambda k: k, partial(_from_regular, sign=1)),
    ("triv", "sign"): SteerableBlock(1, lambda k: k // 2, _antisymmetric),
    ("sign", "sign"): SteerableBlock(1, lambda k: k // 2 + 1, _symmetric),
    ("reg", "sign"): SteerableBlock(1, lambda k: k, partial(_from_regular, sign=-1)),
    ("triv", "reg"): SteerableBlock(1, lambda k: k, partial(_to_regular, in_type="triv")),
    ("sign", "reg"): SteerableBlock(1, lambda k: k, partial(_to_regular, in_type="sign")),
    ("reg", "reg"): SteerableBlock(2, lambda k: k, partial(_to_regular, in_type="reg")),
}


class MobiusConv(nn.Module):
    """Convolution on the Möbius strip, equivariant under reflections of the frames and under isometries.

    The kernel is expanded from its free parameters such that K(s.v) = rho_out(s) K(v) rho_in(s)^-1, the
    input is padded by parallel transport, and a plain convolution follows.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)`` of the input.
        out_fields: multiplicities of the output.
        kernel_size: odd and positive.
        device, dtype: of the parameters.

    Shape:
        ``(N, C_in, W, L)`` to ``(N, C_out, W, L)``, for any W and any L >= kernel_size // 2.

    Parameters:
        weights_{in}2{out}: the free values of one block of the kernel, for in, out of triv, sign, reg, where
            both have fields. For o output and i input fields: ``(o, i, k//2 + 1, k)`` triv2triv, sign2sign;
            ``(o, i, k//2, k)`` triv2sign, sign2triv; ``(o, 2 i, k, k)`` reg2reg; ``(o, i, k, k)`` the others.
        bias_triv, bias_reg: one value for each output field, ``(m_triv,)`` and ``(m_reg,)``.

    Raises:
        ValueError: for a kernel size or multiplicities that are not allowed; in `forward`, for an input that
            is not 4-d, does not have C_in channels or has L < kernel_size // 2.

    Source: arXiv:2106.06020, Section 5.
    """

    def __init__(self, in_fields, out_fields, kernel_size: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.in_fields = as_fields(in_fields, "in_fields")
        self.out_fields = as_fields(out_fields, "out_fields")
        self.kernel_size = k = _odd_kernel_size(kernel_size)

        def new_parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self._blocks = {}  # output type -> input types, in the order of the channels
        for out_type, o in zip(REPRESENTATIONS, self.out_fields):
            if not o:
                continue
            self._blocks[out_type] = [name for name, i in zip(REPRESENTATIONS, self.in_fields) if i]
            for in_type in self._blocks[out_type]:
                block = STEERABLE_BLOCKS[in_type, out_type]
                i = getattr(self.in_fields, in_type)
                shape = (o, block.columns * i, block.rows(k), k)
                self.register_parameter(f"weights_{in_type}2{out_type}", new_parameter(*shape))
            if REPRESENTATIONS[out_type].invariant_bias:
                self.register_parameter(f"bias_{out_type}", new_parameter(o))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from N(0, std²) with std = 2 / sqrt(k² (C_in + C_out)), biases zero."""
        fan = self.kernel_size**2 * (self.in_fields.channels + self.out_fields.channels)
        for name, parameter in self.named_parameters():
            if name.startswith("weights"):
                nn.init.normal_(parameter, std=2 / fan**0.5)
            else:
                nn.init.zeros_(parameter)

    def expand_kernel(self) -> Tensor:
        """The steerable kernel, of shape ``(C_out, C_in, k, k)``."""
        rows = []
        for out_type, in_types in self._blocks.items():
            row = [
                STEERABLE_BLOCKS[in_type, out_type].expand(getattr(self, f"weights_{in_type}2{out_type}"))
                for in_type in in_types
            ]
            rows.append(torch.cat(row, dim=1))
        return torch.cat(rows, dim=0)

    def expand_bias(self) -> Tensor | None:
        """The invariant bias, rho(s) b = b, of shape ``(C_out,)``; None where all output fields are sign-flip."""
        biases = {name: getattr(self, f"bias_{name}", None) for name in self._blocks}
        given = [bias for bias in biases.values() if bias is not None]
        if not given:
            return None
        parts = []
        for name, bias in biases.items():
            rep = REPRESENTATIONS[name]
            if bias is None:
                parts.append(given[0].new_zeros(rep.dim * getattr(self.out_fields, name)))
            else:
                parts.append(rep.invariant_bias(bias))
        return torch.cat(parts)

    def forward(self, x: Tensor) -> Tensor:
        padded = transport_pad(x, self.kernel_size // 2, self.in_fields)
        return F.conv2d(padded, self.expand_kernel(), self.expand_bias())

    def extra_repr(self) -> str:
        return f"{tuple(self.in_fields)}, {tuple(self.out_fields)}, kernel_size={self.kernel_size}"


class EquivNonlin(nn.Module):
    """Gauge equivariant nonlinearity: ELU on trivial and regular fields, an odd function on sign-flip fields.

    Trivial and regular fields: ELU(x), which commutes with a permutation of channels.
    Sign-flip fields: sign(x) ELU(|x| + b) with a learnable b for each field, which commutes with a change of
    sign; sign(0) = 0. It is the identity at b = 0, where training begins.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.
        device, dtype: of the parameters.

    Shape:
        ``(N, C, W, L)`` to the same.

    Parameters:
        bias_sign: b, of shape ``(1, m_sign, 1, 1)``, at first 0; none where m_sign = 0.

    Raises:
        ValueError: for multiplicities that are not allowed; in `forward`, for an input that is not 4-d with
            C channels.

    Source: arXiv:2106.06020, Section 5.
    """

    def __init__(self, in_fields, *, device=None, dtype=None) -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")
        shape = (1, self.in_fields.sign, 1, 1)
        self.register_parameter(
            "bias_sign",
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if self.in_fields.sign else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """b = 0."""
        if self.bias_sign is not None:
            nn.init.zeros_(self.bias_sign)

    def _odd_elu(self, x: Tensor) -> Tensor:
        return x.sign() * F.elu(x.abs() + self.bias_sign)

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_fields)
        return map_pointwise(x, self.in_fields, F.elu, self._odd_elu)

    def extra_repr(self) -> str:
        return f"{tuple(self.in_fields)}"


def _signed_max_pool(x: Tensor, **alignment) -> Tensor:
    """The entry of largest magnitude in each window, with its sign; the positive one of +a and -a."""
    largest, smallest = F.max_pool2d(x, 2, **alignment), -F.max_pool2d(-x, 2, **alignment)
    return torch.where(largest >= -smallest, largest, smallest)


class MobiusPool(nn.Module):
    """2 x 2 pooling with stride 2 that respects the field types and goes on over the cut.

    Trivial and regular fields: the maximum. Sign-flip fields: the entry of largest magnitude with its sign.

    Where L is odd, the last window takes its second column over the cut. Where W is odd, windows aligned to
    one edge of the strip would not be windows of the reflected strip: it pools twice, aligned to the top and
    to the bottom edge, with the row left over in a window of its own, and averages the two.

    Exactly gauge equivariant (but for windows of a sign-flip field that hold both +a and -a as the largest);
    equivariant under isometries by an even shift where L is even.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, ceil(W / 2), ceil(L / 2))``.

    Raises:
        ValueError: for multiplicities that are not allowed; in `forward`, for an input that is not 4-d with
            C channels.

    Source: arXiv:2106.06020, Section 5.
    """

    def __init__(self, in_fields) -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")

    def _pool(self, x: Tensor, **alignment) -> Tensor:
        max_pool = partial(F.max_pool2d, kernel_size=2, **alignment)
        return map_pointwise(x, self.in_fields, max_pool, partial(_signed_max_pool, **alignment))

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_fields)
        width, length = x.shape[2:]
        if length % 2:
            x = torch.cat([x, cross_cut(x.narrow(3, 0, 1), self.in_fields)], dim=3)
        if width % 2 == 0:
            return self._pool(x)
        # max_pool2d's own padding is -inf and never wins. Halved first, the sum cannot overflow.
        return self._pool(x, ceil_mode=True) / 2 + self._pool(x, padding=(1, 0)) / 2

    def extra_repr(self) -> str:
        return f"{tuple(self.in_fields)}"


class MobiusPadNaive(nn.Module):
    """Padding over the cut for conventional CNNs: flipped across the width, no action on the channels.

    It treats every channel as a scalar, which is right for no kernel that is not symmetric: CNNs with it are
    the baselines that show what equivariance is for.

    Args:
        kernel_size: of the convolution that follows, odd and positive.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, W + 2 (k//2), L + 2 (k//2))``, for any W and any L >= k // 2.

    Raises:
        ValueError: for a kernel size that is not allowed; in `forward`, for an input that is not 4-d or has
            L < kernel_size // 2.

    Source: arXiv:2106.06020, Section 5.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = _odd_kernel_size(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        check_strip(x)
        return transport_pad(x, self.kernel_size // 2, Fields(x.shape[1], 0, 0))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"
