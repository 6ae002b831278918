"""Digits on the Möbius strip: source digits -> data/mobius_*.npz.

    python convert_mnist.py                         # MNIST, downloaded  -> data/mobius_MNIST.npz
    python convert_mnist.py --mnist_root FOLDER     # MNIST from a folder that has its four files
    python convert_mnist.py --source digits         # scikit-learn's bundled digits, no network
                                                    #                    -> data/mobius_digits.npz
    python convert_mnist.py --source mnist_validation   # other training digits in place of the test set
                                                        #                -> data/mobius_MNIST_validation.npz

A digit is a scalar field on a strip of 28 x 28 pixels with values in [0, 1]. Every digit is stored
*centered*, as it is, and *shifted* by an isometry drawn once, uniformly from all 2L = 56 of them.

The file holds, for train and test: ``{train,test}_data_centered`` and ``{train,test}_data_shifted``,
float32 of shape ``(n, 1, 28, 28)``; ``{train,test}_labels`` and ``{train,test}_shifts``, int64 of shape
``(n,)``. The same options give the same file, byte for byte, with the same NumPy and zlib;
with others the same shifts and the same MNIST images.

Source: arXiv:2106.06020, Section 5.
"""

import argparse
import contextlib
import io
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fields import as_integer, isometry_action

