"""Digits on the Möbius strip: source digits -> data/mobius_*.npz.

    python convert_mnist.py                         # MNIST, downloaded  -> data/mobius_MNIST.npz
    python convert_mnist.py --mnist_root FOLDER     # MNIST from a folder that has its four files
    python convert_mnist.py --source digits         # scikit-learn's bundled digits, no network
                                                    #                    -> data/mobius_digits.npz
    python convert_mnist.py --source mnist_validation   # training digits in place of the test set
                                                        #     -> data/mobius_MNIST_validation.npz

A digit is a scalar field on a strip of 28 x 28 pixels with values in [0, 1]. Every digit is stored
*centered*, as it is, and *shifted* by an isometry drawn once, uniformly from all 2L = 56 of them.

The file holds, for train and test: ``{train,test}_data_centered`` and
``{train,test}_data_shifted``, float32 of shape ``(n, 1, 28, 28)``; ``{train,test}_labels`` and
``{train,test}_shifts``, int64 of shape ``(n,)``. The same options give the same file, byte for
byte, with the same NumPy and zlib. The shifts and the MNIST images are the same with any version.

Source: arXiv:2106.06020, Section 5.
"""

import contextlib
import io
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fields import as_integer, isometry_action
from training.files import CommandLine, write_atomically

WIDTH = LENGTH = 28
SCALAR = (1, 0, 0)
DATA_FOLDER = Path(__file__).resolve().parent / "data"
MNIST_FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)


class Split(NamedTuple):
    """images: float32 ``(n, 1, 28, 28)`` in [0, 1]. labels: int64 ``(n,)`` in 0 … 9."""

    images: Tensor
    labels: Tensor


# --------------------------------------------------------------------------------------------------
# Sources


def _has_mnist(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MNIST_FILES)


def _download_mnist(root: Path) -> None:
    """Download MNIST's files to ``root/MNIST/raw``, where they appear once all are complete."""
    way_out = (
        f"give --mnist_root a folder with {', '.join(MNIST_FILES)}, or take scikit-learn's digits, "
        "which need no network (train.py --dataset digits, convert_mnist.py --source digits)"
    )
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise ValueError(
            f"MNIST is downloaded with torchvision, which cannot be imported ({error}): {way_out}"
        ) from error
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
        try:
            socket.setdefaulttimeout(30)  # a silent network should not hang the command for minutes
            with contextlib.redirect_stdout(io.StringIO()):  # "Failed to download (trying next)"
                MNIST(temporary, download=True)
        except Exception as error:  # whatever a network can do
            reason = str(error).split(":")[0]
            raise ValueError(f"could not download MNIST ({reason}): {way_out}") from error
        finally:
            socket.setdefaulttimeout(timeout)
        folder = root / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for name in MNIST_FILES:
            os.replace(Path(temporary) / "MNIST" / "raw" / name, folder / name)


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes in one of MNIST's files, in IDX format. Raises ValueError for another shape."""
    content = path.read_bytes()
    header = np.array([0x0800 + len(shape), *shape], ">i4").tobytes()  # magic number, then sizes
    if content[:len(header)] != header or len(content) != len(header) + np.prod(shape):
        raise ValueError(f"{path} is truncated or not MNIST's: get it anew")
    values = np.frombuffer(content, np.uint8, offset=len(header))
    return torch.from_numpy(values.reshape(shape).copy())


def load_mnist(root=None) -> tuple[Split, Split]:
    """MNIST's 60,000 training and 10,000 test digits.

    Args:
        root: folder with MNIST's four files, uncompressed, in it or in ``root/MNIST/raw``, where
            torchvision puts them. None: ``data/``; missing files are downloaded.

    Raises:
        ValueError: if a file is missing, truncated or something else, or could not be downloaded.
    """
    if root is None:
        folder = DATA_FOLDER / "MNIST" / "raw"
        if not _has_mnist(folder):
            _download_mnist(DATA_FOLDER)
    else:
        folder = next(filter(_has_mnist, [Path(root) / "MNIST" / "raw", Path(root)]), None)
        if folder is None:
            raise ValueError(
                f"--mnist_root {root} does not have MNIST's four files {', '.join(MNIST_FILES)} "
                "(uncompressed), neither in MNIST/raw nor by themselves"
            )
    splits = []
    for names, n in ((MNIST_FILES[:2], 60_000), (MNIST_FILES[2:], 10_000)):
        images = _read_idx(folder / names[0], (n, WIDTH, LENGTH))
        labels = _read_idx(folder / names[1], (n,))
        if labels.max() > 9:
            raise ValueError(f"{folder / names[1]} is not MNIST's: it has labels outside 0 … 9")
        splits.append(Split(images[:, None].float() / 255, labels.long()))
    return tuple(splits)


