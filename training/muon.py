"""Muon for kernels, Adam for all other parameters.

    optimizer = Muon(model, lr=3e-3)

A step along the momentum M = U S Vᵀ of a kernel, a matrix of output channels times everything
else, changes few directions much, those in which a layer's gradients agree. Muon makes all singular
values equal and steps along U Vᵀ instead.

For a `MobiusConv`, M is the steerable kernel that its free values stand for, one for each pair of
field types. U Vᵀ is steerable because M is. For regular output fields, the sum and the difference
of the two channels of each field are a trivial and a sign-flip field, and M is block-diagonal, with
one block for the sums and one for the differences. Training does not depend on which channel of a
regular field is the first, as with Adam; if M were the array of free values, it would.

Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024); scale of
the steps: Liu et al., arXiv:2502.16982, Section 2.2.
"""

import inspect

import torch
from torch import Tensor, nn

from fields import REPRESENTATIONS, Fields, cross_cut
from nn_layers import STEERABLE_BLOCKS, MobiusConv

# Coefficients by Jordan et al. of an odd polynomial: it triples small values, keeps those about 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7  # added to a norm: below it, a gradient has no direction
ADAM_RMS = 0.2  # root mean square of a step, in learning rates: as Adam's, so that the same lr fits


def orthogonalize(parts: Tensor, steps: int = 5) -> Tensor:
    """Approximate U Vᵀ of matrices U S Vᵀ by Newton-Schulz iterations.

    Singular values of at least a hundredth of the norm become 0.6 … 1.2. Matrices whose norm is far
    below 1e-7 stay small.

    Args:
        parts: ``(parts, ..., rows, columns)``, the blocks of a block-diagonal matrix, which share
            its norm. Further dimensions hold a batch of such matrices.
        steps: number of iterations.

    Returns:
        Tensor of the same shape and dtype, computed in float32 at least.
    """
    a, b, c = COEFFICIENTS
    with torch.autocast(parts.device.type, enabled=False):
        matrix = parts.to(torch.promote_types(parts.dtype, torch.float32))
        norm = torch.linalg.vector_norm(matrix, dim=(0, -2, -1), keepdim=True)
        matrix = matrix / (norm + EPSILON)
        if matrix.shape[-2] > matrix.shape[-1]:
            matrix = matrix.mT
        # Each step multiplies the matrix from the left by a polynomial in its Gram matrix. That is
        # small: the steps only multiply polynomials, and the product meets the matrix once.
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
    """Muon for the kernels of `MobiusConv` and `nn.Conv2d` layers, `torch.optim.Adam` for the rest.

    Parametrized weights and layers that the model gets later are left to Adam.

    Args:
        model: whose parameters to optimize.
        lr: learning rate of both, at least 0.
        momentum: of the running mean of a kernel's gradients, at least 0 and below 1.
        weight_decay: of kernels only, and decoupled: each step subtracts lr times this part of
            them; at least 0. Its name in `param_groups` is "kernel_decay", because "weight_decay"
            is Adam's.

    Raises:
        ValueError, TypeError: for an argument that is not allowed.
    """

    def __init__(
        self, model: nn.Module, lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "model must be a module, whose layers say which parameters are kernels, "
                f"got {type(model).__name__}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be a number of at least 0 and below 1, got {momentum}")
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a number of at least 0, got {weight_decay}")
        super().__init__(model.parameters(), lr=lr)
        # Beside Adam's settings, where they can be changed and are saved like these.
        kernel_settings = {"momentum": momentum, "kernel_decay": weight_decay}
        self.defaults |= kernel_settings
        for group in self.param_groups:
            group |= kernel_settings
        # The pair of field types that each kernel maps between; None for a conventional layer.
        self.kernels: dict[nn.Parameter, tuple[str, str] | None] = {}
        for layer in model.modules():
            parameters = dict(layer.named_parameters(recurse=False))
            types_of = {}
            if isinstance(layer, MobiusConv):
                types_of = {f"weights_{a}2{b}": (a, b) for a, b in STEERABLE_BLOCKS}
            elif isinstance(layer, nn.Conv2d):
                types_of = {"weight": None}
            for name in types_of.keys() & parameters.keys():
                self.kernels[parameters[name]] = types_of[name]

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"kernels": self.kernels}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state, as any optimizer. Raises ValueError for another optimizer's."""
        settings = {"momentum", "kernel_decay"}
        if any(not settings <= set(group) for group in state_dict["param_groups"]):
            raise ValueError(
                "this is not the state of a Muon: its param_groups lack momentum and kernel_decay"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss and the gradients. Its loss is returned.
        """
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
                        parameter.grad = None  # Adam skips parameters without a gradient
                        self._step_of_kernel(parameter, gradients[parameter], group)
            # unwrap: without hooks, which this step has already called.
            inspect.unwrap(torch.optim.Adam.step)(self)
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        return loss

    def _step_of_kernel(self, kernel: Tensor, gradient: Tensor, group: dict) -> None:
        state = self.state[kernel]
        if not state:  # with names that Adam knows when it loads a state
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(kernel)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        # Nesterov's momentum: the gradient counts once more.
        direction = gradient.lerp(state["exp_avg"], group["momentum"])
        kernel.mul_(1 - group["lr"] * group["kernel_decay"])
        update = self._orthogonalized(direction, self.kernels[kernel])
        kernel.sub_(update, alpha=group["lr"] * ADAM_RMS)

    @staticmethod
    def _orthogonalized(direction: Tensor, types: tuple[str, str] | None) -> Tensor:
        """Make the singular values of a steerable kernel equal.

        Args:
            direction: in the space of the kernel's free values, ``(o, i, rows, k)``.
            types: of the input and output fields; None for a conventional kernel.

        Returns:
            Tensor of the same shape, with a root mean square of about 1.
        """
        in_type, out_type = types or (None, None)
        scale, parts = 1.0, direction[None]
        if out_type == "reg":
            # The free values are the kernel of the first channel; this is the second one's.
            in_count = direction.shape[1] // REPRESENTATIONS[in_type].dim
            in_fields = Fields(0, 0, 0)._replace(**{in_type: in_count})
            second = cross_cut(direction, in_fields)
            parts = torch.stack([direction + second, direction - second])
        elif types and in_type == out_type:
            # A value of the upper rows appears twice in the kernel, one of the centre row once.
            scale = direction.new_full((direction.shape[-2], 1), 0.5**0.5)
            scale[-1] = 1
            parts = scale * parts
        matrices = parts.flatten(-3)
        rows, columns = matrices.shape[-2:]
        rms = max(rows, columns / len(parts)) ** 0.5
        return rms * scale * orthogonalize(matrices).sum(0).view_as(direction)
