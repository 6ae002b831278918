"""Pictures of strips, fields, kernels, networks and results: functions from data to a figure.

    figure = steerable_kernels(MobiusConv((1, 1, 1), (1, 1, 1), kernel_size=5))
    figure.savefig("kernels.png")

`visualize.py` makes the pictures of the README with them, `train.py` those of TensorBoard. Text
takes the colours of matplotlib's settings (`STYLES`); the rest is legible on light and dark pages.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from convert_mnist import LENGTH, SCALAR
from fields import (
    REPRESENTATIONS, Fields, gauge_transform, isometry_action, split_types,
)
from models import count_parameters
from nn_layers import MobiusConv, MobiusConvNaive, transport_pad
from study.features import NetworkFeatures

LABELS = {
    "cnn_same_channels": "CNN (channels)",
    "cnn_same_params": "CNN (params)",
    "mobius_scalar": "gauge CNN (scalar)",
    "mobius_signflip": "gauge CNN (sign-flip)",
    "mobius_regular": "gauge CNN (regular)",
    "mobius_irrep": "gauge CNN (irreps)",
    "mobius_mixed": "gauge CNN (mixed)",
}
# Colour-blind readers can tell them apart too (Okabe and Ito), on white and on black.
COLOURS = dict(zip(
    LABELS, ("#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#009E73", "#999999")))
TYPES = {"triv": "scalar", "sign": "sign-flip", "reg": "regular"}
TYPE_COLOURS = {
    "triv": COLOURS["mobius_scalar"],
    "sign": COLOURS["mobius_signflip"],
    "reg": COLOURS["mobius_regular"],
}
NO_TYPE = COLOURS["cnn_same_channels"]

GREY = "#8B949E"
INK = LinearSegmentedColormap.from_list("ink", ["#F3EDE0", "#14181D"])  # scalars in [0, 1]
SIGNED = "RdBu_r"  # features, from -1 to 1 times the largest
_DARK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLES = {"": {}, "-dark": dict.fromkeys(_DARK, "#E6EDF3")}


def _show(axes, image: Tensor, largest: float | None = None, frame: str = GREY,
          linewidth: float = 0.8) -> None:
    """Draw an image (W, L): values in [0, 1], or with `largest` signed values up to it."""
    if largest is None:
        colours = {"cmap": INK, "vmin": 0, "vmax": 1}
    else:
        colours = {"cmap": SIGNED, "vmin": -largest or -1, "vmax": largest or 1}
    axes.imshow(image.detach().float().cpu().numpy(), interpolation="nearest", **colours)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=frame, linewidth=linewidth)


def _largest(x: Tensor) -> float:
    return x.detach().abs().max().item()


def _largest_of_types(x: Tensor, fields: Fields) -> dict[str, float]:
    """The scale of each type. How types are scaled relative to each other has no meaning."""
    return {name: _largest(block) for name, block in split_types(x, fields).items()}


def _channels(fields: Fields, texts: dict[str, list[str]]) -> list[str]:
    """The text of each channel, from the texts of a field's channels by type.

    The two channels of a regular field are adjacent.
    """
    return [text for name, m in zip(REPRESENTATIONS, fields) for text in m * texts[name]]


def channel_types(fields: Fields) -> list[str]:
    """The field type of each channel; the two channels of a regular field are adjacent."""
    return _channels(fields, {name: [name] * representation.dim
                              for name, representation in REPRESENTATIONS.items()})


# --------------------------------------------------------------------------------------------------
# Digits


def digits(images: Tensor, titles: Sequence[str], columns: int = 8, title: str = "") -> Figure:
    """Strips ``(n, 1, W, L)`` in rows, each below its title. Without any, the title is alone."""
    columns = columns if title else max(1, min(columns, len(images)))  # wide enough for the title
    rows = max(1, math.ceil(len(images) / columns))
    size = (columns, 1.25 * rows + 0.3 * bool(title))
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, image, text in zip(axes, images, titles):
        _show(ax, image[0])
        ax.set_title(text, fontsize=9, pad=3)
    for ax in axes[len(images):]:
        ax.set_axis_off()
    return figure


def centered_and_shifted(centered: Tensor, shifted: Tensor, shifts: Tensor,
                         labels: Tensor) -> Figure:
    """Centered digits above the same digits shifted, ``(n, 1, W, L)``; shifts, labels ``(n,)``."""
    titles = [f"{label}" for label in labels.tolist()]
    titles += [f"t = {shift}" for shift in shifts.tolist()]
    figure = digits(torch.cat([centered, shifted]), titles, columns=len(centered))
    for ax, text in zip(figure.axes[::len(centered)], ("centered", "shifted")):
        ax.set_ylabel(text)
    return figure


def _corners(width: int, length: int) -> np.ndarray:
    """Positions in space of the corners of a strip's pixels, (3, W + 1, L + 1).

    In the middle of the strip the sides of a pixel are 1. Towards the edges the strip is stretched
    or compressed along its length, as paper cannot be.
    """
    across = np.arange(width + 1)[:, None] - width / 2
    around = 2 * np.pi * np.arange(length + 1) / length  # the strip has turned by half as much
    radius = length / (2 * np.pi) + across * np.cos(around / 2)
    return np.stack([radius * np.cos(around), radius * np.sin(around), across * np.sin(around / 2)])


def _draw_in_space(axes, image: Tensor) -> None:
    corners = _corners(*image.shape)
    diagonals = (corners[:, 1:, 1:] - corners[:, :-1, :-1],
                 corners[:, :-1, 1:] - corners[:, 1:, :-1])
    normals = np.cross(*diagonals, axis=0)
    light = np.array([0.3, -0.5, 0.8]) / np.linalg.norm([0.3, -0.5, 0.8])
    cosines = np.abs(np.tensordot(light, normals / np.linalg.norm(normals, axis=0), 1))
    colours = INK(image.detach().cpu().numpy())
    colours[..., :3] *= (0.72 + 0.28 * cosines)[..., None]
    axes.plot_surface(*corners, facecolors=colours, rstride=1, cstride=1, shade=False,
                      linewidth=0, antialiased=False)
    cut = corners[:, :, 0]
    axes.plot(*cut, color=COLOURS["cnn_same_channels"], linewidth=1.5, zorder=10)
    low, high = corners.min((1, 2)), corners.max((1, 2))
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axes.set_box_aspect(high - low, zoom=1.3)
    axes.view_init(elev=38, azim=220)
    axes.set_axis_off()


def on_long_strip(image: Tensor, length: int) -> Tensor:
    """A digit ``(1, 1, W, L)`` at the beginning of a strip of `length` columns.

    In space, a strip of at most pi W columns would meet itself.
    """
    blank = image.new_zeros(*image.shape[:3], length - image.shape[3])
    return torch.cat([image, blank], dim=3)


def strips_in_space(image: Tensor, shifts: Sequence[int], length: int = 5 * LENGTH) -> Figure:
    """A digit ``(1, 1, W, L)`` at several shifts on a strip in space; the cut is a line."""
    figure = Figure(figsize=(1.72 * len(shifts), 1.75))
    for i, shift in enumerate(shifts):
        axes = figure.add_axes((i / len(shifts), -0.04, 1 / len(shifts), 1), projection="3d")
        _draw_in_space(axes, isometry_action(on_long_strip(image, length), shift, SCALAR)[0, 0])
        figure.text((i + 0.5) / len(shifts), 0.91, f"t = {shift}", ha="center", color=GREY,
                    fontsize=9)
    return figure


# --------------------------------------------------------------------------------------------------
# Fields and kernels


CHANNEL_NAMES = {
    "triv": ["scalar"],
    "sign": ["sign-flip"],
    "reg": ["regular, 1st channel", "regular, 2nd channel"],
}
REFLECTED = {"triv": ["as it was"], "sign": ["negated"], "reg": ["was the 2nd", "was the 1st"]}
OVER_THE_CUT = {
    "triv": ["flipped"],
    "sign": ["flipped and negated"],
    "reg": ["flipped 2nd channel", "flipped 1st channel"],
}


def gauge_transformation(x: Tensor, fields) -> Figure:
    """The channels of a feature map ``(1, C, W, L)``, and below them in reflected frames."""
    fields = Fields(*fields)
    types, largest = channel_types(fields), _largest_of_types(x, fields)
    figure = Figure(figsize=(1.75 * (len(types) + 0.55), 4.1), layout="constrained")
    grid = figure.subplots(2, len(types) + 1, width_ratios=[0.55] + [1] * len(types))
    reflected = gauge_transform(x, fields)
    for row, features, across, text in ((0, x, 1, "frame"), (1, reflected, -1, "reflected\nframe")):
        frame = grid[row, 0]
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.05, "color": GREY}
        frame.quiver([0, 0], [0, 0], [1, 0], [0, across], **arrows)
        frame.set(xlim=(-0.25, 1.2), ylim=(-1.6, 1.6), aspect="equal")
        frame.text(0.45, -0.3 * across, text, ha="center", va="top" if across > 0 else "bottom",
                   color=GREY, fontsize=9)
        frame.set_axis_off()
        for ax, name, image in zip(grid[row, 1:], types, features[0]):
            _show(ax, image, largest[name], TYPE_COLOURS[name], linewidth=2.5)
    for ax, text in zip(grid[0, 1:], _channels(fields, CHANNEL_NAMES)):
        ax.set_title(text, fontsize=9)
    for ax, text in zip(grid[1, 1:], _channels(fields, REFLECTED)):
        ax.set_xlabel(text, fontsize=9)
    return figure


def transport_padding(x: Tensor, fields, pad: int) -> Figure:
    """The channels of a feature map ``(1, C, W, L)`` with transport padding.

    Solid frames show the columns padded over the cut, dashed frames the columns they come from.
    Above and below are zeros.
    """
    fields = Fields(*fields)
    types, largest = channel_types(fields), _largest_of_types(x, fields)
    width, length = x.shape[2:]
    padded = transport_pad(x, pad, fields)[0]
    figure = Figure(figsize=(2 * len(types), 2.7), layout="constrained")
    titles, texts = _channels(fields, CHANNEL_NAMES), _channels(fields, OVER_THE_CUT)
    axes = figure.subplots(1, len(types))
    for ax, name, title, text, image in zip(axes, types, titles, texts, padded):
        colour = TYPE_COLOURS[name]
        _show(ax, image, largest[name])
        ax.spines[:].set_visible(False)
        edge = -0.5
        for left in (edge, edge + pad + length):
            ax.add_patch(Rectangle((left, edge + pad), pad, width, fill=False, edgecolor=colour,
                                   linewidth=2.5))
        for left in (edge + pad, edge + length):
            ax.add_patch(Rectangle((left, edge + pad), pad, width, fill=False, edgecolor=colour,
                                   linewidth=1.2, linestyle=(0, (3, 2))))
        for row in (edge + pad, edge + pad + width):
            ax.plot([edge, edge + length + 2 * pad], [row, row], color=GREY, linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(text, fontsize=9)
    return figure


CONSTRAINTS = {
    ("triv", "triv"): "symmetric",
    ("triv", "sign"): "antisymmetric",
    ("triv", "reg"): "K, flip K",
    ("sign", "triv"): "antisymmetric",
    ("sign", "sign"): "symmetric",
    ("sign", "reg"): "K, −flip K",
    ("reg", "triv"): "(K, flip K)",
    ("reg", "sign"): "(K, −flip K)",
    ("reg", "reg"): "(K, M), (flip M, flip K)",
}
# Sizes of `steerable_kernels` in inches: of a kernel, of the gap beside it in its block, of the
# gap between blocks, of the space above the first.
SIDE, GAP, BETWEEN, HEAD = 1.0, 0.1, 0.55, 0.62


def _places(fields: Fields, start: float, between: float) -> dict[str, list[float]]:
    """Where the kernels of each type's channels begin, in inches."""
    places = {}
    for name, m in zip(REPRESENTATIONS, fields):
        if m:
            number = m * REPRESENTATIONS[name].dim
            places[name] = [start + i * (SIDE + GAP) for i in range(number)]
            start = places[name][-1] + SIDE + between
    return places


