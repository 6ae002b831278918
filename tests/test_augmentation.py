"""Random deformations of training digits, by augmentation.py."""

import itertools
import math

import torch

import convert_mnist
from fields import isometry_action
from tests.reference import DOUBLE, all_shifts
from tests.support import Case
from training import augmentation


class TestDeformation(Case):
    def test_displace(self):
        """By whole pixels, each shows its neighbour, across the cut the reflected one and beyond
        the edges nothing; by half a pixel, a mean.
        """
        x = torch.rand(2, 1, 4, 6, dtype=DOUBLE)

        def at(along, across, x=x):
            return augmentation.displace(
                x, *(torch.full((len(x), 4, 6), float(d), dtype=DOUBLE) for d in (along, across))
            )

        for shift in (-40, -6, -2, 0, 1, 5, 13):
            self.assertClose(at(shift, 0), isometry_action(x, -shift, (1, 0, 0)))
        self.assertClose(at(0, 1), torch.cat([x[:, :, 1:], 0 * x[:, :, :1]], dim=2))
        self.assertClose(
            at(0, -3), torch.cat([torch.zeros(2, 1, 3, 6, dtype=DOUBLE), x[:, :, :1]], dim=2)
        )
        same = torch.full((1, 1, 4, 6), 0.7, dtype=DOUBLE)
        self.assertClose(at(0.5, 0, same), same)
        ramp = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=DOUBLE).expand(1, 1, 4, 6)
        self.assertClose(at(0.5, 0, ramp)[..., 1:4], ramp[..., 1:4] + 0.05)
        self.assertEqual(at(1, 1, x[:0]).shape, (0, 1, 4, 6))
        self.assertTrue((at(0.4, 0.3) >= 0).all() and (at(0.4, 0.3) <= 1).all())

    def test_covariance(self):
        """As of white noise on the strip, smoothed by a Gaussian.

        This is the covariance on the plane, summed over the images of a place under reflections at
        the edges and turns of the strip, which change the sign of the component across it. The mean
        along the strip is subtracted.
        """
        width, length, sigma = 6, 8, 1.5
        deform = augmentation.RandomDeformation(1.0, smoothness=sigma, size=(width, length))
        units = torch.eye(deform.draw(1, torch.Generator()).shape[1])
        w, l = torch.meshgrid(
            torch.arange(width, dtype=DOUBLE), torch.arange(length, dtype=DOUBLE), indexing="ij"
        )
        for component, sign in zip(deform.displacements(units), (1, -1)):
            basis = component.double().flatten(1)
            expected = 0
            for turns, fold in itertools.product(range(-6, 7), range(-5, 6)):
                there = w if turns % 2 == 0 else width - 1 - w
                for image in (there + 2 * width * fold, -1 - there + 2 * width * fold):
                    distances = (w.flatten()[:, None] - image.flatten()) ** 2 + (
                        l.flatten()[:, None] - l.flatten() - turns * length
                    ) ** 2
                    expected = expected + sign**turns * torch.exp(-distances / (4 * sigma**2))
            if sign == 1:
                expected = expected - expected.mean()
            self.assertClose(basis.T @ basis, expected / expected.diagonal().mean(), tolerance=1e-3)

    def test_isometries_of_digits_and_deformations(self):
        x = torch.rand(2, 1, 6, 8, dtype=DOUBLE)
        fields = torch.randn(2, 2, 6, 8, dtype=DOUBLE)
        y = augmentation.displace(x, *fields.unbind(1))
        for shift in all_shifts(8):
            moved = isometry_action(fields, shift, (1, 1, 0))
            self.assertClose(
                augmentation.displace(isometry_action(x, shift, (1, 0, 0)), *moved.unbind(1)),
                isometry_action(y, shift, (1, 0, 0)),
            )

    def test_strength(self):
        for strength, smoothness in ((1.0, 5.0), (0.5, 3.0)):
            deform = augmentation.RandomDeformation(strength, smoothness=smoothness)
            fields = torch.stack(
                deform.displacements(deform.draw(4000, torch.Generator().manual_seed(0)))
            )
            for component in fields:
                self.assertAlmostEqual(
                    component.square().mean().sqrt().item(), strength, delta=0.03 * strength
                )
                self.assertAlmostEqual(component.mean().item(), 0, delta=0.05 * strength)
        for bad in ((-1, 5), (math.nan, 5), (1, 0), (1, 200), (1, math.nan)):
            with self.assertRaisesRegex(ValueError, "(strength|smoothness) must be a number"):
                augmentation.RandomDeformation(bad[0], smoothness=bad[1])
        with self.assertRaisesRegex(ValueError, "stroke_width must be"):
            augmentation.RandomDeformation(1, 1.1)
        with self.assertRaisesRegex(ValueError, "scaling must be"):
            augmentation.RandomDeformation(1, scaling=0.4)

    def test_digits_stay_where_they_are(self):
        """Along the strip, wherever they lie on it; without the correction they do not."""
        digits = convert_mnist.load_digits()[0].images[:200]
        shifts = torch.randint(56, (200,), generator=torch.Generator().manual_seed(0))
        deform = augmentation.RandomDeformation(1.0)
        coefficients = deform.draw(200, torch.Generator().manual_seed(1))

        def moved(before, after):
            return (augmentation.centre(after) - augmentation.centre(before) + 14) % 28 - 14

        for images in (digits, isometry_action(digits, shifts, (1, 0, 0))):
            deformed = deform(images, coefficients)
            self.assertEqual(deformed.shape, images.shape)
            self.assertTrue((deformed >= 0).all() and (deformed <= 1 + 1e-6).all())
            self.assertGreater((deformed - images).abs().flatten(1).amax(1).min().item(), 0.2)
            self.assertLess(moved(images, deformed).abs().mean().item(), 0.05)
            plain = augmentation.displace(images, *deform.displacements(coefficients))
            self.assertGreater(moved(images, plain).abs().mean().item(), 0.2)
        blank = deform(torch.zeros(2, 1, 28, 28), coefficients[:2])
        self.assertTrue(torch.equal(blank, torch.zeros(2, 1, 28, 28)))

    def test_scaling(self):
        """A digit becomes longer and narrower, at every place and in both frames."""
        def blob(across, along, middle=0.0):
            w, l = torch.meshgrid(
                torch.arange(14.0) - 6.5 - middle, torch.arange(20.0) - 7.5, indexing="ij"
            )
            return torch.exp(-0.5 * ((w / across) ** 2 + (l / along) ** 2))[None, None]

        deform = augmentation.RandomDeformation(0.0, scaling=0.25, size=(14, 20))
        drawn = torch.zeros_like(deform.draw(1, torch.Generator()))
        drawn[:, -3], drawn[:, -2] = 4 * math.log(1.5), -4 * math.log(1.5)
        # Below the middle of the strip it comes nearer to it.
        self.assertClose(deform(blob(2.1, 1.2, 1.5), drawn), blob(1.4, 1.8, 1.0), tolerance=0.02)
        for shift in all_shifts(20):
            scaled = deform(isometry_action(blob(2.1, 1.2), shift, (1, 0, 0)), drawn)
            self.assertClose(
                isometry_action(scaled, -shift, (1, 0, 0)), blob(1.4, 1.8), tolerance=0.02
            )
        # Beside it, deformations go on, and are scaled too.
        both, alone = (
            augmentation.RandomDeformation(0.7, scaling=scaling, size=(14, 20))
            for scaling in (1e-9, 0.0)
        )
        drawn = both.draw(3, torch.Generator().manual_seed(0))
        self.assertClose(
            both(blob(2.1, 1.2).expand(3, -1, -1, -1), drawn),
            alone(
                blob(2.1, 1.2).expand(3, -1, -1, -1),
                torch.cat([drawn[:, :-3], drawn[:, -1:]], dim=1),
            ),
            tolerance=1e-4,
        )
        # Either factor by itself, its logarithm normal.
        deform = augmentation.RandomDeformation(0.0, scaling=0.2)
        blob = torch.exp(
            -((torch.arange(28.0) - 13.5) ** 2)[:, None] / 18
            - ((torch.arange(28.0) - 13.5) ** 2) / 18
        )[None, None]
        scaled = deform(
            blob.expand(2000, -1, -1, -1), deform.draw(2000, torch.Generator().manual_seed(0))
        )[:, 0]

        def log_size(marginal):
            places = torch.arange(28.0) - 13.5
            return 0.5 * torch.log((marginal * places**2).sum(1) / marginal.sum(1) / 9)

        logs = torch.stack([log_size(scaled.sum(1)), log_size(scaled.sum(2))])
        self.assertClose(torch.cov(logs), 0.04 * torch.eye(2), tolerance=0.006)
        self.assertLess(logs.mean(1).abs().max().item(), 0.03)

    def test_thicken(self):
        x = torch.zeros(1, 1, 5, 6)
        x[0, 0, 1:4, 0] = 1  # a stroke of three pixels, right at the cut
        for amount, width, middle in (
            (1.0, 3 * 5, 1.0), (0.5, 3 + 0.5 * 12, 1.0), (-0.5, 1.5, 0.5), (0.0, 3, 1.0),
        ):
            y = augmentation.thicken(x, torch.tensor([amount]))
            self.assertAlmostEqual(y.sum().item(), width)
            self.assertAlmostEqual(y[0, 0, 2, 0].item(), middle)
            for shift in all_shifts(6):
                moved = augmentation.thicken(
                    isometry_action(x, shift, (1, 0, 0)), torch.tensor([amount])
                )
                self.assertTrue(torch.equal(moved, isometry_action(y, shift, (1, 0, 0))))
        # Drawn on either side alike, and to the whole amount.
        deform = augmentation.RandomDeformation(0.0, 0.4)
        grey = torch.full((2000, 1, 28, 28), 0.5)
        grey[..., 14, 14] = 1
        changed = (
            deform(grey, deform.draw(2000, torch.Generator().manual_seed(0)))[:, 0, 14, 13] - 0.5
        )
        self.assertTrue(
            (changed > -1e-4).all() and (changed < 0.2001).all() and changed.max() > 0.19
        )
        self.assertAlmostEqual((changed < 1e-4).double().mean().item(), 0.5, delta=0.04)

    def test_centre(self):
        x = torch.zeros(1, 1, 4, 10)
        x[..., 3] = 1
        for shift in all_shifts(10):
            self.assertAlmostEqual(
                augmentation.centre(isometry_action(x, shift, (1, 0, 0))).item(),
                (3.5 + shift) % 10,
                places=4,
            )
