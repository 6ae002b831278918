"""Single runs of train.py."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import convert_mnist
import train
from fields import isometry_action
from models import MODELS, build_model, count_parameters
from study import figures
from tests.support import ROOT, RunsCase, Zygote, not_installed, write_npz
from training import muon, run_folder
from training.checkpoints import read_result
from training.data import load_dataset
from training.files import CommandLine
from training.options import RECIPES, TEST_MODES, TRAIN_MODES


class TestTrain(RunsCase):
    DIGITS, BATCH = (64, 32), 16

    def train(self, **options):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run = train.Run(self.config(**options))
            result = run.train()
        return result, run.folder.path, printed.getvalue()

    def test_defaults_are_the_protocol(self):
        options = vars(train.command_line().parse_args(["--model", "mobius_regular"]))
        config = train.Config("mobius_regular")
        self.assertEqual(options, {"model": "mobius_regular"})
        self.assertEqual(
            vars(config),
            vars(config)
            | {
                "train_mode": "centered", "test_mode": "both", "num_epochs": 20, "batch_size": 128,
                "weight_decay": 1e-6, "lr": 5e-3, "lr_decay_period": 4, "lr_decay_factor": 2,
                "eval_freq": 1, "dataset": "mnist", "device": "auto", "precision": "fp32",
                "pooling": "fixed", "lr_schedule": "step", "warmup_epochs": 0, "deformation": 0,
                "stroke_width": 0, "scaling": 0, "dropout": 0.3, "label_smoothing": 0,
                "optimizer": "adam",
            },
        )

    def test_the_run_is_what_was_asked_for(self):
        arrays = np.load(self.data)
        for train_mode, test_mode in itertools.product(TRAIN_MODES, TEST_MODES):
            run = train.Run(
                self.config(train_mode=train_mode, test_mode=test_mode, weight_decay=0.03, lr=0.02)
            )
            run.folder.close()
            self.assertTrue(
                np.array_equal(run.training_set.images, arrays[f"train_data_{train_mode}"])
            )
            self.assertEqual(
                list(run.test_sets), ["shifted", "centered"] if test_mode == "both" else [test_mode]
            )
            for version, test_set in run.test_sets.items():
                self.assertTrue(np.array_equal(test_set.images, arrays[f"test_data_{version}"]))
        for optimizer, kind in (("adam", torch.optim.Adam), ("muon", muon.Muon)):
            run = train.Run(self.config(optimizer=optimizer, weight_decay=0.03, lr=0.02))
            run.folder.close()
            (group,) = run.optimizer.param_groups
            self.assertIs(type(run.optimizer), kind)
            decay = group["kernel_decay" if optimizer == "muon" else "weight_decay"]
            self.assertEqual(
                (decay, group["lr"], len(group["params"])),
                (0.03, 0.02, len(list(run.model.parameters()))),
            )

    def test_learns(self):
        for model in ("mobius_mixed", "cnn_same_channels"):
            result, _, _ = self.train(model=model, num_epochs=3)
            losses = [record["train_loss"] for record in result["epochs"]]
            self.assertLess(losses[-1], losses[0] - 0.1, model)

    def test_is_a_plain_training_loop(self):
        """Two epochs written out: the same weights, bit for bit."""
        result, folder, _ = self.train(seed=3, lr_decay_period=1, weight_decay=0.01)
        self.assertEqual([record["lr"] for record in result["epochs"]], [5e-3, 2.5e-3])
        digits = load_dataset(self.data)["train_centered"]
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
        result, folder, printed = self.train(seed=5)
        stored = json.loads((folder / "result.json").read_text())
        self.assertEqual(stored, result)
        self.assertEqual(stored["status"], "finished")
        self.assertEqual(
            stored["config"]
            | {"seed": 5, "model": "mobius_regular", "batch_size": 16, "lr": 0.005},
            stored["config"],
        )
        self.assertEqual(stored["parameters"], count_parameters(build_model("mobius_regular")))
        self.assertEqual((stored["data"]["train_digits"], stored["data"]["test_digits"]), (64, 32))
        self.assertEqual(stored["environment"]["versions"]["torch"], torch.__version__)
        if (ROOT / ".git").exists():
            self.assertRegex(stored["environment"]["commit"], "^[0-9a-f]{12}(-dirty)?$")
        self.assertEqual([record["epoch"] for record in stored["epochs"]], [1, 2])
        keys = {
            "epoch", "lr", "train_loss", "train_error", "seconds", "test_loss_shifted",
            "test_error_shifted", "test_loss_centered", "test_error_centered",
        }
        self.assertEqual(set(stored["epochs"][0]), keys)
        last = stored["epochs"][-1]
        self.assertEqual(
            stored["test_error"],
            {"shifted": last["test_error_shifted"], "centered": last["test_error_centered"]},
        )
        # The log is what was printed: a line for the run, one for its settings, one for each
        # epoch, and the final errors.
        self.assertEqual((folder / "log.txt").read_text(), printed)
        lines = printed.splitlines()
        self.assertEqual(len(lines), 5)
        self.assertEqual(lines[1], "not the defaults: num_epochs 2, batch_size 16")
        for version, error in stored["test_error"].items():
            self.assertIn(f"{version} {error:.2f} %", lines[-1])
        self.assertRegex(
            lines[2], r"epoch  1/2 .*loss \d.*train error .*test error shifted .*, centered .* s$"
        )
        self.assertRegex(folder.name, r"^[\w.-]+$")
        # The final error is that of the saved weights.
        model = build_model("mobius_regular")
        model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        _, error = train.evaluate(model, load_dataset(self.data)["test_shifted"])
        self.assertEqual(error, stored["test_error"]["shifted"])

    def test_tensorboard(self):
        """Curves, digits, kernels after each epoch, the network's mistakes, its error against
        the shift.
        """
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        run = train.Run(self.config(tensorboard=True), verbose=False)
        drawn = mock.patch.multiple(figures, **{
            name: mock.Mock(wraps=getattr(figures, name))
            for name in ("digits", "error_against_shift", "first_kernels")
        })
        with contextlib.closing(run), drawn, mock.patch("training.events.SHOWN", 3):
            result = run.train()
            digits, error_against_shift, first_kernels = (
                [call.args for call in function.mock_calls] for function in
                (figures.digits, figures.error_against_shift, figures.first_kernels)
            )
        folder = run.folder.path
        events, shown = (
            EventAccumulator(str(path)).Reload() for path in (folder, folder / "pictures")
        )
        expected = {"loss/train": "train_loss", "error/train": "train_error", "lr": "lr"}
        for version in ("shifted", "centered"):
            expected |= {
                f"loss/test_{version}": f"test_loss_{version}",
                f"error/test_{version}": f"test_error_{version}",
            }
        for tag, key in expected.items():
            for event, record in zip(events.Scalars(tag), result["epochs"], strict=True):
                self.assertAlmostEqual(event.value, record[key], places=3)
        self.assertIn("_hparams_/experiment", events.summary_metadata)
        for version, error in result["test_error"].items():
            self.assertAlmostEqual(
                events.Scalars(f"final_error/{version}")[0].value, error, places=3
            )
        # The pictures: digits, the kernels before the first and after each epoch, and the end.
        images = {
            tag: [event.step for event in shown.Images(tag)] for tag in shown.Tags()["images"]
        }
        self.assertEqual(images, {
            "digits/centered training": [0], "digits/shifted test": [0],
            "digits/centered test": [0], "network/kernels of the first layer": [0, 1, 2],
            "network/error against shift": [2], "network/misclassified shifted test digits": [2],
            "network/misclassified centered test digits": [2],
        })
        self.assertEqual([model for model, *_ in first_kernels], [run.model] * 3)
        training, *_, shifted, centered = digits
        self.assertTrue(torch.equal(training[0], run.training_set.images[:3]))
        self.assertEqual(training[1], list(map(str, run.training_set.labels[:3].tolist())))
        for version, (pictures, titles, _, title) in (("shifted", shifted), ("centered", centered)):
            images, labels = run.test_sets[version]
            predictions = run.model.eval()(images).argmax(1)
            wrong = predictions != labels
            self.assertTrue(torch.equal(pictures, images[wrong][:3]))
            classes = list(zip(labels[wrong].tolist(), predictions[wrong].tolist()))[:3]
            self.assertEqual(titles, [f"{label} as {predicted}" for label, predicted in classes])
            self.assertEqual(title, f"{wrong.sum()} of 32 {version} test digits are misclassified")
        ((row,), _), = error_against_shift
        images, labels = run.centered_test_set
        for shift, error in enumerate(row["errors"]):
            wrong = run.model(isometry_action(images, shift, (1, 0, 0))).argmax(1) != labels
            self.assertEqual(error, 100 * wrong.double().mean().item())

    def test_interrupted_at_its_last_pictures(self):
        run = train.Run(self.config(tensorboard=True, num_epochs=1), verbose=False)
        with contextlib.closing(run), mock.patch("training.report.RunEvents") as events:
            events.return_value.error_against_shift.side_effect = KeyboardInterrupt
            with self.assertRaises(KeyboardInterrupt):
                run.train()
        self.assertEqual(read_result(run.folder.path / "result.json")["status"], "finished")

    def test_seeds_repeat(self):
        def numbers(**options):
            result, folder, _ = self.train(**options)
            weights = torch.load(folder / "weights.pt", weights_only=True)
            return [
                {k: v for k, v in record.items() if k != "seconds"} for record in result["epochs"]
            ], weights

        (first, weights), (again, same_weights), (other, _) = (
            numbers(seed=1),
            numbers(seed=1),
            numbers(seed=2),
        )
        self.assertEqual(first, again)
        self.assertTrue(all(torch.equal(weights[key], same_weights[key]) for key in weights))
        self.assertNotEqual(first, other)

    def test_learning_rate(self):
        def rates(**options):
            config = self.config(num_epochs=4, **options)
            return [config.learning_rate(epoch + 0.5) for epoch in range(4)]

        self.assertEqual(rates(lr=0.008, lr_decay_period=1), [0.008, 0.004, 0.002, 0.001])
        self.assertEqual(
            rates(lr=0.01, lr_decay_period=2, lr_decay_factor=10), [0.01, 0.01, 0.001, 0.001]
        )
        self.assertEqual(rates(lr_decay_period=0), [0.005] * 4)
        self.assertEqual(
            rates(lr=0.008, warmup_epochs=2, lr_decay_period=3), [0.002, 0.006, 0.008, 0.004]
        )
        half_wave = [0.01 * (1 + math.cos(math.pi * part)) / 2 for part in (1 / 6, 3 / 6, 5 / 6)]
        for rate, expected in zip(
            rates(lr=0.01, lr_schedule="cosine", warmup_epochs=1), [0.005, *half_wave], strict=True
        ):
            self.assertAlmostEqual(rate, expected)

    def test_learning_rate_of_each_step(self):
        seen = []
        config = self.config(lr=0.01, lr_schedule="cosine", warmup_epochs=1)
        run = train.Run(config, verbose=False)
        with contextlib.closing(run), mock.patch.object(
            run.optimizer, "step", lambda: seen.append(run.optimizer.param_groups[0]["lr"])
        ):
            run.train()
        self.assertEqual(
            seen,
            [run.config.learning_rate((step + 0.5) / run.steps) for step in range(2 * run.steps)],
        )
        self.assertEqual(seen.index(max(seen)), run.steps)  # the first after warm-up
        self.assertLess(seen[-1], 0.01 * (math.pi / 2 / run.steps) ** 2)

    def test_deformed_digits(self):
        """Every batch is deformed anew, by the generator of the order; test digits stay."""
        config = self.config(deformation=1.5, stroke_width=0.5, scaling=0.3)
        run = train.Run(config, verbose=False)
        digits, order, seen = (
            run.training_set.images,
            torch.Generator().manual_seed(run.config.seed),
            [],
        )
        with contextlib.closing(run), mock.patch.object(
            run.model, "forward", side_effect=run.model.forward
        ) as forward:
            run.train()
        tested = sum(
            -(-len(split.labels) // train.EVAL_BATCH_SIZE) for split in run.test_sets.values()
        )
        seen = [call.args[0] for call in forward.call_args_list]
        self.assertEqual(len(seen), 2 * (run.steps + tested))
        for epoch in range(2):
            index = torch.randperm(len(digits), generator=order)
            for step in range(run.steps):
                batch = digits[index[16 * step:16 * (step + 1)]]
                self.assertNotClose(seen[0], batch)
                self.assertTrue(
                    torch.equal(seen.pop(0), run.deform(batch, run.deform.draw(16, order)))
                )
            for split in run.test_sets.values():
                self.assertTrue(torch.equal(seen.pop(0), split.images))

    def test_label_smoothing(self):
        """In training only: a network that is sure of one class then loses more."""
        for smoothing in (0.0, 0.3):
            config = self.config(label_smoothing=smoothing, lr=1e-20, dropout=0.0)
            run = train.Run(config, verbose=False)
            with contextlib.closing(run):
                with torch.no_grad():
                    run.model.classifier[7].weight.zero_()
                    run.model.classifier[7].bias.copy_(20.0 * (torch.arange(10) == 3))
                result = run.train()
            threes = (run.training_set.labels == 3).double().mean().item()
            expected = 20 * ((1 - smoothing) * (1 - threes) + smoothing * 0.9)
            self.assertAlmostEqual(result["epochs"][0]["train_loss"], expected, places=3)
            of_test = (run.test_sets["centered"].labels != 3).double().mean().item()
            self.assertAlmostEqual(
                result["epochs"][-1]["test_loss_centered"], 20 * of_test, places=3
            )

    def test_recipe(self):
        options = vars(
            train.command_line().parse_args(
                ["--model", "mobius_regular", "--recipe", "improved", "--lr", "0.1"]
            )
        )
        self.assertEqual(
            {name: options[name] for name in ("model", "recipe", "lr")},
            {"model": "mobius_regular", "recipe": "improved", "lr": 0.1},
        )
        followed = train.follow_recipe({"model": "mobius_regular", "recipe": "improved", "lr": 0.1})
        self.assertEqual(followed, RECIPES["improved"] | {"model": "mobius_regular", "lr": 0.1})
        self.assertEqual(train.follow_recipe({"seed": 1, "recipe": "paper"}), {"seed": 1})
        printed = self.main(
            train, *self.options("--recipe", "improved", "--batch_size", "16", "--num_epochs", "2")
        )
        self.assertIn(
            "not the defaults: pooling polyphase, dropout 0.1, num_epochs 2, "
            "batch_size 16, optimizer muon, lr 0.003",
            printed,
        )
        (path,) = (self.folder / "logs").glob("*/result.json")
        stored = json.loads(path.read_text())["config"]
        self.assertEqual(stored, stored | RECIPES["improved"] | {"batch_size": 16})
        self.assertFails(
            train.main, "--eval_only", "--checkpoint", path.parent, "--recipe", "improved",
            contains=["leave out --recipe"],
        )
        self.assertIn(
            "trained for 2 epochs", self.main(train, "--eval_only", "--checkpoint", path.parent)
        )

    def test_evaluation(self):
        result, _, _ = self.train(num_epochs=3, eval_freq=2, test_mode="centered")
        self.assertEqual(
            ["test_error_centered" in record for record in result["epochs"]], [False, True, True]
        )
        self.assertEqual(set(result["test_error"]), {"centered"})
        result, _, _ = self.train(eval_freq=0, train_mode="shifted")
        self.assertEqual(
            ["test_error_shifted" in record for record in result["epochs"]], [False, True]
        )

        class Oracle(nn.Module):  # knows all labels but the first three
            def forward(self, images):
                return F.one_hot(images[:, 0, 0, 0].long(), 10).float()

        labels = torch.arange(1234) % 10
        images = (
            torch.where(torch.arange(1234) < 3, (labels + 1) % 10, labels)
            .float()
            .reshape(-1, 1, 1, 1)
        )
        loss, error = train.evaluate(Oracle(), convert_mnist.Split(images, labels))
        self.assertAlmostEqual(error, 100 * 3 / 1234)
        right, wrong = math.log(math.e + 9) - 1, math.log(math.e + 9)
        self.assertAlmostEqual(loss, (1231 * right + 3 * wrong) / 1234, places=5)

    def test_precision(self):
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            run, seen = train.Run(self.config(precision=precision), verbose=False), set()
            run.model.register_forward_hook(
                lambda module, inputs, logits: seen.add((module.training, logits.dtype))
            )
            with contextlib.closing(run):
                first, last = run.train()["epochs"]
            # Tests are in float32, in which networks are invariant.
            self.assertEqual(seen, {(True, dtype), (False, torch.float32)})
            self.assertLess(last["train_loss"], first["train_loss"])
            weights = torch.load(run.folder.path / "weights.pt", weights_only=True).values()
            self.assertEqual({v.dtype for v in weights if v.is_floating_point()}, {torch.float32})

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
        with contextlib.redirect_stdout(io.StringIO()), self.assertRaisesRegex(
            FloatingPointError, "nan at step 1 of 4 in epoch 1"
        ):
            run.train()
        stored = json.loads((run.folder.path / "result.json").read_text())
        self.assertEqual(stored["status"], "diverged")
        self.assertIn("step 1 of 4", stored["reason"])
        self.assertIn("step 1 of 4", (run.folder.path / "log.txt").read_text())
        self.assertFails(
            train.main, *self.options("--lr", "1e20"), contains=["the loss is", "step", "--lr"],
            status=1,
        )
        # The last step's damage shows in no training loss.
        self.assertFails(
            train.main,
            *self.options("--lr", "1e20", "--num_epochs", "1", "--batch_size", "64"),
            contains=["the loss on shifted test digits is", "step 1 of 1 in epoch 1"],
            status=1,
        )
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
            self.assertFails(
                train.main, *self.options("--num_epochs", "3"), contains="No space left"
            )
        (path,) = (self.folder / "logs").glob("*/result.json")
        self.assertEqual(json.loads(path.read_text())["status"], "failed")

    def test_a_reader_that_goes_away_stops_nothing(self):
        write_npz(self.data, 8, 8)
        options = self.options("--num_epochs", "1", "--batch_size", "4")
        command = [str(c) for c in (sys.executable, ROOT / "train.py", *options)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
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
        while (
            not (output.exists() and "epoch  2/" in output.read_text()) and time.monotonic() < end
        ):
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
        build_model("mobius_regular").load_state_dict(
            torch.load(folder / "weights.pt", weights_only=True)
        )

    def test_bad_options(self):
        for options, contains in [
            (["--batch_size", "65"], ["batch_size", "64 training digits", "65"]),
            (["--batch_size", "0"], ["batch_size", "at least 2", "0"]),
            (["--batch_size", "-128"], ["batch_size", "-128"]),
            (["--batch_size", "1"], ["batch_size", "at least 2"]),
            (["--batch_size", "2.5"], ["--batch_size", "2.5"]),
            (["--lr", "0"], ["lr", "above 0", "0"]), (["--lr", "nan"], ["lr", "above 0", "nan"]),
            (["--lr", "inf"], ["lr", "inf"]), (["--lr", "-1"], ["lr", "-1"]),
            (["--weight_decay", "-1"], ["weight_decay"]),
            (["--weight_decay", "nan"], ["weight_decay"]),
            (["--num_epochs", "0"], ["num_epochs", "at least 1"]),
            (["--lr_decay_period", "-1"], ["lr_decay_period"]),
            (
                ["--lr_decay_period", "2", "--lr_schedule", "cosine"],
                ["lr_decay_period", "left out with lr_schedule cosine"],
            ),
            (
                ["--recipe", "improved", "--lr_decay_factor", "3"],
                ["lr_decay_factor", "left out with lr_schedule cosine"],
            ),
            (["--recipe", "best"], ["--recipe", "improved"]),
            (["--pooling", "max"], ["--pooling", "polyphase"]),
            (["--dropout", "1"], ["dropout", "below 1"]),
            (["--label_smoothing", "1"], ["label_smoothing", "below 1"]),
            (["--label_smoothing", "-0.1"], ["label_smoothing", "at least 0"]),
            (["--dropout", "nan"], ["dropout", "below 1"]),
            (["--warmup_epochs", "2"], ["warmup_epochs", "below num_epochs"]),
            (["--warmup_epochs", "-1"], ["warmup_epochs", "at least 0"]),
            (["--deformation", "-0.5"], ["deformation", "at least 0 and at most 2"]),
            (["--deformation", "nan"], ["deformation", "at least 0 and at most 2"]),
            (["--stroke_width", "1.5"], ["stroke_width", "at most 1"]),
            (["--scaling", "0.4"], ["scaling", "at most 0.3"]),
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
        for bad in (
            {"model": "resnet"}, {"model": ["mobius_regular"]}, {"num_epochs": 2.5},
            {"batch_size": "16"}, {"seed": 1.5}, {"lr": "0.1"},
        ):
            (name,) = bad
            with self.assertRaisesRegex(ValueError, f"{name} must be"):
                train.Config(**{"model": "mobius_regular"} | bad)
        for module in ("torch.utils.tensorboard", "matplotlib.figure"):
            with not_installed(module):
                self.assertFails(
                    train.main, *self.options("--tensorboard"), contains="--no-tensorboard"
                )
        with mock.patch("torch.cuda.is_available", return_value=False):
            self.assertFails(
                train.main,
                *self.options("--device", "cuda"),
                contains=["--device cuda", "--device cpu"],
            )
            self.assertEqual(train.select_device("auto").type, "cpu")
        with mock.patch("torch.cuda.is_available", return_value=True):
            self.assertEqual(train.select_device("auto").type, "cuda")
            self.assertTrue(torch.backends.cudnn.benchmark)
            self.assertFalse(torch.backends.cudnn.allow_tf32)
        self.assertFalse((self.folder / "logs").exists())

    def test_bounds(self):
        """The values at the closed ends of the allowed ranges are allowed."""
        ends = {"dropout": 0, "sign_eps": 0, "num_epochs": 1, "batch_size": 2, "weight_decay": 0,
                "lr_decay_period": 0, "lr_decay_factor": 1, "warmup_epochs": 0, "deformation": 2,
                "stroke_width": 1, "scaling": 0.3, "label_smoothing": 0, "eval_freq": 0,
                "seed": 2**63 - 1}
        for name, value in ends.items():
            self.assertEqual(getattr(train.Config("mobius_irrep", **{name: value}), name), value)
        for name, value in {"seed": 2**63, "lr": 1e30, "lr_decay_factor": math.inf,
                            "sign_eps": math.inf, "tensorboard": 1, "data": ""}.items():
            with self.assertRaisesRegex(ValueError, f"{name} must be"):
                train.Config("mobius_irrep", **{name: value})
        with self.assertRaisesRegex(ValueError, "sign_eps must be 0 with mobius_regular"):
            train.Config("mobius_regular", sign_eps=1e-8)

    def test_an_entry_is_an_option(self):
        """Help, parsed options and the docs' row come from one call; entries of Config too."""
        parser = CommandLine("")
        parser.option("size", "of x | y, as --scale 1", 0.5, type=float, metavar="X")
        parser.option("kind", "of it", choices=("a", "b"))
        parser.option("fast", "or not", True, action=argparse.BooleanOptionalAction)
        self.assertEqual(parser.markdown().splitlines()[2:], [
            r"| `--size` | `0.5` | of x \| y, as `--scale` 1 |",
            "| `--kind` |  | `a`, `b`; of it |",
            "| `--fast`, `--no-fast` | `on` | or not |",
        ])
        self.assertIn("of x | y, as --scale 1 (0.5)", parser.format_help())
        self.assertEqual(vars(parser.parse_args([])), {})
        self.assertEqual(vars(parser.parse_args(["--no-fast", "--size", "2"])),
                         {"fast": False, "size": 2.0})
        given = dict(re.findall(r"\| `--(\w+)`.*? \| `?([^`|]*?)`? \|",
                                train.command_line().markdown()))
        for entry in dataclasses.fields(train.Config):
            self.assertIn(entry.name, given)
            self.assertIn(entry.metadata["belongs"],
                          ("network", "training", "test", "report", "input", "output"))

    def test_unwritable_log_dir(self):
        (self.folder / "file").write_text("kept")
        self.assertFails(
            train.main,
            *self.options("--log_dir", self.folder / "file"),
            contains=["--log_dir", str(self.folder / "file")],
        )
        self.assertFails(
            train.main,
            *self.options("--log_dir", self.folder / "file" / "logs"),
            contains=["--log_dir"],
        )
        self.assertEqual((self.folder / "file").read_text(), "kept")

    def test_runs_of_the_same_second_do_not_mix(self):
        with mock.patch("time.strftime", return_value="20260101-000000"):
            folders = {run_folder.new_folder(self.logs, "digits: a|b") for _ in range(3)}
        self.assertEqual(
            {folder.name for folder in folders},
            {f"digits__a_b-20260101-000000{end}" for end in ("", "-2", "-3")},
        )

    def test_help_writes_nothing(self):
        command = [sys.executable, ROOT / "reproduce.py", "-h"]  # it imports the other scripts
        process = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=True
        )
        self.assertIn("--runs", process.stdout)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["digits.npz"])
