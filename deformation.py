"""Random deformations, sizes and stroke widths, to augment training digits without moving them along the strip.

    deform = RandomDeformation(strength=0.6, stroke_width=0.35, scaling=0.1)
    images = deform(images, deform.draw(len(images), generator))

A deformation takes each pixel's value from a place nearby. Its displacements are a vector field on the strip: seen from
across the cut, the component along the strip is the same and the one across it is negative, as a trivial and a
sign-flip field (fields.py). They are Gaussian noise smoothed by a Gaussian, drawn in the eigenfunctions of
the strip's Laplacian, and so distributed alike all along the strip: isometries of it change nothing.

Source: elastic distortions, Simard, Steinkraus, Platt, *Best practices for convolutional neural networks applied to visual
document analysis* (2003); here on the Möbius strip, and with the digit's centre kept where it is along it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convert_mnist import LENGTH, SCALAR, WIDTH
from fields import Fields, double_cover
from nn_layers import transport_pad

SMOOTHNESS = 5.0
LARGEST_SCALING = 0.3  # there, one of eight digits of 20 pixels is longer than a strip of 28, and comes to meet itself


def displace(images: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """Images whose pixels show what stood displaced from them, interpolated by cubic splines and clipped to 0 … 1.

    Args:
        images: scalar fields ``(N, 1, W, L)`` with values in [0, 1].
        along, across: displacements in pixels, ``(N, W, L)``, to larger column and row numbers; those along the strip lead
            over the cut, those across it into zeros.

    Returns:
        Tensor of the images' shape.
    """
    width, length = images.shape[2:]
    margin = 2  # of columns that interpolation reads beside the place itself
    cover = double_cover(images, Fields(*SCALAR))
    cover = torch.cat([cover.narrow(3, 2 * length - margin, margin), cover, cover.narrow(3, 0, margin)], dim=3)
    columns = (torch.arange(length, device=images.device) + along) % (2 * length) + margin
    rows = torch.arange(width, device=images.device)[:, None] + across
    # grid_sample counts from -1, the first pixel, to 1, the last one, and in (column, row).
    grid = torch.stack([2 * columns / (cover.shape[3] - 1), 2 * rows / max(1, width - 1)], dim=3) - 1
    return F.grid_sample(cover, grid.to(images.dtype), mode="bicubic", align_corners=True).clamp(0, 1)


def thicken(images: Tensor, amounts: Tensor) -> Tensor:
    """Strokes made thicker or thinner: part of the way to the maximum, or the minimum, over each pixel and its eight neighbours.

    Args:
        images: scalar fields ``(N, 1, W, L)`` with values in [0, 1].
        amounts: ``(N,)`` in -1 … 1, negative for the minimum.
    """
    padded = transport_pad(images, 1, SCALAR)
    largest, smallest = F.max_pool2d(padded, 3, stride=1), -F.max_pool2d(-padded, 3, stride=1)
    amounts = amounts[:, None, None, None].to(images.dtype)
    return images + torch.where(amounts > 0, amounts * (largest - images), amounts * (images - smallest))


def centre(images: Tensor) -> Tensor:
    """Where along the strip the values are, ``(N,)`` in 0 … L: the mean direction on a circle of L columns, each in its middle."""
    length = images.shape[3]
    angles = 2 * math.pi / length * (torch.arange(length, device=images.device, dtype=images.dtype) + 0.5)
    columns = images.sum((1, 2))
    return torch.atan2(columns @ angles.sin(), columns @ angles.cos()) * length / (2 * math.pi) % length


class RandomDeformation:
    """Draws deformations, sizes and stroke widths, and applies them.

    A digit is deformed where it is, not moved along the strip: what a deformation would move its `centre` is taken off.
    Across the strip it may move too.

    Args:
        strength: root mean square of either component of the displacement, in pixels, before it is taken off; up to about 2.
        stroke_width: `thicken` is given amounts that are uniform between minus this and this, 0 … 1.
        scaling: standard deviation of the logarithm of the factors by which a digit is scaled, about its centre along the strip and
            about the middle of the strip across it, either by its own; 0 … 0.3. The deformation is scaled too.
        smoothness: standard deviation of the Gaussian that smooths the noise, in pixels; a positive number up to L.
        size: W and L.
        device: on which images live.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(self, strength: float, stroke_width: float = 0.0, scaling: float = 0.0, *, smoothness: float = SMOOTHNESS,
                 size: tuple[int, int] = (WIDTH, LENGTH), device="cpu") -> None:
        width, length = size
        if not 0 <= scaling <= LARGEST_SCALING:
            raise ValueError(f"scaling must be a number of 0 … {LARGEST_SCALING}, got {scaling}")
        if not 0 <= stroke_width <= 1:
            raise ValueError(f"stroke_width must be a number of 0 … 1, got {stroke_width}")
        if not 0 <= strength < math.inf or not 0 < smoothness <= length:
            raise ValueError(f"strength must be a number of at least 0 and smoothness one in 0 … {length}, got {strength} and {smoothness}")
        self.stroke_width, self.scaling = stroke_width, scaling
        # Wave numbers, in half waves across the strip (k) and along it (m), up to where smoothing leaves nothing.
        cutoff = 3 / (2 * math.pi * smoothness)  # in waves a pixel, exp(-9/2)
        k = torch.arange(math.ceil(2 * width * cutoff) + 1, dtype=torch.float64)[:, None]
        m = torch.arange(math.ceil(2 * length * cutoff) + 1, dtype=torch.float64)
        spectrum = torch.exp(-2 * (math.pi * smoothness) ** 2 * ((k / (2 * width)) ** 2 + (m / (2 * length)) ** 2))
        # Walking once round, m half waves change the sign (-1)^m times, and the flip k of them across the strip (-1)^k times.
        symmetric = (k + m) % 2 == 0
        spectrum = spectrum * torch.where(m > 0, 1, math.sqrt(0.5))  # of both a sine and a cosine, but for m = 0
        along, across = spectrum * symmetric, spectrum * ~symmetric
        along[0, 0] = 0  # an isometry
        norms = torch.where(k > 0, math.sqrt(2), 1.0)  # of cos(pi k w / W)
        self._scales = torch.stack([strength * part / part.square().sum().sqrt() for part in (along, across)]).float().to(device)
        w, l = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
        self._across = (norms * torch.cos(math.pi * k * w / width)).float().to(device)  # (K, W)
        phases = math.pi * m[:, None] * l / length
        self._along = torch.cat([phases.cos(), phases.sin()]).float().to(device)  # (2 M, L)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Random numbers for n images, ``(n, D)``, on the generator's device: standard normal ones, and the last uniform on -1 … 1."""
        normal = torch.randn(n, 2 * self._scales.numel() + 2 * bool(self.scaling), generator=generator, device=generator.device)
        return torch.cat([normal, 2 * torch.rand(n, 1, generator=generator, device=generator.device) - 1], dim=1)

    def displacements(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The components along and across the strip, ``(N, W, L)``, in pixels; without what scaling adds to them."""
        scales = torch.cat([self._scales, self._scales], dim=2)  # of cosines and sines
        scaled = drawn[:, :scales.numel()].view(-1, *scales.shape) * scales
        return torch.einsum("nikm,kw,ml->inwl", scaled, self._across, self._along).unbind(0)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Deformed images, ``(N, 1, W, L)`` as given, in the same range of values."""
        drawn, (width, length) = drawn.to(images.device), images.shape[2:]
        along, across = self.displacements(drawn)
        before = centre(images)
        if self.scaling:
            # What is shown at a distance from the centre stood at this distance divided by the factor.
            shrink_along, shrink_across = torch.exp(-self.scaling * drawn[:, -3:-1]).T[:, :, None, None]
            columns, rows = (torch.arange(n, device=images.device) + 0.5 for n in (length, width))
            from_centre = ((columns - before[:, None] + length / 2) % length - length / 2)[:, None, :]
            from_middle = rows[:, None] - width / 2
            along = shrink_along * (from_centre + along) - from_centre
            across = shrink_across * (from_middle + across) - from_middle
        for _ in range(2):  # what is left is below a tenth of a pixel, but for few digits
            moved = centre(displace(images, along, across)) - before
            along = along + ((moved + length / 2) % length - length / 2)[:, None, None]
        deformed = displace(images, along, across)
        return thicken(deformed, self.stroke_width * drawn[:, -1]) if self.stroke_width else deformed
