"""Features of a digit in each layer of a network, and those of the shifted digit."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from convert_mnist import SCALAR
from fields import Fields, isometry_action
from models import MobiusGaugeCNN
from nn_layers import MobiusConv, MobiusConvNaive


class LayerFeatures(NamedTuple):
    """Features of a digit, the same shifted along the strip, and those of the shifted digit.

    fields: their types.
    """

    of_digit: Tensor
    shifted: Tensor
    of_shifted_digit: Tensor
    fields: Fields

    @property
    def difference(self) -> Tensor:
        """Zero where all layers so far are equivariant under the shift."""
        return self.of_shifted_digit - self.shifted


class NetworkFeatures(NamedTuple):
    """layers: the first is the input. classes: predicted for the digit and the shifted digit."""

    layers: list[LayerFeatures]
    classes: tuple[int, int]


@torch.no_grad()
def feature_maps(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Fields]]:
    """The input and the output of each layer (convolution, nonlinearity and pooling).

    Args:
        model: a `MobiusGaugeCNN` or `CNN`. The channels of the latter count as scalar fields.
        images: of shape ``(N, 1, W, L)``.
    """
    maps, fields = [], Fields(*SCALAR)
    for layer in model.mobius_cnn if isinstance(model, MobiusGaugeCNN) else model.cnn:
        if isinstance(layer, (MobiusConv, MobiusConvNaive)):
            maps.append((images, fields))
            steerable = isinstance(layer, MobiusConv)
            fields = layer.out_fields if steerable else Fields(layer.out_channels, 0, 0)
        images = layer(images)
    return [*maps, (images, fields)]


def features_and_shift(model: nn.Module, image: Tensor, shift: int) -> NetworkFeatures:
    """Features of a digit and of the shifted digit. The model is left in eval mode.

    Args:
        model: a `MobiusGaugeCNN` or `CNN`.
        image: a digit ``(1, 1, W, L)``.
        shift: a multiple of 4. Two poolings halve the length; features then move by shift / 4.

    Raises:
        ValueError: for another shift, or as the model does.
    """
    if shift % 4:
        raise ValueError(f"shift must be a multiple of 4, got {shift}")
    model.eval()
    digits = image, isometry_action(image, shift, SCALAR)
    layers = []
    for (x, fields), (y, _) in zip(*(feature_maps(model, digit) for digit in digits)):
        moved = isometry_action(x, shift * x.shape[3] // image.shape[3], fields)
        layers.append(LayerFeatures(x, moved, y, fields))
    with torch.no_grad():
        classes = tuple(model(digit).argmax(1).item() for digit in digits)
    return NetworkFeatures(layers, classes)