def steerable_kernels(conv: MobiusConv) -> Figure:
    """The expanded kernels, a block for each pair of types: input rows, output columns."""
    kernel, _ = conv.expand()
    largest = _largest(kernel)
    rows, columns = _places(conv.in_fields, HEAD, HEAD), _places(conv.out_fields, GAP, BETWEEN)
    width, height = (max(map(max, places.values())) + SIDE + GAP for places in (columns, rows))
    figure = Figure(figsize=(width, height))
    for name_in, tops in rows.items():
        for name_out, lefts in columns.items():
            figure.text((lefts[0] + lefts[-1] + SIDE) / 2 / width, 1 - (tops[0] - 0.08) / height,
                        f"{TYPES[name_in]} → {TYPES[name_out]}\n{CONSTRAINTS[name_in, name_out]}",
                        ha="center", va="bottom", fontsize=9)
    tops = [top for places in rows.values() for top in places]  # in the order of the channels
    lefts = [(name, left) for name, places in columns.items() for left in places]
    for i, top in enumerate(tops):
        for o, (name, left) in enumerate(lefts):
            axes = figure.add_axes((left / width, 1 - (top + SIDE) / height, SIDE / width,
                                    SIDE / height))
            _show(axes, kernel[o, i], largest, TYPE_COLOURS[name], linewidth=2)
    return figure


