"""Draw the pictures of the README and of the walk-through, from code, data and measured results.

    python visualize.py                             # all of them, into visualizations/
    python visualize.py strip steerable_kernels     # some of them
    python visualize.py --dataset digits            # with scikit-learn's digits: no download

A picture that contains text is drawn twice, for light and dark pages: NAME and NAME-dark, as .svg,
or as .png where it shows pixels.

`equivariance` looks into two trained networks: those of --gauge_cnn and --cnn, or of pretrained/.
`gradient_norm` trains two networks for two epochs if results/gradient_norms.json is missing.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from convert_mnist import LENGTH, SOURCES
from fields import isometry_action
from reproduce import PAPER
from study.material import FIELDS, NETWORKS, Material
from study.runs import RESULTS
from fast import keep_freed_memory
from training.files import CommandLine, say, write_atomically
from training.run_folder import Busy

FOLDER = Path(__file__).resolve().parent / "visualizations"
STRIP_LENGTH = 8 * LENGTH  # of the strip in space
DOTS = 180  # per inch, of a picture of pixels


class Picture(NamedTuple):
    """How to draw a picture.

    draw: takes `study.figures` and the `Material`; returns a figure, or a list of frames.
    pixels: whether it is a PNG.
    text: whether it contains text, and is drawn for light and dark pages.
    """

    draw: Callable
    pixels: bool = True
    text: bool = True


def _strip(figures, material: Material):
    shifts = [STRIP_LENGTH * eighths // 8 for eighths in (0, 4, 7, 8)]  # it faces the viewer
    return figures.strips_in_space(material.digit, shifts, STRIP_LENGTH)


def _two_turns(figures, material: Material):
    return [figures.strips_in_space(material.digit, [shift], STRIP_LENGTH)
            for shift in range(0, 2 * STRIP_LENGTH, 8)]


def _transport_padding(figures, material: Material):
    features = isometry_action(material.features, LENGTH // 2 - 2, FIELDS)
    return figures.transport_padding(features, FIELDS, pad=2)


PICTURES = {
    "strip": Picture(_strip, text=False),
    "two_turns": Picture(_two_turns, text=False),
    "shifted_digits": Picture(lambda figures, data: figures.centered_and_shifted(*data.digits)),
    "field_types": Picture(
        lambda figures, data: figures.gauge_transformation(data.features, FIELDS)),
    "transport_padding": Picture(_transport_padding),
    "steerable_kernels": Picture(lambda figures, data: figures.steerable_kernels(data.kernels)),
    "models": Picture(lambda figures, data: figures.model_table(data.models), pixels=False),
    "equivariance": Picture(lambda figures, data: figures.equivariance(data.network_features)),
    "results": Picture(lambda figures, data: figures.results(data.errors, PAPER), pixels=False),
    "error_against_shift": Picture(
        lambda figures, data: figures.error_against_shift(data.rows), pixels=False),
    "gradient_norm": Picture(
        lambda figures, data: figures.gradient_norm(data.gradient_norms), pixels=False),
    "training_curves": Picture(
        lambda figures, data: figures.training_curves(data.curves), pixels=False),
}


def _image(figure) -> Image.Image:
    """The figure's pixels, transparent where nothing is drawn.

    It is drawn at twice the size and scaled down: surfaces in space have no soft edges.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * DOTS, transparent=True)
    image = Image.open(file).convert("RGBA")
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)


def _encode(drawn, pixels: bool) -> bytes:
    """The content of a picture's file. The same figure gives the same bytes."""
    file = io.BytesIO()
    if not pixels:
        drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return file.getvalue()
    frames = [_image(figure) for figure in (drawn if isinstance(drawn, list) else [drawn])]
    if len(frames) == 1:
        frames[0].save(file, "PNG", optimize=True)
    else:
        # 256 colours, chosen for each frame, make the file a third as large.
        frames = [frame.quantize(colors=256, method=Image.Quantize.FASTOCTREE).convert("RGBA")
                  for frame in frames]
        frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=80, loop=0,
                       disposal=1)
    return file.getvalue()


def save(name: str, material: Material, folder: Path) -> list[Path]:
    """Draw a picture in all its styles. Returns the files' paths.

    Raises:
        ValueError, OSError: if its data cannot be had, or a file cannot be written.
        ImportError: without matplotlib.
    """
    import matplotlib

    from study import figures

    picture, paths = PICTURES[name], []
    for suffix, style in figures.STYLES.items():
        if suffix and not picture.text:
            continue
        settings = {"svg.fonttype": "path", "svg.hashsalt": name, "font.size": 10} | style
        with matplotlib.rc_context(settings):
            content = _encode(picture.draw(figures, material), picture.pixels)
        paths.append(folder / f"{name}{suffix}.{'png' if picture.pixels else 'svg'}")
        with write_atomically(paths[-1]) as target:
            target.write(content)
    return paths


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME",
        help="pictures to draw, all unless some are named: " + ", ".join(PICTURES))
    add("--dataset", choices=SOURCES, default="mnist",
        help="digits to draw (%(default)s); results are those on MNIST")
    add("--data", metavar="FILE", help="an npz to use instead")
    add("--mnist_root", metavar="FOLDER",
        help="folder with MNIST's four files, for making the npz; without it they are downloaded")
    add("--gauge_cnn", metavar="FILE",
        help=f"a trained {NETWORKS['gauge_cnn']}: a run's folder, or its checkpoint.pt or "
             "weights.pt (that in pretrained/)")
    add("--cnn", metavar="FILE", help=f"a trained {NETWORKS['cnn']} (that in pretrained/)")
    add("--results", default=str(RESULTS), metavar="FOLDER", help="of the results (results)")
    add("--out", default=str(FOLDER), metavar="FOLDER", help="for the pictures (visualizations)")
    return parser


def main(argv=None) -> None:
    parser = command_line()
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in PICTURES]
    if unknown:
        parser.error(f"there is no picture {unknown[0]}: there are {', '.join(PICTURES)}")
    keep_freed_memory()
    material = Material(options)
    try:
        for name in options.names or PICTURES:
            for path in save(name, material, Path(options.out)):
                say(str(path))
    except (ValueError, OSError, ImportError, Busy, FloatingPointError,
            torch.OutOfMemoryError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
