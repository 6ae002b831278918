"""The convolution on the strip in the Fourier basis of its width: the same numbers for a fraction
of the arithmetic.

Across the width a strip ends: there are W rows, and zeros beyond. Taken as part of a circle of 2F
>= W + k//2 rows, they are F pairs of coefficients, of cos(theta_f w) and sin(theta_f w) about the
strip's centre line, with theta_f = pi (f + 1/2) / F. There a convolution across the width is a
product, one for each frequency. What is left is a convolution of k taps along the length.

For a conventional kernel that product is complex: about 2k multiplications for each value, where
the plain formula has k². A steerable one makes it real, which leaves k. Write fields in irreps (a
regular field is a trivial and a sign-flip one: the sum and the difference of its two channels).
Kernels between irreps are symmetric or antisymmetric. A symmetric one multiplies the coefficients
of frequency f by C_f = sum_v K(v) cos(theta_f v), an antisymmetric one turns cosines into sines
with S_f = sum_v K(v) sin(theta_f v). So the coefficients fall into two halves that never mix, the
even and the odd ones under the reflection of the strip (its shift by L):

    A_f = (cos of trivial, sin of sign-flip)    and    B_f = (sin of trivial, -cos of sign-flip),

and one real matrix acts on both of them:

    M_f = [ C_f(triv, triv)    S_f(sign, triv) ]
          [-S_f(triv, sign)    C_f(sign, sign) ]

Crossing the cut reflects: A comes back as it is and B negated. That is the padding along the
length.

Input and output are ``(N, C, W, L)`` in the memory format channels_last, on the CPU.
Source of the kernels: arXiv:2106.06020, Section 5.3.3.
"""

import math
from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.dispatch import gradients, needs_formula
from fields import Fields, split_types

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def strip_conv(
    formula: Callable, x: Tensor, kernel: Tensor, bias: Tensor | None,
    in_fields: Fields | None = None, out_fields: Fields | None = None,
) -> Tensor:
    """Twin of `nn_layers.strip_conv` for steerable kernels; without fields, of `naive_conv`.

    Of a regular field's two channels only the first's kernel is read, since steerability fixes the
    second's. So the kernel's gradient is right for what a steerable kernel was expanded from.
    """
    dtype = _compute_dtype(x, kernel)
    if dtype is None or not pays(x, *kernel.shape[::3]):
        return NotImplemented
    with torch.autocast("cpu", enabled=False):  # the spectrum in the kernel's precision
        matrices = _kept_spectrum(kernel, in_fields, out_fields, x.shape[2], dtype)
    return _SpectralConv.apply(x.to(dtype), kernel, matrices, bias, formula, in_fields, out_fields)


naive_conv = strip_conv


def pays(x: Tensor, out_channels: int, kernel_size: int) -> bool:
    """Whether the convolution of `x` is faster here than by the formula. Measured on two AVX-512
    cores:

    - The transforms read and write every channel a few times. That is bandwidth, and the
      convolution has to be large enough to earn it: from 32 channels on either side (16 to 32
      channels come out even), and k >= 5 (k = 3 has 9 multiplications to save from, k = 5 has 25).
    - Frequencies are convolved side by side along the length and the batch; below 16 samples the
    vectors are short.
    - The transforms are dense matrices, W multiplications for each value: a wide strip would need
    an FFT.
    """
    n, channels, width, length = x.shape
    return (
        x.stride() == (width * length * channels, 1, length * channels, channels)
        and kernel_size >= 5
        and min(channels, out_channels) >= 32
        and n >= 16
        and width * (channels + out_channels) <= kernel_size**2 * channels * out_channels / 4
    )


def _compute_dtype(x: Tensor, kernel: Tensor) -> torch.dtype | None:
    """The dtype in which conv2d would compute; None if it is not in `DTYPES`."""
    if torch.is_autocast_enabled("cpu") and torch.float64 not in (x.dtype, kernel.dtype):
        dtype = torch.get_autocast_dtype("cpu")
    else:
        dtype = x.dtype if x.dtype == kernel.dtype else None
    return dtype if dtype in DTYPES and x.dtype in DTYPES else None


# --------------------------------------------------------------------------------------------------
# Kernels


