"""Many runs and the paper's table, by reproduce.py."""

import contextlib
import csv
import errno
import fcntl
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import convert_mnist
import fast
import reproduce
import train
from models import MODELS
from study import runs
from study.runs import Study, run_name
from study.table import Cell, table
from tests.support import COUNTS, ROOT, RunsCase, Zygote, not_installed
from training.checkpoints import load_network
from training.files import write_json
from training.options import DEFAULTS, RECIPES


class TestReproduce(RunsCase):
    KILLS = 6

    def options(self, *more):
        return [
            "--data", self.data, "--results", self.folder / "results", "--batch_size", self.BATCH,
            "--num_epochs", "2", "--device", "cpu", "--models", "mobius_regular", "cnn_same_params",
            "--train_modes", "centered", "--runs", "2", *more
        ]

    def study(self, *more):
        options = vars(reproduce.command_line().parse_args(
            [str(option) for option in self.options(*more)]))
        runs, models, train_modes, results, *_ = (options.pop(name) for name in (
            "runs", "models", "train_modes", "results", "table", "pack", "error_against_shift"))
        return Study(reproduce.plan(runs, models, train_modes, options), results)

    def results(self, folder="results"):
        return {path.name: path for path in (self.folder / folder / "runs").glob("*.json")}

    def write_results(self, study, error):
        """Results as train.py leaves them, with test errors `error(config, version)`."""
        for config in study.configs:
            errors = {version: float(error(config, version)) for version in config.test_versions}
            write_json(study.file(config), {
                "status": "finished", "config": config.protocol(), "parameters": 1, "epochs": [],
                "environment": {}, "data": {"sha256": "0"}, "test_error": errors, "seconds": 1.0,
            })

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
            self.assertNotIn(str(self.folder), json.dumps(stored))  # no paths of this machine
            self.assertSameTree(torch.load(folder / "weights.pt", weights_only=True),
                                torch.load(alone / "weights.pt", weights_only=True), name)
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
        after = self.files()
        self.assertEqual({name: after.get(name) for name in before}, before)

    def test_plan(self):
        study = self.study("--models", *MODELS, "--train_modes", "centered", "shifted", "--runs",
                           "32", "--precision", "bf16", "--lr", "0.01")
        self.assertEqual(len(set(study.configs)), 7 * 2 * 32)
        self.assertEqual(len({study.file(config) for config in study.configs}), 7 * 2 * 32)
        settings = {(config.precision, config.lr, config.num_epochs) for config in study.configs}
        self.assertEqual(settings, {("bf16", 0.01, 2)})
        self.assertEqual([config.seed for config in study.configs],
                         sorted(config.seed for config in study.configs))
        # Every setting that makes a difference makes another file, whatever its value.
        other = {
            "num_epochs": 3, "batch_size": 8, "weight_decay": 0.1, "lr": 0.1, "lr_decay_period": 1,
            "lr_decay_factor": 3, "precision": "bf16", "test_mode": "shifted", "dataset": "digits",
            "pooling": "polyphase", "lr_schedule": "cosine", "warmup_epochs": 1, "deformation": 0.5,
            "stroke_width": 0.2, "scaling": 0.2, "dropout": 0.1, "label_smoothing": 0.1,
            "optimizer": "muon", "sign_eps": 1e-8, "compile": True, "init": "weights.pt",
        }
        named = {"model", "train_mode", "seed", "eval_freq"}
        self.assertEqual(set(train.Config("mobius_mixed").protocol()) - named, set(other))
        configs = [train.Config("mobius_mixed", **{key: value}) for key, value in
                   (other | {"data": "my.npz", "train_mode": "shifted", "seed": 1}).items()]
        configs.append(train.Config("mobius_mixed"))
        self.assertEqual(len({run_name(config) for config in configs}), len(configs))
        # A recipe is its settings; in names it stands for them.
        recipe = RECIPES["improved"]
        config = train.Config("mobius_regular", **recipe | {"precision": "bf16"})
        self.assertEqual(run_name(config),
                         "mnist-mobius_regular-centered-seed0-recipe_improved-precision_bf16")
        (config,) = reproduce.plan(1, ["mobius_regular"], ["centered"],
                                   {"recipe": "improved", "lr": 0.5})
        self.assertEqual((config.lr, config.batch_size), (0.5, 64))
        for name, value in recipe.items():
            near = train.Config("mobius_regular",
                                **recipe | {name: 1e-3 if name == "lr" else DEFAULTS[name]})
            self.assertNotIn("recipe", run_name(near))
        for name, value in {"eval_freq": 3, "device": "cpu", "log_dir": "x",
                            "tensorboard": False}.items():
            config = train.Config("mobius_regular", **{name: value})
            self.assertEqual(run_name(config), "mnist-mobius_regular-centered-seed0")
        defaults = vars(reproduce.command_line().parse_args([]))
        self.assertEqual((defaults["runs"], set(defaults["models"]), set(defaults["train_modes"])),
                         (32, set(MODELS), {"centered", "shifted"}))

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
            self.assertSameTree(json.loads(path.read_text()),
                                json.loads(expected[name].read_text()), name)
            log = (self.folder / "results" / "logs" / path.stem / "log.txt").read_text()
            # Twice, if it was killed before it was published.
            self.assertLessEqual(log.count("test error:"), 2, name)

    def start_ranks(self, processes, options, **environment):
        ranks = []
        for rank in range(processes):
            output = self.folder / f"rank{rank}"
            output.unlink(missing_ok=True)
            pid = Zygote.start("reproduce", options, output, RANK=str(rank), LOCAL_RANK=str(rank),
                               WORLD_SIZE=str(processes), **environment)
            ranks.append((pid, output))
        return ranks

    def logs_of(self, results="results"):
        return {
            path.parent.name: path.read_text()
            for path in (self.folder / results / "logs").glob("*/log.txt")
        }

    def test_two_ranks(self):
        options = self.options("--num_epochs", "1", "--runs", "2")
        statuses = [Zygote.wait(*rank) for rank in self.start_ranks(2, options)]
        self.assertEqual([status for status, _ in statuses], [0, 0], statuses)
        self.assertEqual(len(self.results()), 4)
        self.assertEqual(statuses[1][1], "")  # rank 0 prints
        self.assertIn("[4/4]", statuses[0][1])
        self.assertIn("mobius_regular", statuses[0][1].split("[4/4]")[1])
        for name, log in self.logs_of().items():
            self.assertEqual((log.count("epoch  1/1"), log.count("test error:")), (1, 1),
                             f"{name} was not done once\n{log}")

    def test_a_rank_that_dies(self):
        """The others finish its runs, and go on with the one that it was at."""
        ranks = self.start_ranks(3, self.options("--num_epochs", "9", "--runs", "2"))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if sum("epoch  1/9" in log for log in self.logs_of().values()) >= 3:
                break
            time.sleep(0.01)
        os.kill(ranks[2][0], signal.SIGKILL)
        COUNTS["ranks lost"] += 1
        self.assertEqual([Zygote.wait(*rank)[0] for rank in ranks], [0, 0, None])
        self.assertEqual(len(self.results()), 4)
        for name, log in self.logs_of().items():
            self.assertEqual(log.count("test error:"), 1, name)
            # Logged once: a logged epoch is never trained again. (Or never, if the kill came
            # between saving and logging.)
            continued = re.search(r"continued after epoch (\d+) of 9", log)
            for epoch in range(1, 10):
                allowed = (0, 1) if continued and epoch == int(continued[1]) else (1,)
                self.assertIn(log.count(f"epoch {epoch:2}/9"), allowed, f"{name}\n{log}")

    def test_torchrun(self):
        """It ends all processes when one is killed; the next start finds what is left."""
        options = self.options("--num_epochs", "9", "--runs", "2")
        script = self.folder / "reproduce_small.py"
        script.write_text(
            "import reproduce\nfrom tests.support import MODELS, SMALL_MODELS\n"
            "MODELS.update(SMALL_MODELS)\nreproduce.main()"
        )
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            script, *options,
        ]
        command = [str(c) for c in command]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env=environment) as process:
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

    def options_without_data(self):
        """The digits are scikit-learn's, and their npz is missing."""
        return self.options("--dataset", "digits", "--models", "cnn_same_params", "--runs", "1",
                            "--num_epochs", "1", "--batch_size", "512")[2:]

    def printed_by(self, ranks):
        return [output.read_text() if output.exists() else "" for _, output in ranks]

    def test_ranks_without_data(self):
        """One makes the data, the other waits for the lock and finds them."""
        folder = self.folder / "data"
        folder.mkdir()
        with open(folder / ".mobius_digits.npz.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ranks = self.start_ranks(2, self.options_without_data(), DATA_FOLDER=str(folder))
            time.sleep(1)
            self.assertEqual(self.printed_by(ranks), ["", ""])
        statuses = [Zygote.wait(*rank, seconds=100) for rank in ranks]
        self.assertEqual([status for status, _ in statuses], [0, 0], statuses)
        self.assertEqual(sum(printed.count("making ") for _, printed in statuses), 1, statuses)
        self.assertEqual(len(self.results()), 1)
        self.assertIn("[1/1]", statuses[0][1])

    def test_a_rank_that_dies_making_the_data(self):
        """The other one makes them, and trains the run."""
        ranks = self.start_ranks(2, self.options_without_data(),
                                 DATA_FOLDER=str(self.folder / "data"))
        end = time.monotonic() + 30
        making = [False]
        while not any(making) and time.monotonic() < end:
            time.sleep(0.001)
            making = ["making " in printed for printed in self.printed_by(ranks)]
        killed = making.index(True)
        os.kill(ranks[killed][0], signal.SIGKILL)
        COUNTS["ranks lost"] += 1
        statuses = [Zygote.wait(*rank, seconds=100) for rank in ranks]
        self.assertEqual((statuses[killed][0], statuses[1 - killed][0]), (None, 0), statuses)
        self.assertEqual(len(self.results()), 1)

    def test_data_that_cannot_be_made(self):
        (self.folder / "data").write_text("kept")
        with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder / "data"):
            self.assertFails(reproduce.main, *self.options_without_data(),
                             contains="mobius_digits.npz.lock")
        with mock.patch.object(convert_mnist, "DATA_FOLDER", self.folder / "new"), \
                mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
            self.assertFails(reproduce.main, *self.options_without_data(),
                             contains=["cannot lock", "No locks available"])
        self.assertEqual(self.results(), {})

    def test_data_that_cannot_be_had(self):
        """In every process, and none waits for another for ever."""
        options = self.options("--data", self.folder / "nowhere.npz")
        ranks = self.start_ranks(2, options)
        (status, printed), (other, nothing) = (Zygote.wait(*rank) for rank in ranks)
        self.assertEqual((status, other), (2, 2))
        self.assertIn("nowhere.npz", printed)
        self.assertNotIn("Traceback", printed + nothing)

    def test_a_run_that_diverges(self):
        """The others are finished all the same."""
        build = train.build_model

        def build_bad(name, **kwargs):
            model = build(name, **kwargs)
            if torch.initial_seed() == 1 and name == "mobius_regular":
                model.classifier[7].bias.data[0] = math.inf
            return model

        options = self.options("--runs", "3", "--num_epochs", "1")
        with mock.patch("train.build_model", build_bad):
            error = self.assertFails(reproduce.main, *options, status=1,
                                     contains="mobius_regular-centered-seed1")
        self.assertIn("nan at step 1 of 2", error)
        self.assertEqual(len(self.results()), 5)
        statuses = {
            path.parent.name: json.loads(path.read_text())["status"]
            for path in self.folder.glob("results/logs/*/result.json")
        }
        self.assertEqual([name for name, status in statuses.items() if status == "diverged"],
                         [name for name in statuses if "mobius_regular-centered-seed1" in name])
        # It would again: it is not tried again.
        with mock.patch("train.Run.train", side_effect=AssertionError):
            self.assertFails(reproduce.main, *options, status=1,
                             contains=["nan at step 1 of 2", "to try it again, delete"])
        self.assertIn(
            "Missing: 1 of 6 runs",
            self.main(reproduce, *self.options("--runs", "3", "--num_epochs", "1", "--table")))

    def test_table(self):
        """The figures against NumPy's, and SciPy's tests of two samples."""
        from scipy.stats import ttest_ind
        self.data = "mobius_MNIST.npz"  # the paper's figures are of no other digits
        study = self.study("--models", *MODELS, "--train_modes", "centered", "shifted", "--runs",
                           "5")
        random = np.random.default_rng(0)
        values = {}

        def error(config, version):
            paper = reproduce.PAPER[config.model][config.train_mode]
            shift = 0.5 if config.model == "mobius_regular" else 0
            std = {"mobius_mixed": 0.2}.get(config.model, 0.01)
            value = paper.mean + shift + std * random.normal()
            values[config.model, config.train_mode, version, config.seed] = value
            return value

        self.write_results(study, error)
        options = self.options("--models", *MODELS, "--train_modes", "centered", "shifted",
                               "--runs", "5", "--table")
        rows = list(csv.DictReader(io.StringIO(self.main(reproduce, *options, "csv"))))
        self.assertEqual(len(rows), 7 * 2 * 2)
        settings = {(row["digits"], row["settings"]) for row in rows}
        self.assertEqual(settings, {("mobius_MNIST", "num_epochs=2 batch_size=4")})
        text, markdown = self.main(reproduce, *options), self.main(reproduce, *options, "markdown")
        uncorrected = {"p": [], "p_margin": []}
        compared = [row for row in rows if row["test_digits"] == "shifted"]
        for row in rows:
            errors = [
                value for key, value in values.items()
                if key[:3] == (row["model"], row["train_mode"], row["test_digits"])
            ]
            self.assertEqual((row["n"], row["missing"]), ("5", "0"))
            self.assertAlmostEqual(float(row["mean"]), np.mean(errors))
            self.assertAlmostEqual(float(row["std"]), np.std(errors, ddof=1))
            ours = f"{np.mean(errors):.2f} ± {np.std(errors, ddof=1):.2f} (5)"
            (line,) = re.findall(rf"^{row['model']} +{row['train_mode']} .*$", text, re.MULTILINE)
            self.assertIn(f"  {ours}", line)
            if row not in compared:
                self.assertEqual({row[name] for name in
                                  ("paper_mean", "difference", "p", "verdict")}, {""})
                continue
            paper = reproduce.PAPER[row["model"]][row["train_mode"]]
            self.assertEqual((float(row["paper_mean"]), float(row["paper_std"]), row["paper_n"]),
                             (paper.mean, paper.std, "32"))
            sample = random.normal(size=32)
            sample = paper.mean + paper.std * (sample - sample.mean()) / sample.std(ddof=1)
            test = ttest_ind(errors, sample, equal_var=False)
            interval = test.confidence_interval(0.95)
            for name, value in {"difference": np.mean(errors) - paper.mean, "low": interval.low,
                                "high": interval.high, "margin": paper.margin}.items():
                self.assertAlmostEqual(float(row[name]), value)
            uncorrected["p"].append(test.pvalue)
            uncorrected["p_margin"].append(max(
                ttest_ind(errors, sample + edge, equal_var=False, alternative=alternative).pvalue
                for edge, alternative in ((paper.margin, "less"), (-paper.margin, "greater"))
            ))
            difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(
                *(float(row[name]) for name in ("difference", "low", "high")))
            cells = [ours, str(paper), difference, f"{float(row['p']):.2g}", row["verdict"]]
            self.assertRegex(line, " +".join(map(re.escape, cells)))
            self.assertIn(f"| `{row['model']}` | {row['train_mode']} | {' | '.join(cells)} |",
                          markdown)
        for name, p_values in uncorrected.items():
            # Holm: the smallest of 14 times 14, the next one times 13, never below one before.
            order, expected = np.argsort(p_values), np.empty(14)
            scaled = np.array(p_values)[order] * np.arange(14, 0, -1)
            expected[order] = np.maximum.accumulate(scaled).clip(max=1)
            np.testing.assert_allclose([float(row[name]) for row in compared], expected)
        verdicts = {(row["model"], row["verdict"]) for row in compared}
        self.assertTrue(verdicts >= {
            ("mobius_regular", "differs"), ("mobius_mixed", "undecided"),
            ("mobius_irrep", "equal within 0.1"), ("cnn_same_channels", "equal within 2"),
        }, verdicts)
        cell = Cell(study, "mobius_regular", "centered", "shifted", reproduce.PAPER)
        cell.p, cell.p_margin = 0.01, 0.02
        self.assertEqual(cell.verdict, "differs, by less than 0.1")
        self.assertIn("Not the defaults: data mobius_MNIST.npz, num_epochs 2, batch_size 4",
                      text)
        self.assertNotIn("Missing", text)

    def test_pack(self):
        """Nothing is lost but training curves, and those of tested epochs are kept."""
        study = self.study("--runs", "3")
        self.write_results(study, lambda config, version: 1 + config.seed / 7)
        curve = [{"epoch": 1, "train_error": 9.0}, {"epoch": 2, "test_error_shifted": 1.0}]
        other = Study([train.Config("mobius_mixed", sign_eps=1e-8)], study.results)
        self.write_results(other, lambda config, version: 2)
        for config, epochs in zip(study.configs, (curve, curve[::-1])):
            write_json(study.file(config), study.result(config) | {"epochs": epochs})
        configs = [*study.configs, *other.configs]
        before = [study.result(config) for config in configs]
        table = self.main(reproduce, *self.options("--runs", "3", "--table"))
        (self.folder / "results" / "runs" / "damaged.json").write_text("{")
        files = self.files()
        self.assertFails(reproduce.main, *self.options("--pack"),
                         contains=["damaged.json", "move it away"])
        self.assertEqual(self.files(), {"results/.table5.json.lock": b""} | files)
        (self.folder / "results" / "runs" / "damaged.json").unlink()

        printed = self.main(reproduce, *self.options("--pack"))
        self.assertIn("moved 6 runs", printed)
        self.assertIn("1 keep their files", printed)
        self.assertEqual(list(self.results()), [study.file(study.configs[1]).name])
        before[0]["epochs"] = curve[1:]
        for reader in (study, Study(study.configs, study.results)):
            self.assertEqual([reader.result(config) for config in configs], before)
        self.assertEqual(self.main(reproduce, *self.options("--runs", "3", "--table")), table)
        # They are finished: not trained again, and there is nothing to pack.
        with mock.patch("train.Run.train", side_effect=AssertionError):
            self.assertFails(reproduce.main, *self.options("--runs", "3"),
                             contains=["another digits.npz"])
        packed = (study.results / "table5.json").read_bytes()
        self.assertIn("moved 0 runs", self.main(reproduce, *self.options("--pack")))
        self.assertEqual((study.results / "table5.json").read_bytes(), packed)
        self.assertEqual(packed.count(b'\n{"run": '), 6)  # a line each
        # More runs join them.
        more = self.study("--runs", "4")
        for config in more.configs:
            if config.seed == 3:
                self.write_results(Study([config], study.results), lambda config, version: 9)
        self.main(reproduce, *self.options("--pack"))
        self.assertEqual(len(more.packed), 8)
        # Another run of the same name, as from another machine, replaces none.
        self.write_results(other, lambda config, version: 3)
        files = self.files()
        self.assertFails(reproduce.main, *self.options("--pack"),
                         contains=[other.file(other.configs[0]).name, "not the run of that name"])
        self.assertEqual(self.files(), files)
        other.file(other.configs[0]).unlink()
        # A default may change: what is packed keeps its settings.
        before = {run_name(config): more.result(config) for config in more.configs}
        with mock.patch.dict(DEFAULTS, {"dropout": 0.9, "new": 1}):
            for name, result in before.items():
                stored = Study([], study.results).read(name)
                self.assertEqual(stored["config"], result["config"] | {"new": 1})
        content = json.loads((study.results / "table5.json").read_text())
        for damage in ({"format": 0}, {"runs": [{}]}, {"runs": 1}, {"data": []}, {"defaults": 1}):
            (study.results / "table5.json").write_text(json.dumps(content | damage))
            self.assertFails(reproduce.main, *self.options("--table"),
                             contains=["table5.json", "damaged"])
        self.assertFails(reproduce.main, *self.options("--pack"), "--results",
                         self.folder / "typo", contains=["no results in", "typo"])
        self.assertFalse((self.folder / "typo").exists())

    def test_reading_while_others_pack(self):
        """A run is found if it is packed between two looks; two packing at once lose none."""
        study = self.study("--runs", "3")
        self.write_results(study, lambda config, version: config.seed)
        names = study.stored()

        def packed_first(real):
            def wrapped(*arguments):
                with mock.patch("study.runs.read_result", read_result):
                    Study([], study.results).pack()
                return real(*arguments)
            return wrapped

        read_result = runs.read_result
        with mock.patch("study.runs.read_result", packed_first(read_result)):
            self.assertIsNotNone(study.read(names[0]))
        self.assertEqual(self.results(), {})
        self.write_results(study, lambda config, version: config.seed)
        (study.results / "table5.json").unlink()
        glob = Path.glob

        def glob_then_pack(path, pattern):
            found = list(glob(path, pattern))
            with mock.patch.object(Path, "glob", glob):
                Study([], study.results).pack()
            return found

        with mock.patch.object(Path, "glob", glob_then_pack):
            self.assertEqual(study.stored(), names)
        with open(study.results / ".table5.json.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            thread = threading.Thread(target=study.pack)
            self.write_results(study, lambda config, version: config.seed)
            thread.start()
            thread.join(0.3)
            self.assertEqual(len(self.results()), len(names))  # it waits
        thread.join()
        self.assertEqual(self.results(), {})

    def test_killed_while_packing(self):
        """Every run is there once, before and after the next call."""
        study = self.study("--runs", "4")
        first, others = (Study(part, study.results)
                         for part in (study.configs[:1], study.configs[1:]))
        self.write_results(first, lambda config, version: config.seed)
        first.pack()
        self.write_results(others, lambda config, version: config.seed)
        before = [study.result(config) for config in study.configs]
        # write_atomically unlinks its temporary file, pack then those of the runs.
        for name, calls in (("study.runs.write_packed", 0), ("os.fsync", 0), ("os.replace", 0),
                            ("pathlib.Path.unlink", 2)):
            real, count = Path.unlink, itertools.count()

            def killed(*arguments, **options):
                if next(count) >= calls:
                    raise KeyboardInterrupt
                return real(*arguments, **options)

            with mock.patch(name, killed), self.assertRaises(KeyboardInterrupt):
                study.pack()
            for reader in (study, Study(study.configs, study.results)):
                self.assertEqual([reader.result(config) for config in study.configs], before)
                self.assertEqual(len(reader.stored()), len(before))
        self.assertGreater(len(self.results()), 0)
        study.pack()
        self.assertEqual(len(self.results()), 0)
        self.assertEqual([study.result(config) for config in study.configs], before)

    def test_incomplete_table(self):
        self.data = "mobius_MNIST.npz"
        study = self.study("--runs", "6")
        self.write_results(study, lambda config, version: 1 + config.seed)
        options = self.options("--runs", "6", "--table")
        for seed in (1, 2, 3, 5):
            study.file(train.Config(**vars(study.configs[0]) | {"seed": seed})).unlink()
        text = self.main(reproduce, *options)
        self.assertIn("Missing: 4 of 12 runs\n- mobius_regular trained on centered: seeds 1-3, 5",
                      text)
        # Two runs that happen to agree prove nothing.
        self.assertRegex(
            text, r"mobius_regular +centered +3.00 ± 2.83 \(2\) +1.23 ± 0.07  {30,}3.00")
        self.assertIn("Cells of fewer than 5 runs are not compared", text)
        # The remark names results that are not shown.
        self.assertNotIn("other options", text)
        self.assertIn(
            "Finished runs with other options: mobius_MNIST num_epochs_2 batch_size_4 (8)\n",
            self.main(reproduce, *options, "--lr", "0.1"))
        study.file(study.configs[0]).unlink()
        self.assertRegex(self.main(reproduce, *options),
                         r"mobius_regular +centered +5.00 \(1\) +1.23 ± 0.07")
        for path in self.results().values():
            path.unlink()
        self.assertRegex(self.main(reproduce, *options),
                         r"mobius_regular +centered +- +1.23 ± 0.07")
        for other in (self.options("--table", "--dataset", "digits")[2:],
                      self.options("--table", "--data", "mine.npz")):
            self.assertNotIn("1.23", self.main(reproduce, *other))

    def test_a_result_from_before_an_option(self):
        """The option had its default."""
        study = self.study()
        self.write_results(study, lambda config, version: 5)
        path = study.file(study.configs[0])
        result = json.loads(path.read_text())
        del result["config"]["sign_eps"]
        write_json(path, result)
        self.assertEqual(study.result(study.configs[0])["config"]["sign_eps"], 0)
        self.assertNotIn("Missing", self.main(reproduce, *self.options("--table")))

    def test_a_model_without_published_figures(self):
        """Its cells of the paper are empty."""
        paper = {name: figures for name, figures in reproduce.PAPER.items()
                 if name != "mobius_regular"}
        configs = reproduce.plan(1, ["mobius_regular", "mobius_scalar"], ["centered"], {})
        study = Study(configs, self.folder / "results")
        self.write_results(study, lambda config, version: 5)
        _, _, unpublished, published, *_ = table(study, paper).splitlines()[1:]
        self.assertEqual(unpublished.split(), ["mobius_regular", "centered", *["5.00", "(1)"] * 2])
        self.assertIn("1.60 ± 0.09", published)

    def test_rows_of_other_settings(self):
        """Runs that differ in sign_eps or precision have rows of their own."""
        self.data = "mobius_MNIST.npz"
        asked = ("--models", "mobius_signflip", "mobius_regular", "--runs", "5", "--precision",
                 "bf16")
        other = ("--models", "mobius_signflip", "--runs", "5", "--sign_eps", "1e-8")
        self.write_results(self.study(*asked), lambda config, version: 3 + config.seed / 10)
        alone = self.main(reproduce, *self.options(*asked, "--table", "csv"))
        for options, low in ((other, 5), ((*other, "--precision", "bf16"), 6),
                             ((*other, "--lr", "0.1"), 9), ((*other, "--sign_eps", "0"), 8)):
            self.write_results(self.study(*options), lambda config, version: low + config.seed / 10)
        later = train.Config(**vars(self.study(*other).configs[0])
                             | {"seed": 5, "sign_eps": 1e-3})  # beyond --runs
        self.write_results(Study([later], self.folder / "results"), lambda config, version: 20)
        self.study(*other).file(self.study(*other).configs[1]).unlink()
        text = self.main(reproduce, *self.options(*asked, "--table"))
        shifted = [line for line in text.splitlines() if line.startswith("mobius")][:5]
        self.assertEqual([re.split("  +", line)[:4:2] for line in shifted], [
            ["mobius_signflip", "3.20 ± 0.16 (5)"],
            ["mobius_signflip, precision fp32", "8.20 ± 0.16 (5)"],
            ["mobius_signflip, sign_eps 1e-08, precision fp32", "5.22 ± 0.17 (4)"],
            ["mobius_signflip, sign_eps 1e-08", "6.20 ± 0.16 (5)"],
            ["mobius_regular", "3.20 ± 0.16 (5)"],
        ])
        self.assertNotIn("Missing", text)  # those of other settings are not
        both = self.main(reproduce, *self.options(*asked, "--train_modes", "centered", "shifted",
                                                  "--table"))
        rows = [re.split("  +", line)[:2] for line in both.splitlines()
                if line.startswith("mobius")]
        self.assertEqual([mode for name, mode in rows if name == "mobius_signflip"],
                         ["centered", "shifted"])
        self.assertEqual([mode for name, mode in rows if "sign_eps 1e-08" in name],
                         ["centered"] * 2)  # a cell without runs is left out
        markdown = self.main(reproduce, *self.options(*asked, "--table", "markdown"))
        self.assertIn("| `mobius_signflip, sign_eps 1e-08` | centered | 6.20 ± 0.16 (5) | "
                      "4.89 ± 0.36 |", markdown)
        text = self.main(reproduce, *self.options(*asked, "--table", "csv"))
        # Other rows do not change those that were asked for, nor their corrected p-values.
        self.assertLessEqual(set(alone.splitlines()), set(text.splitlines()))
        shown = [[row[name] for name in ("model", "settings", "n", "missing")]
                 for row in csv.DictReader(io.StringIO(text)) if row["test_digits"] == "shifted"]
        protocol = "num_epochs=2 batch_size=4"
        self.assertEqual(shown, [
            ["mobius_signflip", f"{protocol} precision=bf16", "5", "0"],
            ["mobius_signflip", protocol, "5", "0"],
            ["mobius_signflip", f"sign_eps=1e-08 {protocol}", "4", "1"],
            ["mobius_signflip", f"sign_eps=1e-08 {protocol} precision=bf16", "5", "0"],
            ["mobius_regular", f"{protocol} precision=bf16", "5", "0"],
        ])
        # The other way round, and with a remark of what is not shown.
        text = self.main(reproduce, *self.options(*other, "--table"))
        self.assertIn("\nmobius_signflip, sign_eps 0.0  ", text)
        self.assertIn("\nmobius_signflip, sign_eps 0.0, precision bf16  ", text)
        self.assertIn("\nmobius_signflip, precision bf16  ", text)
        (remark,) = [
            line for line in text.splitlines()
            if line.startswith("Finished runs with other options")
        ]
        self.assertEqual(
            remark.split(": ")[1], "mobius_MNIST sign_eps_0.001 num_epochs_2 batch_size_4 (1), "
            "mobius_MNIST sign_eps_1e-08 num_epochs_2 batch_size_4 lr_0.1 (5)")

    def test_error_against_shift(self):
        options = self.options("--models", "mobius_regular", "--runs", "1", "--num_epochs", "1")
        self.assertFails(reproduce.main, *options, "--error_against_shift",
                         contains=["mobius_regular-centered-seed0", "trains it"])
        self.main(reproduce, *options)
        twins = []

        def predict(model, images):
            twins.append(fast.dispatch._enabled.get())
            return train.predict_at_every_shift(model, images)

        with mock.patch("study.shifts.predict_at_every_shift", predict):
            self.main(reproduce, *options, "--error_against_shift")
        self.assertEqual(twins, [True, False])
        path = self.folder / "results" / "error_against_shift.json"
        content = json.loads(path.read_text())
        self.assertEqual(content["shifts"], list(range(56)))
        (row,) = content["rows"]
        (result,) = (json.loads(p.read_text()) for p in self.results().values())
        self.assertAlmostEqual(row["errors"][0], result["test_error"]["centered"])
        self.assertEqual((row["settings"], row["predictions"]),
                         ({"num_epochs": 1, "batch_size": 4}, 56 * self.DIGITS[1]))
        self.assertEqual(len(row["first_changed"]), min(row["changed"], 100))
        self.main(reproduce, *options, "--pooling", "polyphase")
        self.assertIn(
            f", 0 of {56 * self.DIGITS[1]} predictions are not those at shift 0",
            self.main(reproduce, *options, "--pooling", "polyphase", "--error_against_shift"))
        (folder,) = (self.folder / "results" / "logs").glob("*polyphase*")
        # Its checkpoint is deleted, its weights are there.
        printed = self.main(train, "--eval_only", "--checkpoint", folder, "--data", self.data,
                            "--device", "cpu")
        self.assertIn("mobius_regular, polyphase pooling, ", printed)
        stored = json.loads((folder / "result.json").read_text())
        stored["config"] |= {"dataset": "digits", "test_mode": "centered"}
        write_json(folder / "result.json", stored)
        config = load_network(folder, {})[1]
        self.assertEqual((config.dataset, config.test_mode), ("digits", "centered"))
        row, ours = json.loads(path.read_text())["rows"]
        self.assertEqual((ours["settings"]["pooling"], ours["changed"], ours["first_changed"],
                          ours["changed_formulas"]), ("polyphase", 0, [], 0))
        # It is there already; then only in part.
        with mock.patch("study.shifts.predict_at_every_shift", side_effect=AssertionError):
            printed = self.main(reproduce, *options, "--runs", "3", "--error_against_shift")
        self.assertIn("2 of 3 runs have no weights here", printed)
        del content["rows"][0]["changed_formulas"]
        path.write_text(json.dumps(content))
        twins.clear()
        with mock.patch("study.shifts.predict_at_every_shift", predict):
            self.main(reproduce, *options, "--error_against_shift")
        self.assertEqual((twins, json.loads(path.read_text())["rows"]), ([False], [row]))
        path.write_text("{")
        self.assertFails(reproduce.main, *options, "--error_against_shift",
                         contains=[str(path), "truncated"])
        path.write_text(json.dumps({"format": 1, "rows": [row | {"sha256": "0"}]}))
        self.assertFails(reproduce.main, *options, "--error_against_shift",
                         contains=[str(path), "another digits.npz"])
        shutil.rmtree(self.folder / "results" / "logs")
        self.assertFails(reproduce.main, *options, "--error_against_shift",
                         contains=["weights.pt", "take another --results folder"])
        self.assertFails(reproduce.main, *options, "--error_against_shift", "--table",
                         contains="one at a time")

    def test_bad_input(self):
        for options, contains in [
            (["--runs", "0"], ["runs", "at least 1"]),
            (["--runs", "many"], ["many"]),
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
        self.assertFails(reproduce.main, *self.options("--results", self.folder / "file"),
                         contains=["file"])
        self.assertEqual((self.folder / "file").read_text(), "kept")
        # A foreign or damaged file among the results.
        study = self.study()
        self.write_results(study, lambda config, version: 1)
        path = study.file(study.configs[0])
        result = json.loads(path.read_text())
        without_seconds = {key: value for key, value in result.items() if key != "seconds"}
        for content, contains in [
            ("", ["truncated"]),
            ("{", ["truncated", "move it away, and the run is trained again"]),
            ("[]", ["no result"]),
            ("{}", ["no result"]),
            ("[" * 100000, ["no JSON"]),
            (json.dumps(result | {"test_error": None}), ["not of a finished run"]),
            (json.dumps(result | {"test_error": {"shifted": math.nan, "centered": 1.0}}), ["NaN"]),
            (json.dumps(without_seconds), ["no result"]),
            (json.dumps(result | {"config": {}}), ["model None, not mobius_regular"]),
            (json.dumps(result | {"config": result["config"] | {"lr": 1.0}}),
             ["lr 1.0, not 0.005", "move it away"]),
            (json.dumps(result | {"data": {"sha256": "1"}}), ["different npz"]),
        ]:
            path.write_text(content)
            before = self.files()
            with self.subTest(contains):
                self.assertFails(reproduce.main, *self.options("--table"), contains=contains)
                self.assertEqual(self.files(), before)
        path.write_text(json.dumps(result))
        self.assertFails(reproduce.main, *self.options(),
                         contains=["another digits.npz", "--results"])
        # A damaged checkpoint of an unfinished run.
        path.unlink()
        for other in self.results().values():
            other.unlink()
        folder = self.finish(study.configs[0], study.folder(study.configs[0]), stop_after=1)
        (folder / "checkpoint.pt").write_bytes(b"damaged")
        self.assertFails(reproduce.main, *self.options(), contains=[str(folder), "truncated"])
        self.assertEqual(len(self.results()), 3)  # it stops no others
        self.assertFails(reproduce.main,
                         *self.options("--table", "--results", self.folder / "elsewhere"),
                         contains="elsewhere")
        (self.folder / "young" / "logs").mkdir(parents=True)  # no run is finished yet
        self.assertIn("Missing: 4 of 4 runs", self.main(
            reproduce, *self.options("--table", "--results", self.folder / "young")))
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "many"}):
            self.assertFails(reproduce.main, *self.options(),
                             contains=["WORLD_SIZE=many", "torchrun"])
        with mock.patch.dict(os.environ, {"RANK": "3"}):
            self.assertFails(reproduce.main, *self.options(), contains=["RANK=3", "WORLD_SIZE=1"])
        self.data = "mobius_MNIST.npz"
        with not_installed("scipy.stats"):
            study = self.study("--runs", "5")
            self.write_results(study, lambda config, version: 1 + config.seed)
            self.assertFails(reproduce.main, *self.options("--runs", "5", "--table"),
                             contains="scipy")

    def test_left_by_one_who_was_killed(self):
        """A run that is finished in its folder, and not among the results, is published."""
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
