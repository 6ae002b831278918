"""Results, checkpoints and trained networks: what they hold, and how they are read."""

import contextlib
import re
import time
from pathlib import Path

import torch
from torch import nn

from models import build_model, has_sign_flip_fields
from training.data import Data
from training.environment import describe_environment
from training.files import read_json
from training.options import DEFAULTS, REPORTING, Config, names_of

CHECKPOINT_FORMAT = 1
CHECKPOINT_KEYS = {"config", "data", "device", "model", "optimizer", "random", "result"}
RESULT_KEYS = {"status", "config", "data", "environment", "seconds", "epochs", "test_error"}


class BadCheckpoint(ValueError):
    """A checkpoint that a run cannot go on from."""


def new_result(
    config: Config, parameters: int, data: Data, digits: tuple[int, int], device: torch.device
) -> dict:
    """The content of result.json before the first epoch; `digits` counts training and test."""
    return {
        "status": "running",
        "config": config.protocol(),
        "parameters": parameters,
        "data": {
            "file": data.file,
            "sha256": data.sha256,
            "train_digits": digits[0],
            "test_digits": digits[1],
        },
        "environment": describe_environment(device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": 0.0,
        "epochs": [],
        "test_error": None,
    }


def read_result(path) -> dict:
    """Read a result.json. An option that is newer than the result had its default.

    Raises:
        ValueError: naming the file, if it is truncated or something else.
        OSError: if it cannot be read.
    """
    result = read_json(path)
    if not isinstance(result, dict) or not RESULT_KEYS <= result.keys():
        raise ValueError(f"{path} is no result of a run")
    unrecorded = names_of("input", "output")
    for name, default in DEFAULTS.items():
        if name not in unrecorded:
            result["config"].setdefault(name, default)
    return result


def read_weights(path) -> dict:
    """Read a dict that torch.save wrote, with tensors on the CPU; code in it is not executed.

    Raises:
        BadCheckpoint: naming the file, if it is truncated or something else.
        OSError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises errors of many kinds
        reason = re.split(r"[.\n]", str(error) or type(error).__name__, maxsplit=1)[0]
        raise BadCheckpoint(f"{path} is truncated or no checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def read_checkpoint(path) -> dict:
    """Read a checkpoint.pt, with tensors on the CPU.

    Raises:
        BadCheckpoint: naming the file, if it is truncated, something else, or of another format.
        OSError: if it cannot be read.
    """
    return check_format(read_weights(path), path)


def check_format(checkpoint: dict, path) -> dict:
    """Returns the checkpoint. Raises BadCheckpoint naming its file if it is none."""
    if "format" not in checkpoint:
        raise BadCheckpoint(f"{path} is no checkpoint of train.py: weights alone do not suffice")
    if checkpoint["format"] != CHECKPOINT_FORMAT or not CHECKPOINT_KEYS <= checkpoint.keys():
        raise BadCheckpoint(
            f"{path} is no checkpoint of format {CHECKPOINT_FORMAT}, "
            "which this version of train.py reads"
        )
    return checkpoint


def stored_config(checkpoint: dict, path, options: dict) -> Config:
    """The configuration in a checkpoint, with some options replaced. Raises BadCheckpoint."""
    try:
        return Config(**checkpoint["config"] | options)
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(
            f"the configuration in {path}, with the options given: {error}"
        ) from error


def check_same_run(
    checkpoint: dict, path, config: Config, data: dict, device: torch.device
) -> None:
    """Check that a run can go on from a checkpoint.

    Args:
        checkpoint: was read from `path`.
        config, device: of the run.
        data: of the run, as in its result.

    Raises:
        BadCheckpoint: naming the path, if the configuration, the data or the device differ.
    """
    if has_sign_flip_fields(config.model) and "sign_eps" not in checkpoint["config"]:
        raise BadCheckpoint(
            f"{path} is from before sign(x) of rounding was 0, another function: train anew"
        )
    stored = stored_config(checkpoint, path, {}).protocol()
    for name, value in config.protocol().items():
        if stored[name] != value and name not in REPORTING:
            raise BadCheckpoint(
                f"{path} is of a run with {name} {stored[name]}, not {value}: "
                "its settings cannot change"
            )
    if checkpoint["data"]["sha256"] != data["sha256"]:
        raise BadCheckpoint(
            f"{path} is of a run on another {checkpoint['data']['file']} than {data['file']} is now"
        )
    if checkpoint["device"] != device.type:
        raise BadCheckpoint(
            f"{path} is of a run on {checkpoint['device']}: it goes on only there "
            f"(--device {checkpoint['device']})"
        )


def find_checkpoint(source) -> Path:
    """The checkpoint that --resume names, by itself or by its folder. Raises ValueError."""
    path = Path(source)
    if source == "" or not path.exists():
        raise ValueError(f"--resume {source or repr('')}: there is no such folder")
    if not path.is_dir() and path.name != "checkpoint.pt":
        raise ValueError(f"--resume takes a run's folder or the checkpoint.pt in it, got {source}")
    if path.is_dir():
        path = path / "checkpoint.pt"
        if not path.exists():
            result = path.with_name("result.json")
            if result.exists() and read_result(result)["status"] == "finished":
                raise ValueError(
                    f"the run in {source} is finished, and its checkpoint deleted: "
                    "there is nothing to go on with"
                )
            raise ValueError(
                f"--resume {source}: there is no checkpoint in it (one is written after each "
                "epoch); start the run anew"
            )
    return path


def runs_of(config: Config, data: Data) -> dict[str, list[Path]]:
    """Folders in log_dir with a checkpoint of this configuration and these data.

    Returns:
        Those of 'stopped' and of 'finished' runs, the latest last.
    """
    paths = {"stopped": [], "finished": []}
    for path in Path(config.log_dir).glob("*/result.json"):
        with contextlib.suppress(ValueError, OSError):  # a damaged file of another run
            result = read_result(path)
            same = (result["config"], result["data"]["sha256"]) == (config.protocol(), data.sha256)
            if same and path.with_name("checkpoint.pt").exists():
                status = "finished" if result["status"] == "finished" else "stopped"
                paths[status].append(path)
    return {
        status: [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]
        for status, found in paths.items()
    }


def trained_model(config: Config, weights: dict, path) -> nn.Module:
    """A model with the weights read from `path`. Raises ValueError naming it if they do not fit."""
    model = build_model(config.model, **config.network())
    try:
        model.load_state_dict(weights)
    except Exception as error:  # the file may hold anything
        raise ValueError(f"{path} does not hold the weights of {config.model}") from error
    return model


def load_network(path, options: dict) -> tuple[nn.Module, Config, str]:
    """Load a trained network.

    Args:
        path: a checkpoint.pt, a model's weights, or a run's folder with one of them.
        options: replace the file's own. Weights outside a run's folder need at least the model.

    Returns:
        The network, its configuration, and words that say after how many epochs, if known.

    Raises:
        ValueError, OSError: for a file or an option that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
        if not path.exists() and path.with_name("weights.pt").exists():
            path = path.with_name("weights.pt")  # all that reproduce.py leaves of a finished run
    content = read_weights(path)
    checkpoint = check_format(content, path) if "format" in content else None
    known = checkpoint["config"] if checkpoint else _options_beside(path)
    if "model" not in known | options:
        raise ValueError(f"{path} holds weights alone: say of which --model")
    if options.get("model", known.get("model")) != known.get("model", options.get("model")):
        raise ValueError(f"{path} holds a {known['model']}, not a {options['model']}")
    if checkpoint is None:
        config = Config(**known | options)
        return trained_model(config, content, path), config, ""
    config = stored_config(checkpoint, path, {"device": "auto"} | options)
    epochs = len(checkpoint["result"]["epochs"])
    return trained_model(config, checkpoint["model"], path), config, f" after {epochs} epochs"


def _options_beside(path: Path) -> dict:
    """What a result.json beside weights says of the network and its test."""
    with contextlib.suppress(ValueError, OSError):  # there is none
        config = read_result(path.with_name("result.json"))["config"]
        return {name: config[name] for name in names_of("network", "test") if name in config}
    return {}
