"""Other people's experiments: their images, weights to begin with, optimizers."""

import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import train
from fields import isometry_action
from models import build_model
from tests.support import RunsCase
from training import optimization
from training.data import load_dataset

WIDTH, LENGTH, CHANNELS, CLASSES = 6, 8, 3, 4


class OwnDataCase(RunsCase):
    def setUp(self):
        super().setUp()
        self.data = self.write("strips.npz")

    def write(self, name: str, length: int = LENGTH, channels: int = CHANNELS, seed: int = 0):
        """Images that are no digits."""
        generator = torch.Generator().manual_seed(seed)
        arrays = {}
        for split, n in (("train", 8), ("test", 8)):
            images = torch.rand(n, channels, WIDTH, length, generator=generator)
            shifts = torch.arange(n)
            shifted = isometry_action(images, shifts, (channels, 0, 0))
            arrays[f"{split}_data_centered"] = images.numpy()
            arrays[f"{split}_data_shifted"] = shifted.numpy()
            arrays[f"{split}_labels"] = np.arange(n) % CLASSES
        path = self.folder / name
        np.savez(path, **arrays)
        return path

    def evaluate(self, folder, *arguments) -> str:
        return self.main(train, "--eval_only", "--checkpoint", folder, *arguments)


class TestOwnImages(OwnDataCase):
    def test_train_and_test(self):
        """Channels, size and classes are those of the arrays; also with augmentation."""
        for options in ({}, {"pooling": "polyphase", "deformation": 0.5, "stroke_width": 0.2}):
            folder = self.finish(self.config(model="mobius_scalar", **options))
            weights = torch.load(folder / "weights.pt", weights_only=True)
            self.assertEqual(weights["mobius_cnn.0.weights_triv2triv"].shape[1], CHANNELS)
            self.assertEqual(weights["classifier.7.bias"].shape, (CLASSES,))
            result = json.loads((folder / "result.json").read_text())
            self.assertEqual(result["data"]["shape"], [CHANNELS, WIDTH, LENGTH])
            for source in (folder, folder / "weights.pt"):
                printed = self.evaluate(source, "--data", self.data)
                for version in ("shifted", "centered"):
                    error = result["test_error"][version]
                    self.assertIn(f"test error on 8 {version} digits: {error:.2f} %", printed)

    def test_sizes_that_polyphase_pooling_cannot_take(self):
        path = self.write("odd.npz", length=6)
        arguments = "--model", "mobius_scalar", "--data", path, "--log_dir", self.logs
        self.assertFails(
            train.main, *arguments, "--pooling", "polyphase",
            contains=["multiple of 4", "data/README.md"],
        )
        self.assertFalse(self.logs.exists())

    def test_other_data_than_in_training(self):
        folder = self.finish(self.config(model="mobius_scalar", num_epochs=1))
        self.assertNotIn("other data", self.evaluate(folder))
        other = self.write("other.npz", seed=1)
        printed = self.evaluate(folder, "--data", other)
        self.assertIn("trained for 1 epoch on centered digits of strips.npz", printed)
        self.assertIn("tested on other data than it was trained on: other.npz", printed)
        self.assertFails(
            train.main, "--eval_only", "--checkpoint", folder, "--data",
            self.write("grey.npz", channels=1), contains="expected 3 channels",
        )
        self.assertFails(
            train.main, "--resume", folder, "--data", other,
            contains=["a run on other data: strips.npz (SHA-256", "not other.npz (SHA-256"],
        )

    def test_other_pooling_than_in_training(self):
        folder = self.finish(self.config(model="mobius_scalar", num_epochs=1))
        printed = self.evaluate(folder, "--pooling", "polyphase")
        self.assertIn("mobius_scalar, polyphase pooling, trained for 1 epoch", printed)
        self.assertIn("with pooling fixed", printed)

    def test_every_shift(self):
        folder = self.finish(self.config(model="cnn_same_params", num_epochs=1))
        picture = self.folder / "curve.png"
        printed = self.evaluate(folder, "--every_shift", "--out", picture)
        shown = {
            int(shift): float(error)
            for shift, error in re.findall(r"^ *(\d+)   ([\d.]+)$", printed, re.M)
        }
        self.assertEqual(list(shown), list(range(2 * LENGTH)))
        model = build_model("cnn_same_params", ch_in=CHANNELS, classes=CLASSES)
        model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        images, labels = load_dataset(self.data)["test_centered"]
        first = train.predict(model, images)
        changed = 0
        for shift, error in shown.items():
            predictions = train.predict(model, isometry_action(images, shift, (CHANNELS, 0, 0)))
            self.assertEqual(error, 100 * (predictions != labels).double().mean().item())
            changed += int((predictions != first).sum())
        self.assertIn(f"{changed} of 128 predictions", printed)
        self.assertTrue(picture.read_bytes().startswith(b"\x89PNG"))
        for arguments in (["--every_shift"], ["--eval_only", "--out", picture]):
            self.assertFails(train.main, *arguments, contains="--every_shift")