def load_digits() -> tuple[Split, Split]:
    """scikit-learn's bundled handwritten digits: 1,297 for training and 500 for the test.

    The 8 x 8 images are scaled to the 20 x 20 box in the middle of 28 x 28 that MNIST's digits
    fill. The test digits are the last ones of the file.

    Source: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits* (UCI, 1998), its
    test half.
    """
    from sklearn.datasets import load_digits as bundled_digits

    images, labels = bundled_digits(return_X_y=True)
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    images = F.pad(images, (4, 4, 4, 4)).clamp(0, 1)
    labels = torch.from_numpy(labels).long()
    return Split(images[:-500], labels[:-500]), Split(images[-500:], labels[-500:])


def load_validation(root=None) -> tuple[Split, Split]:
    """30,000 of MNIST's training digits, 10,000 of them as test set: for choosing settings."""
    (images, labels), _ = load_mnist(root)
    validation = slice(20_000, 30_000)
    return Split(images[:20_000], labels[:20_000]), Split(images[validation], labels[validation])


class Source(NamedTuple):
    """Digits that `convert` takes.

    load: returns training and test digits; of MNIST, from the folder that is its argument.
    file: name of the npz.
    train_size, largest_train_size: number of training digits by default, and at most.
    from_mnist: whether the digits are MNIST's.
    """

    load: Callable[..., tuple[Split, Split]]
    file: str
    train_size: int
    largest_train_size: int
    from_mnist: bool = True

    @property
    def path(self) -> Path:
        """Default path of the npz."""
        return DATA_FOLDER / self.file


SOURCES = {
    # As many training digits as rotated MNIST has.
    "mnist": Source(load_mnist, "mobius_MNIST.npz", 12_000, 60_000),
    "mnist_validation": Source(load_validation, "mobius_MNIST_validation.npz", 12_000, 20_000),
    "digits": Source(lambda root: load_digits(), "mobius_digits.npz", 1_297, 1_297, False),
}


# --------------------------------------------------------------------------------------------------
# Conversion


def draw_shifts(n: int, seed: int, stream: int) -> Tensor:
    """`n` shifts, uniform on 0 … 2L - 1. The first of them do not depend on `n`."""
    # RandomState: the one generator whose numbers NumPy promises never to change.
    shifts = np.random.RandomState([seed, stream]).randint(2 * LENGTH, size=n, dtype=np.int64)
    return torch.from_numpy(shifts)


def convert(source: str = "mnist", path=None, *, mnist_root=None, train_size: int | None = None,
            seed: int = 0) -> Path:
    """Make the Möbius strip version of a set of digits and save it as npz.

    Args:
        source: a name in `SOURCES`.
        path: of the npz; None: the source's own, in ``data/``. A file there is replaced when the
            new one is complete.
        mnist_root: folder with MNIST's files; None: ``data/``, to which they are downloaded.
        train_size: number of training digits, the first ones; None: the source's own.
        seed: of the shifts, 0 … 2**32 - 1.

    Returns:
        The npz's path.

    Raises:
        ValueError: for an argument that is not allowed, or digits that cannot be had.
        OSError: if the npz cannot be written.
    """
    if source not in list(SOURCES):
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    load, _, default_size, largest_size, from_mnist = SOURCES[source]
    path = Path(path) if path is not None else SOURCES[source].path
    train_size = default_size if train_size is None else as_integer(train_size, "train_size")
    seed = as_integer(seed, "seed")
    if mnist_root is not None and not from_mnist:
        raise ValueError(f"mnist_root is for MNIST's digits, got {mnist_root!r} for {source}")
    if not 1 <= train_size <= largest_size:
        raise ValueError(f"train_size must be 1 … {largest_size} for {source}, got {train_size}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 … 2**32 - 1, got {seed}")

    train, test = load(mnist_root)
    train = Split(train.images[:train_size], train.labels[:train_size])
    arrays = {}
    for stream, (name, (images, labels)) in enumerate([("train", train), ("test", test)]):
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
    sizes = "; ".join(
        f"{name}: {source.train_size} of {source.largest_train_size}"
        for name, source in SOURCES.items()
    )
    paths = ", ".join(f"data/{source.file}" for source in SOURCES.values())
    parser.option("source", "which digits", "mnist", choices=SOURCES)
    parser.option(
        "mnist_root", "folder with MNIST's four files; without it they are downloaded to data/",
        metavar="FOLDER",
    )
    parser.option("train_size", f"first N training digits ({sizes})", type=int, metavar="N")
    parser.option("seed", "of the shifts", 0, type=int, metavar="N")
    parser.option("out", f"the npz ({paths})", metavar="FILE")
    return parser


def main(argv=None) -> None:
    parser = command_line()
    options = vars(parser.parse_args(argv))
    start = time.perf_counter()
    try:
        path = convert(path=options.pop("out", None), **options)
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    megabytes, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
    print(f"{path}: {megabytes:.1f} MB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