def _convolutions(model: nn.Module) -> list[MobiusConv | MobiusConvNaive]:
    layers = (MobiusConv, MobiusConvNaive)
    return [module for module in model.modules() if isinstance(module, layers)]


def first_kernels(model: nn.Module, columns: int = 8) -> Figure:
    """The kernels of a network's first convolution, from its first input channel.

    Frames have the colours of the field types.
    """
    conv = _convolutions(model)[0]
    if isinstance(conv, MobiusConv):
        fields = conv.out_fields
        types, titles = channel_types(fields), _channels(fields, CHANNEL_NAMES)
        kernel, colours = conv.expand()[0], TYPE_COLOURS
    else:
        kernel, colours = conv.weight, {"": NO_TYPE}
        types, titles = [""] * len(kernel), [""] * len(kernel)
    columns = min(columns, len(kernel))
    rows = math.ceil(len(kernel) / columns)
    figure, largest = Figure(figsize=(columns, 1.2 * rows)), _largest(kernel)
    # Placed by hand: this is drawn after every epoch, and constrained layout takes longer than
    # the drawing.
    for i, (image, name, text) in enumerate(zip(kernel, types, titles)):
        row, column = divmod(i, columns)
        axes = figure.add_axes(((column + 0.05) / columns, 1 - (row + 0.96) / rows,
                                0.9 / columns, 0.75 / rows))
        _show(axes, image[0], largest, colours[name], linewidth=2)
        axes.set_title(text.replace(" channel", ""), fontsize=8, pad=3)
    return figure


