"""Beyond the paper: pooling on the grid that the data choose, equivariant under every shift.

Pooling windows of two columns begin at the even columns. A shift by one column pairs other columns, so that pooling
is equivariant under even shifts only. Here each sample chooses between the even and the odd columns, by the norm of
what would be pooled: let p be 0 or 1, shift by -p, then pool. No isometry and no gauge transformation changes the
norms, so the chosen grid moves with the sample.

Source: adaptive polyphase sampling, Chaman and Dokmanić, CVPR 2021, arXiv:2011.14214; a relative is Xu et al.,
*Group Equivariant Subsampling*, NeurIPS 2021, arXiv:2106.05886.
"""

import torch
from torch import Tensor

import fast
from fast import accelerated
from fields import Fields, cross_cut
from nn_layers import MobiusPool, strip_pool


def one_column_back(x: Tensor, fields: Fields) -> Tensor:
    """The isometry action by a shift of -1."""
    return torch.cat([x.narrow(3, 1, x.shape[3] - 1), cross_cut(x.narrow(3, 0, 1), fields)], dim=3)


@accelerated(by=fast.better_grid)
def better_grid(x: Tensor, fields: Fields) -> Tensor:
    """p of each sample as a boolean ``(N,)``: whether the fields pooled from the odd columns on have the larger norm."""
    even, odd = strip_pool(x, fields), strip_pool(one_column_back(x, fields), fields)
    return norm(odd) > norm(even)


def norm(x: Tensor) -> Tensor:
    """Of each sample, ``(N,)``, in float32 at least. In two steps: a long sum one by one would round more."""
    pixels = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.linalg.vector_norm(pixels, dim=(1, 2))


@accelerated(by=fast.shift_back)
def shift_back(x: Tensor, p: Tensor, fields: Fields) -> Tensor:
    """Each sample shifted by -p."""
    return torch.where(p[:, None, None, None], one_column_back(x, fields), x)


class PolyphasePool(MobiusPool):
    """`MobiusPool` on the even or the odd columns, whichever gives the larger norm.

    A shift of the input by t changes p to p' = (p + t) mod 2 and moves the output by (t + p - p') / 2, an integer:
    equivariant under all 2L isometries, and gauge equivariant. Equal norms take the even grid, which costs
    equivariance under odd shifts for fields whose two grids fit equally well up to rounding, such as a constant field
    with one pixel that differs.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, ceil(W / 2), L / 2)``.

    Raises:
        ValueError: as `MobiusPool`, and in `forward` for an odd L: once around a strip of odd length, the even columns
            have become the odd ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        p = better_grid(x.detach(), self.in_fields)
        return strip_pool(shift_back(x, p, self.in_fields), self.in_fields)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if x.shape[3] % 2:
            raise ValueError(f"polyphase pooling needs an even length L, got shape {tuple(x.shape)}")
