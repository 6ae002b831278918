"""Feature fields on the Möbius strip: channels, rho(s), gauge transformations and isometries.

The strip is a rectangle of W x L pixels whose short ends are glued with a twist. A feature map is a
tensor of shape ``(N, C, W, L)``: dim 2 runs across the strip (its width), dim 3 along it (its
length). The cut lies between column L-1 and column 0. Crossing it reflects: pixel w becomes W-1-w,
and rho(s) acts on the feature vectors, where s is the reflection in the group R = {e, s}.

A feature space is given by the multiplicities ``(m_triv, m_sign, m_reg)`` of three field types.
This file says how s acts on them.

Source: Weiler, Forré, Verlinde, Welling, *Coordinate Independent Convolutional Networks* (2021),
arXiv:2106.06020, Section 5.3.1 (field types), Figure 28 (isometries).
"""

import operator
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Fields(NamedTuple):
    """Multiplicities of the field types, in the order of their channels.

    triv: number of trivial (scalar) fields, one channel each.
    sign: number of sign-flip fields, one channel each.
    reg:  number of regular fields, two adjacent channels each.
    """

    triv: int
    sign: int
    reg: int

    @property
    def channels(self) -> int:
        """Number of channels C = m_triv + m_sign + 2 m_reg."""
        return sum(m * REPRESENTATIONS[name].dim for name, m in zip(REPRESENTATIONS, self))

    def __add__(self, other) -> "Fields":
        """The fields of two feature spaces together."""
        return Fields(*map(operator.add, self, as_fields(other)))

    __radd__ = __add__


def scalars(images: Tensor) -> Fields:
    """The fields of images, in which each channel is a scalar."""
    return Fields(images.shape[1], 0, 0)


class Representation(NamedTuple):
    """A field type.

    dim:   channels of one field.
    rho_s: the action of s on dim 1 of a tensor of such fields.
    invariant_bias: from one number for each field to a bias with rho(s) b = b; None if only b = 0
        is such a bias.
    """

    dim: int
    rho_s: Callable[[Tensor], Tensor]
    invariant_bias: Callable[[Tensor], Tensor] | None


def _negate(x: Tensor) -> Tensor:
    if not x.dtype.is_signed:  # unsigned integers would wrap around without an error
        raise ValueError(f"sign-flip fields need a dtype with negative numbers, got {x.dtype}")
    return -x


