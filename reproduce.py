"""Many runs: the paper's Table 5, measured again.

    python reproduce.py                                 # seven models, trained on centered and on shifted digits, 32 seeds
    python reproduce.py --runs 2 --models mobius_regular cnn_same_channels --precision bf16
    python reproduce.py --table                         # of what is finished; --table markdown, --table csv
    python reproduce.py --error_against_shift           # of networks trained here, on test digits moved by each isometry
    torchrun --nproc_per_node 8 reproduce.py            # eight processes, on eight GPUs where there are so many

Killed at any moment and started again, it goes on where it was. Any number of processes, on any number of machines, may
share a results folder: a run is done by one of them, and left to the others if that one dies.

    results/runs/RUN.json       a finished run, as train.py's result.json
    results/logs/RUN/           its folder: log, weights, and the checkpoint until it is finished

Source of the figures to compare with: arXiv:2106.06020, Section 5, Table 5.
"""

import contextlib
import csv
import hashlib
import io
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch

from convert_mnist import LENGTH
from fast.memory import keep_freed_memory
from models import MODELS
from train import Diverged, Run, predict_at_every_shift
from training.checkpoints import BadCheckpoint, read_result, read_weights, trained_model
from training.data import Data, find_data
from training.environment import describe_environment, select_device
from training.files import CommandLine, read_json, say, write_json
from training.options import RECIPES, REPORTING, TRAIN_MODES, Config, add_train_options, follow_recipe
from training.run_folder import Busy

RESULTS = Path(__file__).resolve().parent / "results"

# Test error in % on shifted test digits, mean and standard deviation over 32 runs, by training mode.
PAPER_RUNS = 32
PAPER = {
    "cnn_same_channels": {"centered": (42.99, 2.65), "shifted": (1.97, 0.11)},
    "cnn_same_params": {"centered": (43.68, 2.85), "shifted": (2.08, 0.10)},
    "mobius_scalar": {"centered": (1.60, 0.09), "shifted": (1.60, 0.10)},
    "mobius_signflip": {"centered": (4.89, 0.36), "shifted": (4.27, 0.24)},
    "mobius_regular": {"centered": (1.23, 0.07), "shifted": (1.24, 0.08)},
    "mobius_irrep": {"centered": (1.64, 0.12), "shifted": (1.65, 0.09)},
    "mobius_mixed": {"centered": (1.42, 0.10), "shifted": (1.43, 0.09)},
}
SIGNIFICANCE = 0.01
# The standard deviation of fewer is too often too small by chance for Welch's test: of two runs, it sees a difference
# where there is none in 8 cases of 100 instead of 1; of five, in 1.7.
LEAST_RUNS = 5

LISTED = 100  # changed predictions in a row of error_against_shift.json

# What a run's name tells in any case.
NAMED = ("dataset", "model", "train_mode", "seed")
OTHER_DEFAULTS = {"eval_freq": 0, "tensorboard": False}  # than train.py's


def short_settings(config: Config) -> dict:
    """What is not the paper's and not in the first part of a run's name, with a recipe's name in place of its settings."""
    changed = config.settings_not_in_paper(NAMED)
    for recipe, settings in RECIPES.items():
        if settings and settings.items() <= config.protocol().items():
            return {"recipe": recipe} | {name: value for name, value in changed.items() if name not in settings}
    return changed


def run_name(config: Config) -> str:
    """Of a run's files."""
    changed = "".join(f"-{name}_{value}" for name, value in short_settings(config).items())
    return re.sub(r"[^\w.-]", "_", f"{config.digits}-{config.model}-{config.train_mode}-seed{config.seed}{changed}")


