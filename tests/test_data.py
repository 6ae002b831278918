"""Data files that are read, checked and cut into batches, by data.py."""

import os
import zipfile

import numpy as np
import torch

import convert_mnist
import train
from tests.support import FilesCase, write_npz
from training import data


class TestDataLoader(FilesCase):
    def test_load_dataset(self):
        path = write_npz(self.folder / "digits.npz")
        with np.load(path) as npz:
            for name, split in data.load_dataset(path).items():
                kind, version = name.split("_")
                self.assertTrue(np.array_equal(split.images, npz[f"{kind}_data_{version}"]))
                self.assertTrue(np.array_equal(split.labels, npz[f"{kind}_labels"]))
                self.assertEqual(
                    (split.images.dtype, split.labels.dtype), (torch.float32, torch.int64)
                )

    def test_published_layout(self):
        """float64, labels of any number type, no shifts."""
        path = write_npz(self.folder / "digits.npz")
        changes = {"train_shifts": None, "test_shifts": None}
        for key, array in write_npz.arrays.items():
            n = 64 if key.startswith("train") else 32
            if not key.endswith("shifts"):
                changes[key] = array[:n].astype(np.float64)
        published = write_npz(self.folder / "published.npz", **changes)
        ours, loaded = data.load_dataset(path), data.load_dataset(published)
        for name in ours:
            self.assertTrue(torch.equal(ours[name].images, loaded[name].images))
            self.assertTrue(torch.equal(ours[name].labels, loaded[name].labels))

    def test_bad_files(self):
        good = write_npz(self.folder / "good.npz")
        with np.load(good) as npz:
            images, labels = npz["train_data_shifted"].copy(), npz["test_labels"].copy()
        images[3, 0, 5, 5] = 1.5
        negative, missing = -images, np.where(images > 1, np.nan, images)
        labels[7] = 10
        path = self.folder / "bad.npz"
        content = good.read_bytes()

        def run():
            return self.assertFails(
                train.main, "--model", "mobius_regular", "--data", path, "--log_dir",
                self.folder / "logs",
                contains=[str(path), "--data takes an npz with the arrays of data/README.md"],
            )

        self.assertIn("No such file", run())
        for raw in (
            b"", b"text", content[: len(content) // 2], content[:-10],
            content[:5000] + bytes(100) + content[5100:],
        ):
            path.write_bytes(raw)
            with self.subTest(len(raw)):
                self.assertIn("not a complete npz", run())
        for key in data.KEYS:
            write_npz(path, **{key: None})
            self.assertIn(f"no {key}", run())
        for change, message in [
            ({"train_data_shifted": images}, "train_data_shifted has values outside [0, 1]"),
            ({"train_data_shifted": negative}, "train_data_shifted has values outside [0, 1]"),
            ({"train_data_shifted": missing}, "train_data_shifted has nan among its values"),
            ({"train_data_centered": images[:, 0]}, "train_data_centered has shape"),
            (
                {"test_data_centered": np.zeros((32, 1, 32, 32), np.float32)},
                "test_data_centered has images of shape (1, 32, 32), others have (1, 28, 28)",
            ),
            (
                {"test_data_centered": np.zeros((31, 1, 28, 28), np.float32)},
                "test_labels has 32 labels, and test_data_centered has 31 images",
            ),
            (
                {"test_data_centered": np.zeros((32, 1, 28, 28), np.uint8)},
                "test_data_centered has dtype",
            ),
            ({"test_labels": labels + 10_000}, "test_labels has labels that are not"),
            ({"test_labels": labels - 11}, "test_labels has labels that are not"),
            ({"test_labels": labels + 0.5}, "test_labels has labels that are not"),
            ({"test_labels": labels[:, None]}, "test_labels has shape"),
            ({"test_labels": labels + 0j}, "test_labels has dtype complex128"),
            ({"test_labels": labels.astype("m8[s]")}, "test_labels has dtype timedelta64"),
            ({"test_labels": np.zeros(32, [("a", int)])}, "test_labels has dtype"),
            ({"train_labels": np.array([{}] * 64)}, "allow_pickle"),
        ]:
            write_npz(path, **change)
            with self.subTest(message):
                self.assertIn(message, run())
        with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as damaged:
            for member in archive.namelist():  # a header that is not even Python
                content = archive.read(member)
                damaged.writestr(
                    member,
                    (
                        content.replace(b"{'descr'", b"{'descr\\\\")
                        if member == "test_labels.npy"
                        else content
                    ),
                )
        run()
        np.save(self.folder / "array.npy", images)
        os.replace(self.folder / "array.npy", path)
        run()
        path.unlink()
        path.mkdir()
        run()
        self.assertFalse((self.folder / "logs").exists())

    def test_batches(self):
        split = convert_mnist.Split(torch.arange(10).float().reshape(10, 1, 1, 1), torch.arange(10))
        in_order = list(data.batches(split, 4))
        self.assertEqual(
            [batch.labels.tolist() for batch in in_order], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        )
        generator = torch.Generator().manual_seed(0)
        epochs = [
            [batch.labels.tolist() for batch in data.batches(split, 4, generator)] for _ in range(2)
        ]
        self.assertNotEqual(epochs[0], epochs[1])
        for epoch in epochs:
            # The last, smaller batch is dropped.
            self.assertEqual([len(batch) for batch in epoch], [4, 4])
            self.assertEqual(len(set(sum(epoch, []))), 8)
        for batch in data.batches(split, 4, generator):
            self.assertTrue(torch.equal(batch.images.flatten().long(), batch.labels))
