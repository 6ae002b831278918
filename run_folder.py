"""The files of a run, in a folder of its own:

    log.txt         what the terminal shows
    result.json     configuration, versions and hardware, every epoch, the final test errors
    checkpoint.pt   all that the run needs to go on: configuration, weights, optimizer, random states, epochs so far
    weights.pt      state_dict
    events.*        TensorBoard: run_events.py; pictures/ has those of pictures

Each but the log and the events is written beside its place and moved into it: it is of the last finished epoch, whole,
whatever ended the run. A process holds the folder's lock while it writes there; with the process the lock goes.
"""

import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

from convert_mnist import write_atomically

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

CHECKPOINT_FORMAT = 1
CHECKPOINT_KEYS = ("config", "data", "device", "model", "optimizer", "random", "result")


class Busy(Exception):
    """Another process is at work in this folder."""


class BadCheckpoint(ValueError):
    """A checkpoint that a run cannot go on from."""


class RunFolder:
    """Opens a run's folder, makes it if need be, and locks it.

    Args:
        path: of the folder.
        verbose: whether `say` also prints.

    Raises:
        Busy: if another process has it.
        OSError: if it cannot be made, written or locked.
    """

    def __init__(self, path, *, verbose: bool = True) -> None:
        self.path, self.verbose = Path(path), verbose
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._log = open(self.path / "log.txt", "a", encoding="utf-8")
        except OSError as error:
            reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
            raise OSError(f"cannot write in {path}: {reason}") from error
        try:
            _lock(self._log)
            for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
        except BlockingIOError:
            self._log.close()
            raise Busy(f"another process is at work in {path}") from None
        except OSError as error:
            self._log.close()
            raise OSError(f"cannot lock {path}, so that two processes could work in it: {error.strerror or error}") from error

    def log(self, line: str) -> None:
        try:
            print(line, file=self._log, flush=True)
        except OSError as error:
            raise OSError(f"cannot write {self.path / 'log.txt'}: {error.strerror or error}") from error

    def say(self, line: str) -> None:
        self.log(line)
        if self.verbose:
            say(line)

    def save(self, checkpoint: dict) -> None:
        """The checkpoint, and what follows from it."""
        self._save_tensors("checkpoint.pt", {"format": CHECKPOINT_FORMAT} | checkpoint)
        self._save_tensors("weights.pt", checkpoint["model"])
        self.save_result(checkpoint["result"])

    def _save_tensors(self, name: str, content: dict) -> None:
        serialized = io.BytesIO()  # torch.save into a file would hide the reason of a failure, such as a full disk
        torch.save(content, serialized)
        with write_atomically(self.path / name) as file:
            file.write(serialized.getbuffer())

    def save_result(self, result: dict) -> None:
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        self._log.close()


def _lock(file) -> None:
    """Raises BlockingIOError if another process has it, another OSError where there are no locks."""
    if fcntl is None:
        raise OSError("this system has no flock")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def new_folder(log_dir, stem: str) -> Path:
    """Make a folder of which nobody knows yet, named by `stem` and the time. Raises OSError naming `log_dir`."""
    log_dir = Path(log_dir)
    stem = re.sub(r"[^\w.-]", "_", f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
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


def say(line: str) -> None:
    """Print, also where nobody reads on (| head): no reason to stop training."""
    try:
        print(line, flush=True)
    except UnicodeEncodeError:
        print(line.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(path, content: dict) -> None:
    with write_atomically(path) as file:
        file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path) -> object:
    """Raises ValueError naming the file if it is no JSON, OSError if it cannot be read."""
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in it")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no JSON file ({error})") from error


def read_result(path) -> dict:
    """A result.json. Raises ValueError naming it if it is none, OSError if it cannot be read."""
    result = read_json(path)
    if not _is_result(result):
        raise ValueError(f"{path} is no result of a run")
    return result


def _is_result(result) -> bool:
    """Whether all is there that this code reads of a result."""
    kinds = {"status": str, "config": dict, "parameters": int, "data": dict, "environment": dict, "seconds": (int, float), "epochs": list}
    if not isinstance(result, dict) or any(not isinstance(result.get(key), kind) for key, kind in kinds.items()):
        return False
    errors = result.get("test_error")
    return (
        isinstance(result["data"].get("sha256"), str)
        and all(isinstance(record, dict) and record.get("epoch") == i + 1 for i, record in enumerate(result["epochs"]))
        and (errors is None or isinstance(errors, dict) and all(is_percentage(error) for error in errors.values()))
    )


def is_percentage(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 100


def read_weights(path) -> dict:
    """What torch.save wrote, tensors on the CPU. Raises BadCheckpoint naming the file if it is not that, OSError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can fail in any part of the reader
        raise BadCheckpoint(f"{path} is truncated or no checkpoint ({_first_sentence(error)})") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def read_checkpoint(path) -> dict:
    """A checkpoint.pt, its tensors on the CPU.

    Raises:
        BadCheckpoint: naming the file, if it is truncated, something else, or of a later format.
        OSError: if it cannot be read.
    """
    return checked_checkpoint(read_weights(path), path)


def checked_checkpoint(checkpoint: dict, path) -> dict:
    """What `read_weights` read, if it is a checkpoint. Raises BadCheckpoint naming the file, as `read_checkpoint` does."""
    version = checkpoint.get("format")
    if type(version) is not int or version < 1:
        raise BadCheckpoint(f"{path} is no checkpoint of train.py (weights alone do not suffice to go on)")
    if version > CHECKPOINT_FORMAT:
        raise BadCheckpoint(f"{path} is from a later version of this code (format {version}, known up to {CHECKPOINT_FORMAT}): update it")
    missing = [key for key in CHECKPOINT_KEYS if not isinstance(checkpoint.get(key), str if key == "device" else dict)]
    if missing:
        raise BadCheckpoint(f"{path} is no complete checkpoint: it lacks {', '.join(missing)}")
    try:
        json.dumps(checkpoint["result"], allow_nan=False)
        sound = _is_result(checkpoint["result"])
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise BadCheckpoint(f"{path} does not fit: what it has as result is none")
    return checkpoint


def _first_sentence(error: Exception) -> str:
    return re.split(r"[.\n]", str(error) or type(error).__name__, maxsplit=1)[0]
