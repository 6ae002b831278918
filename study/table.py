"""Test errors of finished runs beside the paper's, as a table."""

import contextlib
import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from convert_mnist import SOURCES
from models import MODELS
from study.runs import OTHER_DEFAULTS, RESULTS, Study, run_name, settings_not_in_paper
from study.statistics import Comparison, compare, holm
from training.options import TRAIN_MODES, Config

PAPER_RUNS = 32  # of each cell of Table 5
SIGNIFICANCE = 0.05
# Fewer runs are not compared: their standard deviation is too often too small by chance. For two
# runs, Welch's test at a level of 1 % sees a difference where there is none in 8 % of all cases;
# for five, in 1.7 %.
LEAST_RUNS = 5


class Published(NamedTuple):
    """A cell of the paper's table.

    Attributes:
        mean, std: of the test error in %, over `PAPER_RUNS` runs.
        margin: a difference below this, in percentage points, counts as none.
    """

    mean: float
    std: float
    margin: float = 0.1

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}"


Paper = Mapping[str, Mapping[str, Published]]  # by model and training mode


class Cell:
    """Test errors of one model and training mode.

    Args:
        study: the runs, among which are those of the cell.
        model, train_mode: of the cell.
        test_digits: version of the test digits.
        paper: the paper's test errors on MNIST's shifted digits.
        settings: those in which the cell's runs differ from the study's.

    Attributes:
        p, p_margin: those of `comparison`, corrected for the number of cells in the table;
            cells with `settings` are counted apart.

    Raises:
        ValueError, OSError: as `Study.result` does.
    """

    p = p_margin = None

    def __init__(self, study: Study, model: str, train_mode: str, test_digits: str,
                 paper: Paper | None = None, settings: Mapping = {}) -> None:
        self.model, self.train_mode, self.test_digits = model, train_mode, test_digits
        self.settings = settings
        configs = [replace(config, **settings) for config in study.configs
                   if (config.model, config.train_mode) == (model, train_mode)]
        self.config = configs[0]
        results = {config.seed: study.result(config) for config in configs}
        self.errors = [result["test_error"][test_digits] for result in results.values() if result]
        self.hashes = {result["data"]["sha256"] for result in results.values() if result}
        self.missing = [seed for seed, result in results.items() if not result]
        mnist = self.config.digits in ("mnist", SOURCES["mnist"].path.stem)
        published = paper and mnist and test_digits == "shifted"
        self.paper = paper.get(model, {}).get(train_mode) if published else None

    @property
    def row(self) -> str:
        """The first column of the cell's row."""
        settings = (f"{name} {value}" for name, value in self.settings.items())
        return ", ".join([self.model, *settings])

    @property
    def n(self) -> int:
        return len(self.errors)

    @property
    def mean(self) -> float | None:
        return mean(self.errors) if self.errors else None

    @property
    def std(self) -> float | None:
        """Standard deviation over the runs, with n - 1 in the denominator."""
        return stdev(self.errors) if self.n > 1 else None

    @cached_property
    def comparison(self) -> Comparison | None:
        """With the paper's runs; None for fewer than `LEAST_RUNS`."""
        if self.paper is None or self.n < LEAST_RUNS:
            return None
        published = (self.paper.mean, self.paper.std, PAPER_RUNS)
        return compare((self.mean, self.std, self.n), published, self.paper.margin)

    @property
    def verdict(self) -> str:
        """What the tests say, in words."""
        if self.p is None:
            return ""
        if self.p_margin < SIGNIFICANCE:
            differs = "differs, by less than" if self.p < SIGNIFICANCE else "equal within"
            return f"{differs} {self.paper.margin:g}"
        return "differs" if self.p < SIGNIFICANCE else "undecided"

    def __str__(self) -> str:
        return summary(self.errors)


def summary(errors: Sequence[float]) -> str:
    """Mean, standard deviation and number of test errors."""
    if not errors:
        return "-"
    std = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{mean(errors):.2f}{std} ({len(errors)})"


def protocol_cells(model: str, version: str, paper: Paper | None = None, results=RESULTS,
                   **options) -> list[Cell]:
    """A model's cells of the paper's protocol on MNIST, but for some options: one for each
    training mode.
    """
    configs = [Config(model, train_mode=mode, seed=seed, **OTHER_DEFAULTS | options)
               for mode in TRAIN_MODES for seed in range(PAPER_RUNS)]
    study = Study(configs, results)
    return [Cell(study, model, mode, version, paper) for mode in TRAIN_MODES]


