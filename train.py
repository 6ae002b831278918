"""Train a model on Möbius strip digits and test it.

    python train.py --model mobius_regular                        # MNIST, trained on centered digits
    python train.py --model mobius_regular --dataset digits       # scikit-learn's digits, no network
    python train.py --model cnn_same_channels --train_mode shifted
    python train.py --resume logs/RUN                             # go on with a run that was stopped or killed
    python train.py --eval_only --checkpoint logs/RUN/checkpoint.pt

Every run has a folder of its own below --log_dir; `run_folder.py` says what is in it. Many runs: `reproduce.py`.

Source of the protocol: arXiv:2106.06020, Section 5.
"""

import argparse
import contextlib
import ctypes
import hashlib
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from importlib import metadata
from pathlib import Path
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from convert_mnist import LENGTH, SCALAR, SOURCES, CommandLine, Split, convert
from data_loader import batches, load_dataset
from deformation import LARGEST_SCALING, RandomDeformation
from fields import as_integer, isometry_action
from models import DROPOUT, MODELS, POOLINGS, build_model, count_parameters, has_sign_flip_fields
from muon import Muon
from run_events import RunEvents, summary_writer
from run_folder import (BadCheckpoint, Busy, RunFolder, checked_checkpoint, new_folder, read_checkpoint, read_result, read_weights,
                        say)

TRAIN_MODES = ("centered", "shifted")
TEST_MODES = ("shifted", "centered", "both")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adam", "muon")
LR_SCHEDULES = ("step", "cosine")
LARGEST_DEFORMATION = 2  # beyond, digits do not stay where they are, nor recognisable
EVAL_BATCH_SIZE = 500

LATEST = object()  # --resume without a folder
EVAL_OPTIONS = ("model", "pooling", "sign_eps", "test_mode", "dataset", "data", "mnist_root", "device")

# Settings that say where a run reads, writes and computes; all others say what.
PLACES = ("data", "mnist_root", "device", "log_dir", "tensorboard")
# Of the others, those that change what is told of a run, not its outcome.
REPORTING = ("eval_freq",)
# What the first line of a run's log tells.
TOLD = ("model", "train_mode", "dataset", "precision", "seed")


