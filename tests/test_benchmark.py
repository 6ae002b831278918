"""What benchmark.py measures and writes."""

import contextlib
import functools
import io
import json
from unittest import mock

import torch
import torch.nn as nn

import benchmark
from models import MODELS, build_model
from polyphase import PolyphasePool
from tests.support import SMALL_MODELS, FilesCase


class TestBenchmark(FilesCase):
    def setUp(self):
        super().setUp()
        # Small matrices: where bfloat16 has no instructions, large ones take minutes.
        rate = functools.partial(benchmark.matmul_rate, size=256)
        patch = mock.patch("benchmark.matmul_rate", rate)
        patch.start()
        self.addCleanup(patch.stop)

    def run_main(self, *arguments):
        kept, printed = mock.patch("benchmark.keep_freed_memory"), io.StringIO()
        with kept, mock.patch.dict(MODELS, SMALL_MODELS), contextlib.redirect_stdout(printed):
            benchmark.main([str(argument) for argument in arguments])
        return printed.getvalue()

    def test_figures(self):
        out = self.folder / "new" / "benchmark.json"
        options = (
            "--models", "mobius_regular", "--precision", "bf16", "--batch_size", 4, "--rounds", 2,
            "--device", "cpu", "--out", out,
        )
        measure = benchmark.peak_memory

        def once(name, *arguments):  # each is a process of its own
            if name == benchmark.TEXTBOOK:
                return measure(name, *arguments)
            return None if arguments[-1] else 100.0  # compiled

        with (
            mock.patch("benchmark.keep_freed_memory"), mock.patch("benchmark.peak_memory", once),
            mock.patch("benchmark.launches", return_value={"mobius_regular": {"fixed": 247}}),
            mock.patch("torch.compile", lambda function, **_: function),
        ):
            printed = self.run_main(*options, "--compile")
        result = json.loads(out.read_text())
        rows = result["rows"]
        self.assertEqual(
            [(row["model"], row["precision"], row["compile"]) for row in rows],
            [
                ("textbook CNN", "fp32", False), ("mobius_regular", "bf16", False),
                ("mobius_regular", "bf16", True),
            ],
        )
        self.assertIn("bf16, compiled", printed)
        self.assertEqual([row["launches"] for row in rows], [None, 247, None])
        self.assertEqual(set(result["matmul_gflop_per_second"]), {"fp32", "bf16"})
        for row in rows:
            self.assertIn(row["model"], printed)
            for task in ("step",) if row["compile"] else ("step", "infer"):
                figures = row[task]
                self.assertGreater(figures["min_ms"], 0)
                self.assertAlmostEqual(figures["images_per_second"], 4000 / figures["median_ms"])
                ratio = figures["median_ms"] / rows[0][task]["median_ms"]
                self.assertAlmostEqual(figures["ratio"], ratio)
                self.assertGreater(figures["matmul_share"], 0)
            if row["compile"]:  # on a GPU only
                self.assertIsNone(row["peak_memory_mb"])
                continue
            self.assertGreater(row["peak_memory_mb"], 0)
            ratio = row["peak_memory_mb"] / rows[0]["peak_memory_mb"]
            self.assertAlmostEqual(row["memory_ratio"], ratio)

    def test_pooling(self):
        out = self.folder / "pooling.json"
        polyphase = mock.patch.object(
            PolyphasePool, "forward", autospec=True, side_effect=PolyphasePool.forward
        )
        with polyphase as used:
            printed = self.run_main(
                "--pooling", "--models", "mobius_regular", "--precision", "bf16",
                "--batch_size", 4, "--rounds", 2, "--device", "cpu", "--out", out,
            )
        (row,) = json.loads(out.read_text())["rows"]
        self.assertEqual(used.call_count, 2 * 2 * 9)  # poolings, tasks, calls in three rounds
        for task in ("step", "infer"):
            figures = row[task]
            ratio = figures["polyphase"]["median_ms"] / figures["fixed"]["median_ms"]
            self.assertAlmostEqual(figures["ratio"], ratio)
            self.assertIn(f"{figures['ratio']:.3f}", printed)

    def test_textbook_cnn(self):
        """cnn_same_channels but for the cut: the same shapes, parameters and arithmetic."""
        textbook, cnn = benchmark.TextbookCNN(), build_model("cnn_same_channels")
        self.assertEqual(
            [p.shape for p in textbook.parameters()], [p.shape for p in cnn.parameters()]
        )
        self.assertEqual({type(m) for m in textbook.cnn}, {nn.Conv2d, nn.ELU, nn.MaxPool2d})
        candidates = [
            benchmark.Candidate(name, "fp32", 2, torch.device("cpu"))
            for name in (benchmark.TEXTBOOK, "mobius_regular")
        ]
        sizes = (
            (1, 16, 28), (16, 32, 28), (32, 64, 14), (64, 128, 14), (128, 256, 7), (256, 64, 7),
        )
        for candidate in candidates:
            flop = sum(2 * 2 * i * o * 25 * s * s for i, o, s in sizes)
            self.assertEqual(candidate.conv_flop(), flop)

    def test_bad_options(self):
        self.assertFails(benchmark.main, "--models", "resnet", contains="mobius_regular")
        self.assertFails(benchmark.main, "--batch_size", 1, contains="at least 2")
        self.assertFails(benchmark.main, "--rounds", 1, contains="at least 2")
        self.assertFails(benchmark.main, "--out", self.folder, contains=str(self.folder))
        self.assertFails(benchmark.main, "--memory_of", "resnet", contains="textbook CNN")
        (self.folder / "file").write_text("")
        self.assertFails(
            benchmark.main, "--out", self.folder / "file" / "b.json", contains="cannot write"
        )
        if not torch.cuda.is_available():
            self.assertFails(benchmark.main, "--device", "cuda", contains="--device cpu")
        self.assertEqual(list(self.files()), ["file"])

    def test_interrupted(self):
        """What stood there before still stands there."""
        out = self.folder / "benchmark.json"
        out.write_text("before")
        interrupted = mock.patch("benchmark.measure", side_effect=KeyboardInterrupt)
        with interrupted, self.assertRaises(SystemExit) as exit:
            self.run_main("--out", out, "--device", "cpu")
        self.assertEqual(exit.exception.code, 130)
        self.assertEqual(self.files(), {"benchmark.json": b"before"})
