"""Feature fields on the Möbius strip: channel layout, rho(s), gauge transformations, isometries.

The strip is a rectangle of W x L pixels whose short ends are glued with a twist. A feature map is a
tensor of shape ``(N, C, W, L)``: dim 2 runs across the strip (width), dim 3 along it (length). The cut
lies between column L-1 and column 0, and whoever walks over it comes out reflected: pixel w becomes
W-1-w, and feature vectors are acted on by rho(s), with s the reflection in the group R = {e, s}.

A feature space is given by the multiplicities ``(m_triv, m_sign, m_reg)`` of three field types. This
file is the only one that knows where their channels lie and how s acts on them.

Source: Weiler, Forré, Verlinde, Welling, *Coordinate Independent Convolutional Networks* (2021),
arXiv:2106.06020, Section 5.
"""

import operator
from typing import Callable, NamedTuple

import torch
from torch import Tensor


class Fields(NamedTuple):
    """Multiplicities of the field types, in the order of their channels. Equal to the plain tuple.

    triv: number of trivial (scalar) fields, one channel each.
    sign: number of sign-flip fields, one channel each.
    reg:  number of regular fields, two adjacent channels each.
    """

    triv: int
    sign: int
    reg: int
    planar = False

    def __str__(self) -> str:
        return f"{tuple(self)}{' planar' if self.planar else ''}"

    @property
    def channels(self) -> int:
        """Number of channels C = m_triv + m_sign + 2 m_reg."""
        return sum(m * REPRESENTATIONS[name].dim for name, m in zip(REPRESENTATIONS, self))


class PlanarFields(Fields):
    """The same fields with their channels in another order: all first ones of regular fields, then all second ones.

    For networks that are faster for it; layers and functions that are given such fields expect and return this order.
    """

    __slots__ = ()
    planar = True


class Representation(NamedTuple):
    """What the layers need to know of a field type.

    dim:      channels of one field.
    rho_s:    the action of s on dim 1 of a tensor of such fields.
    permutes: whether rho(s) permutes channels, so that it commutes with every pointwise function. Otherwise it
              flips signs, and commutes with odd functions only.
    invariant_bias: from one number for each field to the vector with rho(s) b = b; None where that is zero.
    """

    dim: int
    rho_s: Callable[[Tensor], Tensor]
    permutes: bool
    invariant_bias: Callable[[Tensor], Tensor] | None


def _negate(x: Tensor) -> Tensor:
    # Negating an unsigned integer wraps around without a word; a bool has no negative at all.
    if not x.dtype.is_signed:
        raise ValueError(f"sign-flip fields need a dtype with negative numbers, got {x.dtype}")
    return -x


def interleave(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Channels of regular fields on `dim`, from the first and the second channels of all of them."""
    dim %= first.ndim
    return torch.stack([first, second], dim=dim + 1).flatten(dim, dim + 1)


def _swap_pairs(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def _swap_planes(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).flip(1).flatten(1, 2)


REPRESENTATIONS = {
    # In the order of the channels, under the names of `Fields`.
    "triv": Representation(1, lambda x: x, True, lambda bias: bias),
    "sign": Representation(1, _negate, False, None),
    "reg": Representation(2, _swap_pairs, True, lambda bias: interleave(bias, bias, dim=0)),
}


def arrange_channels(x: Tensor, fields: Fields, dim: int = 1) -> Tensor:
    """From adjacent channels of regular fields on `dim` to the order of `fields`."""
    if not fields.planar or not fields.reg:
        return x
    scalars, pairs = x.split((fields.triv + fields.sign, 2 * fields.reg), dim)
    return torch.cat([scalars, *pairs.unflatten(dim, (-1, 2)).unbind(dim + 1)], dim)


def adjacent_channels(x: Tensor, fields: Fields, dim: int = 1) -> Tensor:
    """From the order of `fields` to adjacent channels of regular fields on `dim`."""
    if not fields.planar or not fields.reg:
        return x
    scalars, first, second = x.split((fields.triv + fields.sign, fields.reg, fields.reg), dim)
    return torch.cat([scalars, interleave(first, second, dim)], dim)


def as_integer(value, name: str, allowed: str = "an integer") -> int:
    """`value` as an int. Raises ValueError, by `name` and with what is `allowed`, for what is no integer or a bool."""
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
        name: what to call them in an error.

    Raises:
        ValueError: if they are anything else.
    """
    try:
        kind = type(fields) if isinstance(fields, Fields) else Fields
        fields = tuple(fields)
        parsed = kind(*(as_integer(m, name) for m in fields))
        if min(parsed) < 0 or max(parsed) == 0:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be three non-negative integers (m_triv, m_sign, m_reg), not all zero, got {fields!r}"
        ) from None
    return parsed