@dataclass(frozen=True)
class Config:
    """What defines a run; the defaults are the paper's protocol. Raises ValueError for a value that is not allowed.

    model: a name in `models.MODELS`.
    pooling: of `nn_layers.MobiusPool`.
    dropout: probability in the classifier.
    sign_eps: of `nn_layers.EquivNonlin`; 0 for a model without sign-flip fields.
    dataset: a name in `convert_mnist.SOURCES`; its npz is made where it is not there yet.
    data: path of an npz to use instead.
    mnist_root: folder with MNIST's files, for making the npz.
    train_mode, test_mode: which version of the digits to train and to test on.
    num_epochs: at least 1.
    batch_size: at least 2, for batch normalisation, and at most the number of training digits.
    optimizer: 'muon': `muon.Muon` for the kernels, Adam for the rest.
    weight_decay: with 'adam' L2, Adam's own, on all parameters; with 'muon' decoupled, on the kernels.
    lr_schedule: 'step': the learning rate lr is divided by lr_decay_factor after every lr_decay_period epochs (0: never);
        'cosine': it falls to 0 in half a wave. In the first warmup_epochs it rises to what it is after them.
    deformation, stroke_width, scaling: of training digits, at random; see `deformation.RandomDeformation`.
    label_smoothing: part of the target, in training, that is spread over all classes.
    eval_freq: test after every so many epochs (0: only at the end).
    seed: of initialisation, order and dropout.
    device: 'auto' is cuda where there is one.
    precision: of training; 'bf16' is automatic mixed precision. Tests are in float32, in which the networks are invariant.
    log_dir: where the run's folder shall be.
    tensorboard: whether to write its events.
    """

    model: str
    pooling: str = "fixed"
    dropout: float = DROPOUT
    sign_eps: float = 0.0
    train_mode: str = "centered"
    test_mode: str = "both"
    num_epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adam"
    weight_decay: float = 1e-6
    lr: float = 5e-3
    lr_decay_period: int = 4
    lr_decay_factor: float = 2
    lr_schedule: str = "step"
    warmup_epochs: int = 0
    deformation: float = 0.0
    stroke_width: float = 0.0
    scaling: float = 0.0
    label_smoothing: float = 0.0
    eval_freq: int = 1
    dataset: str = "mnist"
    data: str | None = None
    mnist_root: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    log_dir: str = "logs"
    tensorboard: bool = True

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        for name, allowed in (("model", MODELS), ("pooling", POOLINGS), ("train_mode", TRAIN_MODES), ("test_mode", TEST_MODES),
                              ("optimizer", OPTIMIZERS), ("lr_schedule", LR_SCHEDULES), ("dataset", SOURCES), ("device", DEVICES),
                              ("precision", PRECISIONS)):
            require(name, getattr(self, name) in list(allowed), f"one of {', '.join(allowed)}")
        for name in ("num_epochs", "batch_size", "lr_decay_period", "warmup_epochs", "eval_freq", "seed"):
            as_integer(getattr(self, name), name)
        for name in ("dropout", "sign_eps", "weight_decay", "lr", "lr_decay_factor", "deformation", "stroke_width", "scaling", "label_smoothing"):
            require(name, isinstance(getattr(self, name), (int, float)), "a number")
        for name in ("data", "mnist_root", "log_dir"):
            value = getattr(self, name)
            require(name, isinstance(value, str) and value != "" or value is None and name != "log_dir", "a path")
        require("mnist_root", self.mnist_root is None or SOURCES[self.dataset].from_mnist, f"left out with dataset {self.dataset}")
        require("num_epochs", self.num_epochs >= 1, "at least 1")
        require("batch_size", self.batch_size >= 2, "at least 2 (batch normalisation needs two)")
        require("dropout", 0 <= self.dropout < 1, "a number of at least 0 and below 1")
        require("sign_eps", 0 <= self.sign_eps < math.inf, "a finite number of at least 0")
        require("sign_eps", not self.sign_eps or has_sign_flip_fields(self.model), f"0 with {self.model}, which has no sign-flip fields")
        # Far beyond use, and early enough to keep Adam's step a float.
        require("weight_decay", 0 <= self.weight_decay < 1e30, "a number of at least 0 and below 1e30")
        require("lr", 0 < self.lr < 1e30, "a positive number below 1e30")
        require("lr_decay_period", self.lr_decay_period >= 0, "at least 0 (0: never)")
        require("lr_decay_factor", 1 <= self.lr_decay_factor < math.inf, "a number of at least 1")
        for name in ("lr_decay_period", "lr_decay_factor"):
            is_used = self.lr_schedule == "step"
            require(name, is_used or getattr(self, name) == DEFAULTS[name],
                    f"left out with lr_schedule {self.lr_schedule}, which recipe improved has too (--lr_schedule step uses it)")
        require("warmup_epochs", 0 <= self.warmup_epochs < self.num_epochs,
                f"at least 0 and below num_epochs {self.num_epochs} (recipe improved has 1: --warmup_epochs 0 takes it back)")
        require("deformation", 0 <= self.deformation <= LARGEST_DEFORMATION, f"a number of pixels, 0 … {LARGEST_DEFORMATION}")
        require("stroke_width", 0 <= self.stroke_width <= 1, "a number, 0 … 1")
        require("scaling", 0 <= self.scaling <= LARGEST_SCALING, f"a number, 0 … {LARGEST_SCALING}")
        require("label_smoothing", 0 <= self.label_smoothing < 1, "a number of at least 0 and below 1")
        require("eval_freq", self.eval_freq >= 0, "at least 0 (0: only at the end)")
        require("seed", 0 <= self.seed < 2**63, "0 … 2**63 - 1")

    def learning_rate(self, time: float) -> float:
        """After so many epochs, finished parts of one included: the whole schedule, so that it has no state."""
        if time < self.warmup_epochs:
            return self.learning_rate(self.warmup_epochs) * time / self.warmup_epochs
        if self.lr_schedule == "cosine":
            part = (time - self.warmup_epochs) / (self.num_epochs - self.warmup_epochs)
            return self.lr * (1 + math.cos(math.pi * part)) / 2
        decays = int(time) // self.lr_decay_period if self.lr_decay_period else 0
        return self.lr * (1 / self.lr_decay_factor) ** decays

    def protocol(self) -> dict:
        """What is computed: all settings but the `PLACES`."""
        return {name: value for name, value in asdict(self).items() if name not in PLACES}

    def changed_settings(self, told: tuple[str, ...]) -> dict:
        """Every setting that matters to the final errors and is not the paper's, but those that are `told` otherwise."""
        return {name: value for name, value in self.protocol().items() if name not in told + REPORTING and value != DEFAULTS[name]}

    def network(self) -> dict:
        """The settings of `models.build_model`."""
        return {"pooling": self.pooling, "dropout": self.dropout, "sign_eps": self.sign_eps}

    @property
    def digits(self) -> str:
        """A word for the digits, for names of files."""
        return Path(self.data).stem if self.data else self.dataset

    @property
    def test_versions(self) -> tuple[str, ...]:
        return ("shifted", "centered") if self.test_mode == "both" else (self.test_mode,)


def select_device(name: str) -> torch.device:
    """The device of a ``--device`` name. Raises ValueError for cuda where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; take --device cpu or auto")
    return torch.device(name)


def build_optimizer(config: Config, model: nn.Module, stacked: dict[str, Tensor] | None = None) -> torch.optim.Adam:
    """A new optimizer, of the model's parameters or of those that are `stacked`: see `Muon`."""
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        return Muon(model, **settings, stacked=stacked)
    return torch.optim.Adam(model.parameters() if stacked is None else stacked.values(), **settings)


