"""The machine that a run uses: its device, its description, its random number generators."""

import platform
from importlib import metadata

import torch
from torch import Tensor


def select_device(name: str) -> torch.device:
    """The device for ``--device``. Raises ValueError for cuda where PyTorch sees no GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; take --device cpu or auto")
    return torch.device(name)


def describe_environment(device: torch.device) -> dict:
    """Versions and hardware that a result depends on."""
    # torch.__version__ names the build (+cpu, +cu130); the package's metadata may not.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "numpy", "scikit-learn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    on_gpu = device.type == "cuda"
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


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
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
