"""The same numbers in less time on a CPU, up to rounding.

The formulas of the layers stand in `nn_layers.py` and `polyphase.py`; a function in here, its
*twin*, computes the same:

    @accelerated(by=fast.pad_columns)
    def pad_columns(x, pad, fields): ...        # the formula

dispatch.py     when a twin stands in
elementwise.py  twins of padding, nonlinearity and pooling: fewer passes over memory
spectral.py     twin of the convolution, in a Fourier basis
kept.py         kernels that are expanded once in evaluation
memory.py       the memory format, and memory that glibc keeps

``with fast.disabled():`` computes by the formulas alone. In bfloat16, the rounding errors of the
Fourier basis are about three times those of the formula.
"""

from fast.dispatch import TWINS, accelerated, disabled
from fast.elementwise import equiv_elu, max_pool, pad_columns, polyphase_pool
from fast.kept import kept_without_gradients
from fast.memory import channels_last, keep_freed_memory
from fast.spectral import naive_conv, strip_conv

__all__ = [
    "TWINS", "accelerated", "channels_last", "disabled", "equiv_elu", "keep_freed_memory",
    "kept_without_gradients", "max_pool", "naive_conv", "pad_columns", "polyphase_pool",
    "strip_conv",
]