class Data(NamedTuple):
    """file: name of the npz. sha256: of its bytes. splits: as `load_dataset` returns them."""

    file: str
    sha256: str
    splits: dict[str, Split]


def find_data(config: Config, device: torch.device) -> Data:
    """The data of a run, made first where they are the data set's own and not there yet.

    Raises:
        ValueError, OSError: with the way out, for an npz that cannot be read or made.
    """
    if config.data is not None:
        path, way_out = Path(config.data), "--data takes an npz as python convert_mnist.py makes it"
    else:
        path = SOURCES[config.dataset].path
        way_out = "delete it, and it is made anew"
        if not path.exists():
            print(f"making {path}", flush=True)
            convert(config.dataset, path, mnist_root=config.mnist_root)
        elif config.mnist_root is not None:
            print(f"{path} is there already: --mnist_root is not read", flush=True)
    try:
        splits = load_dataset(path, device)
        return Data(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), splits)
    except (ValueError, OSError) as error:
        raise type(error)(f"{error}; {way_out}") from error


def describe_environment(device: torch.device) -> dict:
    """Versions and hardware that a result depends on."""
    # torch's own word has its build, +cpu or +cu130, which the installed package's name may lack.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "numpy", "scikit-learn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, where it is the C library.

    Every step takes the same hundred megabytes again. Given back to the system in between, they fault in page by page
    each time: 10 to 15 % of a step on the CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, of which older versions have a limit
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Diverged(FloatingPointError):
    """The loss of `run` is not finite."""

    def __init__(self, message: str, run: "Run") -> None:
        super().__init__(message)
        self.run = run


