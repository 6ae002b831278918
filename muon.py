"""Muon: momentum whose singular values are made equal, for kernels; Adam for all other parameters.

    optimizer = Muon(model, lr=3e-3)

A step along the momentum of a kernel is mostly a step along few directions, those in which a layer's gradients agree. Muon
takes the matrix M = U S V^T of output channels times everything else, and steps along U V^T instead: along all directions
equally. For the kernels of a `MobiusConv`, M is the steerable kernel, not the array of its free values: so a step does not depend
on which of a regular field's two channels is called the first. Of the sum of the two channels and of their difference, which are a
trivial and a sign-flip field, M consists of two matrices, which are taken by themselves.

Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024); the scale of its steps: Liu et al.,
arXiv:2502.16982, Section 2.2.
"""

import torch
from torch import Tensor, nn

from fields import REPRESENTATIONS, Fields, cross_cut
from nn_layers import MobiusConv

# An odd polynomial that takes 0.7 … 1.2 to itself, and triples what is far below: after five, 0.01 is there too. By Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADAM_RMS = 0.2  # about that of Adam's steps, in units of the learning rate: the same learning rates do for both


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of matrices U S V^T: singular values that are not tiny beside the largest become 0.7 … 1.2.

    Args:
        matrix: ``(..., rows, columns)``; each of a batch by itself.
        steps: Newton-Schulz iterations.

    Returns:
        Tensor of the same shape; of zeros for zeros.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return orthogonalize(matrix.mT, steps).mT
    a, b, c = COEFFICIENTS
    matrix = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
    # Each step multiplies the matrix from the left by a polynomial in its Gram matrix, which is small: only there they are taken.
    gram = matrix @ matrix.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix


class Muon(torch.optim.Adam):
    """Muon for kernels, which are parameters of four dimensions; `torch.optim.Adam` for all others.

    Args:
        model: whose parameters to optimize.
        lr: learning rate of both.
        momentum: of the running mean of a kernel's gradients, at least 0 and below 1.
        weight_decay: of kernels only, decoupled: each step takes lr times this part off them; at least 0.
        stacked: parameters to optimize instead, by the names of the model's own: those of several networks, along a first dimension.
            The kernels of each are taken by themselves.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(self, model: nn.Module, lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0,
                 stacked: dict[str, Tensor] | None = None) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be a number of at least 0 and below 1, got {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be a number of at least 0, got {weight_decay}")
        parameters = dict(model.named_parameters()) if stacked is None else stacked
        super().__init__(parameters.values(), lr=lr)
        of_kernels = {"momentum": momentum, "kernel_decay": weight_decay, "kernel_dims": 4 if stacked is None else 5}
        self.defaults |= of_kernels  # of groups that are added later
        for group in self.param_groups:
            group |= of_kernels
        # Of weights that give regular fields, those that they take.
        self.in_fields = {
            parameters[name]: Fields(0, 0, 0)._replace(**{in_type: getattr(layer.in_fields, in_type)})
            for path, layer in model.named_modules() if isinstance(layer, MobiusConv)
            for in_type in REPRESENTATIONS if (name := f"{path}.weights_{in_type}2reg".lstrip(".")) in parameters
        }

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"in_fields": self.in_fields}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == group["kernel_dims"] and parameter.grad is not None:
                    gradients[parameter] = parameter.grad
                    self._step_of_kernel(parameter, group)
                    parameter.grad = None  # Adam leaves alone what has no gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _step_of_kernel(self, kernel: Tensor, group: dict) -> None:
        state, gradient = self.state[kernel], kernel.grad
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(kernel)}  # by the names that Adam looks for when it is loaded
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        # Nesterov's momentum: the gradient counts once more.
        parts = self._parts(kernel, gradient.lerp(state["exp_avg"], group["momentum"])).flatten(-3)
        rows, columns = parts.shape[-2:]
        kernel.mul_(1 - group["lr"] * group["kernel_decay"])
        kernel.sub_(orthogonalize(parts).sum(0).view_as(kernel), alpha=group["lr"] * ADAM_RMS * max(rows, columns / len(parts)) ** 0.5)

    def _parts(self, kernel: Tensor, direction: Tensor) -> Tensor:
        """Of a direction in the space of a kernel's values, (parts, ...), those to the irreducible fields that its output consists of."""
        if kernel not in self.in_fields:
            return direction[None]
        # What a regular field's second channel has where the first has the direction.
        second = cross_cut(direction.flatten(0, -4), self.in_fields[kernel]).view_as(direction)
        return torch.stack([direction + second, direction - second])
