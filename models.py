"""The networks of the Möbius MNIST experiment, and the table of their seven names.

    python models.py        prints each model's class, number of parameters and first field types

For a gauge CNN with other field types, add a row to `MODES` and a name to `MODELS`, at the end of
this file. All scripts then take the name.

Source: arXiv:2106.06020, Section 5, Tables 4 and 5.
"""

from functools import partial
from math import sqrt

import torch.nn as nn
from torch import Tensor

import fast
from building_blocks import MobiusSequential
from fields import Fields, as_integer, check_strip
from nn_layers import EquivNonlin, MobiusConv, MobiusConvNaive, MobiusPool, as_sign_eps
from polyphase import PolyphasePool

# Base multiplicities of each mode; the first five convolutions have (4, 8, 16, 32, 64) times as
# many fields. All have 16, 32, 64, 128, 256 channels. (The paper's Table 4 prints (4, 4, 2) for the
# first convolution of 'mixed'; only (4, 4, 4) has the 16 channels of the others and the number of
# parameters of its Table 5.)
MODES = {
    "scalar": (4, 0, 0),
    "signflip": (0, 4, 0),
    "regular": (0, 0, 2),
    "irrep": (2, 2, 0),
    "mixed": (1, 1, 1),
}

POOLINGS = {"fixed": MobiusPool, "polyphase": PolyphasePool}

FEATURES = 64  # invariant features that the convolutions hand to the classifier
DROPOUT = 0.3


class MobiusGaugeCNN(nn.Module):
    """Gauge equivariant CNN on the Möbius strip.

    Six convolutions, with a nonlinearity after the first five and pooling after the second and the
    fourth. The sixth gives 64 scalar fields; a classifier takes their global maximum, which is
    invariant.

    In evaluation, in float32 and float64 and with ``sign_eps=0``, the logits do not change under
    shifts by multiples of 4 if L is a multiple of 4, and with polyphase pooling under all 2L
    isometries. In float32, rounding can decide between two grids that fit equally well (see
    `PolyphasePool`), and whether a sign-flip value is 0 (see `EquivNonlin`).

    Args:
        kernel_size: odd and positive.
        ch_in: scalar fields of the input.
        classes: number of logits.
        mode: a key of `MODES`, the field types in between.
        pooling: 'fixed', as published, or 'polyphase'. The parameters are the same.
        dropout: probability in the classifier.
        sign_eps: of `EquivNonlin`; 0 in a mode without sign-flip fields.
        device, dtype: of the parameters.

    Shape:
        ``(N, ch_in, W, L)`` to ``(N, classes)``.

    Raises:
        ValueError: for an argument that is not allowed; in `forward`, for an input that is not 4-d
            with ch_in channels, or with polyphase pooling for an L that is no multiple of 4.

    Source: arXiv:2106.06020, Section 5, Table 4.
    """

    def __init__(
        self, kernel_size: int = 5, ch_in: int = 1, classes: int = 10, mode: str = "regular",
        pooling: str = "fixed", dropout: float = DROPOUT, sign_eps: float = 0.0, *,
        device=None, dtype=None,
    ) -> None:
        super().__init__()
        _check(ch_in, classes, pooling)
        if mode not in list(MODES):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode, self.pooling, self.sign_eps = mode, pooling, sign_eps
        factory = {"device": device, "dtype": dtype}
        conv = partial(MobiusConv, kernel_size=kernel_size, **factory)
        nonlin = partial(EquivNonlin, sign_eps=sign_eps, **factory)

        def nonlin_pool(fields):
            """Pool first where that is the same, as with ELU, which is monotonic: it is faster."""
            layers = nonlin(fields), POOLINGS[pooling](fields)
            return layers if fields.sign else layers[::-1]

        f1, f2, f3, f4, f5 = (Fields(*(n * m for m in MODES[mode])) for n in (4, 8, 16, 32, 64))
        self.mobius_cnn = MobiusSequential(
            conv((ch_in, 0, 0), f1), nonlin(f1),
            conv(f1, f2), *nonlin_pool(f2),
            conv(f2, f3), nonlin(f3),
            conv(f3, f4), *nonlin_pool(f4),
            conv(f4, f5), nonlin(f5),
            conv(f5, (FEATURES, 0, 0)),
        )
        self.classifier = build_classifier(classes, factory, dropout)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.pooling)
        return self.classifier(self.mobius_cnn(fast.channels_last(x)).amax(dim=(2, 3)))


