"""Many runs in one results folder: which are finished, who trains the others, how far it is.

    results/runs/RUN.json       a finished run, as train.py's result.json
    results/table5.json         finished runs in one file, once `Study.pack` has moved them in
    results/logs/RUN/           its folder: log, weights, and the checkpoint until it is finished

Any number of processes, on any number of machines, may share a results folder. A process trains
a run while it holds the lock of the run's folder; if it dies, another process goes on with the run.
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from convert_mnist import SOURCES
from study.packed import FILE, has_curve, read_packed, write_packed
from train import Diverged, Run
from training.checkpoints import BadCheckpoint, read_result
from training.data import Data, find_data
from training.files import say, write_json
from training.options import RECIPES, REPORTING, Config
from training.run_folder import Busy

RESULTS = Path(__file__).resolve().parent.parent / "results"
OTHER_DEFAULTS = {"eval_freq": 0, "tensorboard": False}  # than train.py's
IN_EVERY_NAME = ("dataset", "model", "train_mode", "seed")


def settings_not_in_paper(config: Config) -> dict:
    """Settings that differ from the paper's, without those in the first part of a run's name.

    The settings of a recipe appear as ``{"recipe": name}``.
    """
    changed = config.settings_not_in_paper(IN_EVERY_NAME)
    for recipe, settings in RECIPES.items():
        if settings and settings.items() <= config.protocol().items():
            rest = {name: value for name, value in changed.items() if name not in settings}
            return {"recipe": recipe} | rest
    return changed


def run_name(config: Config) -> str:
    """The name of a run's files."""
    name = f"{config.digits}-{config.model}-{config.train_mode}-seed{config.seed}"
    changed = (f"-{name}_{value}" for name, value in settings_not_in_paper(config).items())
    return re.sub(r"[^\w.-]", "_", name + "".join(changed))


