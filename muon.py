"""Muon: momentum whose singular values are made equal, for kernels; Adam for all other parameters.

    optimizer = Muon(model, lr=3e-3)

A step along the momentum of a kernel is mostly a step along few directions, those in which a layer's gradients agree. Muon
takes it for a matrix M = U S V^T, of output channels times everything else, and steps along U V^T instead: along all directions
equally.

Of a `MobiusConv`, M is the steerable kernel that its free values stand for, not the array of them; one for each pair of field types.
U V^T is steerable as M is. For a regular output field, the sum and the difference of its two channels are a trivial and a sign-flip
field, and M falls into one matrix for each. As with Adam, and unlike with the array in place of M, it makes no difference which of a
field's two channels is the first.

Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024); the scale of its steps: Liu et al.,
arXiv:2502.16982, Section 2.2.
"""

import inspect

import torch
from torch import Tensor, nn

from fields import REPRESENTATIONS, Fields, cross_cut
from nn_layers import STEERABLE_BLOCKS, MobiusConv

# Of an odd polynomial that triples what is small, and leaves what is about 1 there; by Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7  # added to a norm: a gradient that small has no direction
ADAM_RMS = 0.2  # about that of Adam's steps, in units of the learning rate: the same learning rates do for both


def orthogonalize(parts: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of matrices U S V^T, by Newton-Schulz iterations.

    Singular values of at least a hundredth of the norm become 0.6 … 1.2. Matrices with a norm far below 1e-7 stay small.

    Args:
        parts: ``(parts, ..., rows, columns)``, the blocks of a block-diagonal matrix, which share its norm; in between, a batch of such
            matrices, each of which is taken by itself.
        steps: number of iterations.

    Returns:
        Tensor of the same shape and dtype, computed in float32 at least.
    """
    a, b, c = COEFFICIENTS
    with torch.autocast(parts.device.type, enabled=False):
        matrix = parts.to(torch.promote_types(parts.dtype, torch.float32))
        matrix = matrix / (torch.linalg.vector_norm(matrix, dim=(0, -2, -1), keepdim=True) + EPSILON)
        if matrix.shape[-2] > matrix.shape[-1]:
            matrix = matrix.mT
        # Each step multiplies the matrix from the left by a polynomial in its Gram matrix, which is small: only there they are taken.
        gram = matrix @ matrix.mT
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        product = identity
        for _ in range(steps):
            factor = a * identity + b * gram + c * gram @ gram
            product = factor @ product
            gram = factor @ gram @ factor
        matrix = product @ matrix
        return (matrix if matrix.shape[-2:] == parts.shape[-2:] else matrix.mT).to(parts.dtype)


class Muon(torch.optim.Adam):
    """Muon for kernels, the weights of the model's `MobiusConv` and `nn.Conv2d` layers; `torch.optim.Adam` for all other parameters.

    Weights that are parametrized are not known for a kernel, nor are those of layers that are added later.

    Args:
        model: whose parameters to optimize.
        lr: learning rate of both, at least 0.
        momentum: of the running mean of a kernel's gradients, at least 0 and below 1.
        weight_decay: of kernels only, decoupled: each step takes lr times this part off them; at least 0. In `param_groups` it is
            "kernel_decay"; "weight_decay" is Adam's there.
        stacked: parameters to optimize instead, by the names of the model's own: those of several networks, along a first dimension.
            The kernels of each are taken by themselves.

    Raises:
        ValueError, TypeError: for an argument that is not allowed.
    """

    def __init__(self, model: nn.Module, lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0,
                 stacked: dict[str, Tensor] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, whose layers say which parameters are kernels, got {type(model).__name__}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be a number of at least 0 and below 1, got {momentum}")
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a number of at least 0, got {weight_decay}")
        parameters = dict(model.named_parameters()) if stacked is None else stacked
        super().__init__(parameters.values(), lr=lr)
        of_kernels = {"momentum": momentum, "kernel_decay": weight_decay}  # beside Adam's settings, where others change and save them too
        self.defaults |= of_kernels
        for group in self.param_groups:
            group |= of_kernels
        self.kernels = {}  # the field types between which each of them maps; None in a conventional layer
        for path, layer in model.named_modules():
            blocks = {}
            if isinstance(layer, MobiusConv):
                blocks = {f"weights_{in_type}2{out_type}": (in_type, out_type) for in_type, out_type in STEERABLE_BLOCKS}
            elif isinstance(layer, nn.Conv2d):
                blocks = {"weight": None}
            for name, types in blocks.items():
                name = f"{path}.{name}" if path else name
                if name in parameters:
                    self.kernels[parameters[name]] = types

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"kernels": self.kernels}

    def load_state_dict(self, state_dict: dict) -> None:
        """As of any optimizer. Raises ValueError for the state of another kind."""
        if any(not {"momentum", "kernel_decay"} <= set(group) for group in state_dict["param_groups"]):
            raise ValueError("this is not the state of a Muon: its param_groups lack momentum and kernel_decay")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all parameters that have a gradient. Returns the loss of a `closure` that computes it and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {}
        try:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter in self.kernels and parameter.grad is not None:
                        gradients[parameter] = parameter.grad
                        parameter.grad = None  # Adam leaves alone what has no gradient
                        self._step_of_kernel(parameter, gradients[parameter], group)
            inspect.unwrap(torch.optim.Adam.step)(self)  # without hooks, which are those of this step
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        return loss

    def _step_of_kernel(self, kernel: Tensor, gradient: Tensor, group: dict) -> None:
        state = self.state[kernel]
        if not state:  # by the names that Adam looks for when it is loaded
            state |= {"step": torch.tensor(0.0, device="cpu"), "exp_avg": torch.zeros_like(kernel)}
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        # Nesterov's momentum: the gradient counts once more.
        direction = gradient.lerp(state["exp_avg"], group["momentum"])
        kernel.mul_(1 - group["lr"] * group["kernel_decay"])
        kernel.sub_(self._orthogonalized(direction, self.kernels[kernel]), alpha=group["lr"] * ADAM_RMS)

    @staticmethod
    def _orthogonalized(direction: Tensor, types: tuple[str, str] | None) -> Tensor:
        """A direction in the space of a block's free values, ``(..., o, i, rows, k)``, with the block's singular values made equal.

        Its root mean square is about 1 where they all are.
        """
        in_type, out_type = types or (None, None)
        scale, parts = 1.0, direction[None]
        if out_type == "reg":
            # What the second channel has where the first has the direction.
            in_fields = Fields(0, 0, 0)._replace(**{in_type: direction.shape[-3] // REPRESENTATIONS[in_type].dim})
            second = cross_cut(direction.flatten(0, -4), in_fields).view_as(direction)
            parts = torch.stack([direction + second, direction - second])
        elif types and in_type == out_type:
            # A value of the upper rows stands for two, one of the centre row for itself.
            scale = direction.new_full((direction.shape[-2], 1), 0.5**0.5)
            scale[-1] = 1
            parts = scale * parts
        matrices = parts.flatten(-3)
        rows, columns = matrices.shape[-2:]
        return max(rows, columns / len(parts)) ** 0.5 * scale * orthogonalize(matrices).sum(0).view_as(direction)
