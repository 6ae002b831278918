"""Möbius strip digits: npz -> checked tensors -> batches.

A data set fits into memory. Its digits live on the device as tensors, and a batch is an index.
"""

import hashlib
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch

from convert_mnist import SOURCES, Split, convert
from models import check_images

MOST_CLASSES = 10_000  # a larger label is a mistake
KEYS = tuple(
    f"{split}_{array}"
    for split in ("train", "test") for array in ("data_shifted", "data_centered", "labels")
)


class Data(NamedTuple):
    """file: name of the npz. sha256: of its bytes. splits: as `load_dataset` returns them."""

    file: str
    sha256: str
    splits: dict[str, Split]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, width and length of an image."""
        return tuple(self.splits["train_centered"].images.shape[1:])

    @property
    def classes(self) -> int:
        return 1 + max(int(split.labels.max()) for split in self.splits.values())


def find_data(config, device: torch.device) -> Data:
    """Load a run's data; if the npz of a data set is missing, make it first.

    Args:
        config: the `Config` of the run; its dataset, data and mnist_root are used.
        device: where the tensors shall live.

    Raises:
        ValueError, OSError: with a way out, for an npz that cannot be read or made.
    """
    if config.data is not None:
        path = Path(config.data)
        way_out = "--data takes an npz with the arrays of data/README.md"
    else:
        path = SOURCES[config.dataset].path
        way_out = "delete it, and it is made anew"
        if not path.exists():
            print(f"making {path}", flush=True)
            convert(config.dataset, path, mnist_root=config.mnist_root)
        elif config.mnist_root is not None:
            print(f"{path} is there already: --mnist_root is not read", flush=True)
    try:
        splits = load_dataset(path, device)
        check_images(splits["train_centered"].images, config.pooling)
        return Data(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), splits)
    except (ValueError, OSError) as error:
        raise type(error)(f"{error}; {way_out}") from error


def load_dataset(path, device="cpu") -> dict[str, Split]:
    """Read and check an npz with the arrays of data/README.md.

    Images may have any float type, labels any type of real numbers; the shifts may be missing.

    Args:
        path: of the npz.
        device: where the tensors shall live.

    Returns:
        ``train_shifted``, ``train_centered``, ``test_shifted`` and ``test_centered``: images
        float32 ``(n, C, W, L)`` in [0, 1] with labels int64 ``(n,)`` from 0 on.

    Raises:
        ValueError: naming the file and the fault, if it is not such a file.
        OSError: if it does not exist or cannot be read.
    """
    arrays = _read_arrays(path)

    def require(holds: bool, key: str, fault: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {key} has {fault}")

    dataset, shape = {}, None
    for split in ("train", "test"):
        key = f"{split}_labels"
        labels = arrays[key]
        one_dimension = labels.ndim == 1 and len(labels) > 0
        require(one_dimension, key, f"shape {labels.shape}, not (n,) with n >= 1")
        require(labels.dtype.kind in "iuf", key, f"dtype {labels.dtype}, not a number's")
        are_classes = np.isin(labels, np.arange(MOST_CLASSES)).all()
        require(are_classes, key, f"labels that are not integers of 0 … {MOST_CLASSES - 1}")
        labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        for version in ("shifted", "centered"):
            key = f"{split}_data_{version}"
            images = arrays[key]
            is_strip = images.ndim == 4 and 0 not in images.shape
            require(is_strip, key, f"shape {images.shape}, not (n, C, W, L)")
            require(len(images) == len(labels), f"{split}_labels",
                    f"{len(labels)} labels, and {key} has {len(images)} images")
            shape = shape or images.shape[1:]
            fits = images.shape[1:] == shape
            require(fits, key, f"images of shape {images.shape[1:]}, others have {shape}")
            is_float = np.issubdtype(images.dtype, np.floating)
            require(is_float, key, f"dtype {images.dtype}, not a floating point one")
            require(not np.isnan(images).any(), key, "nan among its values")
            require(images.min() >= 0 and images.max() <= 1, key, "values outside [0, 1]")
            images = torch.from_numpy(images.astype(np.float32, copy=False)).to(device)
            dataset[f"{split}_{version}"] = Split(images, labels)
    return dataset


def _read_arrays(path) -> dict[str, np.ndarray]:
    try:
        # np.load would take a file that is no zip archive for a pickle.
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as npz:
            missing = [key for key in KEYS if key not in npz.files]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            return {key: np.asarray(npz[key]) for key in KEYS}
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib, tokenize and NumPy raise errors of many kinds
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is not a complete npz of Möbius strip digits: {reason}"
        ) from error


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[Split]:
    """The digits of a split in batches. Their order is drawn at once.

    Args:
        split: images and labels, both on the same device.
        batch_size: at least 1.
        generator: on the CPU. Given, batches come in a random order and all have `batch_size`
            digits (the rest is dropped), as for training. None: all digits in order, as for
            evaluation.
    """
    n, device = len(split.labels), split.labels.device
    if generator is None:
        return map(Split._make, zip(*(tensor.split(batch_size) for tensor in split)))
    # Drawn on the CPU, the order is the same for every device; one copy per epoch transfers it.
    order = torch.randperm(n, generator=generator).to(device)
    indices = order[:n - n % batch_size].split(batch_size)
    return (Split(split.images[index], split.labels[index]) for index in indices)