class Study:
    """The runs that are asked for, and where they are or will be.

    Args:
        configs: of the runs.
        results: folder of the results.
        bar: whether a run that is claimed shows its progress on a terminal.
    """

    def __init__(self, configs: list[Config], results=RESULTS, bar: bool = True) -> None:
        self.configs, self.results, self.bar = configs, Path(results), bar

    def file(self, config: Config) -> Path:
        return self.results / "runs" / f"{run_name(config)}.json"

    def folder(self, config: Config) -> Path:
        return self.results / "logs" / run_name(config)

    def result(self, config: Config) -> dict | None:
        """Of a finished run; None if it is not finished.

        Raises:
            ValueError: naming the file, if what lies there is not this run's.
            OSError: if it cannot be read.
        """
        path = self.file(config)
        if not path.exists():
            return None
        try:
            result = read_result(path)
        except ValueError as error:
            raise ValueError(f"{error}: move it away, and the run is trained again") from error
        stored = result["config"]
        for name, value in config.protocol().items():
            found = stored.get(name)
            if name not in REPORTING and found != value:
                raise ValueError(f"{path} is of a run with {name} {found}, not {value}: move it away")
        if result["status"] != "finished" or any(version not in (result["test_error"] or {}) for version in config.test_versions):
            raise ValueError(f"{path} is not of a finished run: move it away")
        return result

    def finished(self) -> list[Config]:
        return [config for config in self.configs if self.file(config).exists()]

    def claim(self, config: Config, data: Data) -> Run | None:
        """The run, ready to go on, if it is neither finished nor another process's: nobody else has it until it is closed.

        Raises:
            Diverged: if its loss was not finite when it was trained before: it would not be now.
            BadCheckpoint: if it cannot go on from its checkpoint.
            ValueError: if it is finished, but with other data; or as `Run` does.
            OSError: as `Run` does.
        """
        if result := self.result(config):
            if result["data"]["sha256"] != data.sha256:
                raise ValueError(f"{self.file(config)} is of a run on another {data.file}: take another --results folder")
            return None
        try:
            run = Run(config, self.folder(config), data, verbose=False, bar=self.bar)
        except Busy:
            return None
        try:
            ended = self._ended(run)
        except BaseException:
            run.close()
            raise
        if not ended:
            return run
        run.close()
        return None

    def _ended(self, run: Run) -> bool:
        """Whether the run was finished before we had its lock. Raises Diverged if that is how it ended."""
        if self.file(run.config).exists():
            return True
        # On a network file system the file may be there and not seen yet; what the lock protects is up to date. This is also
        # what is left by a process that was killed before it published the result.
        path = run.folder.path / "result.json"
        if not path.exists():
            return False
        left = read_result(path)
        reporting = dict.fromkeys(REPORTING)
        if (left["config"] | reporting, left["data"]) != (run.result["config"] | reporting, run.result["data"]):
            return False
        if left["status"] == "diverged":
            raise Diverged(f"{left.get('reason')} (to try it again, delete {run.folder.path})", run)
        if left["status"] == "finished" and not run.epoch:  # its checkpoint is gone, as after `publish`
            write_json(self.file(run.config), left)
            return True
        return False

    def publish(self, run: Run) -> None:
        """Write a finished run's result to where it counts; of its folder, only weights and log are of use from now on."""
        write_json(self.file(run.config), run.result)
        (run.folder.path / "checkpoint.pt").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------
# Training


class Progress:
    """Tells of finished runs, whoever finished them, and of the time left.

    Args:
        study: the runs.
        processes: how many are at work.
        verbose: whether to print.
    """

    def __init__(self, study: Study, processes: int, verbose: bool) -> None:
        self.study, self.processes, self.verbose = study, processes, verbose
        self.failures: dict[Config, Exception] = {}
        self.told = set(map(run_name, study.finished()))
        self.start, self.epochs, self.unpublished = time.perf_counter(), 0, 0
        if verbose:
            runs = len(study.configs)
            say(f"{runs} run{'s' * (runs != 1)}: {len(self.told)} finished, {runs - len(self.told)} to do")

    def epoch(self) -> None:
        """This process has trained a run for an epoch more."""
        self.epochs += 1
        self.unpublished += 1
        self.tell()

    def fail(self, config: Config, error: Exception) -> None:
        """A run that cannot be finished."""
        self.failures[config] = error
        if self.verbose:
            print(f"{run_name(config)}: {error}", file=sys.stderr, flush=True)

    def tell(self) -> None:
        """Of every run that was finished since the last time."""
        if not self.verbose:
            return
        for config in self.study.finished():
            name = run_name(config)
            if name not in self.told:
                self.told.add(name)
                result = self.study.result(config)
                errors = ", ".join(f"{version} {result['test_error'][version]:.2f} %" for version in config.test_versions)
                say(f"[{len(self.told)}/{len(self.study.configs)}] {name}: {errors} ({result['seconds']:.0f} s){self._left()}")

    def _left(self) -> str:
        """As if the others were as fast as this process."""
        epochs = sum(config.num_epochs for config in self.study.configs if run_name(config) not in self.told) - self.unpublished
        if epochs <= 0 or not self.epochs:
            return ""
        minutes = epochs * (time.perf_counter() - self.start) / self.epochs / self.processes / 60
        return f", {minutes / 60:.1f} h left" if minutes >= 90 else f", {minutes:.0f} min left" if minutes >= 1 else ", < 1 min left"


