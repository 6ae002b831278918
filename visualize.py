"""Draw the pictures of the README and of the walk-through, from code, data and measured results.

    python visualize.py                             # all of them, into visualizations/
    python visualize.py strip steerable_kernels     # some of them
    python visualize.py --dataset digits            # with scikit-learn's digits: nothing is downloaded

Each picture whose text needs it is drawn twice, for light and dark pages: NAME and NAME-dark, .svg, or .png where it shows pixels.
`equivariance` looks into two trained networks: those of --gauge_cnn and --cnn, or of the latest finished runs in logs/
with nothing but train.py's defaults; where there are none, they are trained first.
"""

import contextlib
import io
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from convert_mnist import LENGTH, SCALAR, SOURCES, Split
from fast.memory import keep_freed_memory
from fields import isometry_action
from nn_layers import MobiusConv
from reproduce import OTHER_DEFAULTS, PAPER, PAPER_RUNS, RESULTS, Cell, Study, read_error_against_shift
from train import LATEST, resumed_run
from training.checkpoints import load_network, runs_of
from training.data import Data, find_data
from training.files import CommandLine, say, write_atomically
from training.options import PRECISIONS, TRAIN_MODES, Config
from training.run_folder import Busy

FOLDER = Path(__file__).resolve().parent / "visualizations"
NETWORKS = {"gauge_cnn": "mobius_regular", "cnn": "cnn_same_channels"}
FIELDS = (1, 1, 1)  # one of each type, in the pictures of features and kernels
STRIP_LENGTH = 5 * LENGTH  # of the strip in space
DOTS = 180  # per inch of a picture of pixels


class Material:
    """What pictures are made of, each read or computed when a picture asks for it. Raises ValueError or OSError where it cannot be had."""

    def __init__(self, options) -> None:
        self.options = options

    def config(self, model: str) -> dict:
        """Options of train.py."""
        given = {"model": model, "dataset": self.options.dataset, "data": self.options.data, "mnist_root": self.options.mnist_root}
        return {name: value for name, value in given.items() if value is not None}

    @cached_property
    def data(self) -> Data:
        return find_data(Config(**self.config(NETWORKS["gauge_cnn"])), torch.device("cpu"))

    @property
    def splits(self) -> dict[str, Split]:
        return self.data.splits

    @property
    def digit(self) -> Tensor:
        """(1, 1, W, L)"""
        return self.splits["train_centered"].images[:1]

    @cached_property
    def features(self) -> Tensor:
        """Of the digit, one field of each type: (1, C, W, L)."""
        torch.manual_seed(0)
        return MobiusConv(SCALAR, FIELDS, kernel_size=5)(self.digit).detach()

    @property
    def kernels(self) -> MobiusConv:
        torch.manual_seed(0)
        return MobiusConv(FIELDS, FIELDS, kernel_size=5)

    @cached_property
    def networks(self) -> dict[str, torch.nn.Module]:
        """Trained, in float64: what is left of a difference there is not rounding."""
        networks = {}
        for option, model in NETWORKS.items():
            file = getattr(self.options, option)
            if file is not None:
                network = load_network(file, {"model": model})[0]
            else:
                network = self._network_of_train(Config(**self.config(model)))
            networks[model] = network.cpu().double().eval()
        return networks

    def _network_of_train(self, config: Config) -> torch.nn.Module:
        finished = runs_of(config, self.data)["finished"]
        if finished:
            return load_network(finished[-1], {"model": config.model})[0]
        say(f"there is no finished run of {config.model} in {config.log_dir}: this one is trained first")
        with contextlib.closing(resumed_run(LATEST, self.config(config.model))) as run:
            run.train()
        return run.model

    @cached_property
    def shifted_wrongly(self) -> tuple[Tensor, int]:
        """The first test digit that both networks know and the CNN does not when it is shifted, (1, 1, W, L), and the shift."""
        images, labels = (part[:200] for part in self.splits["test_centered"])
        images, shift = images.double(), 16
        with torch.no_grad():
            known = torch.stack([network(images).argmax(1) == labels for network in self.networks.values()]).all(0)
            lost = self.networks[NETWORKS["cnn"]](isometry_action(images, shift, SCALAR)).argmax(1) != labels
        index = int((known & lost).int().argmax())  # 0 where there is none
        return images[index:index + 1], shift

    @cached_property
    def rows(self) -> list[dict]:
        return read_error_against_shift(Path(self.options.results) / "error_against_shift.json")

    @cached_property
    def errors(self) -> dict[tuple[str, str], list[float]]:
        """On shifted test digits, of all finished runs of the paper's protocol in bfloat16, as in the table of the README."""
        cells = [(model, mode) for model in PAPER for mode in TRAIN_MODES]
        configs = [Config(model, train_mode=mode, seed=seed, precision="bf16", **OTHER_DEFAULTS)
                   for model, mode in cells for seed in range(PAPER_RUNS)]
        study = Study(configs, self.options.results)
        errors = {cell: Cell(study, *cell, "shifted").errors for cell in cells}
        if not any(errors.values()):
            raise ValueError(f"there is no finished run in {study.results / 'runs'}: python reproduce.py --precision bf16 makes them")
        return errors

    @cached_property
    def curves(self) -> list[dict]:
        """Results of both networks, the paper's protocol on centered digits, seed 0: in the precision in which they were tested most."""
        best, most = None, 0
        for precision in PRECISIONS:
            configs = [Config(model, precision=precision, **OTHER_DEFAULTS) for model in NETWORKS.values()]
            study = Study(configs, self.options.results)
            results = [study.result(config) for config in configs]
            tested = min(sum("test_error_shifted" in record for record in result["epochs"]) if result else 0 for result in results)
            if tested > most:
                best, most = results, tested
        if best is None:
            raise ValueError(
                f"there are no runs of {' and '.join(NETWORKS.values())} in {study.results / 'runs'}: python reproduce.py makes them"
            )
        return best


