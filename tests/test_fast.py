"""The package fast/: every twin against its formula, and when a twin is called at all."""

import collections
import contextlib
import copy
import gc
import io
import itertools
import threading
import warnings
from functools import partial
from typing import Callable, NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch import Tensor

import fast
import fast.kept
import fast.spectral
from equivariance import assert_equivariant
from fast import TWINS
from fields import Fields, isometry_action, sample_norms
from models import MODELS, POOLINGS, build_model, has_sign_flip_fields
from nn_layers import (
    EquivNonlin, MobiusConv, MobiusConvNaive, MobiusPool, strip_conv, strip_pool, transport_pad,
)
from polyphase import PolyphasePool
from tests.reference import (
    DOUBLE, EXACT, FIELDS, KERNEL_SIZES, SIZES, TOLERANCE, channels, features, randomized,
)
from tests.support import Case

TOLERANCES = {torch.float64: TOLERANCE, torch.float32: 1e-4, torch.bfloat16: 2e-2}
SOME_FIELDS = [*FIELDS[:3], FIELDS[-1]]


# --------------------------------------------------------------------------------------------------
# Inputs


def on_blank(fields, width: int, length: int, dtype=DOUBLE) -> Tensor:
    """Samples whose signs and largest values rounding would decide.

    A block of equal values on a blank strip; 0 and values of equal magnitude, the same with an
    error of a few eps, that 32 times as large, and the error alone; zeros.
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    block = torch.zeros(channels(fields), width, length, dtype=DOUBLE)
    block[:, 1:4, 1:4] = 0.75
    equal = 0.75 * torch.randint(-1, 2, block.shape)
    error = eps * torch.randint(-4, 5, block.shape)
    samples = [block, equal, equal + error, 32 * (equal + error), error, torch.zeros_like(block)]
    return torch.stack(samples).to(dtype)


def strips(fields, width: int, length: int, n: int = 2, dtype=DOUBLE) -> Tensor:
    """`n` samples of noise and those of `on_blank`."""
    noise = features(fields, width, length, n).to(dtype)
    return torch.cat([noise, on_blank(fields, width, length, dtype)])


def channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def every_second(x: Tensor) -> Tensor:
    """The same values, with gaps between them in memory."""
    return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]


FORMATS = (torch.Tensor.contiguous, channels_last, every_second)


# --------------------------------------------------------------------------------------------------
# Which twins are called


@contextlib.contextmanager
def counted():
    """Count the calls of each twin that do not decline."""
    counts = collections.Counter()

    def counting(name, twin, *args):
        result = twin(*args)
        if result is not NotImplemented:
            counts[name] += 1
        return result

    cells = {}
    for name, function in TWINS.items():
        (cells[name],) = (c for c in function.__closure__ if c.cell_contents is function.twin)
    for name, cell in cells.items():
        cell.cell_contents = partial(counting, name, TWINS[name].twin)
    try:
        yield counts
    finally:
        for name, cell in cells.items():
            cell.cell_contents = TWINS[name].twin


def everywhere_spectral():
    """The Fourier basis for every convolution in channels_last, also where it does not pay."""
    def pays(x, *_):
        _, c, w, l = x.shape
        return x.stride() == (c * w * l, 1, l * c, c)

    return mock.patch("fast.spectral.pays", pays)


# --------------------------------------------------------------------------------------------------
# Cases of each twin


class Arguments(NamedTuple):
    """of: the arguments, from the tensors that they are differentiated by."""

    about: str
    inputs: list[Tensor]
    of: Callable


def elementwise_inputs(dtype):
    """Features of all fields and sizes in all memory formats, and an empty batch."""
    for (f, fields), (s, size) in itertools.product(enumerate(FIELDS), enumerate(SIZES)):
        fields, make = Fields(*fields), FORMATS[(f + s) % 3]
        x = make(strips(fields, *size, 9, dtype))
        yield f"{tuple(fields)}, W x L = {size}, {make.__name__}", fields, x
    yield "an empty batch", fields, strips(fields, *size, dtype=dtype)[:0]


def pad_columns_cases(dtype):
    for about, fields, x in elementwise_inputs(dtype):
        for pad in (0, 1, 3, x.shape[3]):
            yield Arguments(f"pad = {pad}, {about}", [x], lambda x: (x, pad, fields))


def equiv_elu_cases(dtype):
    for about, fields, x in elementwise_inputs(dtype):
        if fields.sign:
            b = torch.randn(1, fields.sign, 1, 1, dtype=torch.promote_types(dtype, torch.float32))
            yield Arguments(about, [x, b], lambda x, b: (x, b, fields))


def max_pool_cases(dtype):
    for about, fields, x in elementwise_inputs(dtype):
        alignments = ((0, 0), False), ((0, 0), True), ((1, 0), False)
        for stride, (padding, ceil_mode) in itertools.product(((2, 1), (2, 2)), alignments):
            case = f"stride {stride}, padding {padding}, ceil_mode {ceil_mode}, {about}"
            yield Arguments(case, [x], lambda x: (x, fields, stride, padding, ceil_mode))


def polyphase_pool_cases(dtype):
    for about, fields, x in elementwise_inputs(dtype):
        if x.shape[3] % 2 == 0:
            with fast.disabled():
                windows = strip_pool(x, fields, step=1)
                even, odd = sample_norms(windows[..., 0::2]), sample_norms(windows[..., 1::2])
            # Rounding may decide between grids that are as good as equal.
            x = x[((odd - even).abs() > TOLERANCES[dtype] * odd) | (odd == 0)]
            yield Arguments(about, [x], lambda x: (x, fields))


def strip_conv_cases(dtype):
    """Each pair of some fields with each kernel size, and each size of the strip.

    By the kernel's free values: gradients of the others are a matter of representation.
    """
    axes = map(enumerate, (SOME_FIELDS, SOME_FIELDS, KERNEL_SIZES))
    for (i, in_fields), (o, out_fields), (s, k) in itertools.product(*axes):
        if dtype != torch.bfloat16:
            size = SIZES[(i + o + s) % len(SIZES)]
            layer = randomized(MobiusConv(in_fields, out_fields, k, dtype=dtype))
            x = channels_last(strips(in_fields, *size, dtype=dtype))
            yield Arguments(
                f"{in_fields} to {out_fields}, k = {k}, W x L = {size}",
                [x, *stored(layer).values()],
                lambda x, *values: (x, *expanded(layer, values), layer.in_fields, layer.out_fields),
            )


def stored(layer: MobiusConv) -> dict[str, Tensor]:
    """The parameters that have values: an antisymmetric kernel with k = 1 has none."""
    return {name: p.detach() for name, p in layer.named_parameters() if p.numel()}


def expanded(layer: MobiusConv, values) -> tuple[Tensor, Tensor | None]:
    """The kernel and the bias for these values of the parameters."""
    class Expansion(nn.Module):
        def forward(self):
            return layer.expand()

    expansion = Expansion()
    expansion.layer = layer
    names = (f"layer.{name}" for name in stored(layer))
    return torch.func.functional_call(expansion, dict(zip(names, values)), ())


def naive_conv_cases(dtype):
    for k, size, bias in itertools.product(KERNEL_SIZES, SIZES, (True, False)):
        if dtype != torch.bfloat16:
            x = channels_last(strips((3, 0, 0), *size, dtype=dtype))
            inputs = [x, torch.randn(4, 3, k, k, dtype=dtype)]
            about = f"k = {k}, W x L = {size}"
            if bias:
                yield Arguments(about, [*inputs, torch.randn(4, dtype=dtype)], lambda *args: args)
            else:
                yield Arguments(f"no bias, {about}", inputs, lambda x, kernel: (x, kernel, None))


CASES = {
    "pad_columns": pad_columns_cases,
    "equiv_elu": equiv_elu_cases,
    "max_pool": max_pool_cases,
    "polyphase_pool": polyphase_pool_cases,
    "strip_conv": strip_conv_cases,
    "naive_conv": naive_conv_cases,
}


def one_case(name: str) -> Arguments:
    """A small one of all field types, which the twin does not decline."""
    fields, other = Fields(1, 1, 1), Fields(0, 2, 1)
    x = channels_last(features(fields, 4, 4, n=1))
    layer = randomized(MobiusConv(fields, other, 3, dtype=DOUBLE))
    kernel, bias = (tensor.detach() for tensor in layer.expand())
    b = torch.randn(1, 1, 1, 1, dtype=DOUBLE)
    return {
        "pad_columns": Arguments(name, [x], lambda x: (x, 1, fields)),
        "equiv_elu": Arguments(name, [x, b], lambda x, b: (x, b, fields)),
        "max_pool": Arguments(name, [x], lambda x: (x, fields, (2, 2), (0, 0), False)),
        "polyphase_pool": Arguments(name, [x], lambda x: (x, fields)),
        "strip_conv": Arguments(name, [x, kernel, bias], lambda *args: (*args, fields, other)),
        "naive_conv": Arguments(name, [x, kernel, bias], lambda *args: args),
    }[name]


# --------------------------------------------------------------------------------------------------


class FastCase(Case):
    def assertSame(self, actual, expected, tolerance, about=None):
        """All tensors, relative to the largest value of each."""
        self.assertEqual(len(actual), len(expected), about)
        for i, (a, b) in enumerate(zip(actual, expected)):
            self.assertEqual(a.dtype, b.dtype, about)
            if b.dtype.is_floating_point:
                scale = b.abs().max().clamp(min=1e-3) if b.numel() else 1
                a, b = a / scale, b / scale
            self.assertClose(a, b, tolerance, f"{about}, tensor {i}")

    def assertEqualsFormula(self, layer, x, tolerance=TOLERANCE, about=None, twin=None):
        """Values and gradients of the input and all parameters; `twin` is called once."""
        x = channels_last(x).requires_grad_()
        tensors = [x, *layer.parameters()]
        with counted() as counts:
            y = layer(x)
        if twin:
            self.assertEqual(counts[twin], 1, about)
        with fast.disabled():
            expected = layer(x)
        grad = torch.randn_like(expected)
        self.assertSame([y, *torch.autograd.grad(y, tensors, grad)],
                        [expected, *torch.autograd.grad(expected, tensors, grad)], tolerance, about)


class TestTwins(FastCase):
    def derivatives(self, function: Callable, case: Arguments) -> list[Tensor]:
        """The value without and with gradients, these, and in float64 theirs in some direction."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=DOUBLE).to(y.dtype)

        inputs = [x.detach().requires_grad_() for x in case.inputs]
        with torch.no_grad():
            value = function(*case.of(*inputs))
        y = function(*case.of(*inputs))
        n, c, w, l = y.shape
        # In other dtypes the gradient of y has no memory of its own, as that of a sum().
        grad = random(n, c, w, l) if y.dtype == DOUBLE else random(c, 1, l).expand_as(y)
        grad.requires_grad_()
        gradients = torch.autograd.grad(y, inputs, grad, retain_graph=True)
        if y.dtype != DOUBLE:
            return [value, y, *gradients]
        again = torch.autograd.grad(y, inputs, grad, create_graph=True)
        directions = [random(*x.shape) for x in inputs]
        second = torch.autograd.grad(again, [grad, *inputs], directions, materialize_grads=True)
        return [value, y, *gradients, *again, *second]

    def test_each_twin_equals_its_formula(self):
        for (name, function), dtype in itertools.product(TWINS.items(), TOLERANCES):
            self.assertIn(name, CASES, "a twin without cases")
            calls = cases = 0
            with self.subTest(name, dtype=dtype), everywhere_spectral():
                for case in CASES[name](dtype):
                    about = f"{name}, {dtype}, {case.about}"
                    with counted() as counts:
                        actual = self.derivatives(function, case)
                    calls, cases = calls + counts[name], cases + 1
                    with fast.disabled():
                        expected = self.derivatives(function.formula, case)
                    self.assertSame(actual, expected, TOLERANCES[dtype], about)
                self.assertEqual(calls > 0, cases > 0, "a twin that declines in all cases")
                self.assertTrue(cases or dtype == torch.bfloat16)

    def test_in_place_operations_on_the_result(self):
        """As of nn.ReLU(inplace=True) after a layer."""
        for name, function in TWINS.items():
            with self.subTest(name), everywhere_spectral():
                for case in CASES[name](torch.float32):
                    inputs = [x.detach().requires_grad_() for x in case.inputs]
                    results = []
                    for relu in (torch.relu, torch.relu_):
                        y = function(*case.of(*(x + 0 for x in inputs)))  # no leaves
                        results.append(torch.autograd.grad(relu(y).sum(), inputs))
                    self.assertSame(*results, 1e-4, f"{name}, {case.about}")

    def test_the_register(self):
        self.assertEqual(set(TWINS), set(CASES))
        for name, function in TWINS.items():
            self.assertIs(function.twin, getattr(fast, name))
            self.assertIsNot(function.formula, function.twin)
            self.assertEqual(function.__doc__, function.formula.__doc__)

    def test_a_new_twin(self):
        """The decorator alone: who computes, in which thread, after an error."""
        with mock.patch.dict(TWINS):
            def twin(formula, x):
                return NotImplemented if x.ndim > 1 else formula(x) + "twin"

            @fast.accelerated(by=twin)
            def function(x):
                return "formula"

            self.assertIs(TWINS["function"], function)
        x = torch.ones(2)
        self.assertEqual(function(x), "formulatwin")
        self.assertEqual(function(nn.Parameter(x)), "formulatwin")
        self.assertEqual(function(x[None]), "formula")
        self.assertEqual(function(x.to("meta")), "formula")
        self.assertEqual(function(x.as_subclass(type("Other", (Tensor,), {}))), "formula")
        with self.assertRaises(ZeroDivisionError), fast.disabled():
            with fast.disabled():
                self.assertEqual(function(x), "formula")
            self.assertEqual(function(x), "formula")
            results = []
            thread = threading.Thread(target=lambda: results.append(function(x)))
            thread.start()
            thread.join()
            self.assertEqual(results, ["formulatwin"])  # for the thread that asks
            1 / 0
        self.assertEqual(function(x), "formulatwin")

    def test_the_formula_where_something_looks_inside(self):
        """Transforms, forward mode, fake tensors, FLOP counters, tracing, other devices."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.autograd import forward_ad
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.utils.flop_counter import FlopCounterMode

        for name, function in TWINS.items():
            x, *rest = (case := one_case(name)).inputs

            def call(x):
                return function(*case.of(x, *rest))

            def loss(x):
                return call(x).square().sum()

            with self.subTest(name), everywhere_spectral():
                with counted() as counts:
                    y = call(x)
                self.assertEqual(counts[name], 1)
                with counted() as counts:
                    meta = function(*case.of(*(x.to("meta") for x in case.inputs)))
                    self.assertEqual((meta.is_meta, meta.shape), (True, y.shape))
                    batch = torch.vmap(call)(torch.stack([x, 2 * x]))
                    fields = x.as_subclass(type("Features", (Tensor,), {}))
                    self.assertNotEqual(type(call(fields)), Tensor)
                    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                        self.assertEqual(call(fake.from_tensor(x)).shape, y.shape)
                    with FlopCounterMode(display=False) as counter:
                        call(x)
                    self.assertEqual(counter.get_total_flops() > 0, "conv" in name)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        traced = torch.jit.trace(call, x, check_trace=False)
                    for traced in (traced, make_fx(call)(x)):
                        self.assertSame([traced(x)], [y], TOLERANCE)
                    jacobians = [torch.func.jacrev(call)(x), torch.func.jacfwd(call)(x)]
                    hessian = torch.func.hessian(loss)(x)
                    with forward_ad.dual_level():
                        dual = call(forward_ad.make_dual(x, torch.ones_like(x)))
                        forward = forward_ad.unpack_dual(dual).tangent
                self.assertEqual(counts, {})
                self.assertSame([batch[1]], [call(2 * x)], TOLERANCE)
                jacobian = torch.autograd.functional.jacobian(call, x)
                batched = torch.autograd.functional.jacobian(call, x, vectorize=True)
                self.assertSame([*jacobians, batched], [jacobian] * 3, TOLERANCE)
                self.assertSame([forward], [jacobian.sum(dim=(4, 5, 6, 7))], TOLERANCE)
                expected = torch.autograd.functional.hessian(loss, x)
                self.assertSame([hessian], [expected], TOLERANCE)


class TestConvolutions(FastCase):
    def test_many_channels(self):
        """Where the twin pays by itself, and the kernel gradient is put together from copies."""
        cases = [
            ((0, 0, 16), (0, 0, 32), 16), ((0, 0, 32), (32, 0, 0), 37),
            ((8, 8, 8), (0, 48, 0), 16), ((40, 0, 0), (8, 8, 16), 16),
        ]
        for in_fields, out_fields, n in cases:
            about = f"{in_fields} to {out_fields}, {n} samples"
            layer = randomized(MobiusConv(in_fields, out_fields, 5))
            x = features(in_fields, 7, 7, n, torch.float32)
            self.assertEqualsFormula(layer, x, 1e-4, about, twin="strip_conv")

    def test_many_channels_of_a_conventional_convolution(self):
        for c_in, c_out, n in ((32, 48, 33), (48, 33, 16)):
            x = features((c_in, 0, 0), 7, 7, n, torch.float32)
            self.assertEqualsFormula(MobiusConvNaive(c_in, c_out, 5), x, 1e-4, twin="naive_conv")

    def test_conventional_convolution(self):
        for k, size in itertools.product(KERNEL_SIZES, SIZES):
            layer, x = MobiusConvNaive(3, 4, k, dtype=DOUBLE), features((3, 0, 0), *size)
            with everywhere_spectral():
                self.assertEqualsFormula(layer, x, twin="naive_conv")
            with counted() as counts:
                layer(x)
            self.assertEqual(counts, {"pad_columns": 1})

    def test_frozen_parts(self):
        """Gradients for the input alone, and for any of the parameters alone."""
        x, naive = features((1, 1, 1), 6, 5), MobiusConvNaive(4, 4, 3, dtype=DOUBLE)
        layers = MobiusConv((1, 1, 1), (1, 1, 1), 3, dtype=DOUBLE), naive
        for layer, of_input in itertools.product(map(randomized, layers), (True, False)):
            names = [name for name, _ in layer.named_parameters()]
            for free in ([], ["bias_triv", "bias_reg", "bias"], names[:1], names[-1:], names):
                for name, parameter in layer.named_parameters():
                    parameter.requires_grad_(name in free)
                inputs = [channels_last(x).requires_grad_(of_input), *layer.parameters()]
                wanted = [tensor for tensor in inputs if tensor.requires_grad]
                with everywhere_spectral(), counted() as counts:
                    y = layer(inputs[0])
                self.assertEqual(sum(counts.values()), 1)
                self.assertEqual(y.requires_grad, bool(wanted))
                if wanted:
                    with fast.disabled():
                        expected = torch.autograd.grad(layer(inputs[0]).square().sum(), wanted)
                    loss, about = y.square().sum(), f"{free}, input {of_input}"
                    for create_graph in (True, False):
                        actual = torch.autograd.grad(loss, wanted, create_graph=create_graph)
                        self.assertSame(actual, expected, TOLERANCE, about)

    def test_bfloat16(self):
        """Under autocast, values and gradients are about as good as the formula's."""
        layers = MobiusConv((0, 0, 16), (8, 8, 8), 5), MobiusConvNaive(32, 32, 5)
        for layer in map(randomized, layers):
            x = channels_last(features((0, 0, 16), 9, 8, 16, torch.float32)).requires_grad_()
            inputs = [x, *layer.parameters()]
            grad = torch.randn(16, 32, 9, 8).bfloat16()
            results = {}
            for way in ("exact", "formula", "twin"):
                with contextlib.ExitStack() as stack:
                    counts = stack.enter_context(counted())
                    if way != "twin":
                        stack.enter_context(fast.disabled())
                    with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
                        y = layer(x)
                    self.assertEqual(sum(counts.values()), way == "twin")
                    gradients = torch.autograd.grad(y, inputs, grad.to(y.dtype), create_graph=True)
                    results[way] = [y, *gradients]
            for exact, formula, twin in zip(*results.values()):
                self.assertEqual(twin.dtype, formula.dtype)
                allowed = 3 * (formula - exact).norm() + 1e-6 * exact.norm()
                self.assertLess((twin - exact).norm(), allowed)
            with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
                layer.double()
                self.assertEqualsFormula(layer, x.detach().double(), about="float64 under autocast")

    def test_gradients_under_autocast(self):
        """The twin's own ones in bfloat16, not those of the formula that create_graph asks for."""
        layers = MobiusConv((0, 0, 16), (8, 8, 8), 5), MobiusConvNaive(32, 32, 5)
        for layer in map(randomized, layers):
            x = channels_last(features((0, 0, 16), 7, 7, 16, torch.float32)).requires_grad_()
            inputs = [x, *layer.parameters()]
            with fast.disabled():
                exact = torch.autograd.grad(layer(x).square().sum(), inputs)
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            for a, b in zip(torch.autograd.grad(y.float().square().sum(), inputs), exact):
                self.assertEqual(a.dtype, torch.float32)
                self.assertLess((a - b).norm(), 0.02 * b.norm())

    def test_what_is_computed_how(self):
        """By the formula where the twin does not pay; in the memory format of the input."""
        def calls(x, layer):
            x.requires_grad_()
            with counted() as counts:
                y = layer(x)
            last = x.is_contiguous(memory_format=torch.channels_last)
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            for result in (y, grad):
                self.assertEqual(result.is_contiguous(memory_format=torch.channels_last), last)
            return counts["strip_conv"] + counts["naive_conv"]

        def image(*shape):
            return channels_last(torch.randn(shape))

        for layer in (MobiusConv((0, 0, 16), (0, 0, 16), 5), MobiusConvNaive(32, 32, 5)):
            self.assertEqual(calls(image(16, 32, 14, 14), layer), 1)
            self.assertEqual(calls(image(16, 32, 14, 14).contiguous(), layer), 0)
            self.assertEqual(calls(image(15, 32, 14, 14), layer), 0)
            self.assertEqual(calls(image(16, 32, 101, 4), layer), 0)
        for fields, k, expected in (((32, 0, 0), 3, 0), ((31, 0, 0), 5, 0), ((32, 0, 0), 7, 1)):
            layer = MobiusConv((0, 0, 16), fields, k)
            self.assertEqual(calls(image(16, 32, 14, 14), layer), expected)
        self.assertEqual(calls(image(16, 16, 14, 14), MobiusConv((0, 0, 8), (0, 0, 32), 5)), 0)
        for name, twin in (("mobius_regular", "strip_conv"), ("cnn_same_channels", "naive_conv")):
            with counted() as counts:
                build_model(name)(torch.rand(16, 1, 16, 16))
            self.assertEqual(counts[twin], 4)

    def test_memory_format_of_the_other_layers(self):
        for layer, make in itertools.product((EquivNonlin, MobiusPool, PolyphasePool), FORMATS[:2]):
            x = make(features((2, 1, 1), 8, 8)).requires_grad_()
            y = layer((2, 1, 1))(x)
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            with torch.no_grad():
                z = layer((2, 1, 1))(x)
            for result in (y, grad, z):
                self.assertEqual(result.stride(), make(result).stride(), layer)

    def test_wrong_dtypes_are_refused_either_way(self):
        for layer in (MobiusConv((0, 0, 16), (0, 0, 16), 5), MobiusConvNaive(32, 32, 5)):
            for x in (torch.randn(16, 32, 7, 7), channels_last(torch.randn(16, 32, 7, 7))):
                for other in (x.double(), x.bfloat16()):
                    with self.assertRaises(RuntimeError):
                        layer(other)

    def test_equivariance_in_the_fourier_basis(self):
        for in_fields, out_fields in itertools.product(SOME_FIELDS, repeat=2):
            layer = randomized(MobiusConv(in_fields, out_fields, 3, dtype=DOUBLE))
            with everywhere_spectral():
                assert_equivariant(
                    lambda x: layer(channels_last(x)), in_fields, out_fields, EXACT, size=(5, 4))
        naive, fields = MobiusConvNaive(2, 2, 3, dtype=DOUBLE), (2, 0, 0)
        x = features(fields, 5, 4)
        with everywhere_spectral():
            y = naive(channels_last(isometry_action(x, 1, fields)))
            self.assertNotClose(y, isometry_action(naive(channels_last(x)), 1, fields))


