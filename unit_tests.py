"""Tests of every file, in the order in which they import each other.

    python unit_tests.py            all of them, about two minutes
    python unit_tests.py TestMobiusConv         one group
    python -m pytest unit_tests.py  the same with pytest

Reference implementations are written out from the definitions, with explicit matrices and loops, and share no
code with what they test. Equivariance is tested in float64 to 1e-10, beside a layer or model that must fail.
"""

import argparse
import collections
import contextlib
import copy
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zipfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import matplotlib.colors
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.nn.utils.prune

import benchmark
import convert_mnist
import data_loader
import deformation
import muon
import parallel_seeds
import pictures
import reproduce
import run_folder
import spectral
import train
import visualize
from fast_path import is_plain
from fields import Fields, PlanarFields, adjacent_channels, arrange_channels, as_fields, cross_cut, gauge_transform, isometry_action
from models import CNN, MODELS, MODES, MobiusGaugeCNN, build_model, count_parameters, export
from study import gradients
from nn_layers import (POOLINGS, EquivNonlin, MobiusConv, MobiusConvNaive, MobiusPadNaive, MobiusPool, TransportPad, _norm, transport_pad)

ROOT = Path(__file__).resolve().parent
DOUBLE = torch.float64
TOLERANCE = 1e-10
TYPES = {"triv": (1, 0, 0), "sign": (0, 1, 0), "reg": (0, 0, 1)}
FIELDS = [(2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 2, 0), (2, 0, 1), (0, 1, 2), (2, 1, 3)]
KERNEL_SIZES = (1, 3, 5, 7)
SIZES = [(6, 8), (7, 8), (6, 7), (5, 5)]  # (W, L), odd and even


COUNTS = collections.Counter()  # of what was survived


def setUpModule():
    torch.manual_seed(0)


def tearDownModule():
    if os.environ.get("RELIABILITY"):
        write_reliability(COUNTS)


def write_reliability(survived: collections.Counter) -> None:
    """The file of the README's figures."""
    environment = train.describe_environment(torch.device("cpu"))
    run_folder.write_json(os.environ["RELIABILITY"], {"environment": environment, "survived": dict(survived)})


def channels(fields) -> int:
    return fields[0] + fields[1] + 2 * fields[2]


def rho_matrix(fields) -> torch.Tensor:
    """rho(s) as a matrix, written out."""
    triv, sign, reg = fields
    blocks = [torch.ones(1, 1)] * triv + [-torch.ones(1, 1)] * sign + [torch.tensor([[0.0, 1.0], [1.0, 0.0]])] * reg
    return torch.block_diag(*blocks).to(DOUBLE)


def act(fields, x: torch.Tensor) -> torch.Tensor:
    """rho(s) on dim 1."""
    return torch.einsum("ij,njwl->niwl", rho_matrix(fields).to(x.dtype), x)


def reference_cover(x: torch.Tensor, fields, first: int, last: int) -> torch.Tensor:
    """Columns first … last - 1 of the field continued over the cut in both directions, one by one."""
    length = x.shape[3]
    columns = []
    for column in range(first, last):
        turns, column = divmod(column, length)
        values = x[:, :, :, column:column + 1]
        columns.append(act(fields, values.flip(2)) if turns % 2 else values)
    return torch.cat(columns, dim=3)


def features(fields, width: int, length: int, n: int = 2, dtype=DOUBLE) -> torch.Tensor:
    return torch.randn(n, channels(fields), width, length, dtype=dtype)


def randomized(module: nn.Module) -> nn.Module:
    """All parameters random: a zero bias would hide a wrong one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def all_shifts(length: int) -> range:
    return range(-2 * length, 2 * length + 1)


class Case(unittest.TestCase):
    def assertClose(self, actual, expected, tolerance=TOLERANCE, message=None):
        self.assertEqual(actual.shape, expected.shape, message)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=message and (lambda m: f"{message}\n{m}"))

    def assertNotClose(self, actual, expected, message=None):
        self.assertEqual(actual.shape, expected.shape, message)
        self.assertGreater((actual - expected).abs().max().item(), 1e-3, message)

    def assertIsometryEquivariant(self, layer, in_fields, out_fields, width, length, step=1):
        """Under every shift by a multiple of `step`, where a shift of the output is that of the input / step."""
        x = features(in_fields, width, length)
        y = layer(x)
        for shift in all_shifts(length)[::step]:
            self.assertClose(
                layer(isometry_action(x, shift, in_fields)), isometry_action(y, shift // step, out_fields),
                message=f"fields {in_fields} -> {out_fields}, W x L = {width} x {length}, shift {shift}",
            )

    def assertGaugeEquivariant(self, layer, in_fields, out_fields, width, length):
        """For a layer that acts at each point of its output in any frame alike."""
        x = features(in_fields, width, length)
        self.assertClose(layer(gauge_transform(x, in_fields)), gauge_transform(layer(x), out_fields))


# ======================================================================================================
# fields.py


class TestFields(Case):
    def test_channels(self):
        self.assertEqual(Fields(10, 4, 8).channels, 30)
        self.assertEqual(as_fields((10, 4, 8)), (10, 4, 8))
        self.assertEqual(as_fields(np.array([1, 2, 3])), (1, 2, 3))

    def test_bad_multiplicities(self):
        for bad in [(0, 0, 0), (-1, 2, 0), (1.0, 0, 0), (1, 2), (1, 2, 3, 4), ("1", 0, 0), (True, 0, 0), 3, None]:
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
                    self.assertClose(isometry_action(x, shift, fields), reference_cover(x, fields, -shift, length - shift))

    def test_isometry_group(self):
        fields, length = (1, 2, 1), 5
        x = features(fields, 4, length)
        self.assertTrue(torch.equal(isometry_action(x, length, fields), gauge_transform(x.flip(2), fields)))
        for identity in (0, 2 * length, -2 * length, 10**30 * 2 * length):
            self.assertTrue(torch.equal(isometry_action(x, identity, fields), x))
        for a, b in itertools.product(all_shifts(length), repeat=2):
            both = isometry_action(isometry_action(x, a, fields), b, fields)
            self.assertTrue(torch.equal(both, isometry_action(x, a + b, fields)))

    def test_a_shift_for_each_sample(self):
        fields = (1, 1, 1)
        x = features(fields, 3, 4, n=17)
        shifts = torch.arange(-8, 9)
        expected = torch.cat([isometry_action(x[i:i + 1], int(t), fields) for i, t in enumerate(shifts)])
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
        signed = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int8,
                  torch.int16, torch.int32, torch.int64]
        for dtype in signed:
            with self.subTest(dtype):
                x = numbers.to(dtype)
                y = isometry_action(x, 7, fields)
                self.assertEqual(y.dtype, dtype)
                self.assertTrue(torch.equal(y, isometry_action(numbers, 7, fields).to(dtype)))
        for dtype in (torch.uint8, torch.bool):
            x = (numbers % 3 == 0).to(dtype)
            self.assertTrue(torch.equal(isometry_action(x, 7, (2, 0, 1)).long(), isometry_action(x.long(), 7, (2, 0, 1))))
            with self.subTest(dtype), self.assertRaisesRegex(ValueError, f"negative numbers, got {dtype}"):
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


# ======================================================================================================
# nn_layers.py


class TestTransportPad(Case):
    def test_is_a_window_of_the_double_cover(self):
        for fields, pad, (width, length) in itertools.product(FIELDS, (0, 1, 2, 3), [(4, 3), (3, 4)]):
            with self.subTest(fields=fields, pad=pad, length=length):
                x = features(fields, width, length)
                before = x.clone()
                padded = transport_pad(x, pad, fields)
                self.assertClose(padded[:, :, pad:pad + width], reference_cover(x, fields, -pad, length + pad))
                self.assertEqual(padded.shape, (2, channels(fields), width + 2 * pad, length + 2 * pad))
                self.assertTrue((padded[:, :, :pad] == 0).all() and (padded[:, :, pad + width:] == 0).all())
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
        for (i, in_fields), (o, out_fields), k in itertools.product(TYPES.items(), TYPES.items(), KERNEL_SIZES):
            with self.subTest(block=f"{i}2{o}", k=k):
                conv = MobiusConv([2 * m for m in in_fields], [3 * m for m in out_fields], k)
                expected = {f"weights_{i}2{o}": self.SHAPES[f"{i}2{o}"](k)}
                if o != "sign":
                    expected[f"bias_{o}"] = (3,)
                self.assertEqual({name: tuple(p.shape) for name, p in conv.named_parameters()}, expected)
        names = {f"weights_{block}" for block in self.SHAPES} | {"bias_triv", "bias_reg"}
        self.assertEqual(set(MobiusConv((1, 1, 1), (1, 1, 1), 3).state_dict()), names)

    def test_kernel_is_steerable(self):
        for in_fields, out_fields, k in itertools.product(FIELDS + list(TYPES.values()), FIELDS + list(TYPES.values()), KERNEL_SIZES):
            with self.subTest(in_fields=in_fields, out_fields=out_fields, k=k):
                kernel = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE)).expand_kernel()
                self.assertEqual(kernel.shape, (channels(out_fields), channels(in_fields), k, k))
                rho_out, rho_in = rho_matrix(out_fields), rho_matrix(in_fields)
                self.assertClose(kernel.flip(2), torch.einsum("ab,bcwl,cd->adwl", rho_out, kernel, rho_in.inverse()))

    def test_kernels_are_all_steerable_ones(self):
        """As many free parameters as the space of steerable kernels has dimensions, none of them idle."""
        for in_fields, out_fields, k in itertools.product(TYPES.values(), TYPES.values(), (1, 3)):
            conv = MobiusConv(in_fields, out_fields, k, dtype=DOUBLE)
            weights = {name: p for name, p in conv.named_parameters() if name.startswith("weights")}

            def expand(flat):
                values = dict(zip(weights, flat.split([p.numel() for p in weights.values()])))
                values = {name: value.view_as(weights[name]) for name, value in values.items()}
                with torch.no_grad():
                    for name, parameter in weights.items():
                        parameter.copy_(values[name])
                return conv.expand_kernel().detach().flatten()

            size = sum(p.numel() for p in weights.values())
            basis = torch.stack([expand(row) for row in torch.eye(size, dtype=DOUBLE)]) if size else torch.zeros(0, 1)
            # The projector on steerable kernels is the mean of the identity and K -> rho_out K(s.v) rho_in^-1.
            flip = torch.eye(k, dtype=DOUBLE).flip(0)
            action = torch.kron(torch.kron(rho_matrix(out_fields), rho_matrix(in_fields)), torch.kron(flip, torch.eye(k, dtype=DOUBLE)))
            dimension = round((len(action) + action.trace().item()) / 2)
            with self.subTest(in_fields=in_fields, out_fields=out_fields, k=k):
                self.assertEqual(size, dimension)
                self.assertEqual(int(torch.linalg.matrix_rank(basis)) if size else 0, dimension)

    def test_layout_of_the_stored_blocks(self):
        """What stands in a checkpoint stands where the published layout has it."""
        k, centre = 5, 2
        for (i, in_fields), (o, out_fields) in itertools.product(TYPES.items(), TYPES.items()):
            conv = randomized(MobiusConv([2 * m for m in in_fields], [3 * m for m in out_fields], k, dtype=DOUBLE))
            stored, kernel = getattr(conv, f"weights_{i}2{o}"), conv.expand_kernel()
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

    def test_bias_is_invariant(self):
        for fields in FIELDS:
            conv = randomized(MobiusConv((1, 0, 0), fields, 3, dtype=DOUBLE))
            bias = conv.expand_bias()
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
            expected = torch.einsum("ncwlab,ocab->nowl", patches, conv.expand_kernel()) + bias[:, None, None]
            with self.subTest(k=k, width=width, length=length):
                self.assertClose(conv(x), expected)

    def test_gauge_equivariance(self):
        """In reflected frames the kernel's width axis points the other way; features come out reflected."""
        for in_fields, out_fields, k in itertools.product(FIELDS, FIELDS, KERNEL_SIZES):
            conv = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE))
            x = features(in_fields, 5, 6)
            reflected = F.conv2d(transport_pad(gauge_transform(x, in_fields), k // 2, in_fields),
                                 conv.expand_kernel().flip(2), conv.expand_bias())
            with self.subTest(in_fields=in_fields, out_fields=out_fields, k=k):
                self.assertClose(reflected, gauge_transform(conv(x), out_fields))

    def test_isometry_equivariance(self):
        for in_fields, out_fields in itertools.product(FIELDS, FIELDS):
            for k, size in zip(KERNEL_SIZES, SIZES):
                conv = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE))
                self.assertIsometryEquivariant(conv, in_fields, out_fields, *size)
        for k, size in itertools.product(KERNEL_SIZES, SIZES + [(1, 3), (8, 6)]):
            conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), k, dtype=DOUBLE))
            self.assertIsometryEquivariant(conv, (1, 1, 1), (1, 1, 1), *size)

    def test_a_plain_convolution_is_not_equivariant(self):
        for fields in FIELDS:
            c = channels(fields)
            naive = nn.Sequential(MobiusPadNaive(3), nn.Conv2d(c, c, 3, dtype=DOUBLE))
            with self.subTest(fields), self.assertRaises(AssertionError):
                self.assertIsometryEquivariant(naive, fields, fields, 6, 8)
        # Transport padding alone is not enough, nor are steerable kernels without it.
        conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE))
        for layer in (
            lambda x: F.conv2d(transport_pad(x, 1, (1, 1, 1)), torch.ones(4, 4, 3, 3, dtype=DOUBLE).cumsum(2)),
            lambda x: F.conv2d(MobiusPadNaive(3)(x), conv.expand_kernel(), conv.expand_bias()),
        ):
            with self.assertRaises(AssertionError):
                self.assertIsometryEquivariant(layer, (1, 1, 1), (1, 1, 1), 6, 8)

    def test_moving_the_cut_changes_nothing(self):
        """Cut the strip elsewhere: the columns left of the new cut are glued on behind the old one, reflected."""
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
            with self.assertRaisesRegex(ValueError, f"kernel_size must be an odd positive integer, got {k!r}"):
                MobiusConv((1, 0, 0), (1, 0, 0), k)
        for bad in [(0, 0, 0), (1, -1, 0), (1, 0.5, 0), (1, 0)]:
            with self.assertRaisesRegex(ValueError, rf"in_fields must be .* got {re.escape(repr(bad))}"):
                MobiusConv(bad, (1, 0, 0), 3)
            with self.assertRaisesRegex(ValueError, rf"out_fields must be .* got {re.escape(repr(bad))}"):
                MobiusConv((1, 0, 0), bad, 3)
        conv = MobiusConv((1, 1, 1), (1, 0, 0), 5)
        for bad, message in [((4, 6, 6), "4-d"), ((1, 3, 6, 6), "4 channels"), ((1, 4, 6, 1), "L = 1")]:
            with self.assertRaisesRegex(ValueError, message):
                conv(torch.zeros(bad))
        self.assertEqual(conv(torch.zeros(1, 4, 6, 2)).shape, (1, 1, 6, 2))  # L = k // 2


