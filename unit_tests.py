"""Tests of fields, layers and models, and the runner of all tests; the others are in tests/.

    python unit_tests.py                    all of them, about two minutes on two cores
    python unit_tests.py TestMobiusConv     one class, or one file (tests.test_train), or one test
    python -m pytest                        all of them with pytest

Reference implementations are written out from the definitions, with explicit matrices and loops,
and share no code with what they test. Equivariance is tested in float64 to 1e-10, beside a layer
or model that must fail.
"""

import collections
import contextlib
import copy
import io
import itertools
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import unittest
from importlib.util import find_spec
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import convert_mnist
import fast
import fields as fields_module
from building_blocks import EquivBatchNorm, MobiusSequential, export
from equivariance import assert_equivariant, equivariance_error
from fields import Fields, as_fields, concatenate, gauge_transform, isometry_action, sample_norms
from models import CNN, MODELS, MODES, POOLINGS, MobiusGaugeCNN, build_model, count_parameters
from nn_layers import (
    EquivNonlin, MobiusConv, MobiusConvNaive, MobiusPadNaive, MobiusPool, TransportPad,
    invariant_bias, steerable_kernel, strip_pool, transport_pad,
)
from polyphase import PolyphasePool
from tests.reference import (
    DOUBLE, EXACT, FIELDS, KERNEL_SIZES, PARAMETERS, SIZES, TYPES, act, all_shifts, channels,
    features, on_blank_strip, randomized, randomized_norms, reference_cover, rho_matrix, rounded,
)
from tests.support import COUNTS, ROOT, Case, write_reliability


# ==================================================================================================
# fields.py


class TestFields(Case):
    def test_concatenate(self):
        """By matrices: rho(s) of all channels at once is that of each part."""
        for fields in FIELDS:
            for others in FIELDS:
                x, y = features(fields, 3, 4, n=2), features(others, 3, 4, n=2)
                z, both = concatenate(x, fields, y, others), Fields(*fields) + Fields(*others)
                self.assertEqual(both, tuple(m + n for m, n in zip(fields, others)))
                self.assertEqual(z.shape[1], both.channels)
                self.assertEqual((fields + Fields(*others), Fields(*fields) + others), (both, both))
                self.assertTrue(torch.equal(
                    act(both, z), concatenate(act(fields, x), fields, act(others, y), others)))
                self.assertTrue(torch.equal(z.sort(dim=1)[0], torch.cat([x, y], 1).sort(dim=1)[0]))
        x, y = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in ([0, 1, 2, 3], [4, 5, 6]))
        self.assertEqual(concatenate(x, (1, 1, 1), y, (1, 0, 1)).flatten().tolist(),
                         [0, 4, 1, 2, 3, 5, 6])
        x = features(fields, 3, 4)
        with self.assertRaisesRegex(ValueError, "y_fields must be"):
            concatenate(x, fields, y, (1, 2))
        with self.assertRaisesRegex(ValueError, "expected 2 channels"):
            concatenate(x, fields, torch.zeros(2, 3, 3, 4), (2, 0, 0))

    def test_channels(self):
        self.assertEqual(Fields(10, 4, 8).channels, 30)
        self.assertEqual(as_fields((10, 4, 8)), (10, 4, 8))
        self.assertEqual(as_fields(np.array([1, 2, 3])), (1, 2, 3))

    def test_bad_multiplicities(self):
        for bad in [
            (0, 0, 0), (-1, 2, 0), (1.0, 0, 0), (1, 2), (1, 2, 3, 4), ("1", 0, 0), (True, 0, 0),
            3, None,
        ]:
            with self.subTest(bad), self.assertRaisesRegex(ValueError, re.escape(repr(bad))):
                as_fields(bad)
        with self.assertRaisesRegex(ValueError, re.escape("(True, 0, 0)")):
            as_fields(m for m in (True, 0, 0))

    def test_gauge_transform_is_rho(self):
        for fields in FIELDS:
            with self.subTest(fields):
                x = features(fields, 3, 4)
                self.assertClose(gauge_transform(x, fields), act(fields, x))
                self.assertTrue(torch.equal(gauge_transform(gauge_transform(x, fields), fields), x))

    def test_isometry_action_column_by_column(self):
        for fields, (width, length) in itertools.product(FIELDS, [(4, 3), (3, 4), (1, 1)]):
            x = features(fields, width, length)
            for shift in all_shifts(length):
                with self.subTest(fields=fields, length=length, shift=shift):
                    self.assertClose(
                        isometry_action(x, shift, fields),
                        reference_cover(x, fields, -shift, length - shift),
                    )

    def test_isometry_group(self):
        fields, length = (1, 2, 1), 5
        x = features(fields, 4, length)
        reflected = gauge_transform(x.flip(2), fields)
        self.assertTrue(torch.equal(isometry_action(x, length, fields), reflected))
        for identity in (0, 2 * length, -2 * length, 10**30 * 2 * length):
            self.assertTrue(torch.equal(isometry_action(x, identity, fields), x))
        for a, b in itertools.product(all_shifts(length), repeat=2):
            both = isometry_action(isometry_action(x, a, fields), b, fields)
            self.assertTrue(torch.equal(both, isometry_action(x, a + b, fields)))

    def test_a_shift_for_each_sample(self):
        fields = (1, 1, 1)
        x = features(fields, 3, 4, n=17)
        shifts = torch.arange(-8, 9)
        moved = [isometry_action(x[i:i + 1], int(t), fields) for i, t in enumerate(shifts)]
        expected = torch.cat(moved)
        self.assertTrue(torch.equal(isometry_action(x, shifts, fields), expected))
        self.assertTrue(torch.equal(isometry_action(x, shifts.to(torch.int32), fields), expected))
        for extreme in (-2**63, 2**63 - 1):
            y = isometry_action(x, torch.full((17,), extreme), fields)
            self.assertTrue(torch.equal(y, isometry_action(x, extreme, fields)))
        for bad in (shifts[:3], shifts.double(), shifts > 0, shifts[:, None]):
            with self.assertRaisesRegex(ValueError, "shift must be"):
                isometry_action(x, bad, fields)

    def test_dtypes_and_devices(self):
        fields = (1, 1, 1)
        numbers = torch.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5) - 60
        signed = [
            torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
            torch.int8, torch.int16, torch.int32, torch.int64,
        ]
        for dtype in signed:
            with self.subTest(dtype):
                x = numbers.to(dtype)
                y = isometry_action(x, 7, fields)
                self.assertEqual(y.dtype, dtype)
                self.assertTrue(torch.equal(y, isometry_action(numbers, 7, fields).to(dtype)))
        for dtype in (torch.uint8, torch.bool):
            x = (numbers % 3 == 0).to(dtype)
            expected = isometry_action(x.long(), 7, (2, 0, 1))
            self.assertTrue(torch.equal(isometry_action(x, 7, (2, 0, 1)).long(), expected))
            message = f"negative numbers, got {dtype}"
            with self.subTest(dtype), self.assertRaisesRegex(ValueError, message):
                gauge_transform(x, fields)
        y = isometry_action(numbers.to("meta"), 7, fields)
        self.assertEqual((y.device.type, y.shape), ("meta", numbers.shape))

    def test_bad_arguments(self):
        x = features((1, 1, 1), 3, 4)
        for bad in (1.0, "1", None, True):
            with self.assertRaisesRegex(ValueError, "shift must be an integer"):
                isometry_action(x, bad, (1, 1, 1))
        for act_on in (gauge_transform, lambda x, fields: isometry_action(x, 1, fields)):
            with self.assertRaisesRegex(ValueError, "expected 5 channels"):
                act_on(x, (2, 1, 1))
            for bad in (x[0], x[:, :, :0], x[..., :0]):
                with self.assertRaisesRegex(ValueError, "4-d .* W, L >= 1"):
                    act_on(bad, (1, 1, 1))


# ==================================================================================================
# nn_layers.py