# --------------------------------------------------------------------------------------------------
# Networks


def model_table(models: Mapping[str, nn.Module]) -> Figure:
    """The field types of each convolution's output, and the number of parameters.

    A bar is as long as the convolution has channels, relative to the first model's.
    """
    channels = [conv.out_channels for conv in _convolutions(next(iter(models.values())))]
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for row, model in enumerate(models.values()):
        for column, conv in enumerate(_convolutions(model)):
            if isinstance(conv, MobiusConv):
                parts = [(m, m * REPRESENTATIONS[name].dim, TYPE_COLOURS[name])
                         for name, m in zip(REPRESENTATIONS, conv.out_fields) if m]
            else:
                parts = [(conv.out_channels, conv.out_channels, NO_TYPE)]
            left = column
            for number, size, colour in parts:
                size *= 0.92 / channels[column]
                axes.barh(row, size, left=left, height=0.7, color=colour, edgecolor="none")
                axes.text(left + size / 2, row, f"{number}", ha="center", va="center", fontsize=8,
                          color="white" if colour == TYPE_COLOURS["reg"] else "black")
                left += size
        axes.text(len(channels) + 0.62, row, f"{count_parameters(model):,}", ha="right",
                  va="center", fontsize=9)
    axes.set_yticks(range(len(models)), [LABELS[name] for name in models])
    ticks = [i + 0.46 for i in range(len(channels))] + [len(channels) + 0.3]
    texts = [f"conv {i + 1}\n{n} channels" for i, n in enumerate(channels)] + ["parameters\n"]
    axes.set_xticks(ticks, texts, fontsize=8.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set(xlim=(-0.04, len(channels) + 0.66), ylim=(len(models) - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=colour)
               for colour in (*TYPE_COLOURS.values(), NO_TYPE)]
    labels = [f"{text} fields" for text in TYPES.values()] + ["channels without a type"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def equivariance(networks: Mapping[str, NetworkFeatures]) -> Figure:
    """Features of a digit in each layer, the same shifted, those of the shifted digit, differences.

    It shows the channel of each layer that varies most. Below a difference stands the largest one
    in any channel, relative to the largest feature.

    Args:
        networks: by their name in `MODELS`.
    """
    figure = Figure(figsize=(8.6, 5.1 * len(networks)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(networks), hspace=0.03))
    for part, (name, (layers, classes)) in zip(parts, networks.items()):
        part.suptitle("{}: the digit is classified as {}, shifted as {}".format(
            LABELS[name], *classes), fontsize=10)
        grid = part.subplots(4, len(layers))
        for i, (layer, column) in enumerate(zip(layers, grid.T)):
            channel = layer.of_digit[0].flatten(1).std(1).argmax()
            largest = _largest(layer.of_digit[:, channel])
            for ax, features in zip(column, layer):
                _show(ax, features[0, channel], largest if i else None)
            _show(column[3], layer.difference[0, channel], largest)
            column[0].set_title(f"layer {i}" if i else "input", fontsize=9)
            relative = _largest(layer.difference) / _largest(layer.of_digit)
            column[3].set_xlabel(f"{relative:.2g}", fontsize=9)
        texts = ("features of\nthe digit", "these, shifted", "features of the\nshifted digit",
                 "difference")
        for ax, text in zip(grid[:, 0], texts):
            ax.set_ylabel(text, fontsize=9)
    return figure


# --------------------------------------------------------------------------------------------------
# Results


def error_against_shift(rows: list[dict], size: tuple[float, float] = (8, 3.6)) -> Figure:
    """Test error of networks on digits moved by each isometry.

    Runs that differ in the seed alone are one line, their mean.

    Args:
        rows: as in error_against_shift.json.
        size: in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    groups = {}
    for row in rows:
        settings = "".join(f", {name} {value}" for name, value in row["settings"].items())
        groups.setdefault((row["model"], settings, row["train_mode"]), []).append(row["errors"])
    modes = {train_mode for _, _, train_mode in groups}
    common = f"trained on {modes.pop()} digits" if len(modes) == 1 else ""
    order = list(LABELS)
    lines = {}  # number of each model's lines so far, in the order of their settings
    for key, errors in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0])):
        model, settings, train_mode = key
        means = [sum(column) / len(column) for column in zip(*errors)]
        style = lines[model] = (lines.get(model, -1) + 1) % 4
        mode = "" if common else f", trained on {train_mode} digits"
        axes.plot(range(len(means)), means, color=COLOURS[model],
                  marker="os^x"[style], markersize=3 + style % 2,
                  markerfacecolor="none" if style % 2 else COLOURS[model],
                  linestyle=("-", "--", ":", "-.")[style],
                  label=f"{LABELS[model]}{settings}{mode}")
    length = len(rows[0]["errors"]) // 2
    axes.axvline(length, ymin=0.62, linewidth=1, linestyle=":", color="grey")  # above the legend
    axes.annotate("once around: the digit is reflected", (length, 1),
                  xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                  ha="center", va="bottom", fontsize=9, color="grey")
    axes.set(xlabel="shift of the test digits along the strip, in pixels",
             ylabel="test error in %", xlim=(-1, 2 * length))
    axes.set_xticks(range(0, 2 * length, 4 if size[0] >= 8 else 8))
    shown = [error for row in rows for error in row["errors"]]
    if min(shown) > 0 and max(shown) > 4 * min(shown):
        axes.set_yscale("log")
        _percent_ticks(axes.yaxis, shown)
    else:
        axes.set_ylim(0, 1.2 * max(*shown, 1))
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        axes.legend(title=common, frameon=False, loc="center", bbox_to_anchor=(0.5, 0.45))
    else:
        axes.set_title(f"{LABELS[model]}, {common}", fontsize=9, pad=16)
    return figure


def _percent_ticks(axis, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis that shows values in %. Values of 0 have no place there."""
    low = min((value for value in values if value > 0), default=1) / 1.4
    high = max(*values, 1) * 1.4
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})


