"""Gauge equivariant layers on the Möbius strip, in the habits of torch.nn.

    transport_pad     pads a feature map over the cut by parallel transport
    MobiusConv        convolution with steerable (reflection equivariant) kernels
    EquivNonlin       a nonlinearity for each field type
    MobiusPool        2 x 2 pooling for each field type, on a fixed grid or on one that the data choose
    TransportPad      transport_pad as a module, for networks that are exported to plain torch.nn
    MobiusPadNaive    padding for conventional CNNs, which know nothing of frames
    MobiusConvNaive   that padding and nn.Conv2d in one

Every equivariant layer keeps the field types that it maps between as `in_fields` and `out_fields`.
Feature maps have the shape ``(N, C, W, L)`` and the channel layout of `fields.py`. On a CPU all layers are
faster in the memory format channels_last, MobiusConv most of all.

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

import spectral
from fast_path import gradients, is_plain, needs_formula
from fields import (
    REPRESENTATIONS,
    Fields,
    arrange_channels,
    as_fields,
    as_integer,
    check_features,
    check_strip,
    cross_cut,
    double_cover,
    gauge_transform,
    interleave,
    map_pointwise,
)

POOLINGS = ("fixed", "polyphase")


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
    pad = as_integer(pad, "pad")
    _check_length(x, pad)
    return F.pad(_pad_columns(x, pad, fields), (0, 0, pad, pad))


def _check_length(x: Tensor, pad: int) -> None:
    length = x.shape[3]
    if not 0 <= pad <= length:
        raise ValueError(f"padding by {pad} columns needs a strip of at least that length, got L = {length}")


def _pad_columns(x: Tensor, pad: int, fields: Fields) -> Tensor:
    if pad == 0:
        return x
    return _PadColumns.apply(x, pad, fields) if is_plain(x) else _padded(x, pad, fields)


def _padded(x: Tensor, pad: int, fields: Fields) -> Tensor:
    left = cross_cut(x.narrow(3, x.shape[3] - pad, pad), fields)
    right = cross_cut(x.narrow(3, 0, pad), fields)
    return torch.cat([left, x, right], dim=3)


class _PadColumns(torch.autograd.Function):
    """`_padded`. Autograd's own gradient would fill three feature maps with zeros, to add them up."""

    @staticmethod
    def forward(ctx, x: Tensor, pad: int, fields: Fields) -> Tensor:
        ctx.pad, ctx.fields, ctx.shape = pad, fields, x.shape
        return _padded(x, pad, fields)

    @staticmethod
    def backward(ctx, grad: Tensor):
        pad, fields, length = ctx.pad, ctx.fields, ctx.shape[3]
        if needs_formula(grad):  # linear: at zero the gradient is what it is elsewhere
            def padded(x: Tensor) -> Tensor:
                return _padded(x, pad, fields)

            return torch.func.vjp(padded, torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device))[1](grad)[0], None, None
        # Add what stands beside the strip to where it came from; rho(s) is orthogonal, and its own inverse.
        inner = grad.narrow(3, pad, length).clone()
        inner.narrow(3, length - pad, pad).add_(cross_cut(grad.narrow(3, 0, pad), fields))
        inner.narrow(3, 0, pad).add_(cross_cut(grad.narrow(3, pad + length, pad), fields))
        return inner, None, None


def _odd_kernel_size(kernel_size) -> int:
    allowed = "an odd positive integer"
    size = as_integer(kernel_size, "kernel_size", allowed)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel_size must be {allowed}, got {size}")
    return size


def _sign_channels(x: Tensor, fields: Fields) -> Tensor:
    return x.narrow(1, fields.triv, fields.sign)


# ------------------------------------------------------------------------------------------------------
# Steerable kernels: K(s.v) = rho_out(s) K(v) rho_in(s)^-1, where s.v flips the kernel's width axis (dim 2).
# For a regular output field this gives the second channel, K₂(v) = K₁(s.v) rho_in(s), and leaves the first one
# free; for the others it ties one half of the kernel to the other. What is stored, and how the rest follows:


