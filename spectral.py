"""The convolution on the strip in the Fourier basis of its width: the same numbers for a fraction of the arithmetic.

Across the width a strip ends: there are W rows, and zeros beyond. Taken as part of a circle of N = 2F >= W + k//2
rows, they are F pairs of coefficients, of cos(theta_f w) and sin(theta_f w) about the strip's centre line, with
theta_f = pi (f + 1/2) / F. There a convolution across the width is a product, one for each frequency. What is left
is a convolution of k taps along the length: k multiplications where the plain formula has k².

For a conventional kernel that product is complex. A steerable one makes it real, and that halves the work again.
Write fields in irreps (a regular field is a trivial and a sign-flip one: the sum and the difference of its two
channels). Kernels between irreps are symmetric or antisymmetric. A symmetric one multiplies the coefficients of
frequency f by C_f = sum_v K(v) cos(theta_f v), an antisymmetric one turns cosines into sines with
S_f = sum_v K(v) sin(theta_f v). So the coefficients fall into two halves that never mix, the even and the odd ones
under the reflection of the strip (its shift by L):

    A_f = (cos of trivial, sin of sign-flip)    and    B_f = (sin of trivial, -cos of sign-flip),

and one real matrix acts on both of them:

    M_f = [ C_f(triv, triv)    S_f(sign, triv) ]
          [-S_f(triv, sign)    C_f(sign, sign) ]

What crosses the cut is reflected, thus A comes back as it is and B negated: that is the padding along the length.

Everything here stands for ``(N, C, W, L)`` tensors in the memory format channels_last, on the CPU.
Source of the kernels: arXiv:2106.06020, Section 5.
"""

import math
import threading
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_path import gradients, is_plain, needs_formula
from fields import Fields, adjacent_channels, arrange_channels, interleave, split_types

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def pays(x: Tensor, out_channels: int, kernel_size: int) -> bool:
    """Whether the convolution of `x` is faster here than by the plain formula. Measured on two AVX-512 cores:

    - Tools that look inside get the plain formula (see `is_plain`). On a GPU this one has not been measured.
    - The transforms read and write every channel a few times. That is bandwidth, and the convolution has to be large
      enough to earn it: from 32 channels on either side (16 to 32 channels come out even), and k >= 5 (k = 3 has
      9 multiplications to save from, k = 5 has 25).
    - Frequencies are convolved side by side along the length and the batch; below 16 samples the vectors are short.
    - The transforms are dense matrices, W multiplications for each value: a wide strip would need an FFT.
    """
    n, channels, width, length = x.shape
    return (
        is_plain(x)
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.stride() == (width * length * channels, 1, length * channels, channels)
        and kernel_size >= 5
        and min(channels, out_channels) >= 32
        and n >= 16
        and width * (channels + out_channels) <= kernel_size**2 * channels * out_channels / 4
    )


def steerable_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, in_fields: Fields, out_fields: Fields) -> Tensor:
    """The steerable convolution of `x`, transport padding included.

    Args:
        x: ``(N, C_in, W, L)``, in the memory format channels_last.
        kernel: of `steerable_spectrum` for this W, ``(F, C_out, C_in, k)``, in the dtype of `x`.
        bias: ``(C_out,)``, in the dtype of `x`, or None.
        in_fields, out_fields: multiplicities.

    Returns:
        Tensor ``(N, C_out, W, L)``, in the memory format channels_last.
    """
    return _SpectralConv.apply(x, kernel, bias, in_fields, out_fields)