class TestLayersAndModels(FastCase):
    def test_a_layer_twice(self):
        """With one parameter on two levels; also where the gradient is to be differentiated."""
        fields = (1, 2, 1)
        layers = [
            EquivNonlin(fields, dtype=DOUBLE),
            MobiusConv(fields, fields, 3, dtype=DOUBLE),
            MobiusConvNaive(5, 5, 3, dtype=DOUBLE),
        ]
        for layer, create_graph in itertools.product(map(randomized, layers), (False, True)):
            x, parameters = channels_last(features(fields, 5, 4)), list(layer.parameters())
            with everywhere_spectral(), counted() as counts:
                y = layer(layer(x)).square().sum()
                actual = torch.autograd.grad(y, parameters, create_graph=create_graph)
            self.assertEqual(max(counts.values()), 2)
            with fast.disabled():
                expected = torch.autograd.grad(layer(layer(x)).square().sum(), parameters)
            self.assertSame(actual, expected, TOLERANCE)

    def test_derivatives_of_every_kind(self):
        """Second order, forward mode, torch.vmap over inputs and over parameters."""
        fields = (1, 1, 1)
        layers = [
            MobiusConv(fields, fields, 3, dtype=DOUBLE), MobiusConvNaive(4, 2, 3, dtype=DOUBLE),
            EquivNonlin(fields, dtype=DOUBLE), MobiusPool(fields), PolyphasePool(fields),
        ]
        for layer in map(randomized, layers):
            x = channels_last(features(fields, 4, 4, n=1)).requires_grad_()
            names = [name for name, _ in layer.named_parameters()]
            values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
            inputs = (x, *values)

            def call(x, *given):
                return torch.func.functional_call(layer, dict(zip(names, given)), (x,))

            with self.subTest(layer), everywhere_spectral():
                torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
                torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
                batch = torch.stack([x.detach(), 2 * x.detach()])
                self.assertClose(torch.vmap(layer)(batch)[1], layer(batch[1]))
                if values:
                    stacked = [torch.stack([v.detach(), 2 * v.detach()]) for v in values]
                    mapped = torch.vmap(partial(call, x.detach()))(*stacked)
                    self.assertClose(mapped[1], call(x.detach(), *[v[1] for v in stacked]))

    def test_compile_and_export(self):
        """Through all twins' layers at once: one graph, and the formula in it."""
        fields = (1, 1, 1)
        model = randomized(nn.Sequential(
            MobiusConv(fields, fields, 3), EquivNonlin(fields), PolyphasePool(fields),
            MobiusPool(fields), MobiusConvNaive(4, 4, 3),
        ))
        x = channels_last(features(fields, 8, 8, dtype=torch.float32)).requires_grad_()
        inputs = [x, *model.parameters()]
        torch.compiler.reset()
        with everywhere_spectral():
            with counted() as counts:
                y = model(x)
            self.assertEqual(set(counts), set(TWINS) - {"pad_columns"})
            with counted() as counts:
                compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
                with torch.no_grad():
                    exported = torch.export.export(model, (x.detach(),)).module()(x)
            self.assertEqual(counts, {})
        grad = torch.randn_like(y)
        self.assertSame([exported, compiled, *torch.autograd.grad(compiled, inputs, grad)],
                        [y, y, *torch.autograd.grad(y, inputs, grad)], 1e-4)

    def test_disabled(self):
        """No twin is called, and whole models give the same numbers and gradients."""
        called = collections.Counter()
        images = torch.zeros(16, 1, 6, 8, dtype=DOUBLE)
        images[:, :, 1:5, 3:7] = torch.rand(16, 1, 4, 4, dtype=DOUBLE).round()
        for name, pooling in zip(MODELS, itertools.cycle(POOLINGS)):
            model = build_model(name, pooling=pooling, dtype=DOUBLE).eval()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "bias" in key:
                        parameter.normal_(std=0.1)
            with self.subTest(name, pooling=pooling):
                results = []
                for disabled in (False, True):
                    formulas = fast.disabled() if disabled else contextlib.nullcontext()
                    with formulas, counted() as counts:
                        logits = model(images)
                        loss = logits.square().sum()
                        gradients = torch.autograd.grad(loss, list(model.parameters()))
                        with torch.no_grad():
                            results.append([logits, *gradients, model(images)])
                    if disabled:
                        self.assertEqual(counts, {})
                    called += counts
                self.assertSame(*results, TOLERANCE)
        self.assertEqual(set(called), set(TWINS))

    def test_single_precision(self):
        """Of whole models in evaluation; rounding decides signs, so only of those without any."""
        images = torch.rand(16, 1, 12, 12)
        for name in itertools.filterfalse(has_sign_flip_fields, MODELS):
            model = build_model(name).eval()
            with torch.no_grad(), counted() as counts:
                logits = model(images)
                self.assertGreater(sum(counts.values()), 4)
                with fast.disabled():
                    self.assertSame([logits], [model(images)], 1e-4)

    def test_models_where_something_looks_inside(self):
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils.flop_counter import FlopCounterMode

        model, images = build_model("mobius_mixed").eval(), torch.rand(16, 1, 12, 12)
        with counted() as counts, torch.no_grad():
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                model(fake.from_tensor(images))
            with FlopCounterMode(display=False) as counter:
                model(images)
            batch = torch.vmap(model)(images[:, None])[:, 0]
            meta = copy.deepcopy(model).to("meta")(images.to("meta"))
        self.assertEqual((counts, meta.is_meta), ({}, True))
        self.assertGreater(counter.get_total_flops(), 16 * 2 * 20e6)
        self.assertClose(batch, model(images), tolerance=1e-4)

    def test_results_do_not_share_memory(self):
        """Neither with each other nor with the input, in inference mode and in other threads."""
        fields = (1, 1, 1)
        layers = [
            MobiusConv(fields, fields, 3, dtype=DOUBLE), MobiusConvNaive(4, 4, 3, dtype=DOUBLE),
            MobiusConv(fields, fields, 1, dtype=DOUBLE), EquivNonlin(fields, dtype=DOUBLE),
            MobiusPool(fields), PolyphasePool(fields), lambda x: transport_pad(x, 0, fields),
        ]
        for layer in layers:
            inputs = [channels_last(features(fields, 6, 4, n=n)) for n in (2, 5, 3, 2)]
            before = copy.deepcopy(inputs)
            with fast.disabled():
                expected = [layer(x) for x in inputs]
            with everywhere_spectral():
                with torch.inference_mode():
                    layer(inputs[1])
                outputs = [layer(x) for x in inputs]
                pointers = {tensor.data_ptr() for tensor in inputs + outputs}
                self.assertEqual(len(pointers), len(inputs + outputs), layer)
                self.assertSame(outputs, expected, TOLERANCE)
                if outputs[0].requires_grad:
                    torch.stack([y.square().sum() for y in outputs]).sum().backward()
                results = {}

                def work(i):
                    with torch.set_grad_enabled(i % 2 == 0):
                        results[i] = [layer(inputs[i]) for _ in range(5)]

                threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                for i in range(4):
                    self.assertSame(results[i], [expected[i]] * 5, TOLERANCE)
            self.assertTrue(all(map(torch.equal, inputs, before)))