class Study:
    """Runs, and where their files are.

    Args:
        configs: of the runs.
        results: the results folder.
        bar: whether a run shows its progress on a terminal.
    """

    def __init__(self, configs: list[Config], results=RESULTS, bar: bool = True) -> None:
        self.configs, self.results, self.bar = configs, Path(results), bar
        self._packed = None

    def file(self, config: Config) -> Path:
        return self.results / "runs" / f"{run_name(config)}.json"

    def folder(self, config: Config) -> Path:
        return self.results / "logs" / run_name(config)

    def result(self, config: Config) -> dict | None:
        """The result of a finished run, None of another one.

        Raises:
            ValueError: naming the file, if it is damaged or of a run with other settings.
            OSError: if it cannot be read.
        """
        path = self.file(config)
        result = self.read(run_name(config))
        if result is None:
            return None
        for name, value in config.protocol().items():
            found = result["config"].get(name)
            if name not in REPORTING and found != value:
                raise ValueError(f"{path} is of a run with {name} {found}, not {value}: "
                                 "move it away")
        errors = result["test_error"] or {}
        if result["status"] != "finished" or not set(config.test_versions) <= set(errors):
            raise ValueError(f"{path} is not of a finished run: move it away")
        return result

    def stored(self) -> list[str]:
        """Names of all finished runs in the results folder, whatever their settings."""
        files = (path.stem for path in (self.results / "runs").glob("*.json"))
        return sorted({*files, *self.packed})

    def read(self, name: str) -> dict | None:
        """The result of a finished run by its name, None if there is none.

        Raises:
            ValueError, OSError: naming the file, if it is damaged or cannot be read.
        """
        # In this order: `pack` writes table5.json before it deletes the other file.
        with contextlib.suppress(FileNotFoundError):
            return _read_fresh(self.results / "runs" / f"{name}.json")
        return self.packed.get(name)

    @property
    def packed(self) -> dict[str, dict]:
        """Results in table5.json by name, read again if the file has changed."""
        path = self.results / FILE
        version = path.stat().st_mtime_ns if path.exists() else None
        if self._packed is None or self._packed[0] != version:
            self._packed = version, read_packed(path)
        return self._packed[1]

    def pack(self) -> str:
        """Move finished runs of any settings from runs/ into table5.json.

        A run that was tested before its last epoch keeps its file, with its training curve.

        Returns:
            What it did, in a sentence.

        Raises:
            ValueError, OSError: naming the file, for one that is damaged, cannot be read or
                written, or is another run of a name in table5.json. Then no run is moved.
        """
        if not self.results.is_dir():
            raise ValueError(f"there are no results in {self.results}")
        with locked(self.results / f".{FILE}.lock"):
            paths = sorted((self.results / "runs").glob("*.json"))
            fresh = {path: _read_fresh(path) for path in paths}
            fresh = {path: result for path, result in fresh.items()
                     if result["status"] == "finished" and not has_curve(result)}
            results = read_packed(self.results / FILE)
            for path, result in fresh.items():
                packed = result | {"epochs": result["epochs"][-1:]}  # without the curve
                if results.setdefault(path.stem, packed) != packed:
                    raise ValueError(f"{path} is not the run of that name in {FILE}: move it away")
            if fresh:
                write_packed(self.results / FILE, results)
            for path in fresh:  # if killed in here, the next call goes on
                path.unlink()
        runs = f"{len(fresh)} run{'s' * (len(fresh) != 1)}"
        return (f"moved {runs} into {self.results / FILE}, which has {len(results)} now; "
                f"{len(paths) - len(fresh)} keep their files, with their training curves")

    def finished(self) -> list[Config]:
        stored = set(self.stored())
        return [config for config in self.configs if run_name(config) in stored]

    def claim(self, config: Config, data: Data) -> Run | None:
        """A run that this process may train; no other process has it until it is closed.

        Returns:
            None if the run is finished or another process has it.

        Raises:
            Diverged: if the run has diverged before.
            BadCheckpoint: if the run cannot go on from its checkpoint.
            ValueError: if it is finished, but with other data; or as `Run` does.
            OSError: as `Run` does.
        """
        if result := self.result(config):
            if result["data"]["sha256"] != data.sha256:
                raise ValueError(f"{run_name(config)} in {self.results} is of a run on another "
                                 f"{data.file}: take another --results folder")
            return None
        try:
            run = Run(config, self.folder(config), data, verbose=False, bar=self.bar)
        except Busy:
            return None
        try:
            if not self._ended(run):
                return run
        except BaseException:
            run.close()
            raise
        run.close()
        return None

    def _ended(self, run: Run) -> bool:
        """Whether the run ended before this process had its lock. Raises Diverged if it diverged.

        A process that was killed after training may not have published the result: this does.
        """
        if self.read(run_name(run.config)):
            return True
        path = run.folder.path / "result.json"
        if not path.exists():
            return False
        stored, new = read_result(path), run.result
        ignored = dict.fromkeys(REPORTING)
        same_config = stored["config"] | ignored == new["config"] | ignored
        if not same_config or stored["data"] != new["data"]:
            return False
        if stored["status"] == "diverged":
            folder = run.folder.path
            raise Diverged(f"{stored.get('reason')} (to try it again, delete {folder})")
        # On a network file system, `file` may exist and not be visible yet: `publish` has deleted
        # the checkpoint, and the run stands at epoch 0.
        if stored["status"] == "finished" and not run.epoch:
            write_json(self.file(run.config), stored)
            return True
        return False

    def publish(self, run: Run) -> None:
        """Write a finished run's result to `file`, and delete the checkpoint."""
        write_json(self.file(run.config), run.result)
        (run.folder.path / "checkpoint.pt").unlink(missing_ok=True)


def _read_fresh(path) -> dict:
    """A result in runs/. Raises as `read_result` does, and says what to do."""
    try:
        return read_result(path)
    except ValueError as error:
        raise ValueError(f"{error}: move it away, and the run is trained again") from error


