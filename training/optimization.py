"""Optimizers and schedules of the learning rate, by their names on the command line."""

import math

import torch
from torch import nn

from training.environment import is_gpu
from training.muon import Muon


def adam(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    parameters = list(model.parameters())
    # One kernel for all parameters. https://docs.pytorch.org/docs/stable/optim.html
    fused = is_gpu(parameters[0].device)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


# Called with the model, lr and weight_decay.
OPTIMIZERS = {"adam": adam, "muon": Muon}


def step(config, time: float) -> float:
    decays = int(time) // config.lr_decay_period if config.lr_decay_period else 0
    return (1 / config.lr_decay_factor) ** decays


def cosine(config, time: float) -> float:
    part = (time - config.warmup_epochs) / (config.num_epochs - config.warmup_epochs)
    return (1 + math.cos(math.pi * part)) / 2


# Called with the `Config` and the time in epochs; the factor of the learning rate after warm-up.
LR_SCHEDULES = {"step": step, "cosine": cosine}
