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
    """Write results of finished runs. The reverse of `read_packed`.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    data, environments, rows = [], [], []
    for name, result in sorted(results.items()):
        row = {"run": name} | {key: value for key, value in result.items() if key != "status"}
        row["config"] = {option: value for option, value in result["config"].items()
                         if option not in DEFAULTS or value != DEFAULTS[option]}
        for key, values in (("data", data), ("environment", environments)):
            if result[key] not in values:
                values.append(result[key])
            row[key] = values.index(result[key])
        rows.append(row)
    # A default may change one day; these are the ones that the lines leave out.
    content = {"format": FORMAT, "defaults": with_newer_options({}), "data": data,
               "environments": environments, "runs": rows}
    text = ",\n".join(f'"{name}": {_json_lines(part)}' for name, part in content.items())
    with write_atomically(path) as file:
        file.write(f"{{\n{text}\n}}\n".encode())


def _json_lines(part) -> str:
    """JSON in one line, or in one line for each entry of a list."""
    if not isinstance(part, list):
        return json.dumps(part, allow_nan=False)
    return "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in part) + "\n]"


def has_curve(result: dict) -> bool:
    """Whether a run was tested before its last epoch."""
    return any("test_error" in key for record in result["epochs"][:-1] for key in record)
