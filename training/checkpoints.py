"""Results, checkpoints and trained networks: what they hold, and how they are read."""

import contextlib
import re
import time
from pathlib import Path
from typing import NamedTuple

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
            "shape": list(data.shape),
            "classes": data.classes,
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
    result["config"] = with_newer_options(result["config"])
    return result


def with_newer_options(config: dict) -> dict:
    """The settings of a result, with the defaults of options that are newer than the result."""
    unrecorded = names_of("input", "output")
    return config | {name: value for name, value in DEFAULTS.items()
                     if name not in unrecorded and name not in config}


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
            f"{path} is of a run on other data: {_name(checkpoint['data'])}, not {_name(data)}"
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


def load_weights(model: nn.Module, weights: dict, path, name: str) -> None:
    """Load weights read from `path` into the model `name`. Raises ValueError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except Exception as error:  # the file may hold anything
        raise ValueError(
            f"{path} does not hold the weights of a {name} with these channels and classes"
        ) from error


class Trained(NamedTuple):
    """A trained network, its configuration, and the result of its run if that is known."""

    model: nn.Module
    config: Config
    result: dict | None


def load_network(path, options: dict) -> Trained:
    """Load a trained network.

    Args:
        path: a checkpoint.pt, a model's weights, or a run's folder with one of them. A JSON with
            the result of the run can lie beside weights: result.json, or by the weights' name.
        options: replace the file's own. Weights without a result need at least the model.

    Raises:
        ValueError, OSError: for a file or an option that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
        if not path.exists() and path.with_name("weights.pt").exists():
            path = path.with_name("weights.pt")  # all that reproduce.py leaves of a finished run
    content = read_weights(path)
    if "format" in content:
        checkpoint = check_format(content, path)
        weights, result = checkpoint["model"], checkpoint["result"]
        stored = checkpoint["config"] | {"device": "auto"}
    else:
        weights, result = content, _result_beside(path)
        stored = result["config"] if result else {}
    if "model" not in stored | options:
        raise ValueError(f"{path} holds weights alone: say of which --model")
    if options.get("model", stored.get("model")) != stored.get("model", options.get("model")):
        raise ValueError(f"{path} holds a {stored['model']}, not a {options['model']}")
    config = stored_config({"config": stored}, path, options)
    model = build_model(config.model, **_size(weights), **config.network())
    load_weights(model, weights, path, config.model)
    return Trained(model, config, result)


def _size(weights: dict) -> dict:
    """Input channels and classes of a network, from its first kernel and its last bias."""
    try:
        kernel, *_, bias = weights.values()
        return {"ch_in": kernel.shape[1], "classes": bias.shape[0]}
    except (ValueError, AttributeError, IndexError):
        return {}  # they are no weights of these networks


def _name(data: dict) -> str:
    return f"{data['file']} (SHA-256 {data['sha256'][:8]}…)"


def _result_beside(path: Path) -> dict | None:
    for file in (path.with_suffix(".json"), path.with_name("result.json")):
        with contextlib.suppress(ValueError, OSError):  # there is none
            return read_result(file)
    return None