class Progress:
    """Prints finished runs, whichever process finished them, and the time left.

    Args:
        study: the runs.
        processes: how many train them.
        verbose: whether to print.
    """

    def __init__(self, study: Study, processes: int, verbose: bool) -> None:
        self.study, self.processes, self.verbose = study, processes, verbose
        self.failures: dict[Config, Exception] = {}
        self.reported = set(map(run_name, study.finished()))
        self.start, self.epochs = time.perf_counter(), 0
        self.epochs_of_current_run = 0
        if verbose:
            runs, finished = len(study.configs), len(self.reported)
            say(f"{runs} run{'s' * (runs != 1)}: {finished} finished, {runs - finished} to do")

    def begin(self, run: Run) -> None:
        """This process trains a run."""
        if self.verbose:
            start = f" from epoch {run.epoch + 1} on" if run.epoch else ""
            say(f"training {run_name(run.config)}{start}")

    def epoch(self) -> None:
        """This process has trained an epoch."""
        self.epochs += 1
        self.epochs_of_current_run += 1
        self.report()

    def fail(self, config: Config, error: Exception) -> None:
        """A run cannot be finished."""
        self.failures[config] = error
        if self.verbose:
            print(f"{run_name(config)}: {error}", file=sys.stderr, flush=True)

    def report(self) -> None:
        """Print every run that was finished since the last report."""
        for config in self.study.finished() if self.verbose else ():
            name = run_name(config)
            if name not in self.reported:
                self.reported.add(name)
                result = self.study.result(config)
                errors = ", ".join(f"{version} {result['test_error'][version]:.2f} %"
                                   for version in config.test_versions)
                say(f"[{len(self.reported)}/{len(self.study.configs)}] {name}: {errors} "
                    f"({result['seconds']:.0f} s){self._time_left()}")

    def _time_left(self) -> str:
        """As if all processes were as fast as this one."""
        epochs = sum(config.num_epochs for config in self.study.configs
                     if run_name(config) not in self.reported) - self.epochs_of_current_run
        if epochs <= 0 or not self.epochs:
            return ""
        seconds = (time.perf_counter() - self.start) / self.epochs
        minutes = epochs * seconds / self.processes / 60
        if minutes >= 90:
            return f", {minutes / 60:.1f} h left"
        return f", {minutes:.0f} min left" if minutes >= 1 else ", < 1 min left"


def train_what_is_left(study: Study, configs: Iterable[Config], data: Data,
                       progress: Progress) -> bool:
    """Train the runs that are neither finished nor claimed. One that fails stops no others.

    Returns:
        Whether there was anything to train.
    """
    worked = False
    for config in configs:
        if config in progress.failures:
            continue
        try:
            if (run := study.claim(config, data)) is None:
                continue
            worked = True
            with contextlib.closing(run):
                progress.begin(run)
                run.train(progress.epoch)
                study.publish(run)
        except (Diverged, BadCheckpoint) as error:
            progress.fail(config, error)
        progress.epochs_of_current_run = 0
        progress.report()
    return worked


def train_all(study: Study, data: Data, rank: int = 0,
              processes: int = 1) -> dict[Config, Exception]:
    """Work through this process's share of the runs, then take unclaimed runs.

    The first process returns when all runs are finished.

    Args:
        study: the runs.
        data: of all runs.
        rank, processes: the share is every `processes`-th run, from the one at `rank` on.

    Returns:
        Why runs failed, as far as this process knows. The first process knows all.
    """
    progress = Progress(study, processes, verbose=rank == 0)
    configs = [config for first in range(processes)
               for config in study.configs[(rank + first) % processes::processes]]
    while True:
        worked = train_what_is_left(study, configs, data, progress)
        finished = len(study.finished()) + len(progress.failures) >= len(configs)
        progress.report()
        if finished or rank and not worked:
            return progress.failures
        if not worked:
            time.sleep(1)  # other processes train the rest, and may die


def load_data(config: Config, device: torch.device) -> Data:
    """Load the digits of all runs. One process makes a missing npz, the others wait for it.

    Raises:
        ValueError, OSError: as `find_data` does.
        ImportError: if this system has no flock.
    """
    path = SOURCES[config.dataset].path
    if config.data is None and not path.exists():
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                return find_data(config, device)
        config = replace(config, mnist_root=None)
    return find_data(config, device)


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock of a file; the system releases it when the process dies."""
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(f"cannot lock {path}: {error.strerror or error}") from error
        yield