WIDTH = LENGTH = 28
SCALAR = (1, 0, 0)
DATA_FOLDER = Path(__file__).resolve().parent / "data"
MNIST_FILES = tuple(
    f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
SEED = 0


class Split(NamedTuple):
    """images: float32 ``(n, 1, 28, 28)`` in [0, 1]. labels: int64 ``(n,)`` in 0 … 9."""

    images: Tensor
    labels: Tensor


# ------------------------------------------------------------------------------------------------------
# For every script: one line about what was wrong, and files that are whole or not there.


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr, with exit status 2."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message) -> None:
        one_line = " ".join(str(message).split())
        if one_line.startswith("unrecognized arguments"):
            one_line += f" ({self.prog} -h lists the options)"
        self.exit(2, f"{self.prog}: error: {one_line}\n")


@contextlib.contextmanager
def write_atomically(path):
    """Open a temporary binary file beside `path` that takes its place once it is complete.

    Whatever interrupts the writing, `path` is as it was before. A symbolic link stays one.

    Raises:
        ValueError: if `path` is there and not a file.
        OSError: naming `path`, if it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: it is there and not a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# ------------------------------------------------------------------------------------------------------
# Sources


def _torchvision_mnist() -> type:
    """torchvision's MNIST class, also where torchvision's compiled half does not fit this torch.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its compiled operators do not load, and
    the import fails where their shapes are declared. The data sets are plain Python and need none of them.
    """
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise ValueError(f"MNIST is read with torchvision, which cannot be imported ({error})") from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        with mock.patch("torch.library.register_fake", lambda name: lambda function: function):
            from torchvision.datasets import MNIST
    return MNIST


def _has_mnist(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MNIST_FILES)


def _download_mnist(root: Path) -> None:
    """Download MNIST's files to ``root/MNIST/raw``, where they appear once all are complete."""
    mnist = _torchvision_mnist()  # not below: not installed is another fault than no network
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
        try:
            socket.setdefaulttimeout(30)  # a silent network should not hang the command for minutes
            with contextlib.redirect_stdout(io.StringIO()):  # "Failed to download (trying next)"
                mnist(temporary, download=True)
        except Exception as error:  # whatever a network can do
            raise ValueError(
                f"could not download MNIST ({str(error).split(':')[0]}): give --mnist_root a folder with "
                f"{', '.join(MNIST_FILES)}, or take scikit-learn's digits, which need no network "
                "(train.py --dataset digits, convert_mnist.py --source digits)"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        folder = root / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for name in MNIST_FILES:
            os.replace(Path(temporary) / "MNIST" / "raw" / name, folder / name)


def load_mnist(root=None) -> tuple[Split, Split]:
    """MNIST's 60,000 training and 10,000 test digits, through torchvision.

    Args:
        root: folder with MNIST's four files, uncompressed, in it or in ``root/MNIST/raw`` as torchvision has
            them. None: ``data/``, where they are downloaded to if they are not there.

    Raises:
        ValueError: if a file is missing, truncated or something else, or could not be downloaded.
    """
    if root is None:
        folder = DATA_FOLDER / "MNIST" / "raw"
        if not _has_mnist(folder):
            _download_mnist(DATA_FOLDER)
    else:
        folders = [Path(root) / "MNIST" / "raw", Path(root)]
        folder = next(filter(_has_mnist, folders), None)
        if folder is None:
            raise ValueError(
                f"--mnist_root {root} does not have MNIST's four files {', '.join(MNIST_FILES)} (uncompressed), "
                "neither in MNIST/raw nor by themselves"
            )
    # torchvision puts the class name into the folder it reads from.
    reader = type("MNIST", (_torchvision_mnist(),), {"raw_folder": str(folder)})
    splits = []
    for train, count in ((True, 60_000), (False, 10_000)):
        names = " and ".join(MNIST_FILES[:2] if train else MNIST_FILES[2:])
        try:
            digits = reader(folder, train=train)
            images, labels = digits.data, digits.targets
            if images.shape != (count, WIDTH, LENGTH) or labels.shape != (count,) or images.dtype != torch.uint8:
                raise ValueError(f"they hold {tuple(images.shape)} images and {tuple(labels.shape)} labels")
            if labels.min() < 0 or labels.max() > 9:
                raise ValueError("they hold labels outside 0 … 9")
        except OSError as error:
            raise ValueError(f"cannot read {names} in {folder}: {error.strerror or error}") from error
        except Exception as error:  # torchvision's reader asserts, indexes and reshapes
            raise ValueError(
                f"{names} in {folder} are truncated or not MNIST's ({error or type(error).__name__}): "
                "get them anew"
            ) from error
        splits.append(Split(images[:, None].float() / 255, labels.long()))
    return splits[0], splits[1]


def load_digits() -> tuple[Split, Split]:
    """scikit-learn's bundled handwritten digits: 1,297 for training and 500 for the test.

    The 8 x 8 images are scaled into the 20 x 20 box in the middle of 28 x 28 that MNIST's digits fill. The
    test digits are the last ones of the file.

    Source: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits* (UCI, 1998), its test half.
    """
    from sklearn.datasets import load_digits as bundled_digits

    images, labels = bundled_digits(return_X_y=True)
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    images = F.pad(images, (4, 4, 4, 4)).clamp(0, 1)
    labels = torch.from_numpy(labels).long()
    return Split(images[:-500], labels[:-500]), Split(images[-500:], labels[-500:])


def load_validation(root) -> tuple[Split, Split]:
    """For choosing settings without a look at the test set: in its place, 10,000 of MNIST's other training digits."""
    digits, _ = load_mnist(root)
    return tuple(Split(digits.images[part], digits.labels[part]) for part in (slice(20_000), slice(20_000, 30_000)))


class Source(NamedTuple):
    """load: reads the digits, from a folder with MNIST where they need it. file: name of the npz.
    train_size, largest_train_size: training digits unless asked otherwise, and at most. from_mnist: whether they are MNIST's.
    """

    load: Callable[..., tuple[Split, Split]]
    file: str
    train_size: int
    largest_train_size: int
    from_mnist: bool = True

    @property
    def path(self) -> Path:
        """Where the npz lies unless asked otherwise."""
        return DATA_FOLDER / self.file


SOURCES = {
    # As many training digits as rotated MNIST has.
    "mnist": Source(load_mnist, "mobius_MNIST.npz", 12_000, 60_000),
    "mnist_validation": Source(load_validation, "mobius_MNIST_validation.npz", 12_000, 20_000),
    "digits": Source(lambda root: load_digits(), "mobius_digits.npz", 1_297, 1_297, from_mnist=False),
}


# ------------------------------------------------------------------------------------------------------
# Conversion


def draw_shifts(n: int, seed: int, stream: int) -> Tensor:
    """`n` shifts, uniform on 0 … 2L - 1. Fewer of the same seed and stream are the first of more."""
    # RandomState: the one generator whose numbers NumPy promises never to change.
    return torch.from_numpy(np.random.RandomState([seed, stream]).randint(2 * LENGTH, size=n, dtype=np.int64))


def convert(source: str = "mnist", path=None, *, mnist_root=None, train_size: int | None = None,
            seed: int = SEED) -> Path:
    """Make the Möbius strip version of a set of digits and save it as npz.

    Args:
        source: a name in `SOURCES`.
        path: of the npz; None: the source's own, in ``data/``. It is replaced when the new one is complete.
        mnist_root: folder with MNIST's files; None: ``data/``, downloaded if they are not there.
        train_size: how many of the first training digits to take, None: 12,000 of MNIST's, all of the others.
        seed: of the shifts, 0 … 2**32 - 1.

    Returns:
        The npz's path.

    Raises:
        ValueError: for an argument that is not allowed, or digits that cannot be had.
        OSError: if the npz cannot be written.
    """
    if source not in list(SOURCES):
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    load, _, default_size, largest_size, _ = SOURCES[source]
    path = Path(path) if path is not None else SOURCES[source].path
    train_size = default_size if train_size is None else as_integer(train_size, "train_size")
    seed = as_integer(seed, "seed")
    if mnist_root is not None and not SOURCES[source].from_mnist:
        raise ValueError(f"mnist_root is for MNIST's digits, got {mnist_root!r} for {source}")
    if not 1 <= train_size <= largest_size:
        raise ValueError(f"train_size must be 1 … {largest_size} for {source}, got {train_size}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 … 2**32 - 1, got {seed}")

    train, test = load(mnist_root)
    arrays = {}
    for stream, (name, images, labels) in enumerate([
        ("train", train.images[:train_size], train.labels[:train_size]),
        ("test", test.images, test.labels),
    ]):
        shifts = draw_shifts(len(labels), seed, stream)
        arrays |= {
            f"{name}_data_shifted": isometry_action(images, shifts, SCALAR).numpy(),
            f"{name}_data_centered": images.numpy(),
            f"{name}_labels": labels.numpy(),
            f"{name}_shifts": shifts.numpy(),
        }
    with write_atomically(path) as file:
        np.savez_compressed(file, **arrays)
    return path


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--source", choices=SOURCES, default="mnist", help="which digits (%(default)s)")
    add("--mnist_root", metavar="FOLDER", help="folder with MNIST's four files; without it they are downloaded to data/")
    add("--train_size", type=int, metavar="N",
        help="first N training digits (12000 of mnist's 60000 or mnist_validation's 20000; all 1297 of digits)")
    add("--seed", type=int, default=SEED, metavar="N", help="of the shifts (%(default)s)")
    add("--out", metavar="FILE", help="the npz (" + ", ".join(f"data/{source.file}" for source in SOURCES.values()) + ")")
    return parser


def main(argv=None) -> None:
    parser = command_line()
    options = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        path = convert(options.source, options.out, mnist_root=options.mnist_root,
                       train_size=options.train_size, seed=options.seed)
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, seed {options.seed}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