class TestTransportPad(Case):
    def test_is_a_window_of_the_double_cover(self):
        sizes = [(4, 3), (3, 4)]
        for fields, pad, (width, length) in itertools.product(FIELDS, (0, 1, 2, 3), sizes):
            with self.subTest(fields=fields, pad=pad, length=length):
                x = features(fields, width, length)
                before = x.clone()
                padded = transport_pad(x, pad, fields)
                expected = reference_cover(x, fields, -pad, length + pad)
                self.assertClose(padded[:, :, pad:pad + width], expected)
                shape = (2, channels(fields), width + 2 * pad, length + 2 * pad)
                self.assertEqual(padded.shape, shape)
                above, below = padded[:, :, :pad], padded[:, :, pad + width:]
                self.assertTrue((above == 0).all() and (below == 0).all())
                self.assertTrue(torch.equal(x, before))

    def test_naive_is_the_one_of_scalars(self):
        x = features((0, 1, 2), 6, 7)
        for k in KERNEL_SIZES:
            self.assertTrue(torch.equal(MobiusPadNaive(k)(x), transport_pad(x, k // 2, (5, 0, 0))))
        self.assertNotClose(MobiusPadNaive(3)(x), transport_pad(x, 1, (0, 1, 2)))

    def test_bad_arguments(self):
        for k in (0, 2, -1, 3.0, "3", None, True):
            with self.assertRaisesRegex(ValueError, f"kernel_size must be .* got {k!r}"):
                MobiusPadNaive(k)
        with self.assertRaisesRegex(ValueError, "4-d"):
            MobiusPadNaive(3)(torch.zeros(1, 2, 3))
        with self.assertRaisesRegex(ValueError, "L = 1"):
            MobiusPadNaive(5)(torch.zeros(1, 2, 3, 1))
        with self.assertRaisesRegex(ValueError, "pad must be an integer, got 1.5"):
            transport_pad(torch.zeros(1, 1, 3, 3), 1.5, (1, 0, 0))
        for pad in (-1, 4):
            with self.assertRaisesRegex(ValueError, f"padding by {pad}"):
                transport_pad(torch.zeros(1, 1, 3, 3), pad, (1, 0, 0))


class TestMobiusConv(Case):
    SHAPES = {  # of o = 3 output fields and i = 2 input fields, as published
        "triv2triv": lambda k: (3, 2, k // 2 + 1, k),
        "sign2sign": lambda k: (3, 2, k // 2 + 1, k),
        "triv2sign": lambda k: (3, 2, k // 2, k),
        "sign2triv": lambda k: (3, 2, k // 2, k),
        "triv2reg": lambda k: (3, 2, k, k),
        "sign2reg": lambda k: (3, 2, k, k),
        "reg2triv": lambda k: (3, 2, k, k),
        "reg2sign": lambda k: (3, 2, k, k),
        "reg2reg": lambda k: (3, 4, k, k),
    }

    def test_parameters(self):
        for (i, in_fields), (o, out_fields), k in itertools.product(
            TYPES.items(), TYPES.items(), KERNEL_SIZES
        ):
            with self.subTest(block=f"{i}2{o}", k=k):
                conv = MobiusConv([2 * m for m in in_fields], [3 * m for m in out_fields], k)
                expected = {f"weights_{i}2{o}": self.SHAPES[f"{i}2{o}"](k)}
                if o != "sign":
                    expected[f"bias_{o}"] = (3,)
                shapes = {name: tuple(p.shape) for name, p in conv.named_parameters()}
                self.assertEqual(shapes, expected)
        names = {f"weights_{block}" for block in self.SHAPES} | {"bias_triv", "bias_reg"}
        self.assertEqual(set(MobiusConv((1, 1, 1), (1, 1, 1), 3).state_dict()), names)

    def test_kernel_is_steerable(self):
        all_fields = FIELDS + list(TYPES.values())
        for in_fields, out_fields, k in itertools.product(all_fields, all_fields, KERNEL_SIZES):
            with self.subTest(in_fields=in_fields, out_fields=out_fields, k=k):
                conv = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE))
                kernel, _ = conv.expand()
                self.assertEqual(kernel.shape, (channels(out_fields), channels(in_fields), k, k))
                rho_out, rho_in = rho_matrix(out_fields), rho_matrix(in_fields)
                expected = torch.einsum("ab,bcwl,cd->adwl", rho_out, kernel, rho_in.inverse())
                self.assertClose(kernel.flip(2), expected)

    def test_kernels_are_all_steerable_ones(self):
        """As many free parameters as the steerable kernels have dimensions, none of them idle."""
        for in_fields, out_fields, k in itertools.product(TYPES.values(), TYPES.values(), (1, 3)):
            conv = MobiusConv(in_fields, out_fields, k, dtype=DOUBLE)
            weights = {name: p for name, p in conv.named_parameters() if name.startswith("weights")}

            def expand(flat):
                values = dict(zip(weights, flat.split([p.numel() for p in weights.values()])))
                values = {name: value.view_as(weights[name]) for name, value in values.items()}
                with torch.no_grad():
                    for name, parameter in weights.items():
                        parameter.copy_(values[name])
                return conv.expand()[0].detach().flatten()

            size = sum(p.numel() for p in weights.values())
            rows = [expand(row) for row in torch.eye(size, dtype=DOUBLE)]
            basis = torch.stack(rows) if size else torch.zeros(0, 1)
            # The projector on steerable kernels is the mean of the identity and of
            # K -> rho_out K(s.v) rho_in^-1.
            flip = torch.eye(k, dtype=DOUBLE).flip(0)
            action = torch.kron(
                torch.kron(rho_matrix(out_fields), rho_matrix(in_fields)),
                torch.kron(flip, torch.eye(k, dtype=DOUBLE)),
            )
            dimension = round((len(action) + action.trace().item()) / 2)
            with self.subTest(in_fields=in_fields, out_fields=out_fields, k=k):
                self.assertEqual(size, dimension)
                self.assertEqual(int(torch.linalg.matrix_rank(basis)) if size else 0, dimension)

    def test_layout_of_the_stored_blocks(self):
        """What stands in a checkpoint stands where the published layout has it."""
        k, centre = 5, 2
        for (i, in_fields), (o, out_fields) in itertools.product(TYPES.items(), TYPES.items()):
            conv = randomized(
                MobiusConv([2 * m for m in in_fields], [3 * m for m in out_fields], k, dtype=DOUBLE)
            )
            stored, kernel = getattr(conv, f"weights_{i}2{o}"), conv.expand()[0]
            d_out, d_in = (2 if o == "reg" else 1), (2 if i == "reg" else 1)
            with self.subTest(block=f"{i}2{o}"):
                if "reg" not in (i, o):
                    self.assertClose(kernel[:, :, :stored.shape[2]], stored)
                    if i != o:
                        self.assertTrue((kernel[:, :, centre] == 0).all())
                elif i == o:
                    self.assertClose(kernel[::2], stored)  # K11, K12 interleaved
                else:
                    self.assertClose(kernel[::d_out, ::d_in], stored)

    def test_expands_by_the_table(self):
        for in_fields, out_fields, k in itertools.product(FIELDS, FIELDS, KERNEL_SIZES):
            conv = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE))
            parameters = dict(conv.named_parameters())
            kernel, bias = conv.expand()
            with self.subTest(in_fields=in_fields, out_fields=out_fields, k=k):
                expected = steerable_kernel(parameters, conv.in_fields, conv.out_fields)
                self.assertEqual(kernel.tolist(), expected.tolist())
                if bias is not None:
                    expected = invariant_bias(parameters, conv.out_fields)
                    self.assertEqual(bias.tolist(), expected.tolist())

    def test_made_without_memory(self):
        """On "meta" there are no values, and none in the memory that to_empty() takes."""
        conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 3))
        for assign in (False, True):
            loaded = MobiusConv((1, 1, 1), (1, 1, 1), 3, device="meta")
            if not assign:
                loaded.to_empty(device="cpu")
            loaded.load_state_dict(conv.state_dict(), assign=assign)
            self.assertEqual(loaded.expand()[0].tolist(), conv.expand()[0].tolist())
        filled = MobiusConv((1, 1, 1), (1, 1, 1), 3, device="meta").to_empty(device="cpu")
        for name, parameter in filled.named_parameters():  # one by one
            parameter.data.copy_(getattr(conv, name))
        self.assertEqual(filled.expand()[0].tolist(), conv.expand()[0].tolist())

    def test_averages_of_weights(self):
        """With buffers averaged too, the average of equal layers is this layer."""
        conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 3))
        average = torch.optim.swa_utils.AveragedModel(
            conv, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        for _ in range(5):
            average.update_parameters(conv)
        self.assertClose(average.module.expand()[0], conv.expand()[0], 1e-6)
        self.assertEqual(list(conv.buffers()), [])

    def test_bias_is_invariant(self):
        for fields in FIELDS:
            conv = randomized(MobiusConv((1, 0, 0), fields, 3, dtype=DOUBLE))
            _, bias = conv.expand()
            with self.subTest(fields):
                if fields[0] == fields[2] == 0:
                    self.assertIsNone(bias)
                    continue
                triv, sign, reg = fields
                self.assertClose(rho_matrix(fields) @ bias, bias)
                self.assertTrue((bias[triv:triv + sign] == 0).all())
                self.assertClose(bias[:triv], conv.bias_triv if triv else bias[:0])
                self.assertClose(bias[triv + sign::2], conv.bias_reg if reg else bias[:0])

    def test_is_the_convolution_on_the_double_cover(self):
        for k, (width, length) in itertools.product(KERNEL_SIZES, SIZES):
            in_fields, out_fields, p = (1, 2, 1), (2, 1, 1), k // 2
            conv = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE))
            x = features(in_fields, width, length)
            rows = F.pad(reference_cover(x, in_fields, -p, length + p), (0, 0, p, p))
            patches = rows.unfold(2, k, 1).unfold(3, k, 1)
            bias = torch.zeros(channels(out_fields), dtype=DOUBLE)
            bias[:2], bias[3:] = conv.bias_triv, conv.bias_reg
            without_bias = torch.einsum("ncwlab,ocab->nowl", patches, conv.expand()[0])
            expected = without_bias + bias[:, None, None]
            with self.subTest(k=k, width=width, length=length):
                self.assertClose(conv(x), expected)

    def test_gauge_equivariance(self):
        """In reflected frames the kernel's width axis is reversed; features come out reflected."""
        for in_fields, out_fields, k in itertools.product(FIELDS, FIELDS, KERNEL_SIZES):
            conv = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE))
            x = features(in_fields, 5, 6)
            padded = transport_pad(gauge_transform(x, in_fields), k // 2, in_fields)
            kernel, bias = conv.expand()
            reflected = F.conv2d(padded, kernel.flip(2), bias)
            with self.subTest(in_fields=in_fields, out_fields=out_fields, k=k):
                self.assertClose(reflected, gauge_transform(conv(x), out_fields))

    def test_isometry_equivariance(self):
        for in_fields, out_fields in itertools.product(FIELDS, FIELDS):
            for k, size in zip(KERNEL_SIZES, SIZES):
                conv = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE))
                assert_equivariant(conv, in_fields, out_fields, EXACT, size=size)
        for k, size in itertools.product(KERNEL_SIZES, SIZES + [(1, 3), (8, 6)]):
            conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), k, dtype=DOUBLE))
            assert_equivariant(conv, (1, 1, 1), (1, 1, 1), EXACT, size=size)

    def test_a_plain_convolution_is_not_equivariant(self):
        for fields in FIELDS:
            c = channels(fields)
            naive = nn.Sequential(MobiusPadNaive(3), nn.Conv2d(c, c, 3, dtype=DOUBLE))
            with self.subTest(fields):
                self.assertGreater(equivariance_error(naive, fields, fields), 0.1)
        # Transport padding alone is not enough, nor are steerable kernels without it.
        conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE))
        kernel = torch.ones(4, 4, 3, 3, dtype=DOUBLE).cumsum(2)
        for layer in (
            lambda x: F.conv2d(transport_pad(x, 1, (1, 1, 1)), kernel),
            lambda x: F.conv2d(MobiusPadNaive(3)(x), *conv.expand()),
        ):
            self.assertGreater(equivariance_error(layer, (1, 1, 1), (1, 1, 1)), 0.1)

    def test_moving_the_cut_changes_nothing(self):
        """Cut the strip elsewhere: the columns left of the new cut go to the end, reflected."""
        fields, width, length = (1, 1, 2), 5, 6
        conv = randomized(MobiusConv(fields, fields, 5, dtype=DOUBLE))

        def recut(x, column):
            return torch.cat([x[..., column:], act(fields, x[..., :column].flip(2))], dim=3)

        x = features(fields, width, length)
        for column in range(length + 1):
            self.assertClose(conv(recut(x, column)), recut(conv(x), column))

    def test_initialisation(self):
        conv = MobiusConv((10, 4, 8), (12, 16, 20), 5)
        std = 2 / math.sqrt(25 * (30 + 68))
        for name, parameter in conv.named_parameters():
            if name.startswith("bias"):
                self.assertTrue((parameter == 0).all(), name)
            else:
                self.assertAlmostEqual(parameter.std().item() / std, 1, delta=0.15, msg=name)
                self.assertAlmostEqual(parameter.mean().item() / std, 0, delta=0.15, msg=name)
        weight = conv.weights_reg2reg.clone()
        conv.reset_parameters()
        self.assertFalse(torch.equal(weight, conv.weights_reg2reg))

    def test_bad_arguments(self):
        for k in (0, 2, -1, -3, 3.0, "3", None, True):
            message = f"kernel_size must be an odd positive integer, got {k!r}"
            with self.assertRaisesRegex(ValueError, message):
                MobiusConv((1, 0, 0), (1, 0, 0), k)
        for bad in [(0, 0, 0), (1, -1, 0), (1, 0.5, 0), (1, 0)]:
            given = re.escape(repr(bad))
            with self.assertRaisesRegex(ValueError, rf"in_fields must be .* got {given}"):
                MobiusConv(bad, (1, 0, 0), 3)
            with self.assertRaisesRegex(ValueError, rf"out_fields must be .* got {given}"):
                MobiusConv((1, 0, 0), bad, 3)
        conv = MobiusConv((1, 1, 1), (1, 0, 0), 5)
        for bad, message in [
            ((4, 6, 6), "4-d"), ((1, 3, 6, 6), "4 channels"), ((1, 4, 6, 1), "L = 1"),
        ]:
            with self.assertRaisesRegex(ValueError, message):
                conv(torch.zeros(bad))
        self.assertEqual(conv(torch.zeros(1, 4, 6, 2)).shape, (1, 1, 6, 2))  # L = k // 2
        layers = (
            conv, EquivNonlin((1, 1, 1)), MobiusPool((1, 1, 1)), PolyphasePool((1, 1, 1)),
            EquivBatchNorm((1, 1, 1)), MobiusConvNaive(4, 4, 3),
        )
        for layer in layers:
            with self.assertRaisesRegex(ValueError, "torch.Tensor .*, got ndarray"):
                layer(np.zeros((1, 4, 6, 6), np.float32))
            with self.assertRaisesRegex(ValueError, "floating point numbers, got torch.int64"):
                layer(torch.zeros(1, 4, 6, 6, dtype=torch.long))


