"""Train a model on Möbius strip digits and test it.

    python train.py --model mobius_regular                    # MNIST, trained on centered digits
    python train.py --model mobius_regular --dataset digits   # scikit-learn's digits, no network
    python train.py --model cnn_same_channels --train_mode shifted
    python train.py --resume logs/RUN                         # go on with a stopped or killed run
    python train.py --eval_only --checkpoint logs/RUN/checkpoint.pt

Every run has a folder of its own in --log_dir; docs/training.md describes it. For many runs
take reproduce.py. All options and their defaults, the paper's protocol, are in training/options.py.

Source of the protocol: arXiv:2106.06020, Section 5.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_mnist import Split
from fast.memory import keep_freed_memory
from fields import isometry_action, scalars
from models import build_model, count_parameters
from training.augmentation import RandomDeformation
from training.checkpoints import (
    BadCheckpoint, check_same_run, find_checkpoint, load_network, load_weights, new_result,
    read_checkpoint, runs_of, stored_config,
)
from training.data import Data, batches, find_data
from training.environment import compiled, random_states, select_device, set_random_states
from training.events import check_matplotlib, save_error_against_shift, summary_writer
from training.files import CommandLine, say
from training.optimization import OPTIMIZERS, restore
from training.options import Config, add_train_options, follow_recipe, names_of
from training.report import (
    describe_trained, end_events, progress, report_epoch, report_finished, reported,
)
from training.run_folder import Busy, RunFolder, new_folder

EVAL_BATCH_SIZE = 500
LATEST = object()  # --resume without a folder


class Diverged(FloatingPointError):
    """The loss of a run is not finite."""


class Run:
    """One training run.

    Everything is checked and loaded at construction, `train` does the work, and `close` releases
    the run's folder. If the folder has a checkpoint, the run continues from there. Its weights and
    metrics are then those of an uninterrupted run, on a CPU with as many threads bit for bit.

    Args:
        config: what to train, and how.
        folder: of the run. None: a new one in `config.log_dir`.
        data: as `find_data` returns them. None: those of the configuration are loaded.
        verbose: whether to print what is logged.
        bar: whether to show the progress of an epoch, on a terminal.

    Raises:
        ValueError: for a device that does not exist, or data that do not fit.
        BadCheckpoint: for a checkpoint that is damaged or of another run.
        OSError: for a file that cannot be read or a folder that cannot be written.
        Busy: if another process works in `folder`.
    """

    def __init__(
        self, config: Config, folder=None, data: Data | None = None, verbose: bool = True,
        bar: bool = True,
    ) -> None:
        self.config, self.bar = config, bar
        self.device = select_device(config.device)
        data = data or find_data(config, self.device)
        self.training_set = data.splits[f"train_{config.train_mode}"]
        self.test_sets = {name: data.splits[f"test_{name}"] for name in config.test_versions}
        self.centered_test_set = data.splits["test_centered"]
        digits = len(self.training_set.labels)
        self.steps = digits // config.batch_size  # in an epoch
        if not self.steps:
            raise ValueError(
                f"batch_size must be at most the {digits} training digits of {data.file}, "
                f"got {config.batch_size}"
            )
        if config.tensorboard:
            summary_writer()  # fails before the folder is made
        goes_on = folder is not None and (Path(folder) / "checkpoint.pt").exists()
        self._initialise(data, None if goes_on else config.init)
        if folder is None:
            stem = f"{config.digits}-{config.model}-{config.train_mode}-seed{config.seed}"
            folder = new_folder(config.log_dir, stem)
        self.folder, self.events = RunFolder(folder, verbose=verbose), None
        try:
            # This process holds the folder's lock: no other one replaces the checkpoint now.
            path = self.folder.path / "checkpoint.pt"
            if path.exists():
                self._restore(read_checkpoint(path), path)
        except BaseException:
            self.close()
            raise

    def _initialise(self, data: Data, init) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.order = torch.Generator().manual_seed(config.seed)
        # Initialised on the CPU: a seed gives the same weights on every device.
        size = {"ch_in": data.shape[0], "classes": data.classes}
        self.model = build_model(config.model, **size, **config.network())
        if init is not None:
            network = load_network(init, {"model": config.model, **config.network()}).model
            load_weights(self.model, network.state_dict(), init, config.model)
        self.model.to(self.device)
        self.random = random_states(self.device)
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.model, lr=config.lr, weight_decay=config.weight_decay
        )
        amounts = config.deformation, config.stroke_width, config.scaling
        self.deform = None
        if any(amounts):
            self.deform = RandomDeformation(*amounts, size=data.shape[1:], device=self.device)
        digits = len(self.training_set.labels), len(self.centered_test_set.labels)
        self.compute = compiled(self.loss, self.device) if config.compile else self.loss
        parameters = count_parameters(self.model)
        self.result = new_result(config, parameters, data, digits, self.device)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.result["epochs"])

    @property
    def finished(self) -> bool:
        return self.epoch == self.config.num_epochs

    def close(self) -> None:
        self.folder.close()
        if self.events:
            self.events.close()

    # ----------------------------------------------------------------------------------------------
    # Training

    def train(self, after_epoch: Callable[[], None] = lambda: None) -> dict:
        """Train and test, and write the run's files after every epoch.

        Args:
            after_epoch: called after each epoch.

        Returns:
            The result, as in result.json.

        Raises:
            Diverged: at the first step whose loss is not finite, or if a test loss is not.
            OSError: if the folder cannot be written any more.
        """
        config, device, model, optimizer = self.config, self.device, self.model, self.optimizer
        if self.finished:
            self.folder.save(self.checkpoint())  # a kill may have left older files beside it
            report_finished(self)
            return self.result

        with reported(self):
            for epoch in range(self.epoch, config.num_epochs):
                start = time.perf_counter()
                set_random_states(self.random)
                model.train()
                losses = torch.zeros(self.steps, device=device)
                wrong = torch.zeros((), dtype=torch.long, device=device)
                digits = batches(self.training_set, config.batch_size, self.order)
                if self.deform:
                    drawn = self.deform.draw_epoch(self.steps, config.batch_size, self.order)
                for step, (images, labels) in enumerate(progress(self, digits)):
                    # In the middle of the step.
                    lr = config.learning_rate(epoch + (step + 0.5) / self.steps)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    if self.deform:
                        images = self.deform(images, drawn[step])
                    optimizer.zero_grad()
                    logits, loss = self.compute(images, labels)
                    loss.backward()
                    optimizer.step()
                    losses[step] = loss.detach()
                    wrong += (logits.argmax(1) != labels).sum()
                    # Reading a loss waits for the GPU: there, once an epoch is enough.
                    if device.type == "cpu" or step == self.steps - 1:
                        self._check_finite(losses[:step + 1])
                self.random = random_states(self.device)
                record = {
                    "epoch": epoch + 1,
                    "lr": config.learning_rate(epoch + 0.5),
                    "train_loss": losses.mean().item(),
                    "train_error": 100 * wrong.item() / (self.steps * config.batch_size),
                }
                last = epoch + 1 == config.num_epochs
                if last or config.eval_freq and (epoch + 1) % config.eval_freq == 0:
                    for version, test_set in self.test_sets.items():
                        test_loss, test_error = evaluate(model, test_set)
                        # The last step of an epoch may have spoiled the weights.
                        if not math.isfinite(test_loss):
                            raise self._diverged(
                                f"on {version} test digits is {test_loss} after", self.steps
                            )
                        record[f"test_loss_{version}"] = test_loss
                        record[f"test_error_{version}"] = test_error
                record["seconds"] = time.perf_counter() - start
                self._finish_epoch(record)
                after_epoch()
            if self.events:
                end_events(self, predict, predict_at_every_shift)
        return self.result

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss of a training batch."""
        config = self.config
        bf16 = config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.model(images)
            return logits, cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

    def _check_finite(self, losses: Tensor) -> None:
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            raise self._diverged(f"is {losses[step].item()} at", step + 1)

    def _diverged(self, what: str, step: int) -> Diverged:
        return Diverged(
            f"the loss {what} step {step} of {self.steps} in epoch {self.epoch + 1}: "
            "a lower --lr may help"
        )

    def _finish_epoch(self, record: dict) -> None:
        result = self.result
        result["epochs"].append(record)
        result["seconds"] += record["seconds"]
        if self.finished:
            result["status"] = "finished"
            result["test_error"] = {
                version: record[f"test_error_{version}"] for version in self.test_sets
            }
        self.folder.save(self.checkpoint())  # before the epoch is reported
        report_epoch(self, record)

    # ----------------------------------------------------------------------------------------------
    # Checkpoint

    def checkpoint(self) -> dict:
        """All that the rest of the run depends on, after the last finished epoch."""
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
        """Continue from a checkpoint. Raises BadCheckpoint naming its path if it does not fit."""
        check_same_run(checkpoint, path, self.config, self.result["data"], self.device)
        environment = self.result["environment"]
        try:
            restore(self.optimizer, checkpoint["optimizer"])
            self.model.load_state_dict(checkpoint["model"])
            self.random = dict(checkpoint["random"])
            self.order.set_state(self.random.pop("order"))
            set_random_states(self.random)
            self.result = checkpoint["result"] | {"config": self.config.protocol()}
            if not self.finished:
                session = {"after_epoch": self.epoch, "environment": environment}
                self.result["resumed"] = [*self.result.get("resumed", []), session]
        except Exception as error:  # the file may hold anything
            reason = " ".join(str(error).split())[:200]
            raise BadCheckpoint(
                f"{path} does not fit this version's {self.config.model} and "
                f"{self.config.optimizer} ({reason}): a new run begins in another folder"
            ) from error


