"""Gauge equivariant layers on the Möbius strip, in the habits of torch.nn.

    transport_pad     padding across the cut by parallel transport
    MobiusConv        convolution with steerable (reflection equivariant) kernels
    EquivNonlin       a nonlinearity for each field type
    MobiusPool        2 x 2 pooling for each field type
    MobiusPadNaive    padding for conventional CNNs, which know nothing of frames
    MobiusConvNaive   this padding and nn.Conv2d in one
    TransportPad      transport_pad as a module, for exported networks

Every equivariant layer has the attributes `in_fields` and `out_fields`, the multiplicities
``(m_triv, m_sign, m_reg)`` of the field types that it maps between. Feature maps have the shape
``(N, C, W, L)`` and the channels of `fields.py`.

A function under ``@accelerated`` is the formula. On a CPU, its faster twin in `fast/` may compute
it, equal up to rounding.

Source: arXiv:2106.06020, Section 5.
"""

import copy
import math
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fast
from fast import accelerated, kept_without_gradients
from fields import (
    REPRESENTATIONS,
    Fields,
    as_fields,
    as_integer,
    check_features,
    check_input,
    check_strip,
    cross_cut,
    in_sign_channels,
    interleave,
    largest_magnitude,
    scalars,
    sign_beyond_rounding,
    sign_channels,
    signed_extremum,
    split_types,
)

# --------------------------------------------------------------------------------------------------
# Transport padding (Section 5.4.1, Figure 29)


def transport_pad(x: Tensor, pad: int, fields) -> Tensor:
    """Pad a feature map such that a convolution can read across the cut.

    The left margin holds the last `pad` columns and the right margin the first ones, as parallel
    transport across the cut brings them: flipped across the width and acted on by rho(s). The
    margins above and below, where the strip ends, are zero.

    Args:
        x: feature map ``(N, C, W, L)``.
        pad: number of rows and columns, 0 to L.
        fields: multiplicities ``(m_triv, m_sign, m_reg)`` with C channels in all.

    Returns:
        Tensor of shape ``(N, C, W + 2 pad, L + 2 pad)``.

    Raises:
        ValueError: if `x` is not 4-d with C channels, `pad` is out of its range, or multiplicities
            are not allowed.
    """
    fields = as_fields(fields)
    check_features(x, fields)
    pad = as_integer(pad, "pad")
    check_length(x, pad)
    return F.pad(pad_columns(x, pad, fields), (0, 0, pad, pad))


def check_length(x: Tensor, pad: int) -> None:
    """Raise ValueError unless the strip `x` is long enough to be padded by `pad` columns."""
    if not 0 <= pad <= x.shape[3]:
        raise ValueError(
            f"padding by {pad} columns needs a strip of at least that length, got L = {x.shape[3]}"
        )


@accelerated(by=fast.pad_columns)
def pad_columns(x: Tensor, pad: int, fields: Fields) -> Tensor:
    """The columns of `transport_pad`: ``(N, C, W, L)`` to ``(N, C, W, L + 2 pad)``."""
    last, first = x.narrow(3, x.shape[3] - pad, pad), x.narrow(3, 0, pad)
    left, right = cross_cut(torch.cat([last, first], dim=3), fields).chunk(2, dim=3)
    return torch.cat([left, x, right], dim=3)


# --------------------------------------------------------------------------------------------------
# Steerable kernels (Section 5.3.3, Table 3): K(s.v) = rho_out(s) K(v) rho_in(s)^-1, where s.v flips
# the kernel's width axis (dim 2). For a regular output field this gives the second channel, K₂(v) =
# K₁(s.v) rho_in(s), and leaves the first one, K₁, free. For the others it ties the upper rows of
# the kernel to the lower ones, or the two channels of an input field. The parameters are the free
# values; each function completes them:


def _free(first: Tensor) -> Tensor:
    """The parameters are K₁, the kernel of the first channel of the output field."""
    return first


def _symmetric(upper: Tensor) -> Tensor:
    """K(s.v) = K(v): the parameters are the upper rows and the centre row."""
    return torch.cat([upper, upper.narrow(2, 0, upper.shape[2] - 1).flip(2)], dim=2)


def _antisymmetric(upper: Tensor) -> Tensor:
    """K(s.v) = -K(v): the parameters are the upper rows; the centre row is its own negative: 0."""
    o, i, _, k = upper.shape
    return torch.cat([upper, upper.new_zeros(o, i, 1, k), -upper.flip(2)], dim=2)


