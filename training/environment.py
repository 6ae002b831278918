"""The machine that a run uses: its device, its description, its random number generators, its
compiler.
"""

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor


def select_device(name: str) -> torch.device:
    """The device for ``--device``, with the settings of cuDNN that these networks need.

    Raises ValueError for cuda where PyTorch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; take --device cpu or auto")
    if name == "cuda":
        # All batches have the same shape: cuDNN takes the algorithm that is fastest for it.
        # https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html
        torch.backends.cudnn.benchmark = True
        # The errors of TF32, 1e-3, are far beyond what counts as 0 in sign-flip fields: float32 is
        # float32, and --precision bf16 the fast one.
        # https://docs.pytorch.org/docs/stable/notes/cuda.html
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name)


def is_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def describe_environment(device: torch.device) -> dict:
    """Versions and hardware that a result depends on."""
    # torch.__version__ names the build (+cpu, +cu130); the package's metadata may not.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "numpy", "scikit-learn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    described = {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }
    if is_gpu(device):
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        described["device"] = torch.get_device_module(device).get_device_name(device)
        described["tf32"] = matmul.allow_tf32 or cudnn.allow_tf32
    return described


@functools.cache
def _commit() -> str | None:
    """The commit of this code, with "-dirty" if code has changed since. None outside of git."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    commit, changed = git("rev-parse", "--short=12", "HEAD"), git("diff", "HEAD", "--", "*.py")
    return f"{commit}-dirty" if changed else commit or None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1] for line in file if line.startswith("model name"))
            return next(names).strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators, from which dropout draws."""
    states = {"cpu": torch.get_rng_state()}
    if is_gpu(device):
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    for kind, state in states.items():
        module = torch if kind == "cpu" else torch.get_device_module(kind)
        module.set_rng_state(state)


def compiled(function: Callable, device: torch.device) -> Callable:
    """Compile a function of tensors on `device` whose shapes do not change.

    Raises ValueError for a CPU without a C++ compiler.
    """
    found = "CXX" in os.environ or any(map(shutil.which, ("g++", "clang++", "cl")))
    if not found and not is_gpu(device):
        raise ValueError("--compile needs a C++ compiler on a CPU: install g++, or name one in CXX")
    # What was compiled before shares a cache of 8 versions with this function, beyond which it
    # would run uncompiled.
    torch.compiler.reset()
    # CUDA graphs launch all kernels of a step at once.
    # https://docs.pytorch.org/docs/stable/generated/torch.compile.html
    mode = "reduce-overhead" if is_gpu(device) else None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