class CNN(nn.Module):
    """Conventional CNN of the same architecture: it pads across the cut but knows nothing of
    frames.

    Args:
        kernel_size: odd and positive.
        ch_in: input channels.
        classes: number of logits.
        fix_params: divide the channels by sqrt(2), for about as many parameters as the gauge CNNs
            have; otherwise it has as many channels as they have.
        pooling: 'fixed', as published, or 'polyphase'.
        dropout: probability in the classifier.
        sign_eps: 0, as there are no sign-flip fields.
        device, dtype: of the parameters.

    Shape:
        ``(N, ch_in, W, L)`` to ``(N, classes)``.

    Raises:
        ValueError: for an argument that is not allowed; in `forward`, for an input that is not 4-d
            with ch_in channels, or with polyphase pooling for an L that is no multiple of 4.

    Source: arXiv:2106.06020, Section 5, Table 4.
    """

    def __init__(
        self, kernel_size: int = 5, ch_in: int = 1, classes: int = 10, fix_params: bool = False,
        pooling: str = "fixed", dropout: float = DROPOUT, sign_eps: float = 0.0, *,
        device=None, dtype=None,
    ) -> None:
        super().__init__()
        _check(ch_in, classes, pooling)
        as_sign_eps(sign_eps, Fields(1, 0, 0))
        self.pooling = pooling
        factory = {"device": device, "dtype": dtype}

        def conv(c_in, c_out):
            # In the published numbering, padding is a layer of its own.
            return nn.Identity(), MobiusConvNaive(c_in, c_out, kernel_size, **factory)

        def pool(channels):
            return POOLINGS[pooling]((channels, 0, 0))

        c1, c2, c3, c4, c5 = (int(c / sqrt(2)) if fix_params else c for c in (16, 32, 64, 128, 256))
        self.cnn = nn.Sequential(
            *conv(ch_in, c1), nn.ELU(),
            *conv(c1, c2), pool(c2), nn.ELU(),
            *conv(c2, c3), nn.ELU(),
            *conv(c3, c4), pool(c4), nn.ELU(),
            *conv(c4, c5), nn.ELU(),
            *conv(c5, FEATURES),
        )
        self.classifier = build_classifier(classes, factory, dropout)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.pooling)
        return self.classifier(self.cnn(fast.channels_last(x)).amax(dim=(2, 3)))


def build_classifier(classes: int, factory: dict, dropout: float = DROPOUT) -> nn.Sequential:
    """From 64 invariant features to logits; `factory` holds device and dtype."""
    return nn.Sequential(
        nn.BatchNorm1d(FEATURES, **factory),
        nn.ELU(),
        nn.Dropout(dropout),
        nn.Linear(FEATURES, 32, **factory),
        nn.BatchNorm1d(32, **factory),
        nn.ELU(),
        nn.Dropout(dropout),
        nn.Linear(32, classes, **factory),
    )


def _check(ch_in: int, classes: int, pooling: str) -> None:
    for name, count in (("ch_in", ch_in), ("classes", classes)):
        if as_integer(count, name, "a positive integer") < 1:
            raise ValueError(f"{name} must be a positive integer, got {count}")
    if pooling not in list(POOLINGS):
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def check_images(images: Tensor, pooling: str) -> None:
    """Raise ValueError unless a network with this pooling can take these images."""
    check_strip(images)
    if pooling == "polyphase" and images.shape[3] % 4:
        raise ValueError(
            "two polyphase poolings need a length L that is a multiple of 4, "
            f"got shape {tuple(images.shape)}"
        )


MODELS = {
    "cnn_same_channels": partial(CNN, fix_params=False),
    "cnn_same_params": partial(CNN, fix_params=True),
    "mobius_scalar": partial(MobiusGaugeCNN, mode="scalar"),
    "mobius_signflip": partial(MobiusGaugeCNN, mode="signflip"),
    "mobius_regular": partial(MobiusGaugeCNN, mode="regular"),
    "mobius_irrep": partial(MobiusGaugeCNN, mode="irrep"),
    "mobius_mixed": partial(MobiusGaugeCNN, mode="mixed"),
}


def build_model(name: str, **kwargs) -> nn.Module:
    """A new model by its ``--model`` name; `kwargs` go to its class.

    Raises:
        ValueError: for a name that is not in `MODELS`, or as the class does.
    """
    if name not in list(MODELS):
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](**kwargs)


def has_sign_flip_fields(name: str) -> bool:
    """Whether this model has sign-flip fields, to which `sign_eps` applies."""
    mode = getattr(MODELS[name], "keywords", {}).get("mode")
    return mode is not None and Fields(*MODES[mode]).sign > 0


def count_parameters(model: nn.Module) -> int:
    """Number of learnable values."""
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    fields = "fields of the first convolution (m_triv, m_sign, m_reg)"
    print(f"{'--model':18} {'class':15} {'parameters':>10}   {fields}")
    for name in MODELS:
        model = build_model(name)
        first = tuple(model.mobius_cnn[0].out_fields) if isinstance(model, MobiusGaugeCNN) else ""
        print(f"{name:18} {type(model).__name__:15} {count_parameters(model):10,}   {first}")
