"""The ways to compute: each equals the plain formula."""

import contextlib
import copy
import io
import itertools
import threading
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.nn.utils.prune

import spectral
from fast_path import is_plain
from fields import (
    Fields, PlanarFields, adjacent_channels, arrange_channels, gauge_transform, isometry_action,
)
from models import build_model
from nn_layers import EquivNonlin, MobiusConv, MobiusConvNaive, MobiusPadNaive, MobiusPool
from tests.reference import (
    DOUBLE, FIELDS, KERNEL_SIZES, SIZES, TOLERANCE, channels, features, randomized, reference_cover,
)
from tests.support import Case


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
