"""equivariance.py, and docs/layers.md, whose lines and code are run."""

import contextlib
import copy
import io
import math
import os
import re
import socket
import warnings
from importlib.util import find_spec
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import fields as fields_module
from building_blocks import EquivBatchNorm
from equivariance import assert_equivariant, equivariance_error, sample_input
from fields import as_fields
from nn_layers import EquivNonlin, MobiusConv, MobiusPool, transport_pad
from tests.reference import DOUBLE, EXACT, act, randomized, reference_cover
from tests.support import ROOT, Case, FilesCase

MIXED = (4, 4, 4)


class Failing:
    """The identity, but for one call, to whose output it adds 1 in some channels."""

    def __init__(self, call: int, channels: slice = slice(None)) -> None:
        self.calls_left, self.channels = call, channels

    def __call__(self, x):
        self.calls_left -= 1
        y = x.clone()
        if self.calls_left == 0:
            y[:, self.channels] += 1
        return y


class TestEquivarianceError(Case):
    def test_known_answers(self):
        for mode in (True, False):
            norm = randomized(nn.BatchNorm2d(16, dtype=DOUBLE)).train(mode)
            self.assertGreater(equivariance_error(norm, MIXED, MIXED), 0.5)
        self.assertGreater(
            equivariance_error(lambda x: x[:, :, ::2, ::2], MIXED, MIXED, step=2), 1)
        self.assertGreater(equivariance_error(nn.MaxPool2d(2), MIXED, MIXED, step=2), 1)
        # ELU(x) + ELU(-x) = x - 1 + exp(-x) is up to 3 here, but always below ELU(x) = x.
        self.assertGreater(equivariance_error(nn.ELU(), MIXED, MIXED), 0.5)
        # A sample's mean: it is larger for strokes on a blank strip than for noise (about 0.01).
        self.assertGreater(
            equivariance_error(nn.GroupNorm(1, 16, dtype=DOUBLE), MIXED, MIXED), 0.04)
        pool = nn.AvgPool2d(2)
        self.assertLess(equivariance_error(pool, MIXED, MIXED, step=2, pointwise=True), 1e-14)

    def test_definition(self):
        """Against columns and matrices written out."""
        fields, (width, length) = (1, 2, 1), (5, 6)
        for stride, kernel, pointwise in ((1, 3, False), (2, (3, 4), False), (1, 1, True)):
            conv = nn.Conv2d(5, 5, kernel, (1, stride), "same" if stride == 1 else 1, dtype=DOUBLE)
            x = sample_input(as_fields(fields), width, length)
            y = conv(x)
            differences = [
                conv(reference_cover(x, fields, -t, length - t))
                - reference_cover(y, fields, -t // stride, (length - t) // stride)
                for t in range(0, 2 * length, stride)
            ]
            if pointwise:
                differences.append(conv(act(fields, x)) - act(fields, y))
            expected = max(d.abs().max().item() for d in differences) / y.abs().max().item()
            error = equivariance_error(
                conv, fields, fields, size=(width, length), step=stride, pointwise=pointwise)
            self.assertAlmostEqual(error, expected, delta=1e-12)
            outputs = conv(torch.cat([reference_cover(x, fields, -t, length - t)
                                      for t in range(0, 2 * length, stride)])).unflatten(0, (-1, 3))
            expected = (outputs - y).abs().max().item() / y.abs().max().item()
            error = equivariance_error(conv, fields, None, size=(width, length), step=stride)
            self.assertAlmostEqual(error, expected, delta=1e-12)

    def test_other_lengths(self):
        """The output moves by its own columns: half as many, as many or twice as many."""
        up, down = nn.Upsample(scale_factor=2), nn.AvgPool2d(2)
        for layer, step in ((up, 1), (nn.Sequential(up, down), 1), (nn.Sequential(down, up), 2),
                            (down, 2)):
            assert_equivariant(layer, MIXED, MIXED, EXACT, step=step, pointwise=True)
        for wrong, step in ((nn.Sequential(down, up), 1),
                            (lambda x: up(x).roll(1, dims=3), 1)):
            self.assertGreater(equivariance_error(wrong, MIXED, MIXED, step=step), 0.1)
        assert_equivariant(lambda x: x.amax((2, 3)), (1, 0, 0), None, EXACT, size=(5, 7), step=3)

    def test_randomize(self):
        """A fault that initial values hide; the module itself stays as it is."""
        net = nn.Sequential(nn.BatchNorm2d(16), nn.Dropout(0.5)).double().eval()
        before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        assert_equivariant(net, MIXED, MIXED, pointwise=True)
        errors = [equivariance_error(net, MIXED, MIXED, randomize=True) for _ in range(2)]
        self.assertGreater(errors[0], 0.1)
        self.assertEqual(*errors)
        for name, value in net.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]), name)
        self.assertTrue(torch.equal(torch.get_rng_state(), random))
        with self.assertRaises(AssertionError):
            assert_equivariant(net, MIXED, MIXED, randomize=True)
        trained = EquivBatchNorm(MIXED).eval()
        trained.running_var.fill_(1e-3)
        blur = nn.Module()  # a constant that is no statistic stays as it is
        blur.register_buffer("kernel", torch.full((16, 1, 1, 3), 1 / 3))
        blur.forward = lambda x: F.conv2d(transport_pad(x, 1, MIXED)[:, :, 1:-1], blur.kernel,
                                          groups=16)
        for layer in (MobiusConv(MIXED, MIXED, 3), EquivBatchNorm(MIXED), trained, blur):
            assert_equivariant(layer, MIXED, MIXED, randomize=True)
        with self.assertRaisesRegex(ValueError, "randomize needs an nn.Module"):
            assert_equivariant(lambda x: net(x), MIXED, MIXED, randomize=True)
        with self.assertRaisesRegex(ValueError, "tolerance must be a number, got \\(20, 36\\)"):
            assert_equivariant(net, MIXED, MIXED, (20, 36))

    def test_message(self):
        """It names the one transformation and type that fail; the first call is the output."""
        one, sign, reg = (1, 2, 1), slice(1, 3), slice(3, 5)
        for call, part, options, named in (
            (5, sign, {}, "shift by 3, the output's sign-flip fields"),
            (33, reg, {}, "shift by 31, the output's regular fields"),
            (34, slice(0, 1), {"pointwise": True},
             "gauge transformation, the output's trivial fields"),
            (2, reg, {"size": (3, 4)}, "shift by 0, the output's regular fields"),
        ):
            tried = 2 * options.get("size", (12, 16))[1] + options.get("pointwise", False)
            message = (rf"under a {named} are off by 0\.\d+ of the largest output "
                       rf"\(tolerance 0.1, exceeded by 1 of {tried} transformations\)")
            with self.subTest(named), self.assertRaisesRegex(AssertionError, message):
                assert_equivariant(Failing(call, part), one, one, 0.1, **options)
        halved = nn.AvgPool2d((1, 4))
        failing = Failing(4)
        with self.assertRaisesRegex(AssertionError, "shift by 8, the output's regular fields"):
            assert_equivariant(lambda x: failing(halved(x)), (0, 0, 2), (0, 0, 2), step=4)
        failing = Failing(3)
        message = "shift by 1, the output's logits"
        with self.assertRaisesRegex(AssertionError, message):
            assert_equivariant(lambda x: failing(x[:, :1].amax((2, 3))), one, None)
        assert_equivariant(Failing(0), one, one, pointwise=True)

    def test_only_gauge_transformations_fail(self):
        conv = randomized(MobiusConv(MIXED, MIXED, 3, dtype=DOUBLE))
        assert_equivariant(conv, MIXED, MIXED, EXACT)
        with self.assertRaisesRegex(AssertionError, "under a gauge transformation"):
            assert_equivariant(conv, MIXED, MIXED, pointwise=True)

    def test_signs_of_rounding_noise(self):
        """They show in a single layer, as layers before would show them."""
        for fields in (MIXED, (0, 1, 0)):
            layer = randomized(EquivNonlin(fields, dtype=DOUBLE))
            for size in ((12, 16), (2, 2), (1, 1)):
                assert_equivariant(layer, fields, fields, EXACT, size=size)
        nn.init.ones_(layer.bias_sign)  # the height of the jump at 0 is ELU(b)
        with mock.patch.object(fields_module, "ROUNDING", 0):
            self.assertGreater(equivariance_error(layer, fields, fields), 0.1)

    def test_nothing_changes(self):
        """Neither in the module nor in the random state, and dropout draws the same each time."""
        class Pooled(nn.Sequential):
            def forward(self, x):
                self.history = self.history + 1
                return super().forward(x).amax(dim=(2, 3))

        head = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
        body = Pooled(MobiusConv((1, 0, 0), MIXED, 3), EquivBatchNorm(MIXED),
                      MobiusConv(MIXED, (3, 0, 0), 3))
        body.register_buffer("history", torch.zeros(()), persistent=False)
        module = nn.Sequential(body, head).double()
        head[1].eval()
        before, modes = copy.deepcopy(module), [m.training for m in module.modules()]
        state, values = torch.get_rng_state(), list(module.buffers())
        self.assertLess(equivariance_error(module, (1, 0, 0), None), 1e-12)
        head[1].train()
        self.assertLess(equivariance_error(module, (1, 0, 0), None), 1e-12)
        head[1].eval()
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        self.assertEqual([m.training for m in module.modules()], modes)
        for tensor, same in zip(module.buffers(), values, strict=True):
            self.assertIs(tensor, same)
        for now, then in ((module.buffers(), before.buffers()),
                          (module.parameters(), before.parameters())):
            for tensor, other in zip(now, then, strict=True):
                self.assertTrue(torch.equal(tensor, other))
                self.assertIsNone(tensor.grad)
                self.assertEqual(tensor.requires_grad, other.requires_grad)

    def test_dtype(self):
        class Seen(nn.Identity):
            def forward(self, x):
                seen.append((x.dtype, x.device.type))
                return x

        class Counting(Seen):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.tensor(0))
                self.register_buffer("scale", torch.tensor(1.0, dtype=torch.bfloat16))

        for module, dtype in (
            (Seen(), DOUBLE), (Counting(), torch.bfloat16),
            (nn.Sequential(Seen(), nn.Conv2d(1, 1, 1)), torch.float32),
            (nn.Sequential(Seen(), nn.Conv2d(1, 1, 1)).half(), torch.float16),
        ):
            seen = []
            equivariance_error(module, (1, 0, 0), (1, 0, 0))
            self.assertEqual(set(seen), {(dtype, "cpu")})
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            layer = randomized(EquivBatchNorm(MIXED, dtype=dtype))
            assert_equivariant(layer, MIXED, MIXED, tolerance, pointwise=True)

    def test_not_a_number(self):
        def nan_at(call):
            return lambda x, failing=Failing(call): 0 / (1 - failing(torch.zeros_like(x)))

        for call in (1, 2, 9, 33):
            with self.assertRaisesRegex(AssertionError, "off by nan"):
                assert_equivariant(nan_at(call), MIXED, MIXED, 10)
            self.assertTrue(math.isnan(equivariance_error(nan_at(call), MIXED, MIXED)))
        self.assertEqual(equivariance_error(torch.zeros_like, MIXED, MIXED), 0)

    def test_bad_arguments(self):
        for arguments, options, message in (
            (((0, 0, 0), MIXED), {}, "in_fields must be"),
            ((MIXED, (1, 2)), {}, "out_fields must be"),
            ((MIXED, (4, 4, 5)), {}, r"expected 18 channels .* got shape \(3, 16, 12, 16\)"),
            ((MIXED, MIXED), {"step": 0}, "step must be from 1 to 2L - 1 = 31, got 0"),
            ((MIXED, None), {"step": 32}, "step must be from 1 to 2L - 1 = 31, got 32"),
            ((MIXED, MIXED), {"step": 1.0}, "step must be an integer"),
            ((MIXED, MIXED), {"size": (0, 4)}, r"two positive integers \(W, L\), got \(0, 4\)"),
            ((MIXED, MIXED), {"size": 12}, "size must be two positive integers .* got 12"),
        ):
            for check in (equivariance_error, assert_equivariant):
                with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                    check(nn.Identity(), *arguments, **options)
        message = ("if an input of length 16 moves by 1, an output of length 8 cannot move by 8/16 "
                   "columns: take step 2, or a size of another length")
        with self.assertRaisesRegex(ValueError, message):
            equivariance_error(MobiusPool(MIXED), MIXED, MIXED)
        with self.assertRaisesRegex(ValueError, "length 8 cannot move by 16/15 .* take step 15"):
            equivariance_error(MobiusPool(MIXED), MIXED, MIXED, size=(12, 15), step=2)