class TestKeptKernels(FastCase):
    """Without gradients a kernel is expanded once, and never used for other parameters."""

    FIELDS = (1, 1, 1)

    def setUp(self):
        x = features(self.FIELDS, 5, 6)
        self.inputs = [channels_last(x), x]  # of the twin and of the formula
        spectral = everywhere_spectral()
        spectral.start()
        self.addCleanup(spectral.stop)

    def layer(self):
        return randomized(MobiusConv(self.FIELDS, self.FIELDS, 3, dtype=DOUBLE))

    @contextlib.contextmanager
    def counted(self):
        """Count how often kernels are expanded and spectra computed."""
        expand, spectrum = MobiusConv.expand.__wrapped__, fast.spectral.spectrum
        kernels = mock.Mock(side_effect=expand)
        spectra = mock.Mock(side_effect=spectrum)
        with mock.patch.object(MobiusConv, "expand", fast.kept_without_gradients(kernels)):
            with mock.patch("fast.spectral.spectrum", spectra):
                yield lambda: (kernels.call_count, spectra.call_count)

    def formula(self, layer, x):
        """Without anything kept."""
        with fast.disabled():
            return layer(x)

    def test_once(self):
        for i, x in enumerate(self.inputs):
            layer = self.layer()
            expected = self.formula(layer, x)
            with torch.no_grad(), self.counted() as calls:
                for _ in range(3):
                    self.assertClose(layer(x), expected)
                self.assertEqual(calls(), (1, i == 0))
                kernel, bias = layer.expand()
                self.assertIs(layer.expand()[0], kernel)
                self.assertIs(fast.kept._KEPT[layer][1][0], kernel)
                self.assertEqual(len(kernel.derived), i == 0)
                self.assertFalse(kernel.requires_grad or bias.requires_grad)
            with self.counted() as calls:
                for _ in range(2):
                    self.assertClose(layer(x), expected)
                self.assertEqual(calls(), (2, 2 * (i == 0)))  # with gradients, each has its own
                layer.requires_grad_(False)
                self.assertClose(layer(x), expected)
                self.assertEqual(calls(), (2, 2 * (i == 0)))
                layer.bias_triv.requires_grad_()
                self.assertTrue(layer(x).requires_grad)
                with fast.disabled(), torch.no_grad():
                    layer(x)
                    self.assertEqual(calls()[0], 4)

    def test_a_kept_kernel_that_is_trained(self):
        layer, x = self.layer(), self.inputs[0]
        with torch.no_grad():
            layer(x)
            kernel, bias = layer.expand()
        kernel.requires_grad_()
        for _ in range(2):  # each call with a graph of its own
            y = strip_conv(x, kernel, bias, layer.in_fields, layer.out_fields)
            self.assertGreater(torch.autograd.grad(y.sum(), kernel)[0].abs().max(), 0)

    def test_no_bias(self):
        layer = randomized(MobiusConv((1, 0, 0), (0, 2, 0), 3, dtype=DOUBLE))
        x = channels_last(features((1, 0, 0), 5, 6))
        with torch.no_grad(), self.counted() as calls:
            for _ in range(2):
                self.assertClose(layer(x), self.formula(layer, x))
            self.assertEqual(calls(), (1 + 2, 1))
            self.assertIsNone(layer.expand()[1])

    def test_never_stale(self):
        def load(layer):
            values = layer.state_dict().items()
            layer.load_state_dict({name: torch.randn_like(value) for name, value in values})

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

        def reset(layer):
            layer.reset_parameters()

        changes = (
            load, optimize, edit_in_place, edit_data, edit_bias_data, edit_by_numpy, replace,
            swap_data, reset,
        )
        for x, change in itertools.product(self.inputs, changes):
            layer = self.layer()
            with self.subTest(change.__name__), torch.no_grad():
                before = layer(x)
                change(layer)
                self.assertNotClose(layer(x), before)
                self.assertClose(layer(x), self.formula(layer, x))

    def test_each_parameter(self):
        layer, x = self.layer(), self.inputs[0]
        for name in layer.state_dict():
            with self.subTest(name), torch.no_grad():
                before = layer(x)
                getattr(layer, name).data.add_(1)
                self.assertNotClose(layer(x), before)
                self.assertClose(layer(x), self.formula(layer, x))

    def test_training_steps_between_evaluations(self):
        layer, x = self.layer(), self.inputs[0]
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for _ in range(3):
            with torch.inference_mode():
                before = layer.eval()(x)
                self.assertClose(before, self.formula(layer, x))
            optimizer.zero_grad()
            layer.train()(x).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                self.assertNotClose(layer(x), before.clone())
                self.assertClose(layer(x), self.formula(layer, x))

    def test_to(self):
        for x in self.inputs:
            layer = self.layer()
            with torch.no_grad():
                y = layer(x)
                single = layer.to(torch.float32)(x.float())
                self.assertEqual(single.dtype, torch.float32)
                self.assertClose(single.double(), y, tolerance=1e-4)
                self.assertEqual(layer.to(torch.bfloat16)(x.bfloat16()).dtype, torch.bfloat16)
                self.assertTrue(layer.to("meta")(x.bfloat16().to("meta")).is_meta)

    def test_to_and_back(self):
        """The same values in another dtype are another kernel."""
        layer, x = self.layer(), self.inputs[0]
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter.float())
            y = layer(x)
            layer.float()(x.float())
            self.assertClose(layer.double()(x), y)

    def test_under_autocast_and_without(self):
        layer, x = self.layer().float(), self.inputs[0].float()
        with torch.no_grad():
            for dtype in (torch.float32, torch.bfloat16, torch.float32):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    y = layer(x)
                self.assertEqual(y.dtype, dtype)
                expected = self.formula(layer, x)
                self.assertSame([y.float()], [expected], 1e-4 if dtype == torch.float32 else 0.05)

    def test_inference_mode(self):
        """What is computed in inference mode takes part in autograd later."""
        for x, frozen in itertools.product(self.inputs, (True, False)):
            layer = self.layer().requires_grad_(not frozen)
            with torch.inference_mode():
                for _ in range(2):
                    y = layer(x)
            x = x.clone(memory_format=torch.preserve_format).requires_grad_()
            with self.counted() as calls:
                z = layer(x)
                self.assertEqual(calls()[0], not frozen)
            self.assertClose(z, y.clone())
            for create_graph in (True, False):
                (grad,) = torch.autograd.grad(z.square().sum(), x, create_graph=create_graph)
                expected = torch.autograd.grad(self.formula(layer, x).square().sum(), x)
                self.assertSame([grad], expected, TOLERANCE)

    def test_what_is_no_parameter(self):
        """Parametrizations, pruning, and functional_call: other tensors in a parameter's place."""
        x = self.inputs[0]
        with torch.no_grad():
            layer = self.layer()
            layer(x)
            torch.nn.utils.parametrizations.weight_norm(layer, "weights_reg2sign")
            layer(x)
            before = layer(x)
            layer.parametrizations.weights_reg2sign.original0.mul_(2)
            self.assertNotClose(layer(x), before)
            self.assertClose(layer(x), self.formula(layer, x))
            layer = self.layer()
            before = layer(x)
            for _ in range(2):
                torch.nn.utils.prune.random_unstructured(layer, "weights_reg2reg", 0.5)
                self.assertNotClose(layer(x), before)
                self.assertClose(layer(x), self.formula(layer, x))
            layer = self.layer()
            before = layer(x)
            other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
            twin = copy.deepcopy(layer)
            twin.load_state_dict(other)
            called = torch.func.functional_call(layer, other, (x,))
            self.assertClose(called, self.formula(twin, x))
            self.assertClose(layer(x), before)

    def test_vmap_over_parameters(self):
        layer, x = self.layer(), self.inputs[0]
        names, values = zip(*((name, p.detach()) for name, p in layer.named_parameters()))

        def call(*values):
            return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

        with torch.no_grad():
            before = layer(x)
            stacked = [torch.stack([value, 2 * value]) for value in values]
            self.assertClose(torch.vmap(call)(*stacked), torch.stack([before, 2 * before]))
            self.assertClose(layer(x), before)

    def test_other_widths(self):
        layer = randomized(MobiusConv((0, 0, 1), (0, 0, 1), 3, dtype=DOUBLE))
        seen = set()
        with torch.no_grad():
            for width in (*range(1, 9), 3, 1):
                x = channels_last(features((0, 0, 1), width, 4))
                with self.counted() as calls:
                    y = layer(x)
                self.assertEqual(calls(), (not seen, width not in seen))
                self.assertClose(y, self.formula(layer, x))
                seen.add(width)

    def test_copies_and_files(self):
        for x in self.inputs:
            layer, fresh, used = self.layer(), io.BytesIO(), io.BytesIO()
            torch.save(layer, fresh)
            with torch.no_grad():
                before = layer(x)
                torch.save(layer, used)
                self.assertEqual(used.getbuffer().nbytes, fresh.getbuffer().nbytes)
                used.seek(0)
                loaded = torch.load(used, weights_only=False)
                twins = [copy.deepcopy(layer), copy.copy(layer), loaded]
                for twin in twins:
                    self.assertNotIn(twin, fast.kept._KEPT)
                    with self.counted() as calls:
                        self.assertClose(twin(x), before)
                        self.assertEqual(calls()[0], 1)
                del twins[1]  # it has the same parameters
                randomized(layer)
                self.assertNotClose(layer(x), before)
                for twin in twins:
                    self.assertClose(twin(x), before)
                    randomized(twin)
                    self.assertClose(twin(x), self.formula(twin, x))
                self.assertClose(layer(x), self.formula(layer, x))

    def test_forgotten_with_its_layer(self):
        gc.collect()
        before = len(fast.kept._KEPT)
        layer = self.layer()
        with torch.no_grad():
            layer(self.inputs[0])
        self.assertEqual(len(fast.kept._KEPT), before + 1)
        del layer
        gc.collect()
        self.assertEqual(len(fast.kept._KEPT), before)
