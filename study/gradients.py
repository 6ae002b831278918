"""The norm of the gradient at each step, with the exact and with the smoothed sign."""

import contextlib
import tempfile

import torch

from train import Run
from training.data import Data
from training.environment import describe_environment
from training.options import Config

SIGNS = (0.0, 1e-8)  # sign_eps of each network; the published runs used the second
EPOCHS = 2
FORMAT = 1  # of gradient_norms.json


def gradient_norms(config: Config, data: Data) -> list[float]:
    """Train a network and return the L2 norm of the gradient over all parameters at each step."""
    norms = []

    def record(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(Run(config, folder, data, verbose=False)) as run:
            run.optimizer.register_step_pre_hook(record)
            run.train()
    return norms


def measure_gradient_norms(digits: Data, **options) -> dict:
    """Train mobius_signflip, seed 0, with each of `SIGNS`; the content of gradient_norms.json.

    Args:
        digits: what to train on, on the CPU.
        options: further options of `Config`.
    """
    defaults = {"num_epochs": EPOCHS, "device": "cpu", "eval_freq": 0, "tensorboard": False}
    curves = []
    for sign_eps in SIGNS:
        config = Config("mobius_signflip", sign_eps=sign_eps, **defaults | options)
        curves.append({"config": config.protocol(), "norms": gradient_norms(config, digits)})
    return {
        "format": FORMAT,
        "command": "python visualize.py gradient_norm",
        "environment": describe_environment(torch.device("cpu")),
        "data": {"file": digits.file, "sha256": digits.sha256},
        "curves": curves,
    }
