"""Runs that are stopped, killed, resumed and tested, from their checkpoints."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import time
from unittest import mock

import numpy as np
import torch

import train
from fields import isometry_action
from models import build_model
from tests.reference import randomized
from tests.support import COUNTS, RunsCase, Zygote, write_npz
from training.checkpoints import read_checkpoint, read_result
from training.data import load_dataset
from training.options import RECIPES


class TestCheckpoints(RunsCase):
    KILLS = 20

    def test_resume_is_exact(self):
        for options in ({"model": "mobius_mixed", "sign_eps": 1e-8, "lr_decay_period": 1},
                        RECIPES["improved"] | {"precision": "bf16", "eval_freq": 2}):
            options = options | {"num_epochs": 3, "batch_size": self.BATCH}
            config = self.config(**options)
            expected = self.finish(config)
            folder = self.finish(config, stop_after=1)
            for epoch in (2, None):
                torch.manual_seed(1234)  # whatever this process drew meanwhile
                self.finish(config, folder, stop_after=epoch)
            stored = self.assertSameRun(folder, expected)
            self.assertEqual([session["after_epoch"] for session in stored["resumed"]], [1, 2])
            # Another seed is another run: the comparison can fail.
            other = self.finish(self.config(**options, seed=8))
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
        self.finish(
            self.config(num_epochs=3, data=str(write_npz(self.folder / "other.npz", 16, 8))),
            stop_after=1,
        )
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
        with mock.patch("training.events.SHOWN", 1):
            folder = self.finish(config, stop_after=2)
            time.sleep(1.1)  # TensorBoard names its files by the second
            self.finish(config, folder)
        records = json.loads((folder / "result.json").read_text())["epochs"]
        shown = EventAccumulator(str(folder / "pictures"), size_guidance={"images": 0}).Reload()
        self.assertEqual(
            [event.step for event in shown.Images("network/kernels of the first layer")],
            [0, 1, 2, 3],
        )
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
                # The kill may have come before all files followed from the checkpoint.
                self.main(train, *options, "--resume")
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
            # All files are complete, and of the last epoch that was printed, or a later one.
            checkpoints = list(folder.glob("*/checkpoint.pt"))
            if checkpoints:
                (path,) = checkpoints
                stored = read_checkpoint(path)
                epoch = len(stored["result"]["epochs"])
                self.assertGreaterEqual(epoch, max([finished, *told]))
                if finished:
                    self.assertIn(
                        f"continued after epoch {finished} of",
                        printed + f"continued after epoch {finished} of" * (not printed),
                    )
                finished = epoch
                read_result(path.with_name("result.json"))
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
            checkpoint |= {
                key: value(checkpoint[key]) if callable(value) else value
                for key, value in changes.items()
            }
            file = io.BytesIO()
            torch.save({key: value for key, value in checkpoint.items() if value is not None}, file)
            return file.getvalue()

        resume = ("--resume", folder)
        cases = [
            (whole[:n], resume, ["truncated or no checkpoint"])
            for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)
        ]
        cases += [
            (b"some other file" * 100, resume, ["truncated or no checkpoint"]),
            (self.data.read_bytes(), resume, ["truncated or no checkpoint"]),
            ((folder / "weights.pt").read_bytes(), resume, ["weights alone"]),
            (changed(format=99), resume, ["no checkpoint of format 1"]),
            (changed(random=None, optimizer=None), resume, ["no checkpoint of format 1"]),
            (changed(config=lambda c: c | {"lr": "fast"}), resume, ["lr"]),
            (changed(config=lambda c: c | {"speed": 1}), resume, ["speed"]),
            (changed(model=lambda m: {"a": torch.zeros(1)}), resume, ["does not fit"]),
            (changed(model=build_model("mobius_mixed").state_dict()), resume, ["does not fit"]),
            (changed(optimizer={}), resume, ["does not fit", "another folder"]),
            (changed(result={}), resume, ["does not fit", "another folder"]),
            (changed(config=lambda c: c | {"data": 3}), resume, ["data must be a path"]),
            (changed(format=0), resume, ["no checkpoint"]),
            (changed(random={}), resume, ["does not fit"]),
            (changed(data=lambda d: d | {"sha256": "0"}), resume, ["other data"]),
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
        irrep = changed(config=lambda c: {
            key: "mobius_irrep" if key == "model" else value
            for key, value in c.items() if key != "sign_eps"
        })
        cases.append((irrep, resume, ["before sign(x) of rounding was 0", "train anew"]))
        for content, arguments, contains in cases:
            path.write_bytes(content)
            before = self.files()
            with self.subTest(contains):
                self.assertFails(train.main, *arguments, contains=contains)
                self.assertEqual(self.files(), before)
        # Settings of the optimizer are those of the configuration, whatever the file says of them.
        expected = self.finish(self.config(num_epochs=3))
        path.write_bytes(
            changed(
                optimizer=lambda o: {
                    "state": o["state"],
                    "param_groups": [o["param_groups"][0] | {"weight_decay": 1.0}],
                }
            )
        )
        self.assertIn("continued after epoch 1 of 3", self.main(train, *resume))
        self.assertSameRun(folder, expected)

    def test_full_disk(self):
        """As the system reports it: one line that names the file, and what was there stays."""
        folder = self.finish(self.config(num_epochs=3), stop_after=1)
        before = {name: content for name, content in self.files().items() if name.endswith(".pt")}

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
        self.assertFails(
            train.main,
            "--resume",
            folder,
            contains=["cannot write", "checkpoint.pt: File too large"],
        )
        self.assertEqual(
            {name: content for name, content in self.files().items() if name.endswith(".pt")},
            before,
        )

    def test_other_threads(self):
        config = self.config()
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
        self.assertFails(
            train.main, "--eval_only", "--checkpoint", folder / "checkpoint.pt",
            contains="checkpoint.pt",
        )
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
        with mock.patch("training.run_folder.fcntl", None):
            self.assertFails(train.main, "--resume", folder, contains=["cannot lock", "no flock"])

    def test_eval_only(self):
        folder = self.finish(self.config(model="mobius_mixed"))
        errors = json.loads((folder / "result.json").read_text())["test_error"]
        alone = self.folder / "alone.pt"
        shutil.copy(folder / "weights.pt", alone)
        before = self.files()
        shifted, centered = (
            f"test error on 8 {version} digits: {errors[version]:.2f} %"
            for version in ("shifted", "centered")
        )
        line = f"{shifted}\n{centered}\n"
        data = ("--data", self.data)
        self.assertIn(
            line, self.main(train, "--eval_only", "--checkpoint", folder / "checkpoint.pt")
        )
        self.assertIn(
            "trained for 2 epochs",
            self.main(train, "--eval_only", "--checkpoint", folder / "checkpoint.pt"),
        )
        self.assertIn(
            line,
            self.main(
                train, "--eval_only", "--checkpoint", alone, "--model", "mobius_mixed", *data
            ),
        )
        self.assertIn(
            line, self.main(train, "--eval_only", "--checkpoint", folder / "weights.pt", *data)
        )
        self.assertIn(line, self.main(train, "--eval_only", "--checkpoint", folder))
        printed = self.main(
            train, "--eval_only", "--checkpoint", folder / "checkpoint.pt", "--test_mode",
            "centered",
        )
        self.assertIn(centered, printed)
        self.assertNotIn("shifted digits", printed)
        for arguments, contains in [
            ([], ["--checkpoint FILE"]),
            (["--checkpoint", self.folder / "nowhere.pt"], ["nowhere.pt", "No such file"]),
            (["--checkpoint", self.data], ["no checkpoint"]),
            (["--checkpoint", self.folder], ["cannot read", "checkpoint.pt"]),
            (["--checkpoint", alone, *data], ["--model"]),
            (["--checkpoint", alone, "--model", "cnn_same_params", *data], ["cnn_same_params"]),
            (
                ["--checkpoint", folder / "weights.pt", "--model", "mobius_regular", *data],
                ["mobius_mixed, not a mobius_regular"],
            ),
            (
                ["--checkpoint", folder / "checkpoint.pt", "--model", "mobius_regular"],
                ["mobius_mixed, not a mobius_regular"],
            ),
            (
                ["--checkpoint", folder / "checkpoint.pt", "--lr", "1", "--seed", "2"],
                ["--lr, --seed"],
            ),
        ]:
            with self.subTest(arguments):
                self.assertFails(train.main, "--eval_only", *arguments, contains=contains)
        self.assertFails(
            train.main,
            *self.options("--checkpoint", folder / "checkpoint.pt"),
            contains="--eval_only",
        )
        self.assertEqual(self.files(), before)

    def test_predict_at_every_shift(self):
        """As of digits moved one by one. A gauge CNN's repeat every 4 columns, with polyphase
        pooling every column.
        """
        images = load_dataset(self.data)["test_centered"].images[:4]

        def predictions(name, pooling):
            """Of a random network whose logits have mean 0, or it sees one class in everything."""
            model = randomized(build_model(name, pooling=pooling, kernel_size=3)).eval()
            with torch.no_grad():
                model.classifier[7].bias -= model(images).mean(0)
            predicted = train.predict_at_every_shift(model, images)
            for shift in (0, 3, 28, 55):
                moved = isometry_action(images, shift, (1, 0, 0))
                self.assertTrue(torch.equal(predicted[shift], train.predict(model, moved)))
            self.assertEqual(predicted.shape, (56, 4))
            self.assertGreater(len(predicted.unique()), 1)
            return predicted

        fixed = predictions("mobius_regular", "fixed")
        self.assertTrue((fixed.view(14, 4, 4) == fixed[:4]).all())
        polyphase = predictions("mobius_regular", "polyphase")
        self.assertTrue((polyphase == polyphase[0]).all())
        cnn = predictions("cnn_same_params", "polyphase")
        self.assertFalse((cnn[::4] == cnn[0]).all())
