"""The tests of `test_gpu_path.py`, which runs them in a process of their own.

Covered: each model by the paper's protocol and by --recipe improved, so with both poolings; each of
these four in float32 for some models and in bfloat16 for the others. Not covered: time, memory,
numbers, --compile.
"""

import collections
import contextlib
import itertools
import unittest
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import train
from models import MODELS, POOLINGS, build_model
from tests.support import Case, RunsCase, write_npz
from training import muon
from training.options import RECIPES
from training.pretended_gpu import NAME, PretendedGPU, launches
from training.run_folder import RunFolder

BATCH = 2


def on_gpu(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == NAME]


def save(folder: RunFolder, checkpoint: dict) -> None:
    """Write no files, but copy tensors to the host, as torch.save does."""
    for tensor in on_gpu(checkpoint):
        tensor.cpu()


class TestGPUPath(RunsCase):
    def waits(self, batches: int, **options) -> tuple[collections.Counter, train.Run]:
        """Waits in an epoch of so many steps that ends with an evaluation of so many batches."""
        digits = batches * BATCH
        config = self.config(
            data=str(write_npz(self.folder / "digits.npz", digits, digits)), num_epochs=1,
            test_mode="shifted", **{"batch_size": BATCH, "warmup_epochs": 0} | options,
        )
        orthogonalize = lambda parts: parts  # it takes most of the time, and is alike for all
        if config.model == "mobius_regular":
            orthogonalize = partial(muon.orthogonalize, steps=1)
        with PretendedGPU() as gpu, contextlib.ExitStack() as patches:
            for patch in (
                mock.patch("train.select_device", lambda name: gpu.device),
                mock.patch("train.EVAL_BATCH_SIZE", BATCH),
                mock.patch.object(RunFolder, "save", save),
                mock.patch.object(muon, "orthogonalize", orthogonalize),
            ):
                patches.enter_context(patch)
            run = train.Run(config, verbose=False)
            gpu.waits.clear()
            with contextlib.closing(run):
                run.train()
        return gpu.waits, run

    def test_no_wait_per_step(self):
        """And none for each batch of an evaluation; no tensor of another device takes part.

        With two of each, a wait in each would be counted twice.
        """
        precisions = itertools.cycle((("fp32", "bf16"), ("bf16", "fp32")))
        for model, pair in zip(MODELS, precisions):
            for (recipe, settings), precision in zip(RECIPES.items(), pair):
                with self.subTest(model, recipe=recipe, precision=precision):
                    options = settings | {
                        "model": model, "precision": precision, "batch_size": BATCH,
                        "warmup_epochs": 0,
                    }
                    waits, run = self.waits(2, **options)
                    environment = run.result["environment"]
                    self.assertEqual(environment["device"], "pretended GPU")
                    self.assertIn("tf32", environment)
                    saved = len(run.model.state_dict()), len(on_gpu(run.optimizer.state_dict()))
                    self.assertEqual(waits, {
                        "copy to the device": 1 + bool(run.deform),  # order and deformations
                        "nonzero": 1,  # is the loss finite?
                        "_local_scalar_dense": 4,  # loss and error, of training and test
                        "copy to the host": sum(saved),  # the checkpoint
                    })
        self.assertEqual(self.waits(4, **options)[0], waits)

    def changed_loss(self, change):
        """The waits of another step with another loss."""
        loss = train.Run.loss

        def changed(run, images, labels):
            logits, value = loss(run, images, labels)
            return logits, change(logits, labels, value)

        with mock.patch.object(train.Run, "loss", changed):
            two, four = (self.waits(n, model="cnn_same_params")[0] for n in (2, 4))
        return four - two

    def test_what_waits_is_found(self):
        """Negative controls."""
        difference = self.changed_loss(lambda logits, labels, loss: loss + logits[0, 0].item())
        self.assertEqual(difference, {"_local_scalar_dense": 2})
        difference = self.changed_loss(
            lambda logits, labels, loss: loss + logits[labels > 4].sum()
        )
        self.assertEqual(difference, {"boolean index": 4})  # forward and backward
        difference = self.changed_loss(
            lambda logits, labels, loss: loss + logits[torch.tensor([0])].sum()
        )
        self.assertEqual(difference, {"index on the host": 4})
        difference = self.changed_loss(lambda logits, labels, loss: loss + torch.ones(1).to(NAME))
        self.assertEqual(difference, {"copy to the device": 2})

    def test_mixed_devices_are_found(self):
        """Negative controls."""
        mixed = self.assertRaisesRegex(RuntimeError, f"got tensors on {NAME} and on cpu")
        with mixed:
            self.changed_loss(lambda logits, labels, loss: (loss + torch.ones(2)).sum())
        with PretendedGPU() as gpu:
            x = torch.empty(2, 3, 8, 8, device=gpu.device)
            for function in (
                lambda: F.conv2d(x, torch.empty(4, 3, 5, 5)),
                lambda: F.linear(x, torch.empty(4, 8)),
                lambda: torch.cat([x, torch.empty(2, 3, 8, 8)]),
                lambda: F.cross_entropy(x[:, :, 0, 0], torch.zeros(2, dtype=torch.long)),
            ):
                with mixed:
                    function()


class TestLaunches(Case):
    def test_few(self):
        """At most 2.5 times those of the CNN; 3 times with polyphase pooling."""
        counts = {
            (name, pooling): launches(partial(build_model, name, pooling=pooling))
            for name, pooling in itertools.product(MODELS, POOLINGS)
        }
        cnn = counts["cnn_same_channels", "fixed"]
        for (name, pooling), count in counts.items():
            print(f"{name:18} {pooling:10} {count:4} launches, {count / cnn:.2f} of the CNN's")
            self.assertLessEqual(count / cnn, {"fixed": 2.5, "polyphase": 3}[pooling], name)


if __name__ == "__main__":
    unittest.main()
