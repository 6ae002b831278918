"""A pretended GPU, on which tensors have a shape, a dtype and a device, but no values.

    with PretendedGPU() as gpu:
        model = build_model("mobius_regular").to(gpu.device)
        ...                                 # anything that the code does on a real one
    gpu.launches, gpu.waits                 # what it did

    python -m training.pretended_gpu [MODEL ...]    # launches of a training step, as JSON

It shows three things without a GPU. An operation on tensors of two devices raises an error, as
there. `launches` counts kernels that the host would launch, `waits` what makes the host wait for
the GPU. It does not show time, memory or numbers: reading a value gives 0.

It stands on PyTorch's private interface to devices written in Python and needs PyTorch 2.9: where
that is missing, importing this file raises ImportError. The device is registered for the whole
process and cannot be taken back, so use it in a process of its own.
"""

import collections
import json
import sys
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule, _setup_privateuseone_for_python_backend,
)

from convert_mnist import LENGTH, WIDTH
from models import MODELS, POOLINGS, build_model

NAME = "pretended"
aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided
}
DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put}

# Under autocast these compute in bfloat16 and float32, as on CUDA. Only operations of these models
# are listed. https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
IN_BFLOAT16 = ("conv2d", "linear", "matmul", "mm", "bmm", "addmm")
IN_FLOAT32 = ("linalg_vector_norm", "sum", "sum.dim_IntList", "exp", "log_softmax.int")


class PretendedGPU(TorchDispatchMode):
    """Context in which the device `device` exists.

    launches: number of operations on its tensors, without views, allocations and copies from and
        to the host. Each counts as one, however many kernels it has.
    waits: number of times that the host waits for the GPU, by the name of the operation. Copies
        from and to the host are among them: their memory is pageable.
    """

    def __init__(self) -> None:
        super().__init__()
        _register()
        self.device = torch.device(NAME, 0)
        self.launches, self.waits = 0, collections.Counter()
        self._fake = FakeTensorMode()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asks a tensor for its device
            return args[0].fake_device
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [isinstance(x, FakeTensor) for x in tensors]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == NAME
        if not any(here) and not to_device:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet is aten.copy_ and not all(here) or packet is aten._to_copy and (
            target is not None and to_device != here[0]
        ):
            return self._copy(packet, *args, **kwargs)
        if packet in INDEXING:
            args = (args[0], [self._index(index) for index in args[1]], *args[2:])
        elif DEPENDS_ON_VALUES & set(func.tags):
            return self._value(packet, *args)
        if not func.is_view and packet not in ALLOCATIONS:
            self.launches += 1
        if not all(here):
            args, kwargs = tree_map(partial(self._as_fake, func), (args, kwargs))
        with self._fake:
            return func(*args, **kwargs)

    def _as_fake(self, func, x):
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        if x.ndim:  # numbers of the host can take part
            raise RuntimeError(f"{func} got tensors on {NAME} and on {x.device}")
        return self._fake.from_tensor(x)

    def _wait(self, what: str) -> None:
        self.waits[what] += 1

    def _copy(self, packet, x: Tensor, source: Tensor | None = None, **options) -> Tensor:
        """`_to_copy` of x or `copy_` into x, between the host and this device."""
        in_place = source is not None
        to_host = isinstance(source if in_place else x, FakeTensor)
        self._wait("copy to the host" if to_host else "copy to the device")
        if in_place:
            return x.zero_() if to_host else x
        dtype = options.get("dtype") or x.dtype
        if to_host:
            return torch.zeros(x.shape, dtype=dtype)
        with self._fake:
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=self.device)

    def _index(self, index: Tensor | None) -> Tensor | None:
        """An index that needs no wait, in place of one that does."""
        if index is None:
            return None
        if not isinstance(index, FakeTensor):
            self._wait("index on the host")
            with self._fake:
                index = torch.empty(index.shape, dtype=index.dtype, device=self.device)
        if index.dtype in (torch.bool, torch.uint8):
            self._wait("boolean index")
            index = index.new_empty(0, dtype=torch.long)
        return index

    def _value(self, packet, x: Tensor, *args):
        """What an operation gives whose result, or its shape, depends on values: of zeros."""
        self._wait(packet.__name__)
        if packet is aten._local_scalar_dense:  # item()
            return torch.zeros((), dtype=x.dtype).item()
        if packet is aten.equal:
            return True
        if packet is aten.nonzero:
            return x.new_empty((0, x.ndim), dtype=torch.long)
        raise NotImplementedError(f"{packet} waits for the GPU")


class _Module(_DummyBackendModule):
    """What torch.cuda is to a real GPU."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def get_device_name(device=None) -> str:
        return "pretended GPU"

    @staticmethod
    def get_rng_state(device=None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state: Tensor, device=None) -> None:
        pass


@cache
def _register() -> list[torch.library.Library]:
    """Register the device and its autocast. What is returned must stay alive."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    key = torch._C.DispatchKey.AutocastPrivateUse1
    every, library = (torch.library.Library(name, "IMPL", key.name) for name in ("_", "aten"))
    every.fallback(torch.library.fallthrough_kernel)

    def register(name: str, dtype: torch.dtype) -> None:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")

        def cast(x):
            is_wider = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(dtype) if is_wider and x.dtype != torch.float64 else x

        def kernel(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                args, kwargs = tree_map(cast, (args, kwargs))
                return op(*args, **kwargs)

        library.impl(name, kernel)

    for name in IN_BFLOAT16:
        register(name, torch.bfloat16)
    for name in IN_FLOAT32:
        register(name, torch.float32)
    return [every, library]


def launches(build: Callable[[], nn.Module]) -> int:
    """Launches of a training step, forward and backward without the optimizer, in bfloat16.

    Args:
        build: makes the model.
    """
    with PretendedGPU() as gpu:
        model = build().to(gpu.device).train()
        images = torch.empty(2, 1, WIDTH, LENGTH, device=gpu.device)
        labels = torch.empty(2, dtype=torch.long, device=gpu.device)
        gpu.launches = 0
        with torch.autocast(gpu.device.type, torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        return gpu.launches


if __name__ == "__main__":
    print(json.dumps({
        name: {
            pooling: launches(partial(build_model, name, pooling=pooling))
            for pooling in POOLINGS
        }
        for name in sys.argv[1:] or MODELS
    }))
