"""Möbius strip digits: npz -> checked tensors -> batches.

The digits of a data set fit into any memory: they live on the device as tensors, and a batch is an index.
"""

from typing import Iterator

import numpy as np
import torch

from convert_mnist import LENGTH, WIDTH, Split

CLASSES = 10
KEYS = tuple(f"{split}_{array}" for split in ("train", "test") for array in ("data_shifted", "data_centered", "labels"))


def _read_arrays(path) -> dict[str, np.ndarray]:
    try:
        # Not np.load, which takes whatever is no zip archive for a pickle.
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as npz:
            missing = [key for key in KEYS if key not in npz.files]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            return {key: np.asarray(npz[key]) for key in KEYS}
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive can fail in any part of zipfile, zlib, tokenize and NumPy
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a complete npz of Möbius strip digits: {reason}") from error


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
    arrays = _read_arrays(path)

    def require(holds: bool, key: str, fault: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {key} has {fault}")

    dataset = {}
    for split in ("train", "test"):
        key = f"{split}_labels"
        labels = arrays[key]
        require(labels.ndim == 1 and len(labels) > 0, key, f"shape {labels.shape}, not (n,) with n >= 1")
        require(labels.dtype.kind in "iuf", key, f"dtype {labels.dtype}, not a number's")
        require(np.isin(labels, np.arange(CLASSES)).all(), key, f"labels outside 0 … {CLASSES - 1}")
        labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        for version in ("shifted", "centered"):
            key = f"{split}_data_{version}"
            images = arrays[key]
            shape = (len(labels), 1, WIDTH, LENGTH)
            require(images.shape == shape, key, f"shape {images.shape}, not {shape}")
            require(np.issubdtype(images.dtype, np.floating), key, f"dtype {images.dtype}, not a floating point one")
            # Also refuses nan.
            require(images.min() >= 0 and images.max() <= 1, key, "values outside [0, 1]")
            images = torch.from_numpy(images.astype(np.float32, copy=False)).to(device)
            dataset[f"{split}_{version}"] = Split(images, labels)
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
