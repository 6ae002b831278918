"""The data files that convert_mnist.py makes."""

import gzip
import os
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import convert_mnist
import train
from tests.support import ROOT, FilesCase, imports


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's own format: magic number, shape, bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_fake_mnist(folder: Path) -> dict[str, np.ndarray]:
    """As many digits as MNIST has, each of a few random pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[np.arange(n), random.integers(28, size=n), random.integers(28, size=n)] = (
            random.integers(1, 256, size=n)
        )
        arrays |= {
            f"{split}-images-idx3-ubyte": images,
            f"{split}-labels-idx1-ubyte": random.integers(10, size=n),
        }
    for name, array in arrays.items():
        write_idx(folder / name, array)
    return arrays


class TestConvertMNIST(FilesCase):
    def convert(self, name="digits.npz", **options):
        path = convert_mnist.convert("digits", self.folder / name, **options)
        with np.load(path, allow_pickle=False) as npz:
            return dict(npz)

    def test_digits(self):
        data = self.convert()
        for split, n in (("train", 1297), ("test", 500)):
            for version in ("shifted", "centered"):
                images = data[f"{split}_data_{version}"]
                self.assertEqual((images.shape, images.dtype), ((n, 1, 28, 28), np.float32))
                self.assertTrue(images.min() >= 0 and 0.9 < images.max() <= 1)
            self.assertEqual(set(data[f"{split}_labels"].tolist()), set(range(10)))
            self.assertEqual(data[f"{split}_labels"].shape, (n,))
        # Compressed: MNIST's 44,000 images come to less than 12 MB instead of 138.
        with zipfile.ZipFile(self.folder / "digits.npz") as archive:
            self.assertEqual(
                {member.compress_type for member in archive.infolist()}, {zipfile.ZIP_DEFLATED}
            )
        box = data["train_data_centered"][:, :, 4:24, 4:24]
        self.assertEqual(box.sum(), data["train_data_centered"].sum())
        self.assertEqual(len(data), 8)

    def test_centered_digits_are_the_source(self):
        from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        data = self.convert()
        centered = torch.from_numpy(
            np.concatenate([data["train_data_centered"], data["test_data_centered"]])
        )
        # Bilinear upscaling keeps a digit's mean, near enough, and its coarse shape.
        coarse = (
            F.interpolate(centered[:, :, 4:24, 4:24], size=(8, 8), mode="area").flatten(1).double()
        )
        expected = torch.from_numpy(images) / 16
        correlation = torch.corrcoef(torch.cat([coarse.flatten()[None], expected.flatten()[None]]))[
            0, 1
        ]
        self.assertGreater(correlation, 0.95)
        self.assertTrue(
            np.array_equal(np.concatenate([data["train_labels"], data["test_labels"]]), labels)
        )

    def test_shifted_digits_follow_from_the_stored_shifts(self):
        data = self.convert()
        for split in ("train", "test"):
            shifts = data[f"{split}_shifts"]
            self.assertEqual((shifts.min(), shifts.max()), (0, 55))
            centered = data[f"{split}_data_centered"]
            cover = np.concatenate([centered, centered[:, :, ::-1]], axis=3)
            expected = np.stack(
                [np.roll(digit, t, axis=2)[:, :, :28] for digit, t in zip(cover, shifts)]
            )
            self.assertTrue(np.array_equal(data[f"{split}_data_shifted"], expected))
        counts = np.bincount(data["train_shifts"], minlength=56)
        chi_squared = ((counts - 1297 / 56) ** 2 / (1297 / 56)).sum()
        self.assertLess(chi_squared, 99)  # with 55 degrees of freedom: p = 0.0002

    def test_same_options_same_bytes(self):
        first = convert_mnist.convert("digits", self.folder / "a.npz", seed=3).read_bytes()
        self.assertEqual(
            first, convert_mnist.convert("digits", self.folder / "b.npz", seed=3).read_bytes()
        )
        a, b = self.convert(seed=3), self.convert(seed=4)
        self.assertFalse(np.array_equal(a["train_shifts"], b["train_shifts"]))
        self.assertTrue(np.array_equal(a["train_data_centered"], b["train_data_centered"]))

    def test_train_size(self):
        few, many = self.convert(train_size=10), self.convert()
        for key in few:
            expected = many[key][:10] if key.startswith("train") else many[key]
            self.assertTrue(np.array_equal(few[key], expected), key)
        for bad in (0, -1, 1298):
            with self.assertRaisesRegex(ValueError, f"1 … 1297 for digits, got {bad}"):
                self.convert(train_size=bad)

    def test_mnist_from_a_folder(self):
        arrays = write_fake_mnist(self.folder / "MNIST" / "raw")
        path = convert_mnist.convert(  # torchvision's root
            "mnist", self.folder / "mnist.npz", mnist_root=self.folder, train_size=50
        )
        # The files by themselves.
        splits = convert_mnist.load_mnist(self.folder / "MNIST" / "raw")
        with np.load(path, allow_pickle=False) as npz:
            for file, name, n, split in zip(("train", "t10k"), ("train", "test"), (50, 10_000),
                                            splits):
                images = arrays[f"{file}-images-idx3-ubyte"][:n, None] / np.float32(255)
                labels = arrays[f"{file}-labels-idx1-ubyte"][:n]
                self.assertTrue(np.array_equal(npz[f"{name}_data_centered"], images))
                self.assertTrue(np.array_equal(npz[f"{name}_labels"], labels))
                self.assertTrue(np.array_equal(split.images[:n], images))
                self.assertTrue(np.array_equal(split.labels[:n], labels))
        path = convert_mnist.convert(
            "mnist_validation", self.folder / "validation.npz", mnist_root=self.folder,
            train_size=50,
        )
        with np.load(path, allow_pickle=False) as npz:  # nothing of the test set
            for name, digits in (("train", slice(50)), ("test", slice(20_000, 30_000))):
                images = arrays["train-images-idx3-ubyte"][digits, None] / np.float32(255)
                self.assertTrue(np.array_equal(npz[f"{name}_data_centered"], images))
                self.assertTrue(
                    np.array_equal(npz[f"{name}_labels"], arrays["train-labels-idx1-ubyte"][digits])
                )
        for bad in (0, 60_001):
            self.assertFails(
                convert_mnist.main, "--train_size", bad,
                contains=["train_size", "1 … 60000", str(bad)],
            )
        self.assertFails(
            convert_mnist.main, "--source", "mnist_validation", "--train_size", 20_001,
            contains=["1 … 20000", "20001"],
        )

    def test_mnist_that_is_not_there(self):
        line = self.assertFails(
            convert_mnist.main, "--mnist_root", self.folder,
            contains=[str(self.folder), "--mnist_root"],
        )
        for name in convert_mnist.MNIST_FILES:
            self.assertIn(name, line)

    def test_mnist_that_is_something_else(self):
        write_fake_mnist(self.folder)
        images, labels = (self.folder / name for name in convert_mnist.MNIST_FILES[:2])
        whole = {path: path.read_bytes() for path in (images, labels)}
        small = self.folder / "small"
        write_idx(small, np.zeros((100, 28, 28)))
        high = self.folder / "high"
        write_idx(high, np.full(60_000, 10))
        for path, content in [
            (images, whole[images][:1_000_000]), (labels, whole[labels][:100]), (images, b""),
            (images, b"no digits" * 9), (images, small.read_bytes()), (labels, high.read_bytes()),
            (images, gzip.compress(b"digits")), (labels, whole[images]),
        ]:
            path.write_bytes(content)
            with self.subTest(path=path.name, content=content[:20]):
                self.assertFails(
                    convert_mnist.main, "--mnist_root", self.folder, "--out",
                    self.folder / "out.npz",
                    contains=[path.name, str(self.folder), "not MNIST's"],
                )
                self.assertFalse((self.folder / "out.npz").exists())
            path.write_bytes(whole[path])

    def test_no_network(self):
        def no_network(root, download):
            raise OSError("no network: port 443")

        torchvision = types.SimpleNamespace(MNIST=no_network)
        with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder), \
                imports(torchvision=torchvision, torchvision__datasets=torchvision):
            for main, arguments in (
                (convert_mnist.main, []), (train.main, ["--model", "mobius_regular"])
            ):
                self.assertFails(main, *arguments, contains=[
                    "could not download MNIST (no network)", "--mnist_root", "--dataset digits",
                    *convert_mnist.MNIST_FILES,
                ])
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_download(self):
        """What torchvision downloads is in place once complete, and not downloaded again."""
        calls = []

        def download(root, download):
            calls.append(root)
            write_fake_mnist(Path(root) / "MNIST" / "raw")

        torchvision = types.SimpleNamespace(MNIST=download)
        with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder), \
                imports(torchvision=torchvision, torchvision__datasets=torchvision):
            train_set, test_set = convert_mnist.load_mnist()
            self.assertEqual((len(train_set.labels), len(test_set.labels)), (60_000, 10_000))
            convert_mnist.load_mnist()
            self.assertEqual(len(calls), 1)
            # A file that went missing is fetched again, into a folder that holds the others.
            (self.folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
            convert_mnist.load_mnist()
        self.assertEqual(len(calls), 2)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["MNIST"])

    def test_without_torchvision(self):
        """Files that are there are read without it; a download names it, and the way out."""
        write_fake_mnist(self.folder / "mnist")

        class BuiltForAnotherTorch:  # as PyPI's torchvision beside a CPU build of torch
            @property
            def MNIST(self):
                raise RuntimeError("operator torchvision::nms does not exist")

        for module in (None, BuiltForAnotherTorch()):
            with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder / "data"), \
                    imports(torchvision=module, torchvision__datasets=module):
                train_set, _ = convert_mnist.load_mnist(self.folder / "mnist")
                self.assertEqual(len(train_set.labels), 60_000)
                self.assertFails(convert_mnist.main, contains=["torchvision", "--mnist_root"])
                convert_mnist.convert("digits", self.folder / "digits.npz")
        self.assertFalse((self.folder / "data").exists())

    def test_interrupted(self):
        path = convert_mnist.convert("digits", self.folder / "digits.npz")
        before = self.files()

        def half(file, **arrays):
            file.write(b"half an npz")
            raise KeyboardInterrupt

        with mock.patch("numpy.savez_compressed", half), self.assertRaises(KeyboardInterrupt):
            convert_mnist.convert("digits", path, seed=1)
        self.assertEqual(self.files(), before)  # and no temporary file is left
        with mock.patch("os.replace", side_effect=KeyboardInterrupt), self.assertRaises(
            KeyboardInterrupt
        ):
            convert_mnist.convert("digits", path, seed=1)
        self.assertEqual(self.files(), before)

    def test_killed(self):
        path = convert_mnist.convert("digits", self.folder / "digits.npz")
        before = path.read_bytes()
        process = subprocess.Popen(
            [
                sys.executable, ROOT / "convert_mnist.py", "--source", "digits", "--seed", "1",
                "--out", path,
            ]
        )
        while process.poll() is None and not list(self.folder.glob(".*.tmp")):
            time.sleep(0.01)
        process.kill()
        self.assertEqual(process.wait(), -signal.SIGKILL)  # it was writing
        self.assertEqual(path.read_bytes(), before)

    def test_unwritable(self):
        (self.folder / "file").write_text("")
        self.assertFails(
            convert_mnist.main, "--source", "digits", "--out", self.folder / "file" / "out.npz",
            contains=["cannot write", "out.npz"],
        )
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        for target in (fifo, self.folder):
            self.assertFails(convert_mnist.main, "--source", "digits", "--out", target,
                             contains=["cannot write", str(target), "not a file"])
        self.assertTrue(fifo.is_fifo())

    def test_a_link_stays_a_link(self):
        (self.folder / "link.npz").symlink_to(self.folder / "digits.npz")
        convert_mnist.convert("digits", self.folder / "link.npz", train_size=1)
        self.assertTrue((self.folder / "link.npz").is_symlink())
        self.assertTrue((self.folder / "digits.npz").is_file())

    def test_bad_options(self):
        self.assertFails(
            convert_mnist.main, "--source", "digits", "--mnist_root", self.folder,
            contains=["mnist_root", "digits"],
        )
        for bad in ({"train_size": 10.5}, {"seed": 1.5}, {"seed": 2**32}, {"source": ["digits"]}):
            (name,) = bad
            with self.assertRaisesRegex(ValueError, name):
                convert_mnist.convert(**{"source": "digits", "path": self.folder / "no.npz"} | bad)
        self.assertFails(
            convert_mnist.main, "--source", "cifar", contains=["cifar", "mnist", "digits"]
        )
        self.assertFails(
            convert_mnist.main, "--source", "digits", "--seed", "-1", contains=["seed", "-1"]
        )
        self.assertFails(
            convert_mnist.main, "--train_size", "many", contains=["--train_size", "many"]
        )
        self.assertFails(convert_mnist.main, "--trainsize", "3", contains="--trainsize")