class Run:
    """One training run: everything checked and loaded at construction, `train()` does the rest, `close()` lets its folder go.

    Args:
        config: what to train, and how.
        folder: None: a new one in `config.log_dir`. If there is a checkpoint in it, the run goes on from there, and its
            weights and metrics will be those of a run that was never stopped (on the CPU, with as many threads: bit for bit).
        data: of `find_data`, for who has them already.
        verbose: whether to print what is logged.
        bar: whether to show an epoch's progress, on a terminal.

    Raises:
        ValueError: for a device that is not there, or data that do not fit.
        BadCheckpoint: for a checkpoint that is damaged or of another run.
        OSError: for a file that cannot be read or a folder that cannot be written.
        Busy: if another process is at work in `folder`.
    """

    def __init__(self, config: Config, folder=None, data: Data | None = None, verbose: bool = True,
                 bar: bool = True) -> None:
        self.config, self.bar = config, bar
        self.device = select_device(config.device)
        data = data or find_data(config, self.device)
        self.training_set = data.splits[f"train_{config.train_mode}"]
        self.test_sets = {version: data.splits[f"test_{version}"] for version in config.test_versions}
        self.centered_test_set = data.splits["test_centered"]
        digits = len(self.training_set.labels)
        if config.batch_size > digits:
            raise ValueError(f"batch_size must be at most the {digits} training digits of {data.file}, got {config.batch_size}")

        if config.tensorboard:
            summary_writer()  # before a folder is made in vain
        if folder is None:
            folder = new_folder(config.log_dir, f"{config.digits}-{config.model}-{config.train_mode}-seed{config.seed}")
        self.folder, self.events = RunFolder(folder, verbose=verbose), None
        try:
            self._begin(data)
            # Under the folder's lock: nobody else moves the checkpoint on now.
            checkpoint = self.folder.path / "checkpoint.pt"
            if checkpoint.exists():
                self._restore(read_checkpoint(checkpoint), checkpoint)
        except BaseException:
            self.close()
            raise

    def _begin(self, data: Data) -> None:
        """Put the run where its first epoch starts."""
        config = self.config
        torch.manual_seed(config.seed)
        self.order = torch.Generator().manual_seed(config.seed)
        # Initialised on the CPU, a seed means the same weights on every device.
        self.model = build_model(config.model, **config.network()).to(self.device)
        self.random = self.global_random_states()
        self.optimizer = build_optimizer(config, self.model)
        self.steps = len(self.training_set.labels) // config.batch_size  # of an epoch
        amounts = config.deformation, config.stroke_width, config.scaling
        self.deform = RandomDeformation(*amounts, device=self.device) if any(amounts) else None
        self.result = {
            "status": "running",
            "config": config.protocol(),
            "parameters": count_parameters(self.model),
            "data": {
                "file": data.file,
                "sha256": data.sha256,
                "train_digits": len(self.training_set.labels),
                "test_digits": len(next(iter(self.test_sets.values())).labels),
            },
            "environment": describe_environment(self.device),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
            "epochs": [],
            "test_error": None,
        }

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return len(self.result["epochs"])

    @property
    def finished(self) -> bool:
        return self.epoch == self.config.num_epochs

    def close(self) -> None:
        self.folder.close()
        if self.events:
            self.events.close()

    def train(self, after_epoch: Callable[[], None] = lambda: None) -> dict:
        """Train and test, write the run's files, and return the result as it stands in result.json.

        Whatever ends the run, its files have every finished epoch.

        Args:
            after_epoch: called after each.

        Raises:
            Diverged: at the first step whose loss is not finite, or after an epoch with such a test loss.
            OSError: if the folder cannot be written any more.
        """
        if self.finished:
            self.folder.save(self.checkpoint())  # a kill may have come before all files were those of the checkpoint
            if self.folder.verbose:
                say(f"finished already: test error {self._format_errors(self.result['epochs'][-1])}  ({self.folder.path})")
            return self.result
        with self.reporting():
            while not self.finished:
                start = time.perf_counter()
                self.finish_epoch(*self._train_epoch(), start)
                after_epoch()
        return self.result

    @contextlib.contextmanager
    def reporting(self):
        """Say what run this is, and how it ended; what ended it is raised on."""
        config, folder, result = self.config, self.folder, self.result
        folder.say(
            f"{config.model} ({result['parameters']:,} parameters) on {result['data']['train_digits']:,} {config.train_mode} "
            f"digits of {result['data']['file']}, {result['environment']['device']}, {config.precision}, seed {config.seed}"
        )
        changed = config.changed_settings(TOLD)
        if changed:
            folder.say("not the paper's protocol: " + ", ".join(f"{name} {value}" for name, value in changed.items()))
        try:
            if self.epoch:
                folder.say(f"continued after epoch {self.epoch} of {config.num_epochs}")
                if describe_environment(self.device) != result["environment"]:
                    folder.say("not with the versions, hardware and threads of its beginning: rounding may differ")
                folder.save(self.checkpoint())  # as in `train`
            else:
                folder.save_result(result)
            if config.tensorboard:
                self._begin_events()
            yield
            folder.say(f"test error: {self._format_errors(result['epochs'][-1])}  ({result['seconds']:.0f} s, {folder.path})")
            if config.tensorboard:
                self._end_events()
        except KeyboardInterrupt:
            self.stop("interrupted")
            raise
        except Exception as error:
            diverged = isinstance(error, Diverged) and error.run is self
            self.stop("diverged" if diverged else "failed", str(error) or type(error).__name__)
            raise

    def finish_epoch(self, train_loss: float, train_error: float, start: float) -> None:
        """Test where it is time, save and report an epoch that began at `start` of `time.perf_counter`.

        Raises:
            Diverged: for a test loss that is not finite.
            OSError: if the folder cannot be written any more.
        """
        config, result, epoch = self.config, self.result, self.epoch + 1
        record = {"epoch": epoch, "lr": config.learning_rate(epoch - 0.5), "train_loss": train_loss, "train_error": train_error}
        if epoch == config.num_epochs or (config.eval_freq and epoch % config.eval_freq == 0):
            for version, test_set in self.test_sets.items():
                loss, error = evaluate(self.model, test_set)
                # The last step of an epoch can be the one that spoils the weights.
                if not math.isfinite(loss):
                    raise Diverged(
                        f"the loss on {version} test digits is {loss} after step {self.steps} of {self.steps} "
                        f"in epoch {epoch}: a lower --lr may help", self
                    )
                record[f"test_loss_{version}"], record[f"test_error_{version}"] = loss, error
        record["seconds"] = time.perf_counter() - start
        result["epochs"].append(record)
        result["seconds"] += record["seconds"]
        if self.finished:
            result["status"] = "finished"
            result["test_error"] = {version: record[f"test_error_{version}"] for version in self.test_sets}
        # Saved before it is told: an epoch that was seen on the terminal is in the files.
        self.folder.save(self.checkpoint())
        self._report(record)

    def checkpoint(self) -> dict:
        """All that the rest of the run depends on, as of the last finished epoch."""
        return {
            "config": asdict(self.config),
            "data": self.result["data"],
            "device": self.device.type,
            "model": {name: value.cpu() for name, value in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "random": self.random | {"order": self.order.get_state()},
            "result": self.result,
        }

    def _restore(self, checkpoint: dict, path: Path) -> None:
        """Put the run where the checkpoint is. `path` names it in errors."""
        theirs = DEFAULTS | checkpoint["config"]  # what it does not know had its default
        for name, value in self.config.protocol().items():
            if name not in REPORTING and theirs.get(name) != value:
                raise BadCheckpoint(f"{path} is of a run with {name} {theirs.get(name)}, not {value}: it goes on only as it began")
        if checkpoint["data"].get("sha256") != self.result["data"]["sha256"]:
            raise BadCheckpoint(f"{path} is of a run on another {checkpoint['data'].get('file')} than {self.result['data']['file']} is now")
        if checkpoint["device"] != self.device.type:
            raise BadCheckpoint(f"{path} is of a run on {checkpoint['device']}: it goes on only there (--device {checkpoint['device']})")
        began = self.result
        try:
            self.model.load_state_dict(checkpoint["model"])
            # Its settings are those of the configuration; only what it has gathered comes from the file.
            state = checkpoint["optimizer"]["state"]
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            for i, parameter in enumerate(self.model.parameters()):
                moments = ["exp_avg"] if parameter in getattr(self.optimizer, "kernels", ()) else ["exp_avg", "exp_avg_sq"]
                if any(state[i][name].shape != parameter.shape for name in moments) or state[i]["step"].ndim:
                    raise ValueError("shapes of the optimizer's state")
            self.random = {name: state for name, state in checkpoint["random"].items() if name != "order"}
            self.order.set_state(checkpoint["random"]["order"])
            self.set_global_random_states()
            self.result = checkpoint["result"] | {"config": self.config.protocol()}
            if not 1 <= self.epoch <= self.config.num_epochs:
                raise ValueError(f"{self.epoch} epochs")
            if any(not {"lr", "train_loss", "train_error", "seconds"} <= set(record) for record in self.result["epochs"]):
                raise ValueError("records of the epochs")
            if self.finished and set(self.result["test_error"]) != set(self.test_sets):
                raise ValueError("test errors")
            if not self.finished:
                self.result["resumed"] = [*self.result.get("resumed", []), {"after_epoch": self.epoch, "environment": began["environment"]}]
        except Exception as error:  # a well-formed file may hold anything
            reason = " ".join(str(error).split())[:200]
            raise BadCheckpoint(f"{path} does not fit its own configuration ({reason}): delete it, and the run begins anew") from error

    def global_random_states(self) -> dict[str, Tensor]:
        """Of the generators that dropout draws from."""
        states = {"cpu": torch.get_rng_state()}
        return states | {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else states

    def set_global_random_states(self) -> None:
        torch.set_rng_state(self.random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random["cuda"], self.device)

    def _train_epoch(self) -> tuple[float, float]:
        """One pass over the training set. Returns the mean loss and the error in %, both in training mode."""
        config = self.config
        self.set_global_random_states()
        self.model.train()
        losses = torch.zeros(self.steps, device=self.device)
        wrong = torch.zeros((), dtype=torch.long, device=self.device)
        for step, (images, labels) in enumerate(self.progress(batches(self.training_set, config.batch_size, self.order))):
            self.set_learning_rate(self.optimizer, step)
            if self.deform:
                images = self.deform(images, self.deform.draw(len(images), self.order))
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = self.model(images)
                loss = cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            loss.backward()
            self.optimizer.step()
            losses[step] = loss.detach()
            wrong += (logits.argmax(1) != labels).sum()
            # To look at a loss on a GPU means to wait for it: there, once an epoch is enough.
            if self.device.type == "cpu" or step == self.steps - 1:
                self.check_finite(losses[:step + 1])
        self.random = self.global_random_states()
        return losses.mean().item(), 100 * wrong.item() / (self.steps * config.batch_size)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Of the step with this number, from 0, in the running epoch; taken in the step's middle."""
        optimizer.param_groups[0]["lr"] = self.config.learning_rate(self.epoch + (step + 0.5) / self.steps)

    def progress(self, steps: Iterable, seeds: str = "") -> Iterable:
        """The steps of an epoch, counted on the terminal."""
        config = self.config
        name = "" if self.folder.verbose else f"{config.model} trained on {config.train_mode}, seed {seeds or config.seed}, "
        return tqdm(steps, desc=f"{name}epoch {self.epoch + 1}/{config.num_epochs}", total=self.steps, leave=False,
                    disable=None if self.bar else True)

    def check_finite(self, losses: Tensor) -> None:
        """Raises Diverged naming the first of this epoch's losses that is not finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            raise Diverged(
                f"the loss is {losses[step].item()} at step {step + 1} of {self.steps} in epoch {self.epoch + 1}: "
                "a lower --lr may help", self
            )

    def _format_errors(self, record: dict) -> str:
        return ", ".join(
            f"{version} {record[f'test_error_{version}']:.2f} %" for version in self.test_sets if f"test_error_{version}" in record
        )

    def _report(self, record: dict) -> None:
        line = (
            f"epoch {record['epoch']:2}/{self.config.num_epochs}  loss {record['train_loss']:.4f}  "
            f"train error {record['train_error']:5.2f} %  "
        )
        errors = self._format_errors(record)
        if errors:
            line += f"test error {errors}  "
        self.folder.say(f"{line}{record['seconds']:.1f} s")
        if self.events:
            self._write_scalars(record)
            self.events.kernels(self.model, record["epoch"])

    def _begin_events(self) -> None:
        self.events = RunEvents(self.folder.path, self.epoch)
        for record in self.result["epochs"]:
            self._write_scalars(record)
        if not self.events.continued:
            self.events.digits(f"{self.config.train_mode} training", self.training_set)
            for version, test_set in self.test_sets.items():
                self.events.digits(f"{version} test", test_set)
        self.events.kernels(self.model, self.epoch)

    def _write_scalars(self, record: dict) -> None:
        tags = {"lr": "lr", "train_loss": "loss/train", "train_error": "error/train"}
        for version in self.test_sets:
            tags |= {f"test_{kind}_{version}": f"{kind}/test_{version}" for kind in ("loss", "error")}
        self.events.scalars({tags[key]: value for key, value in record.items() if key in tags}, record["epoch"])

    def _end_events(self) -> None:
        config, events = self.config, self.events
        for version, test_set in self.test_sets.items():
            events.misclassified(version, test_set, predict(self.model, test_set.images), self.epoch)
        # To move all by all isometries would take too long.
        images, labels = (part[:max(50, len(part) // 50)] for part in self.centered_test_set)
        errors = 100 * (predict_at_every_shift(self.model, images) != labels).double().mean(1)
        row = {"model": config.model, "settings": config.changed_settings(TOLD), "train_mode": config.train_mode, "errors": errors.tolist()}
        events.error_against_shift(row, len(labels), self.epoch)
        events.hyperparameters({name: v for name, v in asdict(config).items() if v is not None}, self.result["test_error"])

    def stop(self, status: str, reason: str | None = None) -> None:
        """Log and write down why the run ends before its time."""
        if not self.finished:  # it is while its last pictures are drawn
            self.result |= {"status": status} | ({"reason": reason} if reason else {})
        line = f"{status} after {len(self.result['epochs'])} of {self.config.num_epochs} epochs"
        with contextlib.suppress(OSError):  # a full disk: what was saved before stays, and the cause is reported
            self.folder.save_result(self.result)
            if reason:  # told by whoever catches the error
                self.folder.log(f"{line}: {reason}")
            else:
                self.folder.say(f"{line}  ({self.folder.path})")


def cross_entropy(logits: Tensor, labels: Tensor, **options) -> Tensor:
    """In float32 at least, whatever autocast made of the logits; `options` are those of the function in torch."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, **options)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and error in % of a model on a split that lives on its device. The model is left in eval mode."""
    model.eval()
    device = split.images.device
    loss = torch.zeros((), device=device)
    wrong = torch.zeros((), dtype=torch.long, device=device)
    for images, labels in batches(split, EVAL_BATCH_SIZE):
        logits = model(images)
        loss += cross_entropy(logits, labels, reduction="sum")
        wrong += (logits.argmax(1) != labels).sum()
    n = len(split.labels)
    return loss.item() / n, 100 * wrong.item() / n


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Classes of images, int64 (n,). The model is left in eval mode."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(EVAL_BATCH_SIZE)])


def predict_at_every_shift(model: nn.Module, images: Tensor) -> Tensor:
    """Classes that a model predicts for images moved by each of the strip's 2L isometries, int64 (2L, n).

    The model is left in eval mode.
    """
    return torch.stack([predict(model, isometry_action(images, shift, SCALAR)) for shift in range(2 * LENGTH)])


DEFAULTS = {field.name: field.default for field in dataclass_fields(Config) if field.name != "model"}

def with_defaults(protocol: dict) -> dict:
    """A stored `Config.protocol`, of an earlier version perhaps: what it did not know had its default."""
    return {name: value for name, value in DEFAULTS.items() if name not in PLACES} | protocol


# Settings under one name, for --recipe.
RECIPES = {
    "paper": {},
    "improved": {
        "pooling": "polyphase", "dropout": 0.1, "batch_size": 64,
        "optimizer": "muon", "lr": 3e-3, "lr_schedule": "cosine", "warmup_epochs": 1,
        "deformation": 0.5, "stroke_width": 0.35, "scaling": 0.15, "label_smoothing": 0.1,
    },
}


def follow_recipe(options: dict) -> dict:
    """Options with a recipe's settings for what is not among them, in place of its name. Raises ValueError for another name."""
    options = dict(options)
    recipe = options.pop("recipe", "paper")
    if recipe not in list(RECIPES):
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe] | options


def add_train_options(parser: CommandLine, *left_out: str, **other_defaults) -> None:
    """An option for each field of `Config` but those `left_out`. What is not given is not in the parsed options."""
    defaults = {"model": None} | DEFAULTS | other_defaults

    def add(name, text, **kwargs):
        if name not in left_out:
            if defaults[name] is not None:
                shown = ("off", "on")[defaults[name]] if name == "tensorboard" else defaults[name]
                text += f" ({shown})"
            parser.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **kwargs)

    parser.add_argument(
        "--recipe", choices=RECIPES, default=argparse.SUPPRESS,
        help="other defaults for some of the options below (paper); " + "; ".join(
            f"{recipe}: " + " ".join(f"--{name} {value}" for name, value in settings.items())
            for recipe, settings in RECIPES.items() if settings
        ),
    )
    add("model", "one of the seven", choices=MODELS, metavar="{" + ",".join(MODELS) + "}")
    add("pooling", "grid of the pooling windows: as published, or chosen by the data", choices=POOLINGS)
    add("dropout", "probability in the classifier", type=float, metavar="P")
    add("sign_eps", "sign-flip fields: x / (|x| + X) in place of sign(x); the published runs had 1e-8", type=float, metavar="X")
    add("train_mode", "version of the training digits", choices=TRAIN_MODES)
    add("test_mode", "version of the test digits", choices=TEST_MODES)
    add("num_epochs", "passes over the training set", type=int, metavar="N")
    add("batch_size", "digits in a step", type=int, metavar="N")
    add("optimizer", "muon: with orthogonalized momentum, for the kernels", choices=OPTIMIZERS)
    add("weight_decay", "L2 penalty on all parameters; with --optimizer muon decoupled, of the kernels only", type=float, metavar="X")
    add("lr", "learning rate", type=float, metavar="X")
    add("lr_decay_period", "divide the learning rate after every N epochs, 0: never", type=int, metavar="N")
    add("lr_decay_factor", "by this", type=float, metavar="X")
    add("lr_schedule", "of the learning rate: down by steps, or as a cosine to 0", choices=LR_SCHEDULES)
    add("warmup_epochs", "epochs in which the learning rate rises first", type=int, metavar="N")
    add("deformation", "strength of random deformations of training digits, in pixels (root mean square), 0 to 2", type=float, metavar="X")
    add("stroke_width", "by how much strokes of training digits are thickened or thinned at random, 0 to 1", type=float, metavar="X")
    add("scaling", "by how much training digits are made larger or smaller at random, as a standard deviation (0.1: by a tenth), 0 to 0.3",
        type=float, metavar="X")
    add("label_smoothing", "part of the target that is spread over all classes, in training", type=float, metavar="X")
    add("eval_freq", "test after every N epochs, 0: only at the end", type=int, metavar="N")
    add("dataset", "digits; where their npz is not in data/ yet, it is made", choices=SOURCES)
    add("data", "an npz to use instead", metavar="FILE")
    add("mnist_root", "folder with MNIST's four files, for making the npz; without it they are downloaded", metavar="FOLDER")
    add("seed", "of initialisation, order and dropout", type=int, metavar="N")
    add("device", "auto is cuda where there is one", choices=DEVICES)
    add("precision", "of training; bf16: automatic mixed precision", choices=PRECISIONS)
    add("log_dir", "the run's folder is made in it", metavar="FOLDER")
    add("tensorboard", "write TensorBoard events or not", action=argparse.BooleanOptionalAction)


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add_train_options(parser)
    parser.add_argument(
        "--resume", nargs="?", const=LATEST, metavar="RUN",
        help="go on with the run in this folder; without a folder, with the latest run of these options in --log_dir, or begin one",
    )
    parser.add_argument("--eval_only", action="store_true", help="test the network of --checkpoint, train nothing")
    parser.add_argument("--checkpoint", metavar="FILE", help="checkpoint.pt of a run, or its folder, or weights of a --model")
    return parser


