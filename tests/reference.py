"""Definitions written out, that the code is compared with, and what they are tried on."""

import torch
import torch.nn as nn

from building_blocks import EquivBatchNorm

DOUBLE = torch.float64
TOLERANCE = 1e-10
EXACT = 1e-12  # of equivariance, relative to the largest output, in float64
TYPES = {"triv": (1, 0, 0), "sign": (0, 1, 0), "reg": (0, 0, 1)}
FIELDS = [(2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 2, 0), (2, 0, 1), (0, 1, 2), (2, 1, 3)]
KERNEL_SIZES = (1, 3, 5, 7)
SIZES = [(6, 8), (7, 8), (6, 7), (5, 5)]  # (W, L), odd and even

PARAMETERS = {  # of each model, as published
    "cnn_same_channels": 1_501_162,
    "cnn_same_params": 832_190,
    "mobius_scalar": 901_962,
    "mobius_signflip": 819_962,
    "mobius_regular": 751_914,
    "mobius_irrep": 752_162,
    "mobius_mixed": 752_038,
}


def channels(fields) -> int:
    return fields[0] + fields[1] + 2 * fields[2]


def rho_matrix(fields) -> torch.Tensor:
    """rho(s) as a matrix, written out."""
    triv, sign, reg = fields
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    blocks = [torch.ones(1, 1)] * triv + [-torch.ones(1, 1)] * sign + [swap] * reg
    return torch.block_diag(*blocks).to(DOUBLE)


def act(fields, x: torch.Tensor) -> torch.Tensor:
    """rho(s) on dim 1."""
    return torch.einsum("ij,njwl->niwl", rho_matrix(fields).to(x.dtype), x)


def reference_cover(x: torch.Tensor, fields, first: int, last: int) -> torch.Tensor:
    """Columns first … last - 1 of the field continued over the cut both ways, one by one."""
    length = x.shape[3]
    columns = []
    for column in range(first, last):
        turns, column = divmod(column, length)
        values = x[:, :, :, column:column + 1]
        columns.append(act(fields, values.flip(2)) if turns % 2 else values)
    return torch.cat(columns, dim=3)


def features(fields, width: int, length: int, n: int = 2, dtype=DOUBLE) -> torch.Tensor:
    return torch.randn(n, channels(fields), width, length, dtype=dtype)


def on_blank_strip(fields, width: int, length: int, n: int = 2, dtype=DOUBLE) -> torch.Tensor:
    """As the features of a digit: a stroke of random values on a constant background.

    The background is 0 in sign-flip fields and has equal channels in regular ones.
    """
    triv, sign, reg = fields
    background = [
        0.1 * torch.rand(triv), torch.zeros(sign), 0.1 * torch.rand(reg).repeat_interleave(2),
    ]
    stroke = torch.rand(n, 1, width, length) < 0.3
    x = features(fields, width, length, n, dtype)
    return torch.where(stroke, x, torch.cat(background).to(dtype)[:, None, None])


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The same but for rounding, as other layers leave it: by up to 4 eps of the largest value."""
    noise = 2 * torch.rand(x.shape, dtype=x.dtype) - 1
    return x + 4 * torch.finfo(x.dtype).eps * x.abs().max() * noise


def all_shifts(length: int) -> range:
    return range(-2 * length, 2 * length + 1)


def randomized(module: nn.Module) -> nn.Module:
    """All parameters random: a zero bias would hide a wrong one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def randomized_norms(model: nn.Module) -> nn.Module:
    """Batch normalisation as after training, and biases away from their initial values."""
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, EquivBatchNorm)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model
