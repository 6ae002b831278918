"""Test error of trained networks on digits moved by each isometry of the strip."""

import hashlib
from pathlib import Path

import torch

import fast
from study.runs import Study, run_name, settings_not_in_paper
from train import predict_at_every_shift
from training.checkpoints import load_network
from training.data import Data
from training.environment import describe_environment, is_gpu
from training.files import read_results_file, say, write_json
from training.options import Config

FORMAT = 1  # of error_against_shift.json
LISTED = 100  # changed predictions in a row of it


def with_weights(study: Study) -> list[Config]:
    """The finished runs whose weights are here. Raises ValueError if there are none."""
    found = [config for config in study.configs
             if study.result(config) and (study.folder(config) / "weights.pt").exists()]
    if not found:
        missing = study.folder(study.configs[0]) / "weights.pt"
        raise ValueError(f"there are no weights of a finished run, such as {missing}: without "
                         "--error_against_shift, the same command trains it (the runs that come "
                         "with this code have no weights: take another --results folder)")
    if missing := len(study.configs) - len(found):
        say(f"{missing} of {len(study.configs)} runs have no weights here, and are left out")
    return found


def measure_error_against_shift(study: Study, data: Data, device: torch.device) -> Path:
    """Test the study's networks, in float32, on digits moved by each isometry.

    Writes a row for each run into error_against_shift.json, and keeps the rows that are there.
    A row has the run's name, its settings that differ from the paper's and a hash of its weights;
    the error in % at each shift; the number of predictions (digits times shifts), how many of them
    differ from the one at shift 0, and the first of those as [shift, digit]. On a CPU, also how
    many differ if the formulas are computed without the faster functions of ``fast/``. Killed at
    any moment, it goes on with the row that is not there, or does not have this last number.

    Returns:
        The file's path.

    Raises:
        ValueError, OSError: for a damaged file, or rows of other data.
    """
    path = study.results / "error_against_shift.json"
    rows = read_error_against_shift(path) if path.exists() else []
    if any(row["sha256"] != data.sha256 for row in rows):
        raise ValueError(f"{path} is of another {data.file}: move it away")
    images, labels = data.splits["test_centered"]
    shifts = list(range(2 * images.shape[3]))
    for config in study.configs:
        name, weights = run_name(config), study.folder(config) / "weights.pt"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        model = load_network(weights, config.network()).model.to(device)
        row = next((row for row in rows if (row["run"], row["weights"]) == (name, digest)), None)
        if row is None:
            predictions = predict_at_every_shift(model, images)
            changed = (predictions != predictions[0]).nonzero().tolist()
            settings = settings_not_in_paper(config)
            settings.pop("precision", None)
            row = {
                "run": name, "model": config.model, "settings": settings,
                "train_mode": config.train_mode, "seed": config.seed,
                "sha256": data.sha256, "weights": digest,
                "environment": describe_environment(device),
                "errors": (100 * (predictions != labels).double().mean(1)).tolist(),
                "predictions": predictions.numel(), "changed": len(changed),
                "first_changed": changed[:LISTED],
            }
            rows = [row for row in rows if row["run"] != name] + [row]
            write_json(path, {"format": FORMAT, "shifts": shifts, "rows": rows})
            say(f"{name}: {min(row['errors']):.2f} to {max(row['errors']):.2f} %, "
                f"{row['changed']} of {row['predictions']} predictions are not those at shift 0")
        if "changed_formulas" not in row and not is_gpu(device):
            with fast.disabled():
                predictions = predict_at_every_shift(model, images)
            row["changed_formulas"] = int((predictions != predictions[0]).sum())
            write_json(path, {"format": FORMAT, "shifts": shifts, "rows": rows})
            say(f"{name}: {row['changed_formulas']} differ by the formulas alone")
    return path


def read_error_against_shift(path) -> list[dict]:
    """The rows of an error_against_shift.json.

    Raises:
        ValueError: naming the file, if it is damaged.
        OSError: naming the file, if it cannot be read.
    """
    if not Path(path).exists():
        raise OSError(f"there is no {path}: python reproduce.py --error_against_shift makes it")
    return read_results_file(path, FORMAT)["rows"]
