"""What the tests of several files need: their base classes, small data, and processes."""

import atexit
import collections
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import convert_mnist
import train
from models import MODELS
from tests.reference import TOLERANCE
from training.environment import describe_environment
from training.files import write_json

ROOT = Path(__file__).resolve().parents[1]
COUNTS = collections.Counter()  # of what was survived
# Kernels of one point: the same layers and files in a fraction of the time.
SMALL_MODELS = {name: partial(model, kernel_size=1) for name, model in MODELS.items()}

ROWS = [
    {
        "run": "a", "model": "cnn_same_channels", "settings": {}, "train_mode": "centered",
        "seed": 0, "sha256": "0", "errors": [float(1 + shift) for shift in range(56)],
    },
    {
        "run": "b", "model": "cnn_same_channels", "settings": {}, "train_mode": "centered",
        "seed": 1, "sha256": "0", "errors": [float(3 + shift) for shift in range(56)],
    },
    {
        "run": "c", "model": "mobius_regular", "settings": {}, "train_mode": "centered",
        "seed": 0, "sha256": "0", "errors": [1.25] * 56,
    },
    {
        "run": "d", "model": "mobius_regular", "settings": {"pooling": "polyphase"},
        "train_mode": "centered", "seed": 0, "sha256": "0", "errors": [1.5] * 56,
    },
]
ROWS = [row | {"predictions": 560, "changed": 0} for row in ROWS]


def write_reliability() -> None:
    """What was survived, in the file of the README's figures, if $RELIABILITY names one."""
    if path := os.environ.get("RELIABILITY"):
        environment = describe_environment(torch.device("cpu"))
        write_json(path, {"environment": environment, "survived": dict(COUNTS)})


class Case(unittest.TestCase):
    """Each class draws the same random numbers, whatever ran before it."""

    @classmethod
    def setUpClass(cls):
        torch.manual_seed(0)

    @classmethod
    def tearDownClass(cls):
        write_reliability()

    def assertClose(self, actual, expected, tolerance=TOLERANCE, message=None):
        self.assertEqual(actual.shape, expected.shape, message)
        msg = message and (lambda m: f"{message}\n{m}")
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=msg)

    def assertNotClose(self, actual, expected, message=None):
        self.assertEqual(actual.shape, expected.shape, message)
        self.assertGreater((actual - expected).abs().max().item(), 1e-3, message)


class FilesCase(Case):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assertFails(self, main, *arguments, contains=(), status=2):
        """`main` exits with `status` and one line on stderr, which has all of `contains`.

        Returns the line.
        """
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            with self.assertRaises(SystemExit) as exit:
                main([str(argument) for argument in arguments])
        printed = stderr.getvalue() or str(exit.exception.code)
        self.assertEqual(exit.exception.code if stderr.getvalue() else 1, status, printed)
        self.assertEqual(len(printed.strip().splitlines()), 1, printed)
        for text in [contains] if isinstance(contains, str) else contains:
            self.assertIn(text, printed)
        COUNTS["bad inputs"] += 1
        return printed

    def files(self):
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*") if path.is_file()
        }


@contextlib.contextmanager
def imports(**modules):
    """Replace modules, `torch__utils` for torch.utils; imports of one that is None fail.

    (mock.patch.dict would also forget every other module imported meanwhile.)
    """
    modules = {name.replace("__", "."): module for name, module in modules.items()}
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def not_installed(module: str):
    """Imports of `module` fail."""
    return imports(**{module: None})


def write_npz(path: Path, n_train: int = 64, n_test: int = 32, **changes) -> Path:
    """A small set of real digits; `changes` replace arrays, None leaves one out."""
    if not hasattr(write_npz, "arrays"):
        with tempfile.TemporaryDirectory() as folder:
            with np.load(convert_mnist.convert("digits", Path(folder) / "digits.npz")) as npz:
                write_npz.arrays = dict(npz)
    sizes = {"train": n_train, "test": n_test}
    small = {key: array[:sizes[key.split("_")[0]]] for key, array in write_npz.arrays.items()}
    arrays = small | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