def spectrum(
    kernel: Tensor, in_fields: Fields | None, out_fields: Fields | None, width: int
) -> Tensor:
    """The matrices of all frequencies.

    Args:
        kernel: ``(C_out, C_in, k, k)``, steerable between the fields, or any kernel where they are
        None.
        width: W of the strip.

    Returns:
        M_f, ``(F, C_out, C_in, k)``, channels in the order of irreps, trivial before sign-flip; for
        any kernel the complex products as real matrices, ``(F, 2 C_out, 2 C_in, k)``.
    """
    if in_fields is None:
        cosine, sine = _transform(kernel, width)
        return torch.cat([torch.cat([cosine, sine], 2), torch.cat([-sine, cosine], 2)], 1)
    scalars = out_fields.triv + out_fields.sign
    columns = split_types(torch.cat([kernel[:scalars], kernel[scalars::2]]), in_fields)
    triv, sign = [columns.get("triv")], [columns.get("sign")]
    if "reg" in columns:
        # x1 = (t + s) / 2 and x2 = (t - s) / 2 for the sum t and the difference s of a field's two
        # channels.
        first, second = (columns["reg"] / 2).unflatten(1, (-1, 2)).unbind(2)
        triv.append(first + second)
        sign.append(first - second)
    irreps = torch.cat([part for part in (*triv, *sign) if part is not None], dim=1)
    n_triv = in_fields.triv + in_fields.reg
    # The first channel of a regular field is t' + s': its symmetric part maps to t', its
    # antisymmetric part to s', and the cosine and the sine transform pick out these two.
    cosine, sine = _transform(irreps, width)
    c_triv, c_sign, c_reg = cosine.split(tuple(out_fields), 1)
    s_triv, s_sign, s_reg = sine.split(tuple(out_fields), 1)

    def block(scalar: Tensor, regular: Tensor, columns: slice) -> Tensor:
        return torch.cat([scalar, regular], 1)[:, :, columns]

    from_triv, from_sign = slice(n_triv), slice(n_triv, None)
    upper = [block(c_triv, c_reg, from_triv), block(s_triv, s_reg, from_sign)]
    lower = [-block(s_sign, s_reg, from_triv), block(c_sign, c_reg, from_sign)]
    return torch.cat([torch.cat(upper, 2), torch.cat(lower, 2)], 1)


def _kept_spectrum(
    kernel: Tensor, in_fields: Fields | None, out_fields: Fields | None, width: int,
    dtype: torch.dtype,
) -> Tensor:
    """`spectrum` in `dtype`; of a kernel of `kept_without_gradients`, it is kept too."""
    derived = getattr(kernel, "derived", None)
    if derived is None or kernel.requires_grad:
        return spectrum(kernel, in_fields, out_fields, width).to(dtype)
    key = (in_fields, out_fields, width, dtype)
    matrices = derived.get(key)
    if matrices is None:
        if len(derived) >= 8:  # strips of many widths
            derived.clear()
        with torch.inference_mode(False):  # autograd may need it later
            matrices = spectrum(kernel, in_fields, out_fields, width).to(dtype)
        derived[key] = matrices
    return matrices


def _transform(kernel: Tensor, width: int) -> Tensor:
    """The sums of K(v) cos(theta_f v) and of K(v) sin(theta_f v), ``(2, F, o, i, k)``."""
    o, i, k, _ = kernel.shape
    theta = _frequencies(width, k)
    offset = torch.arange(k, dtype=torch.float64, device="cpu") - k // 2
    waves = torch.cat([(theta[:, None] * offset).cos(), (theta[:, None] * offset).sin()]).to(kernel)
    return (waves @ kernel.permute(2, 0, 1, 3).reshape(k, -1)).view(2, len(theta), o, i, k)