def results(errors: Mapping[tuple[str, str], list[float]],
            paper: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Test errors on shifted digits: a dot for each run, a bar for the paper's mean ± std.

    Args:
        errors: in %, of the runs of each (model, training mode).
        paper: mean and standard deviation, by model and training mode.
    """
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    modes = ("centered", "shifted")
    models = [name for name in LABELS if any(errors.get((name, mode)) for mode in modes)]
    for axes, mode in zip(figure.subplots(1, 2, sharex=True, sharey=True), modes):
        for row, name in enumerate(models):
            mean, std = paper[name][mode]
            axes.barh(row, 2 * std, left=mean - std, height=0.62, color=GREY, alpha=0.35,
                      linewidth=0)
            axes.plot([mean, mean], [row - 0.31, row + 0.31], color=GREY, linewidth=1.5)
            runs = errors.get((name, mode), [])
            heights = [row + 0.16 * (i % 3 - 1) * (len(runs) > 1) for i in range(len(runs))]
            axes.plot(runs, heights, "o", markersize=5, color=COLOURS[name], markeredgewidth=0,
                      alpha=0.85)
        axes.set(title=f"trained on {mode} digits", xlabel="test error on shifted digits in %",
                 xscale="log")
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_yticks(range(len(models)), [LABELS[name] for name in models])
        _percent_ticks(axes.xaxis, [error for cell in errors.values() for error in cell])
        axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    dot, = axes.plot([], [], "o", markerfacecolor="none", markeredgecolor=GREY, markersize=5)
    bar = Rectangle((0, 0), 1, 1, color=GREY, alpha=0.35, linewidth=0)
    figure.legend([dot, bar],
                  ["a run of this code", "paper: mean ± standard deviation of 32 runs"],
                  loc="outside lower center", ncols=2, frameon=False)
    return figure


def training_curves(runs: list[dict]) -> Figure:
    """Training and test error in % after each epoch, where it was measured.

    Args:
        runs: results as in result.json.
    """
    figure = Figure(figsize=(8.6, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = {
        "test_error_shifted": ("-", "shifted test digits"),
        "test_error_centered": ("--", "centered test digits"),
        "train_error": (":", "training digits, with dropout"),
    }
    for run in runs:
        model = run["config"]["model"]
        for key, (style, text) in styles.items():
            epochs = [record for record in run["epochs"] if key in record]
            axes.plot([record["epoch"] for record in epochs], [record[key] for record in epochs],
                      linestyle=style, linewidth=1.8, markersize=4,
                      marker="o" if key != "train_error" else None,
                      color=COLOURS[model], label=f"{LABELS[model]}: {text}")
    last = max(len(run["epochs"]) for run in runs)
    axes.set(xlabel="epoch", ylabel="error in %", yscale="log", xlim=(0.5, last + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _percent_ticks(axes.yaxis, [value for line in axes.lines for value in line.get_ydata()])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=max(1, len(runs)))
    return figure


def gradient_norm(curves: list[dict]) -> Figure:
    """Norm of the gradient at each training step; `curves` as in gradient_norms.json."""
    figure = Figure(figsize=(8.6, 3), layout="constrained")
    axes = figure.add_subplot()
    for curve, colour in zip(curves, (COLOURS["mobius_regular"], COLOURS["cnn_same_channels"])):
        sign_eps = curve["config"]["sign_eps"]
        text = f"x / (|x| + {sign_eps:g})" if sign_eps else "sign(x)"
        steps = range(1, len(curve["norms"]) + 1)
        axes.plot(steps, curve["norms"], color=colour, linewidth=1.2, label=text)
    steps, epochs = len(curves[0]["norms"]), curves[0]["config"]["num_epochs"]
    for epoch in range(1, epochs):
        end = epoch * steps / epochs + 0.5
        axes.axvline(end, linewidth=1, linestyle=":", color=GREY)
        axes.annotate(f"epoch {epoch + 1}", (end, 1), xycoords=("data", "axes fraction"),
                      xytext=(4, -2), textcoords="offset points", va="top", fontsize=9, color=GREY)
    axes.set(xlabel="step", ylabel="norm of the gradient", yscale="log", xlim=(0, steps + 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(curves))
    return figure