def _free(first: Tensor) -> Tensor:
    """Stored is the part K₁ that maps to the first channel of the output field."""
    return first


def _symmetric(upper: Tensor) -> Tensor:
    """K(s.v) = K(v): stored are the upper rows and the centre row."""
    return torch.cat([upper, upper.narrow(2, 0, upper.shape[2] - 1).flip(2)], dim=2)


def _antisymmetric(upper: Tensor) -> Tensor:
    """K(s.v) = -K(v): stored are the upper rows; the centre row is its own negative, thus zero."""
    o, i, _, k = upper.shape
    return torch.cat([upper, upper.new_zeros(o, i, 1, k), -upper.flip(2)], dim=2)


def _from_regular(first: Tensor, sign: int) -> Tensor:
    """K₂(v) = ± K₁(s.v): stored is the part K₁ that reads the first channel of the input field."""
    return interleave(first, sign * first.flip(2), dim=1)


class SteerableBlock(NamedTuple):
    """columns: stored input channels for each input field. rows: stored rows of k. expand: stored -> first channels."""

    columns: int
    rows: Callable[[int], int]
    expand: Callable[[Tensor], Tensor]


STEERABLE_BLOCKS = {
    # (in, out)      columns  rows stored of k     the block of each output field's first channel
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


class _StripConv(nn.Module):
    """What the convolutions share: which way to compute, and kernels that are kept while no gradient is recorded."""

    _kept = None

    def _spectral_dtype(self, x: Tensor, out_channels: int, kernel_size: int) -> torch.dtype | None:
        """The dtype to convolve `x` in where the Fourier basis pays, under autocast that of conv2d; otherwise None."""
        if not spectral.pays(x, out_channels, kernel_size):
            return None
        parameter = self._sources()[0]
        if torch.is_autocast_enabled("cpu") and torch.float64 not in (x.dtype, parameter.dtype):
            dtype = torch.get_autocast_dtype("cpu")
            return dtype if dtype in spectral.DTYPES else None
        return x.dtype if parameter.dtype == x.dtype and parameter.device == x.device else None

    def _expanded(self, key, expand: Callable[[], tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
        """``expand()``, or what it gave for the same parameters before.

        "The same" is decided by their values: version counters do not see every edit (those by ``.data`` and by
        NumPy), and comparing is some hundred times cheaper than a convolution.
        """
        sources = self._sources()
        if (
            not is_plain(*sources)
            # Not a parameter but computed from some: by a parametrization, by pruning, in a replica.
            or any(not isinstance(p, nn.Parameter) or p.is_meta for p in sources)
            or torch.is_grad_enabled() and any(p.requires_grad for p in sources)
            or sources[0].is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            return expand()
        kept = self._kept
        if kept is None or not all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(sources, kept[0], strict=True)
        ):
            kept = self._kept = ([p.detach().clone() for p in sources], {})
        expanded = kept[1].get(key)
        # What was made in inference mode cannot take part in autograd outside of it.
        if expanded is None or expanded[0].is_inference() and not torch.is_inference_mode_enabled():
            if len(kept[1]) >= 8:  # strips of many widths
                kept[1].clear()
            expanded = kept[1][key] = expand()
        return expanded

    def _sources(self) -> list[Tensor]:
        """What kernel and bias are made of."""
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}  # copies and pickles expand their own


class MobiusConv(_StripConv):
    """Convolution on the Möbius strip, equivariant under reflections of the frames and under isometries.

    The kernel is expanded from its free parameters such that K(s.v) = rho_out(s) K(v) rho_in(s)^-1, the
    input is padded by parallel transport, and a plain convolution follows. Where it is faster (see
    `spectral.pays`) the same convolution is computed in the Fourier basis of the strip's width.

    While no gradient is recorded, an expanded kernel is kept until a parameter has another value.

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
        rows = self._first_rows()
        if "reg" in rows:
            rows["reg"] = interleave(rows["reg"], cross_cut(rows["reg"], Fields(*self.in_fields)), dim=0)
        kernel = torch.cat(list(rows.values()), dim=0)
        return arrange_channels(arrange_channels(kernel, self.in_fields, dim=1), self.out_fields, dim=0)

    def _sources(self) -> list[Tensor]:
        weights = [getattr(self, f"weights_{in_type}2{out_type}") for out_type, ins in self._blocks.items() for in_type in ins]
        return weights + [getattr(self, f"bias_{t}") for t in self._blocks if REPRESENTATIONS[t].invariant_bias]

    def _first_rows(self) -> dict[str, Tensor]:
        """For each output type the kernel of its fields' first channels, ``(m, C_in, k, k)``, input channels adjacent."""
        return {
            out_type: torch.cat([
                STEERABLE_BLOCKS[in_type, out_type].expand(getattr(self, f"weights_{in_type}2{out_type}"))
                for in_type in in_types
            ], dim=1)
            for out_type, in_types in self._blocks.items()
        }

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
        return arrange_channels(torch.cat(parts), self.out_fields, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_fields)
        pad = self.kernel_size // 2
        _check_length(x, pad)
        dtype = self._spectral_dtype(x, self.out_fields.channels, self.kernel_size)
        if dtype is not None:
            with torch.autocast("cpu", enabled=False):
                kernel, bias = self._expanded(("spectral", x.shape[2], dtype), partial(self._spectral, x.shape[2], dtype))
                return spectral.steerable_conv(x.to(dtype), kernel, bias, self.in_fields, self.out_fields)
        kernel, bias = self._expanded("plain", lambda: (self.expand_kernel(), self.expand_bias()))
        # The rows of zeros are the convolution's own padding: two copies of the feature map less.
        return F.conv2d(_pad_columns(x, pad, self.in_fields), kernel, bias, padding=(pad, 0))

    def _spectral(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        rows, bias = torch.cat(list(self._first_rows().values()), dim=0), self.expand_bias()
        kernel = spectral.steerable_spectrum(rows, self.in_fields, self.out_fields, width)
        return kernel.to(dtype), None if bias is None else bias.to(dtype)

    def export(self) -> nn.Sequential:
        """An equal layer of a `TransportPad` and an `nn.Conv2d`, with parameters of its own."""
        with torch.no_grad():
            kernel, bias = self.expand_kernel(), self.expand_bias()
        conv = nn.utils.skip_init(  # no random numbers are drawn
            nn.Conv2d, kernel.shape[1], kernel.shape[0], self.kernel_size,
            bias=bias is not None, device=kernel.device, dtype=kernel.dtype,
        )
        conv.load_state_dict({"weight": kernel} if bias is None else {"weight": kernel, "bias": bias})
        conv.requires_grad_(any(p.requires_grad for p in self.parameters()))
        return nn.Sequential(TransportPad(self.in_fields, self.kernel_size // 2), conv).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_fields}, {self.out_fields}, kernel_size={self.kernel_size}"


# Values of sign-flip fields that are 0 in exact arithmetic are not 0 in floating point: an antisymmetric kernel on a constant
# region gives some eps of the region's value. As sign() jumps at 0, such noise would become features of full size.
# Measured on digits: PLACEHOLDER
ROUNDING = 64


def _sign(x: Tensor, magnitude: Tensor) -> Tensor:
    """The sign of sign-flip fields; 0 within rounding of 0, relative to each sample's largest magnitude.

    No isometry and no gauge transformation changes that magnitude. In half precision, rounding means that of float32, in which
    convolutions add up.
    """
    limits = torch.finfo(x.dtype)
    largest = magnitude.detach().amax(dim=(1, 2, 3), keepdim=True).clamp(limits.tiny, limits.max)
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return F.hardshrink(x.detach() / largest, ROUNDING * eps).sign()


def _odd_elu(x: Tensor, b: Tensor) -> Tensor:
    magnitude = x.abs()
    return _sign(x, magnitude) * F.elu(magnitude + b.to(x.dtype))  # under autocast, x decides


def _smoothed_odd_elu(x: Tensor, b: Tensor, sign_eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float16 has no 1e-8
    return (wide / (wide.abs() + sign_eps) * F.elu(wide.abs() + b)).to(x.dtype)


def _equiv_elu(x: Tensor, b: Tensor, fields: Fields) -> Tensor:
    return map_pointwise(x, fields, F.elu, lambda sign: _odd_elu(sign, b))


class _EquivELU(torch.autograd.Function):
    """`_equiv_elu`, keeping nothing but its input for the gradient, and with few passes over memory.

    Whole feature maps are read faster than some of their channels, and written faster than put together: ELU is
    computed everywhere, and what is wrong for sign-flip fields replaced.
    """

    @staticmethod
    def _batches(fields: Fields, *tensors: Tensor):
        """The sign-flip channels of all `tensors`, an eighth of the batch at a time: intermediate results stay in the cache."""
        size = max(1, math.ceil(len(tensors[0]) / 8))
        return zip(*(_sign_channels(x, fields).split(size) for x in tensors))

    @staticmethod
    def _bias_map(b: Tensor, x: Tensor) -> Tensor:
        """b for each pixel of a sample: added to a batch, it takes a fifth of the time that b alone takes in bfloat16."""
        return torch.empty_like(x[:1, :b.shape[1]]).copy_(b)

    @staticmethod
    def forward(ctx, x: Tensor, b: Tensor, fields: Fields) -> Tensor:
        ctx.save_for_backward(x, b)
        ctx.fields = fields
        y = torch.empty_like(x) if fields.sign == fields.channels else F.elu(x)
        bias = _EquivELU._bias_map(b, x)
        for x_sign, y_sign in _EquivELU._batches(fields, x, y):
            magnitude = x_sign.abs()
            sign = _sign(x_sign, magnitude)
            torch.mul(F.elu_(magnitude.add_(bias)), sign, out=y_sign)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, b = ctx.saved_tensors
        if needs_formula(grad):
            return *gradients(partial(_equiv_elu, fields=ctx.fields), (x, b), ctx.needs_input_grad[:2], grad), None
        only_sign = ctx.fields.sign == ctx.fields.channels
        grad_x = torch.empty_like(x) if only_sign else torch.ops.aten.elu_backward(grad, 1, 1, 1, False, x)
        grad_b, bias = torch.zeros_like(b), _EquivELU._bias_map(b, x)
        for x_sign, grad_sign, grad_x_sign in _EquivELU._batches(ctx.fields, x, grad, grad_x):
            magnitude = x_sign.abs()
            sign = _sign(x_sign, magnitude)
            slope = magnitude.add_(bias).clamp_(max=0).exp_().mul_(sign).mul_(grad_sign)  # ELU'(a) = exp(min(a, 0))
            grad_b += slope.sum(dim=(0, 2, 3), keepdim=True, dtype=b.dtype)
            torch.mul(slope, sign, out=grad_x_sign)
        return grad_x, grad_b, None


def as_sign_eps(sign_eps, fields: Fields) -> float:
    """Check a `sign_eps` of `EquivNonlin` and return it. Raises ValueError for one that is not allowed."""
    if not isinstance(sign_eps, (int, float)) or not 0 <= sign_eps < math.inf:
        raise ValueError(f"sign_eps must be a finite number of at least 0, got {sign_eps!r}")
    if sign_eps and not fields.sign:
        raise ValueError(f"sign_eps must be 0 where there are no sign-flip fields, got {sign_eps!r}")
    return float(sign_eps)


class EquivNonlin(nn.Module):
    """Gauge equivariant nonlinearity: ELU on trivial and regular fields, an odd function on sign-flip fields.

    Trivial and regular fields: ELU(x), which commutes with a permutation of channels.
    Sign-flip fields: sign(x) ELU(|x| + b) with a learnable b for each field, which commutes with a change of sign. It is the
    identity at b = 0, where training begins. sign(x) is 0 where |x| is within rounding of 0: at most 64 eps of the sample's largest
    magnitude in these fields (eps of float32 in half precision).

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.
        sign_eps: if positive, x / (|x| + sign_eps) in place of sign(x), gradient included. The published runs had 1e-8. Its
            gradient has a spike at 0 of height ELU(b) / sign_eps, and the sign of values that are 0 but for rounding is rounding's.
        device, dtype: of the parameters.

    Shape:
        ``(N, C, W, L)`` to the same.

    Parameters:
        bias_sign: b, of shape ``(1, m_sign, 1, 1)``, at first 0; none where m_sign = 0.

    Raises:
        ValueError: for multiplicities that are not allowed; for a sign_eps that is not finite, negative, or not 0 where there are
            no sign-flip fields; in `forward`, for an input that is not 4-d with C channels.

    Source: arXiv:2106.06020, Section 5.3.2.
    """

    def __init__(self, in_fields, sign_eps: float = 0.0, *, device=None, dtype=None) -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")
        self.sign_eps = as_sign_eps(sign_eps, self.in_fields)
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

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_fields)
        if not self.in_fields.sign:
            return F.elu(x)
        if self.sign_eps:
            return map_pointwise(x, self.in_fields, F.elu, lambda sign: _smoothed_odd_elu(sign, self.bias_sign, self.sign_eps))
        function = _EquivELU.apply if is_plain(x, self.bias_sign) else _equiv_elu
        return function(x, self.bias_sign, self.in_fields)

    def export(self) -> nn.Module:
        """An equal layer: `nn.ELU`, or where there are sign-flip fields, for which torch.nn has none, a copy."""
        return copy.deepcopy(self) if self.in_fields.sign else nn.ELU().train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_fields}" + (f", sign_eps={self.sign_eps}" if self.sign_eps else "")


def _signed_max(largest: Tensor, negated_smallest: Tensor) -> Tensor:
    """Of the largest and the smallest entry the one of larger magnitude; 0 where both are equally large, but for rounding."""
    magnitude = torch.maximum(largest, negated_smallest)
    return magnitude * _sign(largest - negated_smallest, magnitude)


def _signed_max_pool(x: Tensor, **alignment) -> Tensor:
    """The entry of largest magnitude in each window, with its sign."""
    return _signed_max(F.max_pool2d(x, 2, **alignment), F.max_pool2d(-x, 2, **alignment))


class _EquivMaxPool(torch.autograd.Function):
    """The maximum, of sign-flip fields `_signed_max_pool`; and its index, where the gradient goes to.

    As in `_EquivELU`, what is wrong for sign-flip fields is replaced.
    """

    @staticmethod
    def forward(ctx, x: Tensor, fields: Fields, stride: tuple[int, int], padding: tuple[int, int], ceil_mode: bool) -> Tensor:
        max_pool = partial(F.max_pool2d, kernel_size=2, stride=stride, padding=padding, ceil_mode=ceil_mode, return_indices=True)
        y, index = max_pool(x)
        negated_smallest, at_smallest = max_pool(-_sign_channels(x, fields))
        y_sign, index_sign = _sign_channels(y, fields), _sign_channels(index, fields)
        index_sign += at_smallest.sub_(index_sign).mul_((y_sign - negated_smallest).signbit())
        y_sign.copy_(_signed_max(y_sign, negated_smallest))
        ctx.save_for_backward(index, y_sign.sign().square_())
        ctx.fields = fields
        ctx.alignment, ctx.shape = (stride, padding, (1, 1), ceil_mode), x.shape
        ctx.memory_format = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, is_not_zero = ctx.saved_tensors
        grad = grad.clone()
        _sign_channels(grad, ctx.fields).mul_(is_not_zero)
        # The shape and the layout of the input is all that is read of it: no reason to keep it.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, (2, 2), *ctx.alignment, index)
        return grad, None, None, None, None


def _one_column_on(x: Tensor, fields: Fields, step: int) -> Tensor:
    """The isometry action by a shift of `step`, 1 or -1."""
    last = x.shape[3] - 1
    if step == 1:
        return torch.cat([cross_cut(x.narrow(3, last, 1), fields), x.narrow(3, 0, last)], dim=3)
    return torch.cat([x.narrow(3, 1, last), cross_cut(x.narrow(3, 0, 1), fields)], dim=3)


class _MoveSome(torch.autograd.Function):
    """`_one_column_on` for the samples that `which` marks, a boolean (N,): in memory, for no more than those."""

    @staticmethod
    def forward(ctx, x: Tensor, which: Tensor, fields: Fields, step: int) -> Tensor:
        ctx.save_for_backward(which)
        ctx.fields, ctx.step, ctx.shape = fields, step, x.shape
        moved = x.clone()
        moved[which] = _one_column_on(x[which], fields, step)
        return moved

    @staticmethod
    def backward(ctx, grad: Tensor):
        (which,) = ctx.saved_tensors
        fields, step = ctx.fields, ctx.step
        if needs_formula(grad):  # as in _PadColumns
            def moved(x: Tensor) -> Tensor:
                return torch.where(which[:, None, None, None], _one_column_on(x, fields, step), x)

            return torch.func.vjp(moved, torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device))[1](grad)[0], None, None, None
        # rho(s) is orthogonal: the transposed map is the inverse.
        return _MoveSome.apply(grad, which, fields, -step), None, None, None


def _best_parity(x: Tensor, fields: Fields) -> Tensor:
    """For each sample, whether the shift at which the field matches a template best is odd: a boolean (N,).

    A shift of x by t moves that shift by t, and a gauge transformation leaves it as it is, since the template is matched in
    both gauges. The template is sin(1), sin(4), sin(9), …, which are linearly independent over the algebraic numbers (theorem
    of Lindemann and Weierstrass): but for rounding, a field matches it equally well in two positions only if it is the same in both.
    """
    n, channels, width, length = x.shape
    # In float64, which autocast and TensorFloat32 leave alone.
    dtype = torch.float64 if x.device.type != "mps" else torch.float32
    x = x.to(dtype)
    numbers = torch.arange(1, channels * width * length + 1, device=x.device, dtype=dtype)
    template = arrange_channels(numbers.square().sin().view(1, channels, width, length), fields)
    columns = torch.arange(length, device=x.device)
    # Row l of the product with the double cover has the matches of the template's column l with each of its 2L columns.
    start = (columns[:, None] - torch.arange(2 * length, device=x.device)) % (2 * length)
    cover = double_cover(x, fields).flatten(1, 2)
    matches = []
    for columns_of_template in (template, gauge_transform(template, fields)):
        products = columns_of_template.flatten(1, 2).transpose(1, 2) @ cover
        matches.append(products.gather(2, start.expand(n, -1, -1)).sum(1))
    even, odd = torch.stack(matches, 1).unflatten(2, (length, 2)).amax((1, 2)).unbind(1)
    return odd - even > _rounding(dtype) * _norm(x) * _norm(template)


def _norm(x: Tensor) -> Tensor:
    """Of each sample, (N,), in float32 at least."""
    # In two steps: PyTorch adds up what it is given one by one, and rounding would grow with the number of all entries.
    of_pixels = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vector_norm(of_pixels, dim=(1, 2))


def _rounding(dtype: torch.dtype) -> float:
    """Sums of the same terms in another order agree to about this, relatively."""
    return 16 * torch.finfo(dtype).eps


class MobiusPool(nn.Module):
    """2 x 2 pooling with stride 2 that respects the field types and goes on over the cut.

    Trivial and regular fields: the maximum. Sign-flip fields: the entry of largest magnitude with its sign; 0 where the largest
    are +a and -a, equal within 64 eps of the sample's largest magnitude: no other value is equivariant. (As published: +a.)

    Where W is odd, windows aligned to one edge of the strip would not be windows of the reflected strip: it pools
    twice, aligned to the top and to the bottom edge, with the row left over in a window of its own, and averages the two.

    Along the strip, with `pooling`

    - 'fixed', as published, windows begin at the even columns. Where L is odd, the last window takes its second column
      over the cut. Equivariant under isometries by an even shift t where L is even: the output moves by t / 2.
    - 'polyphase', windows begin at the even or at the odd columns, the last one of these going on over the cut; for each
      sample there where the pooled fields' norm (the sum of squares over all channels and pixels) is larger. Let p be
      0 or 1 for even or odd. A shift of the input by t changes it to p' = (p + t) mod 2 and moves the output by
      (t + p - p') / 2, which is an integer: equivariant under all 2L isometries. (If some odd shift leaves the input as it is, p
      is the same for every t, and t may be any of the shifts that have the same effect.) L must be even.

    Exactly gauge equivariant.

    Where both norms are equal up to rounding, a comparison with a fixed template decides. There is one kind of field for
    which no choice is right: if a shift by an odd t is the same as a gauge transformation of the field, but not
    the same as the field, then p must change under the shift, and must not under the gauge transformation. There it is 0, and
    pooling is equivariant under gauge transformations and even shifts only. In finite precision the choice is a choice still:
    of fields that rounding in earlier layers has made to differ, with norms that differ as little, one may be pooled on the one grid
    and one on the other. Fields whose squares are not finite in float32 (beyond 1e19) are all pooled on the even one.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.
        pooling: 'fixed' or 'polyphase'.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, ceil(W / 2), ceil(L / 2))``.

    Raises:
        ValueError: for an argument that is not allowed; in `forward`, for an input that is not 4-d with
            C channels, is not floating point, or, with 'polyphase', has an odd L.

    Source: arXiv:2106.06020, Section 5; adaptive polyphase sampling: Chaman and Dokmanić, CVPR 2021, arXiv:2011.14214.
    """

    pooling = "fixed"  # of modules that were pickled before there was a choice

    def __init__(self, in_fields, pooling: str = "fixed") -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_fields)
        if not x.dtype.is_floating_point:
            raise ValueError(f"expected floating point numbers, got {x.dtype}")
        if self.pooling == "polyphase":
            return self._polyphase(x)
        return self._pool(x if x.shape[3] % 2 == 0 else self._with_first_column(x))

    def _with_first_column(self, x: Tensor) -> Tensor:
        """One column longer: behind the last column stands the first, over the cut."""
        return torch.cat([x, cross_cut(x.narrow(3, 0, 1), self.in_fields)], dim=3)

    def _pool(self, x: Tensor, stride: int = 2) -> Tensor:
        """2 x 2 windows, their first columns `stride` apart."""
        if x.shape[2] % 2 == 0:
            return self._windows(x, stride=(2, stride))
        # max_pool2d's own padding is -inf and never wins. Halved first, the sum cannot overflow.
        top, bottom = (self._windows(x, stride=(2, stride), **rest) for rest in ({"ceil_mode": True}, {"padding": (1, 0)}))
        return top / 2 + bottom / 2

    def _windows(self, x: Tensor, stride: tuple[int, int], padding: tuple[int, int] = (0, 0), ceil_mode: bool = False) -> Tensor:
        if self.in_fields.sign and is_plain(x):
            return _EquivMaxPool.apply(x, self.in_fields, stride, padding, ceil_mode)
        alignment = {"stride": stride, "padding": padding, "ceil_mode": ceil_mode}
        max_pool = partial(F.max_pool2d, kernel_size=2, **alignment)
        return map_pointwise(x, self.in_fields, max_pool, partial(_signed_max_pool, **alignment))

    def _polyphase(self, x: Tensor) -> Tensor:
        if x.shape[3] % 2:
            raise ValueError(
                f"polyphase pooling takes an even length L, got shape {tuple(x.shape)}: once round a strip of odd length, "
                "its even columns have become its odd ones, so that it has no grid of every second column to choose"
            )
        # On a CPU, the gradient of a moved copy that is pooled on the fixed grid costs less than that of both phases.
        by_copy = x.device.type == "cpu" and is_plain(x) and x.requires_grad and torch.is_grad_enabled()
        even, odd = self._phases(x.detach() if by_copy else x)
        begins_odd = self._begins_odd(x.detach(), _norm(even.detach()), _norm(odd.detach()))
        if by_copy:
            return self._pool(_MoveSome.apply(x, begins_odd, self.in_fields, -1))
        return torch.where(begins_odd[:, None, None, None], odd, even)

    def _phases(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled in windows that begin at the even and at the odd columns."""
        if x.shape[2] % 2 or x.requires_grad or not is_plain(x):
            return self._pool(self._with_first_column(x), stride=1).unflatten(3, (-1, 2)).unbind(4)
        # The same values without max_pool2d, whose gradient among equals would be another.
        x = self._with_first_column(x)

        def of_windows(largest: Callable, x: Tensor) -> Tensor:
            rows = largest(x[:, :, 0::2], x[:, :, 1::2])
            return largest(rows[..., :-1], rows[..., 1:])

        windows = of_windows(torch.maximum, x)
        if self.in_fields.sign:
            largest = _sign_channels(windows, self.in_fields)
            smallest = of_windows(torch.minimum, _sign_channels(x, self.in_fields))
            largest.copy_(_signed_max(largest, -smallest))
        return windows[..., 0::2], windows[..., 1::2]

    @torch.no_grad()
    def _begins_odd(self, x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
        """Whether windows are to begin at the odd columns, (N,), by the norms of the two phases."""
        larger, tied = odd > even, (odd - even).abs() <= _rounding(odd.dtype) * (odd + even)
        if x.device.type != "cpu" or not is_plain(x):  # nothing may depend on values, or should wait for them
            return tied & _best_parity(x, self.in_fields) | ~tied & larger
        if tied.any():
            larger[tied] = _best_parity(x[tied], self.in_fields)
        return larger

    def extra_repr(self) -> str:
        return f"{self.in_fields}" + (f", pooling={self.pooling!r}" if self.pooling != "fixed" else "")


class TransportPad(nn.Module):
    """`transport_pad` as a module: with an `nn.Conv2d` behind it, what `MobiusConv.export` gives.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.
        pad: number of rows and columns, at least 0.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, W + 2 pad, L + 2 pad)``, for any W and any L >= pad.

    Raises:
        ValueError: for arguments that are not allowed; in `forward`, for an input that is not 4-d with C channels
            or has L < pad.
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
        return f"{self.in_fields}, pad={self.pad}"


class MobiusConvNaive(_StripConv, nn.Conv2d):
    """`MobiusPadNaive` and `nn.Conv2d` in one, with the parameters of the latter: the baselines' convolution.

    Args:
        in_channels, out_channels: positive.
        kernel_size: odd and positive.
        device, dtype: of the parameters.

    Shape:
        ``(N, C_in, W, L)`` to ``(N, C_out, W, L)``, for any W and any L >= kernel_size // 2.

    Raises:
        ValueError: for a kernel size that is not allowed; in `forward`, for an input that is not 4-d, does not have
            C_in channels or has L < kernel_size // 2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, device=None, dtype=None) -> None:
        super().__init__(in_channels, out_channels, _odd_kernel_size(kernel_size), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        scalars = Fields(self.in_channels, 0, 0)
        check_features(x, scalars)
        kernel_size = self.kernel_size[0]
        _check_length(x, kernel_size // 2)
        dtype = self._spectral_dtype(x, self.out_channels, kernel_size)
        if dtype is not None:
            with torch.autocast("cpu", enabled=False):
                kernel, bias = self._expanded((x.shape[2], dtype), partial(self._spectral, x.shape[2], dtype))
                return spectral.conventional_conv(x.to(dtype), kernel, bias)
        return F.conv2d(_pad_columns(x, kernel_size // 2, scalars), self.weight, self.bias, padding=(kernel_size // 2, 0))

    def _sources(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def _spectral(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return spectral.conventional_spectrum(self.weight, width).to(dtype), self.bias.to(dtype)

    def export(self) -> nn.Sequential:
        """An equal layer of a `MobiusPadNaive` and an `nn.Conv2d`, with parameters of its own."""
        conv = nn.utils.skip_init(
            nn.Conv2d, self.in_channels, self.out_channels, self.kernel_size, device=self.weight.device, dtype=self.weight.dtype
        )
        conv.load_state_dict(self.state_dict())
        return nn.Sequential(MobiusPadNaive(self.kernel_size[0]), conv).train(self.training)


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