class Zygote:
    """A process that has imported everything and forks one child for each command.

    A child is like a fresh Python, but seconds faster. `start` returns its pid, `wait` its exit
    status and what it printed; it may be killed meanwhile.
    """

    CODE = """
import faulthandler, json, os, pathlib, signal, sys, traceback
import convert_mnist, torch, train, reproduce
from tests.support import MODELS, SMALL_MODELS
MODELS.update(SMALL_MODELS)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
torch.set_num_threads(1)
for line in sys.stdin:
    module, arguments, environment, output = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        if "DATA_FOLDER" in environment:
            convert_mnist.DATA_FOLDER = pathlib.Path(environment["DATA_FOLDER"])
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        faulthandler.register(signal.SIGUSR1)
        # Under nohup and in some CI it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 0
        try:
            sys.modules[module].main(arguments)
        except SystemExit as exit:
            status = exit.code or 0
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), sys.stderr.flush()
        os.write(file, f"\\nexit {status}".encode())
        os._exit(0)
    print(pid, flush=True)
"""
    _process = None

    @classmethod
    def start(cls, module, arguments, output, **environment) -> int:
        if cls._process is None:
            cls._process = subprocess.Popen(
                [sys.executable, "-c", cls.CODE], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            atexit.register(cls._stop)
        command = [module, list(map(str, arguments)), environment, str(output)]
        cls._process.stdin.write(json.dumps(command) + "\n")
        cls._process.stdin.flush()
        return int(cls._process.stdout.readline())

    @classmethod
    def _stop(cls):
        cls._process.stdin.close()
        cls._process.stdout.close()
        cls._process.wait()

    @staticmethod
    def wait(pid, output, seconds=30):
        """The exit status, None of a process that was killed, and its output."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                printed, _, status = (
                    Path(output).read_text().rpartition("\nexit ")
                    if Path(output).exists() else ("", "", "")
                )
                return (int(status) if status.lstrip("-").isdigit() else None), printed
            time.sleep(0.01)
        os.kill(pid, signal.SIGUSR1)  # tells where it is
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"still at work after {seconds} s: {Path(output).read_text()}")


class RunsCase(FilesCase):
    """Runs of two epochs of small models on a few digits, a fraction of a second each."""

    DIGITS, BATCH = (8, 8), 4  # for training and test

    def setUp(self):
        super().setUp()
        self.data = write_npz(self.folder / "digits.npz", *self.DIGITS)
        self.logs = self.folder / "logs"
        small = mock.patch.dict(MODELS, SMALL_MODELS)
        small.start()
        self.addCleanup(small.stop)

    def config(self, **options):
        options = {
            "model": "mobius_regular", "num_epochs": 2, "batch_size": self.BATCH,
            "data": str(self.data), "device": "cpu", "log_dir": str(self.logs),
            "tensorboard": False,
        } | options
        return train.Config(**options)

    def options(self, *more):
        return [
            "--model", "mobius_regular", "--data", self.data, "--log_dir", self.logs,
            "--num_epochs", "2", "--batch_size", self.BATCH, "--device", "cpu", "--no-tensorboard",
            *more,
        ]

    def finish(self, config, folder=None, stop_after=None):
        """Train a run, to the end or up to an epoch; returns its folder."""
        def after_epoch():
            if run.epoch == stop_after:
                raise KeyboardInterrupt

        run = train.Run(config, folder, verbose=False)
        with contextlib.closing(run), contextlib.suppress(KeyboardInterrupt):
            run.train(after_epoch)
        return run.folder.path

    def main(self, module, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            module.main([str(argument) for argument in arguments])
        return printed.getvalue()

    def assertSameRun(self, folder, expected):
        """The same weights, optimizer, random states and metrics, bit for bit."""
        for file in ("weights.pt", "checkpoint.pt"):
            if (expected / file).exists():
                self.assertSameTree(
                    torch.load(folder / file, weights_only=True),
                    torch.load(expected / file, weights_only=True),
                    file,
                )
        stored = json.loads((folder / "result.json").read_text())
        other = json.loads((expected / "result.json").read_text())
        self.assertSameTree(stored, other, "result.json")
        return stored

    def assertSameTree(self, a, b, path):
        self.assertIs(type(a), type(b), path)
        if isinstance(a, dict):
            volatile = {"seconds", "started", "resumed", "log_dir"}
            self.assertEqual(set(a) - volatile, set(b) - volatile, path)
            for key in set(a) - volatile:
                self.assertSameTree(a[key], b[key], f"{path} {key}")
        elif isinstance(a, list):
            self.assertEqual(len(a), len(b), path)
            for i, values in enumerate(zip(a, b)):
                self.assertSameTree(*values, f"{path} {i}")
        else:
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            self.assertTrue(same, f"{path}: {a} and {b}")