class TestEquivNonlin(Case):
    def test_parameters(self):
        self.assertEqual({n: tuple(p.shape) for n, p in EquivNonlin((2, 3, 1)).named_parameters()}, {"bias_sign": (1, 3, 1, 1)})
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
                elu[:, triv:triv + sign] = np.sign(values) * np.where(shifted > 0, shifted, np.expm1(np.minimum(shifted, 0)))
            with self.subTest(fields):
                self.assertClose(layer(torch.from_numpy(x)), torch.from_numpy(elu))

    def test_zeros_and_extremes(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            most, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
            values = torch.tensor([0.0, -0.0, 1.0, -1.0, most, -most, least, -least, math.inf, -math.inf], dtype=dtype)
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
            self.assertGaugeEquivariant(layer, fields, fields, *size)
            self.assertIsometryEquivariant(layer, fields, fields, *size)

    def test_elu_alone_is_not_equivariant(self):
        with self.assertRaises(AssertionError):
            self.assertGaugeEquivariant(nn.ELU(), (0, 2, 0), (0, 2, 0), 4, 4)

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
            1: [[range(w, min(w + 2, width)) for w in range(0, width, 2)], [range(max(w, 0), w + 2) for w in range(-1, width, 2)]],
        }[width % 2]
        y = torch.zeros(n, c, (width + 1) // 2, (length + 1) // 2, dtype=x.dtype)
        for i, j, column in itertools.product(range(n), range(c), range(y.shape[3])):
            for windows in rows:
                for w, window in enumerate(windows):
                    values = [x[i, j, r, l].item() for r in window for l in (2 * column, 2 * column + 1)]
                    if triv <= j < triv + sign:
                        largest = max(values, key=abs)
                        y[i, j, w, column] += 0 if -largest in values else largest
                    else:
                        y[i, j, w, column] += max(values)
        return y / len(rows)

    def test_values(self):
        for fields, (width, length) in itertools.product(FIELDS, SIZES + [(1, 2), (2, 1), (1, 1), (28, 28)]):
            n = 1 if width == 28 else 2
            x = features(fields, width, length, n)
            with self.subTest(fields=fields, width=width, length=length):
                self.assertClose(MobiusPool(fields)(x), self.reference(x, fields))
                # Where all values are negative or small, a pad of zeros would win.
                self.assertClose(MobiusPool(fields)(-x.abs()), self.reference(-x.abs(), fields))

    def test_opposite_entries(self):
        """Of +a and -a neither, also where rounding made them differ: 0 is the only value that is its own negative."""
        pool = MobiusPool((0, 1, 0))
        for window, noise in itertools.product(itertools.permutations([2.0, -2.0, 1.0, -1.0]), (0, 1e-15, -1e-15)):
            x = (torch.tensor(window, dtype=DOUBLE) + torch.tensor([noise, 0, 0, 0])).reshape(1, 1, 2, 2).requires_grad_()
            y = pool(x)
            self.assertEqual(y.item(), 0)
            self.assertEqual(torch.autograd.grad(y, x)[0].abs().max().item(), 0)
        self.assertEqual(pool(torch.zeros(1, 1, 2, 2)).item(), 0)
        for fields, size in itertools.product([(0, 2, 0), (1, 2, 1)], SIZES):
            x = torch.randint(-2, 3, (20, channels(fields), *size)).double()
            for x in (x, 0.1 * x + 1e-15 * torch.rand_like(x)):
                self.assertClose(MobiusPool(fields)(gauge_transform(x, fields)), gauge_transform(MobiusPool(fields)(x), fields))

    def test_equivariance(self):
        for fields, size in itertools.product(FIELDS, SIZES):
            self.assertGaugeEquivariant(MobiusPool(fields), fields, fields, *size)
        for fields, size in itertools.product(FIELDS, [(6, 8), (7, 8), (4, 6), (5, 2)]):
            self.assertIsometryEquivariant(MobiusPool(fields), fields, fields, *size, step=2)

    def test_plain_pooling_is_not_equivariant(self):
        with self.assertRaises(AssertionError):  # the maximum of a sign-flip field is not odd
            self.assertGaugeEquivariant(nn.MaxPool2d(2), (0, 2, 0), (0, 2, 0), 6, 8)
        with self.assertRaises(AssertionError):  # windows aligned to one edge are not those of the reflected strip
            self.assertIsometryEquivariant(nn.MaxPool2d(2, ceil_mode=True), (1, 0, 0), (1, 0, 0), 7, 8, step=2)

    def test_dtypes(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            x = features((1, 1, 1), 7, 7).to(dtype)
            y = MobiusPool((1, 1, 1))(x)
            self.assertEqual(y.dtype, dtype)
            self.assertFalse(y.isnan().any())
        for pooling in POOLINGS:
            with self.assertRaisesRegex(ValueError, "floating point numbers, got torch.int64"):
                MobiusPool((3, 0, 0), pooling)(torch.zeros(2, 3, 6, 8, dtype=torch.long))
        largest = torch.full((1, 4, 3, 3), torch.finfo(torch.float16).max, dtype=torch.float16)
        self.assertTrue(MobiusPool((1, 1, 1))(largest).isfinite().all())

    def test_bad_arguments(self):
        with self.assertRaisesRegex(ValueError, "in_fields"):
            MobiusPool((0, 0))
        for bad, message in [((4, 6, 6), "4-d"), ((1, 3, 6, 6), "4 channels")]:
            for pooling in POOLINGS:
                with self.assertRaisesRegex(ValueError, message):
                    MobiusPool((1, 1, 1), pooling)(torch.zeros(bad))
        for pooling in ("max", None, 2, ["fixed"]):
            with self.assertRaisesRegex(ValueError, "pooling must be one of fixed, polyphase, got"):
                MobiusPool((1, 1, 1), pooling)


class TestPolyphasePooling(Case):
    EVEN = [(6, 8), (7, 8), (5, 6), (1, 4), (4, 2)]  # (W, L)

    def setUp(self):
        torch.manual_seed(0)

    @staticmethod
    def phase(x, fields) -> torch.Tensor:
        """0 or 1 of each sample: which grid its windows are on. From outside it cannot always be seen: both can give the same."""
        pool = MobiusPool(fields, "polyphase")
        return pool._begins_odd(x, *map(_norm, pool._phases(x))).long()

    def assertEquivariant(self, x, fields, gauge=True):
        """Under each of the isometries, sample by sample as the docstring of MobiusPool says, and under gauge transformations."""
        pool = MobiusPool(fields, "polyphase")
        y, p = pool(x), self.phase(x, fields)
        for shift in all_shifts(x.shape[3]):
            moved = isometry_action(x, shift, fields)
            after = (p + shift) % 2
            expected = isometry_action(y, (shift + p - after) // 2, fields)
            self.assertClose(pool(moved), expected, message=f"fields {fields}, {tuple(x.shape)}, shift {shift}")
            self.assertClose(pool(moved.requires_grad_()), expected)  # goes another way
        if gauge:
            self.assertClose(pool(gauge_transform(x, fields)), gauge_transform(y, fields))

    @staticmethod
    def sparse(fields, n=80) -> torch.Tensor:
        """Few values other than zero, no two alike: both grids often have each of them in a window of its own, and equal norms."""
        c = channels(fields)
        values = torch.arange(1, n * c * 24 + 1, dtype=DOUBLE)[torch.randperm(n * c * 24)].view(n, c, 4, 6)
        return values * (torch.rand(n, c, 4, 6) < 0.3 / c)

    def test_values(self):
        """The phase of the larger norm, window by window."""
        for fields, (width, length) in itertools.product(FIELDS, self.EVEN):
            x = features(fields, width, length, n=8)
            phases = torch.stack([TestMobiusPool.reference(reference_cover(x, fields, p, p + length), fields) for p in (0, 1)])
            even, odd = phases.square().sum((2, 3, 4))
            # In few pixels, both grids can have the same values in their windows.
            differ = (even - odd).abs() > 1e-6
            expected = phases[(odd > even).long(), torch.arange(8)][differ]
            pool = MobiusPool(fields, "polyphase")
            with self.subTest(fields=fields, width=width, length=length):
                self.assertGreater(len(expected), 0)
                self.assertClose(pool(x)[differ], expected)
                self.assertClose(pool(x.clone().requires_grad_())[differ], expected)

    def test_equivariance(self):
        for fields, size in itertools.product(FIELDS, self.EVEN):
            self.assertEquivariant(features(fields, *size, n=3), fields)

    def test_fixed_grid_is_not_equivariant(self):
        with self.assertRaises(AssertionError):
            with mock.patch.object(MobiusPool, "_begins_odd", lambda self, x, even, odd: torch.zeros(len(x), dtype=torch.bool)):
                self.assertEquivariant(features((1, 1, 1), 6, 8), (1, 1, 1))

    def test_opposite_entries(self):
        """Of +a and -a neither: the only value that is its own negative."""
        for fields, (width, length) in itertools.product([(0, 2, 0), (1, 2, 1)], self.EVEN):
            x = torch.randint(-2, 3, (20, channels(fields), width, length)).double()
            # Rounding on the way to them must not make them unequal.
            for x in (x, 0.1 * x + 1e-15 * torch.rand_like(x)):
                self.assertEquivariant(x, fields)

    def test_sign_flip_fields_are_pooled_as_by_the_formula(self):
        """Bit for bit: values, gradients and phases are computed without it where nothing differentiates the gradient."""
        for fields, dtype, rounding in itertools.product([(0, 2, 0), (1, 1, 1)], (DOUBLE, torch.float32, torch.bfloat16), (0, 256)):
            pool = MobiusPool(fields, "polyphase")
            x = torch.randint(-2, 3, (200, channels(fields), 4, 6)).to(dtype)
            rounding = rounding * torch.finfo(dtype).eps * torch.randn(x.shape, dtype=dtype)
            x = (x + rounding) * (torch.rand(200, 1, 1, 1) < 0.9)
            x = x.to(dtype).requires_grad_()
            with mock.patch("nn_layers.is_plain", lambda *tensors: False):
                by_formula = pool._pool(x)
            outputs = [pool._pool(x), by_formula]
            with self.subTest(fields=fields, dtype=dtype):
                gradients = [torch.autograd.grad(output, x, torch.ones_like(output))[0] for output in outputs]
                even, _ = pool._phases(x.detach())
                self.assertTrue(torch.equal(*outputs) and torch.equal(*gradients) and torch.equal(even, by_formula))
                self.assertTrue((by_formula == 0).any())

    def test_digits(self):
        """Large parts of the strip are blank, and features there nothing but rounding, or equal over many windows."""
        digits = convert_mnist.load_digits()[0].images[:2].double()

        for mode in MODES:
            model = randomized_norms(MobiusGaugeCNN(mode=mode, pooling="polyphase", dtype=DOUBLE)).eval()
            for name, parameter in model.named_parameters():
                if "bias_sign" in name:  # with it, the nonlinearity jumps at 0, and makes of rounding something that can be seen
                    nn.init.zeros_(parameter)
            with torch.no_grad():
                logits = model(torch.cat([isometry_action(digits, shift, (1, 0, 0)) for shift in (0, 1, 2, 5, 28, 31)])).view(6, 2, -1)
            self.assertClose(logits, logits[:1].expand(6, -1, -1))

    def test_ties(self):
        for fields in FIELDS:
            x = self.sparse(fields)
            pool = MobiusPool(fields, "polyphase")
            even, odd = map(_norm, pool._phases(x))
            self.assertGreater(((even - odd).abs() <= 1e-12 * even).sum(), 3)
            for scale in (1, 0.3):  # with it, the sum of the same squares depends on their order
                self.assertEquivariant(scale * x, fields)
            for same in (torch.zeros, torch.ones):
                self.assertEquivariant(same(2, channels(fields), 4, 6, dtype=DOUBLE), fields)
            # They do need to be broken.
            with mock.patch("nn_layers._best_parity", lambda x, fields: torch.zeros(len(x), dtype=torch.bool)):
                with self.assertRaises(AssertionError):
                    self.assertEquivariant(x, fields)

    def test_where_no_choice_is_right(self):
        """Fields that a shift by 3 changes just as a gauge transformation does."""
        fields = (0, 0, 1)
        half = torch.rand(500, 1, 4, 3, dtype=DOUBLE)
        half = torch.cat([half, half.flip(2)], dim=1)
        x = torch.cat([half, gauge_transform(half, fields)], dim=3)
        self.assertTrue(torch.equal(isometry_action(x, 3, fields), gauge_transform(x, fields)))
        for x in (x, gauge_transform(x, fields)):
            self.assertFalse(self.phase(x, fields).any())
        with self.assertRaises(AssertionError):
            self.assertEquivariant(x, fields)

    def test_where_an_odd_shift_changes_nothing(self):
        fields = (1, 0, 1)
        half = features(fields, 4, 3)
        half = half + cross_cut(half, as_fields(fields))
        x = torch.cat([half, half], dim=3)
        self.assertClose(isometry_action(x, 3, fields), x)
        pool = MobiusPool(fields, "polyphase")
        for shift in all_shifts(6):
            turns = [isometry_action(pool(x), t, fields) for t in range(6)]
            moved = pool(isometry_action(x, shift, fields))
            self.assertTrue(any((moved - turned).abs().max() < TOLERANCE for turned in turns), shift)

    def test_each_sample_on_its_own(self):
        fields = (2, 1, 3)
        x, pool = features(fields, 6, 8, n=8), MobiusPool(fields, "polyphase")
        x = torch.cat([x, isometry_action(x, 1, fields)])
        self.assertEqual(self.phase(x, fields).sum(), 8)
        self.assertClose(pool(x), torch.cat([pool(sample) for sample in x.split(1)]))
        planar = PlanarFields(*fields)
        for x in (x, self.sparse(fields)):
            order = arrange_channels(torch.arange(9)[None, :, None, None], planar).flatten()
            self.assertClose(MobiusPool(planar, "polyphase")(x[:, order]), pool(x)[:, order])

    def test_bad_input(self):
        for name in ("mobius_scalar", "cnn_same_params"):
            with self.assertRaisesRegex(ValueError, r"multiple of 4, got shape \(2, 1, 28, 26\)"):
                build_model(name, pooling="polyphase")(torch.zeros(2, 1, 28, 26))
            build_model(name)(torch.zeros(2, 1, 28, 26))
        with self.assertRaisesRegex(ValueError, r"even length L, got shape \(2, 3, 6, 7\): once round a strip of odd length"):
            MobiusPool((3, 0, 0), "polyphase")(torch.zeros(2, 3, 6, 7))

    def test_gradients_and_tools(self):
        """Both ways of computing it, for the tools of TestTorchHabits."""
        for fields, width in (((1, 1, 1), 4), ((1, 1, 1), 3), ((0, 0, 2), 4)):
            pool = MobiusPool(fields, "polyphase")
            x = features(fields, width, 4, n=1)
            x = torch.cat([x, isometry_action(x, 1, fields)])  # the one is on the even grid, the other on the odd one
            with self.subTest(fields=fields, width=width):
                given = x.clone().requires_grad_()
                self.assertTrue(torch.autograd.gradcheck(pool, given, check_forward_ad=True, check_batched_grad=True))
                self.assertTrue(torch.autograd.gradgradcheck(pool, given))
                weights = torch.randn_like(pool(x))
                (by_copy,) = torch.autograd.grad((pool(given) * weights).sum(), given)
                torch.compiler.reset()
                compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
                self.assertEqual(pool(x.to("meta")).shape, pool(x).shape)
                for other in (compiled, torch.vmap(lambda sample: pool(sample[None])[0]), copy.deepcopy(pool)):
                    self.assertTrue(torch.equal(other(x), pool(x)))
                self.assertClose(torch.func.grad(lambda x: (pool(x) * weights).sum())(x), by_copy)
                self.assertTrue(torch.equal(torch.export.export(pool, (x,)).module()(x), pool(x)))
                if width == 4:
                    ties = self.sparse(fields)
                    self.assertTrue(torch.equal(torch.compile(pool, fullgraph=True, backend="aot_eager")(ties), pool(ties)))
        self.assertIn("pooling='polyphase'", repr(pool))

    def test_dtypes(self):
        fields = (1, 1, 1)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            pool = MobiusPool(fields, "polyphase")
            x = features(fields, 6, 8, n=8).to(dtype)
            self.assertEqual(pool(x).dtype, dtype)
            self.assertTrue(torch.equal(pool(x).double(), pool(x.double())))  # norms are taken in float32 at least
            # Magnitudes that these dtypes tell apart, so that no window holds +a and -a.
            values = torch.arange(1, 193).view(1, 4, 6, 8)[:, :, torch.randperm(6)][..., torch.randperm(8)].to(dtype)
            self.assertEquivariant((values - 0.5 * (values > 96) * values).to(dtype) if dtype == torch.bfloat16 else values, fields)
            with torch.autocast("cpu", torch.bfloat16):
                sparse = self.sparse(fields).float()
                self.assertTrue(torch.equal(pool(sparse), torch.cat([pool(sample) for sample in sparse.split(1)])))
        largest = torch.full((1, 4, 4, 4), torch.finfo(torch.float16).max, dtype=torch.float16)
        self.assertTrue(MobiusPool(fields, "polyphase")(largest).isfinite().all())


class TestTorchHabits(Case):
    """The layers in the company of PyTorch's own tools."""

    LAYERS = [
        lambda **factory: MobiusConv((1, 1, 1), (1, 2, 1), 3, **factory),
        lambda **factory: EquivNonlin((1, 1, 1), **factory),
        lambda **factory: MobiusPool((1, 1, 1)),
        lambda **factory: MobiusPadNaive(3),
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
            self.assertTrue(all(p.is_meta and p.dtype == torch.float64 for p in make(device="meta", dtype=DOUBLE).parameters()))
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

    def test_compile_layers(self):
        for make in self.LAYERS:
            layer, x = randomized(make(dtype=DOUBLE)), features((1, 1, 1), 7, 7)
            torch.compiler.reset()
            with self.subTest(layer):
                self.assertClose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))

    @unittest.skipUnless(shutil.which("c++") or shutil.which("g++"), "torch.compile needs a C++ compiler on the CPU")
    def test_compile_with_the_default_backend(self):
        layer = randomized(nn.Sequential(MobiusConv((1, 0, 0), (1, 1, 1), 3), EquivNonlin((1, 1, 1)), MobiusPool((1, 1, 1))))
        x = torch.randn(2, 1, 8, 8)
        torch.compiler.reset()
        self.assertClose(torch.compile(layer, fullgraph=True)(x), layer(x), tolerance=1e-4)


# ======================================================================================================
# models.py


class TestModels(Case):
    def setUp(self):
        torch.manual_seed(0)

    PARAMETERS = {
        "cnn_same_channels": 1_501_162,
        "cnn_same_params": 832_190,
        "mobius_scalar": 901_962,
        "mobius_signflip": 819_962,
        "mobius_regular": 751_914,
        "mobius_irrep": 752_162,
        "mobius_mixed": 752_038,
    }

    def test_parameter_counts(self):
        self.assertEqual({name: count_parameters(build_model(name)) for name in MODELS}, self.PARAMETERS)

    def test_script_prints_the_counts(self):
        printed = subprocess.run([sys.executable, ROOT / "models.py"], capture_output=True, text=True, check=True).stdout
        for name, count in self.PARAMETERS.items():
            self.assertRegex(printed, rf"{name} .* {count:,}\b")

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
                    expected[f"mobius_cnn.{index}.weights_{a}2{b}"] = (o[b], columns // 2 * i[a], rows, k)
            for b in ("triv", "reg"):
                if o[b]:
                    expected[f"mobius_cnn.{index}.bias_{b}"] = (o[b],)
        expected |= {f"mobius_cnn.{index}.bias_sign": (1, n, 1, 1) for index, n in zip((1, 3, 6, 8, 11), (4, 8, 16, 32, 64))}
        self.assertEqual(self.shapes("mobius_mixed"), expected | self.classifier())

    def test_state_dict_of_a_cnn(self):
        for name, channels in (("cnn_same_channels", (1, 16, 32, 64, 128, 256, 64)), ("cnn_same_params", (1, 11, 22, 45, 90, 181, 64))):
            expected = {}
            for index, (i, o) in zip((1, 4, 8, 11, 15, 18), itertools.pairwise(channels)):
                expected |= {f"cnn.{index}.weight": (o, i, 5, 5), f"cnn.{index}.bias": (o,)}
            self.assertEqual(self.shapes(name), expected | self.classifier())

    @staticmethod
    def shapes(name):
        return {key: tuple(value.shape) for key, value in build_model(name).state_dict().items()}

    @staticmethod
    def classifier():
        def norm(n):
            return {"weight": (n,), "bias": (n,), "running_mean": (n,), "running_var": (n,), "num_batches_tracked": ()}

        def linear(i, o):
            return {"weight": (o, i), "bias": (o,)}

        layers = {0: norm(64), 3: linear(64, 32), 4: norm(32), 7: linear(32, 10)}
        return {f"classifier.{index}.{key}": shape for index, layer in layers.items() for key, shape in layer.items()}

    def test_field_types_of_each_mode(self):
        for mode, base in MODES.items():
            convs = [m for m in MobiusGaugeCNN(mode=mode).mobius_cnn if isinstance(m, MobiusConv)]
            expected = [tuple(n * m for m in base) for n in (4, 8, 16, 32, 64)] + [(64, 0, 0)]
            self.assertEqual([conv.out_fields for conv in convs], expected)

    def test_architecture(self):
        """The logits are those of the layers, one after the other."""
        def classify(model, y):
            norm1, _, drop1, linear1, norm2, _, drop2, linear2 = model.classifier
            self.assertEqual((drop1.p, drop2.p), (0.3, 0.3))
            for norm, linear in ((norm1, linear1), (norm2, linear2)):
                y = (y - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
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

    @staticmethod
    def logits_of_all_shifts(model, shifts=range(56)):
        x = torch.rand(1, 1, 28, 28, dtype=DOUBLE)
        with torch.no_grad():
            return model(torch.cat([isometry_action(x, shift, (1, 0, 0)) for shift in shifts]))

    def test_invariance_under_multiples_of_four(self):
        for mode in MODES:
            model = randomized_norms(MobiusGaugeCNN(mode=mode, dtype=DOUBLE)).eval()
            logits = self.logits_of_all_shifts(model)
            with self.subTest(mode):
                self.assertClose(logits[::4], logits[:1].expand(14, -1))
                self.assertNotClose(logits, logits[:1].expand(56, -1))  # the published pooling: every fourth only

    def test_invariance_under_all_isometries(self):
        for mode in MODES:
            model = randomized_norms(MobiusGaugeCNN(mode=mode, pooling="polyphase", dtype=DOUBLE)).eval()
            logits = self.logits_of_all_shifts(model, range(-5, 56))
            with self.subTest(mode):
                self.assertClose(logits, logits[5:6].expand(61, -1))

    def test_cnns_are_not_invariant(self):
        for name, pooling in itertools.product(("cnn_same_channels", "cnn_same_params"), POOLINGS):
            logits = self.logits_of_all_shifts(randomized_norms(build_model(name, pooling=pooling, dtype=DOUBLE)).eval())
            with self.subTest(name, pooling=pooling), self.assertRaises(AssertionError):
                self.assertClose(logits[::4], logits[:1].expand(14, -1))

    def test_pooling_has_no_parameters(self):
        """Weights of the published networks go into those with polyphase pooling, and back."""
        for name in ("mobius_mixed", "cnn_same_params"):
            published, ours = build_model(name), build_model(name, pooling="polyphase")
            ours.load_state_dict(published.state_dict())
            x = torch.rand(4, 1, 28, 28)
            self.assertNotClose(published.eval()(x), ours.eval()(x))

    def test_moving_the_cut_changes_nothing(self):
        model = randomized_norms(MobiusGaugeCNN(mode="mixed", dtype=DOUBLE)).eval()
        x = torch.rand(2, 1, 28, 28, dtype=DOUBLE)
        for column in range(0, 28, 4):
            recut = torch.cat([x[..., column:], x[..., :column].flip(2)], dim=3)
            self.assertClose(model(recut), model(x))

    def test_arguments(self):
        x = torch.rand(2, 3, 12, 16)
        for cls, arguments in [(MobiusGaugeCNN, {"mode": "mixed"}), (CNN, {"fix_params": True})]:
            for k in (1, 3):
                model = cls(kernel_size=k, ch_in=3, classes=7, **arguments).eval()
                self.assertEqual(model(x).shape, (2, 7))
            for bad in ({"ch_in": 0}, {"classes": -1}, {"ch_in": 1.5}, {"kernel_size": 4}, {"dropout": 1.5}, {"pooling": "max"}):
                with self.assertRaisesRegex(ValueError, next(iter(bad))):
                    cls(**bad)
        with self.assertRaisesRegex(ValueError, "scalar, signflip, regular, irrep, mixed, got 'regulr'"):
            MobiusGaugeCNN(mode="regulr")
        for bad in ("resnet", None, ["mobius_regular"]):
            with self.assertRaisesRegex(ValueError, f"{', '.join(MODELS)}, got {re.escape(repr(bad))}"):
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
            # Without a trained b, sign-flip fields are linear, and small differences of large values remain at the end.
            self.assertLess((logits.float() - model(x)).norm(), 0.25 * model(x).norm(), name)

    def test_compile(self):
        for name in ("cnn_same_channels", "mobius_regular", "mobius_mixed"):
            model, x = build_model(name).eval(), torch.rand(2, 1, 28, 28)
            torch.compiler.reset()
            with self.subTest(name), torch.no_grad():
                compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
                self.assertClose(compiled(x), model(x), tolerance=1e-4)

    def test_export(self):
        for name in MODELS:
            model, x = build_model(name).eval(), torch.rand(5, 1, 28, 28)
            batch = {"x": {0: torch.export.Dim("batch")}}
            with self.subTest(name), torch.no_grad():
                exported = torch.export.export(model, (x[:2],), dynamic_shapes=batch).module()
                self.assertClose(exported(x), model(x), tolerance=1e-4)


def randomized_norms(model: nn.Module) -> nn.Module:
    """Batch normalisation as after training, and parameters that are not at their special initial values."""
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


# ======================================================================================================
# The ways to compute: each equals the plain formula


def plain_conv(layer: MobiusConv, x: torch.Tensor) -> torch.Tensor:
    pad, fields = layer.kernel_size // 2, layer.in_fields
    cover = reference_cover(adjacent_channels(x, fields), tuple(fields), -pad, x.shape[3] + pad)
    padded = F.pad(arrange_channels(cover, fields), (0, 0, pad, pad))
    return F.conv2d(padded, layer.expand_kernel(), layer.expand_bias())


def plain_nonlin(layer: EquivNonlin, x: torch.Tensor) -> torch.Tensor:
    sign = slice(layer.in_fields.triv, layer.in_fields.triv + layer.in_fields.sign)
    odd = x[:, sign].sign() * F.elu(x[:, sign].abs() + layer.bias_sign) if layer.bias_sign is not None else x[:, sign]
    return torch.cat([F.elu(x[:, :sign.start]), odd, F.elu(x[:, sign.stop:])], dim=1)


def plain_pool(layer: MobiusPool, x: torch.Tensor) -> torch.Tensor:
    sign = slice(layer.in_fields.triv, layer.in_fields.triv + layer.in_fields.sign)
    windows = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    largest = windows.max(4).values
    by_magnitude = windows.gather(4, windows.abs().argmax(4, keepdim=True)).squeeze(4)
    return torch.cat([largest[:, :sign.start], by_magnitude[:, sign], largest[:, sign.stop:]], dim=1)


def everywhere_spectral():
    """The Fourier basis for every convolution in channels_last, also where it does not pay."""
    def pays(x, *_):
        _, c, w, l = x.shape
        return is_plain(x) and not x.is_meta and x.stride() == (c * w * l, 1, l * c, c)

    return mock.patch("spectral.pays", pays)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


class TestFastPaths(Case):
    def assertEqualsPlain(self, layer, plain, x, tolerance, message=None):
        """Forward, and the gradients of the input and of all parameters."""
        x = channels_last(x).requires_grad_()
        tensors = [x, *layer.parameters()]
        y, expected = layer(x), plain(layer, x)
        grad = torch.randn_like(expected)
        actual = (y, *torch.autograd.grad(y, tensors, grad))
        expected = (expected, *torch.autograd.grad(expected, tensors, grad))
        for a, b in zip(actual, expected):
            scale = b.abs().max().clamp(min=1e-3) if b.numel() else 1
            self.assertClose(a / scale, b / scale, tolerance, message)

    def test_convolution(self):
        some = [*FIELDS[:3], FIELDS[-1]]
        cases = [*itertools.product(FIELDS, FIELDS, (3,)), *itertools.product(some, some, (1, 5, 7))]
        for in_fields, out_fields, k in cases:
            for make, (width, length) in zip((Fields, PlanarFields), ((6, 5), (7, 8))):
                layer = randomized(MobiusConv(make(*in_fields), make(*out_fields), k, dtype=DOUBLE))
                x = features(in_fields, width, length)
                message = f"{in_fields} -> {out_fields}, k = {k}, {make.__name__}, W x L = {width} x {length}"
                with everywhere_spectral():
                    self.assertEqualsPlain(layer, plain_conv, x, TOLERANCE, message)
                    self.assertEqualsPlain(layer.float(), plain_conv, x.float(), 1e-4, message)
            self.assertEqualsPlain(layer.double(), plain_conv, x, TOLERANCE, message)

    def test_convolution_of_many_channels(self):
        """In the sizes where it pays by itself, and the kernel gradient is put together from copies."""
        for in_fields, out_fields in (((0, 0, 16), (0, 0, 32)), ((0, 0, 32), (32, 0, 0)), ((8, 8, 8), (0, 48, 0)), ((40, 0, 0), (8, 8, 16))):
            layer = MobiusConv(in_fields, out_fields, 5)
            x = features(in_fields, 7, 7, n=16, dtype=torch.float32)
            with mock.patch("spectral.steerable_conv", wraps=spectral.steerable_conv) as fast:
                self.assertEqualsPlain(layer, plain_conv, x, 1e-4, f"{in_fields} -> {out_fields}")
                self.assertEqual(fast.call_count, 1)

    def test_conventional_convolution(self):
        for k, (width, length) in itertools.product(KERNEL_SIZES, SIZES):
            layer = MobiusConvNaive(3, 4, k, dtype=DOUBLE)

            def plain(layer, x):
                return F.conv2d(MobiusPadNaive(k)(x), layer.weight, layer.bias)

            self.assertEqualsPlain(layer, plain, features((3, 0, 0), width, length), TOLERANCE)
            with everywhere_spectral():
                self.assertEqualsPlain(layer, plain, features((3, 0, 0), width, length), TOLERANCE)

    def test_conventional_convolution_of_many_channels(self):
        def plain(layer, x):
            return F.conv2d(MobiusPadNaive(5)(x), layer.weight, layer.bias)

        for c_in, c_out in ((32, 48), (48, 33)):
            x = features((c_in, 0, 0), 7, 7, n=16, dtype=torch.float32)
            with mock.patch("spectral.conventional_conv", wraps=spectral.conventional_conv) as fast:
                self.assertEqualsPlain(MobiusConvNaive(c_in, c_out, 5), plain, x, 1e-4)
                self.assertEqual(fast.call_count, 1)

    def test_a_layer_twice(self):
        """With one parameter on two levels; also where the gradient is to be differentiated."""
        def plain_naive(layer, x):
            return F.conv2d(MobiusPadNaive(3)(x), layer.weight, layer.bias)

        cases = [
            (EquivNonlin((1, 2, 1), dtype=DOUBLE), plain_nonlin, (1, 2, 1)),
            (MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE), plain_conv, (1, 1, 1)),
            (MobiusConvNaive(4, 4, 3, dtype=DOUBLE), plain_naive, (4, 0, 0)),
        ]
        for (layer, plain, fields), create_graph in itertools.product(cases, (False, True)):
            randomized(layer)
            x = channels_last(features(fields, 5, 4))
            with everywhere_spectral():
                y = layer(layer(x)).square().sum()
                actual = torch.autograd.grad(y, list(layer.parameters()), create_graph=create_graph)
            expected = torch.autograd.grad(plain(layer, plain(layer, x)).square().sum(), list(layer.parameters()))
            for a, b in zip(actual, expected):
                self.assertClose(a / b.abs().max(), b / b.abs().max())

    def test_function_transforms(self):
        """torch.func on layers and models, gradients in batches, FLOP counters and fake tensors."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils.flop_counter import FlopCounterMode

        for layer in (randomized(MobiusConv((0, 1, 1), (0, 1, 1), 3, dtype=DOUBLE)), randomized(EquivNonlin((0, 1, 1), dtype=DOUBLE))):
            x = channels_last(features((0, 1, 1), 3, 3, n=1))
            with everywhere_spectral():
                jacobian = torch.autograd.functional.jacobian(layer, x)
                for transform in (torch.func.jacrev, torch.func.jacfwd):
                    self.assertClose(transform(layer)(x), jacobian)
                self.assertClose(torch.autograd.functional.jacobian(layer, x, vectorize=True), jacobian)
                torch.func.hessian(lambda x: layer(x).square().sum())(x)
        model, images = build_model("mobius_mixed").eval(), torch.rand(16, 1, 28, 28)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            build_model("mobius_regular").eval()(fake.from_tensor(images))
        with FlopCounterMode(display=False) as counter:
            model(images)
        self.assertGreater(counter.get_total_flops(), 16 * 2 * 120e6)
        self.assertClose(torch.vmap(model)(images[:, None])[:, 0], model(images), tolerance=1e-4)

    def test_frozen_parts(self):
        """Gradients for the input alone and for the parameters alone."""
        layer, x = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE)), channels_last(features((1, 1, 1), 6, 5))
        with everywhere_spectral():
            layer(x).square().sum().backward()
            grads = [p.grad.clone() for p in layer.parameters()]
            layer.requires_grad_(False)
            x.requires_grad_()
            layer(x).square().sum().backward()
        layer.requires_grad_().zero_grad()
        x_grad, x.grad = x.grad, None
        plain_conv(layer, x).square().sum().backward()
        for actual, expected in zip((x_grad, *grads), (x.grad, *(p.grad for p in layer.parameters()))):
            self.assertClose(actual, expected)

    def test_nonlinearity_and_pooling(self):
        for fields in FIELDS:
            x = features(fields, 8, 6)
            self.assertEqualsPlain(randomized(EquivNonlin(fields, dtype=DOUBLE)), plain_nonlin, x, TOLERANCE)
            self.assertEqualsPlain(MobiusPool(fields), plain_pool, x, TOLERANCE)

    def test_derivatives_of_every_kind(self):
        """Second order, forward mode, torch.vmap over inputs and over parameters."""
        fields = (1, 1, 1)
        layers = [MobiusConv(fields, fields, 3, dtype=DOUBLE), EquivNonlin(fields, dtype=DOUBLE), MobiusPool(fields)]
        for layer, fast in itertools.product(layers, (False, True)):
            randomized(layer)
            x = channels_last(features(fields, 4, 4, n=1)).requires_grad_()
            values = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}

            def call(x, *given):
                return torch.func.functional_call(layer, dict(zip(values, given)), (x,))

            with self.subTest(layer, fast=fast), everywhere_spectral() if fast else contextlib.nullcontext():
                self.assertTrue(torch.autograd.gradcheck(call, (x, *values.values()), check_forward_ad=True))
                self.assertTrue(torch.autograd.gradgradcheck(call, (x, *values.values())))
                batch = torch.stack([x.detach(), 2 * x.detach()])
                self.assertClose(torch.vmap(layer)(batch)[1], layer(batch[1]))
                if values:
                    stacked = [torch.stack([v.detach(), 2 * v.detach()]) for v in values.values()]
                    result = torch.vmap(call, in_dims=(None, *[0] * len(stacked)))(x.detach(), *stacked)
                    self.assertClose(result[1], call(x.detach(), *[v[1] for v in stacked]))

    def test_bfloat16(self):
        layer = MobiusConv((0, 0, 16), (8, 8, 8), 5)
        x = features((0, 0, 16), 14, 14, n=16, dtype=torch.float32)
        exact = plain_conv(layer, x)
        with torch.autocast("cpu", torch.bfloat16), mock.patch("spectral.steerable_conv", wraps=spectral.steerable_conv) as fast:
            y = layer(channels_last(x))
        self.assertEqual((y.dtype, fast.call_count), (torch.bfloat16, 1))
        plain_error = (plain_conv(layer.bfloat16(), x.bfloat16()) - exact).norm()
        self.assertLess((y - exact).norm(), 3 * plain_error)

    def test_what_is_computed_how(self):
        """By the plain formula, where the other one does not pay; either way the memory format is that of the input."""
        def ways(x, layer, **kwargs):
            with mock.patch("spectral.steerable_conv", wraps=spectral.steerable_conv) as fast:
                y = layer(x)
            self.assertEqual(y.is_contiguous(memory_format=torch.channels_last), x.is_contiguous(memory_format=torch.channels_last))
            return fast.call_count

        big, x = MobiusConv((0, 0, 16), (0, 0, 16), 5), channels_last(torch.randn(16, 32, 14, 14))
        self.assertEqual(ways(x, big), 1)
        self.assertEqual(ways(x.contiguous(), big), 0)
        self.assertEqual(ways(x[:8], big), 0)
        self.assertEqual(ways(x, MobiusConv((0, 0, 16), (0, 0, 8), 5)), 0)
        self.assertEqual(ways(x, MobiusConv((0, 0, 16), (0, 0, 16), 3)), 0)
        self.assertEqual(ways(channels_last(torch.randn(16, 32, 300, 4)), big), 0)
        with mock.patch("spectral.steerable_conv", wraps=spectral.steerable_conv) as fast:
            build_model("mobius_regular")(torch.rand(16, 1, 28, 28))
            self.assertEqual(fast.call_count, 4)
        with mock.patch("spectral.conventional_conv", wraps=spectral.conventional_conv) as fast:
            build_model("cnn_same_channels")(torch.rand(16, 1, 28, 28))
            self.assertEqual(fast.call_count, 4)

    def test_wrong_dtypes_are_refused_either_way(self):
        layer = MobiusConv((0, 0, 16), (0, 0, 16), 5)
        for x in (torch.randn(16, 32, 7, 7), channels_last(torch.randn(16, 32, 7, 7))):
            with self.assertRaises(RuntimeError):
                layer(x.double())

    def test_results_do_not_share_memory(self):
        """The workspace is used again by each call, also in other threads and after inference mode."""
        layer = MobiusConv((0, 0, 1), (0, 0, 1), 3, dtype=DOUBLE)
        inputs = [channels_last(features((0, 0, 1), 6, 5, n=n)) for n in (2, 5, 3, 2)]
        expected = [plain_conv(layer, x) for x in inputs]
        with everywhere_spectral():
            with torch.inference_mode():
                layer(inputs[1])
            outputs = [layer(x) for x in inputs]
            for y, z in zip(outputs, expected):
                self.assertClose(y, z)
            torch.stack([y.square().sum() for y in outputs]).sum().backward()
            results = {}

            def work(i):
                results[i] = [layer(inputs[i]) for _ in range(20)]

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for i, ys in results.items():
                for y in ys:
                    self.assertClose(y, expected[i])

    def test_equivariance_in_the_fourier_basis(self):
        for in_fields, out_fields in itertools.product(FIELDS[:3] + FIELDS[-1:], repeat=2):
            layer = randomized(MobiusConv(in_fields, out_fields, 3, dtype=DOUBLE))
            with everywhere_spectral():
                self.assertIsometryEquivariant(lambda x: layer(channels_last(x)), in_fields, out_fields, 5, 4)
        naive = MobiusConvNaive(2, 2, 3, dtype=DOUBLE)
        x = features((2, 0, 0), 5, 4)
        with everywhere_spectral():
            self.assertNotClose(naive(channels_last(isometry_action(x, 1, (2, 0, 0)))), isometry_action(naive(channels_last(x)), 1, (2, 0, 0)))

    def test_planar_fields(self):
        """The same layers with the channels in another order."""
        for fields in FIELDS:
            planar, x = PlanarFields(*fields), features(fields, 6, 5)
            order = arrange_channels(torch.arange(channels(fields)).view(1, -1), planar).flatten()
            back = adjacent_channels(order.view(1, -1), planar).flatten()
            self.assertEqual(back.tolist(), list(range(channels(fields))))
            for shift in (1, 7):
                self.assertClose(isometry_action(x[:, order], shift, planar), isometry_action(x, shift, fields)[:, order])
            self.assertClose(gauge_transform(x[:, order], planar), gauge_transform(x, fields)[:, order])
            conv = randomized(MobiusConv(fields, fields, 3, dtype=DOUBLE))
            pool, twin = MobiusPool(fields), MobiusConv(planar, planar, 3, dtype=DOUBLE)
            twin.load_state_dict(conv.state_dict())
            self.assertClose(twin(x[:, order]), conv(x)[:, order])
            self.assertClose(MobiusPool(planar)(x[:, order]), pool(x)[:, order])


class TestKeptKernels(Case):
    """Without gradients a kernel is expanded once, and never used after a parameter has changed."""

    def setUp(self):
        self.layers = [
            (MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE), channels_last(features((1, 1, 1), 5, 6))),
            (MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE), features((1, 1, 1), 5, 6)),
        ]

    @contextlib.contextmanager
    def counted(self):
        with mock.patch.object(MobiusConv, "_first_rows", autospec=True, side_effect=MobiusConv._first_rows) as rows:
            with everywhere_spectral():
                yield rows

    def test_once(self):
        for layer, x in self.layers:
            randomized(layer)
            with torch.no_grad(), self.counted() as rows:
                first = [layer.eval()(x) for _ in range(3)][-1]
                self.assertEqual(rows.call_count, 1)
            with self.counted() as rows:
                for _ in range(2):
                    self.assertClose(layer(x), first)
                self.assertEqual(rows.call_count, 2)  # with gradients, each has its own
                layer.requires_grad_(False)
                layer(x)
                self.assertEqual(rows.call_count, 2)

    def test_never_stale(self):
        def load(layer):
            layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})

        def optimize(layer):
            for p in layer.parameters():
                p.grad = torch.randn_like(p)
            torch.optim.SGD(layer.parameters(), lr=1.0).step()

        def edit_in_place(layer):
            with torch.no_grad():
                layer.weights_triv2triv[0, 0, 0, 0] += 1

        def edit_data(layer):
            layer.weights_reg2reg.data.mul_(2)

        def edit_bias_data(layer):
            layer.bias_reg.data.add_(1)

        def edit_by_numpy(layer):
            layer.weights_sign2sign.detach().numpy()[:] += 1

        def replace(layer):
            layer.bias_triv = nn.Parameter(torch.randn_like(layer.bias_triv))

        def swap_data(layer):
            layer.bias_triv.data = torch.randn_like(layer.bias_triv)

        changes = (load, optimize, edit_in_place, edit_data, edit_bias_data, edit_by_numpy, replace, swap_data)
        for (layer, x), change in itertools.product(self.layers, changes):
            randomized(layer).eval()
            with self.subTest(change.__name__), everywhere_spectral(), torch.no_grad():
                before = layer(x)
                change(layer)
                self.assertNotClose(layer(x), before)
                self.assertClose(layer(x), plain_conv(layer, x))

    def test_to(self):
        for layer, x in self.layers:
            randomized(layer).eval()
            with everywhere_spectral(), torch.no_grad():
                y = layer(x)
                single = layer.to(torch.float32)(x.float())
                self.assertEqual(single.dtype, torch.float32)
                self.assertClose(single.double(), y, tolerance=1e-4)
                self.assertTrue(layer.to("meta")(x.float().to("meta")).is_meta)

    def test_inference_mode(self):
        for layer, x in self.layers:
            layer.requires_grad_(False)
            with everywhere_spectral():
                with torch.inference_mode():
                    y = layer(x)
                    y = layer(x)
                x = x.clone(memory_format=torch.preserve_format).requires_grad_()
                z = layer(x)
                z.sum().backward()
            self.assertClose(z, y)

    def test_what_is_no_parameter(self):
        """What a kernel is made of can be computed itself, or be put in the place of a parameter."""
        layer, x = self.layers[0]
        with everywhere_spectral(), torch.no_grad():
            layer.eval()(x)
            torch.nn.utils.parametrizations.weight_norm(layer, "weights_reg2sign")
            layer(x)
            layer.parametrizations.weights_reg2sign.original0.mul_(2)
            self.assertClose(layer(x), plain_conv(layer, x))
            layer = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE)).eval()
            for _ in range(2):
                torch.nn.utils.prune.random_unstructured(layer, "weights_reg2reg", 0.5)
                self.assertClose(layer(x), plain_conv(layer, x))
            layer = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE)).eval()
            layer(x)
            other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
            twin = copy.deepcopy(layer)
            twin.load_state_dict(other)
            self.assertClose(torch.func.functional_call(layer, other, (x,)), plain_conv(twin, x))

    def test_conventional_layer(self):
        layer, x = MobiusConvNaive(2, 3, 3, dtype=DOUBLE), channels_last(features((2, 0, 0), 5, 4))
        with everywhere_spectral(), torch.no_grad(), mock.patch("spectral.conventional_spectrum", wraps=spectral.conventional_spectrum) as made:
            layer(x)
            layer(x)
            self.assertEqual(made.call_count, 1)
            layer.bias.data.add_(1)
            self.assertClose(layer(x), F.conv2d(MobiusPadNaive(3)(x), layer.weight, layer.bias))
            self.assertEqual(made.call_count, 2)

    def test_other_widths(self):
        layer = randomized(MobiusConv((0, 0, 1), (0, 0, 1), 3, dtype=DOUBLE)).eval()
        with everywhere_spectral(), torch.no_grad():
            for width in (*range(1, 12), 3, 1):
                x = channels_last(features((0, 0, 1), width, 4))
                self.assertClose(layer(x), plain_conv(layer, x))
        self.assertLessEqual(len(layer._kept[1]), 8)

    def test_copies_and_files(self):
        for layer, x in self.layers:
            fresh = io.BytesIO()
            torch.save(layer, fresh)
            with everywhere_spectral(), torch.no_grad():
                layer.eval()(x)
                used = io.BytesIO()
                torch.save(layer.train(), used)
                self.assertEqual(used.getbuffer().nbytes, fresh.getbuffer().nbytes)
                twin = copy.deepcopy(layer)
                randomized(layer)
                self.assertNotClose(twin(x), layer(x))


class TestExport(Case):
    def test_layers(self):
        for in_fields, out_fields, k in itertools.product(FIELDS, FIELDS, (1, 5)):
            layer, x = randomized(MobiusConv(in_fields, out_fields, k, dtype=DOUBLE)), features(in_fields, 6, 7)
            exported = layer.export()
            self.assertEqual([type(m) for m in exported], [TransportPad, nn.Conv2d])
            self.assertClose(exported(x), layer(x))
            before = exported(x)
            randomized(layer)
            self.assertClose(exported(x), before)
        self.assertIsInstance(EquivNonlin((1, 0, 2)).export(), nn.ELU)

    def test_models(self):
        for name in MODELS:
            model, x = randomized_norms(build_model(name, dtype=DOUBLE)).eval(), torch.rand(16, 1, 28, 28, dtype=DOUBLE)
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
        model, x = export(build_model("mobius_mixed", dtype=DOUBLE).eval()), torch.rand(3, 1, 28, 28, dtype=DOUBLE)
        program = torch.export.export(model, (x,))
        self.assertClose(program.module()(x), model(x))

    @unittest.skipUnless(find_spec("onnx") and find_spec("onnxruntime"), "onnx and onnxruntime are not installed")
    def test_onnx(self):
        import onnxruntime

        x = torch.rand(3, 1, 28, 28)
        for pooling, dynamo in itertools.product(POOLINGS, (False, True) if find_spec("onnxscript") else (False,)):
            model = export(build_model("mobius_mixed", pooling=pooling).eval())
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "model.onnx")
                with contextlib.redirect_stdout(io.StringIO()):
                    torch.onnx.export(model, (x,), path, dynamo=dynamo)
                session = onnxruntime.InferenceSession(path)
                (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            self.assertClose(torch.from_numpy(y), model(x).detach(), tolerance=1e-4)


# ======================================================================================================
# Data and training. Everything is written below temporary folders.


class FilesCase(Case):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assertFails(self, main, *arguments, contains=(), status=2):
        """`main` exits with `status` and one line on stderr that has all of `contains`; returns the line."""
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
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def not_installed(module: str):
    """Imports of `module` fail. (mock.patch.dict would also forget every other module imported meanwhile.)"""
    absent = object()
    before = sys.modules.get(module, absent)
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]
        if before is not absent:
            sys.modules[module] = before


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's own format: magic number, shape, bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_fake_mnist(folder: Path) -> dict[str, np.ndarray]:
    """As many digits as MNIST has, each of a few random pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[np.arange(n), random.integers(28, size=n), random.integers(28, size=n)] = random.integers(1, 256, size=n)
        arrays |= {f"{split}-images-idx3-ubyte": images, f"{split}-labels-idx1-ubyte": random.integers(10, size=n)}
    for name, array in arrays.items():
        write_idx(folder / name, array)
    return arrays


class TestConvertMNIST(FilesCase):
    def convert(self, name="digits.npz", **options):
        path = convert_mnist.convert("digits", self.folder / name, **options)
        with np.load(path, allow_pickle=False) as npz:
            return dict(npz)

    def test_digits(self):
        data = self.convert()
        for split, n in (("train", 1297), ("test", 500)):
            for version in ("shifted", "centered"):
                images = data[f"{split}_data_{version}"]
                self.assertEqual((images.shape, images.dtype), ((n, 1, 28, 28), np.float32))
                self.assertTrue(images.min() >= 0 and 0.9 < images.max() <= 1)
            self.assertEqual(set(data[f"{split}_labels"].tolist()), set(range(10)))
            self.assertEqual(data[f"{split}_labels"].shape, (n,))
        # Compressed: MNIST's 44,000 images come to less than 12 MB instead of 138.
        with zipfile.ZipFile(self.folder / "digits.npz") as archive:
            self.assertEqual({member.compress_type for member in archive.infolist()}, {zipfile.ZIP_DEFLATED})
        box = data["train_data_centered"][:, :, 4:24, 4:24]
        self.assertEqual(box.sum(), data["train_data_centered"].sum())
        self.assertEqual(len(data), 8)

    def test_centered_digits_are_the_source(self):
        from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        data = self.convert()
        centered = torch.from_numpy(np.concatenate([data["train_data_centered"], data["test_data_centered"]]))
        # Bilinear upscaling keeps a digit's mean, near enough, and its coarse shape.
        coarse = F.interpolate(centered[:, :, 4:24, 4:24], size=(8, 8), mode="area").flatten(1).double()
        expected = torch.from_numpy(images) / 16
        correlation = torch.corrcoef(torch.cat([coarse.flatten()[None], expected.flatten()[None]]))[0, 1]
        self.assertGreater(correlation, 0.95)
        self.assertTrue(np.array_equal(np.concatenate([data["train_labels"], data["test_labels"]]), labels))

    def test_shifted_digits_follow_from_the_stored_shifts(self):
        data = self.convert()
        for split in ("train", "test"):
            shifts = data[f"{split}_shifts"]
            self.assertEqual((shifts.min(), shifts.max()), (0, 55))
            centered = data[f"{split}_data_centered"]
            cover = np.concatenate([centered, centered[:, :, ::-1]], axis=3)
            expected = np.stack([np.roll(digit, t, axis=2)[:, :, :28] for digit, t in zip(cover, shifts)])
            self.assertTrue(np.array_equal(data[f"{split}_data_shifted"], expected))
        counts = np.bincount(data["train_shifts"], minlength=56)
        self.assertLess(((counts - 1297 / 56) ** 2 / (1297 / 56)).sum(), 99)  # chi-squared with 55 degrees, p = 0.0002

    def test_same_options_same_bytes(self):
        first = convert_mnist.convert("digits", self.folder / "a.npz", seed=3).read_bytes()
        self.assertEqual(first, convert_mnist.convert("digits", self.folder / "b.npz", seed=3).read_bytes())
        a, b = self.convert(seed=3), self.convert(seed=4)
        self.assertFalse(np.array_equal(a["train_shifts"], b["train_shifts"]))
        self.assertTrue(np.array_equal(a["train_data_centered"], b["train_data_centered"]))

    def test_train_size(self):
        few, many = self.convert(train_size=10), self.convert()
        for key in few:
            expected = many[key][:10] if key.startswith("train") else many[key]
            self.assertTrue(np.array_equal(few[key], expected), key)
        for bad in (0, -1, 1298):
            with self.assertRaisesRegex(ValueError, f"1 … 1297 for digits, got {bad}"):
                self.convert(train_size=bad)

    def test_mnist_from_a_folder(self):
        arrays = write_fake_mnist(self.folder / "MNIST" / "raw")
        for root in (self.folder, self.folder / "MNIST" / "raw"):  # torchvision's root, or the files by themselves
            path = convert_mnist.convert("mnist", self.folder / "mnist.npz", mnist_root=root, train_size=50)
            with np.load(path, allow_pickle=False) as npz:
                for split, n in (("train", 50), ("t10k", 10_000)):
                    name = split.replace("t10k", "test")
                    images = arrays[f"{split}-images-idx3-ubyte"][:n, None] / np.float32(255)
                    self.assertTrue(np.array_equal(npz[f"{name}_data_centered"], images))
                    self.assertTrue(np.array_equal(npz[f"{name}_labels"], arrays[f"{split}-labels-idx1-ubyte"][:n]))
        path = convert_mnist.convert("mnist_validation", self.folder / "validation.npz", mnist_root=self.folder, train_size=50)
        with np.load(path, allow_pickle=False) as npz:  # nothing of the test set
            for name, digits in (("train", slice(50)), ("test", slice(20_000, 30_000))):
                images = arrays["train-images-idx3-ubyte"][digits, None] / np.float32(255)
                self.assertTrue(np.array_equal(npz[f"{name}_data_centered"], images))
                self.assertTrue(np.array_equal(npz[f"{name}_labels"], arrays["train-labels-idx1-ubyte"][digits]))
        for bad in (0, 60_001):
            self.assertFails(convert_mnist.main, "--train_size", bad, contains=["train_size", "1 … 60000", str(bad)])
        self.assertFails(convert_mnist.main, "--source", "mnist_validation", "--train_size", 20_001, contains=["1 … 20000", "20001"])

    def test_mnist_that_is_not_there(self):
        line = self.assertFails(convert_mnist.main, "--mnist_root", self.folder, contains=[str(self.folder), "--mnist_root"])
        for name in convert_mnist.MNIST_FILES:
            self.assertIn(name, line)

    def test_mnist_that_is_something_else(self):
        write_fake_mnist(self.folder)
        images, labels = (self.folder / name for name in convert_mnist.MNIST_FILES[:2])
        whole = {path: path.read_bytes() for path in (images, labels)}
        small = self.folder / "small"
        write_idx(small, np.zeros((100, 28, 28)))
        high = self.folder / "high"
        write_idx(high, np.full(60_000, 10))
        for path, content in [
            (images, whole[images][:1_000_000]),
            (labels, whole[labels][:100]),
            (images, b""),
            (images, b"no digits" * 9),
            (images, small.read_bytes()),
            (labels, high.read_bytes()),
            (images, gzip.compress(b"digits")),
            (labels, whole[images]),
        ]:
            path.write_bytes(content)
            with self.subTest(path=path.name, content=content[:20]):
                self.assertFails(convert_mnist.main, "--mnist_root", self.folder, "--out", self.folder / "out.npz",
                                 contains=[path.name, str(self.folder), "truncated or not MNIST"])
                self.assertFalse((self.folder / "out.npz").exists())
            path.write_bytes(whole[path])

    def test_no_network(self):
        with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder), \
                mock.patch("socket.getaddrinfo", side_effect=OSError("no network")):
            for main, arguments in ((convert_mnist.main, []), (train.main, ["--model", "mobius_regular"])):
                line = self.assertFails(main, *arguments, contains=["--mnist_root", "--dataset digits"])
                for name in convert_mnist.MNIST_FILES:
                    self.assertIn(name, line)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_download(self):
        """What torchvision downloads is in place once it is complete, and not downloaded again."""
        calls = []

        class Downloader:
            def __init__(self, root, download):
                calls.append(root)
                write_fake_mnist(Path(root) / "MNIST" / "raw")

        real = convert_mnist._torchvision_mnist()
        with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder):
            with mock.patch.object(convert_mnist, "_torchvision_mnist", side_effect=[Downloader, real]):
                train_set, test_set = convert_mnist.load_mnist()
            self.assertEqual((len(train_set.labels), len(test_set.labels)), (60_000, 10_000))
            convert_mnist.load_mnist()
            # A file that went missing is fetched again, into a folder that holds the others.
            (self.folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
            with mock.patch.object(convert_mnist, "_torchvision_mnist", side_effect=[Downloader, real]):
                convert_mnist.load_mnist()
        self.assertEqual(len(calls), 2)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["MNIST"])

    def test_without_torchvision(self):
        write_fake_mnist(self.folder)
        with not_installed("torchvision.datasets"):
            self.assertFails(convert_mnist.main, "--mnist_root", self.folder, contains="torchvision")
            convert_mnist.convert("digits", self.folder / "digits.npz")

    def test_interrupted(self):
        path = convert_mnist.convert("digits", self.folder / "digits.npz")
        before = self.files()

        def half(file, **arrays):
            file.write(b"half an npz")
            raise KeyboardInterrupt

        with mock.patch("numpy.savez_compressed", half), self.assertRaises(KeyboardInterrupt):
            convert_mnist.convert("digits", path, seed=1)
        self.assertEqual(self.files(), before)  # and no temporary file is left
        with mock.patch("os.replace", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            convert_mnist.convert("digits", path, seed=1)
        self.assertEqual(self.files(), before)

    def test_killed(self):
        path = convert_mnist.convert("digits", self.folder / "digits.npz")
        before = path.read_bytes()
        process = subprocess.Popen([sys.executable, ROOT / "convert_mnist.py", "--source", "digits", "--seed", "1", "--out", path])
        while process.poll() is None and not list(self.folder.glob(".*.tmp")):
            time.sleep(0.01)
        process.kill()
        self.assertEqual(process.wait(), -signal.SIGKILL)  # it was writing
        self.assertEqual(path.read_bytes(), before)

    def test_unwritable(self):
        (self.folder / "file").write_text("")
        self.assertFails(convert_mnist.main, "--source", "digits", "--out", self.folder / "file" / "out.npz",
                         contains=["cannot write", "out.npz"])
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        for target in (fifo, self.folder):
            self.assertFails(convert_mnist.main, "--source", "digits", "--out", target,
                             contains=["cannot write", str(target), "not a file"])
        self.assertTrue(fifo.is_fifo())

    def test_a_link_stays_a_link(self):
        (self.folder / "link.npz").symlink_to(self.folder / "digits.npz")
        convert_mnist.convert("digits", self.folder / "link.npz", train_size=1)
        self.assertTrue((self.folder / "link.npz").is_symlink())
        self.assertTrue((self.folder / "digits.npz").is_file())

    def test_bad_options(self):
        self.assertFails(convert_mnist.main, "--source", "digits", "--mnist_root", self.folder, contains=["mnist_root", "digits"])
        for bad in ({"train_size": 10.5}, {"seed": 1.5}, {"seed": 2**32}, {"source": ["digits"]}):
            (name,) = bad
            with self.assertRaisesRegex(ValueError, name):
                convert_mnist.convert(**{"source": "digits", "path": self.folder / "no.npz"} | bad)
        self.assertFails(convert_mnist.main, "--source", "cifar", contains=["cifar", "mnist", "digits"])
        self.assertFails(convert_mnist.main, "--source", "digits", "--seed", "-1", contains=["seed", "-1"])
        self.assertFails(convert_mnist.main, "--train_size", "many", contains=["--train_size", "many"])
        self.assertFails(convert_mnist.main, "--trainsize", "3", contains="--trainsize")


def write_npz(path: Path, n_train: int = 64, n_test: int = 32, **changes) -> Path:
    """A small set of real digits; `changes` replace arrays, None leaves one out."""
    if not hasattr(write_npz, "arrays"):
        with tempfile.TemporaryDirectory() as folder:
            with np.load(convert_mnist.convert("digits", Path(folder) / "digits.npz")) as npz:
                write_npz.arrays = dict(npz)
    sizes = {"train": n_train, "test": n_test}
    arrays = {key: array[:sizes[key.split("_")[0]]] for key, array in write_npz.arrays.items()} | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


class TestDataLoader(FilesCase):
    def test_load_dataset(self):
        path = write_npz(self.folder / "digits.npz")
        with np.load(path) as npz:
            for name, split in data_loader.load_dataset(path).items():
                kind, version = name.split("_")
                self.assertTrue(np.array_equal(split.images, npz[f"{kind}_data_{version}"]))
                self.assertTrue(np.array_equal(split.labels, npz[f"{kind}_labels"]))
                self.assertEqual((split.images.dtype, split.labels.dtype), (torch.float32, torch.int64))

    def test_published_layout(self):
        """float64, labels of any number type, no shifts."""
        path = write_npz(self.folder / "digits.npz")
        changes = {"train_shifts": None, "test_shifts": None}
        for key, array in write_npz.arrays.items():
            n = 64 if key.startswith("train") else 32
            if not key.endswith("shifts"):
                changes[key] = array[:n].astype(np.float64)
        published = write_npz(self.folder / "published.npz", **changes)
        ours, theirs = data_loader.load_dataset(path), data_loader.load_dataset(published)
        for name in ours:
            self.assertTrue(torch.equal(ours[name].images, theirs[name].images))
            self.assertTrue(torch.equal(ours[name].labels, theirs[name].labels))

    def test_bad_files(self):
        good = write_npz(self.folder / "good.npz")
        with np.load(good) as npz:
            images, labels = npz["train_data_shifted"].copy(), npz["test_labels"].copy()
        images[3, 0, 5, 5] = 1.5
        negative, missing = -images, np.where(images > 1, np.nan, images)
        labels[7] = 10
        path = self.folder / "bad.npz"
        content = good.read_bytes()

        def run():
            return self.assertFails(train.main, "--model", "mobius_regular", "--data", path, "--log_dir", self.folder / "logs",
                                    contains=[str(path), "--data takes an npz as python convert_mnist.py makes it"])

        self.assertIn("No such file", run())
        for raw in (b"", b"text", content[:len(content) // 2], content[:-10], content[:5000] + bytes(100) + content[5100:]):
            path.write_bytes(raw)
            with self.subTest(len(raw)):
                self.assertIn("not a complete npz", run())
        for key in data_loader.KEYS:
            write_npz(path, **{key: None})
            self.assertIn(f"no {key}", run())
        for change, message in [
            ({"train_data_shifted": images}, "train_data_shifted has values outside [0, 1]"),
            ({"train_data_shifted": negative}, "train_data_shifted has values outside [0, 1]"),
            ({"train_data_shifted": missing}, "train_data_shifted has values outside [0, 1]"),
            ({"train_data_centered": images[:, 0]}, "train_data_centered has shape"),
            ({"test_data_centered": np.zeros((32, 1, 32, 32), np.float32)}, "test_data_centered has shape"),
            ({"test_data_centered": np.zeros((31, 1, 28, 28), np.float32)}, "test_data_centered has shape"),
            ({"test_data_centered": np.zeros((32, 1, 28, 28), np.uint8)}, "test_data_centered has dtype"),
            ({"test_labels": labels}, "test_labels has labels outside 0 … 9"),
            ({"test_labels": labels - 11}, "test_labels has labels outside 0 … 9"),
            ({"test_labels": labels + 0.5}, "test_labels has labels outside 0 … 9"),
            ({"test_labels": labels[:, None]}, "test_labels has shape"),
            ({"test_labels": labels + 0j}, "test_labels has dtype complex128"),
            ({"test_labels": labels.astype("m8[s]")}, "test_labels has dtype timedelta64"),
            ({"test_labels": np.zeros(32, [("a", int)])}, "test_labels has dtype"),
            ({"train_labels": np.array([{}] * 64)}, "allow_pickle"),
        ]:
            write_npz(path, **change)
            with self.subTest(message):
                self.assertIn(message, run())
        with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as damaged:
            for member in archive.namelist():  # a header that is not even Python
                content = archive.read(member)
                damaged.writestr(member, content.replace(b"{'descr'", b"{'descr\\\\") if member == "test_labels.npy" else content)
        run()
        np.save(self.folder / "array.npy", images)
        os.replace(self.folder / "array.npy", path)
        run()
        path.unlink()
        path.mkdir()
        run()
        self.assertFalse((self.folder / "logs").exists())

    def test_batches(self):
        split = convert_mnist.Split(torch.arange(10).float().reshape(10, 1, 1, 1), torch.arange(10))
        in_order = list(data_loader.batches(split, 4))
        self.assertEqual([batch.labels.tolist() for batch in in_order], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
        generator = torch.Generator().manual_seed(0)
        epochs = [[batch.labels.tolist() for batch in data_loader.batches(split, 4, generator)] for _ in range(2)]
        self.assertNotEqual(epochs[0], epochs[1])
        for epoch in epochs:
            self.assertEqual([len(batch) for batch in epoch], [4, 4])  # the last, partial one is dropped
            self.assertEqual(len(set(sum(epoch, []))), 8)
        for batch in data_loader.batches(split, 4, generator):
            self.assertTrue(torch.equal(batch.images.flatten().long(), batch.labels))


class Zygote:
    """A process that has imported everything and forks one child for each command: as a fresh Python, but seconds faster.

    `start` returns a pid, `wait` the exit status and what was printed; a child may be killed meanwhile.
    """

    CODE = """
import faulthandler, json, os, signal, sys, traceback
import torch, train, reproduce
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
torch.set_num_threads(1)
for line in sys.stdin:
    module, arguments, environment, output = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        faulthandler.register(signal.SIGUSR1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup and in some CI it is ignored
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
            cls._process = subprocess.Popen([sys.executable, "-c", cls.CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            unittest.addModuleCleanup(cls._stop)
        cls._process.stdin.write(json.dumps([module, list(map(str, arguments)), environment, str(output)]) + "\n")
        cls._process.stdin.flush()
        return int(cls._process.stdout.readline())

    @classmethod
    def _stop(cls):
        cls._process.stdin.close()
        cls._process.stdout.close()
        cls._process.wait()
        cls._process = None

    @staticmethod
    def wait(pid, output, seconds=30):
        """The exit status, None of a process that was killed, and its output."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                printed, _, status = Path(output).read_text().rpartition("\nexit ") if Path(output).exists() else ("", "", "")
                return (int(status) if status.lstrip("-").isdigit() else None), printed
            time.sleep(0.01)
        os.kill(pid, signal.SIGUSR1)  # tells where it is
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"still at work after {seconds} s: {Path(output).read_text()}")


class RunsCase(FilesCase):
    """Runs of two epochs on a few digits, a fraction of a second each."""

    DIGITS, BATCH = (8, 8), 4  # for training and test

    def setUp(self):
        super().setUp()
        self.data = write_npz(self.folder / "digits.npz", *self.DIGITS)
        self.logs = self.folder / "logs"

    def config(self, **options):
        options = {"model": "mobius_regular", "num_epochs": 2, "batch_size": self.BATCH, "data": str(self.data), "device": "cpu",
                   "log_dir": str(self.logs), "tensorboard": False} | options
        return train.Config(**options)

    def options(self, *more):
        return ["--model", "mobius_regular", "--data", self.data, "--log_dir", self.logs, "--num_epochs", "2",
                "--batch_size", self.BATCH, "--device", "cpu", "--no-tensorboard", *more]

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
                self.assertSameTree(torch.load(folder / file, weights_only=True), torch.load(expected / file, weights_only=True), file)
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
            self.assertTrue(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f"{path}: {a} and {b}")


class TestTrain(RunsCase):
    DIGITS, BATCH = (64, 32), 16

    def train(self, **options):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run = train.Run(self.config(**options))
            result = run.train()
        return result, run.folder.path, printed.getvalue()

    def options(self, *more):
        return ["--model", "mobius_regular", "--data", self.data, "--log_dir", self.folder / "logs", "--num_epochs", "2",
                "--batch_size", "16", "--device", "cpu", "--no-tensorboard", *more]

    def test_defaults_are_the_protocol(self):
        options = vars(train.command_line().parse_args(["--model", "mobius_regular"]))
        config = train.Config("mobius_regular")
        self.assertEqual(options, {"model": "mobius_regular", "resume": None, "eval_only": False, "checkpoint": None})
        self.assertEqual(vars(config), vars(config) | {
            "train_mode": "centered", "test_mode": "both", "num_epochs": 20, "batch_size": 128, "weight_decay": 1e-6, "lr": 5e-3,
            "lr_decay_period": 4, "lr_decay_factor": 2, "eval_freq": 1, "dataset": "mnist", "device": "auto", "precision": "fp32",
            "pooling": "fixed", "lr_schedule": "step", "warmup_epochs": 0, "deformation": 0, "stroke_width": 0, "scaling": 0, "dropout": 0.3, "label_smoothing": 0,
            "optimizer": "adam",
        })

    def test_the_run_is_what_was_asked_for(self):
        arrays = np.load(self.data)
        for train_mode, test_mode in itertools.product(train.TRAIN_MODES, train.TEST_MODES):
            run = train.Run(self.config(train_mode=train_mode, test_mode=test_mode, weight_decay=0.03, lr=0.02))
            run.folder.close()
            self.assertTrue(np.array_equal(run.training_set.images, arrays[f"train_data_{train_mode}"]))
            self.assertEqual(list(run.test_sets), ["shifted", "centered"] if test_mode == "both" else [test_mode])
            for version, test_set in run.test_sets.items():
                self.assertTrue(np.array_equal(test_set.images, arrays[f"test_data_{version}"]))
        for optimizer, kind in (("adam", torch.optim.Adam), ("muon", muon.Muon)):
            run = train.Run(self.config(optimizer=optimizer, weight_decay=0.03, lr=0.02))
            run.folder.close()
            (group,) = run.optimizer.param_groups
            self.assertIs(type(run.optimizer), kind)
            decay = group["kernel_decay" if optimizer == "muon" else "weight_decay"]
            self.assertEqual((decay, group["lr"], len(group["params"])), (0.03, 0.02, len(list(run.model.parameters()))))

    def test_learns(self):
        for model in ("mobius_mixed", "cnn_same_channels"):
            result, _, _ = self.train(model=model, num_epochs=3)
            losses = [record["train_loss"] for record in result["epochs"]]
            self.assertLess(losses[-1], losses[0] - 0.1, model)

    def test_is_a_plain_training_loop(self):
        """Two epochs written out: the same weights, bit for bit."""
        _, folder, _ = self.train(seed=3, lr_decay_period=1, weight_decay=0.01)
        digits = data_loader.load_dataset(self.data)["train_centered"]
        torch.manual_seed(3)
        order = torch.Generator().manual_seed(3)
        model = build_model("mobius_regular").train()
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.01)
        for lr in (5e-3, 2.5e-3):
            optimizer.param_groups[0]["lr"] = lr
            for index in torch.randperm(64, generator=order).reshape(4, 16):
                optimizer.zero_grad()
                F.cross_entropy(model(digits.images[index]), digits.labels[index]).backward()
                optimizer.step()
        trained = torch.load(folder / "weights.pt", weights_only=True)
        for name, value in model.state_dict().items():
            self.assertTrue(torch.equal(trained[name], value), name)

    def test_result_file(self):
        result, folder, printed = self.train(tensorboard=True, seed=5)
        stored = json.loads((folder / "result.json").read_text())
        self.assertEqual(stored, result)
        self.assertEqual(stored["status"], "finished")
        self.assertEqual(stored["config"] | {"seed": 5, "model": "mobius_regular", "batch_size": 16, "lr": 0.005}, stored["config"])
        self.assertEqual(stored["parameters"], 751_914)
        self.assertEqual((stored["data"]["train_digits"], stored["data"]["test_digits"]), (64, 32))
        self.assertEqual(stored["environment"]["versions"]["torch"], torch.__version__)
        self.assertEqual([record["epoch"] for record in stored["epochs"]], [1, 2])
        keys = {"epoch", "lr", "train_loss", "train_error", "seconds", "test_loss_shifted", "test_error_shifted",
                "test_loss_centered", "test_error_centered"}
        self.assertEqual(set(stored["epochs"][0]), keys)
        last = stored["epochs"][-1]
        self.assertEqual(stored["test_error"], {"shifted": last["test_error_shifted"], "centered": last["test_error_centered"]})
        # The log is what was printed: a line for the run, one for its settings, one for each epoch, and the final errors.
        self.assertEqual((folder / "log.txt").read_text(), printed)
        lines = printed.splitlines()
        self.assertEqual(len(lines), 5)
        self.assertEqual(lines[1], "not the paper's protocol: num_epochs 2, batch_size 16")
        for version, error in stored["test_error"].items():
            self.assertIn(f"{version} {error:.2f} %", lines[-1])
        self.assertRegex(lines[2], r"epoch  1/2 .*loss \d.*train error .*test error shifted .*, centered .* s$")
        self.assertRegex(folder.name, r"^[\w.-]+$")
        # The final error is that of the saved weights.
        model = build_model("mobius_regular")
        model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        _, error = train.evaluate(model, data_loader.load_dataset(self.data)["test_shifted"])
        self.assertEqual(error, stored["test_error"]["shifted"])

    def test_tensorboard(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        result, folder, _ = self.train(tensorboard=True)
        events, shown = (EventAccumulator(str(path)).Reload() for path in (folder, folder / "pictures"))
        expected = {"loss/train": "train_loss", "error/train": "train_error", "lr": "lr"}
        for version in ("shifted", "centered"):
            expected |= {f"loss/test_{version}": f"test_loss_{version}", f"error/test_{version}": f"test_error_{version}"}
        for tag, key in expected.items():
            for event, record in zip(events.Scalars(tag), result["epochs"], strict=True):
                self.assertAlmostEqual(event.value, record[key], places=3)
        # The pictures: what the run works with, its kernels from before the first epoch on, and how it ends.
        images = {tag: [event.step for event in shown.Images(tag)] for tag in shown.Tags()["images"]}
        self.assertEqual(images, {
            **{f"digits/{name}": [0] for name in ("centered training", "shifted test", "centered test")},
            "network/kernels of the first layer": [0, 1, 2], "network/error against shift": [2],
            **{f"network/misclassified {version} test digits": [2] for version in ("shifted", "centered")},
        })
        self.assertIn("_hparams_/experiment", events.summary_metadata)
        for version, error in result["test_error"].items():
            self.assertAlmostEqual(events.Scalars(f"final_error/{version}")[0].value, error, places=3)

    def test_pictures_of_a_run(self):
        """What TensorBoard is given to show: the network's own mistakes, and its error at each shift."""
        run = train.Run(self.config(tensorboard=True, num_epochs=1, batch_size=16))
        with contextlib.closing(run), mock.patch.object(pictures, "digits", wraps=pictures.digits) as digits:
            with mock.patch.object(pictures, "error_against_shift", wraps=pictures.error_against_shift) as error_against_shift:
                with mock.patch.object(pictures, "first_kernels", wraps=pictures.first_kernels) as first_kernels:
                    run.train()
        self.assertEqual([call.args[0] for call in first_kernels.mock_calls], [run.model] * 2)
        training, *_, shifted, centered = digits.mock_calls
        self.assertTrue(torch.equal(training.args[0], run.training_set.images[:20]))
        self.assertEqual(training.args[1], [str(label) for label in run.training_set.labels[:20].tolist()])
        for version, call in (("shifted", shifted), ("centered", centered)):
            images, labels = run.test_sets[version]
            predictions = run.model.eval()(images).argmax(1)
            wrong = predictions != labels
            self.assertTrue(torch.equal(call.args[0], images[wrong][:20]))
            self.assertEqual(call.args[1], [f"{y} as {p}" for y, p in zip(labels[wrong].tolist(), predictions[wrong].tolist())][:20])
            self.assertEqual(call.args[3], f"{wrong.sum()} of 32 {version} test digits are misclassified")
        ((row,), _), = (call.args for call in error_against_shift.mock_calls)
        images, labels = run.centered_test_set
        errors = [100 * (run.model(isometry_action(images, shift, (1, 0, 0))).argmax(1) != labels).double().mean().item() for shift in range(56)]
        self.assertEqual(row["errors"], errors)

    def test_interrupted_at_its_last_pictures(self):
        run = train.Run(self.config(tensorboard=True, num_epochs=1, batch_size=16), verbose=False)
        with contextlib.closing(run), mock.patch.object(pictures, "error_against_shift", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                run.train()
        self.assertEqual(run_folder.read_result(run.folder.path / "result.json")["status"], "finished")

    def test_seeds_repeat(self):
        def numbers(**options):
            result, folder, _ = self.train(**options)
            weights = torch.load(folder / "weights.pt", weights_only=True)
            return [{k: v for k, v in record.items() if k != "seconds"} for record in result["epochs"]], weights

        (first, weights), (again, same_weights), (other, _) = numbers(seed=1), numbers(seed=1), numbers(seed=2)
        self.assertEqual(first, again)
        self.assertTrue(all(torch.equal(weights[key], same_weights[key]) for key in weights))
        self.assertNotEqual(first, other)

    def test_learning_rate(self):
        def rates(**options):
            return [record["lr"] for record in self.train(num_epochs=4, batch_size=64, eval_freq=0, **options)[0]["epochs"]]

        self.assertEqual(rates(lr=0.008, lr_decay_period=1), [0.008, 0.004, 0.002, 0.001])
        self.assertEqual(rates(lr=0.01, lr_decay_period=2, lr_decay_factor=10), [0.01, 0.01, 0.001, 0.001])
        self.assertEqual(rates(lr_decay_period=0), [0.005] * 4)
        self.assertEqual(rates(lr=0.008, warmup_epochs=2, lr_decay_period=3), [0.002, 0.006, 0.008, 0.004])
        half_wave = [0.01 * (1 + math.cos(math.pi * part)) / 2 for part in (1 / 6, 3 / 6, 5 / 6)]
        for rate, expected in zip(rates(lr=0.01, lr_schedule="cosine", warmup_epochs=1), [0.005, *half_wave], strict=True):
            self.assertAlmostEqual(rate, expected)

    def test_learning_rate_of_each_step(self):
        seen = []
        run = train.Run(self.config(lr=0.01, lr_schedule="cosine", warmup_epochs=1, batch_size=16))
        with contextlib.closing(run), mock.patch.object(run.optimizer, "step", lambda: seen.append(run.optimizer.param_groups[0]["lr"])):
            run.train()
        self.assertEqual(seen, [run.config.learning_rate((step + 0.5) / run.steps) for step in range(2 * run.steps)])
        self.assertEqual(seen.index(max(seen)), run.steps)  # the first after warm-up
        self.assertLess(seen[-1], 0.01 * (math.pi / 2 / run.steps) ** 2)

    def test_deformed_digits(self):
        """Those of each batch are deformed anew, with coefficients that come with the order; for the test they stay as they are."""
        run = train.Run(self.config(deformation=1.5, stroke_width=0.5, scaling=0.3, batch_size=16))
        digits, order, seen = run.training_set.images, torch.Generator().manual_seed(run.config.seed), []
        with contextlib.closing(run), mock.patch.object(run.model, "forward", side_effect=run.model.forward) as forward:
            run.train()
        tested = sum(-(-len(split.labels) // train.EVAL_BATCH_SIZE) for split in run.test_sets.values())
        seen = [call.args[0] for call in forward.call_args_list]
        self.assertEqual(len(seen), 2 * (run.steps + tested))
        for epoch in range(2):
            index = torch.randperm(len(digits), generator=order)
            for step in range(run.steps):
                batch = digits[index[16 * step:16 * (step + 1)]]
                self.assertNotClose(seen[0], batch)
                self.assertTrue(torch.equal(seen.pop(0), run.deform(batch, run.deform.draw(16, order))))
            for split in run.test_sets.values():
                self.assertTrue(torch.equal(seen.pop(0), split.images))

    def test_label_smoothing(self):
        """In training only: a network that gives every class the same loses log 10 either way, one that is sure loses more."""
        for smoothing in (0.0, 0.3):
            run = train.Run(self.config(label_smoothing=smoothing, lr=1e-20, dropout=0.0))
            with contextlib.closing(run):
                with torch.no_grad():
                    run.model.classifier[7].weight.zero_()
                    run.model.classifier[7].bias.copy_(20.0 * (torch.arange(10) == 3))
                result = run.train()
            threes = (run.training_set.labels == 3).double().mean().item()
            expected = 20 * ((1 - smoothing) * (1 - threes) + smoothing * 0.9)
            self.assertAlmostEqual(result["epochs"][0]["train_loss"], expected, places=3)
            of_test = (run.test_sets["centered"].labels != 3).double().mean().item()
            self.assertAlmostEqual(result["epochs"][-1]["test_loss_centered"], 20 * of_test, places=3)

    def test_recipe(self):
        options = vars(train.command_line().parse_args(["--model", "mobius_regular", "--recipe", "improved", "--lr", "0.1"]))
        self.assertEqual({name: options[name] for name in ("model", "recipe", "lr")}, {"model": "mobius_regular", "recipe": "improved", "lr": 0.1})
        followed = train.follow_recipe({"model": "mobius_regular", "recipe": "improved", "lr": 0.1})
        self.assertEqual(followed, train.RECIPES["improved"] | {"model": "mobius_regular", "lr": 0.1})
        self.assertEqual(train.follow_recipe({"seed": 1, "recipe": "paper"}), {"seed": 1})
        printed = self.main(train, *self.options("--recipe", "improved", "--batch_size", "16", "--num_epochs", "2"))
        self.assertIn("not the paper's protocol: pooling polyphase, dropout 0.1, num_epochs 2, batch_size 16, optimizer muon, lr 0.003", printed)
        (path,) = (self.folder / "logs").glob("*/result.json")
        stored = json.loads(path.read_text())["config"]
        self.assertEqual(stored, stored | train.RECIPES["improved"] | {"batch_size": 16})
        self.assertFails(train.main, "--eval_only", "--checkpoint", path.parent, "--recipe", "improved", contains=["leave out --recipe"])
        self.assertIn("after 2 epochs", self.main(train, "--eval_only", "--checkpoint", path.parent))

    def test_evaluation(self):
        result, _, _ = self.train(num_epochs=3, eval_freq=2, test_mode="centered")
        self.assertEqual(["test_error_centered" in record for record in result["epochs"]], [False, True, True])
        self.assertEqual(set(result["test_error"]), {"centered"})
        result, _, _ = self.train(eval_freq=0, train_mode="shifted")
        self.assertEqual(["test_error_shifted" in record for record in result["epochs"]], [False, True])

        class Oracle(nn.Module):  # knows all labels but the first three
            def forward(self, images):
                return F.one_hot(images[:, 0, 0, 0].long(), 10).float()

        labels = torch.arange(1234) % 10
        images = torch.where(torch.arange(1234) < 3, (labels + 1) % 10, labels).float().reshape(-1, 1, 1, 1)
        loss, error = train.evaluate(Oracle(), convert_mnist.Split(images, labels))
        self.assertAlmostEqual(error, 100 * 3 / 1234)
        right, wrong = math.log(math.e + 9) - 1, math.log(math.e + 9)
        self.assertAlmostEqual(loss, (1231 * right + 3 * wrong) / 1234, places=5)

    def test_precision(self):
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            run, seen = train.Run(self.config(precision=precision, num_epochs=1)), set()
            run.model.register_forward_hook(lambda module, inputs, logits: seen.add((module.training, logits.dtype)))
            with contextlib.redirect_stdout(io.StringIO()):
                run.train()
            self.assertEqual(seen, {(True, dtype), (False, torch.float32)})  # networks are invariant in float32

    def test_bf16(self):
        result, folder, _ = self.train(precision="bf16", num_epochs=3)
        losses = [record["train_loss"] for record in result["epochs"]]
        self.assertLess(losses[-1], losses[0])
        weights = torch.load(folder / "weights.pt", weights_only=True)
        self.assertTrue(all(v.dtype == torch.float32 for v in weights.values() if v.is_floating_point()))

    def test_data_are_made_where_they_are_missing(self):
        with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder / "data"):
            with contextlib.redirect_stdout(io.StringIO()):
                run = train.Run(self.config(data=None, dataset="digits"))
                run.folder.close()
            path = self.folder / "data" / "mobius_digits.npz"
            self.assertTrue(path.exists())
            self.assertEqual(len(run.training_set.labels), 1297)
            before = path.stat().st_mtime_ns
            train.Run(self.config(data=None, dataset="digits")).folder.close()
            self.assertEqual(path.stat().st_mtime_ns, before)
            path.write_bytes(b"damaged")
            self.assertFails(train.main, "--model", "mobius_regular", "--dataset", "digits",
                             contains=[str(path), "delete it, and it is made anew"])
            os.replace(self.data, self.folder / "data" / "mobius_MNIST.npz")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                train.Run(self.config(data=None, mnist_root="nowhere")).folder.close()
            self.assertIn("--mnist_root is not read", printed.getvalue())

    def test_loss_that_is_not_finite(self):
        config = self.config()
        run = train.Run(config)
        with torch.no_grad():
            run.model.classifier[7].bias[0] = math.inf
        with contextlib.redirect_stdout(io.StringIO()), self.assertRaisesRegex(FloatingPointError, "nan at step 1 of 4 in epoch 1"):
            run.train()
        stored = json.loads((run.folder.path / "result.json").read_text())
        self.assertEqual(stored["status"], "diverged")
        self.assertIn("step 1 of 4", stored["reason"])
        self.assertIn("step 1 of 4", (run.folder.path / "log.txt").read_text())
        self.assertFails(train.main, *self.options("--lr", "1e20"), contains=["the loss is", "step", "--lr"], status=1)
        # The last step's damage shows in no training loss.
        self.assertFails(train.main, *self.options("--lr", "1e20", "--num_epochs", "1", "--batch_size", "64"),
                         contains=["the loss on shifted test digits is", "step 1 of 1 in epoch 1"], status=1)
        for path in (self.folder / "logs").glob("*/result.json"):
            stored = json.loads(path.read_text(), parse_constant=self.fail)  # NaN is no JSON
            self.assertEqual((stored["status"], stored["test_error"]), ("diverged", None))

    def test_disk_full(self):
        full, save = OSError(28, "No space left on device"), run_folder.RunFolder.save

        def save_once(folder, checkpoint):
            if len(checkpoint["result"]["epochs"]) > 1:
                raise full
            save(folder, checkpoint)

        with mock.patch.object(run_folder.RunFolder, "save", save_once):
            self.assertFails(train.main, *self.options("--num_epochs", "3"), contains="No space left")
        (path,) = (self.folder / "logs").glob("*/result.json")
        self.assertEqual(json.loads(path.read_text())["status"], "failed")

    def test_a_reader_that_goes_away_stops_nothing(self):
        command = [str(c) for c in (sys.executable, ROOT / "train.py", *self.options())]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            process.stdout.close()
            stderr = process.stderr.read()
        self.assertEqual((process.returncode, stderr), (0, ""))
        (path,) = (self.folder / "logs").glob("*/result.json")
        self.assertEqual(json.loads(path.read_text())["status"], "finished")

    def test_ctrl_c(self):
        output = self.folder / "printed"
        pid = Zygote.start("train", self.options("--num_epochs", "1000"), output)
        end = time.monotonic() + 60
        while not (output.exists() and "epoch  2/" in output.read_text()) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(pid, signal.SIGINT)
        status, printed = Zygote.wait(pid, output)
        self.assertEqual(status, 130)
        self.assertRegex(printed, r"interrupted after \d+ of 1000 epochs")
        self.assertNotIn("Traceback", printed)
        (folder,) = (self.folder / "logs").iterdir()
        stored = json.loads((folder / "result.json").read_text())
        self.assertEqual(stored["status"], "interrupted")
        self.assertGreaterEqual(len(stored["epochs"]), 2)
        self.assertIn("interrupted after", (folder / "log.txt").read_text())
        build_model("mobius_regular").load_state_dict(torch.load(folder / "weights.pt", weights_only=True))

    def test_bad_options(self):
        for options, contains in [
            (["--batch_size", "65"], ["batch_size", "64 training digits", "65"]),
            (["--batch_size", "0"], ["batch_size", "at least 2", "0"]),
            (["--batch_size", "-128"], ["batch_size", "-128"]),
            (["--batch_size", "1"], ["batch_size", "at least 2"]),
            (["--batch_size", "2.5"], ["--batch_size", "2.5"]),
            (["--lr", "0"], ["lr", "positive", "0"]),
            (["--lr", "nan"], ["lr", "positive", "nan"]),
            (["--lr", "inf"], ["lr", "inf"]),
            (["--lr", "-1"], ["lr", "-1"]),
            (["--weight_decay", "-1"], ["weight_decay"]),
            (["--weight_decay", "nan"], ["weight_decay"]),
            (["--num_epochs", "0"], ["num_epochs", "at least 1"]),
            (["--lr_decay_period", "-1"], ["lr_decay_period"]),
            (["--lr_decay_period", "2", "--lr_schedule", "cosine"], ["lr_decay_period", "left out with lr_schedule cosine"]),
            (["--recipe", "improved", "--lr_decay_factor", "3"], ["lr_decay_factor", "left out with lr_schedule cosine"]),
            (["--recipe", "best"], ["--recipe", "improved"]),
            (["--pooling", "max"], ["--pooling", "polyphase"]),
            (["--dropout", "1"], ["dropout", "below 1"]),
            (["--label_smoothing", "1"], ["label_smoothing", "below 1"]),
            (["--label_smoothing", "-0.1"], ["label_smoothing", "at least 0"]),
            (["--dropout", "nan"], ["dropout", "below 1"]),
            (["--warmup_epochs", "2"], ["warmup_epochs", "below num_epochs"]),
            (["--warmup_epochs", "-1"], ["warmup_epochs", "at least 0"]),
            (["--deformation", "-0.5"], ["deformation", "0 … 2"]),
            (["--deformation", "nan"], ["deformation", "0 … 2"]),
            (["--stroke_width", "1.5"], ["stroke_width", "0 … 1"]),
            (["--scaling", "0.4"], ["scaling", "0 … 0.3"]),
            (["--resume", "nowhere", "--recipe", "improved"], ["leave out --recipe"]),
            (["--lr_decay_factor", "0.5"], ["lr_decay_factor", "at least 1"]),
            (["--eval_freq", "-1"], ["eval_freq"]),
            (["--seed", "-1"], ["seed", "-1"]),
            (["--model", "resnet"], ["resnet", *MODELS]),
            (["--train_mode", "rotated"], ["rotated", "centered", "shifted"]),
            (["--precision", "fp8"], ["fp8", "fp32", "bf16"]),
            (["--frequency", "1"], ["--frequency", "-h lists the options"]),
            (["--log_dir", ""], ["log_dir", "a path"]),
            (["--dataset", "digits", "--mnist_root", "x"], ["mnist_root", "digits"]),
        ]:
            with self.subTest(options):
                self.assertFails(train.main, *self.options(*options), contains=contains)
        self.assertFails(train.main, contains="--model")
        for bad in ({"model": "resnet"}, {"model": ["mobius_regular"]}, {"num_epochs": 2.5}, {"batch_size": "16"},
                    {"seed": 1.5}, {"lr": "0.1"}):
            (name,) = bad
            with self.assertRaisesRegex(ValueError, f"{name} must be"):
                train.Config(**{"model": "mobius_regular"} | bad)
        for module in ("torch.utils.tensorboard", "matplotlib.figure"):
            with not_installed(module):
                self.assertFails(train.main, *self.options("--tensorboard"), contains="--no-tensorboard")
        with mock.patch("torch.cuda.is_available", return_value=False):
            self.assertFails(train.main, *self.options("--device", "cuda"), contains=["--device cuda", "--device cpu"])
            self.assertEqual(train.select_device("auto").type, "cpu")
        with mock.patch("torch.cuda.is_available", return_value=True):
            self.assertEqual(train.select_device("auto").type, "cuda")
        self.assertFalse((self.folder / "logs").exists())

    def test_unwritable_log_dir(self):
        (self.folder / "file").write_text("kept")
        self.assertFails(train.main, *self.options("--log_dir", self.folder / "file"), contains=["--log_dir", str(self.folder / "file")])
        self.assertFails(train.main, *self.options("--log_dir", self.folder / "file" / "logs"), contains=["--log_dir"])
        self.assertEqual((self.folder / "file").read_text(), "kept")

    def test_runs_of_the_same_second_do_not_mix(self):
        with mock.patch("time.strftime", return_value="20260101-000000"):
            folders = {run_folder.new_folder(self.logs, "digits: a|b") for _ in range(3)}
        self.assertEqual({folder.name for folder in folders}, {f"digits__a_b-20260101-000000{end}" for end in ("", "-2", "-3")})

    def test_help_writes_nothing(self):
        command = [sys.executable, ROOT / "reproduce.py", "-h"]  # it imports the other scripts
        process = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        self.assertIn("--runs", process.stdout)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["digits.npz"])


class TestCheckpoints(RunsCase):
    KILLS = 20

    def test_resume_is_exact(self):
        write_npz(self.data, 32, 16)
        for options in ({"model": "mobius_mixed", "lr_decay_period": 1},
                        {"precision": "bf16", "eval_freq": 2, **train.RECIPES["improved"]}):
            options["batch_size"] = 16
            config = self.config(num_epochs=4, **options)
            expected = self.finish(config)
            folder = self.finish(config, stop_after=1)
            for epoch in (2, None):
                torch.manual_seed(1234)  # whatever this process drew meanwhile
                self.finish(config, folder, stop_after=epoch)
            stored = self.assertSameRun(folder, expected)
            self.assertEqual([session["after_epoch"] for session in stored["resumed"]], [1, 2])
            # Another seed is another run: the comparison can fail.
            other = self.finish(self.config(num_epochs=4, **options | {"seed": 8}))
            with self.assertRaises(AssertionError):
                self.assertSameRun(folder, other)

    def test_resume_from_the_command_line(self):
        expected = self.finish(self.config(num_epochs=3))
        config = self.config(num_epochs=3)
        for source in (lambda folder: folder, lambda folder: folder / "checkpoint.pt"):
            folder = self.finish(config, stop_after=1)
            printed = self.main(train, "--resume", source(folder))
            self.assertIn("continued after epoch 1 of 3", printed)
            self.assertSameRun(folder, expected)
            # A finished run is finished.
            before = (folder / "weights.pt").read_bytes()
            printed = self.main(train, "--resume", source(folder), "--model", "mobius_regular")
            self.assertRegex(printed, r"^finished already: test error shifted .* %, centered .*\n$")
            self.assertEqual((folder / "weights.pt").read_bytes(), before)

    def test_resume_the_latest(self):
        options = self.options("--num_epochs", "3", "--resume")
        printed = self.main(train, *options)
        self.assertIn("this is the first", printed)
        (folder,) = self.logs.iterdir()
        self.assertIn("finished already", self.main(train, *options))
        self.finish(self.config(num_epochs=3, seed=1), stop_after=1)
        stopped = self.finish(self.config(num_epochs=3), stop_after=2)
        stored = json.loads((stopped / "result.json").read_text())
        for name in ("pooling", "dropout", "lr_schedule", "warmup_epochs", "deformation", "stroke_width", "scaling", "label_smoothing",
                     "optimizer"):  # as before there were these
            del stored["config"][name]
        run_folder.write_json(stopped / "result.json", stored)
        self.finish(self.config(num_epochs=3, data=str(write_npz(self.folder / "other.npz", 16, 8))), stop_after=1)
        (self.logs / "damaged").mkdir()
        (self.logs / "damaged" / "result.json").write_text("{")
        printed = self.main(train, *options)
        self.assertIn("continued after epoch 2 of 3", printed)
        self.assertIn(str(stopped), printed)
        self.assertSameRun(stopped, folder)
        self.assertFails(train.main, "--resume", contains="--model")

    def test_tensorboard_of_a_resumed_run(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        config = self.config(num_epochs=3, tensorboard=True)
        folder = self.finish(config, stop_after=2)
        time.sleep(1.1)  # TensorBoard names its files by the second
        self.finish(config, folder)
        records = json.loads((folder / "result.json").read_text())["epochs"]
        shown = EventAccumulator(str(folder / "pictures"), size_guidance={"images": 0}).Reload()
        self.assertEqual([event.step for event in shown.Images("network/kernels of the first layer")], [0, 1, 2, 3])
        self.assertEqual([event.step for event in shown.Images("digits/shifted test")], [0])
        scalars = EventAccumulator(str(folder)).Reload().Scalars("loss/train")
        self.assertEqual([event.step for event in scalars], [1, 2, 3])
        for event, record in zip(scalars, records):
            self.assertAlmostEqual(event.value, record["train_loss"], places=5)

    def test_killed_at_any_moment(self):
        """SIGKILL, twenty times: nothing is lost but the epoch that was running."""
        epochs = 8
        # One thread, as the children have.
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        start = time.monotonic()
        expected = self.finish(self.config(num_epochs=epochs))
        epoch_seconds = (time.monotonic() - start) / epochs
        random, kills, finished = np.random.default_rng(), 0, 0  # other moments each time
        folder, output = self.folder / "run", self.folder / "printed"
        options = self.options("--num_epochs", epochs, "--log_dir", folder)
        while kills < self.KILLS:
            if finished == epochs:  # and once more from the start
                self.main(train, *options, "--resume")  # the kill may have come before all files followed from the checkpoint
                self.assertSameRun(next(folder.iterdir()), expected)
                shutil.rmtree(folder)
                finished = 0
            output.unlink(missing_ok=True)
            pid = Zygote.start("train", [*options, "--resume"], output)
            time.sleep(random.uniform(0.05, 0.05 + 2 * epoch_seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status, printed = Zygote.wait(pid, output)
            self.assertIn(status, (None, 0), printed)
            kills += status is None
            told = [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/", printed, re.MULTILINE)]
            # Its checkpoint is whole, and of an epoch at least as late as those that were seen; so are the other files.
            checkpoints = list(folder.glob("*/checkpoint.pt"))
            if checkpoints:
                (path,) = checkpoints
                stored = run_folder.read_checkpoint(path)
                epoch = len(stored["result"]["epochs"])
                self.assertGreaterEqual(epoch, max([finished, *told]))
                if finished:
                    self.assertIn(f"continued after epoch {finished} of", printed + f"continued after epoch {finished} of" * (not printed))
                finished = epoch
                run_folder.read_result(path.with_name("result.json"))
            else:
                self.assertEqual((finished, told), (0, []))
                shutil.rmtree(folder, ignore_errors=True)
        COUNTS["kills of train.py"] += kills
        output.unlink(missing_ok=True)
        status, printed = Zygote.wait(Zygote.start("train", [*options, "--resume"], output), output)
        self.assertEqual(status, 0, printed)
        (folder,) = folder.iterdir()
        self.assertSameRun(folder, expected)
        self.assertEqual([path.name for path in folder.glob(".*")], [])

    def test_bad_checkpoints(self):
        folder = self.finish(self.config(num_epochs=3), stop_after=1)
        path = folder / "checkpoint.pt"
        whole = path.read_bytes()

        def changed(**changes):
            checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
            checkpoint |= {key: value(checkpoint[key]) if callable(value) else value for key, value in changes.items()}
            file = io.BytesIO()
            torch.save({key: value for key, value in checkpoint.items() if value is not None}, file)
            return file.getvalue()

        resume = ("--resume", folder)
        cases = [(whole[:n], resume, ["truncated or no checkpoint"]) for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
        cases += [
            (b"some other file" * 100, resume, ["truncated or no checkpoint"]),
            (self.data.read_bytes(), resume, ["truncated or no checkpoint"]),
            ((folder / "weights.pt").read_bytes(), resume, ["weights alone"]),
            (changed(format=99), resume, ["later version", "99", "update"]),
            (changed(model=None), resume, ["lacks model"]),
            (changed(random=None, optimizer=None), resume, ["lacks optimizer, random"]),
            (changed(config=lambda c: c | {"lr": "fast"}), resume, ["lr"]),
            (changed(config=lambda c: c | {"speed": 1}), resume, ["speed"]),
            (changed(model=lambda m: {"a": torch.zeros(1)}), resume, ["does not fit"]),
            (changed(model=build_model("mobius_mixed").state_dict()), resume, ["does not fit"]),
            (changed(optimizer=lambda o: o | {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}}}),
             resume, ["does not fit", "optimizer"]),
            (changed(optimizer=lambda o: o | {"state": {i: s | {"exp_avg_sq": torch.zeros(1)} for i, s in o["state"].items()}}), resume,
             ["does not fit", "optimizer"]),
            (changed(optimizer=lambda o: o | {"state": {}}), resume, ["does not fit", "begins anew"]),
            (changed(optimizer=lambda o: {"state": {}}), resume, ["does not fit"]),
            (changed(result=lambda r: r | {"epochs": []}), resume, ["does not fit"]),
            (changed(result=lambda r: r | {"epochs": [1]}), resume, ["does not fit"]),
            (changed(result=lambda r: r | {"epochs": [{"epoch": 1}]}), resume, ["does not fit"]),
            (changed(result=lambda r: r | {"seconds": math.nan}), resume, ["does not fit"]),
            (changed(result=lambda r: r | {"note": torch.ones(1)}), resume, ["does not fit"]),
            (changed(result=lambda r: {key: value for key, value in r.items() if key != "parameters"}), resume, ["does not fit"]),
            (changed(config=lambda c: c | {"data": 3}), resume, ["data must be a path"]),
            (changed(format=True), resume, ["no checkpoint"]),
            (changed(format=0), resume, ["no checkpoint"]),
            (changed(random={}), resume, ["does not fit"]),
            (changed(data=lambda d: d | {"sha256": "0"}), resume, ["another"]),
            (changed(device="cuda"), (*resume, "--device", "cpu"), ["--device cuda"]),
            (whole, (*resume, "--lr", "0.01"), ["lr 0.005, not 0.01"]),
            (whole, (*resume, "--model", "mobius_mixed"), ["mobius_regular, not mobius_mixed"]),
            (whole, (*resume, "--num_epochs", "5"), ["num_epochs 3, not 5"]),
            (whole, ("--resume", folder / "log.txt"), ["checkpoint.pt in it"]),
            (whole, ("--resume", self.folder / "nowhere"), ["nowhere", "no such folder"]),
            (whole, ("--resume", ""), ["--resume ''", "no such folder"]),
            (whole, ("--resume", self.folder), [str(self.folder), "no checkpoint in it"]),
            (whole, (*resume, "--checkpoint", ""), ["--eval_only"]),
            (whole, (*resume, "--eval_only", "--checkpoint", path), ["--resume"]),
        ]
        for content, arguments, contains in cases:
            path.write_bytes(content)
            before = self.files()
            with self.subTest(contains):
                # A configuration on the command line contradicts the file's in _restore, an own one in Config.
                self.assertFails(train.main, *arguments, contains=contains)
                self.assertEqual(self.files(), before)
        # Settings of the optimizer are those of the configuration, whatever the file says of them.
        expected = self.finish(self.config(num_epochs=3))
        path.write_bytes(changed(optimizer=lambda o: {"state": o["state"], "param_groups": [o["param_groups"][0] | {"weight_decay": 1.0}]}))
        self.assertIn("continued after epoch 1 of 3", self.main(train, *resume))
        self.assertSameRun(folder, expected)

    def test_full_disk(self):
        """As the system reports it: one line that names the file, and what was there stays."""
        folder = self.finish(self.config(num_epochs=3), stop_after=1)
        before = {name: content for name, content in self.files().items() if name.endswith(".pt")}

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        self.assertFails(train.main, "--resume", folder, contains=["cannot write", "checkpoint.pt: File too large"])
        self.assertEqual({name: content for name, content in self.files().items() if name.endswith(".pt")}, before)

    def test_other_threads(self):
        config = self.config(num_epochs=3)
        folder = self.finish(config, stop_after=1)
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(threads + 1)
        self.finish(config, folder)
        self.assertIn("rounding may differ", (folder / "log.txt").read_text())

    def test_code_in_a_checkpoint_is_not_run(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        marker, folder = self.folder / "run", self.finish(self.config())
        torch.save({"format": 1, "config": Evil()}, folder / "checkpoint.pt")
        self.assertFails(train.main, "--resume", folder, contains="checkpoint.pt")
        self.assertFails(train.main, "--eval_only", "--checkpoint", folder / "checkpoint.pt", contains="checkpoint.pt")
        self.assertFalse(marker.exists())

    def test_one_process_at_a_time(self):
        config = self.config(num_epochs=3)
        folder = self.finish(config, stop_after=1)
        run = train.Run(config, folder, verbose=False)
        before = self.files()
        self.assertFails(train.main, "--resume", folder, contains=["another process", str(folder)])
        self.assertEqual(self.files(), before)
        run.close()
        self.assertIn("continued after epoch 1", self.main(train, "--resume", folder))
        with mock.patch("run_folder.fcntl", None):
            self.assertFails(train.main, "--resume", folder, contains=["cannot lock", "no flock"])

    def test_eval_only(self):
        folder = self.finish(self.config(model="mobius_mixed"))
        errors = json.loads((folder / "result.json").read_text())["test_error"]
        alone = self.folder / "alone.pt"
        shutil.copy(folder / "weights.pt", alone)
        before = self.files()
        line = f"test error shifted {errors['shifted']:.2f} %, centered {errors['centered']:.2f} %"
        data = ("--data", self.data)
        self.assertIn(line, self.main(train, "--eval_only", "--checkpoint", folder / "checkpoint.pt"))
        self.assertIn("after 2 epochs", self.main(train, "--eval_only", "--checkpoint", folder / "checkpoint.pt"))
        self.assertIn(line, self.main(train, "--eval_only", "--checkpoint", alone, "--model", "mobius_mixed", *data))
        self.assertIn(line, self.main(train, "--eval_only", "--checkpoint", folder / "weights.pt", *data))
        self.assertIn(line, self.main(train, "--eval_only", "--checkpoint", folder))
        printed = self.main(train, "--eval_only", "--checkpoint", folder / "checkpoint.pt", "--test_mode", "centered")
        self.assertIn(f"test error centered {errors['centered']:.2f} %", printed)
        for arguments, contains in [
            ([], ["--checkpoint FILE"]),
            (["--checkpoint", self.folder / "nowhere.pt"], ["nowhere.pt", "No such file"]),
            (["--checkpoint", self.data], ["no checkpoint"]),
            (["--checkpoint", self.folder], ["cannot read", "checkpoint.pt"]),
            (["--checkpoint", alone, *data], ["--model"]),
            (["--checkpoint", alone, "--model", "cnn_same_params", *data], ["cnn_same_params"]),
            (["--checkpoint", folder / "weights.pt", "--model", "mobius_regular", *data], ["mobius_mixed, not a mobius_regular"]),
            (["--checkpoint", folder / "checkpoint.pt", "--model", "mobius_regular"], ["mobius_mixed, not a mobius_regular"]),
            (["--checkpoint", folder / "checkpoint.pt", "--lr", "1", "--seed", "2"], ["--lr, --seed"]),
        ]:
            with self.subTest(arguments):
                self.assertFails(train.main, "--eval_only", *arguments, contains=contains)
        self.assertFails(train.main, *self.options("--checkpoint", folder / "checkpoint.pt"), contains="--eval_only")
        self.assertEqual(self.files(), before)

    def test_predict_at_every_shift(self):
        """Those of digits moved one by one; a gauge CNN's repeat every 4 columns, with polyphase pooling in all."""
        test = data_loader.load_dataset(self.data)["test_centered"]
        model = randomized(build_model("mobius_regular"))
        predictions = train.predict_at_every_shift(model, test.images)
        self.assertEqual(predictions.shape, (56, len(test.labels)))
        for shift in (0, 3, 28, 55):
            moved = data_loader.Split(isometry_action(test.images, shift, (1, 0, 0)), test.labels)
            self.assertAlmostEqual(100 * (predictions[shift] != test.labels).double().mean().item(), train.evaluate(model, moved)[1])
        for phase in range(4):
            self.assertTrue((predictions[phase::4] == predictions[phase]).all())
        ours = build_model("mobius_regular", pooling="polyphase")
        ours.load_state_dict(model.state_dict())
        predictions = train.predict_at_every_shift(ours, test.images)
        self.assertTrue((predictions == predictions[0]).all())
        cnn = randomized(build_model("cnn_same_params", pooling="polyphase"))
        with torch.no_grad():
            cnn.classifier[7].bias.zero_()
            logits = cnn.eval()(test.images)
            cnn.classifier[7].bias.copy_(-logits.mean(0))  # or it sees the same class in everything
        predictions = train.predict_at_every_shift(cnn, test.images)
        self.assertFalse((predictions[::4] == predictions[0]).all())


# ======================================================================================================
# deformation.py


class TestDeformation(Case):
    def test_displace(self):
        """Whole pixels: each shows its neighbour; over the cut the reflected one, beyond the edges nothing. Halves: a mean."""
        x = torch.rand(2, 1, 4, 6, dtype=DOUBLE)

        def at(along, across, x=x):
            return deformation.displace(x, *(torch.full((len(x), 4, 6), float(d), dtype=DOUBLE) for d in (along, across)))

        for shift in (-40, -6, -2, 0, 1, 5, 13):
            self.assertClose(at(shift, 0), isometry_action(x, -shift, (1, 0, 0)))
        self.assertClose(at(0, 1), torch.cat([x[:, :, 1:], 0 * x[:, :, :1]], dim=2))
        self.assertClose(at(0, -3), torch.cat([torch.zeros(2, 1, 3, 6, dtype=DOUBLE), x[:, :, :1]], dim=2))
        same = torch.full((1, 1, 4, 6), 0.7, dtype=DOUBLE)
        self.assertClose(at(0.5, 0, same), same)
        ramp = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=DOUBLE).expand(1, 1, 4, 6)
        self.assertClose(at(0.5, 0, ramp)[..., 1:4], ramp[..., 1:4] + 0.05)
        self.assertEqual(at(1, 1, x[:0]).shape, (0, 1, 4, 6))
        self.assertTrue((at(0.4, 0.3) >= 0).all() and (at(0.4, 0.3) <= 1).all())

    def test_covariance(self):
        """Of white noise on the strip, smoothed by a Gaussian: that on the plane, of all images of a place under the reflections at
        the edges and the turns of the strip, which change the sign of the component across it; and without the mean along it."""
        width, length, sigma = 6, 8, 1.5
        deform = deformation.RandomDeformation(1.0, smoothness=sigma, size=(width, length))
        units = torch.eye(deform.draw(1, torch.Generator()).shape[1])
        w, l = torch.meshgrid(torch.arange(width, dtype=DOUBLE), torch.arange(length, dtype=DOUBLE), indexing="ij")
        for component, sign in zip(deform.displacements(units), (1, -1)):
            basis = component.double().flatten(1)
            expected = 0
            for turns, fold in itertools.product(range(-6, 7), range(-5, 6)):
                there = w if turns % 2 == 0 else width - 1 - w
                for image in (there + 2 * width * fold, -1 - there + 2 * width * fold):
                    distances = (w.flatten()[:, None] - image.flatten()) ** 2 + (l.flatten()[:, None] - l.flatten() - turns * length) ** 2
                    expected = expected + sign**turns * torch.exp(-distances / (4 * sigma**2))
            if sign == 1:
                expected = expected - expected.mean()
            self.assertClose(basis.T @ basis, expected / expected.diagonal().mean(), tolerance=1e-3)

    def test_isometries_of_digits_and_deformations(self):
        x = torch.rand(2, 1, 6, 8, dtype=DOUBLE)
        fields = torch.randn(2, 2, 6, 8, dtype=DOUBLE)
        y = deformation.displace(x, *fields.unbind(1))
        for shift in all_shifts(8):
            moved = isometry_action(fields, shift, (1, 1, 0))
            self.assertClose(deformation.displace(isometry_action(x, shift, (1, 0, 0)), *moved.unbind(1)), isometry_action(y, shift, (1, 0, 0)))

    def test_strength(self):
        for strength, smoothness in ((1.0, 5.0), (0.5, 3.0)):
            deform = deformation.RandomDeformation(strength, smoothness=smoothness)
            fields = torch.stack(deform.displacements(deform.draw(4000, torch.Generator().manual_seed(0))))
            for component in fields:
                self.assertAlmostEqual(component.square().mean().sqrt().item(), strength, delta=0.03 * strength)
                self.assertAlmostEqual(component.mean().item(), 0, delta=0.05 * strength)
        for bad in ((-1, 5), (math.nan, 5), (1, 0), (1, 200), (1, math.nan)):
            with self.assertRaisesRegex(ValueError, "strength must be a number"):
                deformation.RandomDeformation(bad[0], smoothness=bad[1])
        with self.assertRaisesRegex(ValueError, "stroke_width must be"):
            deformation.RandomDeformation(1, 1.1)
        with self.assertRaisesRegex(ValueError, "scaling must be"):
            deformation.RandomDeformation(1, scaling=0.4)

    def test_digits_stay_where_they_are(self):
        """Along the strip, wherever they lie on it; without the correction they do not."""
        digits = convert_mnist.load_digits()[0].images[:200]
        shifts = torch.randint(56, (200,), generator=torch.Generator().manual_seed(0))
        deform = deformation.RandomDeformation(1.0)
        coefficients = deform.draw(200, torch.Generator().manual_seed(1))

        def moved(before, after):
            return (deformation.centre(after) - deformation.centre(before) + 14) % 28 - 14

        for images in (digits, isometry_action(digits, shifts, (1, 0, 0))):
            deformed = deform(images, coefficients)
            self.assertEqual(deformed.shape, images.shape)
            self.assertTrue((deformed >= 0).all() and (deformed <= 1 + 1e-6).all())
            self.assertGreater((deformed - images).abs().flatten(1).amax(1).min().item(), 0.2)
            self.assertLess(moved(images, deformed).abs().mean().item(), 0.05)
            plain = deformation.displace(images, *deform.displacements(coefficients))
            self.assertGreater(moved(images, plain).abs().mean().item(), 0.2)
        blank = deform(torch.zeros(2, 1, 28, 28), coefficients[:2])
        self.assertTrue(torch.equal(blank, torch.zeros(2, 1, 28, 28)))

    def test_scaling(self):
        """Longer and narrower: about the centre and the middle, wherever the digit lies and whatever frame it is in."""
        def blob(across, along, middle=0.0):
            w, l = torch.meshgrid(torch.arange(14.0) - 6.5 - middle, torch.arange(20.0) - 7.5, indexing="ij")
            return torch.exp(-0.5 * ((w / across) ** 2 + (l / along) ** 2))[None, None]

        deform = deformation.RandomDeformation(0.0, scaling=0.25, size=(14, 20))
        drawn = torch.zeros_like(deform.draw(1, torch.Generator()))
        drawn[:, -3], drawn[:, -2] = 4 * math.log(1.5), -4 * math.log(1.5)
        # Below the middle of the strip it comes nearer to it.
        self.assertClose(deform(blob(2.1, 1.2, 1.5), drawn), blob(1.4, 1.8, 1.0), tolerance=0.02)
        for shift in all_shifts(20):
            scaled = deform(isometry_action(blob(2.1, 1.2), shift, (1, 0, 0)), drawn)
            self.assertClose(isometry_action(scaled, -shift, (1, 0, 0)), blob(1.4, 1.8), tolerance=0.02)
        # Beside it, deformations go on, and are scaled too.
        both, alone = (deformation.RandomDeformation(0.7, scaling=scaling, size=(14, 20)) for scaling in (1e-9, 0.0))
        drawn = both.draw(3, torch.Generator().manual_seed(0))
        self.assertClose(both(blob(2.1, 1.2).expand(3, -1, -1, -1), drawn),
                         alone(blob(2.1, 1.2).expand(3, -1, -1, -1), torch.cat([drawn[:, :-3], drawn[:, -1:]], dim=1)), tolerance=1e-4)
        # Either factor by itself, its logarithm normal.
        deform = deformation.RandomDeformation(0.0, scaling=0.2)
        blob = torch.exp(-((torch.arange(28.0) - 13.5) ** 2)[:, None] / 18 - ((torch.arange(28.0) - 13.5) ** 2) / 18)[None, None]
        scaled = deform(blob.expand(2000, -1, -1, -1), deform.draw(2000, torch.Generator().manual_seed(0)))[:, 0]

        def log_size(marginal):
            places = torch.arange(28.0) - 13.5
            return 0.5 * torch.log((marginal * places**2).sum(1) / marginal.sum(1) / 9)

        logs = torch.stack([log_size(scaled.sum(1)), log_size(scaled.sum(2))])
        self.assertClose(torch.cov(logs), 0.04 * torch.eye(2), tolerance=0.006)
        self.assertLess(logs.mean(1).abs().max().item(), 0.03)

    def test_thicken(self):
        x = torch.zeros(1, 1, 5, 6)
        x[0, 0, 1:4, 0] = 1  # a stroke of three pixels, right at the cut
        for amount, width, middle in ((1.0, 3 * 5, 1.0), (0.5, 3 + 0.5 * 12, 1.0), (-0.5, 1.5, 0.5), (0.0, 3, 1.0)):
            y = deformation.thicken(x, torch.tensor([amount]))
            self.assertAlmostEqual(y.sum().item(), width)
            self.assertAlmostEqual(y[0, 0, 2, 0].item(), middle)
            for shift in all_shifts(6):
                moved = deformation.thicken(isometry_action(x, shift, (1, 0, 0)), torch.tensor([amount]))
                self.assertTrue(torch.equal(moved, isometry_action(y, shift, (1, 0, 0))))
        # Drawn on either side alike, and to the whole amount.
        deform = deformation.RandomDeformation(0.0, 0.4)
        grey = torch.full((2000, 1, 28, 28), 0.5)
        grey[..., 14, 14] = 1
        changed = deform(grey, deform.draw(2000, torch.Generator().manual_seed(0)))[:, 0, 14, 13] - 0.5
        self.assertTrue((changed > -1e-4).all() and (changed < 0.2001).all() and changed.max() > 0.19)
        self.assertAlmostEqual((changed < 1e-4).double().mean().item(), 0.5, delta=0.04)

    def test_centre(self):
        x = torch.zeros(1, 1, 4, 10)
        x[..., 3] = 1
        for shift in all_shifts(10):
            self.assertAlmostEqual(deformation.centre(isometry_action(x, shift, (1, 0, 0))).item(), (3.5 + shift) % 10, places=4)


# ======================================================================================================
# muon.py


class TestMuon(Case):
    def setUp(self):
        torch.manual_seed(0)

    @staticmethod
    def backward(model):
        torch.manual_seed(1)
        dtype = next(model.parameters()).dtype
        F.cross_entropy(model(torch.rand(4, 1, 28, 28, dtype=dtype)), torch.arange(4)).backward()

    def test_orthogonalize(self):
        """The singular vectors stay, and of singular values far apart all become about 1."""
        for shape in [(1, 6, 10), (1, 10, 6), (1, 5, 5), (1, 1, 7), (3, 2, 6, 10)]:
            u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=DOUBLE), full_matrices=False)
            values = torch.logspace(0, -1.5, min(shape[-2:]), dtype=DOUBLE)
            for scale in (1e-3, 1.0, 1e20):
                result = muon.orthogonalize(scale * u * values @ vh)
                of_result = u.mT @ result @ vh.mT
                diagonal = of_result.diagonal(dim1=-2, dim2=-1)
                self.assertClose(of_result, torch.diag_embed(diagonal))
                self.assertClose(u @ of_result @ vh, result)
                self.assertTrue(((diagonal > 0.6) & (diagonal < 1.2)).all(), diagonal)

    def test_orthogonalize_in_any_precision(self):
        """Of low rank too, where the Gram matrix has eigenvalues that are nothing but rounding; and of numbers however small."""
        for rank, (rows, columns) in itertools.product((1, 8, 16), ((16, 400), (64, 800))):
            matrix = torch.randn(1, rows, rank) @ torch.randn(1, rank, columns)
            expected = muon.orthogonalize(matrix.double())
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", torch.bfloat16):
                    result = muon.orthogonalize(matrix.to(dtype))
                self.assertEqual(result.dtype, dtype)
                self.assertLess(torch.linalg.matrix_norm(result.double(), 2).item(), 1.3)
            self.assertClose(muon.orthogonalize(matrix).double(), expected, 1e-2)
        for scale in (0.0, 1e-40, 1e-30, 1e-23, 1e-15):
            self.assertLess(muon.orthogonalize(scale * torch.randn(1, 6, 10)).abs().max(), 1e-4)
        # A part that is rounding beside the other is not made as large.
        matrix = torch.randn(6, 10)
        self.assertLess(muon.orthogonalize(torch.stack([matrix, 1e-6 * matrix]))[1].abs().max(), 1e-2)

    def test_first_step(self):
        """As long as Adam's would be, and of a conventional layer along the orthogonalized gradient. Other parameters get Adam's own."""
        for name in ("mobius_irrep", "mobius_mixed", "cnn_same_params"):
            model = build_model(name, dtype=DOUBLE)
            before, other = copy.deepcopy(model), copy.deepcopy(model)
            optimizers = muon.Muon(model, lr=0.01, weight_decay=0.1), torch.optim.Adam(other.parameters(), lr=0.01)
            for network, optimizer in zip((model, other), optimizers):
                self.backward(network)
                gradients = [parameter.grad.clone() for parameter in network.parameters()]
                optimizer.step()
                self.assertTrue(all(torch.equal(parameter.grad, grad) for parameter, grad in zip(network.parameters(), gradients)))
            kernels = 0
            for (path, new), old, of_adam, gradient in zip(model.named_parameters(), before.parameters(), other.parameters(), gradients):
                if "weights_" in path or "cnn." in path and path.endswith("weight"):
                    kernels += 1
                    step = (old * (1 - 0.01 * 0.1) - new).flatten(1) / 0.01
                    self.assertTrue(0.1 < step.square().mean().sqrt() < 0.25, f"{name} {path}")
                    if path.endswith("weight"):
                        expected = muon.orthogonalize(gradient.flatten(1)[None])[0]
                        self.assertClose(step / step.norm(), expected / expected.norm(), 1e-4)
                else:
                    self.assertTrue(torch.equal(new, of_adam), f"{name} {path}")
            self.assertGreaterEqual(kernels, 6)
        layer = nn.Conv2d(1, 32, 1)  # of more rows than columns
        layer.weight.grad, old = torch.randn_like(layer.weight), layer.weight.detach().clone()
        muon.Muon(layer, lr=0.01).step()
        self.assertAlmostEqual((layer.weight - old).square().mean().sqrt().item(), 0.01 * 0.2, delta=0.001)

    def test_a_step_is_of_the_steerable_kernel(self):
        """Between all field types: along the orthogonalized gradient of the whole kernel, among the steerable ones."""
        def orthogonalize(matrix):
            u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
            return u @ vh

        for in_fields, out_fields in itertools.product(TYPES.values(), repeat=2):
            in_fields, out_fields = as_fields([3 * n for n in in_fields]), as_fields([2 * n for n in out_fields])
            layer = MobiusConv(in_fields, out_fields, 5, dtype=DOUBLE)
            before = layer.expand_kernel().detach()
            gradient = torch.randn_like(before)
            (layer.expand_kernel() * gradient).sum().backward()
            reflected = cross_cut(gradient, in_fields)
            steerable = (gradient + gauge_transform(reflected.transpose(0, 1), out_fields).transpose(0, 1)) / 2
            with mock.patch("muon.orthogonalize", orthogonalize):
                muon.Muon(layer).step()
            step, expected = (before - layer.expand_kernel()).flatten(1), orthogonalize(steerable.flatten(1))
            with self.subTest(in_fields=in_fields, out_fields=out_fields):
                self.assertClose(step / step.norm(), expected / expected.norm())

    def test_frames_make_no_difference(self):
        """Which of a regular field's two channels is the first is a choice of frame: seen in another one, a network is trained to the same."""
        scalars, fields = (1, 0, 0), (0, 0, 3)
        model = nn.Sequential(MobiusConv(scalars, fields, 3), nn.ELU(), MobiusConv(fields, fields, 3), nn.ELU(), MobiusConv(fields, scalars, 3)).double()

        def in_other_frames(model):
            """Fields 0 and 2 of both hidden layers are in the other frame."""
            model = copy.deepcopy(model)
            with torch.no_grad():
                for layer, in_fields in ((model[0], scalars), (model[2], fields)):
                    weights = layer.get_parameter("weights_triv2reg" if layer is model[0] else "weights_reg2reg")
                    weights[::2] = cross_cut(weights, as_fields(in_fields))[::2]
                model[2].weights_reg2reg.copy_(model[2].weights_reg2reg[:, [1, 0, 2, 3, 5, 4]])
                model[4].weights_reg2triv[:, ::2] = model[4].weights_reg2triv[:, ::2].flip(2)
            return model

        def trained(model, optimizer):
            x, y = torch.randn(8, 1, 6, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE), torch.arange(8, dtype=DOUBLE)
            for _ in range(3):
                optimizer.zero_grad()
                (model(x).mean((1, 2, 3)) - y).square().sum().backward()
                optimizer.step()
            return nn.utils.parameters_to_vector(in_other_frames(model).parameters() if model is first else model.parameters())

        x = torch.randn(2, 1, 6, 8, dtype=DOUBLE)
        self.assertClose(in_other_frames(model)(x), model(x))
        for as_arrays in (False, True):
            first, second = copy.deepcopy(model), in_other_frames(model)
            optimizers = [muon.Muon(network, lr=0.01) for network in (first, second)]
            if as_arrays:  # of free values: other ones, another step
                for optimizer in optimizers:
                    optimizer.kernels = dict.fromkeys(optimizer.kernels)
            results = [trained(network, optimizer) for network, optimizer in zip((first, second), optimizers)]
            (self.assertNotClose if as_arrays else self.assertClose)(*results)

    def test_momentum(self):
        """Written out for one kernel: a running mean of gradients, of which the newest counts once more."""
        layer, gradients = nn.Conv2d(3, 2, 1, bias=False, dtype=DOUBLE), torch.randn(4, 2, 3, 1, 1, dtype=DOUBLE)
        kernel = layer.weight.detach().clone()
        optimizer = muon.Muon(layer, lr=0.1, momentum=0.6)
        mean = torch.zeros_like(kernel)
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            optimizer.step()
            mean = 0.6 * mean + 0.4 * gradient
            direction = muon.orthogonalize((0.6 * mean + 0.4 * gradient).flatten(1)[None])
            kernel = kernel - 0.1 * 0.2 * 3**0.5 * direction.view_as(kernel)
            self.assertClose(layer.weight.detach(), kernel)
        self.assertEqual(optimizer.state[layer.weight]["step"], 4)

    def test_gradients_that_vanish(self):
        layer = nn.Conv2d(3, 8, 3)
        optimizer = muon.Muon(layer)
        for step in range(2000):
            layer.weight.grad = torch.full_like(layer.weight, 1e-3 if step == 0 else 0.0)
            optimizer.step()
        self.assertLess(layer.weight.abs().max(), 2)

    def test_stacked_networks(self):
        """Each as alone."""
        networks = [build_model("mobius_mixed", dtype=DOUBLE) for _ in range(3)]
        stacked, _ = torch.func.stack_module_state(networks)
        optimizers = [*map(muon.Muon, networks), muon.Muon(copy.deepcopy(networks[0]), stacked=stacked)]
        for _ in range(2):
            for name, parameter in stacked.items():
                parameter.grad = torch.randn_like(parameter)
                for network, gradient in zip(networks, parameter.grad):
                    network.get_parameter(name).grad = gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        for name, parameter in stacked.items():
            for network, of_network in zip(networks, parameter):
                self.assertClose(network.get_parameter(name), of_network)

    def test_is_an_optimizer(self):
        """With closures, copies, states and groups as any other; parameters without a gradient stay."""
        layer, more = MobiusConv((0, 0, 2), (0, 0, 2), 3), nn.Parameter(torch.randn(2))
        optimizer = muon.Muon(layer, lr=0.5)
        optimizer.add_param_group({"params": [more], "lr": 0.0})
        parameters = [*layer.parameters(), more]

        def closure():
            optimizer.zero_grad()
            loss = sum(parameter.square().sum() for parameter in parameters)
            loss.backward()
            return loss

        before = [parameter.detach().clone() for parameter in parameters]
        self.assertClose(optimizer.step(closure), sum(parameter.square().sum() for parameter in before), 1e-5)
        self.assertNotClose(parameters[0], before[0])
        self.assertTrue(torch.equal(more, before[-1]))
        copied, of_copy = copy.deepcopy((optimizer, parameters))
        of_loaded = copy.deepcopy(layer)
        loaded = muon.Muon(of_loaded, momentum=0.5, weight_decay=0.1)  # which the loaded state replaces, as any optimizer's
        loaded.add_param_group({"params": [copy.deepcopy(more)]})
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for parameter, *others in zip(parameters, of_copy, [*of_loaded.parameters(), more]):
            for other in others:
                other.grad = parameter.grad.clone()
        for each in (optimizer, copied, loaded):
            each.step()
        for parameter, *others in zip(layer.parameters(), of_copy, of_loaded.parameters()):
            for other in others:
                self.assertTrue(torch.equal(parameter, other))
        hooked = []
        optimizer.register_step_post_hook(lambda *_: hooked.append(parameters[0].grad is None))
        optimizer.step()
        self.assertEqual(hooked, [False])
        before, gradient = parameters[0].detach().clone(), parameters[0].grad.clone()
        optimizer.zero_grad()
        optimizer.step()
        self.assertTrue(torch.equal(parameters[0], before))
        parameters[0].grad = gradient
        with mock.patch.object(muon.Muon, "_step_of_kernel", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            optimizer.step()
        self.assertIs(parameters[0].grad, gradient)
        for bad in ({"momentum": 1.0}, {"momentum": -0.1}, {"momentum": math.nan}, {"lr": -1.0}, {"weight_decay": -1.0}, {"weight_decay": math.nan},
                    {"weight_decay": math.inf}):
            with self.assertRaises(ValueError):
                muon.Muon(layer, **bad)
        with self.assertRaisesRegex(TypeError, "model must be a module"):
            muon.Muon(layer.parameters())
        with self.assertRaisesRegex(ValueError, "not the state of a Muon"):
            muon.Muon(layer).load_state_dict(torch.optim.Adam(layer.parameters()).state_dict())


# ======================================================================================================
# parallel_seeds.py


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


# ======================================================================================================
# reproduce.py


class TestReproduce(RunsCase):
    KILLS = 6

    def options(self, *more):
        return ["--data", self.data, "--results", self.folder / "results", "--batch_size", self.BATCH, "--num_epochs", "2", "--device", "cpu",
                "--models", "mobius_regular", "cnn_same_params", "--train_modes", "centered", "--runs", "2", *more]

    def study(self, *more):
        options = vars(reproduce.command_line().parse_args([str(option) for option in self.options(*more)]))
        return reproduce.plan({key: value for key, value in options.items() if key not in ("table", "error_against_shift")})[0]

    def results(self, folder="results"):
        return {path.name: path for path in (self.folder / folder / "runs").glob("*.json")}

    def write_results(self, study, error):
        """Results as train.py leaves them, with test errors `error(config, version)`."""
        for config in study.configs:
            errors = {version: float(error(config, version)) for version in config.test_versions}
            run_folder.write_json(study.file(config), {"status": "finished", "config": config.protocol(), "epochs": [], "parameters": 1,
                                                       "environment": {}, "data": {"sha256": "0"}, "test_error": errors, "seconds": 1.0})

    def test_runs_are_those_of_train(self):
        printed = self.main(reproduce, *self.options())
        self.assertEqual(len(self.results()), 4)
        self.assertIn("4 runs: 0 finished, 4 to do", printed)
        for model, seed in itertools.product(("mobius_regular", "cnn_same_params"), (0, 1)):
            alone = self.finish(self.config(model=model, seed=seed, eval_freq=0))
            name = f"digits-{model}-centered-seed{seed}-num_epochs_2-batch_size_4"
            folder = self.folder / "results" / "logs" / name
            stored = json.loads((self.folder / "results" / "runs" / f"{name}.json").read_text())
            self.assertSameTree(stored, json.loads((alone / "result.json").read_text()), name)
            self.assertNotIn(str(self.folder), json.dumps(stored))  # paths of this machine are nobody's business
            self.assertSameTree(torch.load(folder / "weights.pt", weights_only=True), torch.load(alone / "weights.pt", weights_only=True), name)
            self.assertFalse((folder / "checkpoint.pt").exists())
            errors = [f"{version} {error:.2f} %" for version, error in stored["test_error"].items()]
            self.assertRegex(printed, rf"\[./4\] {name}: {', '.join(errors)} \(\d+ s\)")
        self.assertIn("min left", printed)
        # A finished run is never repeated.
        before = self.files()
        printed = self.main(reproduce, *self.options())
        self.assertIn("4 runs: 4 finished, 0 to do", printed)
        self.assertEqual(self.files(), before)
        # More of them: only those.
        printed = self.main(reproduce, *self.options("--runs", "3"))
        self.assertIn("6 runs: 4 finished, 2 to do", printed)
        self.assertEqual({name: content for name, content in self.files().items() if name in before}, before)

    def test_plan(self):
        study = self.study("--models", *MODELS, "--train_modes", "centered", "shifted", "--runs", "32", "--precision", "bf16", "--lr", "0.01")
        self.assertEqual(len(set(study.configs)), 7 * 2 * 32)
        self.assertEqual(len({study.file(config) for config in study.configs}), 7 * 2 * 32)
        self.assertEqual({(config.precision, config.lr, config.num_epochs) for config in study.configs}, {("bf16", 0.01, 2)})
        self.assertEqual([config.seed for config in study.configs], sorted(config.seed for config in study.configs))
        # Every setting that makes a difference makes another file, whatever its value.
        other = {"num_epochs": 3, "batch_size": 8, "weight_decay": 0.1, "lr": 0.1, "lr_decay_period": 1, "lr_decay_factor": 3,
                 "precision": "bf16", "test_mode": "shifted", "dataset": "digits", "pooling": "polyphase", "lr_schedule": "cosine",
                 "warmup_epochs": 1, "deformation": 0.5, "stroke_width": 0.2, "scaling": 0.2, "dropout": 0.1, "label_smoothing": 0.1,
                 "optimizer": "muon", "sign_eps": 1e-8}
        self.assertEqual(set(train.Config("mobius_mixed").protocol()) - {"model", "train_mode", "seed", "eval_freq"}, set(other))
        configs = [train.Config("mobius_mixed", **{key: value}) for key, value in
                   (other | {"data": "my.npz", "train_mode": "shifted", "seed": 1}).items()]
        self.assertEqual(len({reproduce.run_name(config) for config in (*configs, train.Config("mobius_mixed"))}), len(configs) + 1)
        # A recipe is its settings; in names it stands for them.
        recipe = train.RECIPES["improved"]
        config = train.Config("mobius_regular", **recipe | {"precision": "bf16"})
        self.assertEqual(reproduce.run_name(config), "mnist-mobius_regular-centered-seed0-recipe_improved-precision_bf16")
        self.assertEqual(reproduce.plan({"runs": 1, "models": ["mobius_regular"], "train_modes": ["centered"], "parallel_seeds": 1, "results": "x",
                                         "recipe": "improved", "lr": 0.5})[0].configs[0].lr, 0.5)
        for name, value in recipe.items():
            near = train.Config("mobius_regular", **recipe | {name: 1e-3 if name == "lr" else train.DEFAULTS[name]})
            self.assertNotIn("recipe", reproduce.run_name(near))
        for name in ("eval_freq", "device", "log_dir", "tensorboard"):
            config = train.Config("mobius_regular", **{name: {"eval_freq": 3, "device": "cpu", "log_dir": "x", "tensorboard": False}[name]})
            self.assertEqual(reproduce.run_name(config), "mnist-mobius_regular-centered-seed0")
        defaults = vars(reproduce.command_line().parse_args([]))
        self.assertEqual((defaults["runs"], set(defaults["models"]), set(defaults["train_modes"])), (32, set(MODELS), {"centered", "shifted"}))

    def test_parallel_seeds(self):
        options = ("--models", "mobius_regular", "--runs", "3", "--lr", "1e-5", "--num_epochs", "1")
        self.main(reproduce, *self.options(*options))
        printed = self.main(reproduce, *self.options(*options, "--parallel_seeds", "2", "--results", self.folder / "parallel"))
        self.assertIn("[3/3]", printed)
        self.assertEqual(set(self.results()), set(self.results("parallel")))
        for name, path in self.results().items():
            alone, together = (json.loads(p.read_text())["epochs"][-1] for p in (path, self.results("parallel")[name]))
            self.assertAlmostEqual(alone["train_loss"], together["train_loss"], places=4)

    def test_a_group_that_stands_at_different_epochs(self):
        study = self.study("--models", "mobius_regular", "--runs", "3")
        for config, epoch in zip(study.configs, (1, 0, 1)):
            if epoch:
                self.finish(config, study.folder(config), stop_after=epoch)
        self.main(reproduce, *self.options("--models", "mobius_regular", "--runs", "3", "--parallel_seeds", "3"))
        self.assertEqual(len(self.results()), 3)

    def test_killed_at_any_moment(self):
        """Again and again: each run is finished once, exactly as if nothing had happened."""
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        options = self.options("--num_epochs", "4", "--runs", "2")
        start = time.monotonic()
        self.main(reproduce, *options, "--results", self.folder / "expected")
        seconds = time.monotonic() - start
        random, output = np.random.default_rng(), self.folder / "printed"
        kills, seen = 0, {}
        while kills < self.KILLS:
            output.unlink(missing_ok=True)
            pid = Zygote.start("reproduce", options, output)
            time.sleep(random.uniform(0.1, 0.1 + seconds / 6))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status, printed = Zygote.wait(pid, output)
            self.assertIn(status, (None, 0), printed)
            kills += status is None
            results = {name: path.read_bytes() for name, path in self.results().items()}
            self.assertEqual(results, results | seen)  # what was finished stays as it was
            seen = results
            if status == 0:
                self.assertSameResults()
                shutil.rmtree(self.folder / "results")
                seen = {}
        COUNTS["kills of reproduce.py"] += kills
        self.main(reproduce, *options)
        self.assertSameResults()

    def assertSameResults(self):
        expected = self.results("expected")
        self.assertEqual(set(self.results()), set(expected))
        for name, path in self.results().items():
            self.assertSameTree(json.loads(path.read_text()), json.loads(expected[name].read_text()), name)
            log = (self.folder / "results" / "logs" / path.stem / "log.txt").read_text()
            self.assertLessEqual(log.count("test error:"), 2, name)  # twice, if it was killed before it was published

    def start_ranks(self, processes, options):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(processes):
            output = self.folder / f"rank{rank}"
            output.unlink(missing_ok=True)
            ranks.append((Zygote.start("reproduce", options, output, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                       MASTER_ADDR="localhost", MASTER_PORT=str(port)), output))
        return ranks

    def logs_of(self, results="results"):
        return {path.parent.name: path.read_text() for path in (self.folder / results / "logs").glob("*/log.txt")}

    def test_two_ranks(self):
        options = self.options("--num_epochs", "1", "--runs", "2")
        statuses = [Zygote.wait(*rank) for rank in self.start_ranks(2, options)]
        self.assertEqual([status for status, _ in statuses], [0, 0], statuses)
        self.assertEqual(len(self.results()), 4)
        self.assertEqual(statuses[1][1], "")  # rank 0 prints
        self.assertIn("[4/4]", statuses[0][1])
        self.assertIn("mobius_regular", statuses[0][1].split("[4/4]")[1])
        for name, log in self.logs_of().items():
            self.assertEqual((log.count("epoch  1/1"), log.count("test error:")), (1, 1), f"{name} was not done once\n{log}")

    def test_a_rank_that_dies(self):
        """The others finish its runs, and go on with the one that it was at."""
        ranks = self.start_ranks(3, self.options("--num_epochs", "9", "--runs", "2"))
        end = time.monotonic() + 60
        while sum("epoch  1/9" in log for log in self.logs_of().values()) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(ranks[2][0], signal.SIGKILL)
        COUNTS["ranks lost"] += 1
        self.assertEqual([Zygote.wait(*rank)[0] for rank in ranks], [0, 0, None])
        self.assertEqual(len(self.results()), 4)
        for name, log in self.logs_of().items():
            self.assertEqual(log.count("test error:"), 1, name)
            # Told once: an epoch that was seen is never trained again. (Never, if the kill came between saving and telling.)
            continued = re.search(r"continued after epoch (\d+) of 9", log)
            for epoch in range(1, 10):
                allowed = (0, 1) if continued and epoch == int(continued[1]) else (1,)
                self.assertIn(log.count(f"epoch {epoch:2}/9"), allowed, f"{name}\n{log}")

    def test_torchrun(self):
        """It ends all processes when one is killed; the next start finds what is left."""
        options = self.options("--num_epochs", "9", "--runs", "2")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "reproduce.py",
                   *options]
        command = [str(c) for c in command]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
            watchdog = threading.Timer(100, process.kill)
            watchdog.start()
            self.addCleanup(watchdog.cancel)
            process.stdout.readline()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            if not children.exists():
                self.skipTest("needs Linux's /proc")
            while not self.logs_of() and process.poll() is None:
                time.sleep(0.01)
            os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
            COUNTS["ranks lost"] += 1
        self.assertNotEqual(process.returncode, 0)
        before = self.results()
        self.assertLess(len(before), 4)
        printed = self.main(reproduce, *options)
        self.assertIn(f"4 runs: {len(before)} finished, {4 - len(before)} to do", printed)
        self.assertEqual(len(self.results()), 4)
        self.assertIn("mobius_regular", printed.split("[4/4]")[1])

    def test_data_that_cannot_be_had(self):
        """In every process, and none waits for another for ever."""
        options = self.options("--data", self.folder / "nowhere.npz")
        (status, printed), (other, nothing) = (Zygote.wait(*rank) for rank in self.start_ranks(2, options))
        self.assertEqual((status, other), (2, 2))
        self.assertIn("nowhere.npz", printed)
        self.assertNotIn("Traceback", printed + nothing)

    def test_a_run_that_diverges(self):
        """The others are finished all the same, alone or in parallel."""
        build = train.build_model

        def build_bad(name, **kwargs):
            model = build(name, **kwargs)
            if torch.initial_seed() == 1 and name == "mobius_regular":
                model.classifier[7].bias.data[0] = math.inf
            return model

        for more in ((), ("--parallel_seeds", "3")):
            shutil.rmtree(self.folder / "results", ignore_errors=True)
            with mock.patch("train.build_model", build_bad):
                error = self.assertFails(reproduce.main, *self.options("--runs", "3", "--num_epochs", "1", *more), status=1,
                                         contains="mobius_regular-centered-seed1")
            self.assertIn("nan at step 1 of 2", error)
            self.assertEqual(len(self.results()), 5)
            statuses = {path.parent.name: json.loads(path.read_text())["status"] for path in self.folder.glob("results/logs/*/result.json")}
            self.assertEqual([name for name, status in statuses.items() if status == "diverged"], [name for name in statuses if
                             "mobius_regular-centered-seed1" in name])
            # It would again: it is not tried again.
            with mock.patch("train.Run.train", side_effect=AssertionError):
                self.assertFails(reproduce.main, *self.options("--runs", "3", "--num_epochs", "1", *more), status=1,
                                 contains=["nan at step 1 of 2", "to try it again, delete"])
        self.assertIn("Missing: 1 of 6 runs", self.main(reproduce, *self.options("--runs", "3", "--num_epochs", "1", "--table")))

    def test_table(self):
        """Mean, standard deviation and Welch's test, against NumPy and the test on two samples."""
        from scipy.stats import ttest_ind
        study = self.study("--models", *MODELS, "--train_modes", "centered", "shifted", "--runs", "5")
        random = np.random.default_rng(0)
        values = {}

        def error(config, version):
            values[config.model, config.train_mode, version, config.seed] = value = random.normal(1.3, 0.1)
            return value

        self.write_results(study, error)
        options = self.options("--models", *MODELS, "--train_modes", "centered", "shifted", "--runs", "5", "--table")
        rows = list(csv.DictReader(io.StringIO(self.main(reproduce, *options, "csv"))))
        self.assertEqual(len(rows), 7 * 2 * 2)
        self.assertEqual({(row["digits"], row["settings"]) for row in rows}, {("digits", "num_epochs=2 batch_size=4")})
        text, markdown = self.main(reproduce, *options), self.main(reproduce, *options, "markdown")
        differing = 0
        for row in rows:
            errors = [value for key, value in values.items() if key[:3] == (row["model"], row["train_mode"], row["test_digits"])]
            self.assertEqual((row["n"], row["missing"]), ("5", "0"))
            self.assertAlmostEqual(float(row["mean"]), np.mean(errors))
            self.assertAlmostEqual(float(row["std"]), np.std(errors, ddof=1))
            if row["test_digits"] == "centered":
                self.assertEqual((row["paper_mean"], row["p"], row["differs"]), ("", "", ""))
                continue
            paper = reproduce.PAPER[row["model"]][row["train_mode"]]
            self.assertEqual((float(row["paper_mean"]), float(row["paper_std"]), row["paper_n"]), (*paper, "32"))
            sample = random.normal(size=32)
            sample = paper[0] + paper[1] * (sample - sample.mean()) / sample.std(ddof=1)
            p = ttest_ind(errors, sample, equal_var=False).pvalue
            self.assertAlmostEqual(float(row["p"]), p)
            self.assertEqual(row["differs"], str(int(p < 0.01)))
            differing += p < 0.01
            ours = f"{np.mean(errors):.2f} ± {np.std(errors, ddof=1):.2f} (5)" + " *" * bool(p < 0.01)
            (line,) = [line for line in text.split("on centered test digits")[0].splitlines() if line.startswith(row["model"] + " ")]
            self.assertIn(f"{ours}  ", line + "  ")
            self.assertIn(f"{paper[0]:.2f} ± {paper[1]:.2f}", line)
            (line,) = [line for line in markdown.split("on centered test digits")[0].splitlines() if line.startswith(f"| `{row['model']}` |")]
            self.assertIn(f"| {ours.replace('*', chr(92) + '*')} | {paper[0]:.2f} ± {paper[1]:.2f} | {p:.2g} |", line)
        self.assertTrue(0 < differing < 14)
        self.assertIn("Not the paper's protocol: data digits.npz, num_epochs 2, batch_size 4", text)
        self.assertNotIn("Missing", text)

    def test_incomplete_table(self):
        study = self.study("--runs", "6")
        self.write_results(study, lambda config, version: 1 + config.seed)
        options = self.options("--runs", "6", "--table")
        for seed in (1, 2, 3, 5):
            study.file(train.Config(**vars(study.configs[0]) | {"seed": seed})).unlink()
        text = self.main(reproduce, *options)
        self.assertIn("Missing: 4 of 12 runs\n- mobius_regular trained on centered: seeds 1-3, 5", text)
        # Two runs that happen to agree prove nothing.
        self.assertRegex(text, r"mobius_regular +3.00 ± 2.83 \(2\) +1.23 ± 0.07\n")
        self.assertIn("Cells of fewer than 5 runs are not tested", text)
        # What is there and not shown is told of.
        self.assertNotIn("other settings", text)
        self.assertIn("other settings, which take their options to be shown: digits num_epochs_2 batch_size_4 (8)\n",
                      self.main(reproduce, *options, "--lr", "0.1"))
        study.file(study.configs[0]).unlink()
        self.assertRegex(self.main(reproduce, *options), r"mobius_regular +5.00 \(1\) +1.23 ± 0.07")
        for path in self.results().values():
            path.unlink()
        self.assertRegex(self.main(reproduce, *options), r"mobius_regular +- +1.23 ± 0.07")
        self.assertNotIn("1.23", self.main(reproduce, *self.options("--table", "--dataset", "digits")[2:]))

    def test_rows_of_other_signs(self):
        """Runs that differ in sign_eps, and perhaps in precision, have rows of their own beside the paper's figures."""
        asked = ("--models", "mobius_signflip", "mobius_regular", "--precision", "bf16", "--runs", "5")
        other = ("--models", "mobius_signflip", "--runs", "5", "--sign_eps", "1e-8")
        for options, low in ((asked, 3), (other, 5), ((*other, "--precision", "bf16"), 6), ((*other, "--lr", "0.1"), 9),
                             (("--models", "mobius_signflip", "--runs", "5"), 8)):
            self.write_results(self.study(*options), lambda config, version: low + config.seed / 10)
        later = train.Config(**vars(self.study(*other).configs[0]) | {"seed": 5, "sign_eps": 1e-3})  # beyond --runs
        self.write_results(reproduce.Study([later], self.folder / "results"), lambda config, version: 20)
        self.study(*other).file(self.study(*other).configs[1]).unlink()
        text = self.main(reproduce, *self.options(*asked, "--table"))
        shifted = [line for line in text.splitlines() if line.startswith("mobius")][:4]
        self.assertEqual([re.split("  +", line)[:3] for line in shifted], [
            ["mobius_signflip", "3.20 ± 0.16 (5) *", "4.89 ± 0.36"],
            ["mobius_signflip, sign_eps 1e-08, precision fp32", "5.22 ± 0.17 (4)", "4.89 ± 0.36"],
            ["mobius_signflip, sign_eps 1e-08", "6.20 ± 0.16 (5) *", "4.89 ± 0.36"],
            ["mobius_regular", "3.20 ± 0.16 (5) *", "1.23 ± 0.07"],
        ])
        self.assertNotIn("Missing", text)  # those of other settings are not
        markdown = self.main(reproduce, *self.options(*asked, "--table", "markdown"))
        self.assertIn("| `mobius_signflip, sign_eps 1e-08` | 6.20 ± 0.16 (5) \\* | 4.89 ± 0.36 |", markdown)
        rows = list(csv.DictReader(io.StringIO(self.main(reproduce, *self.options(*asked, "--table", "csv")))))
        self.assertEqual([(row["model"], row["settings"], row["n"], row["missing"]) for row in rows[::2]], [
            ("mobius_signflip", "num_epochs=2 batch_size=4 precision=bf16", "5", "0"),
            ("mobius_signflip", "sign_eps=1e-08 num_epochs=2 batch_size=4", "4", "1"),
            ("mobius_signflip", "sign_eps=1e-08 num_epochs=2 batch_size=4 precision=bf16", "5", "0"),
            ("mobius_regular", "num_epochs=2 batch_size=4 precision=bf16", "5", "0"),
        ])
        # The other way round, and with a remark of what is not shown.
        text = self.main(reproduce, *self.options(*other, "--table"))
        self.assertIn("\nmobius_signflip, sign_eps 0.0  ", text)
        self.assertIn("\nmobius_signflip, sign_eps 0.0, precision bf16  ", text)
        (remark,) = [line for line in text.splitlines() if line.startswith("Finished runs of other settings")]
        self.assertEqual(remark.split(": ")[1], "digits sign_eps_0.001 num_epochs_2 batch_size_4 (1), "
                         "digits sign_eps_1e-08 num_epochs_2 batch_size_4 lr_0.1 (5), "
                         "digits sign_eps_1e-08 num_epochs_2 batch_size_4 precision_bf16 (5)")

    def test_error_against_shift(self):
        options = self.options("--models", "mobius_regular", "--runs", "1", "--num_epochs", "1")
        self.assertFails(reproduce.main, *options, "--error_against_shift", contains=["mobius_regular-centered-seed0", "trains it"])
        self.main(reproduce, *options)
        self.main(reproduce, *options, "--error_against_shift")
        path = self.folder / "results" / "error_against_shift.json"
        content = json.loads(path.read_text())
        self.assertEqual(content["shifts"], list(range(56)))
        (row,) = content["rows"]
        (result,) = (json.loads(p.read_text()) for p in self.results().values())
        self.assertAlmostEqual(row["errors"][0], result["test_error"]["centered"])
        self.assertEqual((row["settings"], row["predictions"]), ({"num_epochs": 1, "batch_size": 4}, 56 * self.DIGITS[1]))
        self.assertEqual(len(row["first_changed"]), min(row["changed"], 100))
        self.main(reproduce, *options, "--pooling", "polyphase")
        self.assertIn(", 100 % of the predictions", self.main(reproduce, *options, "--pooling", "polyphase", "--error_against_shift"))
        (folder,) = (self.folder / "results" / "logs").glob("*polyphase*")
        printed = self.main(train, "--eval_only", "--checkpoint", folder, "--data", self.data, "--device", "cpu")  # its checkpoint is deleted
        self.assertIn("mobius_regular, polyphase pooling, ", printed)
        stored = json.loads((folder / "result.json").read_text())
        stored["config"] |= {"dataset": "digits", "test_mode": "centered", "precision": "bf16"}
        run_folder.write_json(folder / "result.json", stored)
        config = train.load_network(folder, {})[1]
        self.assertEqual((config.dataset, config.test_mode, config.precision), ("digits", "centered", "bf16"))
        row, ours = json.loads(path.read_text())["rows"]
        self.assertEqual((ours["settings"]["pooling"], ours["changed"], ours["first_changed"]), ("polyphase", 0, []))
        with mock.patch("reproduce.predict_at_every_shift", side_effect=AssertionError):  # it is there already
            self.main(reproduce, *options, "--error_against_shift")
        path.write_text("{")
        self.assertFails(reproduce.main, *options, "--error_against_shift", contains=[str(path), "truncated"])
        path.write_text(json.dumps({"rows": [row | {"sha256": "0"}]}))
        self.assertFails(reproduce.main, *options, "--error_against_shift", contains=[str(path), "another digits.npz"])
        shutil.rmtree(self.folder / "results" / "logs")
        self.assertFails(reproduce.main, *options, "--error_against_shift", contains=["weights.pt", "take another --results folder"])
        self.assertFails(reproduce.main, *options, "--error_against_shift", "--table", contains="two commands")

    def test_bad_input(self):
        for options, contains in [
            (["--runs", "0"], ["runs", "at least 1"]),
            (["--runs", "many"], ["many"]),
            (["--parallel_seeds", "0"], ["parallel_seeds"]),
            (["--models", "resnet"], ["resnet", "mobius_regular"]),
            (["--train_modes", "rotated"], ["rotated", "centered"]),
            (["--seed", "3"], ["--seed"]),
            (["--lr", "-1"], ["lr", "-1"]),
            (["--batch_size", "9"], ["batch_size", "8 training digits"]),
            (["--results", ""], ["results"]),
            (["--table", "html"], ["html", "markdown"]),
            (["--data", self.folder / "nowhere.npz"], ["nowhere.npz"]),
        ]:
            with self.subTest(options):
                self.assertFails(reproduce.main, *self.options(*options), contains=contains)
        self.assertEqual(list(self.files()), ["digits.npz"])
        (self.folder / "file").write_text("kept")
        self.assertFails(reproduce.main, *self.options("--results", self.folder / "file"), contains=["file"])
        self.assertEqual((self.folder / "file").read_text(), "kept")
        # A foreign or damaged file among the results.
        study = self.study()
        self.write_results(study, lambda config, version: 1)
        path = study.file(study.configs[0])
        result = json.loads(path.read_text())
        for content, contains in [
            ("", ["truncated"]), ("{", ["truncated", "move it away, and the run is trained again"]), ("[]", ["no result"]), ("{}", ["no result"]), ("[" * 100000, ["no JSON"]),
            (json.dumps(result | {"test_error": None}), ["not of a finished run"]),
            (json.dumps(result | {"test_error": {"shifted": math.nan, "centered": 1.0}}), ["NaN"]),
            (json.dumps(result | {"test_error": {"shifted": [], "centered": 1.0}}), ["no result"]),
            (json.dumps(result | {"data": {"sha256": [1]}}), ["no result"]),
            (json.dumps({key: value for key, value in result.items() if key != "seconds"}), ["no result"]),
            (json.dumps(result | {"config": {}}), ["model None, not mobius_regular"]),
            (json.dumps(result | {"config": result["config"] | {"lr": 1.0}}), ["lr 1.0, not 0.005", "move it away"]),
            (json.dumps(result | {"data": {"sha256": "1"}}), ["different npz"]),
        ]:
            path.write_text(content)
            before = self.files()
            with self.subTest(contains):
                self.assertFails(reproduce.main, *self.options("--table"), contains=contains)
                self.assertEqual(self.files(), before)
        path.write_text(json.dumps(result))
        self.assertFails(reproduce.main, *self.options(), contains=["another digits.npz", "--results"])
        # A damaged checkpoint of an unfinished run.
        path.unlink()
        for other in self.results().values():
            other.unlink()
        folder = self.finish(study.configs[0], study.folder(study.configs[0]), stop_after=1)
        (folder / "checkpoint.pt").write_bytes(b"damaged")
        self.assertFails(reproduce.main, *self.options(), contains=[str(folder), "truncated"])
        self.assertEqual(len(self.results()), 3)  # it stops no others
        self.assertFails(reproduce.main, *self.options("--table", "--results", self.folder / "elsewhere"), contains="elsewhere")
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "many"}):
            self.assertFails(reproduce.main, *self.options(), contains=["WORLD_SIZE=many", "torchrun"])
        with mock.patch.dict(os.environ, {"RANK": "3"}):
            self.assertFails(reproduce.main, *self.options(), contains=["RANK=3", "WORLD_SIZE=1"])
        with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "2"}):
            self.assertFails(reproduce.main, *self.options(), contains=["2 processes do not find each other", "MASTER_ADDR"])
        with not_installed("scipy.stats"):
            study = self.study("--runs", "5")
            self.write_results(study, lambda config, version: 1 + config.seed)
            self.assertFails(reproduce.main, *self.options("--runs", "5", "--table"), contains="scipy")

    def test_left_by_one_who_was_killed(self):
        """A run that is finished in its folder, its result not yet among the others (or not yet seen there), is published."""
        self.main(reproduce, *self.options())
        before = {name: path.read_bytes() for name, path in self.results().items()}
        next(iter(self.results().values())).unlink()
        with mock.patch("train.Run.train", side_effect=AssertionError):
            self.main(reproduce, *self.options())
        self.assertEqual({name: path.read_bytes() for name, path in self.results().items()}, before)

    def test_other_reporting(self):
        """How often it is tested makes no other run of it."""
        study = self.study()
        folder = self.finish(study.configs[0], study.folder(study.configs[0]), stop_after=1)
        self.main(reproduce, *self.options("--eval_freq", "1"))
        self.assertIn("continued after epoch 1 of 2", (folder / "log.txt").read_text())
        self.assertFails(train.main, "--resume", folder, contains=["is finished"])

    def test_ascii_terminal(self):
        output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        self.write_results(self.study(), lambda config, version: 1)
        with contextlib.redirect_stdout(output):
            reproduce.main([str(option) for option in self.options("--table")])
        output.flush()
        self.assertIn(b"1.00 ? 0.00 (2)", output.buffer.getvalue())


# ======================================================================================================
# pictures.py


class TestPictures(Case):
    """What is drawn is what the rest of the code computes."""

    def setUp(self):
        torch.manual_seed(0)

    @staticmethod
    def images(figure) -> list[torch.Tensor]:
        """Shown in a figure, in the order in which it was given them."""
        return [torch.from_numpy(np.asarray(image.get_array())) for axes in figure.axes for image in axes.images]

    def assertShows(self, figure, expected):
        shown = self.images(figure)
        self.assertEqual(len(shown), len(expected))
        for image, there in zip(shown, expected):
            self.assertClose(image, there.float(), tolerance=1e-6)

    def test_strip_in_space(self):
        """Its ends meet with a twist, its pixels are as large as they should be, and it shows the digit moved by the isometry."""
        corners = torch.from_numpy(pictures._corners(6, 40))
        self.assertClose(corners[:, :, -1], corners[:, :, 0].flip(1))
        self.assertClose((corners[:, 1:] - corners[:, :-1]).norm(dim=0), torch.ones(6, 41, dtype=DOUBLE))
        self.assertClose((corners[:, 3, 1:] - corners[:, 3, :-1]).norm(dim=0), torch.ones(40, dtype=DOUBLE), tolerance=0.01)
        digit = torch.rand(1, 1, 6, 6)
        with mock.patch("mpl_toolkits.mplot3d.Axes3D.plot_surface") as plot_surface:
            figure = pictures.strips_in_space(digit, [0, 3, 12, 17], length=12)
        long = torch.cat([digit, torch.zeros(1, 1, 6, 6)], dim=3)
        for call, shift in zip(plot_surface.mock_calls, (0, 3, 12, 17), strict=True):
            drawn = call.kwargs["facecolors"]
            ink = pictures.INK(isometry_action(long, shift, (1, 0, 0))[0, 0].numpy())
            shade = (drawn / ink)[..., :3]
            self.assertLess(np.ptp(shade, axis=2).max(), 1e-6)  # what the light does, it does to all three colours alike
            self.assertTrue((0.5 < shade).all() and (shade <= 1.001).all())
        self.assertEqual([text.get_text() for text in figure.texts], ["t = 0", "t = 3", "t = 12", "t = 17"])

    def test_digits(self):
        centered = torch.rand(3, 1, 4, 6)
        shifts = torch.tensor([1, 6, 11])
        figure = pictures.centered_and_shifted(centered, isometry_action(centered, shifts, (1, 0, 0)), shifts, torch.tensor([7, 0, 9]))
        self.assertShows(figure, [*centered[:, 0], *(isometry_action(x, t, (1, 0, 0))[0, 0] for x, t in zip(centered.split(1), (1, 6, 11)))])
        self.assertEqual([axes.get_title() for axes in figure.axes], ["7", "0", "9", "t = 1", "t = 6", "t = 11"])
        for n in (0, 1, 5):  # no empty frames are left
            some = pictures.digits(torch.zeros(n, 1, 4, 6), ["x"] * n, columns=4, title="some are wrong")
            self.assertEqual((len(self.images(some)), some.get_suptitle()), (n, "some are wrong"))
            self.assertEqual([len(axes.images) for axes in some.axes if axes.axison], [1] * n)

    def test_fields(self):
        for fields in ((1, 1, 1), (0, 1, 2)):
            x = features(fields, 6, 8, n=1)
            c = channels(fields)
            self.assertShows(pictures.gauge_transformation(x, fields), [*x[0], *act(fields, x)[0]])
            figure = pictures.transport_padding(x, fields, pad=2)
            self.assertShows(figure, F.pad(reference_cover(x, fields, -2, 10), (0, 0, 2, 2))[0])
            for axes, name in zip(figure.axes, ["triv"] * fields[0] + ["sign"] * fields[1] + ["reg"] * 2 * fields[2], strict=True):
                frames = [patch for patch in axes.patches if not patch.get_fill()]
                places = [(frame.get_x() + 0.5, frame.get_y() + 0.5, frame.get_width(), frame.get_height()) for frame in frames]
                # What was padded on both sides, and the columns of the strip from which it came.
                self.assertEqual(places, [(0, 2, 2, 6), (10, 2, 2, 6), (2, 2, 2, 6), (8, 2, 2, 6)])
                self.assertEqual({matplotlib.colors.to_hex(frame.get_edgecolor()).upper() for frame in frames}, {pictures.TYPE_COLOURS[name]})
                low, high = axes.images[0].get_clim()
                self.assertEqual(low, -high)
            self.assertEqual(len(figure.axes), c)
        x = features((1, 1, 1), 6, 8, n=1)
        self.assertEqual([axes.get_xlabel() for axes in pictures.gauge_transformation(x, (1, 1, 1)).axes if axes.get_xlabel()],
                         ["as it was", "negated", "was the 2nd", "was the 1st"])
        self.assertEqual([axes.get_xlabel() for axes in pictures.transport_padding(x, (1, 1, 1), 2).axes],
                         ["flipped", "flipped and negated", "flipped 2nd channel", "flipped 1st channel"])

    def test_kernels(self):
        """Each block of the table has the symmetry that stands above it."""
        conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 5))
        figure = pictures.steerable_kernels(conv)
        shown = [row for row in torch.stack(self.images(figure)).view(4, 4, 5, 5)]  # from, to
        (tt, ts, tr1, tr2), (st, ss, sr1, sr2), (rt1, rs1, k11, k21), (rt2, rs2, k12, k22) = shown

        def flip(kernel):
            return kernel.flip(0)

        for kernel in (tt, ss):
            self.assertTrue(torch.equal(flip(kernel), kernel))
        for kernel in (ts, st):
            self.assertTrue(torch.equal(flip(kernel), -kernel))
        for second, expected in ((tr2, flip(tr1)), (sr2, -flip(sr1)), (rt2, flip(rt1)), (rs2, -flip(rs1)), (k22, flip(k11)), (k21, flip(k12))):
            self.assertTrue(torch.equal(second, expected))
        self.assertGreater(min(kernel.abs().max().item() for row in shown for kernel in row), 0.1)
        self.assertEqual([text.get_text() for text in figure.texts], [
            "scalar → scalar\nsymmetric", "scalar → sign-flip\nantisymmetric", "scalar → regular\nK, flip K",
            "sign-flip → scalar\nantisymmetric", "sign-flip → sign-flip\nsymmetric", "sign-flip → regular\nK, −flip K",
            "regular → scalar\n(K, flip K)", "regular → sign-flip\n(K, −flip K)", "regular → regular\n(K, M), (flip M, flip K)",
        ])
        # From one type to one, all fields of it.
        conv = MobiusConv((0, 0, 2), (2, 0, 0), 3)
        self.assertShows(pictures.steerable_kernels(conv), conv.expand_kernel().transpose(0, 1).flatten(0, 1))

    def test_first_kernels(self):
        model = build_model("mobius_mixed")
        figure = pictures.first_kernels(model)
        kernels = torch.stack(self.images(figure))
        first = torch.arange(8, 16, 2)  # regular fields: their two channels side by side
        self.assertClose(kernels[first + 1], kernels[first].flip(1))
        self.assertClose(kernels[:4], kernels[:4].flip(1))
        self.assertEqual(sorted(kernels.flatten().tolist()), sorted(model.mobius_cnn[0].expand_kernel().flatten().tolist()))
        cnn = build_model("cnn_same_params")
        self.assertShows(pictures.first_kernels(cnn, columns=4), cnn.cnn[1].weight.detach()[:, 0])

    def test_models(self):
        figure = pictures.model_table()
        (axes,) = figure.axes
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], list(pictures.LABELS.values()))
        numbers = [text.get_text() for text in axes.texts]
        for name in MODELS:
            self.assertIn(f"{count_parameters(build_model(name)):,}", numbers)
        of_mixed = [text.get_text() for text in axes.texts if text.get_position()[1] == list(MODELS).index("mobius_mixed")]
        self.assertEqual(of_mixed[:-1], [str(n) for n in (4, 8, 16, 32, 64) for _ in range(3)] + ["64"])
        bars = collections.defaultdict(list)  # of each row
        for bar in axes.patches:
            bars[round(bar.get_y() + bar.get_height() / 2)].append(bar)
        channels_of = [16, 32, 64, 128, 256, 64]
        mixed = [bar.get_width() for bar in bars[list(MODELS).index("mobius_mixed")]]
        self.assertClose(torch.tensor(mixed[:3]), torch.tensor([0.23, 0.23, 0.46], dtype=DOUBLE), tolerance=1e-6)
        few = [bar.get_width() / 0.92 * n for bar, n in zip(bars[1], channels_of, strict=True)]
        self.assertClose(torch.tensor(few), torch.tensor([11.0, 22, 45, 90, 181, 64], dtype=DOUBLE), tolerance=1e-4)

    def test_equivariance(self):
        """No difference in any layer of a gauge CNN, of each mode and either pooling; in each layer of the CNN one."""
        image = convert_mnist.load_digits()[0].images[:1].double()
        for name in MODELS:
            for pooling in POOLINGS:
                model = build_model(name, pooling=pooling).double().eval()
                layers = pictures.features_and_shift(model, image, 16)
                self.assertEqual([tuple(layer.of_digit.shape[2:]) for layer in layers], [(28, 28)] * 2 + [(14, 14)] * 2 + [(7, 7)] * 3)
                differences = [layer.difference.abs().max().item() / layer.of_digit.abs().max().item() for layer in layers]
                self.assertTrue(torch.equal(layers[0].of_shifted_digit, isometry_action(image, 16, (1, 0, 0))))
                if name.startswith("mobius"):
                    self.assertLess(max(differences), 1e-12, f"{name}, {pooling}")
                else:
                    self.assertGreater(min(differences[1:]), 0.1, f"{name}, {pooling}")
        with self.assertRaisesRegex(ValueError, "multiple of 4"):
            pictures.features_and_shift(model, image, 6)
        models = {name: build_model(name).double() for name in ("mobius_regular", "cnn_same_channels")}
        figure = pictures.equivariance(models, image, 16)
        for part, (name, model) in zip(figure.subfigs, models.items(), strict=True):
            shown = self.images(part)  # row by row
            for i, layer in enumerate(pictures.features_and_shift(model, image, 16)):
                channel = max(range(layer.of_digit.shape[1]), key=lambda c: layer.of_digit[0, c].std().item())
                for row, there in enumerate((*layer, layer.difference)):
                    self.assertClose(shown[7 * row + i], there[0, channel].detach().float(), tolerance=1e-6)
                largest = layer.difference.abs().max() / layer.of_digit.abs().max()
                self.assertEqual(part.axes[21 + i].get_xlabel(), f"{largest.item():.2g}")
            self.assertIn(pictures.LABELS[name], part.get_suptitle())

    def test_results(self):
        errors = {("mobius_regular", "centered"): [1.3, 1.4], ("mobius_regular", "shifted"): [1.2], ("cnn_same_channels", "centered"): [43.0]}
        figure = pictures.results(errors, reproduce.PAPER)
        self.assertEqual([label.get_text() for label in figure.axes[0].get_yticklabels()], ["CNN (channels)", "gauge CNN (regular)"])
        for axes, mode in zip(figure.axes, ("centered", "shifted"), strict=True):
            dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
            self.assertEqual(dots, [errors[key] for key in (("cnn_same_channels", mode), ("mobius_regular", mode)) if key in errors])
            mean, std = reproduce.PAPER["mobius_regular"][mode]
            bar = axes.patches[1]
            self.assertAlmostEqual(bar.get_x(), mean - std)
            self.assertAlmostEqual(bar.get_width(), 2 * std)

    ROWS = [
        {"run": "a", "model": "cnn_same_channels", "settings": {}, "train_mode": "centered", "seed": 0, "sha256": "0", "errors": [float(1 + shift) for shift in range(56)]},
        {"run": "b", "model": "cnn_same_channels", "settings": {}, "train_mode": "centered", "seed": 1, "sha256": "0", "errors": [float(3 + shift) for shift in range(56)]},
        {"run": "c", "model": "mobius_regular", "settings": {}, "train_mode": "centered", "seed": 0, "sha256": "0", "errors": [1.25] * 56},
        {"run": "d", "model": "mobius_regular", "settings": {"pooling": "polyphase"}, "train_mode": "centered", "seed": 0, "sha256": "0", "errors": [1.5] * 56},
    ]
    ROWS = [row | {"predictions": 560, "changed": 0} for row in ROWS]

    def test_error_against_shift(self):
        """The curves are the means over the seeds."""
        (axes,) = pictures.error_against_shift(self.ROWS).axes
        curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 56}
        self.assertEqual(curves, {
            "CNN (channels)": [float(2 + shift) for shift in range(56)],
            "gauge CNN (regular)": [1.25] * 56,
            "gauge CNN (regular), pooling polyphase": [1.5] * 56,
        })
        self.assertEqual([text.get_text() for text in axes.get_legend().get_texts()], list(curves))
        self.assertEqual(axes.get_legend().get_title().get_text(), "trained on centered digits")
        # The same settings have the same kind of line, in whatever order they come; the digits are told where they differ.
        rows = [self.ROWS[3], self.ROWS[2], self.ROWS[0], self.ROWS[0] | {"train_mode": "shifted"}]
        (axes,) = pictures.error_against_shift(rows).axes
        self.assertEqual({line.get_label(): line.get_linestyle() for line in axes.lines if len(line.get_ydata()) == 56}, {
            "CNN (channels), trained on centered digits": "-", "CNN (channels), trained on shifted digits": "--",
            "gauge CNN (regular), trained on centered digits": "-",
            "gauge CNN (regular), pooling polyphase, trained on centered digits": "--",
        })
        # A network without errors can be drawn too.
        for errors in ([0.0] * 56, [0.0, 2.0] * 28):
            (axes,) = pictures.error_against_shift([self.ROWS[2] | {"errors": errors}]).axes
            self.assertEqual((axes.get_yscale(), axes.get_ylim()[0]), ("linear", 0))

    def test_gradient_norm(self):
        curves = [{"config": {"sign_eps": sign_eps, "num_epochs": 2}, "norms": norms}
                  for sign_eps, norms in ((0.0, [3.0, 2.0, 1.0, 0.5]), (1e-8, [3.0, 2000.0, 10.0, 300.0]))]
        (axes,) = pictures.gradient_norm(curves).axes
        drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:2]}
        self.assertEqual(drawn, {"sign(x)": ([1, 2, 3, 4], curves[0]["norms"]), "x / (|x| + 1e-08)": ([1, 2, 3, 4], curves[1]["norms"])})
        self.assertEqual(axes.get_yscale(), "log")
        self.assertEqual((axes.texts[0].get_text(), axes.texts[0].xy[0]), ("epoch 2", 2.5))

    def test_training_curves(self):
        records = [{"epoch": epoch, "train_error": 100.0 / epoch} | ({"test_error_shifted": 50.0 / epoch} if epoch % 2 == 0 else {})
                   for epoch in (1, 2, 3, 4)]
        (axes,) = pictures.training_curves([{"config": {"model": "mobius_regular"}, "epochs": records}]).axes
        curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        self.assertEqual(curves["gauge CNN (regular): training digits, with dropout"], ([1, 2, 3, 4], [100.0, 50.0, 100 / 3, 25.0]))
        self.assertEqual(curves["gauge CNN (regular): shifted test digits"], ([2, 4], [25.0, 12.5]))
        self.assertEqual(len(curves), 3)