class TestLayersPage(FilesCase):
    TEXT = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

    def test_table(self):
        """Each line of code has the error that stands beside it, 0 or not."""
        namespace = {}
        exec(self.SNIPPETS[0], namespace)
        rows = re.findall(r"^\| `(error\(.+?\))` \| ([\d.]+) \| .+ \|$", self.TEXT, re.MULTILINE)
        self.assertEqual(len(rows) + 2, self.TEXT.count("\n|"))
        for line, shown in rows:
            torch.manual_seed(0)
            error = eval(line, namespace)
            with self.subTest(line):
                if shown == "0":
                    self.assertLess(error, 1e-10)
                else:
                    self.assertAlmostEqual(error, float(shown), delta=0.2 * float(shown))

    def test_snippets(self):
        """Together they are a program, and what it asserts is true."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        torch.manual_seed(0)
        namespace, onnx = {}, find_spec("onnx") and find_spec("onnxscript")
        with mock.patch.dict(os.environ, address), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's about itself
            for snippet in self.SNIPPETS:
                if "torch.onnx" not in snippet or onnx:
                    with contextlib.redirect_stdout(io.StringIO()):
                        exec(snippet, namespace)
        self.assertEqual((self.folder / "mobius.onnx").exists(), bool(onnx))
        self.assertGreater(len(self.SNIPPETS), 8)