def conventional_conv(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of `x` by any kernel, padded over the cut as scalars are.

    As `steerable_conv`, with the `kernel` of `conventional_spectrum`, ``(F, 2 C_out, 2 C_in, k)``.
    """
    return _SpectralConv.apply(x, kernel, bias, None, None)


def steerable_spectrum(rows: Tensor, in_fields: Fields, out_fields: Fields, width: int) -> Tensor:
    """The matrices M_f of a steerable kernel.

    Args:
        rows: ``(m_triv + m_sign + m_reg, C_in, k, k)``, the kernel for the first channel of every output field,
            the two input channels of a regular field adjacent.
        in_fields, out_fields: multiplicities.
        width: W of the strip.

    Returns:
        Tensor ``(F, C_out, C_in, k)``, with the channels in the order of irreps: trivial, then sign-flip.
    """
    columns = split_types(rows, Fields(*in_fields))
    triv, sign = [columns.get("triv")], [columns.get("sign")]
    if "reg" in columns:
        # x1 = (t + s) / 2 and x2 = (t - s) / 2 for the sum t and the difference s of a field's two channels.
        first, second = (columns["reg"] / 2).unflatten(1, (-1, 2)).unbind(2)
        triv.append(first + second)
        sign.append(first - second)
    irreps = torch.cat([block for block in (*triv, *sign) if block is not None], dim=1)
    n_triv = in_fields.triv + in_fields.reg
    # The first channel of a regular field is t' + s': its symmetric part maps to t', its antisymmetric part to s',
    # and the cosine and the sine transform pick out these two.
    sizes = [out_fields.triv, out_fields.sign, out_fields.reg]
    (c_triv, c_sign, c_reg), (s_triv, s_sign, s_reg) = (part.split(sizes, 1) for part in _transform(irreps, width))
    upper = torch.cat([torch.cat([c_triv, c_reg], 1)[:, :, :n_triv], torch.cat([s_triv, s_reg], 1)[:, :, n_triv:]], 2)
    lower = torch.cat([-torch.cat([s_sign, s_reg], 1)[:, :, :n_triv], torch.cat([c_sign, c_reg], 1)[:, :, n_triv:]], 2)
    return torch.cat([upper, lower], 1)


def conventional_spectrum(kernel: Tensor, width: int) -> Tensor:
    """The complex products of any kernel ``(C_out, C_in, k, k)`` as real matrices ``(F, 2 C_out, 2 C_in, k)``."""
    cosine, sine = _transform(kernel, width)
    return torch.cat([torch.cat([cosine, sine], 2), torch.cat([-sine, cosine], 2)], 1)


def _transform(kernel: Tensor, width: int) -> Tensor:
    """``(o, i, k, k)`` to sum_v K(v) cos(theta_f v) and sum_v K(v) sin(theta_f v), ``(2, F, o, i, k)``."""
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
@torch.inference_mode(False)  # a tensor born in inference mode could not take part in autograd later
def _basis(width: int, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """Cosines, sines, and a row of ones for the bias: ``(2 F + 1, W)``. Orthonormal columns but for the ones."""
    position = torch.arange(width, dtype=torch.float64, device="cpu") - (width - 1) / 2
    phase = _frequencies(width, kernel_size)[:, None] * position
    waves = torch.cat([phase.cos(), phase.sin()]) / math.sqrt(len(phase))
    return torch.cat([waves, torch.ones_like(waves[:1])]).to(dtype)


# ------------------------------------------------------------------------------------------------------
# The two halves of the coefficients are stored as (F, 2, L, N, C): for each frequency a batch of two "images" of
# L x N pixels, which the convolution along the length reads row after row. A conventional kernel mixes cosines and
# sines, so that both are channels of one image: (F, 1, L, N, 2 C).


def _shuffle_regular(x: Tensor, fields: Fields | None, *, planar: bool) -> Tensor:
    """Channels (dim 3) from the order of `fields` to the planar one (see `PlanarFields`), or back.

    Sums and differences of two channels then read and write memory in order, several times faster.
    """
    if fields is None or not fields.reg or fields.planar:
        return x
    scalars = fields.triv + fields.sign
    pairs = x[..., scalars:].permute(0, 3, 1, 2)
    shuffled = F.channel_shuffle(pairs, fields.reg if planar else 2).permute(0, 2, 3, 1)
    return torch.cat([x[..., :scalars], shuffled], dim=3) if scalars else shuffled


def _split_coefficients(spectrum: Tensor, fields: Fields | None) -> tuple[Tensor, ...]:
    """Views ``(F, L, N, …)`` of the coefficients ``(N, 2, F, L, C)`` of planar channels: cosines, then sines."""
    cosine, sine = spectrum.permute(1, 2, 3, 0, 4)
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


def _to_halves(coefficients: tuple[Tensor, ...], halves: tuple[Tensor, ...], fields: Fields | None) -> None:
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


def _from_halves(halves: tuple[Tensor, ...], coefficients: tuple[Tensor, ...], fields: Fields | None) -> None:
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
    """Negate what changes its sign over the cut: B, or of a conventional kernel's channels the sines."""
    (columns.select(-4, 1) if fields is not None else columns.chunk(2, dim=-1)[1]).neg_()
    return columns


def _pad_(halves: Tensor, pad: int, fields: Fields | None) -> None:
    """Fill the first and the last `pad` of L + 2 pad columns from the inner ones."""
    length = halves.shape[-3] - 2 * pad
    for outer, inner in ((0, length), (length + pad, pad)) if pad else ():
        _over_cut_(halves.narrow(-3, outer, pad).copy_(halves.narrow(-3, inner, pad)), fields)


def _fold_(halves: Tensor, pad: int, fields: Fields | None) -> Tensor:
    """The transpose of `_pad_`: add the outer columns to the inner ones, and return the inner ones."""
    length = halves.shape[-3] - 2 * pad
    for outer, inner in ((0, length), (length + pad, pad)) if pad else ():
        halves.narrow(-3, inner, pad).add_(_over_cut_(halves.narrow(-3, outer, pad), fields))
    return halves.narrow(-3, pad, length)


class _Workspace(threading.local):
    """Memory for intermediate results, kept from call to call.

    Blocks of ten megabytes go back to the system when they are freed, and fault in page by page the next time: that
    takes longer than the arithmetic on them.
    """

    def __init__(self) -> None:
        self.blocks = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        block = self.blocks.get((name, dtype))
        if block is None or block.numel() < size:
            with torch.inference_mode(False):
                block = self.blocks[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return block[:size].view(shape)


_workspace = _Workspace()


def _analyse(x: Tensor, basis: Tensor, name: str, pad: int, fields: Fields | None, with_ones: bool = False):
    """``(N, W, L, C)`` to the padded halves, in the workspace, and its sum over N, W and L where asked for."""
    x = _shuffle_regular(x, fields, planar=True)
    n, width, length, channels = x.shape
    rows, half = len(basis) - (not with_ones), len(basis) // 2
    spectrum = _workspace("spectrum", (n, rows, length, channels), x.dtype)
    torch.bmm(basis[:rows].expand(n, -1, -1), x.reshape(n, width, -1), out=spectrum.view(n, rows, -1))
    images, group = (2, channels) if fields is not None else (1, 2 * channels)
    halves = _workspace(name, (half, images, length + 2 * pad, n, group), x.dtype)
    coefficients = _split_coefficients(spectrum[:, :2 * half].unflatten(1, (2, half)), fields)
    _to_halves(coefficients, _split_halves(halves.narrow(2, pad, length), fields), fields)
    _pad_(halves, pad, fields)
    if not with_ones:
        return halves, None
    total = spectrum[:, -1].sum(dim=(0, 1))
    return halves, _shuffle_regular(total.view(1, 1, 1, -1), fields, planar=False).flatten()


class _Synthesis:
    """The transpose of `_analyse` without padding, frequency by frequency: what was just convolved is still in the cache."""

    def __init__(self, n: int, length: int, channels: int, basis: Tensor, fields: Fields | None, bias: Tensor | None = None):
        self.fields, self.shape = fields, (n, basis.shape[1], length, channels)
        half = len(basis) // 2
        self.basis = basis[:2 * half + (bias is not None)]
        self.spectrum = _workspace("spectrum", (n, len(self.basis), length, channels), basis.dtype)
        coefficients = _split_coefficients(self.spectrum[:, :2 * half].unflatten(1, (2, half)), fields)
        self.coefficients = list(zip(*(part.unbind(0) for part in coefficients)))
        if bias is not None:
            self.spectrum[:, -1] = _shuffle_regular(bias.view(1, 1, 1, -1), fields, planar=True)

    def write(self, f: int, halves: Tensor) -> None:
        """Frequency f, ``(2, L, N, C)``."""
        _from_halves(_split_halves(halves, self.fields), self.coefficients[f], self.fields)

    def result(self) -> Tensor:
        """``(N, W, L, C)``, plus the bias."""
        x = torch.matmul(self.basis.t(), self.spectrum.flatten(2)).view(self.shape)
        return _shuffle_regular(x, self.fields, planar=False)


class _SpectralConv(torch.autograd.Function):
    """Only the input and the kernel are kept for the gradient: the halves are cheap to compute again."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, bias: Tensor | None, in_fields: Fields | None, out_fields: Fields | None):
        ctx.save_for_backward(x, kernel, bias)
        ctx.in_fields, ctx.out_fields = in_fields, out_fields
        k = kernel.shape[3]
        n, _, width, length = x.shape
        basis = _basis(width, k, x.dtype)
        halves, _ = _analyse(x.permute(0, 2, 3, 1), basis, "input", k // 2, in_fields)
        channels = kernel.shape[1] // (1 if out_fields is not None else 2)
        synthesis = _Synthesis(n, length, channels, basis, out_fields, bias)
        for f, (image, taps) in enumerate(zip(halves.permute(0, 1, 4, 2, 3).unbind(0), kernel.unsqueeze(4).unbind(0))):
            synthesis.write(f, F.conv2d(image, taps).permute(0, 2, 3, 1))
        return synthesis.result().permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, kernel, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if needs_formula(grad):
            def conv(x, kernel, bias):
                return formula(x, kernel, bias, ctx.in_fields, ctx.out_fields)

            return *gradients(conv, (x, kernel, bias), needs, grad), None, None
        with torch.autocast("cpu", enabled=False):
            return *_SpectralConv._gradients(x, kernel, grad, needs, ctx.in_fields, ctx.out_fields), None, None

    @staticmethod
    def _gradients(x: Tensor, kernel: Tensor, grad: Tensor, needs, in_fields: Fields | None, out_fields: Fields | None):
        half, c_out, c_in, k = kernel.shape
        n, channels, width, length = x.shape
        basis = _basis(width, k, x.dtype)
        # The workspace holds one spectrum at a time: the halves first, the synthesis after them.
        grad_y, grad_bias = _analyse(grad.permute(0, 2, 3, 1), basis, "grad", 0, out_fields, with_ones=needs[2])
        halves, _ = _analyse(x.permute(0, 2, 3, 1), basis, "input", k // 2, in_fields)
        synthesis = _Synthesis(n, length, channels, basis, in_fields) if needs[0] else None
        grad_kernel = torch.empty_like(kernel) if needs[1] else None
        # oneDNN's kernel gradient in float32 has half its usual speed for k taps. With many channels, k shifted
        # copies side by side and a convolution of one tap win.
        by_copies = needs[1] and x.dtype == torch.float32 and min(c_in, c_out) >= 32
        for f in range(half):
            grad_image, grad_taps, _ = torch.ops.aten.convolution_backward(
                grad_y[f].permute(0, 3, 1, 2), halves[f].permute(0, 3, 1, 2), kernel[f].unsqueeze(3), None,
                [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [needs[0], needs[1] and not by_copies, False],
            )
            if needs[0]:
                synthesis.write(f, _fold_(grad_image.permute(0, 2, 3, 1), k // 2, in_fields))
            if needs[1]:
                grad_kernel[f] = _taps_gradient(halves[f], grad_y[f], k) if by_copies else grad_taps.squeeze(3)
        grad_x = synthesis.result().permute(0, 3, 1, 2) if needs[0] else None
        return grad_x, grad_kernel, grad_bias


def _taps_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """The kernel gradient ``(o, i, k)`` of a convolution of k taps from ``(b, L + k - 1, N, i)`` to ``(b, L, N, o)``."""
    images, length, n, o = grad.shape
    i = x.shape[3]
    if i <= o:
        copies = _workspace("copies", (images, length, n, k, i), grad.dtype).copy_(x.unfold(1, k, 1).transpose(3, 4))
        return _product(copies.flatten(3), grad).view(o, k, i).transpose(1, 2)
    # Fewer channels to copy on the other side.
    copies = _workspace("copies", (images, length + k - 1, n, k, o), grad.dtype).zero_()
    for tap in range(k):
        copies[:, tap:tap + length, :, tap] = grad
    return _product(x, copies.flatten(3)).view(k, o, i).permute(1, 2, 0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The sum over all pixels of ``(…, i)`` times ``(…, o)``, as the kernel gradient of a 1 x 1 convolution: ``(o, i)``."""
    i, o = left.shape[3], right.shape[3]
    images = [side.view(1, -1, *side.shape[2:]).permute(0, 3, 1, 2) for side in (right, left)]
    return torch.ops.aten.convolution_backward(
        *images, left.new_empty(o, i, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1].view(o, i)


def formula(x: Tensor, kernel: Tensor, bias: Tensor | None, in_fields: Fields | None, out_fields: Fields | None) -> Tensor:
    """What `_SpectralConv` computes, in operations that autograd differentiates again."""
    half, c_out, c_in, k = kernel.shape
    pad, length = k // 2, x.shape[3]
    basis = _basis(x.shape[2], k, x.dtype)[:-1].unflatten(0, (2, half))
    if in_fields is not None:
        x = adjacent_channels(x, in_fields)
    cosine, sine = torch.einsum("bfw,ncwl->bnlfc", basis, x)
    if in_fields is None:
        halves = torch.cat([cosine, sine], dim=-1)[None]
        over_cut = torch.cat([torch.ones_like(cosine[0, 0, 0]), -torch.ones_like(sine[0, 0, 0])], dim=-1)
    else:
        def irreps(x: Tensor) -> tuple[Tensor, Tensor]:
            triv, sign, reg = x.split((in_fields.triv, in_fields.sign, 2 * in_fields.reg), dim=-1)
            first, second = reg.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.cat([triv, first + second], dim=-1), torch.cat([sign, first - second], dim=-1)

        (c_triv, c_sign), (s_triv, s_sign) = irreps(cosine), irreps(sine)
        halves = torch.stack([torch.cat([c_triv, s_sign], dim=-1), torch.cat([s_triv, -c_sign], dim=-1)])
        over_cut = halves.new_tensor([1, -1]).view(2, 1, 1, 1, 1)
    left, right = halves.narrow(2, length - pad, pad), halves.narrow(2, 0, pad)
    halves = torch.cat([over_cut * left, halves, over_cut * right], dim=2)
    y = F.conv2d(halves.permute(0, 3, 4, 2, 1).flatten(1, 2), kernel.flatten(0, 1).unsqueeze(3), groups=half)
    y = y.unflatten(1, (half, c_out)).permute(0, 4, 3, 1, 2)
    if out_fields is None:
        cosine, sine = y[0].chunk(2, dim=-1)
    else:
        n_triv = out_fields.triv + out_fields.reg
        (c_triv, s_sign), (s_triv, c_sign) = (part.split((n_triv, c_out - n_triv), dim=-1) for part in y)

        def channels(triv: Tensor, sign: Tensor) -> Tensor:
            triv, total = triv.split((out_fields.triv, out_fields.reg), dim=-1)
            sign, difference = sign.split((out_fields.sign, out_fields.reg), dim=-1)
            return torch.cat([triv, sign, interleave(total + difference, total - difference, dim=-1)], dim=-1)

        cosine, sine = channels(c_triv, -c_sign), channels(s_triv, s_sign)
    y = torch.einsum("bfw,bnlfc->ncwl", basis, torch.stack([cosine, sine]))
    if out_fields is not None:
        y = arrange_channels(y, out_fields)
    return y if bias is None else y + bias[:, None, None]
