"""Pictures of strips, fields, kernels, networks and results: functions from data to a figure.

    figure = steerable_kernels(MobiusConv((1, 1, 1), (1, 1, 1), kernel_size=5))
    figure.savefig("kernels.png")

`visualize.py` makes the pictures of the README with them, `train.py` those of TensorBoard. Text
takes the colours of matplotlib's settings (`STYLES`); the rest is legible on light and dark pages.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from convert_mnist import SCALAR
from fields import (
    REPRESENTATIONS, Fields, gauge_transform, isometry_action, split_types,
)
from models import MODELS, count_parameters
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
TYPES = {"triv": "scalar", "sign": "sign-flip", "reg": "regular"}
# Colour-blind readers can tell them apart too (Okabe and Ito, but for the last two), on white and
# on black.
TYPE_COLOURS = {"triv": "#56B4E9", "sign": "#CC79A7", "reg": "#0072B2"}
NO_TYPE = "#D55E00"
COLOURS = (NO_TYPE, "#E69F00", *TYPE_COLOURS.values(), "#009E73", "#8B6BD9", "#A6761D")
GREY = "#727A83"  # contrast 4.3 with GitHub's light page and with its dark one
INK = LinearSegmentedColormap.from_list("ink", ["#F3EDE0", "#14181D"])  # scalars in [0, 1]
SIGNED = "RdBu_r"  # features, from -1 to 1 times the largest
_DARK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLES = {"": {}, "-dark": dict.fromkeys(_DARK, "#E6EDF3")}


def model_label(model: str) -> str:
    return LABELS.get(model, model)


def model_colour(model: str) -> str:
    """By the model's place in `MODELS`, in turn where there are more models than colours."""
    names = list(MODELS)
    return COLOURS[names.index(model) % len(COLOURS)] if model in names else GREY


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


EDGE, CUT = "#8A7F6B", NO_TYPE  # lines on a strip in space
ELEVATION = math.radians(36)  # from which it is seen
# From coordinates in space to those seen: to the right, up, and towards the viewer.
VIEW = np.array([[0, -math.sin(ELEVATION), math.cos(ELEVATION)],
                 [1, 0, 0],
                 [0, math.cos(ELEVATION), math.sin(ELEVATION)]])
LIGHT = VIEW @ (-0.3, 0.4, 0.9)  # over the viewer's left shoulder


def _in_space(across: np.ndarray, along: np.ndarray, length: int) -> np.ndarray:
    """Positions in space, (..., 3), of points on a strip that is upright at its cut.

    In the middle of the strip lengths are kept. Towards the edges the strip is stretched or
    compressed along its length, as paper cannot be.
    """
    angle = 2 * np.pi * along / length
    tilt = (angle - np.pi) / 2
    radius = length / (2 * np.pi) + across * np.cos(tilt)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), across * np.sin(tilt)], -1)