def resumed_run(source, options: dict) -> Run:
    """The run that --resume names, ready to go on.

    Args:
        source: a run's folder, or the checkpoint.pt in it; or `LATEST`.
        options: what was given on the command line.

    Raises:
        ValueError, OSError, Busy: as `Run` does; and if there is no checkpoint, or an option contradicts it.
    """
    if source is LATEST:
        return _latest_run(Config(**options))
    path = Path(source)
    if not path.is_file():
        if source == "" or not path.is_dir():
            raise ValueError(f"--resume {source or repr('')}: there is no such folder")
        result, path = path / "result.json", path / "checkpoint.pt"
        if not path.is_file() and result.exists() and read_result(result)["status"] == "finished":
            raise ValueError(f"the run in {source} is finished, and its checkpoint deleted: there is nothing to go on with")
        if not path.is_file():
            raise ValueError(f"--resume {source}: there is no checkpoint in it (one is written after each epoch); start the run anew")
    elif path.name != "checkpoint.pt":
        raise ValueError(f"--resume takes a run's folder or the checkpoint.pt in it, got {source}")
    checkpoint = read_checkpoint(path)
    config = _config_of(checkpoint, path, {"device": checkpoint["device"]} | options)
    return Run(config, folder=path.parent)


def _config_of(checkpoint: dict, path: Path, options: dict) -> Config:
    """A checkpoint's configuration, with the options given instead of its own."""
    try:
        return Config(**checkpoint["config"] | options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration in {path}, with the options given: {error}") from error


def runs_of(config: Config, data: Data) -> dict[str, list[Path]]:
    """Folders in log_dir with a checkpoint of this configuration on these data, 'stopped' and 'finished' ones, the latest last."""
    paths = {"stopped": [], "finished": []}
    for path in Path(config.log_dir).glob("*/result.json"):
        with contextlib.suppress(ValueError, OSError):  # some other run's, damaged
            result = read_result(path)
            same = with_defaults(result["config"]) == config.protocol() and result["data"]["sha256"] == data.sha256
            if same and path.with_name("checkpoint.pt").exists():
                paths["finished" if result["status"] == "finished" else "stopped"].append(path)
    return {status: [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)] for status, found in paths.items()}