def table(study: Study, paper: Paper, style: str = "text") -> str:
    """Test errors of all finished runs beside the paper's.

    Args:
        study: the runs.
        paper: the paper's test errors.
        style: 'text', 'markdown' or 'csv'.

    Raises:
        ValueError, OSError: naming the file, for a result that is damaged or of another run, or
            for results on different data.
        ImportError: if SciPy is not installed.
    """
    folders = [study.results / name for name in ("runs", "logs")]
    if not study.stored() and not any(folder.is_dir() for folder in folders):
        raise ValueError(f"there are no runs in {study.results}")
    models = list(dict.fromkeys(config.model for config in study.configs))
    train_modes = list(dict.fromkeys(config.train_mode for config in study.configs))
    digits, versions = study.configs[0].digits, study.configs[0].test_versions
    cells = [Cell(study, model, mode, version, paper, settings)
             for model in models for settings in ({}, *other_settings(study, model))
             for mode in train_modes for version in versions]
    cells = [cell for cell in cells if cell.n or not cell.settings]
    for other in (False, True):  # rows of other settings do not weaken the tests of the others
        compared = [cell for cell in cells if cell.comparison and bool(cell.settings) == other]
        for name in ("p", "p_margin"):
            corrected = holm([getattr(cell.comparison, name) for cell in compared])
            for cell, p in zip(compared, corrected):
                setattr(cell, name, p)
    if len(set().union(*(cell.hashes for cell in cells))) > 1:
        raise ValueError(f"the runs in {study.results} are on different npz files: "
                         "no table of them")
    if style == "csv":
        return _csv(cells)
    head, *rows = _rows(cells)
    lines = (markdown(head, [[f"`{name}`", *columns] for name, *columns in rows])
             if style == "markdown" else _text([head, *rows]))
    parts = [f"Test error in % ({digits}): mean ± standard deviation (runs)", lines]
    if any(cell.paper for cell in cells):
        parts.append(
            f"The paper has {PAPER_RUNS} runs on shifted test digits. Difference: our mean minus "
            f"the paper's, with its 95 % interval (not corrected). p: Welch's test. 'Equal within' "
            f"and 'by less than': two one-sided tests. Both tests are corrected by Holm's method, "
            f"at a level of {SIGNIFICANCE:.0%}. "
            f"Cells of fewer than {LEAST_RUNS} runs are not compared."
        )
    remarks = _remarks(study, [cell for cell in cells if cell.test_digits == versions[0]])
    return "\n\n".join(parts + remarks)


def other_settings(study: Study, model: str) -> list[dict]:
    """Settings in which finished runs of a model differ from the study's runs.

    Only runs that differ in sign_eps, in precision or in both count. Damaged results do not.
    """
    configs = [config for config in study.configs if config.model == model]
    runs, found = [run for run in study.stored() if f"-{model}-" in run], []
    for run in runs:
        with contextlib.suppress(ValueError):
            stored = study.read(run)["config"]
            settings = {name: stored[name] for name in ("sign_eps", "precision")
                        if stored[name] != getattr(configs[0], name)}
            if settings and settings not in found:
                if any(run_name(replace(config, **settings)) in runs for config in configs):
                    found.append(settings)
    return found


def _rows(cells: list[Cell]) -> list[list[str]]:
    """Rows for models and training modes; columns for versions of the test digits."""
    rows = {}
    for cell in cells:
        row = rows.setdefault((cell.row, cell.train_mode),
                              {"model": cell.row, "trained on": cell.train_mode})
        row[f"{cell.test_digits} test digits"] = str(cell)
        if cell.paper:
            row["paper"] = str(cell.paper)
            found = cell.comparison
            row["difference (95 %)"] = str(found or "")
            row["p"] = f"{cell.p:.2g}" if found else ""
            row["verdict"] = cell.verdict
    head = list(max(rows.values(), key=len))
    return [head, *([row.get(name, "") for name in head] for row in rows.values())]


def _text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown(head: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _csv(cells: list[Cell]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ("digits settings model train_mode test_digits n missing mean std "
               "paper_mean paper_std paper_n difference low high p margin p_margin verdict")
    writer.writerow(columns.split())
    for cell in cells:
        settings = settings_not_in_paper(cell.config).items()
        paper = (cell.paper.mean, cell.paper.std, PAPER_RUNS) if cell.paper else (None,) * 3
        found = cell.comparison
        difference = found[:3] if found else (None,) * 3
        margin = cell.paper.margin if found else None
        writer.writerow([
            cell.config.digits, " ".join(f"{name}={value}" for name, value in settings),
            cell.model, cell.train_mode, cell.test_digits, cell.n, len(cell.missing),
            cell.mean, cell.std, *paper, *difference, cell.p, margin, cell.p_margin, cell.verdict,
        ])
    return file.getvalue().rstrip("\n")


def _remarks(study: Study, cells: list[Cell]) -> list[str]:
    """What the table does not say: its settings, missing runs, runs that it does not show."""
    remarks, config = [], study.configs[0]
    settings = {"data": Path(config.data).name} if config.data else {}
    settings |= settings_not_in_paper(config)
    if settings:
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        remarks.append(f"Not the defaults: {shown}")
    incomplete = [cell for cell in cells if cell.missing and not cell.settings]
    if incomplete:
        others = _runs_not_shown(study, cells)
        if others:
            remarks.append(f"Finished runs with other options: {others}")
        missing = sum(len(cell.missing) for cell in incomplete)
        lines = [f"- {cell.model} trained on {cell.train_mode}: seeds {_ranges(cell.missing)}"
                 for cell in incomplete]
        remarks.append("\n".join([f"Missing: {missing} of {len(study.configs)} runs", *lines]))
    return remarks


def _runs_not_shown(study: Study, cells: list[Cell]) -> str:
    """Digits and settings of other finished runs than those of the cells, and their number."""
    pattern = rf"(.+)-(?:{'|'.join(MODELS)})-(?:{'|'.join(TRAIN_MODES)})-seed\d+((?:-.+)?)"

    def settings(name: str) -> str:
        match = re.fullmatch(pattern, name)
        return " ".join([match[1], *re.split("-(?=[a-z])", match[2])[1:]]) if match else ""

    counts = Counter(map(settings, study.stored()))
    for name in ("", *(settings(run_name(cell.config)) for cell in cells)):
        counts.pop(name, None)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as '0-2, 5'."""
    texts, first = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            last = f"-{numbers[i - 1]}" if i - 1 > first else ""
            texts.append(f"{numbers[first]}{last}")
            first = i
    return ", ".join(texts)
