"""Train a model on Möbius strip digits and test it.

    python train.py --model mobius_regular                        # MNIST, trained on centered digits
    python train.py --model mobius_regular --dataset digits       # scikit-learn's digits, no network
    python train.py --model cnn_same_channels --train_mode shifted

Every run has a folder of its own below --log_dir:

    log.txt         what the terminal shows
    result.json     configuration, versions and hardware, every epoch, the final test errors
    weights.pt      state_dict after the last finished epoch
    events.*        TensorBoard: tensorboard --logdir logs

Source of the protocol: arXiv:2106.06020, Section 5.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from convert_mnist import SOURCES, CommandLine, Split, convert, write_atomically
from data_loader import batches, load_dataset
from fields import as_integer
from models import MODELS, build_model, count_parameters

TRAIN_MODES = ("centered", "shifted")
TEST_MODES = ("shifted", "centered", "both")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
EVAL_BATCH_SIZE = 500


@dataclass(frozen=True)
class Config:
    """What defines a run; the defaults are the paper's protocol. Raises ValueError for a value that is not allowed.

    model: a name in `models.MODELS`.
    dataset: a name in `convert_mnist.SOURCES`; its npz is made where it is not there yet.
    data: path of an npz to use instead.
    mnist_root: folder with MNIST's files, for making the npz.
    train_mode, test_mode: which version of the digits to train and to test on.
    num_epochs: at least 1.
    batch_size: at least 2, for batch normalisation, and at most the number of training digits.
    weight_decay: L2, Adam's own, on all parameters.
    lr, lr_decay_period, lr_decay_factor: the learning rate is divided by the factor after every so many epochs (0: never).
    eval_freq: test after every so many epochs (0: only at the end).
    seed: of initialisation, order and dropout.
    device: 'auto' is cuda where there is one.
    precision: 'bf16' is automatic mixed precision.
    log_dir: where the run's folder shall be.
    tensorboard: whether to write its events.
    """

    model: str
    train_mode: str = "centered"
    test_mode: str = "both"
    num_epochs: int = 20
    batch_size: int = 128
    weight_decay: float = 1e-6
    lr: float = 5e-3
    lr_decay_period: int = 4
    lr_decay_factor: float = 2
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

        for name, allowed in (("model", MODELS), ("train_mode", TRAIN_MODES), ("test_mode", TEST_MODES),
                              ("dataset", SOURCES), ("device", DEVICES), ("precision", PRECISIONS)):
            require(name, getattr(self, name) in list(allowed), f"one of {', '.join(allowed)}")
        for name in ("num_epochs", "batch_size", "lr_decay_period", "eval_freq", "seed"):
            as_integer(getattr(self, name), name)
        for name in ("weight_decay", "lr", "lr_decay_factor"):
            require(name, isinstance(getattr(self, name), (int, float)), "a number")
        for name in ("data", "mnist_root", "log_dir"):
            require(name, getattr(self, name) != "", "a path")
        require("mnist_root", self.mnist_root is None or self.dataset == "mnist", f"left out with dataset {self.dataset}")
        require("num_epochs", self.num_epochs >= 1, "at least 1")
        require("batch_size", self.batch_size >= 2, "at least 2 (batch normalisation needs two)")
        # Far beyond use, and early enough to keep Adam's step a float.
        require("weight_decay", 0 <= self.weight_decay < 1e30, "a number of at least 0 and below 1e30")
        require("lr", 0 < self.lr < 1e30, "a positive number below 1e30")
        require("lr_decay_period", self.lr_decay_period >= 0, "at least 0 (0: never)")
        require("lr_decay_factor", 1 <= self.lr_decay_factor < math.inf, "a number of at least 1")
        require("eval_freq", self.eval_freq >= 0, "at least 0 (0: only at the end)")
        require("seed", 0 <= self.seed < 2**63, "0 … 2**63 - 1")

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


def find_data(config: Config, device: torch.device) -> tuple[Path, dict[str, Split]]:
    """The npz of a run and what is in it, made first where it is the data set's own and not there yet.

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
        return path, load_dataset(path, device)
    except (ValueError, OSError) as error:
        raise type(error)(f"{error}; {way_out}") from error


def describe_environment(device: torch.device) -> dict:
    """Versions and hardware that a result depends on."""
    # torch's own word has its build, +cpu or +cu130, which the installed package's name may lack.
    versions = {"python": platform.python_version(), "torch": torch.__version__}
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


