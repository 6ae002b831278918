"""What is known of the GPU path without a GPU."""

import subprocess
import sys
import unittest

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
