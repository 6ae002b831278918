"""Möbius strip digits: npz -> checked tensors -> batches.

The 35 MB of a set of digits fit into any memory: they live on the device as tensors, and a batch is an index.
"""

import zipfile
import zlib
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from convert_mnist import LENGTH, WIDTH, Split

CLASSES = 10


def _checked_images(images: np.ndarray) -> Tensor:
    if images.ndim != 4 or images.shape[1:] != (1, WIDTH, LENGTH) or not len(images):
        raise ValueError(f"has shape {images.shape}, not (n, 1, {WIDTH}, {LENGTH})")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"has dtype {images.dtype}, not a floating point one")
    if not (images.min() >= 0 and images.max() <= 1):  # so written, nan is refused too
        raise ValueError("has values outside [0, 1]")
    return torch.from_numpy(images.astype(np.float32, copy=False))


def _checked_labels(labels: np.ndarray, n: int) -> Tensor:
    if labels.shape != (n,):
        raise ValueError(f"has shape {labels.shape}, not ({n},) as the images")
    if not np.issubdtype(labels.dtype, np.number) or not np.isin(labels, np.arange(CLASSES)).all():
        raise ValueError(f"has labels outside 0 … {CLASSES - 1}")
    return torch.from_numpy(labels.astype(np.int64))


def load_dataset(path, device="cpu") -> dict[str, Split]:
    """Read and check an npz as `convert_mnist.py` writes it, or in any float type, with or without the shifts.

    Args:
        path: of the npz.
        device: where the tensors shall live.

    Returns:
        ``train_shifted``, ``train_centered``, ``test_shifted`` and ``test_centered``: images float32
        ``(n, 1, 28, 28)`` in [0, 1] with labels int64 ``(n,)`` in 0 … 9.

    Raises:
        ValueError: naming the file and the fault, if it is not such a file.
        OSError: if it is not there or cannot be read.
    """
    key = None
    try:
        with open(path, "rb") as file:  # np.load would take an .npy or a pickle for granted
            npz = np.lib.npyio.NpzFile(file, allow_pickle=False)
            dataset = {}
            for split in ("train", "test"):
                labels = None
                for version in ("shifted", "centered"):
                    key = f"{split}_data_{version}"
                    images = _checked_images(npz[key])
                    key = f"{split}_labels"
                    if labels is None:
                        labels = npz[key]
                    dataset[f"{split}_{version}"] = Split(
                        images.to(device), _checked_labels(labels, len(images)).to(device)
                    )
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except KeyError as error:
        raise ValueError(f"{path} has no {key}; python convert_mnist.py makes a complete file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is truncated or no npz file ({error}); python convert_mnist.py makes it anew") from error
    except ValueError as error:
        raise ValueError(f"{path}: {key} {error}; python convert_mnist.py makes it anew") from error
    return dataset


def batches(split: Split, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Split]:
    """The digits of a split in batches.

    Args:
        split: images and labels, both on the same device.
        batch_size: at least 1.
        generator: on the CPU. With it, batches of exactly `batch_size` in a random order, what is left over
            at the end dropped, as for training; without, everything in order, as for evaluation.
    """
    n, device = len(split.labels), split.labels.device
    if generator is None:
        for start in range(0, n, batch_size):
            yield Split(split.images[start:start + batch_size], split.labels[start:start + batch_size])
        return
    # Drawn on the CPU, the order is the same on every device; sent in one piece, it costs one copy an epoch.
    order = torch.randperm(n, generator=generator).to(device)
    for index in order[:n - n % batch_size].split(batch_size):
        yield Split(split.images[index], split.labels[index])
