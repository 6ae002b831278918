"""The files that visualize.py draws."""

import contextlib
import io
import itertools
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import train
import visualize
from fields import isometry_action
from models import MODELS, build_model
from study import figures, gradients, material
from study.runs import Study
from tests.support import ROWS, SMALL_MODELS, FilesCase, not_installed, write_npz
from training.files import write_json
from training.options import TRAIN_MODES


class TestVisualize(FilesCase):
    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        for small in (mock.patch.dict(MODELS, SMALL_MODELS),
                      mock.patch.multiple(visualize, DOTS=20, STRIP_LENGTH=30)):
            small.start()
            self.addCleanup(small.stop)
        self.data = write_npz(self.folder / "digits.npz")
        for option, model in visualize.NETWORKS.items():
            torch.save(build_model(model).state_dict(), self.folder / f"{option}.pt")
        (self.folder / "results" / "runs").mkdir(parents=True)
        write_json(self.folder / "results" / "error_against_shift.json",
                              {"format": 1, "rows": ROWS})
        curve = {"config": {"sign_eps": 0.0, "num_epochs": 2}, "norms": [1.0, 2.0]}
        write_json(self.folder / "results" / "gradient_norms.json",
                              {"format": 1, "curves": [curve, curve]})
        for model, mode in itertools.product(("mobius_regular", "cnn_same_channels"),
                                             TRAIN_MODES):
            self.take_run(f"mnist-{model}-{mode}-seed0-precision_bf16")
        self.options = [
            "--data", self.data, "--gauge_cnn", self.folder / "gauge_cnn.pt", "--cnn",
            self.folder / "cnn.pt", "--results", self.folder / "results", "--out",
            self.folder / "pictures"
        ]

    def take_run(self, name):
        """Copy a run from the results that come with the code."""
        write_json(self.folder / "results" / "runs" / f"{name}.json", Study([]).read(name))

    def main(self, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            visualize.main([str(argument) for argument in arguments])
        return printed.getvalue().split()

    def test_all(self):
        """Every picture, without a display. The bytes repeat; light and dark text differ."""
        from PIL import Image

        printed = self.main(*self.options)
        names = {path.name for path in map(Path, printed)}
        self.assertEqual(names, {path.name for path in (self.folder / "pictures").iterdir()})
        self.assertEqual({name.split(".")[0].removesuffix("-dark")
                          for name in names}, set(visualize.PICTURES))
        for name, picture in visualize.PICTURES.items():
            kind = "png" if picture.pixels else "svg"
            drawn = {path for path in names if path.split(".")[0].removesuffix("-dark") == name}
            dark = {f"{name}-dark.{kind}"} if picture.text else set()
            self.assertEqual(drawn, {f"{name}.{kind}"} | dark)

        def pictures_now():
            return {name: content for name, content in self.files().items()
                    if name.startswith("pictures")}

        pictures_before = pictures_now()
        self.main("steerable_kernels", "results", *self.options)
        self.assertEqual(pictures_before, pictures_now())
        light, dark = (pictures_before[f"pictures/results{style}.svg"].lower()
                       for style in figures.STYLES)
        self.assertIn(b"#e6edf3", dark)
        self.assertNotIn(b"#e6edf3", light)
        with Image.open(self.folder / "pictures" / "two_turns.png") as turns:
            self.assertEqual(turns.n_frames, 8)
            before = np.asarray(turns.convert("RGBA")).copy()
            turns.seek(4)
            after = np.asarray(turns.convert("RGBA"))
            self.assertFalse(np.array_equal(before, after))  # once around: reflected
        with Image.open(self.folder / "pictures" / "field_types-dark.png") as image:
            self.assertEqual(image.convert("RGBA").getpixel((0, 0))[3], 0)  # transparent

    def test_material(self):
        """The networks that are given, or those that come with the code."""
        def material_of(**options):
            parser = visualize.command_line()
            return material.Material(
                parser.parse_args([f"--{name}={value}" for name, value in options.items()]))

        given = material_of(data=self.data, gauge_cnn=self.folder / "gauge_cnn.pt",
                            cnn=self.folder / "cnn.pt", results=self.folder / "results")
        for option, model in visualize.NETWORKS.items():
            self.assertSameWeights(given.networks[model], self.folder / f"{option}.pt")
        own = self.folder / "mobius_regular.pt"
        shutil.copy(self.folder / "gauge_cnn.pt", own)
        with mock.patch.object(material, "PRETRAINED", self.folder):
            networks = material_of(data=self.data, cnn=self.folder / "cnn.pt").networks
        self.assertSameWeights(networks["mobius_regular"], own)
        name = "mnist-mobius_regular-centered-seed0-precision_bf16.json"
        path = self.folder / "results" / "runs" / name
        result = json.loads(path.read_text())
        self.assertEqual(given.errors["mobius_regular", "centered"],
                         [result["test_error"]["shifted"]])
        self.assertNotEqual(*result["test_error"].values())
        self.assertEqual([curve["config"]["model"] for curve in given.curves],
                         list(visualize.NETWORKS.values()))
        self.assertEqual({curve["config"]["precision"] for curve in given.curves}, {"bf16"})
        for model in visualize.NETWORKS.values():  # tested more often
            self.take_run(f"mnist-{model}-centered-seed0")
        again = material_of(results=self.folder / "results")
        self.assertEqual({curve["config"]["precision"] for curve in again.curves}, {"fp32"})

    def assertSameWeights(self, network, file):
        for name, value in torch.load(file, weights_only=True).items():
            self.assertClose(network.state_dict()[name], value.to(network.state_dict()[name].dtype),
                             message=name)

    def test_shifted_wrongly(self):
        """The first digit that both know and the CNN loses when it is shifted by 16."""
        data = material.Material(visualize.command_line().parse_args([f"--data={self.data}"]))
        images, labels = (part[:200] for part in data.splits["test_centered"])

        def network(*wrong, wrong_when_moved=()):
            def logits(x):
                moved = torch.equal(x, isometry_action(images.double(), 16, (1, 0, 0)))
                self.assertTrue(moved or torch.equal(x, images.double()))
                classes = labels.clone()
                for index in wrong_when_moved if moved else wrong:
                    classes[index] = 9 - classes[index]
                return F.one_hot(classes, 10)

            return logits

        cnn = network(1, wrong_when_moved=(0, 1, 3, 4))
        data.networks = {"mobius_regular": network(0), "cnn_same_channels": cnn}
        self.assertTrue(torch.equal(data.shifted_wrongly, images[3:4].double()))

    def test_strips(self):
        for name, shifts in (("strip", [0, 15, 26, 30]), ("two_turns", list(range(0, 60, 8)))):
            drawn = mock.Mock()
            visualize.PICTURES[name].draw(
                drawn,
                material.Material(visualize.command_line().parse_args([f"--data={self.data}"])))
            self.assertEqual(
                [shift for call in drawn.strips_in_space.mock_calls for shift in call.args[1]],
                shifts)

    def test_gradient_norms(self):
        """Measured if the file is missing: one for each step, the first as computed here."""
        path = self.folder / "results" / "gradient_norms.json"
        path.unlink()
        config = train.Config("mobius_signflip", data=str(write_npz(self.folder / "few.npz", 8, 8)))
        data = train.find_data(config, torch.device("cpu"))
        content = gradients.measure_gradient_norms(data, data=config.data, batch_size=4)
        self.assertEqual([curve["config"]["sign_eps"] for curve in content["curves"]], [0.0, 1e-8])
        for curve in content["curves"]:
            torch.manual_seed(0)
            sign_eps = curve["config"]["sign_eps"]
            model = build_model("mobius_signflip", sign_eps=sign_eps, classes=data.classes)
            images, labels = data.splits["train_centered"]
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:4]
            F.cross_entropy(model(images[order]), labels[order]).backward()
            norm = sum(parameter.grad.double().square().sum()
                       for parameter in model.parameters()).sqrt().item()
            self.assertAlmostEqual(curve["norms"][0] / norm, 1, places=3)
            self.assertEqual(len(curve["norms"]), 4)
        with mock.patch.object(material, "measure_gradient_norms", return_value=content) as measure:
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
            self.assertEqual(material.shift_between(x, isometry_action(x, shift, (1, 0, 0))), shift)
        with self.assertRaisesRegex(ValueError, "no isometry"):
            material.shift_between(x, torch.rand(1, 1, 4, 6))

    def test_bad_input(self):
        before = self.files()

        def fails(*arguments, contains):
            self.assertFails(visualize.main, *arguments, "--out", self.folder / "new",
                             contains=contains)

        fails("moebius", contains=["moebius", "steerable_kernels"])
        fails("results", "--results", self.folder / "no", contains=["no", "python reproduce.py"])
        fails("training_curves", "--results", self.folder / "no",
              contains=["no", "python reproduce.py"])
        fails("error_against_shift", "--results", self.folder / "no",
              contains=["error_against_shift.json", "python reproduce.py"])
        fails("equivariance", "--data", self.data, "--gauge_cnn", self.folder / "no.pt",
              contains="no.pt")
        fails("equivariance", "--data", self.data, "--gauge_cnn", self.folder / "cnn.pt",
              contains=["cnn.pt", "mobius_regular"])
        fails("equivariance", "--data", self.data, "--gauge_cnn", self.data, contains="digits.npz")
        fails("shifted_digits", "--data", self.folder / "no.npz", contains="no.npz")
        with np.load(self.data) as npz:
            foreign = npz["train_data_shifted"].copy()
        foreign[0] = 0.5
        fails("shifted_digits", "--data",
              write_npz(self.folder / "foreign.npz", train_data_shifted=foreign),
              contains="no isometry")
        (self.folder / "foreign.npz").unlink()
        with not_installed("matplotlib"):
            fails("models", contains="matplotlib")
        self.assertFails(visualize.main, "models", "--out", self.data, contains="digits.npz")
        self.assertEqual(self.files(), before)
        path = self.folder / "results" / "error_against_shift.json"
        for content in ("", "[" * 100000, '{"rows": [NaN]}', "[]", "{}",
                        '{"format": 2, "rows": []}'):
            path.write_text(content)
            fails("error_against_shift", "--results", self.folder / "results", contains=str(path))
        self.assertFalse((self.folder / "new").exists())
