"""The files of a run, in a folder of its own:

    log.txt         what the terminal shows
    result.json     configuration, versions and hardware, every epoch, the final test errors
    checkpoint.pt   all that the run needs to go on: configuration, weights, optimizer, random
                    states, the epochs so far
    weights.pt      state_dict
    events.*        TensorBoard, with further events in pictures/; see events.py

All but the log and the events are written atomically after each epoch. Whatever ends a run, they
are complete, and of its last finished epoch. While a process writes to a folder, it holds the
folder's lock, which the system releases when the process ends.
"""

import io
import re
import time
from pathlib import Path

import torch

from training.checkpoints import CHECKPOINT_FORMAT
from training.files import say, write_atomically, write_json

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None


class Busy(Exception):
    """Another process holds the lock of this folder."""


class RunFolder:
    """Opens and locks a run's folder; makes it if it does not exist.

    Args:
        path: of the folder.
        verbose: whether `say` also prints.

    Raises:
        Busy: if another process holds its lock.
        OSError: if it cannot be made, written or locked.
    """

    def __init__(self, path, *, verbose: bool = True) -> None:
        self.path, self.verbose = Path(path), verbose
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._log = open(self.path / "log.txt", "a", encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot write in {path}: {_reason(error)}") from error
        try:
            _lock(self._log)
            for leftover in self.path.glob(".*.tmp"):  # of a process that was killed
                leftover.unlink()
        except BlockingIOError:
            self._log.close()
            raise Busy(f"another process is at work in {path}") from None
        except OSError as error:
            self._log.close()
            raise OSError(
                f"cannot lock {path}, so that two processes could work in it: {_reason(error)}"
            ) from error

    def log(self, line: str) -> None:
        try:
            print(line, file=self._log, flush=True)
        except OSError as error:
            raise OSError(f"cannot write {self.path / 'log.txt'}: {_reason(error)}") from error

    def say(self, line: str) -> None:
        self.log(line)
        if self.verbose:
            say(line)

    def save(self, checkpoint: dict) -> None:
        """Write the checkpoint, then the weights and the result that are in it."""
        self._save_tensors("checkpoint.pt", {"format": CHECKPOINT_FORMAT} | checkpoint)
        self._save_tensors("weights.pt", checkpoint["model"])
        self.save_result(checkpoint["result"])

    def _save_tensors(self, name: str, content: dict) -> None:
        # In memory first: torch.save to a file hides the reason of a failure, like a full disk.
        serialized = io.BytesIO()
        torch.save(content, serialized)
        with write_atomically(self.path / name) as file:
            file.write(serialized.getbuffer())

    def save_result(self, result: dict) -> None:
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        """Release the lock."""
        self._log.close()


def _lock(file) -> None:
    """Raises BlockingIOError if another process holds the lock, OSError if there are no locks."""
    if fcntl is None:
        raise OSError("this system has no flock")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _reason(error: OSError) -> str:
    return "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)


def new_folder(log_dir, stem: str) -> Path:
    """Make a new folder named by `stem` and the time. Raises OSError naming `log_dir`."""
    log_dir = Path(log_dir)
    stem = re.sub(r"[^\w.-]", "_", f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for name in (stem, *(f"{stem}-{i}" for i in range(2, 1000))):  # of the same second
            try:
                (log_dir / name).mkdir()
                return log_dir / name
            except FileExistsError:
                continue
        raise OSError("no free name left")
    except OSError as error:
        raise OSError(f"cannot make a folder in --log_dir {log_dir}: {_reason(error)}") from error
