"""Is a module equivariant on the Möbius strip? For layers and networks of any origin.

    equivariance_error    how far it is from it
    assert_equivariant    an AssertionError that names the transformation and the field type

docs/layers.md says of many layers whether they are equivariant, and why.

Source: arXiv:2106.06020, Section 5, Figure 28 (isometries), Section 5.3.1 (gauge transformations).
"""

import copy
import math
from functools import partial
from itertools import chain
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from fields import (
    Fields,
    as_fields,
    as_integer,
    check_features,
    gauge_transform,
    isometry_action,
    split_types,
)

TYPE_NAMES = {"triv": "trivial fields", "sign": "sign-flip fields", "reg": "regular fields"}


def equivariance_error(
    module: Callable, in_fields, out_fields, *,
    size: tuple[int, int] = (12, 16), step: int = 1, pointwise: bool = False,
    randomize: bool = False,
) -> float:
    """How far a module is from commuting with the isometries of the strip.

    The largest difference between the output for a transformed input and the transformed output,
    relative to the largest output. It is a few eps of the dtype for an equivariant layer, and NaN
    if an output is. The inputs are noise, and strokes on a blank strip. Rounding noise is added
    to each, as from preceding layers: a layer that depends on the sign of this noise fails.

    The module is called as it is: with its device, dtype (of its first parameter or buffer) and
    mode (training or evaluation). Nothing changes in it, nor in the random state: batch statistics
    are not updated, and dropout draws the same in each call.

    Args:
        module: from ``(N, C_in, W, L)`` to the output; any function will do. If it has no
            parameters and no buffers, the input is float64 on the CPU.
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)`` of the input.
        out_fields: multiplicities of the output ``(N, C_out, W', L')``; None for an output that
            should not change, such as logits.
        size: W and L of the input.
        step: the shifts are 0, step, 2 step, ... below 2L. The output should move by shift * L' / L
            columns. For a module that pools once, only even shifts can pass: take step 2.
        pointwise: try a gauge transformation too, for layers that commute with `gauge_transform`:
            pooling, nonlinearities, normalisations. A convolution by k > 1 does not, unless all
            fields are trivial: reflected frames reflect its kernel too (see `MobiusConv`).
        randomize: add noise to all parameters and to running means and variances, in a copy of the
            module. The values of a new module hide faults: biases are 0, scales are equal.

    Raises:
        ValueError: for an argument that is not allowed, or an output that does not have the
            channels of `out_fields` or a length to which `step` fits.
    """
    differences = _differences(module, in_fields, out_fields, size, step, pointwise, randomize)
    return _worst(differences).error


def assert_equivariant(
    module: Callable, in_fields, out_fields, tolerance: float = 1e-4, *,
    size: tuple[int, int] = (12, 16), step: int = 1, pointwise: bool = False,
    randomize: bool = False,
) -> None:
    """Raise AssertionError if `equivariance_error` exceeds `tolerance`.

    The message names the transformation and the field type of the output for which it is largest.
    If that is a shift by 0, the module amplifies rounding errors. In float64
    (``copy.deepcopy(module).double()``) even a deep network stays below 1e-9.

    Raises:
        AssertionError: if the module is not equivariant.
        ValueError: as `equivariance_error`, or for a tolerance that is not a number.
    """
    if not isinstance(tolerance, (int, float)):
        raise ValueError(f"tolerance must be a number, got {tolerance!r}")
    differences = _differences(module, in_fields, out_fields, size, step, pointwise, randomize)
    worst, tried = _worst(differences), {difference.transformation for difference in differences}
    if not worst.error <= tolerance:
        failed = {difference.transformation for difference in differences
                  if not difference.error <= tolerance}
        raise AssertionError(
            f"not equivariant: under a {worst.transformation}, the output's {worst.part} are off "
            f"by {worst.error:.2g} of the largest output (tolerance {tolerance:g}, exceeded by "
            f"{len(failed)} of {len(tried)} transformations)"
        )


class Difference(NamedTuple):
    error: float
    transformation: str
    part: str


def _worst(differences: list[Difference]) -> Difference:
    # torch takes NaN for the largest
    return differences[torch.tensor([difference.error for difference in differences]).argmax()]


