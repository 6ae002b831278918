"""Each figure of study/figures.py."""

import collections
from functools import partial
from unittest import mock

import matplotlib.colors
import numpy as np
import torch
import torch.nn.functional as F

import convert_mnist
import reproduce
from fields import Fields, isometry_action
from models import MODELS, MODES, POOLINGS, MobiusGaugeCNN, build_model, count_parameters
from nn_layers import MobiusConv
from study import figures
from study.features import features_and_shift
from tests.reference import DOUBLE, act, channels, features, randomized, reference_cover
from tests.support import ROWS, Case


class TestPictures(Case):
    """What is drawn is what the rest of the code computes."""

    def setUp(self):
        torch.manual_seed(0)

    @staticmethod
    def images(figure) -> list[torch.Tensor]:
        """Shown in a figure, in the order in which it was given them."""
        return [
            torch.from_numpy(np.asarray(image.get_array()))
            for axes in figure.axes
            for image in axes.images
        ]

    def assertShows(self, figure, expected):
        shown = self.images(figure)
        self.assertEqual(len(shown), len(expected))
        for image, there in zip(shown, expected):
            self.assertClose(image, there.float(), tolerance=1e-6)

    def test_strip_in_space(self):
        """Its ends meet with a twist, its pixels have their size, it shows the moved digit."""
        across, along = np.arange(7) - 3, np.arange(41)
        points = torch.from_numpy(figures._in_space(across[:, None], along, 40))
        self.assertClose(points[:, -1], points[:, 0].flip(0))
        self.assertClose((points[1:] - points[:-1]).norm(dim=2), torch.ones(6, 41, dtype=DOUBLE))
        self.assertClose((points[3, 1:] - points[3, :-1]).norm(dim=1),
                         torch.ones(40, dtype=DOUBLE), tolerance=0.01)
        digit, shifts = torch.rand(1, 1, 6, 6), (0, 3, 12, 17)
        with mock.patch.object(figures, "_quads", wraps=figures._quads) as quads:
            figure = figures.strips_in_space(digit, shifts, length=12)
        long = torch.cat([digit, torch.zeros(1, 1, 6, 6)], dim=3)
        for axes, call, shift in zip(figure.axes, quads.mock_calls, shifts, strict=True):
            (image,) = call.args
            self.assertTrue(torch.equal(image, isometry_action(long, shift, (1, 0, 0))[0, 0]))
            corners, colours = figures._quads(image)
            self.assertClose(torch.from_numpy(corners[1:-1, 2:-2, 0]),
                             torch.from_numpy(figures._in_space(across[:6, None], np.arange(1, 11),
                                                                12)))
            for there, ink in ((colours[1:-1, 1:-1], figures.INK(image.numpy())),
                               (colours[0, 1:-1], matplotlib.colors.to_rgba_array(figures.EDGE)),
                               (colours[1:-1, -1], matplotlib.colors.to_rgba_array(figures.CUT))):
                shade = there[..., :1] / ink[..., :1]
                # Light changes all three colours alike.
                self.assertLess(np.abs(there[..., :3] - shade * ink[..., :3]).max(), 1e-6)
                self.assertTrue((0.5 < shade).all() and (shade <= 1.001).all())
            # What is drawn last is what is nearest to the viewer.
            (drawn,) = axes.collections
            nearest = (corners @ figures.VIEW)[..., 2].mean(2).argmax()
            self.assertEqual(drawn.get_facecolor()[-1].tolist(),
                             colours.reshape(-1, 4)[nearest].tolist())
            self.assertEqual(len(drawn.get_paths()), 8 * 14)
        self.assertEqual([text.get_text() for text in figure.texts],
                         ["t = 0", "t = 3", "t = 12", "t = 17"])

    def test_digits(self):
        centered = torch.rand(3, 1, 4, 6)
        shifts = torch.tensor([1, 6, 11])
        figure = figures.centered_and_shifted(centered,
                                              isometry_action(centered, shifts, (1, 0, 0)), shifts,
                                              torch.tensor([7, 0, 9]))
        self.assertShows(figure, [
            *centered[:, 0],
            *(isometry_action(x, t, (1, 0, 0))[0, 0] for x, t in zip(centered.split(1), (1, 6, 11)))
        ])
        self.assertEqual([axes.get_title() for axes in figure.axes],
                         ["7", "0", "9", "t = 1", "t = 6", "t = 11"])
        for n in (0, 1, 5):  # no empty frames are left
            some = figures.digits(torch.zeros(n, 1, 4, 6), ["x"] * n, columns=4,
                                  title="some are wrong")
            self.assertEqual((len(self.images(some)), some.get_suptitle()), (n, "some are wrong"))
            self.assertEqual([len(axes.images) for axes in some.axes if axes.axison], [1] * n)

    def test_fields(self):
        for fields in ((1, 1, 1), (0, 1, 2)):
            x = features(fields, 6, 8, n=1)
            c = channels(fields)
            self.assertShows(figures.gauge_transformation(x, fields), [*x[0], *act(fields, x)[0]])
            figure = figures.transport_padding(x, fields, pad=2)
            padded = F.pad(reference_cover(x, fields, -2, 10), (0, 0, 2, 2))[0]
            shown = torch.stack(self.images(figure))
            self.assertTrue(shown[:, :, (2, 11)].isnan().all())  # the gaps
            strip = [i for i in range(14) if i not in (2, 11)]
            self.assertTrue(torch.equal(shown[:, :, strip], padded.to(shown.dtype)))
            types = ["triv"] * fields[0] + ["sign"] * fields[1] + ["reg"] * 2 * fields[2]
            for axes, name in zip(figure.axes, types, strict=True):
                frames = [patch for patch in axes.patches if not patch.get_fill()]
                places = [(frame.get_x() + 0.5, frame.get_y() + 0.5, frame.get_width(),
                           frame.get_height()) for frame in frames]
                # What was padded on the left, the columns of the strip from which the other one
                # came, those from which this one came, and what was padded on the right.
                self.assertEqual(places, [(0, 2, 2, 6), (3, 2, 2, 6), (9, 2, 2, 6), (12, 2, 2, 6)])
                self.assertEqual([text.get_text() for text in axes.texts], ["A", "B", "A", "B"])
                self.assertEqual(
                    {matplotlib.colors.to_hex(frame.get_edgecolor()).upper()
                     for frame in frames}, {figures.TYPE_COLOURS[name]})
                low, high = axes.images[0].get_clim()
                self.assertEqual(low, -high)
            self.assertEqual(len(figure.axes), c)
        x = features((1, 1, 1), 6, 8, n=1)
        self.assertEqual([
            axes.get_xlabel()
            for axes in figures.gauge_transformation(x, (1, 1, 1)).axes
            if axes.get_xlabel()
        ], ["as it was", "negated", "was the 2nd", "was the 1st"])
        self.assertEqual(
            [axes.get_xlabel() for axes in figures.transport_padding(x, (1, 1, 1), 2).axes],
            [f"padding: {text}" for text in ("flipped", "flipped and negated",
                                                  "flipped 2nd channel", "flipped 1st channel")])

    def test_kernels(self):
        """Each block of the table has the symmetry that stands above its kernels."""
        conv = randomized(MobiusConv((1, 1, 1), (1, 1, 1), 5))
        figure = figures.steerable_kernels(conv)
        shown = [row for row in torch.stack(self.images(figure)).view(4, 4, 5, 5)]  # from, to
        (tt, ts, tr1, tr2), (st, ss, sr1, sr2), (rt1, rs1, k11, k21), (rt2, rs2, k12, k22) = shown

        def flip(kernel):
            return kernel.flip(0)

        for kernel in (tt, ss):
            self.assertTrue(torch.equal(flip(kernel), kernel))
        for kernel in (ts, st):
            self.assertTrue(torch.equal(flip(kernel), -kernel))
        for second, expected in ((tr2, flip(tr1)), (sr2, -flip(sr1)), (rt2, flip(rt1)),
                                 (rs2, -flip(rs1)), (k22, flip(k11)), (k21, flip(k12))):
            self.assertTrue(torch.equal(second, expected))
        self.assertGreater(min(kernel.abs().max().item() for row in shown for kernel in row), 0.1)
        self.assertEqual([axes.get_title() for axes in figure.axes], [
            "symmetric", "antisymmetric", "K", "flip K",
            "antisymmetric", "symmetric", "K", "−flip K",
            "K", "K", "K", "flip M",
            "flip K", "−flip K", "M", "flip K",
        ])
        names = ["scalar", "sign-flip", "regular, 1st", "regular, 2nd"]
        self.assertEqual([axes.get_title("left").strip() for axes in figure.axes[:4]],
                         [f"to {name}" for name in names])
        self.assertEqual([axes.get_ylabel() for axes in figure.axes[::4]],
                         [f"from {name}" for name in names])
        # From one type to one, all fields of it.
        conv = MobiusConv((0, 0, 2), (2, 0, 0), 3)
        self.assertShows(figures.steerable_kernels(conv),
                         conv.expand()[0].transpose(0, 1).flatten(0, 1))

    def test_first_kernels(self):
        model = build_model("mobius_mixed")
        figure = figures.first_kernels(model)
        kernels = torch.stack(self.images(figure))
        first = torch.arange(8, 16, 2)  # regular fields: their two channels side by side
        self.assertClose(kernels[first + 1], kernels[first].flip(1))
        self.assertClose(kernels[:4], kernels[:4].flip(1))
        self.assertEqual(sorted(kernels.flatten().tolist()),
                         sorted(model.mobius_cnn[0].expand()[0].flatten().tolist()))
        cnn = build_model("cnn_same_params")
        self.assertShows(figures.first_kernels(cnn, columns=4), cnn.cnn[1].weight.detach()[:, 0])

    def test_models(self):
        figure = figures.model_table({name: build_model(name) for name in MODELS})
        (axes,) = figure.axes
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()],
                         list(figures.LABELS.values()))
        self.assertEqual([label.get_text() for label in axes.get_xticklabels()][4:6],
                         ["conv 5\n256 channels", "conv 6\n64 channels"])
        numbers = [text.get_text() for text in axes.texts]
        for name in MODELS:
            self.assertIn(f"{count_parameters(build_model(name)):,}", numbers)
        of_mixed = [
            text.get_text()
            for text in axes.texts
            if text.get_position()[1] == list(MODELS).index("mobius_mixed")
        ]
        self.assertEqual(of_mixed[:-1],
                         [str(n) for n in (4, 8, 16, 32, 64) for _ in range(3)] + ["64"])
        bars = collections.defaultdict(list)  # of each row
        for bar in axes.patches:
            bars[round(bar.get_y() + bar.get_height() / 2)].append(bar)
        channels_of = [16, 32, 64, 128, 256, 64]
        mixed = [bar.get_width() for bar in bars[list(MODELS).index("mobius_mixed")]]
        self.assertClose(torch.tensor(mixed[:3]), torch.tensor([0.23, 0.23, 0.46], dtype=DOUBLE),
                         tolerance=1e-6)
        few = [bar.get_width() / 0.92 * n for bar, n in zip(bars[1], channels_of, strict=True)]
        self.assertClose(torch.tensor(few), torch.tensor([11.0, 22, 45, 90, 181, 64], dtype=DOUBLE),
                         tolerance=1e-4)

    def test_equivariance(self):
        """No layer of a gauge CNN has a difference, with either pooling; each of the CNN has."""
        image = convert_mnist.load_digits()[0].images[:1].double()
        for name in MODELS:
            for pooling in POOLINGS:
                model = build_model(name, pooling=pooling, kernel_size=3).double().eval()
                layers, _ = features_and_shift(model, image, 16)
                self.assertEqual([tuple(layer.of_digit.shape[2:]) for layer in layers],
                                 [(28, 28)] * 2 + [(14, 14)] * 2 + [(7, 7)] * 3)
                differences = [
                    layer.difference.abs().max().item() / layer.of_digit.abs().max().item()
                    for layer in layers
                ]
                self.assertTrue(
                    torch.equal(layers[0].of_shifted_digit, isometry_action(image, 16, (1, 0, 0))))
                if name.startswith("mobius"):
                    self.assertLess(max(differences), 1e-12, f"{name}, {pooling}")
                else:
                    self.assertGreater(min(differences[1:]), 0.1, f"{name}, {pooling}")
        with self.assertRaisesRegex(ValueError, "multiple of 4"):
            features_and_shift(model, image, 6)
        with mock.patch.object(model, "forward", lambda x: torch.eye(10)[[int(x.equal(image))]]):
            self.assertEqual(features_and_shift(model, image, 16).classes, (1, 0))
        models = {
            name: build_model(name).double()
            for name in ("mobius_regular", "cnn_same_channels")
        }
        networks = {name: features_and_shift(model, image, 16) for name, model in models.items()}
        figure = figures.equivariance(networks, shown=(0, 1, 6))
        for part, (name, (layers, classes)) in zip(figure.subfigs, networks.items(), strict=True):
            shown = self.images(part)  # row by row
            for column, i in enumerate((0, 1, 6)):
                of_digit, difference = layers[i].of_digit, layers[i].difference
                spread = of_digit[0].flatten(1).std(1).tolist()
                pair = sorted(range(len(spread)), key=spread.__getitem__, reverse=True)[:2]
                if (name, i) == ("mobius_regular", 1):
                    pair = [pair[0] // 2 * 2, pair[0] // 2 * 2 + 1]
                for row, there in enumerate((*layers[i][:3], difference)):
                    expected = torch.cat([there[0, channel] for channel in pair], dim=1)
                    self.assertClose(shown[3 * row + column], expected.float(), tolerance=1e-6)
                self.assertEqual(part.axes[9 + column].get_xlabel(),
                                 f"{difference.abs().max() / of_digit.abs().max():.2g}")
            self.assertEqual(
                part.get_suptitle(),
                f"{figures.LABELS[name]}: the digit is classified as {classes[0]}, "
                f"shifted as {classes[1]}"
            )
            self.assertEqual("both channels of a field" in part.axes[1].get_title(),
                             name == "mobius_regular")

    def test_shown_channels(self):
        """Of scalars the two that vary most, of regular fields both channels of one."""
        x = torch.zeros(1, 8, 2, 2)  # (1, 1, 3)
        x[0, :, 0, 0] = torch.tensor([3.0, 4, 0, 0, 1, 5, 0, 2])
        self.assertEqual(figures._shown_channels(x, Fields(1, 1, 3)), [4, 5])
        self.assertEqual(figures._shown_channels(x, Fields(8, 0, 0)), [5, 1])
        self.assertEqual(figures._shown_channels(x[:, :2], Fields(1, 1, 0)), [1])

    def test_other_models(self):
        """A model with other fields has its name, a place and a colour of its own everywhere."""
        other = partial(MobiusGaugeCNN, mode="other")
        with mock.patch.dict(MODES, other=(2, 0, 1)), mock.patch.dict(MODELS, other=other):
            figure = figures.model_table({name: build_model(name) for name in MODELS})
            self.assertEqual(figure.axes[0].get_yticklabels()[7].get_text(), "other")
            numbers = [text.get_text() for text in figure.axes[0].texts
                       if text.get_position()[1] == 7]
            self.assertEqual(numbers[:4], ["8", "4", "16", "8"])
            colours = {figures.model_colour(name) for name in (*MODELS, "of a later version")}
            self.assertEqual(len(colours), len(MODELS) + 1)
            image = convert_mnist.load_digits()[0].images[:1]
            networks = {"other": features_and_shift(build_model("other"), image, 16)}
            (part,) = figures.equivariance(networks).subfigs
            self.assertTrue(part.get_suptitle().startswith("other: "))
            for name in ("other", "of a later version"):
                figure = figures.results({(name, "centered"): [1.5],
                                          ("cnn_same_params", "shifted"): [2.0]}, reproduce.PAPER)
                self.assertEqual([label.get_text() for label in figure.axes[0].get_yticklabels()],
                                 [name, "CNN (params)"])
                axes, _ = figures.error_against_shift([*ROWS, ROWS[2] | {"model": name}]).axes
                labels = [line.get_label() for line in axes.lines]
                self.assertIn(name, labels)
                figures.error_against_shift([ROWS[2] | {"model": name}])
                (axes,) = figures.training_curves(
                    [{"config": {"model": name}, "epochs": [{"epoch": 1, "train_error": 1.0}]}]
                ).axes
                self.assertEqual(axes.lines[2].get_color(), figures.model_colour(name))

    def test_results(self):
        errors = {("cnn_same_channels", "centered"): [43.0],
                  ("mobius_regular", "centered"): [1.3, 1.4], ("mobius_regular", "shifted"): [1.2]}
        figure = figures.results(errors, reproduce.PAPER)
        self.assertEqual([label.get_text() for label in figure.axes[0].get_yticklabels()],
                         ["CNN (channels)", "gauge CNN (regular)"])
        for axes, mode in zip(figure.axes, ("centered", "shifted"), strict=True):
            dots = [
                list(line.get_xdata())
                for line in axes.lines
                if line.get_marker() == "o" and len(line.get_xdata())
            ]
            self.assertEqual(dots, [
                errors[key] for key in (("cnn_same_channels", mode),
                                        ("mobius_regular", mode)) if key in errors
            ])
            mean, std, _ = reproduce.PAPER["mobius_regular"][mode]
            bar = axes.patches[1]
            self.assertAlmostEqual(bar.get_x(), mean - std)
            self.assertAlmostEqual(bar.get_width(), 2 * std)
        dots = figure.legends[0].findobj(matplotlib.lines.Line2D)
        colours = {dot.get_markerfacecolor() for dot in dots if dot.get_marker() == "o"}
        self.assertEqual(colours, {figures.model_colour(name)
                                   for name in ("cnn_same_channels", "mobius_regular")})

    def test_error_against_shift(self):
        """The curves are the means over the seeds."""
        figure = figures.error_against_shift(ROWS)
        axes, magnified = figure.axes
        curves = {
            line.get_label(): list(line.get_ydata())
            for line in axes.lines
            if len(line.get_ydata()) == 56
        }
        self.assertEqual(curves, {
            "CNN (channels)": [float(2 + shift) for shift in range(56)],
            "gauge CNN (regular)": [1.25] * 56,
            "gauge CNN (regular), pooling polyphase": [1.5] * 56,
        })
        (legend,) = figure.legends
        self.assertEqual([text.get_text() for text in legend.get_texts()], list(curves))
        self.assertEqual(legend.get_title().get_text(), "trained on centered digits")
        self.assertEqual(axes.get_ylim()[0], 0)
        # Flat curves are magnified.
        self.assertEqual([list(line.get_ydata()) for line in magnified.lines[:2]],
                         [[1.25] * 56, [1.5] * 56])
        self.assertEqual(len(magnified.lines), 3)  # with the one at which the digit is reflected
        bottom, top = magnified.get_ylim()
        self.assertTrue(1 < bottom < 1.25 and 1.5 < top < 2)
        self.assertEqual(len(figures.error_against_shift(ROWS[2:]).axes), 1)
        # The same settings have the same kind of line in all models, in any order of the rows.
        other = ROWS[3] | {"model": "mobius_irrep"}
        axes, _ = figures.error_against_shift([other, *ROWS]).axes
        polyphase = [line for line in axes.lines if "polyphase" in line.get_label()]
        self.assertEqual([line.get_linestyle() for line in polyphase], ["--", "--"])
        # Labels name the training digits where they differ.
        rows = [ROWS[3], ROWS[2], ROWS[0], ROWS[0] | {"train_mode": "shifted"}]
        axes, _ = figures.error_against_shift(rows).axes
        self.assertEqual(
            {
                line.get_label(): line.get_linestyle()
                for line in axes.lines
                if len(line.get_ydata()) == 56
            }, {
                "CNN (channels), trained on centered digits": "-",
                "CNN (channels), trained on shifted digits": "--",
                "gauge CNN (regular), trained on centered digits": "-",
                "gauge CNN (regular), pooling polyphase, trained on centered digits": ":",
            })
        # A network without errors can be drawn too.
        for errors in ([0.0] * 56, [0.0, 2.0] * 28):
            (axes,) = figures.error_against_shift([ROWS[2] | {"errors": errors}]).axes
            self.assertEqual((axes.get_yscale(), axes.get_ylim()[0]), ("linear", 0))

    def test_gradient_norm(self):
        curves = [{"config": {"sign_eps": sign_eps, "num_epochs": 2}, "norms": norms}
                  for sign_eps, norms in ((0.0, [3.0, 2.0, 1.0, 0.5]),
                                          (1e-8, [3.0, 2000.0, 10.0, 300.0]))]
        (axes,) = figures.gradient_norm(curves).axes
        drawn = {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines[:2]
        }
        steps = [1, 2, 3, 4]
        self.assertEqual(drawn, {"sign(x)": (steps, curves[0]["norms"]),
                                 "x / (|x| + 1e-08)": (steps, curves[1]["norms"])})
        self.assertEqual(axes.get_yscale(), "log")
        self.assertEqual((axes.texts[0].get_text(), axes.texts[0].xy[0]), ("epoch 2", 2.5))

    def test_training_curves(self):
        records = [{"epoch": epoch, "train_error": 100.0 / epoch} |
                   ({"test_error_shifted": 50.0 / epoch} if epoch % 2 == 0 else {})
                   for epoch in (1, 2, 3, 4)]
        (axes,) = figures.training_curves(
            [{"config": {"model": "mobius_regular"}, "epochs": records}]).axes
        curves = {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines
        }
        self.assertEqual(curves["gauge CNN (regular): training digits, with dropout"],
                         ([1, 2, 3, 4], [100.0, 50.0, 100 / 3, 25.0]))
        self.assertEqual(curves["gauge CNN (regular): shifted test digits"], ([2, 4], [25.0, 12.5]))
        self.assertEqual(len(curves), 3)
