"""Beyond the paper: pooling on the grid that the data choose, equivariant under every shift.

Pooling windows of two columns begin at the even columns. A shift by one column pairs other columns,
so that pooling is equivariant under even shifts only. Here each sample chooses: let p be 0 or 1,
whichever gives pooled fields of the larger norm; shift by -p, then pool. A shift by one column
exchanges the two grids and their norms, so that the same windows win.

Source: adaptive polyphase sampling, Chaman and Dokmanić, CVPR 2021, arXiv:2011.14214; a relative is
Xu et al., *Group Equivariant Subsampling*, NeurIPS 2021, arXiv:2106.05886.
"""

import torch
from torch import Tensor

import fast
from fast import accelerated
from fields import Fields, check_input, sample_norms
from nn_layers import MobiusPool, strip_pool


@accelerated(by=fast.polyphase_pool)
def polyphase_pool(x: Tensor, fields: Fields) -> Tensor:
    """2 x 2 pooling with stride 2, of each sample on the grid that gives the larger norm."""
    windows = strip_pool(x, fields, step=1)
    even, odd = windows[..., 0::2], windows[..., 1::2]
    p = sample_norms(odd) > sample_norms(even)
    return torch.where(p[:, None, None, None], odd, even)


class PolyphasePool(MobiusPool):
    """`MobiusPool` on the even or the odd columns, whichever gives the larger norm.

    Windows begin at column p, 0 or 1. A shift of the input by t changes p to p' = (p + t) mod 2 and
    moves the output by the integer (t + p - p') / 2: equivariant under all 2L isometries, and gauge
    equivariant. Equal norms take the even grid. So odd shifts can break equivariance if both norms
    are equal up to rounding, as for a constant field with one pixel that differs. The output does
    not say which grid it has: upsampled, it need not lie on the input.

    Args:
        in_fields: multiplicities ``(m_triv, m_sign, m_reg)``.

    Shape:
        ``(N, C, W, L)`` to ``(N, C, ceil(W / 2), L / 2)``.

    Raises:
        ValueError: as `MobiusPool`, and in `forward` for an odd L: once around a strip of odd
            length, the even columns have become the odd ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_fields)
        if x.shape[3] % 2:
            raise ValueError(
                f"polyphase pooling needs an even length L, got shape {tuple(x.shape)}"
            )
        return polyphase_pool(x, self.in_fields)
