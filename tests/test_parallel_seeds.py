"""Several seeds as one stacked network, by parallel_seeds.py."""

import contextlib
import math

import torch
import torch.nn as nn

import data_loader
import parallel_seeds
import train
from nn_layers import MobiusConv, MobiusConvNaive
from tests.reference import DOUBLE
from tests.support import RunsCase


class TestParallelSeeds(RunsCase):
    def runs(self, seeds, dtype=torch.float32, **options):
        runs = []
        for seed in seeds:
            run = train.Run(self.config(seed=seed, **options), verbose=False)
            self.addCleanup(run.close)
            run.model.to(dtype)
            # Noise: on digits, the pooling of sign-flip fields meets ties of +a and -a, which rounding breaks.
            images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=dtype)
            run.training_set = data_loader.Split(images, run.training_set.labels)
            run.test_sets = {name: data_loader.Split(images, s.labels) for name, s in run.test_sets.items()}
            runs.append(run)
        return runs

    def assertSameRuns(self, runs, expected, tolerance):
        for run, alone in zip(runs, expected, strict=True):
            for (name, value), (_, of_alone) in zip(run.model.state_dict().items(), alone.model.state_dict().items(), strict=True):
                self.assertClose(value, of_alone, tolerance, name)
            for state, of_alone in zip(run.optimizer.state_dict()["state"].values(), alone.optimizer.state_dict()["state"].values(), strict=True):
                for key, value in state.items():
                    self.assertClose(value, of_alone[key], tolerance, key)
            for name, state in run.random.items():
                self.assertTrue(torch.equal(state, alone.random[name]))
            self.assertTrue(torch.equal(run.order.get_state(), alone.order.get_state()))
            for record, of_alone in zip(run.result["epochs"], alone.result["epochs"], strict=True):
                self.assertEqual(set(record), set(of_alone))
                for key in set(record) - {"seconds"}:
                    self.assertAlmostEqual(record[key], of_alone[key], places=5)
            self.assertEqual(run.result["status"], alone.result["status"])

    def test_equal_to_separate_runs(self):
        """In float64, where rounding has not grown to anything after two epochs of a small learning rate."""
        options = {"model": "mobius_mixed", "dtype": DOUBLE, "lr": 1e-4, "lr_decay_period": 1, "test_mode": "centered"}
        alone = self.runs((3, 0), **options)
        for run in alone:
            run.train()
        together = self.runs((3, 0), **options)
        parallel = parallel_seeds.ParallelRuns(together)
        self.assertEqual(parallel.optimizer.param_groups[0]["weight_decay"], 1e-6)
        parallel.train()
        self.assertSameRuns(together, alone, 1e-7)
        with self.assertRaises(AssertionError):  # a seed makes more of a difference
            self.assertSameRuns(together, alone[::-1], 1e-7)
        for run in together:
            self.assertSameTree(torch.load(run.folder.path / "weights.pt", weights_only=True), dict(run.model.state_dict()), "weights")

    def test_either_goes_on_with_the_other(self):
        options = {"model": "mobius_scalar", "dtype": DOUBLE, "num_epochs": 3} | train.RECIPES["improved"] | {"lr": 1e-4, "batch_size": 4}
        alone = self.runs((0, 1), **options)
        for run in alone:
            run.train()
        runs = self.runs((0, 1), **options)

        def stop_after(epoch):
            if runs[-1].epoch == epoch:
                raise KeyboardInterrupt

        for run in runs:
            with contextlib.suppress(KeyboardInterrupt):
                run.train(lambda run=run: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            parallel_seeds.ParallelRuns(runs).train(lambda: stop_after(2))
        self.assertEqual([run.epoch for run in runs], [2, 2])
        for run in runs:
            run.train()
        self.assertSameRuns(runs, alone, 1e-7)

    def test_bf16(self):
        """Rounded where autocast rounds."""
        for model in ("mobius_regular", "cnn_same_params"):
            losses = {}
            for precision, parallel in (("bf16", True), ("bf16", False), ("fp32", False)):
                runs = self.runs((0, 1), model=model, precision=precision, num_epochs=1, batch_size=8)  # one step
                if parallel:
                    dtypes = set()
                    together = parallel_seeds.ParallelRuns(runs)
                    for module in together.model.modules():
                        if isinstance(module, (MobiusConv, MobiusConvNaive, nn.Linear, parallel_seeds._GivenDropout)):
                            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
                    together.train()
                    self.assertEqual(dtypes, {torch.bfloat16})
                else:
                    for run in runs:
                        run.train()
                losses[precision, parallel] = torch.tensor([run.result["epochs"][0]["train_loss"] for run in runs])
            self.assertLess((losses["bf16", True] - losses["bf16", False]).abs().max(), 0.05)
            self.assertFalse(torch.equal(losses["bf16", True], losses["fp32", False]))

    def test_what_does_not_go_together(self):
        first, *others = (*self.runs((0,)), *self.runs((1,), lr=0.1), *self.runs((1,), model="cnn_same_params"))
        for other in others:
            with self.assertRaisesRegex(ValueError, "the same configuration"):
                parallel_seeds.ParallelRuns([first, other])
        (ahead,) = self.runs((1,))
        with contextlib.suppress(KeyboardInterrupt):
            ahead.train(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with self.assertRaisesRegex(ValueError, "same epoch"):
            parallel_seeds.ParallelRuns([first, ahead])

    def test_loss_that_is_not_finite(self):
        runs = self.runs((0, 1))
        with torch.no_grad():
            runs[1].model.classifier[7].bias[0] = math.inf
        with self.assertRaisesRegex(FloatingPointError, "seed 1: the loss is nan at step 1 of 2 in epoch 1"):
            parallel_seeds.ParallelRuns(runs).train()
        self.assertEqual([run.epoch for run in runs], [0, 0])
