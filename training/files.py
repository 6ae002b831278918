"""Command lines whose errors are one line, and files that are complete or absent."""

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr, with exit status 2."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def option(self, name: str, text: str, default=None, **settings) -> None:
        """Add an option, which the parsed options contain only if it is given.

        Args:
            name: without the leading dashes.
            text: for the help and the docs.
            default: what holds otherwise, for the help and the docs. None: they show none.
            settings: further arguments of `add_argument`.
        """
        shown = "" if default is None else str(default)
        if isinstance(default, bool):
            shown = "on" if default else "off"
        elif isinstance(default, float):
            shown = f"{default:g}"
        action = self.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%") + (f" ({shown})" if shown else ""),
            **settings,
        )
        action.shown = text, shown

    def markdown(self) -> str:
        """A table of the options, for the pages."""
        rows = ["| option | default | |", "| --- | --- | --- |"]
        for action in self._actions[1:]:  # without --help
            text, shown = getattr(action, "shown", (action.help % vars(action), ""))
            if action.choices:
                text = ", ".join(f"`{choice}`" for choice in action.choices) + f"; {text}"
            text = re.sub(r"(?<!`)--\w+", r"`\g<0>`", text).replace("|", r"\|")
            names = ", ".join(f"`{name}`" for name in action.option_strings or [action.metavar])
            rows.append(f"| {names} | {f'`{shown}`' if shown else ''} | {text} |")
        return "\n".join(rows)

    def error(self, message) -> None:
        one_line = " ".join(str(message).split())
        if one_line.startswith("unrecognized arguments"):
            one_line += f" ({self.prog} -h lists the options)"
        self.exit(2, f"{self.prog}: error: {one_line}\n")


def say(line: str) -> None:
    """Print a line. Never raises: a closed pipe (| head) must not stop a training run."""
    try:
        print(line, flush=True)
    except UnicodeEncodeError:
        print(line.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def write_atomically(path):
    """Open a temporary binary file beside `path` that replaces it once it is complete.

    If writing fails or is interrupted, `path` stays as it was. A symbolic link stays one.

    Raises:
        ValueError: if `path` exists and is not a file.
        OSError: naming `path`, if it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: it is there and not a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path, content: dict) -> None:
    """Write JSON atomically. Raises ValueError for nan or infinity, else as `write_atomically`."""
    with write_atomically(path) as file:
        file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path) -> object:
    """Read JSON. Raises ValueError or OSError naming the file if it is damaged or unreadable."""
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in it")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise type(error)(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no JSON file ({error})") from error


def read_results_file(path, version: int) -> dict:
    """Read a JSON file of results.

    Raises:
        ValueError: naming the file, if it is damaged or of another format than `version`.
        OSError: naming the file, if it cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != version:
        raise ValueError(f"{path} is damaged or not of format {version}: move it away")
    return content