def interleave(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Channels of regular fields on `dim`, from all first and all second channels."""
    dim %= first.ndim
    return torch.stack([first, second], dim=dim + 1).flatten(dim, dim + 1)


def _swap_pairs(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


REPRESENTATIONS = {  # in the order of the channels, under the names of `Fields`
    "triv": Representation(1, lambda x: x, lambda bias: bias),
    "sign": Representation(1, _negate, None),
    "reg": Representation(2, _swap_pairs, lambda bias: interleave(bias, bias, dim=0)),
}


# --------------------------------------------------------------------------------------------------
# Symmetries


def split_types(x: Tensor, fields: Fields) -> dict[str, Tensor]:
    """Views of the channels of each field type, in their order; absent types have no key."""
    sizes = {name: m * REPRESENTATIONS[name].dim for name, m in zip(REPRESENTATIONS, fields) if m}
    return dict(zip(sizes, x.split(list(sizes.values()), dim=1)))


def concatenate(x: Tensor, x_fields, y: Tensor, y_fields) -> Tensor:
    """The fields of two feature maps together, of each type those of `x` first.

    Args:
        x, y: feature maps ``(N, C, W, L)`` and ``(N, C', W, L)``.
        x_fields, y_fields: their multiplicities. The result has ``x_fields + y_fields``, as
            `Fields`.

    Raises:
        ValueError: for features that do not have the channels of these fields.
    """
    x_fields, y_fields = as_fields(x_fields, "x_fields"), as_fields(y_fields, "y_fields")
    check_features(x, x_fields)
    check_features(y, y_fields)
    blocks = [split_types(x, x_fields), split_types(y, y_fields)]
    return torch.cat([types[name] for name in REPRESENTATIONS for types in blocks if name in types],
                     dim=1)


def rho_s(x: Tensor, fields: Fields) -> Tensor:
    """The action of s on the channels of `x`."""
    blocks = split_types(x, fields)
    if len(blocks) == 1:  # spares a copy
        return REPRESENTATIONS[next(iter(blocks))].rho_s(x)
    return torch.cat([REPRESENTATIONS[name].rho_s(block) for name, block in blocks.items()], dim=1)


def gauge_transform(x: Tensor, fields) -> Tensor:
    """Reflect all frames: rho(s) acts on the channels, no pixel moves.

    Args:
        x: feature map ``(N, C, W, L)`` of any dtype and device.
        fields: multiplicities ``(m_triv, m_sign, m_reg)`` with C channels in all.

    Returns:
        A tensor of the same shape; `x` itself where rho is trivial.

    Raises:
        ValueError: if `x` does not have C channels, is not 4-d, or has sign-flip fields in a dtype
            without negative numbers.

    Source: arXiv:2106.06020, Section 5.3.1.
    """
    fields = as_fields(fields)
    check_features(x, fields)
    return rho_s(x, fields)


def cross_cut(x: Tensor, fields: Fields) -> Tensor:
    """Columns as seen across the cut: flipped across the width, and acted on by rho(s).

    Of a kernel, whose dim 1 is the input, this is K(s.v) rho_in(s)^-1: rho(s) is symmetric and its
    own inverse.
    """
    return rho_s(x.flip(2), fields)


def double_cover(x: Tensor, fields: Fields) -> Tensor:
    """The field twice around the strip, on its double cover ``[x | cross_cut(x)]``, a cylinder."""
    return torch.cat([x, cross_cut(x, fields)], dim=3)


def isometry_action(x: Tensor, shift, fields) -> Tensor:
    """Move a field `shift` columns to the right; what leaves the strip re-enters reflected.

    A shift by L flips the width and applies rho(s); a shift by 2L is the identity.

    Args:
        x: feature map ``(N, C, W, L)`` of any dtype and device.
        shift: any integer, or an integer tensor of shape ``(N,)`` with a shift for each sample.
        fields: multiplicities ``(m_triv, m_sign, m_reg)`` with C channels in all.

    Returns:
        A new tensor of the same shape.

    Raises:
        ValueError: as `gauge_transform`, or if `shift` is not such an integer or tensor.

    Source: arXiv:2106.06020, Section 5, Figure 28.
    """
    fields = as_fields(fields)
    check_features(x, fields)
    length = x.shape[3]
    columns = torch.arange(length, device=x.device)
    cover = double_cover(x, fields)
    if isinstance(shift, Tensor) and shift.ndim:
        not_integer = shift.is_floating_point() or shift.is_complex() or shift.dtype == torch.bool
        if shift.shape != x.shape[:1] or not_integer:
            raise ValueError(
                f"shift must be an integer or an integer tensor of shape ({x.shape[0]},), "
                f"got {shift.dtype} of shape {tuple(shift.shape)}"
            )
        # Before the difference, which could overflow.
        shift = shift.to(x.device, torch.long) % (2 * length)
        source = (columns - shift[:, None]) % (2 * length)
        return cover.gather(3, source[:, None, None, :].expand(x.shape))
    shift = as_integer(shift, "shift") % (2 * length)
    return cover.index_select(3, (columns - shift) % (2 * length))


# --------------------------------------------------------------------------------------------------
# What layers need: sign-flip channels, and zeros up to rounding


def sign_channels(x: Tensor, fields: Fields) -> Tensor:
    """View of the channels of the sign-flip fields."""
    return x.narrow(1, fields.triv, fields.sign)


def in_sign_channels(values: Tensor, fields: Fields, others: float) -> Tensor:
    """`values` in the channels of the sign-flip fields, and one number in all others."""
    return F.pad(values, (0, 0, 0, 0, fields.triv, 2 * fields.reg), value=others)


# A convolution can return a few eps where the exact value is 0: an antisymmetric kernel on a blank
# part of the strip, for example. sign() would turn this noise into features of full size. So
# values within 64 eps of 0 count as 0, relative to the largest magnitude in the sample's sign-flip
# fields. Measured on digits: noise is at most 8 eps. All other values exceed 65536 eps in float64;
# in float32, 1 of 10,000 of them is below 64 eps (results/sign_rounding.json).
ROUNDING = 64


def largest_magnitude(magnitude: Tensor) -> Tensor:
    """The largest entry of each sample, ``(N, 1, 1, 1)``; no symmetry of the strip changes it.

    It has no gradient, and is neither 0 nor infinite: one divides by it.
    """
    limits = torch.finfo(magnitude.dtype)
    return magnitude.detach().amax(dim=(1, 2, 3), keepdim=True).clamp(limits.tiny, limits.max)


def sign_beyond_rounding(x: Tensor, largest: Tensor) -> Tensor:
    """The sign of values of sign-flip fields; 0 where they are 0 up to rounding.

    For float16 and bfloat16, eps is that of float32: noise that was rounded to half precision is
    larger, and keeps its sign.

    Args:
        x: values of sign-flip fields ``(N, C, W, L)``.
        largest: `largest_magnitude` of each sample, against which rounding is measured.
    """
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return F.hardshrink(x.detach() / largest, ROUNDING * eps).sign()


def signed_extremum(largest: Tensor, negated_smallest: Tensor) -> Tensor:
    """Of two values of sign-flip fields that of larger magnitude; 0 if opposite up to rounding."""
    magnitude = largest.clamp(min=negated_smallest)  # maximum(), with fewer kernels in the gradient
    difference = largest - negated_smallest
    return sign_beyond_rounding(difference, largest_magnitude(magnitude)) * magnitude


def sample_norms(x: Tensor) -> Tensor:
    """L2 norms of the samples, ``(N,)``. Over channels, then over pixels, to round less."""
    pixels = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vector_norm(pixels, dim=(1, 2))


# --------------------------------------------------------------------------------------------------
# Checks


def as_integer(value, name: str, allowed: str = "an integer") -> int:
    """Return `value` as an int. Raises ValueError for bools and other types."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be {allowed}, got {value!r}") from None


def as_fields(fields, name: str = "fields") -> Fields:
    """Check multiplicities and return them as `Fields`.

    Args:
        fields: three non-negative integers ``(m_triv, m_sign, m_reg)``, not all zero.
        name: what an error calls them.

    Raises:
        ValueError: for anything else.
    """
    try:
        fields = tuple(fields)
        parsed = Fields(*(as_integer(m, name) for m in fields))
        if min(parsed) < 0 or max(parsed) == 0:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be three non-negative integers (m_triv, m_sign, m_reg), not all zero, "
            f"got {fields!r}"
        ) from None
    return parsed


def check_strip(x: Tensor) -> None:
    """Raise ValueError unless `x` is a 4-d tensor with a width and a length."""
    if not isinstance(x, Tensor):
        raise ValueError(f"expected a torch.Tensor (N, C, W, L), got {type(x).__name__}")
    if x.ndim != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(
            f"expected a 4-d tensor (N, C, W, L) with W, L >= 1, got shape {tuple(x.shape)}"
        )


def check_features(x: Tensor, fields: Fields) -> None:
    """Raise ValueError unless `x` is a feature map with the channels of `fields`."""
    check_strip(x)
    if x.shape[1] != fields.channels:
        raise ValueError(
            f"expected {fields.channels} channels for fields {tuple(fields)}, "
            f"got shape {tuple(x.shape)}"
        )


def check_input(x: Tensor, fields: Fields) -> None:
    """`check_features` for the input of a layer, which is floating point."""
    check_features(x, fields)
    if not x.dtype.is_floating_point:
        raise ValueError(f"expected floating point numbers, got {x.dtype}: take x.float()")