class TestInit(OwnDataCase):
    def test_begins_with_the_weights_of_another_run(self):
        options = {"model": "mobius_scalar", "num_epochs": 1}
        first = self.finish(self.config(**options))
        weights = torch.load(first / "weights.pt", weights_only=True)
        for source in (first, first / "weights.pt", first / "checkpoint.pt"):
            run = train.Run(self.config(init=str(source), **options), verbose=False)
            run.close()
            for name, value in run.model.state_dict().items():
                self.assertTrue(torch.equal(value, weights[name]), name)
            self.assertEqual((run.epoch, run.optimizer.state_dict()["state"]), (0, {}))
        self.assertEqual(run.result["config"]["init"], str(first / "checkpoint.pt"))

    def test_goes_on_without_the_file(self):
        source = self.finish(self.config(model="mobius_scalar", num_epochs=1)) / "weights.pt"
        config = self.config(model="mobius_scalar", init=str(source))
        uninterrupted = self.finish(config)
        stopped = self.finish(config, stop_after=1)
        source.unlink()
        self.main(train, "--resume", stopped)
        self.assertSameRun(stopped, uninterrupted)

    def test_weights_that_do_not_fit(self):
        folder = self.finish(self.config(model="mobius_scalar", num_epochs=1))
        before = set(self.logs.iterdir())
        for options, message in [
            (["--model", "mobius_regular"], "holds a mobius_scalar"),
            (["--model", "mobius_scalar", "--data", self.write("grey.npz", channels=1)],
             "these channels and classes"),
        ]:
            self.assertFails(
                train.main, "--data", self.data, "--log_dir", self.logs, "--batch_size", "4",
                "--no-tensorboard", "--init", folder, *options, contains=[str(folder), message],
            )
        self.assertEqual(set(self.logs.iterdir()), before)


class TestOtherOptimizers(OwnDataCase):
    """One entry in OPTIMIZERS, and a run with it can be stopped and continued."""

    ENTRIES = {
        "sgd": lambda model, lr, weight_decay: torch.optim.SGD(
            model.parameters(), lr=lr, weight_decay=weight_decay, momentum=0.9
        ),
        "rprop": lambda model, lr, weight_decay: torch.optim.Rprop(model.parameters(), lr=lr),
        "adafactor": lambda model, lr, weight_decay: torch.optim.Adafactor(
            model.parameters(), lr=lr, weight_decay=weight_decay
        ),
    }

    def setUp(self):
        super().setUp()
        entries = mock.patch.dict(optimization.OPTIMIZERS, self.ENTRIES)
        entries.start()
        self.addCleanup(entries.stop)

    def test_goes_on(self):
        for optimizer in self.ENTRIES:
            with self.subTest(optimizer):
                config = self.config(model="mobius_scalar", optimizer=optimizer)
                stopped = self.finish(config, stop_after=1)
                self.main(train, "--resume", stopped)
                self.assertSameRun(stopped, self.finish(config))

    def test_a_state_that_does_not_fit(self):
        folder = self.finish(self.config(model="mobius_scalar", optimizer="sgd"), stop_after=1)
        path = Path(folder, "checkpoint.pt")
        sound = path.read_bytes()
        for change in (
            lambda state: state[0].update(momentum_buffer=torch.zeros(1, 2)),
            lambda state: state[0].update(exp_avg=state[0].pop("momentum_buffer")),
            lambda state: state.update({99: state.pop(0)}),
        ):
            checkpoint = torch.load(path, weights_only=True)
            change(checkpoint["optimizer"]["state"])
            torch.save(checkpoint, path)
            message = self.assertFails(
                train.main, "--resume", folder, contains=[str(path), "the optimizer's state"]
            )
            self.assertNotIn("delete", message)
            path.write_bytes(sound)
