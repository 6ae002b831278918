"""Runs with --compile."""

import contextlib
import os
import shutil
import unittest
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

import train
from models import build_model
from tests.support import RunsCase
from training.environment import compiled


class TestCompile(RunsCase):
    DIGITS, BATCH = (16, 6), 8

    def setUp(self):
        super().setUp()
        # All that PyTorch does but C++, which takes a minute for one of these networks.
        without_cpp = partial(torch.compile, backend="aot_eager")
        for patch in (
            mock.patch("torch.compile", without_cpp), mock.patch("train.EVAL_BATCH_SIZE", 4)
        ):
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(torch.compiler.set_stance, "default")

    def gradients(self, run, compute):
        run.model.zero_grad()
        logits, loss = compute(*(part[:self.BATCH] for part in run.training_set))
        loss.backward()
        return [logits.detach(), *(p.grad.clone() for p in run.model.parameters())]

    def test_same_numbers_compiled_once(self):
        """Neither another epoch nor the smaller last batch of an evaluation compiles anew."""
        config = self.config(
            model="mobius_regular", pooling="polyphase", dropout=0.0, compile=True
        )
        with contextlib.closing(train.Run(config, verbose=False)) as run:
            for a, b in zip(*(self.gradients(run, f) for f in (run.compute, run.loss))):
                self.assertClose(a, b, tolerance=1e-4)
            run.train(after_epoch=lambda: torch.compiler.set_stance("fail_on_recompile"))
            with self.assertRaisesRegex(RuntimeError, "recompile"):  # a negative control
                run.compute(*(part[:self.BATCH // 2] for part in run.training_set))
        weights = torch.load(run.folder.path / "weights.pt", weights_only=True)
        self.assertEqual(list(weights), list(build_model("mobius_regular").state_dict()))

    def test_resume(self):
        config = self.config(model="cnn_same_params", compile=True)
        expected = self.finish(config)
        stopped = self.finish(config, stop_after=1)
        self.main(train, "--resume", stopped, "--data", self.data, "--no-tensorboard")
        result = self.assertSameRun(stopped, expected)
        self.assertTrue(result["config"]["compile"])
        self.assertFails(train.main, "--resume", stopped, "--no-compile", contains="compile")

    def test_without_a_compiler(self):
        with mock.patch("shutil.which", return_value=None), mock.patch.dict(os.environ):
            os.environ.pop("CXX", None)
            self.assertFails(
                train.main, *self.options("--compile"), contains=("--compile", "C++ compiler")
            )


class TestCompiler(RunsCase):
    @unittest.skipUnless(shutil.which("g++") or shutil.which("clang++"), "needs a C++ compiler")
    def test_a_function(self):
        """By C++, in as little of it as shows that it works."""
        x = torch.randn(5)
        with mock.patch("torch.compile", wraps=torch.compile) as compile:
            self.assertClose(compiled(F.elu, x.device)(x), F.elu(x), tolerance=1e-5)
        self.assertIsNone(compile.call_args.kwargs["mode"])