def check_strip(x: Tensor) -> None:
    """Raise ValueError unless `x` is 4-d with a width and a length."""
    if x.ndim != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"expected a 4-d tensor (N, C, W, L) with W, L >= 1, got shape {tuple(x.shape)}")


def check_features(x: Tensor, fields: Fields) -> None:
    """Raise ValueError unless `x` is a feature map with the channels of `fields`."""
    check_strip(x)
    if x.shape[1] != fields.channels:
        raise ValueError(
            f"expected {fields.channels} channels for fields {tuple(fields)}, got shape {tuple(x.shape)}"
        )


def split_types(x: Tensor, fields: Fields) -> dict[str, Tensor]:
    """Views of the channels of each field type that occurs in `fields`, in the order of the channels."""
    sizes = {name: m * REPRESENTATIONS[name].dim for name, m in zip(REPRESENTATIONS, fields) if m}
    return dict(zip(sizes, x.split(list(sizes.values()), dim=1)))


def map_types(x: Tensor, fields: Fields, functions: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """Apply ``functions[type]`` to the channels of each field type."""
    blocks = split_types(x, fields)
    if len(blocks) == 1:  # no copy of what is all of one type
        return functions[next(iter(blocks))](x)
    return torch.cat([functions[name](block) for name, block in blocks.items()], dim=1)


def map_pointwise(x: Tensor, fields: Fields, function: Callable, odd_function: Callable) -> Tensor:
    """Apply `function` to the channels that rho(s) permutes and `odd_function` to those whose sign it flips."""
    if all(rep.permutes or not m for rep, m in zip(REPRESENTATIONS.values(), fields)):  # one call for all types
        return function(x)
    functions = {name: function if rep.permutes else odd_function for name, rep in REPRESENTATIONS.items()}
    return map_types(x, fields, functions)


def gauge_transform(x: Tensor, fields) -> Tensor:
    """Reflect all frames: rho(s) acts on the channels, no pixel moves.

    Args:
        x: feature map ``(N, C, W, L)`` of any dtype and device.
        fields: multiplicities ``(m_triv, m_sign, m_reg)`` with C channels in all.

    Returns:
        A tensor of the same shape; it is `x` itself where rho is trivial.

    Raises:
        ValueError: if `x` does not have C channels, is not 4-d, or has sign-flip fields in a dtype without
            negative numbers.

    Source: arXiv:2106.06020, Section 5.
    """
    fields = as_fields(fields)
    check_features(x, fields)
    return _rho_s(x, fields)


def _rho_s(x: Tensor, fields: Fields) -> Tensor:
    functions = {name: rep.rho_s for name, rep in REPRESENTATIONS.items()}
    if fields.planar:
        functions["reg"] = _swap_planes
    return map_types(x, fields, functions)


def cross_cut(x: Tensor, fields: Fields) -> Tensor:
    """Columns as they look from the other side of the cut: flipped across the width, acted on by rho(s).

    Args:
        x: any number of columns ``(N, C, W, columns)``.
        fields: multiplicities with C channels in all.
    """
    return _rho_s(x.flip(2), fields)


def double_cover(x: Tensor, fields: Fields) -> Tensor:
    """The field on the orientable double cover, the cylinder ``[x | cross_cut(x)]`` of shape (N, C, W, 2L)."""
    return torch.cat([x, cross_cut(x, fields)], dim=3)


def isometry_action(x: Tensor, shift, fields) -> Tensor:
    """Move a field along the strip: content goes `shift` columns to the right and re-enters reflected.

    The period is 2L: a shift by L is the pure reflection with rho(s), a shift by 2L the identity.

    Args:
        x: feature map ``(N, C, W, L)`` of any dtype and device.
        shift: any integer, or an integer tensor of shape ``(N,)`` with a shift for each sample.
        fields: multiplicities ``(m_triv, m_sign, m_reg)`` with C channels in all.

    Returns:
        A new tensor of the same shape.

    Raises:
        ValueError: as `gauge_transform`, or if `shift` is neither of the two.

    Source: arXiv:2106.06020, Section 5.
    """
    fields = as_fields(fields)
    check_features(x, fields)
    length = x.shape[3]
    columns = torch.arange(length, device=x.device)
    cover = double_cover(x, fields)
    if isinstance(shift, Tensor) and shift.ndim:
        if shift.shape != x.shape[:1] or shift.is_floating_point() or shift.is_complex() or shift.dtype == torch.bool:
            raise ValueError(
                f"shift must be an integer or an integer tensor of shape ({x.shape[0]},), "
                f"got {shift.dtype} of shape {tuple(shift.shape)}"
            )
        # Reduced first: any other order can overflow.
        shift = shift.to(x.device, torch.long) % (2 * length)
        source = (columns - shift[:, None]) % (2 * length)
        return cover.gather(3, source[:, None, None, :].expand(x.shape))
    return cover.index_select(3, (columns - as_integer(shift, "shift") % (2 * length)) % (2 * length))