def _from_regular(first: Tensor, sign: int) -> Tensor:
    """The parameters are the kernel of the first input channel. Flipped, times `sign`, it is that
    of the second."""
    return interleave(first, sign * first.flip(2), dim=1)


class SteerableBlock(NamedTuple):
    """The parameters of the kernels between two field types.

    channels: how many input channels they have, for each input field.
    rows: how many rows across the width they have, of k.
    complete: from the parameters to the kernels of the first channel of each output field.
    """

    channels: int
    rows: Callable[[int], int]
    complete: Callable[[Tensor], Tensor]


STEERABLE_BLOCKS = {
    # (in, out)            channels  rows        complete
    ("triv", "triv"): SteerableBlock(1, lambda k: k // 2 + 1, _symmetric),
    ("sign", "triv"): SteerableBlock(1, lambda k: k // 2, _antisymmetric),
    ("reg", "triv"): SteerableBlock(1, lambda k: k, partial(_from_regular, sign=1)),
    ("triv", "sign"): SteerableBlock(1, lambda k: k // 2, _antisymmetric),
    ("sign", "sign"): SteerableBlock(1, lambda k: k // 2 + 1, _symmetric),
    ("reg", "sign"): SteerableBlock(1, lambda k: k, partial(_from_regular, sign=-1)),
    ("triv", "reg"): SteerableBlock(1, lambda k: k, _free),
    ("sign", "reg"): SteerableBlock(1, lambda k: k, _free),
    ("reg", "reg"): SteerableBlock(2, lambda k: k, _free),
}


def steerable_kernel(weights: dict[str, Tensor], in_fields: Fields, out_fields: Fields) -> Tensor:
    """The kernel ``(C_out, C_in, k, k)`` from its parameters.

    Args:
        weights: the parameters, under the names of `MobiusConv`.
        in_fields, out_fields: multiplicities.
    """
    out_types = [name for name, o in zip(REPRESENTATIONS, out_fields) if o]
    return torch.cat([_kernel_rows(weights, in_fields, out_type) for out_type in out_types])


def _kernel_rows(weights: dict[str, Tensor], in_fields: Fields, out_type: str) -> Tensor:
    """The rows of the kernel that map to one field type."""
    first = torch.cat([
        STEERABLE_BLOCKS[in_type, out_type].complete(weights[f"weights_{in_type}2{out_type}"])
        for in_type, i in zip(REPRESENTATIONS, in_fields) if i
    ], dim=1)
    if REPRESENTATIONS[out_type].dim == 1:
        return first
    second = cross_cut(first, in_fields)  # K₁(s.v) rho_in(s)
    return interleave(first, second, dim=0)


def invariant_bias(biases: dict[str, Tensor], out_fields: Fields) -> Tensor:
    """The bias ``(C_out,)`` with rho(s) b = b, from one value for each field that can have one."""
    zero = next(iter(biases.values())).new_zeros
    return torch.cat([
        rep.invariant_bias(biases[f"bias_{name}"]) if m and rep.invariant_bias
        else zero(m * rep.dim)
        for (name, rep), m in zip(REPRESENTATIONS.items(), out_fields)
    ])


@accelerated(by=fast.strip_conv)
def strip_conv(
    x: Tensor, kernel: Tensor, bias: Tensor | None, in_fields: Fields, out_fields: Fields
) -> Tensor:
    """Convolution on the strip by a steerable kernel ``(C_out, C_in, k, k)``."""
    pad = kernel.shape[3] // 2
    return F.conv2d(pad_columns(x, pad, in_fields), kernel, bias, padding=(pad, 0))


class MobiusConv(nn.Module):
    """Convolution on the Möbius strip, equivariant under isometries and gauge transformations.

    It expands a steerable kernel, K(s.v) = rho_out(s) K(v) rho_in(s)^-1, from free parameters, pads
    the input by parallel transport and convolves. The output has the size of the input; there is no
    stride and no dilation. A kernel of one pixel does not mix trivial and sign-flip fields.

    The layer commutes with `isometry_action`. Gauge equivariance says that it works alike in every
    frame. In reflected frames the kernel lies on the pixels as K(s.v): convolving
    gauge_transform(x) with K.flip(2) gives gauge_transform(y). (The layer does not commute with
    `gauge_transform`, which leaves the kernel as it is.)

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)`` of the input.
        out_fields: multiplicities of the output.
        kernel_size: odd and positive.
        device, dtype: of the parameters.

    Shape:
        ``(N, C_in, W, L)`` to ``(N, C_out, W, L)``, for any W and any L >= kernel_size // 2.

    Parameters:
        weights_{in}2{out}: free values of one block of the kernel, for in, out of triv, sign, reg,
            where both have fields. For o output and i input fields: ``(o, i, k//2 + 1, k)``
            triv2triv, sign2sign; ``(o, i, k//2, k)`` triv2sign, sign2triv; ``(o, 2 i, k, k)``
            reg2reg; ``(o, i, k, k)`` the others.
        bias_triv, bias_reg: one value for each output field, ``(m_triv,)`` and ``(m_reg,)``.
            Sign-flip fields have no bias: rho(s) b = b holds for b = 0 only.

    Raises:
        ValueError: for a kernel size or multiplicities that are not allowed; in `forward`, for an
            input that is not 4-d and floating point, does not have C_in channels or has
            L < kernel_size // 2.

    Source: arXiv:2106.06020, Sections 5.3.1 (bias) and 5.3.3 (kernels).
    """

    def __init__(self, in_fields, out_fields, kernel_size: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.in_fields = as_fields(in_fields, "in_fields")
        self.out_fields = as_fields(out_fields, "out_fields")
        self.kernel_size = k = _odd_kernel_size(kernel_size)
        self.parameter_names = []

        def add_parameter(name: str, shape: tuple[int, ...]) -> None:
            self.parameter_names.append(name)
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))

        for out_type, o in zip(REPRESENTATIONS, self.out_fields):
            for in_type, i in zip(REPRESENTATIONS, self.in_fields):
                block = STEERABLE_BLOCKS[in_type, out_type]
                if o and i:
                    shape = o, block.channels * i, block.rows(k), k
                    add_parameter(f"weights_{in_type}2{out_type}", shape)
            if o and REPRESENTATIONS[out_type].invariant_bias:
                add_parameter(f"bias_{out_type}", (o,))
        self.has_bias = any(name.startswith("bias") for name in self.parameter_names)
        self.reset_parameters()
        self.register_load_state_dict_post_hook(MobiusConv._after_loading)

    def reset_parameters(self) -> None:
        """Weights from N(0, std²) with std = 2 / sqrt(k² (C_in + C_out)), biases zero."""
        self._find_entries()
        fan = self.kernel_size**2 * (self.in_fields.channels + self.out_fields.channels)
        for name, parameter in self.named_parameters():
            if name.startswith("weights"):
                nn.init.normal_(parameter, std=2 / fan**0.5)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_fields)
        check_length(x, self.kernel_size // 2)
        kernel, bias = self.expand()
        return strip_conv(x, kernel, bias, self.in_fields, self.out_fields)

    @kept_without_gradients
    def expand(self) -> tuple[Tensor, Tensor | None]:
        """The steerable kernel ``(C_out, C_in, k, k)``; the bias ``(C_out,)``, None if it is zero.

        They are `steerable_kernel` and `invariant_bias` of the parameters, as `_find_entries` has
        found them. While no gradient is recorded, the result is kept: do not change it in place.
        """
        values = [getattr(self, name).flatten() for name in self.parameter_names]
        values = torch.cat([values[0].new_zeros(1), *values])
        entries = values.index_select(0, self._source) * self._sign
        c_out, c_in, k = self.out_fields.channels, self.in_fields.channels, self.kernel_size
        kernel, bias = entries.split([c_out * c_in * k**2, c_out])
        return kernel.view(c_out, c_in, k, k), bias if self.has_bias else None

    def _find_entries(self) -> None:
        """Find which parameter each entry of the kernel and the bias is, and with which sign.

        `steerable_kernel` of the numbers 1, 2, ... in place of the parameters says it: an entry
        -7 is minus the seventh, 0 is zero. `expand` then only looks them up, in one operation where
        `steerable_kernel` takes up to 25, each of which is a launch on a GPU.

        The result is no buffer: averages of weights would average it, and DDP would send it round.
        """
        shapes = {name: getattr(self, name).shape for name in self.parameter_names}
        sizes = [shape.numel() for shape in shapes.values()]
        device = next(self.parameters()).device
        numbers = torch.arange(1, 1 + sum(sizes), dtype=torch.int32, device=device).split(sizes)
        labels = {name: n.view(shape) for n, (name, shape) in zip(numbers, shapes.items())}
        kernel = steerable_kernel(labels, self.in_fields, self.out_fields)
        entries = torch.cat([kernel.flatten(), invariant_bias(labels, self.out_fields)])
        self._source, self._sign = entries.abs(), entries.sign().to(torch.int8)

    def _after_loading(self, incompatible_keys) -> None:
        self._find_entries()  # the values may have come to another device

    def _apply(self, fn, recurse: bool = True):
        """As of every module, for .to(), .cuda() and to_empty(); then the entries follow."""
        super()._apply(fn, recurse)
        self._find_entries()
        return self

    def export(self) -> nn.Sequential:
        """An equal layer of a `TransportPad` and an `nn.Conv2d`, with parameters of its own."""
        with torch.no_grad():
            kernel, bias = self.expand()
        conv = nn.utils.skip_init(  # draws no random numbers
            nn.Conv2d, kernel.shape[1], kernel.shape[0], self.kernel_size,
            bias=bias is not None, device=kernel.device, dtype=kernel.dtype,
        )
        conv.load_state_dict({"weight": kernel} | ({} if bias is None else {"bias": bias}))
        conv.requires_grad_(any(p.requires_grad for p in self.parameters()))
        pad = TransportPad(self.in_fields, self.kernel_size // 2)
        return nn.Sequential(pad, conv).train(self.training)

    def extra_repr(self) -> str:
        return f"{tuple(self.in_fields)}, {tuple(self.out_fields)}, kernel_size={self.kernel_size}"


def _odd_kernel_size(kernel_size) -> int:
    allowed = "an odd positive integer"
    size = as_integer(kernel_size, "kernel_size", allowed)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel_size must be {allowed}, got {size}")
    return size


# --------------------------------------------------------------------------------------------------
# Nonlinearity (Section 5.3.2)


@accelerated(by=fast.equiv_elu)
def equiv_elu(x: Tensor, b: Tensor, fields: Fields) -> Tensor:
    """σ ELU(σ x + b). In sign-flip fields σ = sign(x), in all others σ = 1 and b = 0."""
    x_sign = sign_channels(x, fields)
    sign = sign_beyond_rounding(x_sign, largest_magnitude(x_sign.abs()))
    sigma = in_sign_channels(sign, fields, others=1)
    b = in_sign_channels(b.to(x.dtype), fields, others=0)  # under autocast, x decides
    return sigma * F.elu(sigma * x + b)


def smoothed_equiv_elu(x: Tensor, b: Tensor, fields: Fields, sign_eps: float) -> Tensor:
    """`equiv_elu` with x / (|x| + sign_eps) in place of sign(x)."""
    blocks = {name: F.elu(block) for name, block in split_types(x, fields).items()}
    x_sign = sign_channels(x, fields)
    x_sign = x_sign.to(torch.promote_types(x.dtype, torch.float32))  # float16 rounds 1e-8 to 0
    y_sign = x_sign / (x_sign.abs() + sign_eps) * F.elu(x_sign.abs() + b)
    blocks["sign"] = y_sign.to(x.dtype)
    return torch.cat(list(blocks.values()), dim=1)


class EquivNonlin(nn.Module):
    """Gauge equivariant nonlinearity: ELU on trivial and regular fields, an odd function on
    sign-flip fields.

    Trivial and regular fields: ELU(x), which commutes with a permutation of channels. Sign-flip
    fields: sign(x) ELU(|x| + b) with a learnable b for each field, which commutes with a change of
    sign. sign(x) is 0 where |x| is within rounding of 0: at most 64 eps of the sample's largest
    magnitude in these fields (eps of float32 in half precision, where noise can be larger: evaluate
    in float32). Such values become 0 and get no gradient. b starts at 0: then all other values of
    sign-flip fields are unchanged, since ELU(y) = y for y > 0. If all values of a sample's
    sign-flip fields are rounding noise, they are not recognised as noise.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.
        sign_eps: if positive, x / (|x| + sign_eps) in place of sign(x), in the gradient too. The
            published runs had 1e-8. The gradient then has a spike at 0 of height ELU(b) / sign_eps,
            and rounding decides the sign of values that are 0 but for rounding: networks are not
            exactly invariant.
        device, dtype: of the parameters.

    Shape:
        ``(N, C, W, L)`` to the same.

    Parameters:
        bias_sign: b, of shape ``(1, m_sign, 1, 1)``, initially 0; none where m_sign = 0.

    Raises:
        ValueError: for multiplicities that are not allowed, or a `sign_eps` that is negative, not
            finite, or not 0 without sign-flip fields; in `forward`, for an input that is not 4-d
            with C channels, or not floating point.

    Source: arXiv:2106.06020, Section 5.3.2.
    """

    def __init__(self, in_fields, sign_eps: float = 0.0, *, device=None, dtype=None) -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")
        self.sign_eps = as_sign_eps(sign_eps, self.in_fields)
        b = None
        if m_sign := self.in_fields.sign:
            b = nn.Parameter(torch.empty(1, m_sign, 1, 1, device=device, dtype=dtype))
        self.register_parameter("bias_sign", b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """b = 0."""
        if self.bias_sign is not None:
            nn.init.zeros_(self.bias_sign)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_fields)
        if self.bias_sign is None:
            return F.elu(x)
        if self.sign_eps:
            return smoothed_equiv_elu(x, self.bias_sign, self.in_fields, self.sign_eps)
        return equiv_elu(x, self.bias_sign, self.in_fields)

    def export(self) -> nn.Module:
        """An equal layer: `nn.ELU`; with sign-flip fields, for which torch.nn has none, a copy."""
        return copy.deepcopy(self) if self.in_fields.sign else nn.ELU().train(self.training)

    def extra_repr(self) -> str:
        return f"{tuple(self.in_fields)}" + (f", sign_eps={self.sign_eps}" if self.sign_eps else "")


def as_sign_eps(sign_eps, fields: Fields) -> float:
    """Check the `sign_eps` of an `EquivNonlin`. Raises ValueError if it is not allowed."""
    if not isinstance(sign_eps, (int, float)) or not 0 <= sign_eps < math.inf:
        raise ValueError(f"sign_eps must be a finite number of at least 0, got {sign_eps!r}")
    if sign_eps and not fields.sign:
        raise ValueError(
            f"sign_eps must be 0 where there are no sign-flip fields, got {sign_eps!r}"
        )
    return float(sign_eps)


# --------------------------------------------------------------------------------------------------
# Pooling


@accelerated(by=fast.max_pool)
def max_pool(
    x: Tensor, fields: Fields, stride: tuple[int, int], padding: tuple[int, int], ceil_mode: bool
) -> Tensor:
    """The maximum of 2 x 2 windows; of sign-flip fields the entry of largest magnitude."""
    window_max = partial(
        F.max_pool2d, kernel_size=2, stride=stride, padding=padding, ceil_mode=ceil_mode
    )
    largest = window_max(x)
    if not fields.sign:
        return largest
    negated_smallest = window_max(-sign_channels(x, fields))
    blocks = split_types(largest, fields)
    blocks["sign"] = signed_extremum(blocks["sign"], negated_smallest)
    return torch.cat(list(blocks.values()), dim=1)


def strip_pool(x: Tensor, fields: Fields, step: int = 2) -> Tensor:
    """2 x 2 pooling on the strip, in windows that begin at every column or every second one.

    ``(N, C, W, L)`` to ``(N, C, ceil(W / 2), ceil(L / step))``, for a step of 1 or 2.
    """
    stride = (2, step)
    if step == 1 or x.shape[3] % 2:  # the last window continues across the cut
        x = torch.cat([x, cross_cut(x.narrow(3, 0, 1), fields)], dim=3)
    if x.shape[2] % 2 == 0:
        return max_pool(x, fields, stride, (0, 0), False)
    # The padding of max_pool2d is -inf and never wins. Halved before they are added, the two cannot
    # overflow.
    top = max_pool(x, fields, stride, (0, 0), True)
    bottom = max_pool(x, fields, stride, (1, 0), False)
    return top / 2 + bottom / 2


class MobiusPool(nn.Module):
    """2 x 2 max pooling with stride 2 that respects the field types and continues across the cut.

    Trivial and regular fields: the maximum. Sign-flip fields: the entry of largest magnitude, with
    its sign. If a window holds +a and -a, up to 64 eps of the sample's largest magnitude in these
    fields, it is 0, the only equivariant value: a change of sign exchanges the two. (The published
    code has +a.)

    If L is odd, the last window takes its second column from across the cut. If W is odd, it pools
    twice, with windows aligned to the top and to the bottom edge and the row left over in a window
    of its own, and averages the two: windows aligned to one edge would not be windows of the
    reflected strip.

    Exactly gauge equivariant. Equivariant under shifts by an even t if L is even: the output moves
    by t / 2. `polyphase.PolyphasePool` is equivariant under all shifts.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, ceil(W / 2), ceil(L / 2))``.

    Raises:
        ValueError: for multiplicities that are not allowed; in `forward`, for an input that is not
            4-d with C channels, or not floating point.

    Source: arXiv:2106.06020, Section 5.4.
    """

    def __init__(self, in_fields) -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_fields)
        return strip_pool(x, self.in_fields)

    def extra_repr(self) -> str:
        return f"{tuple(self.in_fields)}"


# --------------------------------------------------------------------------------------------------
# Conventional CNNs, and layers for export


@accelerated(by=fast.naive_conv)
def naive_conv(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution by any kernel, padded across the cut as if every channel were a scalar."""
    pad = kernel.shape[3] // 2
    return F.conv2d(pad_columns(x, pad, scalars(x)), kernel, bias, padding=(pad, 0))


class MobiusConvNaive(nn.Conv2d):
    """The baselines' convolution: `MobiusPadNaive` followed by `nn.Conv2d`, in one.

    Args:
        in_channels, out_channels: positive.
        kernel_size: odd and positive.
        device, dtype: of the parameters.

    Shape:
        ``(N, C_in, W, L)`` to ``(N, C_out, W, L)``, for any W and any L >= kernel_size // 2.

    Raises:
        ValueError: for a kernel size that is not allowed; in `forward`, for an input that is not
            4-d, does not have C_in channels or has L < kernel_size // 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, device=None, dtype=None
    ) -> None:
        size = _odd_kernel_size(kernel_size)
        super().__init__(in_channels, out_channels, size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, Fields(self.in_channels, 0, 0))
        check_length(x, self.kernel_size[0] // 2)
        return naive_conv(x, self.weight, self.bias)

    def export(self) -> nn.Sequential:
        """An equal layer of a `MobiusPadNaive` and an `nn.Conv2d`, with parameters of its own."""
        conv = nn.utils.skip_init(
            nn.Conv2d, self.in_channels, self.out_channels, self.kernel_size,
            device=self.weight.device, dtype=self.weight.dtype,
        )
        conv.load_state_dict(self.state_dict())
        conv.requires_grad_(self.weight.requires_grad)
        return nn.Sequential(MobiusPadNaive(self.kernel_size[0]), conv).train(self.training)


class MobiusPadNaive(nn.Module):
    """Padding across the cut for conventional CNNs: flipped across the width, no action on the
    channels.

    It treats every channel as a scalar: equivariant only with kernels that are symmetric across the
    width. CNNs with it are the baselines.

    Args:
        kernel_size: of the convolution that follows, odd and positive.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, W + 2 (k//2), L + 2 (k//2))``, for any W and any L >= k // 2.

    Raises:
        ValueError: for a kernel size that is not allowed; in `forward`, for an input that is not
            4-d or has L < kernel_size // 2.

    Source: arXiv:2106.06020, Section 5.4.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = _odd_kernel_size(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        check_strip(x)
        return transport_pad(x, self.kernel_size // 2, scalars(x))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class TransportPad(nn.Module):
    """`transport_pad` as a module. `MobiusConv.export` returns it followed by an `nn.Conv2d`.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.
        pad: number of rows and columns, at least 0.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, W + 2 pad, L + 2 pad)``, for any W and any L >= pad.

    Raises:
        ValueError: for arguments that are not allowed; in `forward`, for an input that is not 4-d
            with C channels or has L < pad.
    """

    def __init__(self, in_fields, pad: int) -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")
        self.pad = as_integer(pad, "pad", "an integer of at least 0")
        if self.pad < 0:
            raise ValueError(f"pad must be an integer of at least 0, got {pad}")

    def forward(self, x: Tensor) -> Tensor:
        return transport_pad(x, self.pad, self.in_fields)

    def extra_repr(self) -> str:
        return f"{tuple(self.in_fields)}, pad={self.pad}"