# ======================================================================================================
# visualize.py


class TestVisualize(FilesCase):
    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        self.data = write_npz(self.folder / "digits.npz")
        for option, model in visualize.NETWORKS.items():
            torch.save(build_model(model).state_dict(), self.folder / f"{option}.pt")
        (self.folder / "results" / "runs").mkdir(parents=True)
        run_folder.write_json(self.folder / "results" / "error_against_shift.json", {"rows": TestPictures.ROWS})
        run_folder.write_json(self.folder / "results" / "gradient_norms.json", {"format": 1, "curves": [
            {"config": {"sign_eps": 0.0, "num_epochs": 2}, "norms": [1.0, 2.0]}] * 2})
        for model, mode in itertools.product(("mobius_regular", "cnn_same_channels"), train.TRAIN_MODES):
            name = f"mnist-{model}-{mode}-seed0-precision_bf16.json"
            shutil.copy(ROOT / "results" / "runs" / name, self.folder / "results" / "runs" / name)
        self.options = ["--data", self.data, "--gauge_cnn", self.folder / "gauge_cnn.pt", "--cnn", self.folder / "cnn.pt",
                        "--results", self.folder / "results", "--out", self.folder / "pictures"]
        # Small ones.
        for name, value in {"DOTS": 20, "STRIP_LENGTH": 30}.items():
            patched = mock.patch.object(visualize, name, value)
            patched.start()
            self.addCleanup(patched.stop)

    def main(self, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            visualize.main([str(argument) for argument in arguments])
        return printed.getvalue().split()

    def test_all(self):
        """Without a display; every picture, twice the same bytes; light and dark ones differ in their text."""
        from PIL import Image

        printed = self.main(*self.options)
        names = {path.name for path in map(Path, printed)}
        self.assertEqual(names, {path.name for path in (self.folder / "pictures").iterdir()})
        self.assertEqual({name.split(".")[0].removesuffix("-dark") for name in names}, set(visualize.PICTURES))
        for name, picture in visualize.PICTURES.items():
            kind = "png" if picture.pixels else "svg"
            self.assertEqual({path for path in names if path.split(".")[0].removesuffix("-dark") == name},
                             {f"{name}.{kind}"} | ({f"{name}-dark.{kind}"} if picture.text else set()))
        pictures_before = {name: content for name, content in self.files().items() if name.startswith("pictures")}
        self.main("steerable_kernels", "results", "strip", *self.options)
        self.assertEqual(pictures_before, {name: content for name, content in self.files().items() if name.startswith("pictures")})
        light, dark = (pictures_before[f"pictures/results{style}.svg"].lower() for style in pictures.STYLES)
        self.assertIn(b"#e6edf3", dark)
        self.assertNotIn(b"#e6edf3", light)
        with Image.open(self.folder / "pictures" / "two_turns.png") as turns:
            self.assertEqual(turns.n_frames, 2 * 30 // 5)
            before = np.asarray(turns.convert("RGBA")).copy()
            turns.seek(6)
            self.assertFalse(np.array_equal(before, np.asarray(turns.convert("RGBA"))))  # once around: reflected
        with Image.open(self.folder / "pictures" / "field_types-dark.png") as image:
            self.assertEqual(image.convert("RGBA").getpixel((0, 0))[3], 0)  # transparent

    def test_material(self):
        """The networks that are given, or the latest of train.py, or new ones."""
        def material(**options):
            parser = visualize.command_line()
            return visualize.Material(parser.parse_args([f"--{name}={value}" for name, value in options.items()]))

        given = material(data=self.data, gauge_cnn=self.folder / "gauge_cnn.pt", cnn=self.folder / "cnn.pt", results=self.folder / "results")
        for option, model in visualize.NETWORKS.items():
            self.assertSameWeights(given.networks[model], self.folder / f"{option}.pt")
        run = mock.Mock(model=build_model("mobius_regular"))
        finished = {"stopped": [self.folder / "other"], "finished": []}
        with mock.patch.object(visualize, "resumed_run", return_value=run) as resumed_run, \
                mock.patch.object(visualize, "runs_of", return_value=finished), contextlib.redirect_stdout(io.StringIO()):
            material(data=self.data, cnn=self.folder / "cnn.pt").networks
            resumed_run.assert_called_once_with(train.LATEST, {"model": "mobius_regular", "dataset": "mnist", "data": str(self.data)})
            run.train.assert_called_once()
            run.close.assert_called_once()
            finished["finished"].append(self.folder / "gauge_cnn.pt")
            latest = material(data=self.data, cnn=self.folder / "cnn.pt").networks["mobius_regular"]
            resumed_run.assert_called_once()
        self.assertSameWeights(latest, self.folder / "gauge_cnn.pt")
        path = self.folder / "results" / "runs" / "mnist-mobius_regular-centered-seed0-precision_bf16.json"
        result = json.loads(path.read_text())
        self.assertEqual(given.errors["mobius_regular", "centered"], [result["test_error"]["shifted"]])
        self.assertNotEqual(*result["test_error"].values())
        self.assertEqual([curve["config"]["model"] for curve in given.curves], list(visualize.NETWORKS.values()))
        self.assertEqual({curve["config"]["precision"] for curve in given.curves}, {"bf16"})
        for model in visualize.NETWORKS.values():  # tested more often
            shutil.copy(ROOT / "results" / "runs" / f"mnist-{model}-centered-seed0.json", path.parent)
        again = material(results=self.folder / "results")
        self.assertEqual({curve["config"]["precision"] for curve in again.curves}, {"fp32"})

    def assertSameWeights(self, network, file):
        for name, value in torch.load(file, weights_only=True).items():
            self.assertClose(network.state_dict()[name], value.to(network.state_dict()[name].dtype), message=name)

    def test_shifted_wrongly(self):
        """The first digit that both know and the CNN loses when it is shifted by 16."""
        material = visualize.Material(visualize.command_line().parse_args([f"--data={self.data}"]))
        images, labels = (part[:200] for part in material.splits["test_centered"])

        def network(*wrong, wrong_when_moved=()):
            def logits(x):
                moved = torch.equal(x, isometry_action(images.double(), 16, (1, 0, 0)))
                self.assertTrue(moved or torch.equal(x, images.double()))
                classes = labels.clone()
                for index in wrong_when_moved if moved else wrong:
                    classes[index] = 9 - classes[index]
                return F.one_hot(classes, 10)

            return logits

        material.networks = {"mobius_regular": network(0), "cnn_same_channels": network(1, wrong_when_moved=(0, 1, 3, 4))}
        image, shift = material.shifted_wrongly
        self.assertTrue(torch.equal(image, images[3:4].double()))
        self.assertEqual(shift, 16)

    def test_strips(self):
        for name, shifts in (("strip", [0, 12, 18, 24, 30]), ("two_turns", list(range(0, 60, 5)))):
            drawn = mock.Mock()
            visualize.PICTURES[name].draw(drawn, visualize.Material(visualize.command_line().parse_args([f"--data={self.data}"])))
            self.assertEqual([shift for call in drawn.strips_in_space.mock_calls for shift in call.args[1]], shifts)

    def test_gradient_norms(self):
        """Measured where there is no file of them: in the first step the norm of the gradient itself, one for each step."""
        path = self.folder / "results" / "gradient_norms.json"
        path.unlink()
        config = train.Config("mobius_signflip", data=str(write_npz(self.folder / "few.npz", 8, 8)))
        data = train.find_data(config, torch.device("cpu"))
        content = gradients.measure_gradient_norms(data, data=config.data, batch_size=4)
        self.assertEqual([curve["config"]["sign_eps"] for curve in content["curves"]], [0.0, 1e-8])
        for curve in content["curves"]:
            torch.manual_seed(0)
            model = build_model("mobius_signflip", sign_eps=curve["config"]["sign_eps"])
            images, labels = data.splits["train_centered"]
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:4]
            F.cross_entropy(model(images[order]), labels[order]).backward()
            norm = sum(parameter.grad.double().square().sum() for parameter in model.parameters()).sqrt().item()
            self.assertAlmostEqual(curve["norms"][0] / norm, 1, places=3)
            self.assertEqual(len(curve["norms"]), 4)
        with mock.patch("visualize.measure_gradient_norms", return_value=content) as measure:
            self.main("gradient_norm", *self.options)
            self.main("gradient_norm", *self.options)
        measure.assert_called_once()
        self.assertEqual(json.loads(path.read_text()), content)
        for damaged in ("{", "[]", "{}", '{"format": 2, "curves": []}'):
            path.write_text(damaged)
            self.assertFails(visualize.main, "gradient_norm", *self.options, contains=str(path))

    def test_shift_between(self):
        x = torch.rand(1, 1, 4, 6)
        for shift in range(12):
            self.assertEqual(visualize.shift_between(x, isometry_action(x, shift, (1, 0, 0))), shift)
        with self.assertRaisesRegex(ValueError, "no isometry"):
            visualize.shift_between(x, torch.rand(1, 1, 4, 6))

    def test_bad_input(self):
        before = self.files()

        def fails(*arguments, contains):
            self.assertFails(visualize.main, *arguments, "--out", self.folder / "new", contains=contains)

        fails("moebius", contains=["moebius", "steerable_kernels"])
        fails("results", "--results", self.folder / "no", contains=["no", "python reproduce.py"])
        fails("training_curves", "--results", self.folder / "no", contains=["no", "python reproduce.py"])
        fails("error_against_shift", "--results", self.folder / "no", contains=["error_against_shift.json", "python reproduce.py"])
        fails("equivariance", "--data", self.data, "--gauge_cnn", self.folder / "no.pt", contains="no.pt")
        fails("equivariance", "--data", self.data, "--gauge_cnn", self.folder / "cnn.pt", contains=["cnn.pt", "mobius_regular"])
        fails("equivariance", "--data", self.data, "--gauge_cnn", self.data, contains="digits.npz")
        fails("shifted_digits", "--data", self.folder / "no.npz", contains="no.npz")
        with np.load(self.data) as npz:
            foreign = npz["train_data_shifted"].copy()
        foreign[0] = 0.5
        fails("shifted_digits", "--data", write_npz(self.folder / "foreign.npz", train_data_shifted=foreign), contains="no isometry")
        (self.folder / "foreign.npz").unlink()
        with not_installed("matplotlib"):
            fails("models", contains="matplotlib")
        self.assertFails(visualize.main, "models", "--out", self.data, contains="digits.npz")
        self.assertEqual(self.files(), before)
        path = self.folder / "results" / "error_against_shift.json"
        row = TestPictures.ROWS[0]
        for content in ("", "[" * 100000, '{"rows": [NaN]}', *map(json.dumps, ([], {"rows": []}, {"rows": [{"run": "a"}]}, {"rows": [3]},
                        {"rows": [row | {"errors": ["1"] * 56}]}, {"rows": [row | {"errors": [-1.0] * 56}]},
                        {"rows": [row | {"train_mode": []}]}))):
            path.write_text(content)
            fails("error_against_shift", "--results", self.folder / "results", contains=str(path))
        self.assertFalse((self.folder / "new").exists())


# ======================================================================================================
# benchmark.py


class TestBenchmark(FilesCase):
    def run_main(self, *arguments):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            benchmark.main([str(argument) for argument in arguments])
        return printed.getvalue()

    def test_figures(self):
        out = self.folder / "new" / "benchmark.json"
        options = ("--models", "mobius_regular", "--precision", "bf16", "--batch_size", 16, "--rounds", 2, "--device", "cpu", "--out", out)
        measure = benchmark.peak_memory

        def once(name, *arguments):  # each is a process of its own
            return measure(name, *arguments) if name == "mobius_regular" else 100.0

        with mock.patch("benchmark.keep_freed_memory"), mock.patch("benchmark.peak_memory", once):
            printed = self.run_main(*options)
        result = json.loads(out.read_text())
        rows = result["rows"]
        self.assertEqual(
            [(row["model"], row["precision"]) for row in rows],
            [("textbook CNN", "fp32"), ("mobius_regular", "bf16")],
        )
        self.assertEqual(set(result["matmul_gflop_per_second"]), {"fp32", "bf16"})
        for row in rows:
            self.assertIn(row["model"], printed)
            for task in ("step", "infer"):
                figures = row[task]
                self.assertGreater(figures["min_ms"], 0)
                self.assertAlmostEqual(figures["images_per_second"], 16000 / figures["median_ms"])
                self.assertAlmostEqual(figures["ratio"], figures["median_ms"] / rows[0][task]["median_ms"])
                self.assertGreater(figures["matmul_share"], 0)
            self.assertGreater(row["peak_memory_mb"], 0)
            self.assertAlmostEqual(row["memory_ratio"], row["peak_memory_mb"] / rows[0]["peak_memory_mb"])

    def test_pooling(self):
        out = self.folder / "pooling.json"
        with mock.patch("benchmark.keep_freed_memory"), mock.patch.object(MobiusPool, "_polyphase", autospec=True, side_effect=MobiusPool._polyphase) as used:
            printed = self.run_main("--pooling", "--models", "mobius_regular", "--precision", "bf16", "--batch_size", 4, "--rounds", 2,
                                    "--device", "cpu", "--out", out)
        (row,) = json.loads(out.read_text())["rows"]
        self.assertEqual(used.call_count, 2 * 2 * 9)  # poolings, tasks, calls in three rounds
        for task in ("step", "infer"):
            figures = row[task]
            self.assertAlmostEqual(figures["ratio"], figures["polyphase"]["median_ms"] / figures["fixed"]["median_ms"])
            self.assertIn(f"{figures['ratio']:.3f}", printed)

    def test_textbook_cnn(self):
        """cnn_same_channels but for the cut: the same shapes, parameters and arithmetic."""
        textbook, cnn = benchmark.TextbookCNN(), build_model("cnn_same_channels")
        self.assertEqual([p.shape for p in textbook.parameters()], [p.shape for p in cnn.parameters()])
        self.assertEqual({type(m) for m in textbook.cnn}, {nn.Conv2d, nn.ELU, nn.MaxPool2d})
        candidates = [benchmark.Candidate(name, "fp32", 2, torch.device("cpu")) for name in (benchmark.TEXTBOOK, "mobius_regular")]
        sizes = ((1, 16, 28), (16, 32, 28), (32, 64, 14), (64, 128, 14), (128, 256, 7), (256, 64, 7))
        for candidate in candidates:
            self.assertEqual(candidate.conv_flop(), sum(2 * 2 * i * o * 25 * s * s for i, o, s in sizes))

    def test_bad_options(self):
        self.assertFails(benchmark.main, "--models", "resnet", contains="mobius_regular")
        self.assertFails(benchmark.main, "--batch_size", 1, contains="at least 2")
        self.assertFails(benchmark.main, "--rounds", 1, contains="at least 2")
        self.assertFails(benchmark.main, "--out", self.folder, contains=str(self.folder))
        self.assertFails(benchmark.main, "--memory_of", "resnet", contains="textbook CNN")
        (self.folder / "file").write_text("")
        self.assertFails(benchmark.main, "--out", self.folder / "file" / "b.json", contains="cannot write")
        if not torch.cuda.is_available():
            self.assertFails(benchmark.main, "--device", "cuda", contains="--device cpu")
        self.assertEqual(list(self.files()), ["file"])

    def test_interrupted(self):
        """What stood there before still stands there."""
        out = self.folder / "benchmark.json"
        out.write_text("before")
        with mock.patch("benchmark.measure", side_effect=KeyboardInterrupt), self.assertRaises(SystemExit) as exit:
            self.run_main("--out", out, "--device", "cpu")
        self.assertEqual(exit.exception.code, 130)
        self.assertEqual(self.files(), {"benchmark.json": b"before"})


# ======================================================================================================
# README.md


class TestReadme(FilesCase):
    TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

    def rows(self, first):
        """Cells of the table rows whose first cell is `first`."""
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in self.TEXT.splitlines() if line.startswith("|")]
        return [row for row in table if row[0] == first]

    def test_commands(self):
        setup = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
        commands = [line for block in re.findall(r"```sh\n(.*?)```", self.TEXT, re.DOTALL) for line in block.splitlines()]
        self.assertEqual(commands[:2], [setup + "train.py --model mobius_regular --dataset digits", setup + "unit_tests.py"])
        modules = {f"{module.__name__}.py": module for module in (train, convert_mnist, benchmark, reproduce, visualize)}
        for command in commands[3:]:
            words = command.split("#")[0].split()
            if words[0] == "tensorboard":
                continue
            script = 1 if words[0] == "python" else words.index("reproduce.py")
            self.assertIn(words[0], ("python", "torchrun"))
            modules[words[script]].command_line().parse_args(words[script + 1:])

    def test_options(self):
        of_train = {action.dest for action in train.command_line()._actions}
        for module in (train, convert_mnist, benchmark, reproduce):
            for action in module.command_line()._actions[1:]:
                if (action.dest in ("memory_of", "models", "precision", "out") and module is benchmark
                        or action.dest in of_train and module is reproduce):
                    continue
                names = ", ".join(f"`{name}`" for name in action.option_strings)
                rows = self.rows(names)
                self.assertTrue(rows, f"{module.__name__} {names}")
                default = (train.DEFAULTS | {"recipe": "paper"}).get(action.dest) if action.default is argparse.SUPPRESS else action.default
                if type(default) in (int, float, str) and default != argparse.SUPPRESS and action.dest != "results":
                    shown = [row[1].strip("`") for row in rows]
                    self.assertTrue(any(value == str(default) or value.replace(".", "", 1).replace("e-", "", 1).isdigit()
                                        and float(value) == default for value in shown), f"{module.__name__} {names} {shown}")

    def test_parameters(self):
        for name, count in TestModels.PARAMETERS.items():
            (row,) = [row for row in self.rows(f"`{name}`") if len(row) == 4 and not row[1].startswith("`")]
            self.assertEqual(row[3], f"{count:,}")
            if name.startswith("mobius"):
                base = MODES[name.removeprefix("mobius_")]
                self.assertEqual(row[2], str(tuple(4 * m for m in base)))

    def test_files(self):
        for link in (*re.findall(r"\]\(([^)#:]+)\)", self.TEXT), *re.findall(r'src(?:set)?="([^"]+)"', self.TEXT)):
            self.assertTrue((ROOT / link).exists(), link)
        for path in ROOT.glob("*.py"):
            self.assertIn(f"]({path.name})", self.TEXT)

    def test_snippets(self):
        snippets = re.findall(r"```python\n(.*?)```", self.TEXT, re.DOTALL)
        self.assertEqual(len(snippets), 4)
        run = self.folder / re.search('run = "(.*)"', snippets[3])[1]
        run.mkdir(parents=True)
        torch.save(build_model("mobius_regular").state_dict(), run / "weights.pt")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        for snippet in snippets:
            exec(snippet, {})

    def test_results(self):
        """Each measured figure in the README is that of the files in results/."""
        groups = {}
        for path in sorted((ROOT / "results" / "runs").glob("*.json")):
            result = json.loads(path.read_text())
            self.assertEqual(result["status"], "finished", path)
            config = train.Config(**result["config"])
            self.assertEqual(reproduce.run_name(config), path.stem)
            groups.setdefault((config.dataset, config.model, config.train_mode, config.precision, config.sign_eps), []).append(result)
        for (dataset, model, train_mode, precision, sign_eps), results in groups.items():
            if precision == "bf16" or sign_eps:
                continue  # in the table
            self.assertEqual(train_mode, "centered")
            cells = [" ".join(row) for row in self.rows(f"`{model}`") if row[1] == {"mnist": "MNIST", "digits": "digits"}[dataset]]
            self.assertEqual(len(cells), 1, f"{dataset} {model}")
            self.assertIn(", ".join(str(result["config"]["seed"]) for result in results), cells[0])
            for version in ("shifted", "centered"):
                errors = ", ".join(f"{result['test_error'][version]:.2f}" for result in results)
                self.assertIn(errors, cells[0], f"{dataset} {model} {version}")

    def test_table(self):
        """The README has what reproduce.py prints of the committed results."""
        options = re.search(r"`python reproduce.py (--table markdown[^`]*)`", self.TEXT)[1].split()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            reproduce.main(options)
        lines = printed.getvalue().splitlines()
        shown = set(self.TEXT.splitlines())
        for line in lines[:lines.index("Not the paper's protocol: precision bf16")]:
            self.assertTrue(line in shown, line)
        self.assertGreaterEqual(len([line for line in lines if line.startswith("| `")]), 14)

    def test_pooling_and_recipe(self):
        """The tables on polyphase pooling and on the recipe, from the files."""
        def cell(model, train_mode, version, runs, **options):
            study, _ = reproduce.plan({"runs": runs, "models": [model], "train_modes": [train_mode], "parallel_seeds": 1,
                                       "results": str(ROOT / "results"), "precision": "bf16", **options})
            return reproduce.Cell(study, model, train_mode, version)

        def shown(cell):
            return f"{cell.mean:.2f}" + (f" ± {cell.std:.2f}" if cell.n > 1 else "") + f" ({cell.n})"

        for pooling in POOLINGS:
            (row,) = [row for row in self.rows("`mobius_regular`") if row[1] == f"`{pooling}`"]
            self.assertEqual(row[2:], [shown(cell("mobius_regular", mode, "shifted", 3, pooling=pooling)) for mode in train.TRAIN_MODES])
        for recipe in train.RECIPES:
            (row,) = self.rows(f"`--recipe {recipe}`")
            of_recipe = [cell("mobius_regular", "centered", version, 5, recipe=recipe) for version in ("shifted", "centered")]
            self.assertEqual(row[1:], [*map(shown, of_recipe), ", ".join(f"{error:.2f}" for error in of_recipe[0].errors)])
            for config in reproduce.plan({"runs": 5, "models": ["mobius_regular"], "train_modes": ["centered"], "parallel_seeds": 1,
                                          "results": str(ROOT / "results"), "precision": "bf16", "recipe": recipe})[0].finished():
                name = reproduce.run_name(config)  # which a recipe of other settings could bear too
                self.assertEqual(reproduce.Study([config]).result(config)["status"], "finished", name)
        for row in json.loads((ROOT / "results" / "error_against_shift.json").read_text())["rows"]:
            settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
            (cells,) = [cells for cells in self.rows(f"`{row['model']}`") if cells[1] == str(row["seed"]) and cells[2] == settings]
            self.assertEqual(cells[3:], [f"{row['changed']:,} of {row['predictions']:,}", reproduce.consistency(row),
                                         f"{min(row['errors']):.2f} … {max(row['errors']):.2f} %"])
        rows = json.loads((ROOT / "results" / "benchmark_pooling.json").read_text())["rows"]
        for model in MODELS:
            ratios = {row["precision"]: row for row in rows if row["model"] == model}
            expected = [f"{ratios[precision][task]['ratio']:.2f}" for task in ("step", "infer") for precision in train.PRECISIONS]
            self.assertIn([f"`{model}`", *expected], [row for row in self.rows(f"`{model}`") if len(row) == 5])
        for run in json.loads((ROOT / "results" / "recipe_search.json").read_text())["runs"]:
            names = ("lr", "deformation", "stroke_width", "scaling", "label_smoothing", "dropout")
            self.assertIn([*(f"{run[name]:g}" for name in names), run["besides"], f"{run['error']:.2f}"], [row[1:] for row in self.rows(str(run["batch_size"]))])

    def test_pictures(self):
        """All that visualize.py draws is there, on this page, in both styles, and small; and drawn from networks whose runs are there."""
        folder, walkthrough = ROOT / "visualizations", (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
        names = {f"{name}{style}.{'png' if picture.pixels else 'svg'}" for name, picture in visualize.PICTURES.items()
                 for style in (pictures.STYLES if picture.text else [""])}
        self.assertEqual({path.name for path in folder.iterdir()}, names | {"README.md"})
        for text, prefix in ((self.TEXT, ""), (walkthrough, "../")):
            shown = re.findall(rf'(?:src="|srcset="|\]\(){re.escape(prefix)}visualizations/([^")]+)', text)
            self.assertEqual(len(shown), len(set(shown)))
            self.assertLessEqual(set(shown), names)
            for name in shown:  # with its other style
                plain = name.replace("-dark", "")
                self.assertEqual(visualize.PICTURES[plain.split(".")[0]].text, {plain, plain.replace(".", "-dark.")} <= set(shown), name)
            if text is self.TEXT:
                self.assertEqual(set(shown), names)
        self.assertEqual(len(re.findall("alt=", walkthrough + self.TEXT)) + len(re.findall(r"!\[.+?\]", walkthrough + self.TEXT)),
                         len(visualize.PICTURES) + 6)
        self.assertLess(sum(path.stat().st_size for path in folder.iterdir()), 3_000_000)
        # Those of results are of these results.
        with contextlib.redirect_stdout(io.StringIO()):
            visualize.main(["results", "error_against_shift", "gradient_norm", "training_curves", "models", "--out", str(self.folder)])

        for path in self.folder.iterdir():
            drawn, committed = path.read_text(), (folder / path.name).read_text()
            version = re.search(r"Matplotlib v[\d.]+", committed)[0]
            if version in drawn:  # another one may write it otherwise
                self.assertEqual(drawn, committed, f"python visualize.py {path.stem.split('-')[0]}")
        content = json.loads((ROOT / "results" / "error_against_shift.json").read_text())
        for row in content["rows"]:
            stored = json.loads((ROOT / "results" / "runs" / f"{row['run']}.json").read_text())
            self.assertAlmostEqual(row["errors"][0], stored["test_error"]["centered"], delta=0.05)

    def test_walkthrough(self):
        """Six steps, each with a picture and five to fifteen lines; together they are a program, and what it asserts is true."""
        steps = re.split(r"^## \d\. .+$", (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        self.assertEqual(len(steps), 6)
        torch.manual_seed(0)
        namespace = {}
        for step in steps:
            (snippet,) = re.findall(r"```python\n(.*?)```", step, re.DOTALL)
            self.assertIn("visualizations/", step)
            self.assertIn(len([line for line in snippet.splitlines() if line.strip()]), range(5, 16))
            self.assertIn("assert", snippet)
            exec(snippet, namespace)

    def test_reliability(self):
        result = json.loads((ROOT / "results" / "reliability.json").read_text())
        for what, count in result["survived"].items():
            (row,) = self.rows(what)
            self.assertEqual(row[1], str(count), what)

    def test_benchmark(self):
        result = json.loads((ROOT / "results" / "benchmark.json").read_text())
        for row in result["rows"]:
            name = row["model"] if row["model"] == benchmark.TEXTBOOK else f"`{row['model']}`"
            precision = {"fp32": "float32", "bf16": "bfloat16"}[row["precision"]]
            (cells,) = [cells for cells in self.rows(name) if cells[1] == precision]
            figures = [
                f"{row['step']['ratio']:.2f}", f"{row['step']['images_per_second']:,.0f}",
                f"{row['infer']['ratio']:.2f}", f"{row['infer']['images_per_second']:,.0f}", f"{row['memory_ratio']:.2f}",
            ]
            self.assertEqual(cells[2:], figures, cells)


# About half of the time: those that read, write and start processes, beside those that compute.
APART = ("TestConvertMNIST", "TestCheckpoints", "TestDeformation", "TestParallelSeeds", "TestReproduce", "TestPictures", "TestVisualize",
         "TestBenchmark", "TestReadme")


def run_in_two_processes() -> bool:
    """Run all tests, a part of them beside the others, and print what both print. Returns whether all passed."""
    cases = [name for name, case in globals().items() if isinstance(case, type) and issubclass(case, unittest.TestCase)
             and unittest.TestLoader().getTestCaseNames(case)]
    counts, survived = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = []
        for i, part in enumerate(([name for name in cases if name not in APART], APART)):
            output, reliability = stack.enter_context(open(Path(folder, f"{i}.txt"), "w+b")), Path(folder, f"{i}.json")
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}
            if os.environ.get("RELIABILITY"):
                environment["RELIABILITY"] = str(reliability)
            command = [sys.executable, __file__, *part]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE if i == 0 else output, stderr=subprocess.STDOUT)
            processes.append((process, output, reliability))
        for process, output, reliability in processes:
            while process.stdout and (chunk := process.stdout.read1()):  # the first part as it comes, the second one at its end
                output.write(chunk)
                print(chunk.decode("utf-8", "replace"), end="", flush=True)
            process.wait()
            output.seek(0)
            text = output.read().decode("utf-8", "replace")
            if not process.stdout:
                print(text, end="")
            told = re.findall(r"(\d+) (passed|failed|skipped)", text.splitlines()[-1] if text else "")
            counts.update({what: int(count) for count, what in told} if told else {"failed": 1})  # or it did not come to its end
            if reliability.exists():
                survived.update(json.loads(reliability.read_text())["survived"])
    if os.environ.get("RELIABILITY"):
        write_reliability(survived)
    print(f"all: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return not counts["failed"] and not any(process.returncode for process, _, _ in processes)


def main() -> None:
    """Run the tests and close with a line that counts them."""
    if len(sys.argv) == 1 and (os.cpu_count() or 1) > 1:
        sys.exit(not run_in_two_processes())
    program = unittest.main(exit=False, warnings="ignore")  # PyTorch's about itself
    result = program.result
    failed = len({getattr(test, "test_case", test) for test, _ in result.failures + result.errors})
    skipped = len(result.skipped)
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