class RunFolder:
    """The files of a run: log, result, weights and TensorBoard events.

    Raises:
        OSError: if the folder cannot be made.
        ValueError: if TensorBoard is wanted and not installed.
    """

    def __init__(self, config: Config) -> None:
        if config.tensorboard:
            # Here, not at the head: it takes seconds, and -h and --no-tensorboard do without.
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"TensorBoard is not installed ({error}): take --no-tensorboard") from error
        digits = Path(config.data).stem if config.data else config.dataset
        stem = f"{digits}-{config.model}-{config.train_mode}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.path = self._new_folder(Path(config.log_dir), re.sub(r"[^\w.-]", "_", stem))
        self._log = open(self.path / "log.txt", "w", encoding="utf-8")
        self._writer = SummaryWriter(self.path) if config.tensorboard else None

    @staticmethod
    def _new_folder(log_dir: Path, stem: str) -> Path:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            for name in (stem, *(f"{stem}-{i}" for i in range(2, 1000))):  # runs begun in the same second
                try:
                    (log_dir / name).mkdir()
                    return log_dir / name
                except FileExistsError:
                    continue
            raise OSError("no free name left")
        except OSError as error:
            reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
            raise OSError(f"cannot make a folder in --log_dir {log_dir}: {reason}") from error

    def log(self, line: str) -> None:
        print(line, file=self._log, flush=True)

    def say(self, line: str) -> None:
        self.log(line)
        try:
            print(line, flush=True)
        except BrokenPipeError:  # nobody reads on (| head): no reason to stop training
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        if self._writer:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, epoch)
            self._writer.flush()

    def hyperparameters(self, config: Config, errors: dict[str, float]) -> None:
        if self._writer:
            settings = {name: value for name, value in asdict(config).items() if value is not None}
            metrics = {f"final_error/{version}": error for version, error in errors.items()}
            self._writer.add_hparams(settings, metrics, run_name=".")

    def save(self, result: dict, model: nn.Module) -> None:
        with write_atomically(self.path / "weights.pt") as file:
            torch.save({name: value.cpu() for name, value in model.state_dict().items()}, file)
        self.save_result(result)

    def save_result(self, result: dict) -> None:
        with write_atomically(self.path / "result.json") as file:
            file.write((json.dumps(result, indent=2, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._log.close()
        if self._writer:
            self._writer.close()


class Run:
    """One training run: everything checked and loaded at construction, `train()` does the rest.

    Raises:
        ValueError: for a device that is not there, or data that do not fit.
        OSError: for a file that cannot be read or a folder that cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = select_device(config.device)
        data_path, dataset = find_data(config, self.device)
        self.training_set = dataset[f"train_{config.train_mode}"]
        self.test_sets = {version: dataset[f"test_{version}"] for version in config.test_versions}
        digits = len(self.training_set.labels)
        if config.batch_size > digits:
            raise ValueError(f"batch_size must be at most the {digits} training digits of {data_path}, got {config.batch_size}")

        torch.manual_seed(config.seed)
        self.order = torch.Generator().manual_seed(config.seed)
        # Initialised on the CPU, a seed means the same weights on every device.
        self.model = build_model(config.model).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.StepLR(
            self.optimizer, config.lr_decay_period or config.num_epochs + 1, gamma=1 / config.lr_decay_factor
        )
        self.steps = digits // config.batch_size  # of an epoch
        self.folder = RunFolder(config)
        self.result = {
            "status": "running",
            "config": asdict(config),
            "parameters": count_parameters(self.model),
            "data": {
                "file": data_path.name,
                "sha256": hashlib.sha256(data_path.read_bytes()).hexdigest(),
                "train_digits": digits,
                "test_digits": len(next(iter(self.test_sets.values())).labels),
            },
            "environment": describe_environment(self.device),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
            "epochs": [],
            "test_error": None,
        }

    def train(self) -> dict:
        """Train and test, write the run's files, and return the result as it stands in result.json.

        Whatever ends the run, result.json and weights.pt have every finished epoch.

        Raises:
            FloatingPointError: at the first step whose loss is not finite, or after an epoch with such a test loss.
            OSError: if the folder cannot be written any more.
        """
        config, folder, result = self.config, self.folder, self.result
        start = time.perf_counter()
        folder.say(
            f"{config.model} ({result['parameters']:,} parameters) on {result['data']['train_digits']:,} {config.train_mode} "
            f"digits of {result['data']['file']}, {result['environment']['device']}, {config.precision}, seed {config.seed}"
        )
        try:
            folder.save_result(result)
            for epoch in range(1, config.num_epochs + 1):
                epoch_start = time.perf_counter()
                record = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
                record["train_loss"], record["train_error"] = self._train_epoch(epoch)
                self.schedule.step()
                if epoch == config.num_epochs or (config.eval_freq and epoch % config.eval_freq == 0):
                    for version, test_set in self.test_sets.items():
                        loss, error = evaluate(self.model, test_set, config.precision)
                        # The last step of an epoch can be the one that spoils the weights.
                        if not math.isfinite(loss):
                            raise FloatingPointError(
                                f"the loss on {version} test digits is {loss} after step {self.steps} of {self.steps} "
                                f"in epoch {epoch}: a lower --lr may help"
                            )
                        record[f"test_loss_{version}"], record[f"test_error_{version}"] = loss, error
                record["seconds"] = time.perf_counter() - epoch_start
                result["epochs"].append(record)
                result["seconds"] = time.perf_counter() - start
                if epoch == config.num_epochs:
                    result["status"] = "finished"
                    result["test_error"] = {version: record[f"test_error_{version}"] for version in self.test_sets}
                # Saved before it is told: an epoch that was seen on the terminal is in the files.
                folder.save(result, self.model)
                self._report(record)
            folder.hyperparameters(config, result["test_error"])
            folder.say(f"test error: {self._format_errors(record)}  ({result['seconds']:.0f} s, {folder.path})")
        except KeyboardInterrupt:
            self._stop("interrupted")
            raise
        except Exception as error:
            self._stop("diverged" if isinstance(error, FloatingPointError) else "failed", str(error) or type(error).__name__)
            raise
        finally:
            folder.close()
        return result

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """One pass over the training set. Returns the mean loss and the error in %, both in training mode."""
        config = self.config
        self.model.train()
        losses = torch.zeros(self.steps, device=self.device)
        wrong = torch.zeros((), dtype=torch.long, device=self.device)
        progress = tqdm(
            batches(self.training_set, config.batch_size, self.order),
            desc=f"epoch {epoch}/{config.num_epochs}", total=self.steps, leave=False, disable=None,
        )
        for step, (images, labels) in enumerate(progress):
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = self.model(images)
                loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            self.optimizer.step()
            losses[step] = loss.detach()
            wrong += (logits.argmax(1) != labels).sum()
            # To look at a loss on a GPU means to wait for it: there, once an epoch is enough.
            if self.device.type == "cpu" or step == self.steps - 1:
                self._check_finite(losses[:step + 1], epoch)
        return losses.mean().item(), 100 * wrong.item() / (self.steps * config.batch_size)

    def _check_finite(self, losses: Tensor, epoch: int) -> None:
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            raise FloatingPointError(
                f"the loss is {losses[step].item()} at step {step + 1} of {self.steps} in epoch {epoch}: a lower --lr may help"
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
        tags = {"lr": "lr", "train_loss": "loss/train", "train_error": "error/train"}
        for version in self.test_sets:
            tags |= {f"test_{kind}_{version}": f"{kind}/test_{version}" for kind in ("loss", "error")}
        self.folder.scalars({tags[key]: value for key, value in record.items() if key in tags}, record["epoch"])

    def _stop(self, status: str, reason: str | None = None) -> None:
        self.result["status"] = status
        if reason:
            self.result["reason"] = reason
        line = f"{status} after {len(self.result['epochs'])} of {self.config.num_epochs} epochs"
        with contextlib.suppress(OSError):  # a full disk: what was saved before stays, and the cause is reported
            self.folder.save_result(self.result)
            if reason:  # told by whoever catches the error
                self.folder.log(f"{line}: {reason}")
            else:
                self.folder.say(f"{line}  ({self.folder.path})")


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, precision: str = "fp32") -> tuple[float, float]:
    """Mean cross-entropy and error in % of a model on a split that lives on its device. The model is left in eval mode."""
    model.eval()
    device = split.images.device
    loss = torch.zeros((), device=device)
    wrong = torch.zeros((), dtype=torch.long, device=device)
    for images, labels in batches(split, EVAL_BATCH_SIZE):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        wrong += (logits.argmax(1) != labels).sum()
    n = len(split.labels)
    return loss.item() / n, 100 * wrong.item() / n


def command_line() -> CommandLine:
    """An option for each field of `Config`, with its default."""
    parser = CommandLine(__doc__)
    defaults = {field.name: field.default for field in dataclass_fields(Config)}

    def add(name, text, **kwargs):
        if name != "model":
            kwargs["default"] = defaults[name]
            text += "" if defaults[name] is None or defaults[name] is True else " (%(default)s)"
        parser.add_argument(f"--{name}", help=text, **kwargs)

    add("model", "one of the seven", choices=MODELS, required=True, metavar="{" + ",".join(MODELS) + "}")
    add("train_mode", "version of the training digits", choices=TRAIN_MODES)
    add("test_mode", "version of the test digits", choices=TEST_MODES)
    add("num_epochs", "passes over the training set", type=int, metavar="N")
    add("batch_size", "digits in a step", type=int, metavar="N")
    add("weight_decay", "L2 penalty on all parameters", type=float, metavar="X")
    add("lr", "learning rate", type=float, metavar="X")
    add("lr_decay_period", "divide the learning rate after every N epochs, 0: never", type=int, metavar="N")
    add("lr_decay_factor", "by this", type=float, metavar="X")
    add("eval_freq", "test after every N epochs, 0: only at the end", type=int, metavar="N")
    add("dataset", "digits; where their npz is not in data/ yet, it is made", choices=SOURCES)
    add("data", "an npz to use instead", metavar="FILE")
    add("mnist_root", "folder with MNIST's four files, for making the npz; without it they are downloaded", metavar="FOLDER")
    add("seed", "of initialisation, order and dropout", type=int, metavar="N")
    add("device", "auto is cuda where there is one", choices=DEVICES)
    add("precision", "bf16: automatic mixed precision", choices=PRECISIONS)
    add("log_dir", "the run's folder is made in it", metavar="FOLDER")
    add("tensorboard", "write TensorBoard events, as is the default, or not", action=argparse.BooleanOptionalAction)
    return parser


def main(argv=None) -> None:
    parser = command_line()
    options = parser.parse_args(argv)
    keep_freed_memory()
    try:
        run = Run(Config(**vars(options)))
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        run.train()
    except OSError as error:
        parser.error(error)
    except FloatingPointError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
