"""Trained networks that come with the code, in pretrained/.

    python -m study.pretrained NAME logs/RUN        # takes over the network of a finished run

NAME.pt has the weights, NAME.json the result of the run and what the network says of a hundred test
digits, those in digits.npz. The tests ask it again.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convert_mnist import SCALAR
from fields import isometry_action
from train import predict
from training.checkpoints import load_network, read_result
from training.files import read_json, say, write_atomically, write_json

FOLDER = Path(__file__).resolve().parents[1] / "pretrained"


def hundred_digits() -> dict[str, Tensor]:
    """Test digits ``(100, 1, 28, 28)``, centered and shifted."""
    with np.load(FOLDER / "digits.npz", allow_pickle=False) as npz:
        images = torch.from_numpy(npz["images"]).float() / 255
        shifts = torch.from_numpy(npz["shifts"])
    return {"centered": images, "shifted": isometry_action(images, shifts, SCALAR)}


def predictions(path) -> dict[str, list[int]]:
    """Predicted classes of the hundred digits, centered and shifted, by the network in a file."""
    model = load_network(path, {}).model
    return {name: predict(model, digits).tolist() for name, digits in hundred_digits().items()}


def take_over(name: str, run) -> None:
    weights, result = Path(run, "weights.pt"), read_result(Path(run, "result.json"))
    if result["status"] != "finished":
        raise ValueError(f"the run in {run} is not finished")
    result["predictions"] = predictions(weights)
    with write_atomically(FOLDER / f"{name}.pt") as file:
        file.write(weights.read_bytes())
    write_json(FOLDER / f"{name}.json", result)


def networks() -> dict[str, dict]:
    """The content of each JSON, by name."""
    return {path.stem: read_json(path) for path in sorted(FOLDER.glob("*.json"))}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    take_over(*sys.argv[1:])
    say(f"wrote {FOLDER / sys.argv[1]}.pt and .json")
