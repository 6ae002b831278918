"""results/table5.json: many finished runs in one file, a line for each.

A line has the run's name, its settings that differ from the file's defaults, errors, times, and the
last epoch of its training curve. Data and environments are lists of their own; a line has indices
into them.
"""

import json
from pathlib import Path

from training.checkpoints import with_newer_options
from training.files import read_results_file, write_atomically
from training.options import DEFAULTS

FORMAT = 1
FILE = "table5.json"


def read_packed(path) -> dict[str, dict]:
    """Results of runs by name, as `read_result` gives them; an empty dict if there is no file.

    Raises:
        ValueError: naming the file, if it is damaged or of another format.
        OSError: naming the file, if it cannot be read.
    """
    if not Path(path).exists():
        return {}
    content, results = read_results_file(path, FORMAT), {}
    try:
        for row in content["runs"]:
            result = {"status": "finished"} | row
            result["config"] = with_newer_options(content["defaults"] | row["config"])
            result["data"] = content["data"][row["data"]]
            result["environment"] = content["environments"][row["environment"]]
            results[result.pop("run")] = result
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore it") from error
    return results


def write_packed(path, results: dict[str, dict]) -> None:
    """Write results of finished runs, without their training curves. The reverse of `read_packed`.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    shared, lines = {"data": [], "environment": []}, []
    for name, result in sorted(results.items()):
        row = {"run": name} | {key: value for key, value in result.items() if key != "status"}
        row["config"] = {option: value for option, value in result["config"].items()
                         if option not in DEFAULTS or value != DEFAULTS[option]}
        row["epochs"] = result["epochs"][-1:]
        for key, values in shared.items():
            if result[key] not in values:
                values.append(result[key])
            row[key] = values.index(result[key])
        lines.append(json.dumps(row, allow_nan=False))
    # A default may change one day; these are the ones that the lines leave out.
    head = {"format": FORMAT, "defaults": with_newer_options({}), "data": shared["data"],
            "environments": shared["environment"]}
    text = json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    with write_atomically(path) as file:
        file.write(text.encode())


def has_curve(result: dict) -> bool:
    """Whether a run was tested before its last epoch."""
    return any("test_error" in key for record in result["epochs"][:-1] for key in record)
