"""Beyond the paper: for networks of your own.

    EquivBatchNorm    batch normalisation for each field type
    MobiusSequential  nn.Sequential that refuses layers whose field types do not match
    export            an equal network whose convolutions are nn.Conv2d

docs/layers.md shows how networks are built from them.
"""

import copy

import torch
import torch.nn as nn
from torch import Tensor

from fields import REPRESENTATIONS, Fields, as_fields, check_input, split_types
from nn_layers import EquivNonlin, MobiusConv, MobiusConvNaive


def field_statistics(x: Tensor, fields: Fields) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and unbiased variance of each field, over samples, its channels and pixels.

    Both channels of a regular field count, as s swaps them. The mean of sign-flip fields is taken
    as 0, the only invariant value; their variance is then the mean square.

    Returns:
        Mean, ``(m_triv + m_reg,)``; variance and unbiased variance, ``(m_triv + m_sign + m_reg,)``
        each; in float32 for half precision.
    """
    statistics = []
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for name, block in split_types(x, fields).items():
        rep = REPRESENTATIONS[name]
        values = block.unflatten(1, (-1, rep.dim))  # (N, fields, dim, W, L)
        if rep.invariant_bias:
            var, mean = torch.var_mean(values, dim=(0, 2, 3, 4), correction=0)
            n = values[:, 0].numel()
            statistics.append((mean, var, var * (n / (n - 1))))
        else:
            mean_square = values.square().mean(dim=(0, 2, 3, 4))
            statistics.append((mean_square[:0], mean_square, mean_square))
    return tuple(map(torch.cat, zip(*statistics)))


class EquivBatchNorm(nn.Module):
    """Batch normalisation that respects the field types; otherwise as `nn.BatchNorm2d`.

    Trivial fields: (x - mean) / sqrt(variance + eps) * weight + bias, as usual. Regular fields: the
    same, and the two channels of a field share statistics and parameters. Sign-flip fields:
    x / sqrt(mean square + eps) * weight, since a mean or bias other than 0 does not change sign.

    Commutes with `gauge_transform` and `isometry_action`, in training too, even if each sample is
    shifted by a t of its own: the statistics are sums over all samples and pixels.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.
        eps: added to the variance.
        momentum: weight of a batch in the running averages; None for the mean of all batches.
        affine: whether there are parameters.
        device, dtype: of parameters and buffers.

    Shape:
        ``(N, C, W, L)`` to the same.

    Parameters:
        weight: ``(m_triv + m_sign + m_reg,)``, initially 1.
        bias: ``(m_triv + m_reg,)``, initially 0.

    Buffers:
        running_mean: ``(m_triv + m_reg,)``.
        running_var: ``(m_triv + m_sign + m_reg,)``; of sign-flip fields, the mean square.
        num_batches_tracked: number of batches seen in training.

    Raises:
        ValueError: for multiplicities that are not allowed; in `forward`, for an input that is not
            4-d with C channels, not floating point, or in training has one value per channel.
    """

    def __init__(
        self, in_fields, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, *,
        device=None, dtype=None,
    ) -> None:
        super().__init__()
        self.in_fields = self.out_fields = as_fields(in_fields, "in_fields")
        self.eps, self.momentum, self.affine = eps, momentum, affine
        triv, sign, reg = self.in_fields
        var = torch.empty(triv + sign + reg, device=device, dtype=dtype)
        mean = torch.empty(triv + reg, device=device, dtype=dtype)
        self.weight, self.bias = None, None
        if affine:
            self.weight = nn.Parameter(torch.empty_like(var))
            self.bias = nn.Parameter(torch.empty_like(mean))
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights 1, biases 0, running averages as before the first batch."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_fields)
        if self.training:
            mean, var = self._batch_statistics(x)
        else:
            mean, var = self.running_mean, self.running_var
        mean, var, weight, bias = self._expand(mean, var)
        scale = weight * torch.rsqrt(var + self.eps)
        shift = bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each field; the running averages take a step towards them."""
        if x.numel() <= x.shape[1]:
            raise ValueError(
                f"training needs more than one value per channel, got shape {tuple(x.shape)}"
            )
        mean, var, unbiased = field_statistics(x, self.in_fields)
        with torch.no_grad():
            self.num_batches_tracked += 1
            step = self.momentum
            if step is None:
                step = 1 / self.num_batches_tracked.to(mean.dtype)
            self.running_mean += step * (mean - self.running_mean)
            self.running_var += step * (unbiased - self.running_var)
        return mean, var

    def _expand(self, mean: Tensor, var: Tensor) -> list[Tensor]:
        """Mean, variance, weight and bias of each channel, ``(C,)``; float32 for half precision."""
        triv, sign, _ = self.in_fields
        weight, bias = self.weight, self.bias
        if not self.affine:
            weight, bias = torch.ones_like(var), torch.zeros_like(mean)
        mean, bias = (
            torch.cat([shift[:triv], shift.new_zeros(sign), shift[triv:]]) for shift in (mean, bias)
        )
        wide = torch.promote_types(var.dtype, torch.float32)
        return [
            torch.cat([values[:triv + sign], values[triv + sign:].repeat_interleave(2)]).to(wide)
            for values in (mean, var, weight, bias)
        ]

    def export(self) -> nn.Module:
        """An equal layer, with parameters of its own.

        In evaluation, an `nn.BatchNorm2d`, for all field types. It is not equal in training, where
        it takes statistics of each channel: in training mode, a copy, except for trivial fields.
        """
        if self.training and self.in_fields.sign + self.in_fields.reg:
            return copy.deepcopy(self)
        with torch.no_grad():
            mean, var, weight, bias = self._expand(self.running_mean, self.running_var)
        norm = nn.BatchNorm2d(
            len(mean), self.eps, self.momentum, self.affine,
            device=mean.device, dtype=self.running_mean.dtype,
        )
        parameters = {"weight": weight, "bias": bias} if self.affine else {}
        norm.load_state_dict(parameters | {
            "running_mean": mean, "running_var": var,
            "num_batches_tracked": self.num_batches_tracked,
        })
        norm.requires_grad_(any(p.requires_grad for p in self.parameters()))
        return norm.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.in_fields)}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}"
        )