def _frequencies(width: int, kernel_size: int) -> Tensor:
    # Half-integer frequencies: none is its own mirror image, each comes as a cosine and a sine.
    half = math.ceil((width + kernel_size // 2) / 2)
    return math.pi * (torch.arange(half, dtype=torch.float64, device="cpu") + 0.5) / half


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # tensors made in inference mode cannot take part in autograd later
def _basis(width: int, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """Cosines, sines, and a row of ones for the bias, ``(2 F + 1, W)``."""
    position = torch.arange(width, dtype=torch.float64, device="cpu") - (width - 1) / 2
    phase = _frequencies(width, kernel_size)[:, None] * position
    waves = torch.cat([phase.cos(), phase.sin()]) / math.sqrt(len(phase))
    return torch.cat([waves, torch.ones_like(waves[:1])]).to(dtype)


# --------------------------------------------------------------------------------------------------
# The order of channels inside this file is planar: the first channels of all regular fields, then
# the second ones. Sums and differences of the two then read and write memory in order, several
# times faster.


def _to_planar(x: Tensor, fields: Fields | None) -> Tensor:
    """Channels (the last dim) from the documented order to the planar one."""
    if fields is None or not fields.reg:
        return x
    scalars = fields.triv + fields.sign
    first, second = x[..., scalars:].unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([x[..., :scalars], first, second], -1)


def _from_planar(planar: Tensor, fields: Fields | None) -> Tensor:
    """The inverse of `_to_planar`."""
    if fields is None or not fields.reg:
        return planar
    scalars = fields.triv + fields.sign
    pairs = torch.stack(planar[..., scalars:].chunk(2, -1), -1).flatten(-2)
    # With regular fields only, cat would copy them a second time.
    return torch.cat([planar[..., :scalars], pairs], -1) if scalars else pairs


# --------------------------------------------------------------------------------------------------
# The two halves of the coefficients are stored as (F, 2, L, N, C): for each frequency a batch of
# two "images" of L x N pixels, which the convolution along the length reads row after row. A
# conventional kernel mixes cosines and sines, so that both are channels of one image: (F, 1, L, N,
# 2 C).


def _split_coefficients(coefficients: Tensor, fields: Fields | None) -> tuple[Tensor, ...]:
    """Views ``(F, L, N, …)`` of coefficients ``(N, 2, F, L, C)``: cosines, then sines."""
    cosine, sine = coefficients.permute(1, 2, 3, 0, 4)
    if fields is None:
        return cosine, sine
    sizes = (fields.triv, fields.sign, fields.reg, fields.reg)
    return *cosine.split(sizes, dim=-1), *sine.split(sizes, dim=-1)


def _split_halves(halves: Tensor, fields: Fields | None) -> tuple[Tensor, ...]:
    """Views of the halves ``(…, 2, L, N, C)``: A, then B."""
    if fields is None:
        return halves.select(-4, 0).chunk(2, dim=-1)
    sizes = (fields.triv, fields.reg, fields.sign, fields.reg)
    return *halves.select(-4, 0).split(sizes, dim=-1), *halves.select(-4, 1).split(sizes, dim=-1)


def _to_halves(
    coefficients: tuple[Tensor, ...], halves: tuple[Tensor, ...], fields: Fields | None
) -> None:
    """Write the split halves from the split coefficients."""
    if fields is None:
        for half, coefficient in zip(halves, coefficients):
            half.copy_(coefficient)
        return
    c_triv, c_sign, c_first, c_second, s_triv, s_sign, s_first, s_second = coefficients
    a_triv, a_sum, a_sign, a_difference, b_triv, b_sum, b_sign, b_difference = halves
    if fields.triv:
        a_triv.copy_(c_triv)
        b_triv.copy_(s_triv)
    if fields.sign:
        a_sign.copy_(s_sign)
        torch.neg(c_sign, out=b_sign)
    if fields.reg:
        torch.add(c_first, c_second, out=a_sum)
        torch.sub(s_first, s_second, out=a_difference)
        torch.add(s_first, s_second, out=b_sum)
        torch.sub(c_second, c_first, out=b_difference)


def _from_halves(
    halves: tuple[Tensor, ...], coefficients: tuple[Tensor, ...], fields: Fields | None
) -> None:
    """The transpose of `_to_halves`."""
    if fields is None:
        for half, coefficient in zip(halves, coefficients):
            coefficient.copy_(half)
        return
    c_triv, c_sign, c_first, c_second, s_triv, s_sign, s_first, s_second = coefficients
    a_triv, a_sum, a_sign, a_difference, b_triv, b_sum, b_sign, b_difference = halves
    if fields.triv:
        c_triv.copy_(a_triv)
        s_triv.copy_(b_triv)
    if fields.sign:
        s_sign.copy_(a_sign)
        torch.neg(b_sign, out=c_sign)
    if fields.reg:
        torch.sub(a_sum, b_difference, out=c_first)
        torch.add(a_sum, b_difference, out=c_second)
        torch.add(a_difference, b_sum, out=s_first)
        torch.sub(b_sum, a_difference, out=s_second)


def _over_cut_(columns: Tensor, fields: Fields | None) -> Tensor:
    """Negate what changes its sign across the cut: B, or a conventional kernel's sines."""
    (columns.select(-4, 1) if fields is not None else columns.chunk(2, dim=-1)[1]).neg_()
    return columns


def _pad_(halves: Tensor, pad: int, fields: Fields | None) -> None:
    """Fill the first and the last `pad` of L + 2 pad columns from the inner ones."""
    length = halves.shape[-3] - 2 * pad
    for outer, inner in ((0, length), (length + pad, pad)):
        _over_cut_(halves.narrow(-3, outer, pad).copy_(halves.narrow(-3, inner, pad)), fields)


def _fold_(halves: Tensor, pad: int, fields: Fields | None) -> Tensor:
    """The transpose of `_pad_`: add the outer columns to the inner ones, and return these."""
    length = halves.shape[-3] - 2 * pad
    for outer, inner in ((0, length), (length + pad, pad)):
        halves.narrow(-3, inner, pad).add_(_over_cut_(halves.narrow(-3, outer, pad), fields))
    return halves.narrow(-3, pad, length)


def _analyse(x: Tensor, basis: Tensor, pad: int, fields: Fields | None) -> Tensor:
    """``(N, W, L, C)`` to the halves, with `pad` more columns on either side."""
    n, width, length, channels = x.shape
    count = len(basis) // 2  # of frequencies
    images, group = (2, channels) if fields is not None else (1, 2 * channels)
    halves = x.new_empty(count, images, length + 2 * pad, n, group)
    inner = halves.narrow(2, pad, length)
    rows = _to_planar(x, fields).reshape(n, width, -1)
    coefficients = torch.matmul(basis[:2 * count], rows).view(n, 2, count, length, channels)
    _to_halves(_split_coefficients(coefficients, fields), _split_halves(inner, fields), fields)
    _pad_(halves, pad, fields)
    return halves


class _Synthesis:
    """The transpose of `_analyse` without padding, and the bias.

    It takes one frequency after the other: what was just convolved is still in the cache.
    """

    def __init__(
        self, n: int, length: int, channels: int, basis: Tensor, fields: Fields | None,
        bias: Tensor | None = None,
    ) -> None:
        self.fields, count = fields, len(basis) // 2  # of frequencies
        self.basis = basis if bias is not None else basis[:2 * count]
        self.coefficients = basis.new_empty(n, len(self.basis), length, channels)
        waves = self.coefficients[:, :2 * count].unflatten(1, (2, count))
        parts = _split_coefficients(waves, fields)
        self.of_frequency = list(zip(*(part.unbind(0) for part in parts)))
        if bias is not None:
            self.coefficients[:, -1] = _to_planar(bias, fields)

    def write(self, f: int, halves: Tensor) -> None:
        """Frequency f, ``(2, L, N, C)``."""
        _from_halves(_split_halves(halves, self.fields), self.of_frequency[f], self.fields)

    def result(self) -> Tensor:
        """``(N, C, W, L)``, plus the bias."""
        n, _, length, channels = self.coefficients.shape
        y = torch.matmul(self.basis.t(), self.coefficients.flatten(2))
        return _from_planar(y.view(n, -1, length, channels), self.fields).permute(0, 3, 1, 2)


class _SpectralConv(torch.autograd.Function):
    """The convolution by `matrices`, the spectrum of `kernel`.

    The gradient goes to the matrices, and by autograd from there to the kernel; or, where it will
    be differentiated again, by the formula to the kernel itself.

    It keeps the halves for backward. Computing them again takes a transform in each layer, and
    saved no memory in bfloat16 and 8 % in float32 (peak of a training step of mobius_regular).
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, kernel: Tensor, matrices: Tensor, bias: Tensor | None, formula: Callable,
        in_fields: Fields | None, out_fields: Fields | None,
    ) -> Tensor:
        n, _, width, length = x.shape
        c_out, _, _, k = kernel.shape
        with torch.autocast("cpu", enabled=False):
            basis = _basis(width, k, x.dtype)
            halves = _analyse(x.permute(0, 2, 3, 1), basis, k // 2, in_fields)
            row = None if bias is None else bias.to(x.dtype)
            synthesis = _Synthesis(n, length, c_out, basis, out_fields, row)
            for f, taps in enumerate(matrices):
                image = F.conv2d(halves[f].permute(0, 3, 1, 2), taps.unsqueeze(3))
                synthesis.write(f, image.permute(0, 2, 3, 1))
            y = synthesis.result()
        ctx.save_for_backward(x, kernel, matrices, bias, halves)
        ctx.formula, ctx.fields = formula, (in_fields, out_fields)
        # In-place operations may change the result, which they may not if it is a view from here.
        return y.data

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, kernel, matrices, bias, halves = ctx.saved_tensors
        needs_x, needs_kernel, _, needs_bias = ctx.needs_input_grad[:4]
        grad_x = grad_kernel = grad_matrices = grad_bias = None
        with torch.autocast("cpu", enabled=False):
            if needs_formula(grad):
                fields = () if ctx.fields[0] is None else ctx.fields

                def conv(x, kernel, bias):
                    bias = None if bias is None else bias.to(x.dtype)
                    return ctx.formula(x, kernel.to(x.dtype), bias, *fields)

                needs = needs_x, needs_kernel, needs_bias
                grad_x, grad_kernel, grad_bias = gradients(conv, (x, kernel, bias), needs, grad)
            else:
                if needs_bias:  # with dtype=, sum() would copy first and take four times as long
                    grad_bias = grad.sum(dim=(0, 2, 3)).to(bias.dtype)
                if needs_x or needs_kernel:  # a frozen layer may train its bias alone
                    grad_x, grad_matrices = _gradients(
                        x, matrices, halves, grad, needs_x, needs_kernel, *ctx.fields
                    )
        return grad_x, grad_kernel, grad_matrices, grad_bias, None, None, None


def _gradients(
    x: Tensor, matrices: Tensor, halves: Tensor, grad: Tensor, needs_x: bool,
    needs_matrices: bool, in_fields: Fields | None, out_fields: Fields | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to the input and the matrices."""
    n, c_in, width, length = x.shape
    k = matrices.shape[3]
    basis = _basis(width, k, x.dtype)
    grad_y = _analyse(grad.permute(0, 2, 3, 1), basis, 0, out_fields)
    synthesis = _Synthesis(n, length, c_in, basis, in_fields) if needs_x else None
    grad_matrices = torch.empty_like(matrices) if needs_matrices else None
    # oneDNN's kernel gradient in float32 has half its usual speed for k taps. With many channels, k
    # shifted copies side by side and a convolution of one tap win.
    by_copies = needs_matrices and x.dtype == torch.float32 and min(matrices.shape[1:3]) >= 32
    for f, taps in enumerate(matrices):
        images = grad_y[f].permute(0, 3, 1, 2), halves[f].permute(0, 3, 1, 2)
        grad_image, grad_taps, _ = torch.ops.aten.convolution_backward(
            *images, taps.unsqueeze(3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [needs_x, needs_matrices and not by_copies, False],
        )
        if needs_x:
            synthesis.write(f, _fold_(grad_image.permute(0, 2, 3, 1), k // 2, in_fields))
        if by_copies:
            grad_matrices[f] = _taps_gradient(halves[f], grad_y[f], k)
        elif needs_matrices:
            grad_matrices[f] = grad_taps.squeeze(3)
    return synthesis.result() if needs_x else None, grad_matrices


def _taps_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """The kernel gradient ``(o, i, k)`` of a convolution of k taps.

    Args:
        x: input ``(images, L + k - 1, N, i)``.
        grad: gradient of the output ``(images, L, N, o)``.
    """
    i, o = x.shape[3], grad.shape[3]
    if i <= o:
        return _product(_taps(x, k), grad).view(o, k, i).transpose(1, 2)
    # Fewer channels to copy on the other side, where the last tap comes first.
    copies = _taps(F.pad(grad, (0, 0, 0, 0, k - 1, k - 1)), k)
    return _product(x, copies).view(k, o, i).flip(0).permute(1, 2, 0)


def _taps(x: Tensor, k: int) -> Tensor:
    """Every k columns side by side: ``(…, L, N, C)`` to ``(…, L - k + 1, N, k C)``."""
    return x.unfold(1, k, 1).transpose(3, 4).flatten(3)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The sum over all pixels of ``(…, i)`` times ``(…, o)``, ``(o, i)``.

    It is the kernel gradient of a 1 x 1 convolution.
    """
    i, o = left.shape[3], right.shape[3]
    images = [side.reshape(1, -1, *side.shape[2:]).permute(0, 3, 1, 2) for side in (right, left)]
    return torch.ops.aten.convolution_backward(
        *images, left.new_empty(o, i, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [False, True, False],
    )[1].view(o, i)