class TestEquivNonlin(Case):
    def test_parameters(self):
        shapes = {n: tuple(p.shape) for n, p in EquivNonlin((2, 3, 1)).named_parameters()}
        self.assertEqual(shapes, {"bias_sign": (1, 3, 1, 1)})
        self.assertTrue((EquivNonlin((2, 3, 1)).bias_sign == 0).all())
        self.assertEqual(list(EquivNonlin((2, 0, 1)).parameters()), [])

    def test_values(self):
        for fields in FIELDS:
            triv, sign, reg = fields
            layer = randomized(EquivNonlin(fields, dtype=DOUBLE))
            x = features(fields, 4, 5).numpy()
            elu = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
            if sign:
                values = x[:, triv:triv + sign]
                shifted = np.abs(values) + layer.bias_sign.detach().numpy()
                magnitude = np.where(shifted > 0, shifted, np.expm1(np.minimum(shifted, 0)))
                elu[:, triv:triv + sign] = np.sign(values) * magnitude
            with self.subTest(fields):
                self.assertClose(layer(torch.from_numpy(x)), torch.from_numpy(elu))

    def test_zeros_and_extremes(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            most, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
            values = torch.tensor(
                [0.0, -0.0, 1.0, -1.0, most, -most, least, -least, math.inf, -math.inf], dtype=dtype
            )
            for b in (-2.0, 0.0, 2.0):
                with self.subTest(dtype=dtype, b=b):
                    layer = EquivNonlin((1, 1, 1), dtype=dtype)
                    nn.init.constant_(layer.bias_sign, b)
                    x = values.expand(1, 4, 1, -1).clone().requires_grad_()
                    y = layer(x)
                    self.assertFalse(y.isnan().any())
                    self.assertTrue((y[0, 1, 0, :2] == 0).all())
                    y[..., :8].sum().backward()
                    self.assertFalse(x.grad.isnan().any() or layer.bias_sign.grad.isnan().any())

    def test_equivariance(self):
        for fields, size in itertools.product(FIELDS, SIZES):
            layer = randomized(EquivNonlin(fields, dtype=DOUBLE))
            assert_equivariant(layer, fields, fields, EXACT, size=size, pointwise=True)

    def test_zero_up_to_rounding(self):
        """The sign of noise is 0, as are the gradients; numbers beyond rounding keep theirs."""
        for dtype, function in itertools.product(
            (DOUBLE, torch.float32), ("by the twin", "by the formula")
        ):
            layer, eps = randomized(EquivNonlin((1, 1, 0), dtype=dtype)), torch.finfo(dtype).eps
            # 64 eps of 4 are 256 eps.
            x = torch.tensor([4.0, 0.0, 10 * eps, -200 * eps, 2000 * eps], dtype=dtype)
            x = torch.stack([torch.full_like(x, 100), x])[None, :, None].requires_grad_()
            with fast.disabled() if function == "by the formula" else contextlib.nullcontext():
                y = layer(x)
                grad, = torch.autograd.grad(y[:, 1].sum(), x)
            b = layer.bias_sign.item()
            elu = b if b > 0 else math.expm1(b)
            with self.subTest(dtype=dtype, function=function):
                self.assertEqual((y[0, 1, 0] == 0).tolist(), [False, True, True, True, False])
                self.assertEqual((grad[0, 1, 0] == 0).tolist(), [False, True, True, True, False])
                self.assertAlmostEqual(y[0, 1, 0, 4].item(), elu, delta=1e-3)
                self.assertTrue((grad[0, 0] == 0).all())
        with mock.patch.object(fields_module, "ROUNDING", 0):
            layer = randomized(EquivNonlin((0, 2, 0), dtype=DOUBLE))
            self.assertGreater(equivariance_error(layer, (0, 2, 0), (0, 2, 0)), 0.1)

    def test_rounding_is_that_of_each_sample(self):
        """A faint sample beside a loud one gives what it gives alone."""
        x = torch.cat([1e9 * features((1, 2, 0), 4, 6, n=1), features((1, 2, 0), 4, 6, n=1)])
        for layer in (randomized(EquivNonlin((1, 2, 0), dtype=DOUBLE)), MobiusPool((1, 2, 0)),
                      PolyphasePool((1, 2, 0))):
            alone = torch.cat([layer(sample) for sample in x.split(1)])
            self.assertTrue(torch.equal(layer(x), alone))

    def smoothed(self, sign_eps, b):
        layer = EquivNonlin((0, 1, 0), sign_eps, dtype=DOUBLE)
        nn.init.constant_(layer.bias_sign, b)
        return layer

    def test_smoothed_sign(self):
        """x / (|x| + sign_eps), values and gradients against the formula written out."""
        small = torch.tensor([1e-9, -1e-8, 1e-7, 0.0])
        x = torch.cat([torch.linspace(-2, 2, 41), small]).to(DOUBLE)
        for eps, b in itertools.product((1e-8, 1e-2), (-0.7, 0.0, 0.7)):
            layer, given = self.smoothed(eps, b), x.view(1, 1, 1, -1).clone().requires_grad_()
            y = layer(given)
            grads = torch.autograd.grad(y.sum(), (given, layer.bias_sign))
            magnitude, shifted = x.abs(), x.abs() + b
            elu = torch.where(shifted > 0, shifted, torch.expm1(shifted))
            slope = torch.where(shifted > 0, 1, shifted.exp())
            smooth = x / (magnitude + eps)
            by_x = eps / (magnitude + eps) ** 2 * elu + smooth * slope * x.sign()
            with self.subTest(eps=eps, b=b):
                self.assertClose(y.flatten(), smooth * elu)
                self.assertClose(grads[0].flatten() / by_x.abs().max(), by_x / by_x.abs().max())
                self.assertClose(grads[1].flatten(), (smooth * slope).sum()[None])
        mixed = EquivNonlin((1, 1, 1), 1e-8, dtype=DOUBLE)
        x = features((1, 1, 1), 3, 4)
        self.assertClose(mixed(x)[:, [0, 2, 3]], F.elu(x[:, [0, 2, 3]]))
        self.assertClose(mixed.export()(x), mixed(x))
        self.assertIn("sign_eps=1e-08", repr(mixed))

    def test_smoothed_sign_at_zero(self):
        """No nan. The gradient is the sign's jump, 2 ELU(b), with a variance like 1 / sign_eps."""
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            x = torch.zeros(1, 1, 2, 2, dtype=dtype, requires_grad=True)
            y = EquivNonlin((0, 1, 0), 1e-8, dtype=dtype)(x)
            y.sum().backward()
            self.assertTrue((y == 0).all() and not x.grad.isnan().any())
        grid = torch.linspace(-1e-3, 1e-3, 2_000_001, dtype=DOUBLE)  # in steps of 1e-9
        second_moments = []
        for eps in (1e-6, 1e-7):
            x = grid.view(1, 1, 1, -1).clone().requires_grad_()
            grad, = torch.autograd.grad(self.smoothed(eps, 0.7)(x).sum(), x)
            self.assertAlmostEqual((grad.sum() * 1e-9).item(), 2 * 0.7, delta=0.01)
            second_moments.append(grad.square().mean().item())
        self.assertAlmostEqual(second_moments[1] / second_moments[0], 10, delta=0.5)

    def test_bad_sign_eps(self):
        for bad in (-1e-8, math.nan, math.inf, "1e-8", None):
            message = f"sign_eps must be a finite number .* got {bad!r}"
            for make in (
                lambda: EquivNonlin((0, 1, 0), bad),
                lambda: build_model("mobius_mixed", sign_eps=bad),
            ):
                with self.assertRaisesRegex(ValueError, message):
                    make()
        message = "sign_eps must be 0 where there are no sign-flip fields, got 1e-08"
        for make in (
            lambda: EquivNonlin((1, 0, 1), 1e-8),
            lambda: MobiusGaugeCNN(mode="regular", sign_eps=1e-8),
            *(
                partial(build_model, name, sign_eps=1e-8)
                for name in ("cnn_same_params", "mobius_scalar")
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                make()

    def test_elu_alone_is_not_equivariant(self):
        self.assertGreater(equivariance_error(nn.ELU(), (0, 2, 0), (0, 2, 0)), 0.1)

    def test_bad_arguments(self):
        with self.assertRaisesRegex(ValueError, "in_fields"):
            EquivNonlin((0, 0, 0))
        for bad, message in [((4, 6, 6), "4-d"), ((1, 3, 6, 6), "4 channels")]:
            with self.assertRaisesRegex(ValueError, message):
                EquivNonlin((1, 1, 1))(torch.zeros(bad))


class TestMobiusPool(Case):
    @staticmethod
    def reference(x, fields):
        """Window by window, in Python."""
        triv, sign, _ = fields
        n, c, width, length = x.shape
        if length % 2:
            x = reference_cover(x, fields, 0, length + 1)
        rows = {
            0: [[range(w, w + 2) for w in range(0, width, 2)]],
            1: [
                [range(w, min(w + 2, width)) for w in range(0, width, 2)],
                [range(max(w, 0), w + 2) for w in range(-1, width, 2)],
            ],
        }[width % 2]
        y = torch.zeros(n, c, (width + 1) // 2, (length + 1) // 2, dtype=x.dtype)
        for i, j, column in itertools.product(range(n), range(c), range(y.shape[3])):
            for windows in rows:
                for w, window in enumerate(windows):
                    columns = (2 * column, 2 * column + 1)
                    values = [x[i, j, r, l].item() for r in window for l in columns]
                    if triv <= j < triv + sign:
                        largest = max(values, key=abs)
                        y[i, j, w, column] += 0 if -largest in values else largest
                    else:
                        y[i, j, w, column] += max(values)
        return y / len(rows)

    def test_values(self):
        sizes = SIZES + [(1, 2), (2, 1), (1, 1), (28, 28)]
        for fields, (width, length) in itertools.product(FIELDS, sizes):
            n = 1 if width == 28 else 2
            x = features(fields, width, length, n)
            with self.subTest(fields=fields, width=width, length=length):
                self.assertClose(MobiusPool(fields)(x), self.reference(x, fields))
                # Where all values are negative or small, a pad of zeros would win.
                self.assertClose(MobiusPool(fields)(-x.abs()), self.reference(-x.abs(), fields))

    def test_opposite_entries(self):
        """Of +a and -a neither wins, even if rounding made them differ: 0 is its own negative."""
        pool = MobiusPool((0, 1, 0))
        windows = itertools.permutations([2.0, -2.0, 1.0, -1.0])
        for window, noise in itertools.product(windows, (0, 1e-15, -1e-15)):
            values = torch.tensor(window, dtype=DOUBLE) + torch.tensor([noise, 0, 0, 0])
            x = values.reshape(1, 1, 2, 2).requires_grad_()
            y = pool(x)
            self.assertEqual(y.item(), 0)
            self.assertEqual(torch.autograd.grad(y, x)[0].abs().max().item(), 0)
        self.assertEqual(pool(torch.zeros(1, 1, 2, 2)).item(), 0)
        for fields, size in itertools.product([(0, 2, 0), (1, 2, 1)], SIZES):
            x = torch.randint(-2, 3, (20, channels(fields), *size)).double()
            for x in (x, 0.1 * x + 1e-15 * torch.rand_like(x)):
                reflected = MobiusPool(fields)(gauge_transform(x, fields))
                self.assertClose(reflected, gauge_transform(MobiusPool(fields)(x), fields))

    def test_equivariance(self):
        for fields, size in itertools.product(FIELDS, [(6, 8), (7, 8), (4, 6), (5, 2)]):
            assert_equivariant(
                MobiusPool(fields), fields, fields, EXACT, size=size, step=2, pointwise=True)
        for fields, size in itertools.product(FIELDS, [(6, 7), (5, 5)]):
            for x in (features(fields, *size), on_blank_strip(fields, *size)):
                reflected = MobiusPool(fields)(rounded(gauge_transform(x, fields)))
                self.assertClose(reflected, gauge_transform(MobiusPool(fields)(x), fields))

    def test_plain_pooling_is_not_equivariant(self):
        # The maximum of a sign-flip field is not odd.
        self.assertGreater(equivariance_error(nn.MaxPool2d(2), *[(0, 2, 0)] * 2, step=2), 0.1)
        # The windows are not those of the reflected strip.
        pool = nn.MaxPool2d(2, ceil_mode=True)
        error = equivariance_error(pool, *[(1, 0, 0)] * 2, size=(7, 8), step=2)
        self.assertGreater(error, 0.1)

    def test_dtypes(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            x = features((1, 1, 1), 7, 7).to(dtype)
            y = MobiusPool((1, 1, 1))(x)
            self.assertEqual(y.dtype, dtype)
            self.assertFalse(y.isnan().any())
        with self.assertRaisesRegex(ValueError, "floating point numbers, got torch.int64"):
            MobiusPool((3, 0, 0))(torch.zeros(2, 3, 6, 8, dtype=torch.long))
        largest = torch.full((1, 4, 3, 3), torch.finfo(torch.float16).max, dtype=torch.float16)
        self.assertTrue(MobiusPool((1, 1, 1))(largest).isfinite().all())

    def test_bad_arguments(self):
        with self.assertRaisesRegex(ValueError, "in_fields"):
            MobiusPool((0, 0))
        for bad, message in [((4, 6, 6), "4-d"), ((1, 3, 6, 6), "4 channels")]:
            for pool in POOLINGS.values():
                with self.assertRaisesRegex(ValueError, message):
                    pool((1, 1, 1))(torch.zeros(bad))
        for pooling in ("max", None, 2, ["fixed"]):
            with self.assertRaisesRegex(ValueError, "pooling must be one of fixed, polyphase, got"):
                build_model("mobius_regular", pooling=pooling)


class TestEquivBatchNorm(Case):
    @staticmethod
    def reference(layer, x):
        """Field by field: normalised values, means, unbiased variances."""
        triv, sign, _ = layer.in_fields
        y, means, variances, biases = torch.empty_like(x), [], [], iter(layer.bias)
        for field, weight in enumerate(layer.weight):
            is_reg = field >= triv + sign
            first = 2 * field - triv - sign if is_reg else field
            place = slice(first, first + 1 + is_reg)
            values = x[:, place]
            if triv <= field < triv + sign:
                variances.append(values.square().mean())
                y[:, place] = values / (variances[-1] + 1e-5).sqrt() * weight
            else:
                means.append(values.mean())
                variances.append(values.var())
                deviation = (values.var(correction=0) + 1e-5).sqrt()
                y[:, place] = (values - means[-1]) / deviation * weight + next(biases)
        return y, torch.stack(means), torch.stack(variances)

    def test_values_and_statistics(self):
        for size in ((4, 5), (1, 1)):
            layer = randomized(EquivBatchNorm((2, 3, 2), dtype=DOUBLE))
            x = 3 * features((2, 3, 2), *size, n=6) + 10
            y, mean, var = self.reference(layer, x)
            self.assertClose(layer(x), y)
            self.assertClose(layer.running_mean, 0.1 * mean)
            self.assertClose(layer.running_var, 0.9 + 0.1 * var)
            self.assertEqual(layer.num_batches_tracked, 1)

    def test_scalars_as_nn_batch_norm(self):
        """In training and evaluation: values, gradients, running statistics, state dict."""
        for options in ({}, {"momentum": None}, {"affine": False, "eps": 0.1, "momentum": 0.3}):
            layer = randomized(EquivBatchNorm((3, 0, 0), dtype=DOUBLE, **options))
            stock = nn.BatchNorm2d(3, dtype=DOUBLE, **options)
            stock.load_state_dict(layer.state_dict())
            for step in range(4):
                x = (features((3, 0, 0), 4, 5) + step).requires_grad_()
                y, expected = layer(x), stock(x)
                weights = torch.randn_like(y)
                with self.subTest(options, step=step):
                    self.assertClose(y, expected)
                    grads = torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])
                    others = torch.autograd.grad(
                        (expected * weights).sum(), [x, *stock.parameters()])
                    for grad, other in zip(grads, others):
                        self.assertClose(grad, other)
                    for name, value in stock.state_dict().items():
                        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)
                if step == 2:
                    layer.eval(), stock.eval()

    def test_equivariance(self):
        for fields, size, mode in itertools.product(FIELDS, SIZES, (True, False)):
            layer = randomized_norms(randomized(EquivBatchNorm(fields, dtype=DOUBLE))).train(mode)
            assert_equivariant(layer, fields, fields, EXACT, size=size, pointwise=True)

    def test_networks_on_digits(self):
        """In training, each digit moved by a shift of its own; beside nn.BatchNorm2d."""
        scalar, fields = (1, 0, 0), (2, 3, 2)
        digits, shifts = real_digits(7).to(DOUBLE), 2 * torch.tensor([0, 1, 6, 13, 14, 20, 27])
        for norm, mode in itertools.product((EquivBatchNorm, nn.BatchNorm2d), (True, False)):
            given = fields if norm is EquivBatchNorm else channels(fields)
            network = MobiusSequential(
                MobiusConv(scalar, fields, 5), norm(given), EquivNonlin(fields), MobiusPool(fields),
                MobiusConv(fields, fields, 5), norm(given), EquivNonlin(fields),
                MobiusConv(fields, fields, 3), norm(given),
            ).to(DOUBLE)
            for module in network:
                if isinstance(module, norm):
                    randomized(module)
            network = randomized_norms(network).train(mode)
            moved = network(isometry_action(digits, shifts, scalar))
            y = network(digits)
            error = (moved - isometry_action(y, shifts // 2, fields)).abs().max() / y.abs().max()
            with self.subTest(norm=norm, mode=mode):
                if norm is EquivBatchNorm:
                    self.assertLess(error, 1e-10)
                else:
                    self.assertGreater(error, 1e-2)

    def test_export(self):
        """Evaluation: an nn.BatchNorm2d. Training: one only where it computes the same."""
        for fields, affine in itertools.product(FIELDS, (True, False)):
            layer = randomized(EquivBatchNorm(fields, affine=affine, dtype=DOUBLE))
            for _ in range(3):
                layer(features(fields, 4, 5))
            x = features(fields, 4, 5)
            for mode in (True, False):
                exported = export(nn.Sequential(layer.train(mode)))[0]
                is_stock = not mode or fields == (2, 0, 0)
                self.assertIs(type(exported), nn.BatchNorm2d if is_stock else EquivBatchNorm)
                self.assertEqual(exported.training, mode)
                self.assertClose(exported(x), layer(x))
                self.assertClose(exported.eval()(x), layer.eval()(x))

    def test_half_precision(self):
        """As nn.BatchNorm2d: statistics and parameters in float32, output as the input."""
        for dtype in (torch.bfloat16, torch.float16):
            x = (features((2, 1, 1), 6, 8) + 5).to(dtype)
            layer = EquivBatchNorm((2, 1, 1))
            y = layer(x)
            self.assertEqual((y.dtype, layer.running_mean.dtype), (dtype, torch.float32))
            expected = EquivBatchNorm((2, 1, 1), dtype=DOUBLE)(x.double())
            self.assertClose(y.double(), expected, tolerance=0.02)
            with torch.autocast("cpu", dtype):
                self.assertEqual(layer(x).dtype, dtype)
                self.assertEqual(layer(x.float()).dtype, torch.float32)
            layer = randomized_norms(EquivBatchNorm((2, 1, 1), dtype=dtype)).eval()
            self.assertEqual(layer.export().weight.dtype, dtype)
            self.assertClose(layer(x), layer.export()(x), 2 * torch.finfo(dtype).eps)

    def test_bad_arguments(self):
        with self.assertRaisesRegex(ValueError, "in_fields"):
            EquivBatchNorm((0, 0, 0))
        layer = EquivBatchNorm((1, 1, 1))
        for bad, message in [
            (torch.zeros(4, 6, 6), "4-d"), (torch.zeros(1, 3, 6, 6), "4 channels"),
            (torch.zeros(1, 4, 6, 6, dtype=torch.long), "floating point numbers, got torch.int64"),
            (torch.zeros(1, 4, 1, 1), r"more than one value per channel, got shape \(1, 4, 1, 1\)"),
        ]:
            with self.assertRaisesRegex(ValueError, message):
                layer(bad)
        layer.eval()(torch.zeros(1, 4, 1, 1))


class TestMobiusSequential(Case):
    def test_matching_layers(self):
        fields = (1, 1, 1)
        layers = [
            MobiusConv((1, 0, 0), fields, 3), nn.Dropout2d(), EquivNonlin(fields),
            MobiusConv(fields, (2, 0, 0), 3), nn.ELU(),
        ]
        net, x = MobiusSequential(*layers).eval(), torch.rand(2, 1, 6, 8)
        self.assertEqual((net.in_fields, net.out_fields), ((1, 0, 0), (2, 0, 0)))
        self.assertTrue(torch.equal(net(x), nn.Sequential(*layers)(x)))
        self.assertEqual(list(net.state_dict()), list(nn.Sequential(*layers).state_dict()))
        named = MobiusSequential(collections.OrderedDict(first=net[0], last=net[2]))
        self.assertEqual(named.out_fields, fields)
        self.assertEqual(net[1:4].in_fields, fields)
        self.assertIsNone(MobiusSequential(nn.ELU(), MobiusSequential()).in_fields)
        self.assertClose(export(net)(x), net(x), tolerance=1e-5)

    def test_layers_that_do_not_match(self):
        first, last = MobiusConv((1, 0, 0), (4, 4, 4), 3), EquivNonlin((0, 0, 8))
        message = (
            r"layer 2 \(EquivNonlin\) has in_fields \(0, 0, 8\), "
            r"but layer 0 \(MobiusConv\) has out_fields \(4, 4, 4\)"
        )
        with self.assertRaisesRegex(ValueError, message):
            MobiusSequential(first, nn.Dropout2d(), last)
        with self.assertRaisesRegex(ValueError, r"layer b \(.*, but layer a \(MobiusSequential\)"):
            MobiusSequential(collections.OrderedDict(a=MobiusSequential(first), b=last))


# ==================================================================================================
# polyphase.py


class TestPolyphasePool(Case):
    EVEN = [(6, 8), (7, 8), (5, 6), (1, 4), (4, 2)]  # (W, L)

    def setUp(self):
        torch.manual_seed(0)

    @staticmethod
    def norms(x, fields) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what is pooled on the even and on the odd columns."""
        windows = strip_pool(x, Fields(*fields), step=1)
        return sample_norms(windows[..., 0::2]), sample_norms(windows[..., 1::2])

    def phase(self, x, fields) -> torch.Tensor:
        """p of each sample."""
        even, odd = self.norms(x, fields)
        return (odd > even).long()

    def untied(self, x, fields) -> torch.Tensor:
        """The samples of which one grid has the larger norm beyond rounding."""
        even, odd = self.norms(x, fields)
        return x[(even - odd).abs() > 1e-6 * even]

    def assertEquivariant(self, x, fields):
        """Under all isometries, as the docstring says, and under gauge transformations."""
        pool, shifts = PolyphasePool(fields), torch.tensor(all_shifts(x.shape[3]))
        y, p = pool(rounded(x)), self.phase(x, fields)
        self.assertClose(pool(rounded(gauge_transform(x, fields))), gauge_transform(y, fields))
        shifts, n = shifts.repeat(len(x)), len(shifts)
        x, y, p = (values.repeat_interleave(n, dim=0) for values in (x, y, p))
        after = (p + shifts) % 2
        expected = isometry_action(y, (shifts + p - after) // 2, fields)
        moved = rounded(isometry_action(x, shifts, fields))
        message = f"fields {fields}, {tuple(x.shape)}, moved by {shifts.tolist()}"
        self.assertClose(pool(moved), expected, message=message)

    @staticmethod
    def sparse(fields, n=80) -> torch.Tensor:
        """Few nonzero values, all different: often, each has a window of its own on both grids."""
        size = n * channels(fields) * 24
        values = (torch.randperm(size) + 1).to(DOUBLE).view(n, channels(fields), 4, 6)
        return values * (torch.rand(n, channels(fields), 4, 6) < 0.3 / channels(fields))

    def test_values(self):
        """The grid of the larger norm, window by window."""
        for fields, (width, length) in itertools.product(FIELDS, self.EVEN):
            x = self.untied(features(fields, width, length, n=4), fields)
            grids = torch.stack([
                TestMobiusPool.reference(reference_cover(x, fields, p, p + length), fields)
                for p in (0, 1)
            ])
            even, odd = grids.square().sum((2, 3, 4))
            expected = grids[(odd > even).long(), torch.arange(len(x))]
            with self.subTest(fields=fields, width=width, length=length):
                self.assertGreater(len(x), 0)
                self.assertClose(PolyphasePool(fields)(x), expected)

    def test_equivariance(self):
        for fields, size in itertools.product(FIELDS, self.EVEN):
            for make in (features, on_blank_strip):
                self.assertEquivariant(self.untied(make(fields, *size, n=8), fields), fields)

    def test_fixed_grid_is_not_equivariant(self):
        with self.assertRaises(AssertionError), mock.patch(f"{__name__}.PolyphasePool", MobiusPool):
            self.assertEquivariant(features((1, 1, 1), 6, 8), (1, 1, 1))

    def test_opposite_entries(self):
        """+a and -a in one window, equal but for rounding."""
        for fields, (width, length) in itertools.product([(0, 2, 0), (1, 2, 1)], self.EVEN):
            x = torch.randint(-2, 3, (20, channels(fields), width, length)).double()
            self.assertEquivariant(self.untied(0.1 * x, fields), fields)

    def test_ties(self):
        """Equal norms take the even grid."""
        for fields in FIELDS:
            x = self.sparse(fields)
            even, odd = self.norms(x, fields)
            tied = x[even == odd]
            self.assertGreater(len(tied), 3)
            self.assertClose(PolyphasePool(fields)(tied), MobiusPool(fields)(tied))

    def test_each_sample_on_its_own(self):
        fields = Fields(2, 1, 3)
        x, pool = features(fields, 6, 8, n=8), PolyphasePool(fields)
        x = torch.cat([x, isometry_action(x, 1, fields)])
        self.assertEqual(self.phase(x, fields).sum(), 8)
        self.assertClose(pool(x), torch.cat([pool(sample) for sample in x.split(1)]))

    def test_bad_input(self):
        with self.assertRaisesRegex(ValueError, "floating point numbers, got torch.int64"):
            PolyphasePool((3, 0, 0))(torch.zeros(2, 3, 6, 8, dtype=torch.long))
        for name in ("mobius_scalar", "cnn_same_params"):
            with self.assertRaisesRegex(ValueError, r"multiple of 4, got shape \(2, 1, 28, 26\)"):
                build_model(name, pooling="polyphase")(torch.zeros(2, 1, 28, 26))
            build_model(name)(torch.zeros(2, 1, 28, 26))
        with self.assertRaisesRegex(ValueError, r"even length L, got shape \(2, 3, 6, 7\)"):
            PolyphasePool((3, 0, 0))(torch.zeros(2, 3, 6, 7))

    @staticmethod
    def on_both_grids(fields, width, length=2) -> torch.Tensor:
        """A sample, and the same one moved by a column."""
        x = features(fields, width, length, n=1)
        return torch.cat([x, isometry_action(x, 1, fields)])

    def test_gradients(self):
        for fields, width in (((1, 1, 1), 4), ((1, 1, 1), 3), ((0, 0, 2), 4)):
            pool, x = PolyphasePool(fields), self.on_both_grids(fields, width).requires_grad_()
            with self.subTest(fields=fields, width=width):
                self.assertTrue(torch.autograd.gradcheck(
                    pool, x, check_forward_ad=True, check_batched_grad=True))
                self.assertTrue(torch.autograd.gradgradcheck(pool, x))
                weights = torch.randn_like(pool(x))
                (expected,) = torch.autograd.grad((pool(x) * weights).sum(), x)
                self.assertClose(torch.func.grad(lambda x: (pool(x) * weights).sum())(x), expected)

    def test_tools(self):
        pool, x = PolyphasePool((1, 1, 1)), self.on_both_grids((1, 1, 1), 3, 4)
        self.assertEqual(pool(x.to("meta")).shape, pool(x).shape)
        torch.compiler.reset()
        compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(pool, (x,)).module()
        by_sample = torch.vmap(lambda sample: pool(sample[None])[0])
        for other in (compiled, exported, by_sample, copy.deepcopy(pool)):
            self.assertTrue(torch.equal(other(x), pool(x)))

    def test_dtypes(self):
        fields = (1, 1, 1)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            pool, x = PolyphasePool(fields), features(fields, 6, 8, n=8).to(dtype)
            self.assertEqual(pool(x).dtype, dtype)
            self.assertTrue(torch.equal(pool(x).double(), pool(x.double())))
        largest = torch.full((1, 4, 4, 4), torch.finfo(torch.float16).max, dtype=torch.float16)
        self.assertTrue(pool(largest).isfinite().all())


class TestTorchHabits(Case):
    """The layers in the company of PyTorch's own tools."""

    LAYERS = [
        lambda **factory: MobiusConv((1, 1, 1), (1, 2, 1), 3, **factory),
        lambda **factory: EquivNonlin((1, 1, 1), **factory),
        lambda **factory: MobiusPool((1, 1, 1)),
        lambda **factory: MobiusPadNaive(3),
        lambda **factory: EquivNonlin((1, 1, 1), 1e-2, **factory),
        lambda **factory: MobiusConvNaive(4, 4, 3, **factory),
        lambda **factory: EquivBatchNorm((1, 1, 1), **factory),
    ]

    def test_gradcheck(self):
        for make in self.LAYERS:
            layer = randomized(make(dtype=DOUBLE))
            parameters = dict(layer.named_parameters())
            x = features((1, 1, 1), 5, 5, n=1).requires_grad_()

            def call(x, *values):
                return torch.func.functional_call(layer, dict(zip(parameters, values)), (x,))

            with self.subTest(layer):
                values = [p.detach().clone().requires_grad_() for p in parameters.values()]
                self.assertTrue(torch.autograd.gradcheck(call, (x, *values)))

    def test_dtype_and_device(self):
        for make in self.LAYERS:
            parameters = make(device="meta", dtype=DOUBLE).parameters()
            self.assertTrue(all(p.is_meta and p.dtype == torch.float64 for p in parameters))
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                x = features((1, 1, 1), 6, 7).to(dtype)
                self.assertEqual(make(dtype=dtype)(x).dtype, dtype)

    def test_autocast(self):
        for make in self.LAYERS[:3]:
            layer, x = make(), features((1, 1, 1), 6, 8).float()
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            self.assertClose(y.float(), layer(x), tolerance=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(self.LAYERS[0]()(x).dtype, torch.bfloat16)

    def test_channels_last(self):
        for make in self.LAYERS:
            layer, x = randomized(make(dtype=DOUBLE)), features((1, 1, 1), 6, 8)
            self.assertClose(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))

    def test_inputs_and_copies(self):
        for make in self.LAYERS:
            layer, x = randomized(make(dtype=DOUBLE)), features((1, 1, 1), 7, 7)
            before, twin = x.clone(), copy.deepcopy(layer)
            y = layer(x)
            self.assertTrue(torch.equal(x, before))
            self.assertTrue(torch.equal(twin(x), y))
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
            self.assertTrue(torch.equal(twin(x), y))
            self.assertIn(type(layer).__name__, repr(layer))

    def test_compile(self):
        """Those that the networks of TestInvariance do not have, in one graph."""
        layers, x = nn.Sequential(*(make() for make in self.LAYERS[2:5])), features((1, 1, 1), 7, 7)
        torch.compiler.reset()
        compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
        self.assertClose(compiled(x), layers(x))

    @unittest.skipUnless(
        shutil.which("c++") or shutil.which("g++"), "torch.compile needs a C++ compiler on the CPU"
    )
    def test_compile_with_the_default_backend(self):
        layers = nn.Sequential(
            MobiusConv((1, 0, 0), (1, 1, 1), 3), EquivNonlin((1, 1, 1)), MobiusPool((1, 1, 1))
        )
        layer = randomized(layers)
        x = torch.randn(2, 1, 8, 8)
        torch.compiler.reset()
        self.assertClose(torch.compile(layer, fullgraph=True)(x), layer(x), tolerance=1e-4)


# ==================================================================================================
# models.py


class TestModels(Case):
    def setUp(self):
        torch.manual_seed(0)

    def test_parameter_counts(self):
        self.assertEqual({name: count_parameters(build_model(name)) for name in MODELS}, PARAMETERS)

    def test_script_prints_the_counts(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(ROOT / "models.py"), run_name="__main__")
        for name, count in PARAMETERS.items():
            self.assertRegex(printed.getvalue(), rf"{name} .* {count:,}\b")

    def test_state_dict_of_a_gauge_cnn(self):
        """Keys and shapes of mobius_mixed, written out from the published layout."""
        blocks = TestMobiusConv.SHAPES
        fields = [(1, 0, 0)] + [(n, n, n) for n in (4, 8, 16, 32, 64)] + [(64, 0, 0)]
        expected = {}
        for index, (i, o) in zip((0, 2, 5, 7, 10, 12), itertools.pairwise(fields)):
            i, o = dict(zip(TYPES, i)), dict(zip(TYPES, o))
            for a, b in itertools.product(TYPES, TYPES):
                if i[a] and o[b]:
                    _, columns, rows, k = blocks[f"{a}2{b}"](5)
                    shape = (o[b], columns // 2 * i[a], rows, k)
                    expected[f"mobius_cnn.{index}.weights_{a}2{b}"] = shape
            for b in ("triv", "reg"):
                if o[b]:
                    expected[f"mobius_cnn.{index}.bias_{b}"] = (o[b],)
        expected |= {
            f"mobius_cnn.{index}.bias_sign": (1, n, 1, 1)
            for index, n in zip((1, 3, 6, 8, 11), (4, 8, 16, 32, 64))
        }
        self.assertEqual(self.shapes("mobius_mixed"), expected | self.classifier())

    def test_state_dict_of_a_cnn(self):
        for name, widths in (
            ("cnn_same_channels", (1, 16, 32, 64, 128, 256, 64)),
            ("cnn_same_params", (1, 11, 22, 45, 90, 181, 64)),
        ):
            expected = {}
            for index, (i, o) in zip((1, 4, 8, 11, 15, 18), itertools.pairwise(widths)):
                expected |= {f"cnn.{index}.weight": (o, i, 5, 5), f"cnn.{index}.bias": (o,)}
            self.assertEqual(self.shapes(name), expected | self.classifier())

    @staticmethod
    def shapes(name):
        return {key: tuple(value.shape) for key, value in build_model(name).state_dict().items()}

    @staticmethod
    def classifier():
        def norm(n):
            return {
                "weight": (n,), "bias": (n,), "running_mean": (n,), "running_var": (n,),
                "num_batches_tracked": (),
            }

        def linear(i, o):
            return {"weight": (o, i), "bias": (o,)}

        layers = {0: norm(64), 3: linear(64, 32), 4: norm(32), 7: linear(32, 10)}
        return {
            f"classifier.{index}.{key}": shape
            for index, layer in layers.items() for key, shape in layer.items()
        }

    def test_field_types_of_each_mode(self):
        for mode, base in MODES.items():
            convs = [m for m in MobiusGaugeCNN(mode=mode).mobius_cnn if isinstance(m, MobiusConv)]
            expected = [tuple(n * m for m in base) for n in (4, 8, 16, 32, 64)] + [(64, 0, 0)]
            self.assertEqual([conv.out_fields for conv in convs], expected)

    def test_architecture(self):
        """The logits are those of the layers, one after the other."""
        def classify(model, y):
            bn1, _, drop1, linear1, bn2, _, drop2, linear2 = model.classifier
            self.assertEqual((drop1.p, drop2.p), (0.3, 0.3))
            for bn, linear in ((bn1, linear1), (bn2, linear2)):
                y = (y - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias
                y = F.linear(F.elu(y), linear.weight, linear.bias)
            return y

        x = torch.rand(2, 1, 28, 28, dtype=DOUBLE)
        for name in MODELS:
            model = randomized_norms(build_model(name, dtype=DOUBLE)).eval()
            y = x
            if name.startswith("cnn"):
                for index in (1, 4, 8, 11, 15, 18):
                    conv = model.cnn[index]
                    y = F.conv2d(transport_pad(y, 2, (y.shape[1], 0, 0)), conv.weight, conv.bias)
                    y = F.elu(y) if index < 18 else y
                    y = F.max_pool2d(y, 2) if index in (4, 11) else y
            else:
                layers = model.mobius_cnn
                for conv, nonlin in ((0, 1), (2, 3), (5, 6), (7, 8), (10, 11), (12, None)):
                    y = layers[conv](y)
                    if nonlin and not isinstance(layers[nonlin], EquivNonlin):
                        nonlin += 1  # pooled before, where that gives the same
                    y = layers[nonlin](y) if nonlin else y
                    y = MobiusPool(layers[conv].out_fields)(y) if conv in (2, 7) else y
            with self.subTest(name):
                self.assertClose(model(x), classify(model, y.flatten(2).max(2).values))


    def test_pooling_has_no_parameters(self):
        """Weights of the published networks go into those with polyphase pooling, and back."""
        for name in ("mobius_mixed", "cnn_same_params"):
            published, ours = build_model(name), build_model(name, pooling="polyphase")
            ours.load_state_dict(published.state_dict())
            x = torch.rand(4, 1, 28, 28)
            self.assertNotClose(published.eval()(x), ours.eval()(x))

    def test_moving_the_cut_changes_nothing(self):
        model = randomized_norms(MobiusGaugeCNN(mode="mixed", dtype=DOUBLE)).eval()
        x = torch.cat([torch.rand(1, 1, 28, 28), real_digits(1)]).to(DOUBLE)
        for column in range(0, 28, 4):
            recut = torch.cat([x[..., column:], x[..., :column].flip(2)], dim=3)
            self.assertClose(model(recut), model(x))

    def test_arguments(self):
        x = torch.rand(2, 3, 12, 16)
        for cls, arguments in [(MobiusGaugeCNN, {"mode": "mixed"}), (CNN, {"fix_params": True})]:
            for k in (1, 3):
                model = cls(kernel_size=k, ch_in=3, classes=7, **arguments).eval()
                self.assertEqual(model(x).shape, (2, 7))
            for bad in (
                {"ch_in": 0}, {"classes": -1}, {"ch_in": 1.5}, {"kernel_size": 4}, {"dropout": 1.5},
                {"pooling": "max"},
            ):
                with self.assertRaisesRegex(ValueError, next(iter(bad))):
                    cls(**bad)
        message = "scalar, signflip, regular, irrep, mixed, got 'regulr'"
        with self.assertRaisesRegex(ValueError, message):
            MobiusGaugeCNN(mode="regulr")
        for bad in ("resnet", None, ["mobius_regular"]):
            message = f"{', '.join(MODELS)}, got {re.escape(repr(bad))}"
            with self.assertRaisesRegex(ValueError, message):
                build_model(bad)

    def test_weights_travel(self):
        for name in MODELS:
            model, twin = build_model(name).eval(), build_model(name).eval()
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            file.seek(0)
            twin.load_state_dict(torch.load(file, weights_only=True))
            x = torch.rand(2, 1, 28, 28)
            self.assertTrue(torch.equal(model(x), twin(x)))
            self.assertTrue(torch.equal(copy.deepcopy(model)(x), model(x)))

    def test_autocast(self):
        for name in MODELS:
            model, x = build_model(name).eval(), torch.rand(2, 1, 28, 28)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            self.assertTrue(logits.isfinite().all())
            # Without a trained b, sign-flip fields are linear, and small differences of large
            # values remain at the end.
            self.assertLess((logits.float() - model(x)).norm(), 0.25 * model(x).norm(), name)


def real_digits(n: int) -> torch.Tensor:
    """scikit-learn's digits on their strips, ``(n, 1, 28, 28)``.

    Most of a strip is blank: noise would hide what goes wrong there, where values are 0 up to
    rounding.
    """
    return convert_mnist.load_digits()[0].images[:n]


class TestInvariance(Case):
    """Logits of networks with random biases, for digits and noise moved by isometries."""

    def setUp(self):
        torch.manual_seed(0)

    @staticmethod
    def networks(dtype, modes=MODES, poolings=POOLINGS, kernel_size=5):
        for mode, pooling in itertools.product(modes, poolings):
            model = MobiusGaugeCNN(kernel_size, mode=mode, pooling=pooling, dtype=dtype)
            yield mode, pooling, randomized_norms(model).eval()

    @staticmethod
    def changes(network, dtype, shifts) -> torch.Tensor:
        """How far logits are from their median over the shifts, relative to the largest.

        Returns:
            ``(shifts, images)``.
        """
        images = torch.cat([real_digits(1), torch.rand(1, 1, 28, 28)]).to(dtype)
        with torch.no_grad():
            logits = network(torch.cat([isometry_action(images, t, (1, 0, 0)) for t in shifts]))
        logits = logits.view(len(shifts), len(images), -1)
        return (logits - logits.median(0).values).abs().amax(2) / logits.abs().max()

    def assertInvariant(self, network, pooling, dtype, every=1):
        """Under `every` isometry, with fixed pooling `every` fourth one."""
        step = every if pooling == "polyphase" else 4 * every
        changes = self.changes(network, dtype, range(0, 56, step))
        if dtype == DOUBLE:
            self.assertLess(changes.max(), 1e-9)
        else:  # rounding can take a value across the limit of what counts as 0
            self.assertGreaterEqual((changes < 1e-4).double().mean(), 0.95)

    def test_float64(self):
        for mode, pooling, network in self.networks(DOUBLE):
            with self.subTest(mode=mode, pooling=pooling):
                self.assertInvariant(network, pooling, DOUBLE)

    def test_float64_by_the_formulas(self):
        with fast.disabled():
            for mode, pooling, network in self.networks(DOUBLE, kernel_size=3):
                with self.subTest(mode=mode, pooling=pooling):
                    self.assertInvariant(network, pooling, DOUBLE, every=5)

    def test_float32(self):
        for mode, pooling, network in self.networks(torch.float32):
            with self.subTest(mode=mode, pooling=pooling):
                self.assertInvariant(network, pooling, torch.float32)
                self.assertInvariant(export(network), pooling, torch.float32, every=5)
                with fast.disabled():
                    self.assertInvariant(network, pooling, torch.float32, every=9)

    def test_exported_and_compiled(self):
        """By torch.export and torch.compile: the same logits wherever the digit is."""
        cnn = build_model("cnn_same_params", dtype=DOUBLE)
        ((*_, gauge_cnn),) = self.networks(DOUBLE, modes=("mixed",), poolings=("polyphase",))
        digit, shapes = real_digits(1).to(DOUBLE), {"x": {0: torch.export.Dim("batch")}}
        images = torch.cat([isometry_action(digit, t, (1, 0, 0)) for t in (0, 1, 6, 31, 52)])
        for network in (randomized_norms(cnn).eval(), gauge_cnn):
            exported = torch.export.export(network, (images[:2],), dynamic_shapes=shapes)
            torch.compiler.reset()
            compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
            for way in (exported.module(), compiled):
                with self.subTest(type(network), way=type(way)), torch.no_grad():
                    logits = way(images)
                    self.assertClose(logits, network(images))
                    same = self.assertNotClose if network is not gauge_cnn else self.assertClose
                    same(logits, logits[:1].expand_as(logits))

    def test_without_rounding_the_sign_breaks_it(self):
        """Negative control: sign(x) of noise."""
        with mock.patch.object(fields_module, "ROUNDING", 0):
            modes = ("signflip", "irrep", "mixed")
            for mode, pooling, network in self.networks(DOUBLE, modes=modes):
                with self.subTest(mode=mode, pooling=pooling), self.assertRaises(AssertionError):
                    self.assertInvariant(network, pooling, DOUBLE, every=5)

    def test_fixed_pooling_every_fourth_only(self):
        for mode, _, network in self.networks(torch.float32, poolings=("fixed",)):
            self.assertGreater(self.changes(network, torch.float32, range(4)).max(), 1e-3, mode)

    def test_cnns_are_not_invariant(self):
        for name, pooling in itertools.product(("cnn_same_channels", "cnn_same_params"), POOLINGS):
            network = build_model(name, kernel_size=3, pooling=pooling, dtype=DOUBLE)
            network = randomized_norms(network).eval()
            with self.subTest(name, pooling=pooling), self.assertRaises(AssertionError):
                self.assertInvariant(network, pooling, DOUBLE, every=4)


class TestExport(Case):
    def test_layers(self):
        for in_fields, out_fields, k in itertools.product(FIELDS, FIELDS, (1, 5)):
            layer, x = (
                randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE)),
                features(in_fields, 6, 7),
            )
            exported = layer.export()
            self.assertEqual([type(m) for m in exported], [TransportPad, nn.Conv2d])
            self.assertClose(exported(x), layer(x))
            before = exported(x)
            randomized(layer)
            self.assertClose(exported(x), before)
        self.assertIsInstance(EquivNonlin((1, 0, 2)).export(), nn.ELU)

    def test_models(self):
        for name in MODELS:
            model, x = (
                randomized_norms(build_model(name, dtype=DOUBLE)).eval(),
                torch.rand(2, 1, 28, 28, dtype=DOUBLE),
            )
            exported = export(model)
            kinds = {type(m) for m in exported.modules()}
            self.assertFalse({MobiusConv, MobiusConvNaive} & kinds)
            self.assertFalse(exported.training)
            self.assertClose(exported(x), model(x))
            self.assertTrue(export(model.train()).training)

    def test_shared_layers(self):
        conv = MobiusConv((1, 0, 0), (1, 0, 0), 3)
        conv.requires_grad_(False)
        exported = export(nn.Sequential(conv, EquivNonlin((1, 0, 0)), conv))
        self.assertIs(exported[0], exported[2])
        self.assertFalse(exported[0][1].weight.requires_grad)
        self.assertIsInstance(export(conv), nn.Sequential)

    def test_torch_export(self):
        fields, x = (1, 1, 1), features((1, 1, 1), 6, 8)
        layers = MobiusConv(fields, fields, 3, dtype=DOUBLE), EquivNonlin(fields, dtype=DOUBLE)
        model = export(randomized(nn.Sequential(*layers, MobiusPool(fields))))
        program = torch.export.export(model, (x,))
        self.assertClose(program.module()(x), model(x))

    @unittest.skipUnless(
        find_spec("onnx") and find_spec("onnxruntime"), "onnx and onnxruntime are not installed"
    )
    def test_onnx(self):
        import onnxruntime

        x = torch.rand(3, 1, 28, 28)
        exporters = (False, True) if find_spec("onnxscript") else (False,)
        for pooling, dynamo in itertools.product(POOLINGS, exporters):
            model = export(build_model("mobius_mixed", pooling=pooling).eval())
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "model.onnx")
                with contextlib.redirect_stdout(io.StringIO()):
                    torch.onnx.export(model, (x,), path, dynamo=dynamo)
                session = onnxruntime.InferenceSession(path)
                (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            self.assertClose(torch.from_numpy(y), model(x).detach(), tolerance=1e-4)


# ==================================================================================================
# The runner. Each of two cores takes every other file, which makes their shares about as long.

ORDER = ("unit_tests", "test_train", "test_gpu_path", "test_reproduce", "test_checkpoints",
         "test_fast", "test_pages", "test_visualize", "test_equivariance", "test_benchmark",
         "test_own_data", "test_new_model")
PATHS = [ROOT / "unit_tests.py", *sorted(ROOT.glob("tests/test_*.py"))]
PATHS.sort(key=lambda path: (*ORDER, path.stem).index(path.stem))
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}
CLOSING = r"(?m)^(\d+) passed, (\d+) failed, (\d+) skipped\n"
SURVIVED = r"(?m)^survived (\d+) (.+)$"


class Loader(unittest.TestLoader):
    def loadTestsFromName(self, name, module=None):
        """A file, or a class, or a test; a class is looked for in every file."""
        for file, path in FILES.items():
            if f"\nclass {name.split('.')[0]}(" in path.read_text(encoding="utf-8"):
                name = f"{file}.{name}"
        return super().loadTestsFromName(name)


def run_here() -> collections.Counter:
    """Run the tests that the arguments name, in this process; returns how many passed and so on."""
    # The warnings are PyTorch's about itself.
    program = unittest.main(testLoader=Loader(), defaultTest=FILES, exit=False, warnings="ignore")
    result = program.result
    failed = len({getattr(test, "test_case", test) for test, _ in result.failures + result.errors})
    skipped = len(result.skipped)
    passed = result.testsRun - failed - skipped
    return collections.Counter(passed=passed, failed=failed, skipped=skipped)


def run_share(names: list[str]) -> subprocess.CompletedProcess:
    """The tests of some files in a process of their own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RELIABILITY": ""}
    return subprocess.run([sys.executable, __file__, *names], env=environment, text=True,
                          errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_files() -> collections.Counter:
    """Run all files, a share of them on each core; the output of a share comes at its end."""
    counts, names = collections.Counter(), list(FILES)
    cores = min(os.cpu_count(), len(names))
    with ThreadPool(cores) as pool:
        shares = [names[core::cores] for core in range(cores)]
        for process in pool.imap_unordered(run_share, shares):
            printed, *told = re.split(CLOSING, process.stdout, maxsplit=1)
            passed, failed, skipped = map(int, told[:3] or (0, 1, 0))  # or it did not reach its end
            failed = max(failed, int(process.returncode != 0))
            counts.update(passed=passed, failed=failed, skipped=skipped)
            COUNTS.update({what: int(count) for count, what in re.findall(SURVIVED, printed)})
            print(f"{printed}{''.join(told[3:])}", flush=True)
    return counts


def main() -> None:
    """Run the tests and close with a line that counts them."""
    counts = run_files() if len(sys.argv) == 1 else run_here()
    for what, count in COUNTS.items():
        print(f"survived {count} {what}")
    write_reliability()
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
