"""A new row in MODES and in MODELS works in every script."""

import json
from functools import partial
from unittest import mock

import benchmark
import reproduce
import train
import visualize
from models import MODELS, MODES, MobiusGaugeCNN
from tests.support import RunsCase

NAME = "mobius_pairs"


class TestNewModel(RunsCase):
    def setUp(self):
        super().setUp()
        row = partial(MobiusGaugeCNN, mode="pairs", kernel_size=1)
        for table, entry in ((MODES, {"pairs": (1, 0, 1)}), (MODELS, {NAME: row})):
            patch = mock.patch.dict(table, entry)
            patch.start()
            self.addCleanup(patch.stop)
        self.quick = ["--data", self.data, "--num_epochs", "1", "--batch_size", "4"]

    def test_train(self):
        self.main(train, "--model", NAME, *self.quick, "--log_dir", self.logs)
        (folder,) = self.logs.iterdir()
        self.assertTrue(list(folder.glob("pictures/events.*")))
        printed = self.main(train, "--eval_only", "--checkpoint", folder)
        self.assertIn(f"{NAME}, fixed pooling, trained for 1 epoch", printed)

    def test_reproduce_and_visualize(self):
        results = self.folder / "results"
        options = ["--models", NAME, "--runs", "1", "--results", results, *self.quick]
        self.assertIn(NAME, self.main(reproduce, *options))
        self.assertIn(NAME, self.main(reproduce, *options, "--table"))
        self.main(reproduce, *options, "--error_against_shift")
        self.main(
            visualize, "models", "error_against_shift", "--data", self.data,
            "--results", results, "--out", self.folder,
        )
        for name in ("models", "error_against_shift"):
            self.assertIn("pairs", (self.folder / f"{name}.svg").read_text(), name)

    def test_benchmark(self):
        out = self.folder / "benchmark.json"
        with mock.patch("benchmark.peak_memory", return_value=1.0):  # of another process
            self.main(
                benchmark, "--models", NAME, "--precision", "fp32", "--batch_size", "2",
                "--rounds", "2", "--device", "cpu", "--out", out,
            )
        self.assertEqual(json.loads(out.read_text())["rows"][1]["model"], NAME)