def _latest_run(config: Config) -> Run:
    data = find_data(config, select_device(config.device))
    for folders in runs_of(config, data).values():
        if folders:
            return Run(config, folders[-1], data)
    say(f"no run of these options in {config.log_dir} yet: this is the first")
    return Run(config, data=data)


def trained_model(config: Config, weights: dict, file) -> nn.Module:
    """The model of a run with the weights that `file` holds. Raises ValueError naming it if they do not fit."""
    model = build_model(config.model, **config.network())
    try:
        model.load_state_dict(weights)
    except Exception as error:  # a well-formed file may hold anything
        raise ValueError(f"{file} does not hold the weights of {config.model}") from error
    return model


def evaluate_checkpoint(file, options: dict) -> str:
    """A line with the test errors of the network in `file`, a checkpoint.pt or a model's weights.

    Raises:
        ValueError, OSError: for a file, an option or data that do not fit.
    """
    superfluous = sorted(set(options) - set(EVAL_OPTIONS))
    if superfluous:
        raise ValueError(f"--eval_only does not train: leave out {', '.join(f'--{name}' for name in superfluous)}")
    if file is None:
        raise ValueError("--eval_only takes a --checkpoint FILE")
    if "dataset" in options:
        options = {"data": None, "mnist_root": None} | options
    model, config, trained = load_network(file, options)
    device = select_device(config.device)
    data = find_data(config, device)
    model.to(device)
    errors = []
    for version in config.test_versions:
        split = data.splits[f"test_{version}"]
        errors.append(f"{version} {evaluate(model, split)[1]:.2f} %")
    smoothed = f", sign_eps {config.sign_eps}" if config.sign_eps else ""
    network = f"{config.model}, {config.pooling} pooling{smoothed}{trained}"
    return f"{network}, {len(split.labels):,} test digits of {data.file}: test error {', '.join(errors)}"


