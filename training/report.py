"""What a run tells: lines on the terminal and in log.txt, and TensorBoard's events.

The functions take a `train.Run`.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import asdict

from tqdm import tqdm

from training.environment import describe_environment
from training.events import RunEvents
from training.files import say

BATCH_NORM_MOMENTUM = 0.1  # the default of torch.nn
IN_FIRST_LINE = ("model", "train_mode", "dataset", "precision", "seed")  # of a run's log


@contextlib.contextmanager
def reported(run):
    """Report how a run begins, and whatever ends it."""
    config, folder, result = run.config, run.folder, run.result
    folder.say(
        f"{config.model} ({result['parameters']:,} parameters) "
        f"on {result['data']['train_digits']:,} {config.train_mode} digits "
        f"of {result['data']['file']}, {result['environment']['device']}, "
        f"{config.precision}, seed {config.seed}"
    )
    if settings := config.settings_not_in_paper(IN_FIRST_LINE):
        settings = ", ".join(f"{name} {value}" for name, value in settings.items())
        folder.say(f"not the defaults: {settings}")
    try:
        if run.epoch:
            folder.say(f"continued after epoch {run.epoch} of {config.num_epochs}")
            if describe_environment(run.device) != result["environment"]:
                folder.say(
                    "not with the versions, hardware and threads of its beginning: "
                    "rounding may differ"
                )
            folder.save(run.checkpoint())  # a kill may have left older files beside it
        else:
            folder.save_result(result)
        if config.tensorboard:
            _begin_events(run)
        yield
    except KeyboardInterrupt:
        _report_end(run, "interrupted")
        raise
    except FloatingPointError as error:
        _report_end(run, "diverged", str(error))
        raise
    except Exception as error:
        _report_end(run, "failed", str(error) or type(error).__name__)
        raise


def _report_end(run, status: str, reason: str | None = None) -> None:
    if not run.finished:  # it is finished while the last pictures are drawn
        run.result |= {"status": status} | ({"reason": reason} if reason else {})
    line = f"{status} after {run.epoch} of {run.config.num_epochs} epochs"
    with contextlib.suppress(OSError):  # a full disk; what was saved before stays
        run.folder.save_result(run.result)
        if reason:  # the error is printed by whoever catches it
            run.folder.log(f"{line}: {reason}")
        else:
            run.folder.say(f"{line}  ({run.folder.path})")


def progress(run, steps: Iterable) -> Iterable:
    """The steps of an epoch, with a progress bar if this is a terminal."""
    config = run.config
    name = f"epoch {run.epoch + 1}/{config.num_epochs}"
    if not run.folder.verbose:
        name = f"{config.model} trained on {config.train_mode}, seed {config.seed}, {name}"
    disable = None if run.bar else True  # None: if this is not a terminal
    return tqdm(steps, desc=name, total=run.steps, leave=False, disable=disable)


def format_errors(record: dict) -> str:
    """The test errors in an epoch's record."""
    prefix = "test_error_"
    errors = {key: error for key, error in record.items() if key.startswith(prefix)}
    return ", ".join(f"{key.removeprefix(prefix)} {error:.2f} %" for key, error in errors.items())


def report_epoch(run, record: dict) -> None:
    """Report the last finished epoch; after the last one of the run, its test errors."""
    errors = format_errors(record)
    # The part of a running average that its initial value still has.
    unsettled = (1 - BATCH_NORM_MOMENTUM) ** (record["epoch"] * run.steps) > 0.01
    note = " (batch normalisation has not settled)" if unsettled else ""
    run.folder.say(
        f"epoch {record['epoch']:2}/{run.config.num_epochs}  loss {record['train_loss']:.4f}  "
        f"train error {record['train_error']:5.2f} %  "
        + (f"test error {errors}{note}  " if errors else "") + f"{record['seconds']:.1f} s"
    )
    if run.events:
        run.events.scalars(record)
        run.events.kernels(run.model, record["epoch"])
    if run.finished:
        run.folder.say(f"test error: {errors}  ({run.result['seconds']:.0f} s, {run.folder.path})")


def describe_trained(config, result: dict | None, data) -> str:
    """How a network was trained, as far as it is known, and on other data than `data` if so.

    Args:
        config: of its test.
        result: of its run, or None.
        data: of its test, as `find_data` returns them.
    """
    network = {name: value for name, value in config.network().items() if name != "dropout"}
    words = [config.model, f"{network.pop('pooling')} pooling"]
    words += [f"{name} {value}" for name, value in network.items() if value]
    if result is None:
        return ", ".join(words)
    epochs, trained_on = len(result["epochs"]), result["data"]
    words.append(
        f"trained for {epochs} epoch{'s' * (epochs != 1)} on {result['config']['train_mode']} "
        f"digits of {trained_on['file']}"
    )
    words += [
        f"with {name} {result['config'][name]}"
        for name, value in config.network().items() if value != result["config"][name]
    ]
    line = ", ".join(words)
    if trained_on["sha256"] != data.sha256:
        line += (
            "\ntested on other data than it was trained on: "
            f"{data.file} (SHA-256 {data.sha256[:8]}…)"
        )
    return line


def report_finished(run) -> None:
    """Report that there is nothing left to train."""
    if run.folder.verbose:
        errors = format_errors(run.result["epochs"][-1])
        say(f"finished already: test error {errors}  ({run.folder.path})")


def _begin_events(run) -> None:
    run.events = RunEvents(run.folder.path, run.result["epochs"])
    if not run.events.continued:
        run.events.digits(f"{run.config.train_mode} training", run.training_set)
        for version, test_set in run.test_sets.items():
            run.events.digits(f"{version} test", test_set)
    run.events.kernels(run.model, run.epoch)


def end_events(run, predict: Callable, predict_at_every_shift: Callable) -> None:
    """Draw what the trained network gets wrong."""
    config, events = run.config, run.events
    for version, test_set in run.test_sets.items():
        predictions = predict(run.model, test_set.images)
        events.misclassified(version, test_set, predictions, run.epoch)
    # All test digits at all shifts would take too long.
    images, labels = (part[:max(50, len(part) // 50)] for part in run.centered_test_set)
    wrong = predict_at_every_shift(run.model, images) != labels
    row = {
        "model": config.model,
        "settings": config.settings_not_in_paper(IN_FIRST_LINE),
        "train_mode": config.train_mode,
        "errors": (100 * wrong.double().mean(1)).tolist(),
    }
    events.error_against_shift(row, len(labels), run.epoch)
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    events.hyperparameters(settings, run.result["test_error"])