class MobiusSequential(nn.Sequential):
    """`nn.Sequential` that checks the field types: what one layer gives, the next one must take.

    It compares each layer's `in_fields` with the `out_fields` of the last layer before it that has
    any. Layers without these attributes, such as `nn.Dropout2d`, pass unchecked: whether they keep
    equivariance, `equivariance.assert_equivariant` tells.

    Args:
        layers: as of `nn.Sequential`.

    Attributes:
        in_fields, out_fields: of the first and the last layer that has them; None without any.

    Raises:
        ValueError: for a layer whose `in_fields` are not what comes before. Layers that are
            appended later are not checked.
    """

    def __init__(self, *layers) -> None:
        super().__init__(*layers)
        self.in_fields = self.out_fields = before = None
        for name, layer in self._modules.items():
            if getattr(layer, "in_fields", None) is None:
                continue
            place, in_fields = f"layer {name} ({type(layer).__name__})", as_fields(layer.in_fields)
            if before is None:
                self.in_fields = in_fields
            elif in_fields != self.out_fields:
                raise ValueError(
                    f"{place} has in_fields {tuple(in_fields)}, "
                    f"but {before} has out_fields {tuple(self.out_fields)}"
                )
            before, self.out_fields = place, as_fields(layer.out_fields, f"out_fields of {place}")


def export(model: nn.Module) -> nn.Module:
    """An equal network without anything to expand: its convolutions are a padding and an
    `nn.Conv2d`.

    Args:
        model: any module; this library's layers that have an `export` method are replaced by what
            it returns, the others copied.

    Returns:
        A copy with weights of its own, in the same mode (training or evaluation). Layers for which
        torch.nn has no counterpart stay what they are: pooling (it goes on over the cut),
        nonlinearities of sign-flip fields, and batch normalisation in training mode.
    """
    # In a list, since the model itself can be one such layer.
    exported = copy.deepcopy(nn.ModuleList([model]))
    replaced = {}  # a layer that is used twice is exported once
    for module in list(exported.modules()):
        for name, child in module._modules.items():
            if isinstance(child, (MobiusConv, MobiusConvNaive, EquivNonlin, EquivBatchNorm)):
                if child not in replaced:
                    replaced[child] = child.export()
                module._modules[name] = replaced[child]
    return exported[0]
