"""Test errors of finished runs beside the paper's, as a table."""

import contextlib
import csv
import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from models import MODELS
from study.runs import Study, run_name, settings_not_in_paper
from training.checkpoints import read_result
from training.options import TRAIN_MODES

PAPER_RUNS = 32  # of each cell of Table 5
SIGNIFICANCE = 0.01
# Welch's test is not made of fewer runs, whose standard deviation is too often too small by
# chance: of two runs, it sees a difference where there is none in 8 cases of 100 instead of 1;
# of five, in 1.7.
LEAST_RUNS = 5

Paper = Mapping[str, Mapping[str, tuple[float, float]]]  # mean, std by model and training mode


class Cell:
    """Test errors of one model and training mode.

    Args:
        study: the runs, among which are those of the cell.
        model, train_mode: of the cell.
        test_digits: version of the test digits.
        paper: the paper's test errors on MNIST's shifted digits.
        settings: those in which the cell's runs differ from the study's.

    Raises:
        ValueError, OSError: as `Study.result` does.
    """

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
        published = paper and self.config.dataset == "mnist" and test_digits == "shifted"
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

    @property
    def p(self) -> float | None:
        """p-value of Welch's test against the paper's runs; None of fewer than `LEAST_RUNS`."""
        if self.paper is None or self.n < LEAST_RUNS:
            return None
        from scipy.stats import ttest_ind_from_stats  # importing it takes a second

        ours, published = (self.mean, self.std, self.n), (*self.paper, PAPER_RUNS)
        return float(ttest_ind_from_stats(*ours, *published, equal_var=False).pvalue)

    @property
    def differs(self) -> bool:
        """Whether the difference from the paper is significant."""
        return self.p is not None and self.p < SIGNIFICANCE

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.n > 1 else "") + f" ({self.n})"


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
    if not (study.results / "runs").is_dir():
        raise ValueError(f"there are no results in {study.results} (no folder runs)")
    models = list(dict.fromkeys(config.model for config in study.configs))
    train_modes = list(dict.fromkeys(config.train_mode for config in study.configs))
    digits, versions = study.configs[0].digits, study.configs[0].test_versions
    cells = [Cell(study, model, mode, version, paper, settings)
             for model in models for settings in ({}, *other_settings(study, model))
             for mode in train_modes for version in versions]
    if len(set().union(*(cell.hashes for cell in cells))) > 1:
        raise ValueError(f"the runs in {study.results / 'runs'} are on different npz files: "
                         "no table of them")
    if style == "csv":
        return _csv(cells)
    body = _markdown if style == "markdown" else _text
    parts = []
    for version in versions:
        shown = [cell for cell in cells if cell.test_digits == version]
        title = (f"Test error in % on {version} test digits ({digits}): "
                 "mean ± standard deviation (runs)")
        if any(cell.paper for cell in shown):
            title += f"; paper: {PAPER_RUNS} runs"
        parts += [title, body(_rows(shown, train_modes))]
    if any(cell.differs for cell in cells):
        star = "\\*" if style == "markdown" else "*"
        parts.append(f"{star} differs from the paper: Welch's test, p < {SIGNIFICANCE}")
    if any(cell.paper and 0 < cell.n < LEAST_RUNS for cell in cells):
        parts.append(f"Cells of fewer than {LEAST_RUNS} runs are not tested.")
    remarks = _remarks(study, [cell for cell in cells if cell.test_digits == versions[0]])
    return "\n\n".join(parts + remarks)


def other_settings(study: Study, model: str) -> list[dict]:
    """Settings in which finished runs of a model differ from the study's runs.

    Only runs that differ in sign_eps, in precision or in both count. Damaged results do not.
    """
    configs = [config for config in study.configs if config.model == model]
    paths, found = sorted((study.results / "runs").glob(f"*-{model}-*.json")), []
    for path in paths:
        with contextlib.suppress(ValueError):
            stored = read_result(path)["config"]
            settings = {name: stored[name] for name in ("sign_eps", "precision")
                        if stored[name] != getattr(configs[0], name)}
            if settings and settings not in found:
                if any(study.file(replace(config, **settings)) in paths for config in configs):
                    found.append(settings)
    return found


def _rows(cells: list[Cell], train_modes: list[str]) -> list[list[str]]:
    has_paper = any(cell.paper for cell in cells)
    rows = [["model"]]
    for mode in train_modes:
        rows[0] += [f"trained on {mode}"] + ["paper", "p"] * has_paper
    for name in dict.fromkeys(cell.row for cell in cells):
        row = [name]
        for cell in (cell for cell in cells if cell.row == name):
            row.append(str(cell) + " *" * cell.differs)
            if has_paper:
                row.append("{:.2f} ± {:.2f}".format(*cell.paper) if cell.paper else "")
                row.append("" if cell.p is None else f"{cell.p:.2g}")
        rows.append(row)
    return rows


def _text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _markdown(rows: list[list[str]]) -> str:
    head, *body = [[text.replace("*", "\\*") for text in row] for row in rows]
    lines = [head, ["---"] * len(head), *([f"`{name}`", *cells] for name, *cells in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(cells: list[Cell]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ("digits settings model train_mode test_digits n missing mean std "
               "paper_mean paper_std paper_n p differs")
    writer.writerow(columns.split())
    for cell in cells:
        settings = settings_not_in_paper(cell.config).items()
        paper = (*cell.paper, PAPER_RUNS) if cell.paper else (None,) * 3
        writer.writerow([
            cell.config.digits, " ".join(f"{name}={value}" for name, value in settings),
            cell.model, cell.train_mode, cell.test_digits, cell.n, len(cell.missing),
            cell.mean, cell.std, *paper, cell.p, "" if cell.p is None else int(cell.differs),
        ])
    return file.getvalue().rstrip("\n")


def _remarks(study: Study, cells: list[Cell]) -> list[str]:
    """What the table does not say: its settings, missing runs, runs that it does not show."""
    remarks, config = [], study.configs[0]
    settings = {"data": Path(config.data).name} if config.data else {}
    settings |= settings_not_in_paper(config)
    if settings:
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        remarks.append(f"Not the paper's protocol: {shown}")
    incomplete = [cell for cell in cells if cell.missing and not cell.settings]
    if incomplete:
        others = _runs_not_shown(study, cells)
        if others:
            remarks.append("Finished runs of other settings, which take their options to be "
                           f"shown: {others}")
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

    counts = Counter(settings(path.stem) for path in (study.results / "runs").glob("*.json"))
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