# --------------------------------------------------------------------------------------------------
# Evaluation


def cross_entropy(logits: Tensor, labels: Tensor, **options) -> Tensor:
    """`F.cross_entropy` in float32 at least, also of logits in bfloat16."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, **options)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and error in % on a split on the model's device; sets eval mode."""
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
    """Predicted classes, int64 (n,); sets eval mode."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(EVAL_BATCH_SIZE)])


def predict_at_every_shift(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes of images moved by each of the 2L isometries, int64 (2L, n)."""
    return torch.stack([
        predict(model, isometry_action(images, shift, scalars(images)))
        for shift in range(2 * images.shape[3])
    ])


def evaluate_checkpoint(path, options: dict, every_shift: bool = False, out=None) -> str:
    """Test the network in a checkpoint.pt or a file of weights.

    Args:
        path: as `load_network` takes it.
        options: of `Config`, in place of the file's own.
        every_shift: test on digits moved by each of the 2L isometries.
        out: file for a PNG with the error at each shift.

    Returns:
        Lines with its test errors.

    Raises:
        ValueError, OSError: for a file, an option or data that do not fit.
    """
    superfluous = sorted(options.keys() - names_of("network", "test", "input"))
    if superfluous:
        names = ", ".join(f"--{name}" for name in superfluous)
        raise ValueError(f"--eval_only does not train: leave out {names}")
    if path is None:
        raise ValueError("--eval_only takes a --checkpoint FILE")
    if "dataset" in options:  # the file may name an npz
        options = {"data": None, "mnist_root": None} | options
    model, config, result = load_network(path, options)
    device = select_device(config.device)
    data = find_data(config, device)
    model.to(device)
    images, labels = data.splits["test_centered"]
    classes = model.eval()(images[:1]).shape[1]
    if data.classes > classes:
        raise ValueError(f"{data.file} has {data.classes} classes, {path} only {classes}")
    lines = [describe_trained(config, result, data)]
    if not every_shift:
        for version in config.test_versions:
            _, error = evaluate(model, data.splits[f"test_{version}"])
            lines.append(f"test error on {len(labels):,} {version} digits: {error:.2f} %")
        return "\n".join(lines)
    if out is not None:
        check_matplotlib()  # before minutes of work
    predictions = predict_at_every_shift(model, images)
    errors = (100 * (predictions != labels).double().mean(1)).tolist()
    changed = int((predictions != predictions[0]).sum())
    lines += ["shift   test error in %", *(f"{t:5}   {e:.2f}" for t, e in enumerate(errors))]
    lines.append(
        f"mean {sum(errors) / len(errors):.2f} %; {changed:,} of {predictions.numel():,} "
        f"predictions ({100 * changed / predictions.numel():.4f} %) are not those at shift 0"
    )
    if out is not None:
        save_error_against_shift(errors, config, out)
        lines.append(f"wrote {out}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Command line


def resumed_run(source, options: dict) -> Run:
    """The run that --resume names, ready to go on.

    Args:
        source: a run's folder, or the checkpoint.pt in it; or `LATEST`.
        options: those given on the command line.

    Raises:
        ValueError, OSError, Busy: as `Run`; and if there is no checkpoint, or an option differs.
    """
    if source is LATEST:
        config = Config(**options)
        data = find_data(config, select_device(config.device))
        runs = runs_of(config, data)
        if folders := runs["stopped"] or runs["finished"]:
            return Run(config, folders[-1], data)
        say(f"no run of these options in {config.log_dir} yet: this is the first")
        return Run(config, data=data)
    path = find_checkpoint(source)
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, path, {"device": checkpoint["device"]} | options)
    return Run(config, folder=path.parent)


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add_train_options(parser)
    parser.option(
        "resume", "go on with the run in this folder; without a folder, with the latest run with "
        "the same options in --log_dir, or begin one", nargs="?", const=LATEST, metavar="RUN",
    )
    parser.option(
        "eval_only", "test the network of --checkpoint, train nothing", action="store_true"
    )
    parser.option(
        "every_shift", "with --eval_only: test on digits moved by each isometry",
        action="store_true",
    )
    parser.option(
        "out", "with --every_shift: draw the error at each shift into this PNG", metavar="FILE"
    )
    parser.option(
        "checkpoint", "a run's folder, or the checkpoint.pt or weights.pt in it; or other weights, "
        "with --model and whatever differs from the defaults", metavar="FILE",
    )
    return parser


def main(argv=None) -> None:
    parser = command_line()
    options = vars(parser.parse_args(argv))
    resume, checkpoint = options.pop("resume", None), options.pop("checkpoint", None)
    eval_only, every_shift = options.pop("eval_only", False), options.pop("every_shift", False)
    out = options.pop("out", None)
    if every_shift and not eval_only or out is not None and not every_shift:
        parser.error("--out goes with --every_shift, and --every_shift with --eval_only")
    if "model" not in options and not eval_only and resume in (None, LATEST):
        parser.error("the following arguments are required: --model")
    if resume not in (None, LATEST) and "recipe" in options:
        parser.error("--resume RUN goes on with that run's settings: leave out --recipe")
    if eval_only and resume is not None or checkpoint is not None and not eval_only:
        parser.error("--checkpoint goes with --eval_only, and --resume without it")
    keep_freed_memory()
    try:
        if eval_only:
            return say(evaluate_checkpoint(checkpoint, options, every_shift, out))
        options = follow_recipe(options)
        run = Run(Config(**options)) if resume is None else resumed_run(resume, options)
        with contextlib.closing(run):
            run.train()
    except (ValueError, OSError, Busy, torch.OutOfMemoryError) as error:
        parser.error(error)
    except FloatingPointError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