def load_network(file, options: dict) -> tuple[nn.Module, Config, str]:
    """A trained network, its configuration, and after how many epochs that was, in words where the file tells.

    Args:
        file: a checkpoint.pt, a model's weights, or a run's folder with one of them.
        options: what is to be otherwise than in the file; of weights that lie in no run's folder, what they do not tell.

    Raises:
        ValueError, OSError: for a file or an option that do not fit.
    """
    if Path(file).is_dir():
        folder, file = Path(file), Path(file) / "checkpoint.pt"
        if not file.exists() and (folder / "weights.pt").exists():  # of a finished run of reproduce.py, they are left
            file = folder / "weights.pt"
    weights, told = read_weights(file), {}
    checkpoint = checked_checkpoint(weights, file) if "format" in weights else None
    if checkpoint is not None:
        told = checkpoint["config"]
    else:
        with contextlib.suppress(ValueError, OSError):  # in a run's folder, its result tells
            told = with_defaults(read_result(Path(file).with_name("result.json"))["config"])
    if "model" not in told | options:
        raise ValueError(f"{file} holds weights alone: say of which --model")
    if "model" in told and options.get("model", told["model"]) != told["model"]:
        raise ValueError(f"{file} holds a {told['model']}, not a {options['model']}")
    if checkpoint is None:
        config = Config(**{name: told[name] for name in EVAL_OPTIONS if name in told} | options)
        return trained_model(config, weights, file), config, ""
    config = _config_of(checkpoint, file, {"device": "auto"} | options)
    return trained_model(config, checkpoint["model"], file), config, f" after {len(checkpoint['result'].get('epochs', []))} epochs"


def main(argv=None) -> None:
    parser = command_line()
    options = vars(parser.parse_args(argv))
    resume, eval_only, checkpoint = (options.pop(name) for name in ("resume", "eval_only", "checkpoint"))
    if "model" not in options and not eval_only and (resume is None or resume is LATEST):
        parser.error("the following arguments are required: --model")
    if resume not in (None, LATEST) and "recipe" in options:
        parser.error("--resume RUN goes on with that run's settings: leave out --recipe")
    if eval_only and resume is not None or checkpoint is not None and not eval_only:
        parser.error("--checkpoint goes with --eval_only, and --resume without it")
    keep_freed_memory()
    try:
        if eval_only:
            return say(evaluate_checkpoint(checkpoint, options))
        options = follow_recipe(options)
        run = Run(Config(**options)) if resume is None else resumed_run(resume, options)
    except (ValueError, OSError, Busy) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        with contextlib.closing(run):
            run.train()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(error)
    except FloatingPointError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
