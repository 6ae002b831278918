"""Muon: momentum whose singular values are made equal, for kernels; Adam for all other parameters.

    optimizer = Muon(model.parameters(), lr=3e-3)

A step along the momentum of a kernel is mostly a step along few directions, those in which a layer's gradients agree. Muon
takes the matrix M = U S V^T of output channels times everything else, and steps along U V^T instead: along all directions
equally. Of a `MobiusConv` the parameters are coefficients of steerable kernels, and steerable the kernels remain.

Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024); the scale of its steps: Liu et al.,
arXiv:2502.16982, Section 2.2.
"""

import torch
from torch import Tensor

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
        params: parameters, as any optimizer takes them.
        lr: learning rate of both.
        momentum: of the running mean of a kernel's gradients, at least 0 and below 1.
        weight_decay: of kernels only, decoupled: each step takes lr times this part off them; at least 0.
        stacked: whether every parameter has a first dimension of networks. Each network's kernels are orthogonalized by themselves.

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(self, params, lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0, stacked: bool = False) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be a number of at least 0 and below 1, got {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be a number of at least 0, got {weight_decay}")
        super().__init__(params, lr=lr)
        of_kernels = {"momentum": momentum, "kernel_decay": weight_decay, "kernel_dims": 5 if stacked else 4}
        self.defaults |= of_kernels  # of groups that are added later
        for group in self.param_groups:
            group |= of_kernels | group

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
        direction = orthogonalize(gradient.lerp(state["exp_avg"], group["momentum"]).flatten(-3))
        kernel.mul_(1 - group["lr"] * group["kernel_decay"])
        kernel.sub_(direction.view_as(kernel), alpha=group["lr"] * ADAM_RMS * max(direction.shape[-2:]) ** 0.5)
