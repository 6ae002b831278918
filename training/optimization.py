"""Optimizers and schedules of the learning rate, by their names on the command line."""

import math

import torch
from torch import Tensor, nn

from training.environment import is_gpu
from training.muon import Muon


def adam(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    parameters = list(model.parameters())
    # One kernel for all parameters. https://docs.pytorch.org/docs/stable/optim.html
    fused = is_gpu(parameters[0].device)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


# Called with the model, lr and weight_decay.
OPTIMIZERS = {"adam": adam, "muon": Muon}


def restore(optimizer: torch.optim.Optimizer, stored: dict) -> None:
    """Load what an optimizer of the same kind remembered, but no settings.

    It takes a step before, which changes the parameters: load them afterwards.

    Args:
        optimizer: a new one.
        stored: the other one's state_dict.

    Raises:
        ValueError: if it remembers something else, or tensors of other shapes.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the tensors that it remembers
    optimizer.zero_grad()
    own = optimizer.state_dict()

    def shapes(states: dict) -> dict:
        return {
            (index, name): value.shape for index, state in states.items()
            for name, value in state.items() if isinstance(value, Tensor)
        }

    if shapes(stored["state"]) != shapes(own["state"]):
        raise ValueError("the optimizer's state has other names or shapes")
    optimizer.load_state_dict(own | {"state": stored["state"]})


def step(config, time: float) -> float:
    decays = int(time) // config.lr_decay_period if config.lr_decay_period else 0
    return (1 / config.lr_decay_factor) ** decays


def cosine(config, time: float) -> float:
    part = (time - config.warmup_epochs) / (config.num_epochs - config.warmup_epochs)
    return (1 + math.cos(math.pi * part)) / 2


# Called with the `Config` and the time in epochs; the factor of the learning rate after warm-up.
LR_SCHEDULES = {"step": step, "cosine": cosine}