def _differences(
    module, in_fields, out_fields, size, step, pointwise, randomize
) -> list[Difference]:
    """Of the output for each transformation and in each field type."""
    in_fields = as_fields(in_fields, "in_fields")
    width, length = _as_size(size)
    step = as_integer(step, "step")
    if not 1 <= step < 2 * length:
        raise ValueError(f"step must be from 1 to 2L - 1 = {2 * length - 1}, got {step}")
    if randomize:
        module = _randomized(module)
    call = partial(_call, module)
    x = sample_input(in_fields, width, length).to(**_factory(module))
    y = call(_rounded(x, 0))
    largest = y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)
    if out_fields is not None:
        out_fields = as_fields(out_fields, "out_fields")
        check_features(y, out_fields)
        if step * y.shape[3] % length:
            raise ValueError(
                f"if an input of length {length} moves by {step}, an output of length {y.shape[3]} "
                f"cannot move by {step * y.shape[3]}/{length} columns: take step "
                f"{length // math.gcd(length, y.shape[3])}, or a size of another length"
            )

    transformed = [
        (f"shift by {t}", isometry_action(x, t, in_fields),
         partial(isometry_action, shift=t * y.shape[-1] // length, fields=out_fields))
        for t in range(0, 2 * length, step)
    ]
    if pointwise:
        act = partial(gauge_transform, fields=out_fields)
        transformed.append(("gauge transformation", gauge_transform(x, in_fields), act))
    differences = []
    for seed, (name, transformed_x, act) in enumerate(transformed, start=1):
        output = call(_rounded(transformed_x, seed))
        if out_fields is None:
            parts = {"logits": output - y}
        else:
            parts = split_types(output - act(y), out_fields)
        differences += [
            Difference((part.abs().max() / largest).item(), name, TYPE_NAMES.get(key, key))
            for key, part in parts.items()
        ]
    return differences


def _as_size(size) -> tuple[int, int]:
    try:
        width, length = (as_integer(extent, "size") for extent in size)
        if min(width, length) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"size must be two positive integers (W, L), got {size!r}") from None
    return width, length


def _randomized(module: Callable) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise ValueError("randomize needs an nn.Module: a function hides its parameters")
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    buffers = (item for item in module.named_buffers() if "running_" in item[0])
    with torch.no_grad():
        for name, value in chain(module.named_parameters(), buffers):
            noise = 0.2 * torch.randn(value.shape, generator=generator).to(value)
            if name.endswith("running_var"):
                value *= noise.exp()
            else:
                value += noise
    return module


def _call(module: Callable, x: Tensor) -> Tensor:
    """The output; what the module writes to its buffers and draws at random is undone."""
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        if isinstance(module, nn.Module):
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            y = torch.func.functional_call(module, buffers, (x,))
        else:
            y = module(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise ValueError(f"module must return a floating point tensor, got {y!r:.60}")
    return y


def _factory(module: Callable) -> dict:
    """Device and dtype of the module."""
    tensors = ()
    if isinstance(module, nn.Module):
        tensors = chain(module.parameters(), module.buffers())
    for tensor in tensors:
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {"device": "cpu", "dtype": torch.float64}


def sample_input(fields: Fields, width: int, length: int) -> Tensor:
    """Noise; scattered strokes on a constant background; and a patch on zeros, ``(3, C, W, L)``.

    The background is as convolutions leave it on a blank strip: no symmetry changes it.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(
        3, fields.channels, width, length, generator=generator, dtype=torch.float64
    )
    constant = torch.rand(1, fields.channels, 1, 1, generator=generator, dtype=torch.float64)
    background = (constant + gauge_transform(constant, fields)) / 2
    strokes = torch.rand(width, length, generator=generator) < 0.3
    patch = torch.arange(length) < (length + 2) // 3
    return torch.stack([
        noise[0], torch.where(strokes, noise[1], background[0]), torch.where(patch, noise[2], 0),
    ])


def _rounded(x: Tensor, seed: int) -> Tensor:
    """The same but for rounding: by up to 4 eps of a channel's largest value.

    For float16 and bfloat16, eps is that of float32 (see `fields.sign_beyond_rounding`).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=wide.dtype).to(x.device) - 1
    largest = wide.abs().amax(dim=(2, 3), keepdim=True)
    return (wide + 4 * torch.finfo(wide.dtype).eps * largest * noise).to(x.dtype)