def train_what_is_left(study: Study, configs: Iterable[Config], data: Data, progress: Progress) -> bool:
    """Train, one by one, the runs that nobody else has; `progress` learns of those that fail, and they are left alone.

    Returns:
        Whether there was anything to do.
    """
    worked = False
    for config in configs:
        if config in progress.failures:
            continue
        try:
            run = study.claim(config, data)
            if run is None:
                continue
            worked = True
            with contextlib.closing(run):
                if progress.verbose:
                    say(f"training {run_name(config)}" + (f" from epoch {run.epoch + 1} on" if run.epoch else ""))
                run.train(progress.epoch)
                study.publish(run)
        except (Diverged, BadCheckpoint) as error:
            progress.fail(config, error)
        progress.unpublished = 0
        progress.tell()
    return worked


def train_all(study: Study, data: Data, rank: int = 0, processes: int = 1) -> dict[Config, Exception]:
    """Do this process's share of the runs, then what nobody does; the first process returns when all are finished.

    Args:
        study: all runs.
        data: of all runs.
        rank, processes: the share is every `processes`-th run, from the one at `rank` on.

    Returns:
        Why runs failed, as far as this process knows: the first knows all.
    """
    progress = Progress(study, processes, verbose=rank == 0)
    configs = [config for first in range(processes) for config in study.configs[(rank + first) % processes::processes]]
    while True:
        worked = train_what_is_left(study, configs, data, progress)
        over = len(study.finished()) + len(progress.failures) >= len(study.configs)
        progress.tell()
        if over or rank and not worked:
            return progress.failures
        if not worked:
            time.sleep(1)  # the rest is with others, who may die


# ------------------------------------------------------------------------------------------------------
# Table


class Cell:
    """Test errors of one model and training mode.

    Args:
        study: the runs; those of this cell are looked up.
        model, train_mode: of the cell.
        test_digits: their version.

    Raises:
        ValueError, OSError: as `Study.result` does.
    """

    def __init__(self, study: Study, model: str, train_mode: str, test_digits: str) -> None:
        self.model, self.train_mode, self.test_digits = model, train_mode, test_digits
        configs = [config for config in study.configs if (config.model, config.train_mode) == (model, train_mode)]
        results = {config.seed: study.result(config) for config in configs}
        self.errors = [result["test_error"][test_digits] for result in results.values() if result]
        self.hashes = {result["data"].get("sha256") for result in results.values() if result}
        self.missing = [seed for seed, result in results.items() if not result]
        published = configs[0].dataset == "mnist" and test_digits == "shifted"
        self.paper: tuple[float, float] | None = PAPER[model][train_mode] if published else None

    @property
    def n(self) -> int:
        return len(self.errors)

    @property
    def mean(self) -> float | None:
        return mean(self.errors) if self.errors else None

    @property
    def std(self) -> float | None:
        """Over the runs, with n - 1 in the denominator."""
        return stdev(self.errors) if self.n > 1 else None

    @property
    def p(self) -> float | None:
        """Of Welch's test: how often runs with the paper's mean would differ from it by at least as much. None of too few runs."""
        if self.paper is None or self.n < LEAST_RUNS:
            return None
        from scipy.stats import ttest_ind_from_stats  # here: it takes a second

        return float(ttest_ind_from_stats(self.mean, self.std, self.n, *self.paper, PAPER_RUNS, equal_var=False).pvalue)

    @property
    def differs(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANCE


def table(study: Study, style: str = "text") -> str:
    """Test errors of all runs that are finished, beside the paper's.

    Args:
        study: the runs.
        style: 'text', 'markdown' or 'csv'.

    Raises:
        ValueError, OSError: naming the file, for a result that is damaged or of another run, or results on different data.
        ImportError: if SciPy is not installed.
    """
    if not (study.results / "runs").is_dir():
        raise ValueError(f"there are no results in {study.results} (no folder runs)")
    models = list(dict.fromkeys(config.model for config in study.configs))
    train_modes = list(dict.fromkeys(config.train_mode for config in study.configs))
    versions = study.configs[0].test_versions
    cells = [Cell(study, model, mode, version) for model in models for mode in train_modes for version in versions]
    if len(set().union(*(cell.hashes for cell in cells))) > 1:
        raise ValueError(f"the runs in {study.results / 'runs'} are on different npz files: no table of them")
    if style == "csv":
        return _csv(cells, study.configs[0])
    body = _markdown if style == "markdown" else _text
    parts = []
    for version in versions:
        of_version = [cell for cell in cells if cell.test_digits == version]
        parts += [f"Test error in % on {version} test digits ({study.configs[0].digits}): mean ± standard deviation (runs)"
                  + (f"; paper: {PAPER_RUNS} runs" if of_version[0].paper else ""), body(_rows(of_version, models, train_modes))]
    if any(cell.differs for cell in cells):
        parts.append(("\\*" if style == "markdown" else "*") + f" differs from the paper: Welch's test, p < {SIGNIFICANCE}")
    if any(cell.paper and 0 < cell.n < LEAST_RUNS for cell in cells):
        parts.append(f"Cells of fewer than {LEAST_RUNS} runs are not tested.")
    return "\n\n".join(parts + _remarks(study, [cell for cell in cells if cell.test_digits == versions[0]]))


def _rows(cells: list[Cell], models: list[str], train_modes: list[str]) -> list[list[str]]:
    paper = any(cell.paper for cell in cells)
    rows = [["model"] + [text for mode in train_modes for text in [f"trained on {mode}"] + ["paper", "p"] * paper]]
    for model in models:
        row = [model]
        for cell in (cell for cell in cells if cell.model == model):
            ours = "-" if cell.mean is None else f"{cell.mean:.2f}" + (f" ± {cell.std:.2f}" if cell.n > 1 else "") + f" ({cell.n})"
            row.append(ours + " *" * cell.differs)
            if paper:
                row += [f"{cell.paper[0]:.2f} ± {cell.paper[1]:.2f}", "" if cell.p is None else f"{cell.p:.2g}"]
        rows.append(row)
    return rows


def _text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def _markdown(rows: list[list[str]]) -> str:
    lines = [[text.replace("*", "\\*") for text in row] for row in rows]
    for line in lines[1:]:
        line[0] = f"`{line[0]}`"
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(rows[0]), *lines[1:]])