def _quads(image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Corners (W + 2, L + 2, 4, 3) and colours (W + 2, L + 2, 4) of a strip in space.

    They are those of its pixels, with the edge as a row on both sides, and the cut as a column.
    """
    width, length = image.shape
    across = np.r_[-0.8, 0:width + 1, width + 0.8] - width / 2
    along = np.r_[0, 0.7, 1:length, length - 0.7, length]
    points = _in_space(across[:, None], along, length)
    corners = np.stack([points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]], 2)
    colours = np.pad(INK(image.detach().cpu().numpy()), ((1, 1), (1, 1), (0, 0)))
    colours[[0, -1]], colours[:, [0, -1]] = to_rgba(EDGE), to_rgba(CUT)
    normals = np.cross(corners[:, :, 2] - corners[:, :, 0], corners[:, :, 3] - corners[:, :, 1])
    cosines = np.abs(normals @ LIGHT) / np.linalg.norm(normals, axis=2) / np.linalg.norm(LIGHT)
    colours[..., :3] *= (0.6 + 0.4 * cosines)[..., None]
    return corners, colours


def _draw_in_space(axes, image: Tensor) -> None:
    corners, colours = _quads(image)
    seen = (corners @ VIEW).reshape(-1, 4, 3)
    order = seen[:, :, 2].mean(1).argsort()  # what is nearer hides what is farther
    axes.add_collection(PolyCollection(
        seen[order, :, :2], facecolors=colours.reshape(-1, 4)[order], linewidth=0,
        antialiased=False))
    axes.set_aspect("equal")
    axes.margins(0.01)
    axes.autoscale_view()
    axes.set_axis_off()


def on_long_strip(image: Tensor, length: int) -> Tensor:
    """A digit ``(1, 1, W, L)`` at the beginning of a strip of `length` columns.

    In space, a strip of at most pi W columns would meet itself.
    """
    blank = image.new_zeros(*image.shape[:3], length - image.shape[3])
    return torch.cat([image, blank], dim=3)


def strips_in_space(image: Tensor, shifts: Sequence[int], length: int) -> Figure:
    """A digit ``(1, 1, W, L)`` at several shifts on a strip in space; the cut is a line."""
    figure = Figure(figsize=(1.8 * len(shifts), 1.58))
    for i, shift in enumerate(shifts):
        axes = figure.add_axes(((i + 0.01) / len(shifts), 0, 0.98 / len(shifts), 0.88))
        _draw_in_space(axes, isometry_action(on_long_strip(image, length), shift, SCALAR)[0, 0])
        figure.text((i + 0.5) / len(shifts), 0.9, f"t = {shift}", ha="center", color=GREY,
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

    Solid boxes show the columns padded over the cut, dashed boxes with the same letter where they
    come from. A gap of one column is left between the padding and the strip. Above and below are
    zeros.
    """
    fields = Fields(*fields)
    types, largest = channel_types(fields), _largest_of_types(x, fields)
    width, length = x.shape[2:]
    before, strip, after = transport_pad(x, pad, fields)[0].split([pad, length, pad], dim=2)
    gap = torch.full_like(before[:, :, :1], math.nan)
    padded = torch.cat([before, gap, strip, gap, after], dim=2)
    figure = Figure(figsize=(2 * len(types), 2.5), layout="constrained")
    titles, texts = _channels(fields, CHANNEL_NAMES), _channels(fields, OVER_THE_CUT)
    axes = figure.subplots(1, len(types))
    for ax, name, title, text, image in zip(axes, types, titles, texts, padded):
        colour = TYPE_COLOURS[name]
        _show(ax, image, largest[name])
        ax.spines[:].set_visible(False)
        edge = -0.5
        ends = edge + pad + 1, edge + 1 + length  # the first and the last columns of the strip
        solid, dashed = {"linewidth": 1.8}, {"linewidth": 1.2, "linestyle": (0, (2, 1.5))}
        for left, letter, line in (
            (edge, "A", solid), (ends[0], "B", dashed),
            (ends[1], "A", dashed), (ends[1] + pad + 1, "B", solid),
        ):
            ax.add_patch(Rectangle((left, edge + pad), pad, width, fill=False, edgecolor=colour,
                                   **line))
            ax.text(left + pad / 2, edge + pad / 2, letter, color=colour, fontsize=7,
                    weight="bold", ha="center", va="center")
        for row in (edge + pad, edge + pad + width):
            ax.plot([ends[0], ends[1] + pad], [row, row], color=GREY, linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(f"padding: {text}", fontsize=9)
    return figure


# What becomes of a free kernel K, or of two, K and M: a row for each channel of the input.
CONSTRAINTS = {
    ("triv", "triv"): [["symmetric"]],
    ("triv", "sign"): [["antisymmetric"]],
    ("triv", "reg"): [["K", "flip K"]],
    ("sign", "triv"): [["antisymmetric"]],
    ("sign", "sign"): [["symmetric"]],
    ("sign", "reg"): [["K", "−flip K"]],
    ("reg", "triv"): [["K"], ["flip K"]],
    ("reg", "sign"): [["K"], ["−flip K"]],
    ("reg", "reg"): [["K", "flip M"], ["M", "flip K"]],
}


def _numbered_channels(fields: Fields) -> list[tuple[str, int]]:
    """The type of each channel, and its number among those of this type."""
    return [(name, i) for name, m in zip(REPRESENTATIONS, fields)
            for i in range(m * REPRESENTATIONS[name].dim)]


def _short_names(fields: Fields) -> list[str]:
    return [name.replace(" channel", "") for name in _channels(fields, CHANNEL_NAMES)]


def steerable_kernels(conv: MobiusConv) -> Figure:
    """The expanded kernels, a block for each pair of types: input rows, output columns."""
    kernel, _ = conv.expand()
    largest = _largest(kernel)
    rows, columns = _numbered_channels(conv.in_fields), _numbered_channels(conv.out_fields)
    figure = Figure(figsize=(1.45 * len(columns), 1.6 * len(rows)))
    figure.set_layout_engine("constrained", h_pad=0.08)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, (name_in, row) in enumerate(rows):
        for o, (name_out, column) in enumerate(columns):
            axes = grid[i, o]
            _show(axes, kernel[o, i], largest, TYPE_COLOURS[name_out], linewidth=2)
            texts = CONSTRAINTS[name_in, name_out]
            texts = texts[row % len(texts)]
            axes.set_title(texts[column % len(texts)], fontsize=10, pad=4)
    for axes, name in zip(grid[0], _short_names(conv.out_fields)):
        axes.set_title(f"to {name}\n", loc="left", fontsize=9, weight="bold")
    for axes, name in zip(grid[:, 0], _short_names(conv.in_fields)):
        axes.set_ylabel(f"from {name}", fontsize=9, weight="bold")
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
        types, titles = channel_types(fields), _short_names(fields)
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
        axes.set_title(text, fontsize=8, pad=3)
    return figure


# --------------------------------------------------------------------------------------------------
# Networks


def _output(conv: MobiusConv | MobiusConvNaive) -> list[tuple[int, int, str]]:
    """Number of fields of each type, of their channels, and their colour."""
    if isinstance(conv, MobiusConvNaive):
        return [(conv.out_channels, conv.out_channels, NO_TYPE)]
    return [(m, m * REPRESENTATIONS[name].dim, TYPE_COLOURS[name])
            for name, m in zip(REPRESENTATIONS, conv.out_fields) if m]


def model_table(models: Mapping[str, nn.Module]) -> Figure:
    """The field types of each convolution's output, and the number of parameters.

    A bar is as long as its fields have channels, relative to the most of any model; the number in
    it is that of fields.
    """
    outputs = [[_output(conv) for conv in _convolutions(model)] for model in models.values()]
    channels = [[sum(size for _, size, _ in output) for output in row] for row in outputs]
    most = [max(column) for column in zip_longest(*channels, fillvalue=0)]
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for row, model in enumerate(models.values()):
        for left, (output, longest) in enumerate(zip(outputs[row], most)):
            for number, size, colour in output:
                size *= 0.92 / longest
                axes.barh(row, size, left=left, height=0.7, color=colour, edgecolor="none")
                axes.text(left + size / 2, row, f"{number}", ha="center", va="center", fontsize=8.5,
                          color="white" if colour == TYPE_COLOURS["reg"] else "black")
                left += size
        axes.text(len(most) + 0.62, row, f"{count_parameters(model):,}", ha="right",
                  va="center", fontsize=9)
    axes.set_yticks(range(len(models)), [model_label(name) for name in models])
    ticks = [i + 0.46 for i in range(len(most))] + [len(most) + 0.3]
    texts = [f"conv {i + 1}\n{n} channels" for i, n in enumerate(most)] + ["parameters\n"]
    axes.set_xticks(ticks, texts, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set(xlim=(-0.04, len(most) + 0.66), ylim=(len(models) - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=colour)
               for colour in (*TYPE_COLOURS.values(), NO_TYPE)]
    labels = [f"{text} fields" for text in TYPES.values()] + ["channels without a type"]
    labels[2] += " (2 channels each)"
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9,
                  title="The length of a bar counts channels, the number in it counts fields.",
                  title_fontsize=9, columnspacing=1.5)
    return figure


def _shown_channels(x: Tensor, fields: Fields) -> list[int]:
    """Two channels: of the regular field that varies most, or of the two other fields that do."""
    types, spread = channel_types(fields), x[0].flatten(1).std(1)
    best = spread.argmax().item()
    dim = REPRESENTATIONS[types[best]].dim
    if dim > 1:
        first = best - (best - types.index(types[best])) % dim
        return list(range(first, first + dim))
    return [c for c in spread.argsort(descending=True).tolist() if types[c] == types[best]][:2]


def equivariance(networks: Mapping[str, NetworkFeatures],
                 shown: Sequence[int] = (0, 1, 2, 4, 6)) -> Figure:
    """Features of a digit, the same shifted, those of the shifted digit, and differences.

    It shows two channels of a layer: of the regular field that varies most, or of the two fields of
    another type that do. Below the differences stands the largest in any channel, relative to the
    largest feature.

    Args:
        networks: by their name in `MODELS`.
        shown: layers; 0 is the input.
    """
    figure = Figure(figsize=(8.6, 3.95 * len(networks)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(networks), hspace=0.03))
    for part, (model, (layers, classes)) in zip(parts, networks.items()):
        part.suptitle("{}: the digit is classified as {}, shifted as {}".format(
            model_label(model), *classes), fontsize=10, weight="bold")
        channels = [_shown_channels(layers[i].of_digit, layers[i].fields) for i in shown]
        grid = part.subplots(4, len(shown), width_ratios=[len(pair) for pair in channels])
        for i, pair, column in zip(shown, channels, grid.T):
            layer, title = layers[i], f"layer {i}" if i else "input"
            largest = _largest(layer.of_digit[:, pair])
            for row, features in enumerate((*layer[:3], layer.difference)):
                image = torch.cat([features[0, channel] for channel in pair], dim=1)
                _show(column[row], image, largest if i or row == 3 else None)
                column[row].axvline(features.shape[3] - 0.5, color=GREY, linewidth=0.8)
            if channel_types(layer.fields)[pair[0]] == "reg":
                title += "\nboth channels of a field"
            column[0].set_title(title, fontsize=9)
            relative = _largest(layer.difference) / _largest(layer.of_digit)
            column[3].set_xlabel(f"{relative:.2g}", fontsize=9)
        texts = ("features of\nthe digit", "these,\nshifted", "features of\nshifted digit",
                 "difference")
        for ax, text in zip(grid[:, 0], texts):
            ax.set_ylabel(text, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Results


def error_against_shift(rows: list[dict], size: tuple[float, float] = (8.6, 4.2)) -> Figure:
    """Test error of networks on digits moved by each isometry; flat curves again, magnified.

    Runs that differ in the seed alone are one line, their mean.

    Args:
        rows: as in error_against_shift.json.
        size: in inches, without the magnified curves.
    """
    groups = {}
    for row in rows:
        settings = "".join(f", {name} {value}" for name, value in row["settings"].items())
        groups.setdefault((row["model"], settings, row["train_mode"]), []).append(row["errors"])
    modes = {train_mode for _, _, train_mode in groups}
    common = f"trained on {modes.pop()} digits" if len(modes) == 1 else ""
    length = len(rows[0]["errors"]) // 2
    curves, kinds = [], sorted({(settings, mode) for _, settings, mode in groups})
    for (model, settings, train_mode), errors in sorted(groups.items()):
        number = kinds.index((settings, train_mode)) % 4  # the same kind of line for all models
        mode = "" if common else f", trained on {train_mode} digits"
        curves.append(([sum(column) / len(column) for column in zip(*errors)], {
            "label": f"{model_label(model)}{settings}{mode}", "color": model_colour(model),
            "marker": "os^x"[number], "markersize": 3 + number % 2,
            "markerfacecolor": "none" if number % 2 else None,
            "linestyle": ("-", "--", ":", "-.")[number],
        }))
    flat = [curve for curve in curves if max(curve[0]) < 1.5 * min(curve[0])]
    magnified = 0 < len(flat) < len(curves)
    figure = Figure((size[0], size[1] * (1.6 if magnified else 1)), layout="constrained")
    parts = figure.subplots(1 + magnified, sharex=True, squeeze=False)[:, 0]
    for part, shown in zip(parts, (curves, flat)):
        for means, style in shown:
            part.plot(means, **style)
        part.axvline(length, linewidth=1, linestyle=":", color=GREY)
        part.spines[["top", "right"]].set_visible(False)
        part.set_ylabel("test error in %")
    parts[0].set_ylim(0, 1.1 * max(1, *(error for means, _ in curves for error in means)))
    for part in parts[1:]:
        part.set_title("the flat curves, magnified", fontsize=9)
    parts[-1].set(xlabel="shift of the test digits along the strip, in pixels",
                  xlim=(-1, 2 * length), xticks=range(0, 2 * length, 4 if size[0] >= 8 else 8))
    parts[0].annotate("once around: the digit is reflected", (length, 1),
                      xycoords=("data", "axes fraction"), xytext=(0, 3),
                      textcoords="offset points", ha="center", va="bottom", fontsize=9, color=GREY)
    if len(groups) > 1:
        handles = parts[0].get_legend_handles_labels()
        figure.legend(*handles, title=common, frameon=False, loc="outside lower center", ncols=2,
                      handlelength=4)
    else:
        parts[0].set_title(f"{model_label(model)}, {common}", fontsize=9, pad=16)
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
            paper: Mapping[str, Mapping[str, tuple]]) -> Figure:
    """Test errors on shifted digits: a dot for each run, a bar for the paper's mean ± std.

    Args:
        errors: in %, of the runs of each (model, training mode).
        paper: mean, standard deviation and more, by model and training mode.
    """
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    modes = ("centered", "shifted")
    dot = {"markersize": 4, "markeredgewidth": 0}
    models = list(dict.fromkeys(name for (name, _), runs in errors.items() if runs))
    for axes, mode in zip(figure.subplots(1, 2, sharex=True, sharey=True), modes):
        for row, name in enumerate(models):
            if published := paper.get(name, {}).get(mode):
                mean, std, *_ = published
                axes.barh(row, 2 * std, left=mean - std, height=0.8, color=GREY, alpha=0.35,
                          linewidth=0)
                axes.plot([mean, mean], [row - 0.4, row + 0.4], color=GREY, linewidth=1.5, zorder=3)
            runs = errors.get((name, mode), [])
            heights = [row + 0.2 * (i % 3 - 1) * (len(runs) > 1) for i in range(len(runs))]
            axes.plot(runs, heights, "o", color=model_colour(name), **dot)
        axes.set(title=f"trained on {mode} digits", xlabel="test error on shifted digits in %",
                 xscale="log")
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_yticks(range(len(models)), [model_label(name) for name in models])
        _percent_ticks(axes.xaxis, [error for cell in errors.values() for error in cell])
        axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    dots = tuple(Line2D([], [], marker="o", color=model_colour(name), linestyle="none", **dot)
                 for name in models)
    bar = (Rectangle((0, 0), 1, 1, color=GREY, alpha=0.35, linewidth=0),
           Line2D([], [], marker="|", color=GREY, markersize=8, markeredgewidth=1.5,
                  linestyle="none"))
    figure.legend([dots, bar],
                  ["runs of this code", "paper: mean ± standard deviation of 32 runs"],
                  handler_map={dots: HandlerTuple(ndivide=None), bar: HandlerTuple(ndivide=1)},
                  handlelength=3, loc="outside lower center", ncols=2, frameon=False)
    return figure


def training_curves(runs: list[dict]) -> Figure:
    """Training and test error in % after each epoch, where it was measured.

    Args:
        runs: results as in result.json.
    """
    figure = Figure(figsize=(8.6, 4), layout="constrained")
    axes = figure.add_subplot()
    # Both test errors of a gauge CNN lie on each other: one's markers are seen around the other's.
    styles = {
        "test_error_shifted": ("shifted test digits", {
            "linestyle": "-", "marker": "o", "markersize": 4}),
        "test_error_centered": ("centered test digits", {
            "linestyle": "--", "marker": "s", "markersize": 7, "markerfacecolor": "none"}),
        "train_error": ("training digits, with dropout", {"linestyle": ":"}),
    }
    for run in runs:
        model = run["config"]["model"]
        for key, (text, style) in styles.items():
            epochs = [record for record in run["epochs"] if key in record]
            axes.plot([record["epoch"] for record in epochs], [record[key] for record in epochs],
                      linewidth=1.8, color=model_colour(model),
                      label=f"{model_label(model)}: {text}", **style)
    last = max(len(run["epochs"]) for run in runs)
    axes.set(xlabel="epoch", ylabel="error in %", yscale="log", xlim=(0.5, last + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _percent_ticks(axes.yaxis, [value for line in axes.lines for value in line.get_ydata()])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=max(1, len(runs)),
                  handlelength=5)
    return figure


def gradient_norm(curves: list[dict]) -> Figure:
    """Norm of the gradient at each training step; `curves` as in gradient_norms.json."""
    figure = Figure(figsize=(8.6, 3), layout="constrained")
    axes = figure.add_subplot()
    for curve, colour in zip(curves, (TYPE_COLOURS["reg"], NO_TYPE)):
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
