"""Random deformations, sizes and stroke widths of training digits, which stay where they are.

    deform = RandomDeformation(strength=0.6, stroke_width=0.35, scaling=0.1)
    images = deform(images, deform.draw(len(images), generator))

A deformation takes each pixel's value from a place nearby. Its displacements are a vector field on
the strip. Across the cut, the component along the strip keeps its sign, as a trivial field does,
and the component across it changes its sign, as a sign-flip field does (fields.py). Both are
Gaussian noise smoothed by a Gaussian, drawn in the eigenfunctions of the strip's Laplacian. Their
distribution is therefore invariant under isometries of the strip.

Source: elastic distortions, Simard, Steinkraus, Platt, *Best practices for convolutional neural
networks applied to visual document analysis* (2003); here on the Möbius strip, and without a
movement of the digit along it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convert_mnist import LENGTH, WIDTH
from fields import double_cover, scalars
from nn_layers import transport_pad

SMOOTHNESS = 5.0
LARGEST_STRENGTH = 2.0  # beyond, digits leave their place and cannot be recognised
LARGEST_SCALING = 0.3  # there, one of eight digits of 20 pixels grows beyond a strip of 28


def displace(images: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """Resample images at displaced pixels, by cubic splines, clipped to 0 … 1.

    Args:
        images: scalar fields ``(N, C, W, L)`` with values in [0, 1].
        along, across: displacements ``(N, W, L)`` in pixels, to larger column and row numbers.
            Those along the strip continue across the cut, those across it lead into zeros.

    Returns:
        Tensor of the images' shape.
    """
    width, length = images.shape[2:]
    margin = 2  # columns that the interpolation reads on either side
    cover = double_cover(images, scalars(images))
    last, first = cover.narrow(3, 2 * length - margin, margin), cover.narrow(3, 0, margin)
    cover = torch.cat([last, cover, first], dim=3)
    columns = (torch.arange(length, device=images.device) + along) % (2 * length) + margin
    rows = torch.arange(width, device=images.device)[:, None] + across
    # grid_sample takes (column, row), each from -1, the first pixel, to 1, the last one.
    grid = torch.stack([2 * columns / (cover.shape[3] - 1), 2 * rows / max(1, width - 1)], dim=3)
    grid = (grid - 1).to(images.dtype)
    return F.grid_sample(cover, grid, mode="bicubic", align_corners=True).clamp(0, 1)


def thicken(images: Tensor, amounts: Tensor) -> Tensor:
    """Make strokes thicker or thinner.

    Each pixel moves towards the maximum, or the minimum, of itself and its eight neighbours.

    Args:
        images: scalar fields ``(N, C, W, L)`` with values in [0, 1].
        amounts: ``(N,)`` in -1 … 1, part of the way to the maximum; negative: to the minimum.
    """
    padded = transport_pad(images, 1, scalars(images))
    largest, smallest = F.max_pool2d(padded, 3, stride=1), -F.max_pool2d(-padded, 3, stride=1)
    amounts = amounts[:, None, None, None].to(images.dtype)
    thicker, thinner = amounts * (largest - images), amounts * (images - smallest)
    return images + torch.where(amounts > 0, thicker, thinner)


def centre(images: Tensor) -> Tensor:
    """The place of a digit along the strip, ``(N,)`` in 0 … L.

    This is the mean direction of its values on a circle of L columns.
    """
    length = images.shape[3]
    columns = torch.arange(length, device=images.device, dtype=images.dtype) + 0.5  # their middles
    angles = 2 * math.pi / length * columns
    values = images.sum((1, 2))
    direction = torch.atan2(values @ angles.sin(), values @ angles.cos())
    return direction * length / (2 * math.pi) % length


class RandomDeformation:
    """Draws and applies random deformations, sizes and stroke widths.

    The `centre` of a digit does not move along the strip: the displacement by which it would is
    subtracted. Across the strip it may move.

    Args:
        strength: root mean square of either component of the displacement before the subtraction,
            in pixels; up to about 2.
        stroke_width: the amounts for `thicken` are uniform between minus this and this, 0 … 1.
        scaling: standard deviation of the logarithm of the factors by which a digit is scaled along
            and across the strip, independently; 0 … 0.3. The fixed point is the digit's centre
            along the strip and the strip's middle across it. The deformation is scaled, too.
        smoothness: standard deviation of the Gaussian that smooths the noise, in pixels; positive
            and at most L.
        size: W and L.
        device: of the images.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(
        self, strength: float, stroke_width: float = 0.0, scaling: float = 0.0, *,
        smoothness: float = SMOOTHNESS, size: tuple[int, int] = (WIDTH, LENGTH), device="cpu",
    ) -> None:
        width, length = size
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a number of at least 0, got {strength}")
        if not 0 <= stroke_width <= 1:
            raise ValueError(f"stroke_width must be a number of 0 … 1, got {stroke_width}")
        if not 0 <= scaling <= LARGEST_SCALING:
            raise ValueError(f"scaling must be a number of 0 … {LARGEST_SCALING}, got {scaling}")
        if not 0 < smoothness <= length:
            raise ValueError(f"smoothness must be a number in 0 … {length}, got {smoothness}")
        self.stroke_width, self.scaling = stroke_width, scaling
        # Number of half waves across the strip (k) and along it (m). The smoothed noise has
        # next to none, exp(-9/2), beyond the cutoff, in waves per pixel.
        cutoff = 3 / (2 * math.pi * smoothness)
        k = torch.arange(math.ceil(2 * width * cutoff) + 1, dtype=torch.float64)[:, None]
        m = torch.arange(math.ceil(2 * length * cutoff) + 1, dtype=torch.float64)
        squared_frequency = (k / (2 * width)) ** 2 + (m / (2 * length)) ** 2
        spectrum = torch.exp(-2 * (math.pi * smoothness) ** 2 * squared_frequency)
        # Once round the strip, m half waves give the sign (-1)^m, and the flip of k half waves
        # across it gives (-1)^k.
        symmetric = (k + m) % 2 == 0
        # Where m > 0 there are a sine and a cosine.
        spectrum = spectrum * torch.where(m > 0, 1, math.sqrt(0.5))
        along, across = spectrum * symmetric, spectrum * ~symmetric
        along[0, 0] = 0  # a constant displacement along the strip, an isometry
        scales = [strength * part / part.square().sum().sqrt() for part in (along, across)]
        self._scales = torch.stack(scales).float().to(device)  # (2, K, M)
        rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
        norms = torch.where(k > 0, math.sqrt(2), 1.0)  # of cos(pi k row / W)
        self._across = (norms * torch.cos(math.pi * k * rows / width)).float().to(device)  # (K, W)
        phases = math.pi * m[:, None] * columns / length
        self._along = torch.cat([phases.cos(), phases.sin()]).float().to(device)  # (2 M, L)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Random numbers for n images, ``(n, D)``, on the generator's device.

        The last one is uniform on -1 … 1, all others are standard normal.
        """
        settings = {"generator": generator, "device": generator.device}
        normal = torch.randn(n, 2 * self._scales.numel() + 2 * bool(self.scaling), **settings)
        return torch.cat([normal, 2 * torch.rand(n, 1, **settings) - 1], dim=1)

    def draw_epoch(self, steps: int, n: int, generator: torch.Generator) -> Tensor:
        """`draw` for each step of an epoch, ``(steps, n, D)`` on the device, in one copy."""
        drawn = torch.stack([self.draw(n, generator) for _ in range(steps)])
        return drawn.to(self._scales.device)

    def displacements(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The deformation's components along and across the strip, ``(N, W, L)``, in pixels."""
        scales = torch.cat([self._scales, self._scales], dim=2)  # of cosines and sines
        scaled = drawn[:, :scales.numel()].view(-1, *scales.shape) * scales
        return torch.einsum("nikm,kw,ml->inwl", scaled, self._across, self._along).unbind(0)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Deform images ``(N, C, W, L)``, whose values stay in [0, 1]."""
        drawn, (width, length) = drawn.to(images.device), images.shape[2:]
        along, across = self.displacements(drawn)
        before = centre(images)
        if self.scaling:
            # A pixel shows what stood at its distance from the centre divided by the factor.
            shrink = torch.exp(-self.scaling * drawn[:, -3:-1])
            shrink_along, shrink_across = shrink.T[:, :, None, None]
            columns, rows = (torch.arange(n, device=images.device) + 0.5 for n in (length, width))
            from_centre = (columns - before[:, None] + length / 2) % length - length / 2
            from_centre = from_centre[:, None, :]
            from_middle = rows[:, None] - width / 2
            along = shrink_along * (from_centre + along) - from_centre
            across = shrink_across * (from_middle + across) - from_middle
        for _ in range(2):  # leaves less than a tenth of a pixel for all but few digits
            moved = centre(displace(images, along, across)) - before
            along = along + ((moved + length / 2) % length - length / 2)[:, None, None]
        images = displace(images, along, across)
        return thicken(images, self.stroke_width * drawn[:, -1]) if self.stroke_width else images