def _csv(cells: list[Cell], config: Config) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    settings = " ".join(f"{name}={value}" for name, value in short_settings(config).items())
    columns = "digits settings model train_mode test_digits n missing mean std paper_mean paper_std paper_n p differs"
    writer.writerow(columns.split())
    for cell in cells:
        paper = (*cell.paper, PAPER_RUNS) if cell.paper else (None,) * 3
        writer.writerow([
            config.digits, settings, cell.model, cell.train_mode, cell.test_digits, cell.n, len(cell.missing), cell.mean, cell.std, *paper,
            cell.p, "" if cell.p is None else int(cell.differs),
        ])
    return file.getvalue().rstrip("\n")


def _remarks(study: Study, cells: list[Cell]) -> list[str]:
    """What a reader of the table has to know besides."""
    remarks, config = [], study.configs[0]
    changed = ({"data": Path(config.data).name} if config.data else {}) | short_settings(config)
    if changed:
        remarks.append("Not the paper's protocol: " + ", ".join(f"{name} {value}" for name, value in changed.items()))
    missing = sum(len(cell.missing) for cell in cells)
    if missing:
        which = [f"- {cell.model} trained on {cell.train_mode}: seeds {_ranges(cell.missing)}" for cell in cells if cell.missing]
        others = _other_runs(study)
        if others:
            remarks.append(f"Finished runs of other settings, which take their options to be shown: {others}")
        remarks.append("\n".join([f"Missing: {missing} of {len(study.configs)} runs", *which]))
    return remarks


