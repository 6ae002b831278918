"""What is known of the GPU path without a GPU."""

import subprocess
import sys
import unittest

import torch

import fast
from models import MODELS, build_model
from tests.support import ROOT, Case


class TestGPUPath(Case):
    def test_on_a_pretended_gpu(self):
        """The tests of `gpu_path.py`, in a process of their own: the device stays registered."""
        try:
            from torch.utils.backend_registration import (
                _setup_privateuseone_for_python_backend,  # noqa: F401
            )
        except ImportError as error:
            raise unittest.SkipTest(f"PyTorch cannot pretend a device: {error}") from error
        process = subprocess.run(
            [sys.executable, "-m", "tests.gpu_path"], cwd=ROOT, text=True,
            capture_output=True,
        )
        print(process.stdout, end="")  # launches of each model
        self.assertEqual(process.returncode, 0, process.stderr)

    def test_channels_last_through_all_layers(self):
        """By the formulas, on a CPU: its convolutions choose their format as cuDNN's do."""
        images = fast.channels_last(torch.rand(2, 1, 28, 28))
        for name in MODELS:
            outputs = []
            model = build_model(name)
            for layer in model.get_submodule("cnn" if name.startswith("cnn") else "mobius_cnn"):
                layer.register_forward_hook(lambda layer, inputs, y: outputs.append(y))
            with fast.disabled(), torch.no_grad():
                model(images)
            formats = {y.is_contiguous(memory_format=torch.channels_last) for y in outputs}
            self.assertEqual(formats, {True}, name)