def shift_between(before: Tensor, after: Tensor) -> int:
    """The isometry's shift that moves a digit ``(1, 1, W, L)`` to where it is afterwards. Raises ValueError if there is none."""
    for shift in range(2 * before.shape[3]):
        if torch.equal(isometry_action(before, shift, SCALAR), after):
            return shift
    raise ValueError("a shifted digit of the data set is no isometry's image of the centered one")


# ------------------------------------------------------------------------------------------------------
# The pictures, by name. Each takes the material and gives a figure, an animation all of its frames.


class Picture(NamedTuple):
    """draw: from the material to a figure, or to a list of frames. pixels: whether it is a PNG. text: whether it has text in the page's
    colour, and so two versions.
    """

    draw: Callable
    pixels: bool = True
    text: bool = True


def _strip(pictures, material: Material):
    shifts = [STRIP_LENGTH * fifths // 5 for fifths in (0, 2, 3, 4, 5)]
    return pictures.strips_in_space(material.digit, shifts, STRIP_LENGTH)


def _turns(pictures, material: Material):
    step = 5
    return [pictures.strips_in_space(material.digit, [shift], STRIP_LENGTH) for shift in range(0, 2 * STRIP_LENGTH, step)]


def _shifted_digits(pictures, material: Material):
    centered, shifted = (material.splits[f"train_{version}"].images[:8] for version in ("centered", "shifted"))
    shifts = torch.tensor([shift_between(*pair) for pair in zip(centered.split(1), shifted.split(1))])
    return pictures.centered_and_shifted(centered, shifted, shifts, material.splits["train_centered"].labels[:8])


def _transport_padding(pictures, material: Material):
    return pictures.transport_padding(isometry_action(material.features, LENGTH // 2 - 2, FIELDS), FIELDS, pad=6)


PICTURES = {
    "strip": Picture(_strip, text=False),
    "two_turns": Picture(_turns, text=False),
    "shifted_digits": Picture(_shifted_digits),
    "field_types": Picture(lambda pictures, material: pictures.gauge_transformation(material.features, FIELDS)),
    "transport_padding": Picture(_transport_padding),
    "steerable_kernels": Picture(lambda pictures, material: pictures.steerable_kernels(material.kernels)),
    "models": Picture(lambda pictures, material: pictures.model_table(), pixels=False),
    "equivariance": Picture(lambda pictures, material: pictures.equivariance(material.networks, *material.shifted_wrongly)),
    "results": Picture(lambda pictures, material: pictures.results(material.errors, PAPER), pixels=False),
    "error_against_shift": Picture(lambda pictures, material: pictures.error_against_shift(material.rows), pixels=False),
    "training_curves": Picture(lambda pictures, material: pictures.training_curves(material.curves), pixels=False),
}


def _png(figure):
    """As an image, transparent where nothing is drawn. Drawn at twice the size: surfaces in space have no soft edges of their own."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * DOTS, transparent=True)
    image = Image.open(file).convert("RGBA")
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)


def _encoded(drawn, pixels: bool) -> bytes:
    """The file's content: the same figure gives the same, byte for byte."""
    file = io.BytesIO()
    if not pixels:
        drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return file.getvalue()
    frames = [_png(figure) for figure in (drawn if isinstance(drawn, list) else [drawn])]
    if len(frames) == 1:
        frames[0].save(file, "PNG", optimize=True)
    else:
        # Fewer colours, which can be seen in a scale of them but not here, make it a third as large. Each has a palette of its own.
        frames = [frame.quantize(colors=256, method=Image.Quantize.FASTOCTREE).convert("RGBA") for frame in frames]
        frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=80, loop=0, disposal=1)
    return file.getvalue()


def save(name: str, material: Material, folder: Path) -> list[Path]:
    """Draw a picture in all its styles. Returns the files' paths.

    Raises:
        ValueError, OSError: if there is nothing to draw it from, or a file cannot be written.
        ImportError: without matplotlib.
    """
    import matplotlib

    import pictures

    picture, paths = PICTURES[name], []
    for suffix, style in pictures.STYLES.items():
        if suffix and not picture.text:
            continue
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name, "font.size": 10} | style):
            content = _encoded(picture.draw(pictures, material), picture.pixels)
        paths.append(folder / f"{name}{suffix}.{'png' if picture.pixels else 'svg'}")
        with write_atomically(paths[-1]) as target:
            target.write(content)
    return paths


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="pictures to draw, all unless some are named: " + ", ".join(PICTURES))
    add("--dataset", choices=SOURCES, default="mnist",
        help="digits to draw, and those of the networks of `equivariance` (%(default)s); results are those on MNIST")
    add("--data", metavar="FILE", help="an npz to use instead")
    add("--mnist_root", metavar="FOLDER", help="folder with MNIST's four files, for making the npz; without it they are downloaded")
    add("--gauge_cnn", metavar="FILE", help=f"a trained {NETWORKS['gauge_cnn']}: a run's folder, or its checkpoint.pt or weights.pt")
    add("--cnn", metavar="FILE", help=f"a trained {NETWORKS['cnn']}")
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
    except (ValueError, OSError, ImportError, Busy, FloatingPointError, torch.OutOfMemoryError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
