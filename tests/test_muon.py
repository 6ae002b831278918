"""The optimizer of training/muon.py."""

import copy
import itertools
import math
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

from fields import as_fields, cross_cut, gauge_transform
from models import build_model
from nn_layers import MobiusConv
from tests.reference import DOUBLE, TYPES
from tests.support import Case
from training import muon


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
        """Also for small numbers and low rank, where eigenvalues of the Gram matrix are noise."""
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
        self.assertLess(
            muon.orthogonalize(torch.stack([matrix, 1e-6 * matrix]))[1].abs().max(), 1e-2
        )

    def test_first_step(self):
        """Kernels: as long as Adam's step, in a conventional layer along the orthogonalized
        gradient. Other parameters: Adam's own.
        """
        for name in ("mobius_irrep", "mobius_mixed", "cnn_same_params"):
            model = build_model(name, dtype=DOUBLE)
            before, other = copy.deepcopy(model), copy.deepcopy(model)
            optimizers = muon.Muon(model, lr=0.01, weight_decay=0.1), torch.optim.Adam(
                other.parameters(), lr=0.01
            )
            for network, optimizer in zip((model, other), optimizers):
                self.backward(network)
                gradients = [parameter.grad.clone() for parameter in network.parameters()]
                optimizer.step()
                self.assertTrue(
                    all(
                        torch.equal(parameter.grad, grad)
                        for parameter, grad in zip(network.parameters(), gradients)
                    )
                )
            kernels = 0
            for (path, new), old, of_adam, gradient in zip(
                model.named_parameters(), before.parameters(), other.parameters(), gradients
            ):
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
        self.assertAlmostEqual(
            (layer.weight - old).square().mean().sqrt().item(), 0.01 * 0.2, delta=0.001
        )

    def test_a_step_is_of_the_steerable_kernel(self):
        """Between all field types, along the steerable kernel's orthogonalized gradient."""
        def orthogonalize(matrix):
            u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
            return u @ vh

        for in_fields, out_fields in itertools.product(TYPES.values(), repeat=2):
            in_fields, out_fields = as_fields([3 * n for n in in_fields]), as_fields(
                [2 * n for n in out_fields]
            )
            layer = MobiusConv(in_fields, out_fields, 5, dtype=DOUBLE)
            before = layer.expand()[0].detach()
            gradient = torch.randn_like(before)
            (layer.expand()[0] * gradient).sum().backward()
            reflected = cross_cut(gradient, in_fields)
            steerable = (
                gradient + gauge_transform(reflected.transpose(0, 1), out_fields).transpose(0, 1)
            ) / 2
            with mock.patch("training.muon.orthogonalize", orthogonalize):
                muon.Muon(layer).step()
            step, expected = (before - layer.expand()[0]).flatten(1), orthogonalize(
                steerable.flatten(1)
            )
            with self.subTest(in_fields=in_fields, out_fields=out_fields):
                self.assertClose(step / step.norm(), expected / expected.norm())

    def test_frames_make_no_difference(self):
        """Training does not depend on which channel of a regular field is the first."""
        scalars, fields = (1, 0, 0), (0, 0, 3)
        model = nn.Sequential(
            MobiusConv(scalars, fields, 3), nn.ELU(), MobiusConv(fields, fields, 3), nn.ELU(),
            MobiusConv(fields, scalars, 3),
        ).double()

        def in_other_frames(model):
            """Fields 0 and 2 of both hidden layers are in the other frame."""
            model = copy.deepcopy(model)
            with torch.no_grad():
                for layer, in_fields in ((model[0], scalars), (model[2], fields)):
                    weights = layer.get_parameter(
                        "weights_triv2reg" if layer is model[0] else "weights_reg2reg"
                    )
                    weights[::2] = cross_cut(weights, as_fields(in_fields))[::2]
                model[2].weights_reg2reg.copy_(model[2].weights_reg2reg[:, [1, 0, 2, 3, 5, 4]])
                model[4].weights_reg2triv[:, ::2] = model[4].weights_reg2triv[:, ::2].flip(2)
            return model

        def trained(model, optimizer):
            x, y = torch.randn(
                8, 1, 6, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE
            ), torch.arange(8, dtype=DOUBLE)
            for _ in range(3):
                optimizer.zero_grad()
                (model(x).mean((1, 2, 3)) - y).square().sum().backward()
                optimizer.step()
            return nn.utils.parameters_to_vector(
                in_other_frames(model).parameters() if model is first else model.parameters()
            )

        x = torch.randn(2, 1, 6, 8, dtype=DOUBLE)
        self.assertClose(in_other_frames(model)(x), model(x))
        for as_arrays in (False, True):
            first, second = copy.deepcopy(model), in_other_frames(model)
            optimizers = [muon.Muon(network, lr=0.01) for network in (first, second)]
            if as_arrays:  # of free values: other ones, another step
                for optimizer in optimizers:
                    optimizer.kernels = dict.fromkeys(optimizer.kernels)
            results = [
                trained(network, optimizer)
                for network, optimizer in zip((first, second), optimizers)
            ]
            (self.assertNotClose if as_arrays else self.assertClose)(*results)

    def test_momentum(self):
        """Written out for one kernel: a running mean of gradients; the newest counts once more."""
        layer, gradients = nn.Conv2d(3, 2, 1, bias=False, dtype=DOUBLE), torch.randn(
            4, 2, 3, 1, 1, dtype=DOUBLE
        )
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

    def test_is_an_optimizer(self):
        """Closures, copies, states, groups; parameters without a gradient stay."""
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
        self.assertClose(
            optimizer.step(closure), sum(parameter.square().sum() for parameter in before), 1e-5
        )
        self.assertNotClose(parameters[0], before[0])
        self.assertTrue(torch.equal(more, before[-1]))
        copied, of_copy = copy.deepcopy((optimizer, parameters))
        of_loaded = copy.deepcopy(layer)
        # The loaded state replaces these settings.
        loaded = muon.Muon(of_loaded, momentum=0.5, weight_decay=0.1)
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
        with mock.patch.object(
            muon.Muon, "_step_of_kernel", side_effect=KeyboardInterrupt
        ), self.assertRaises(KeyboardInterrupt):
            optimizer.step()
        self.assertIs(parameters[0].grad, gradient)
        for bad in (
            {"momentum": 1.0}, {"momentum": -0.1}, {"momentum": math.nan}, {"lr": -1.0},
            {"weight_decay": -1.0}, {"weight_decay": math.nan}, {"weight_decay": math.inf},
        ):
            with self.assertRaises(ValueError):
                muon.Muon(layer, **bad)
        with self.assertRaisesRegex(TypeError, "model must be a module"):
            muon.Muon(layer.parameters())
        with self.assertRaisesRegex(ValueError, "not the state of a Muon"):
            muon.Muon(layer).load_state_dict(torch.optim.Adam(layer.parameters()).state_dict())