def _other_runs(study: Study) -> str:
    """What lies among the results with other digits or settings than the study's, and how often."""
    def of(name: str) -> str | None:
        match = re.fullmatch(rf"(.+)-(?:{'|'.join(MODELS)})-(?:{'|'.join(TRAIN_MODES)})-seed\d+((?:-.+)?)", name)
        return match and " ".join([match[1], *match[2].split("-")[1:]])

    counts = Counter(of(path.stem) for path in (study.results / "runs").glob("*.json"))
    return ", ".join(f"{what} ({count})" for what, count in sorted((what, n) for what, n in counts.items() if what)
                     if what != of(run_name(study.configs[0])))


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as '0-2, 5'."""
    texts, first = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            texts.append(f"{numbers[first]}" + (f"-{numbers[i - 1]}" if i - 1 > first else ""))
            first = i
    return ", ".join(texts)


# ------------------------------------------------------------------------------------------------------
# Error against shift


def check_weights(study: Study) -> None:
    """Raises ValueError if a run is not finished, or its weights are not here."""
    for config in study.configs:
        weights = study.folder(config) / "weights.pt"
        if study.result(config) is None:
            raise ValueError(f"{run_name(config)} is not finished: without --error_against_shift, the same command trains it")
        if not weights.exists():
            raise ValueError(f"there is {study.file(config)}, but not {weights} (the runs that come with this code have no weights): "
                             "take another --results folder, and train it there without --error_against_shift")


def measure_error_against_shift(study: Study, data: Data, device: torch.device) -> Path:
    """Test the study's networks, in float32, on digits moved by each isometry; in error_against_shift.json, those that are there are kept.

    A row has the run's name, what is not the paper's in it, and a hash of its weights; the errors in % at each shift; how many
    predictions there are (digits times shifts), how many of them changed from the one at shift 0, and the first few of those
    that did, as [shift, digit].

    Returns:
        The file's path.

    Raises:
        ValueError, OSError: for a damaged file, or rows of other data.
    """
    path = study.results / "error_against_shift.json"
    rows = read_error_against_shift(path) if path.exists() else []
    if any(row["sha256"] != data.sha256 for row in rows):
        raise ValueError(f"{path} is of another {data.file}: move it away")
    for config in study.configs:
        name, weights = run_name(config), study.folder(config) / "weights.pt"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        if all((row["run"], row.get("weights")) != (name, digest) for row in rows):
            model = trained_model(config, read_weights(weights), weights)
            images, labels = data.splits["test_centered"]
            predictions = predict_at_every_shift(model.to(device), images)
            errors = (100 * (predictions != labels).double().mean(1)).tolist()
            changed = (predictions != predictions[0]).nonzero().tolist()
            settings = {key: value for key, value in short_settings(config).items() if key != "precision"}
            rows = [row for row in rows if row["run"] != name] + [{
                "run": name, "model": config.model, "settings": settings, "train_mode": config.train_mode, "seed": config.seed,
                "sha256": data.sha256, "weights": digest, "environment": describe_environment(device), "errors": errors,
                "predictions": predictions.numel(), "changed": len(changed), "first_changed": changed[:LISTED],
            }]
            write_json(path, {"shifts": list(range(2 * LENGTH)), "rows": rows})
            say(f"{name}: {min(errors):.2f} to {max(errors):.2f} %, {consistency(rows[-1])} of the predictions as at shift 0")
    return path


def consistency(row: dict) -> str:
    """Share of predictions that equal those at shift 0; 100 % only where all do."""
    share = 100 * (1 - row["changed"] / row["predictions"])
    return "100 %" if not row["changed"] else f"{min(share, 99.9999):.4f} %"


def read_error_against_shift(path) -> list[dict]:
    """The rows of an error_against_shift.json. Raises ValueError naming it if it is damaged, OSError if it cannot be read."""
    if not Path(path).exists():
        raise OSError(f"there is no {path}: python reproduce.py --error_against_shift makes it")
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if isinstance(rows, list) and rows and all(map(_is_row, rows)):
        return rows
    raise ValueError(f"{path} is damaged: move it away")


def is_percentage(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 100


def _is_row(row) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("run"), str) and isinstance(row.get("sha256"), str)
        and row.get("model") in list(MODELS) and row.get("train_mode") in TRAIN_MODES
        and isinstance(row.get("settings", {}), dict)  # from here on, earlier versions did not tell
        and all(isinstance(row.get(key, 1), int) for key in ("changed", "predictions"))
        and 0 <= row.get("changed", 1) <= row.get("predictions", 1)
        and isinstance(row.get("errors"), list) and len(row["errors"]) == 2 * LENGTH and all(map(is_percentage, row["errors"]))
    )


# ------------------------------------------------------------------------------------------------------
# Command line


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--runs", type=int, default=PAPER_RUNS, metavar="N", help="of each model and training mode, with seeds 0 to N - 1 (%(default)s)")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help="all seven, unless some are named")
    add("--train_modes", nargs="+", choices=TRAIN_MODES, default=list(TRAIN_MODES), metavar="MODE", help="centered, shifted or both (both)")
    add("--results", default=str(RESULTS), metavar="FOLDER", help="where runs and results lie (results)")
    add("--table", nargs="?", const="text", choices=("text", "markdown", "csv"), help="print the table of what is finished, train nothing")
    add("--error_against_shift", action="store_true",
        help="test finished networks on digits moved by each isometry, train nothing; writes error_against_shift.json")
    add_train_options(parser, "model", "train_mode", "seed", "log_dir", **OTHER_DEFAULTS)
    return parser


def plan(options: dict, bar: bool = True) -> Study:
    """The runs that the options ask for.

    A seed of every cell comes before the next one: what is there at any time is an even table.

    Raises:
        ValueError: for an option that is not allowed.
    """
    options = dict(options)
    runs, models, train_modes, results = (options.pop(k) for k in ("runs", "models", "train_modes", "results"))
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    if results == "":
        raise ValueError("results must be a path, got ''")
    options = OTHER_DEFAULTS | follow_recipe(options)
    configs = [
        Config(model=model, train_mode=mode, seed=seed, **options)
        for seed in range(runs) for mode in dict.fromkeys(train_modes) for model in dict.fromkeys(models)
    ]
    return Study(configs, results, bar)


def meet(rank: int, processes: int):
    """The store of a launch's processes, None of a single one. The first process serves it as long as it keeps it.

    The store, by which process groups come about, is enough: ending a group can hang where another process is faster
    or dead (seen with gloo in PyTorch 2.6).

    Raises:
        ValueError: if the processes do not find each other.
    """
    if processes == 1:
        return None
    try:
        return next(torch.distributed.rendezvous("env://", rank, processes))[0]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the {processes} processes do not find each other: {error}") from error


def load_data(config: Config, device: torch.device, rank: int, store) -> Data:
    """The data of all runs. The first process makes them where they are missing, and tells the others when they are there.

    Only here does a process wait for another; from then on, one that dies stops nobody.

    Raises:
        ValueError, OSError: as `find_data` does, in every process.
    """
    if rank:
        try:
            failure = store.get("data").decode()
        except RuntimeError as error:
            raise ValueError(f"the first process is gone: {error}") from error
        if failure:
            raise ValueError(failure)
        return find_data(replace(config, mnist_root=None), device)
    failure = ""
    try:
        return find_data(config, device)
    except (ValueError, OSError) as error:
        failure = str(error)
        raise
    finally:
        if store:
            store.set("data", failure)


def launched_as() -> tuple[int, int, int]:
    """Rank, number of processes, and rank among those of this machine, as torchrun or another launcher says in the environment.

    Raises:
        ValueError: for something else in these variables.
    """
    texts = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    texts["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", texts["RANK"])
    if all(text.isdigit() for text in texts.values()) and int(texts["RANK"]) < int(texts["WORLD_SIZE"]):
        return int(texts["RANK"]), int(texts["WORLD_SIZE"]), int(texts["LOCAL_RANK"])
    raise ValueError("the environment has " + ", ".join(f"{name}={text}" for name, text in texts.items())
                     + ": these are for launchers such as torchrun to set; unset them")


def main(argv=None) -> None:
    parser = command_line()
    options = vars(parser.parse_args(argv))
    show_table, shifts = options.pop("table"), options.pop("error_against_shift")
    if show_table and shifts:
        parser.error("--table and --error_against_shift are two commands: take one at a time")
    keep_freed_memory()
    rank, failures = 0, {}
    try:
        rank, processes, local_rank = launched_as()
        study = plan(options, bar=rank == 0)
        if show_table:
            return say(table(study, show_table)) if rank == 0 else None
        if shifts:
            check_weights(study)
        first = study.configs[0]
        device = select_device(first.device)
        if device.type == "cuda" and processes > 1:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        store = meet(rank, processes)
        data = load_data(first, device, rank, store)
        if shifts:
            return say(f"wrote {measure_error_against_shift(study, data, device)}") if rank == 0 else None
        failures = train_all(study, data, rank, processes)
        if rank == 0:
            say("\n" + table(study))
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        parser.error(error if rank == 0 else f"process {rank}: {error}")
    except KeyboardInterrupt:
        if rank == 0:
            say("stopped; the same command goes on")
        sys.exit(130)
    if failures and rank == 0:  # a failing process would have torchrun end the others
        sys.exit(2 if any(isinstance(error, BadCheckpoint) for error in failures.values()) else 1)


if __name__ == "__main__":
    main()
