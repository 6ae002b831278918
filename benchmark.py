"""Time and memory of the models, beside the CNN that anyone would write with stock layers.

    python benchmark.py                                      # all seven, float32 and bfloat16
    python benchmark.py --models mobius_regular --precision fp32 --device cpu
    python benchmark.py --pooling                            # instead: what polyphase pooling costs
    python benchmark.py --device cuda --compile --out results/benchmark_gpu.json    # docs/gpu.md

The *textbook CNN* has the architecture of cnn_same_channels in plain torch.nn: Conv2d(padding=2),
ELU, MaxPool2d, in float32, eager, in the default memory format. All run in one process and take
turns, so that what else the machine does falls on all of them alike: in each round a model computes
three times, of which the last two count; figures are medians over the rounds. On a CPU, peak memory
is measured in a process of its own for each.

Launches are those of a training step by the formulas on a GPU, forward and backward, as
training/pretended_gpu.py counts them without one.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from convert_mnist import LENGTH, WIDTH
from models import FEATURES, MODELS, POOLINGS, build_classifier, build_model
from nn_layers import MobiusConv
from fast import keep_freed_memory
from training.environment import compiled, describe_environment, select_device
from training.files import CommandLine, write_atomically
from training.optimization import OPTIMIZERS
from training.options import DEVICES, PRECISIONS

TEXTBOOK = "textbook CNN"
CLASSES = 10
ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"


class TextbookCNN(nn.Module):
    """Six convolutions as in cnn_same_channels, zeros beyond all four edges.

    It does not know the strip from a sheet.
    """

    def __init__(self) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=5, padding=2)
        self.cnn = nn.Sequential(
            conv(1, 16), nn.ELU(),
            conv(16, 32), nn.ELU(), nn.MaxPool2d(2),
            conv(32, 64), nn.ELU(),
            conv(64, 128), nn.ELU(), nn.MaxPool2d(2),
            conv(128, 256), nn.ELU(),
            conv(256, FEATURES),
        )
        self.classifier = build_classifier(CLASSES, {})

    def forward(self, x):
        return self.classifier(self.cnn(x).amax(dim=(2, 3)))


class Candidate:
    """A model with its optimizer and a batch, ready to be timed."""

    def __init__(
        self, name: str, precision: str, batch_size: int, device: torch.device,
        pooling: str = "fixed", compile: bool = False,
    ) -> None:
        self.name, self.precision, self.device, self.compile = name, precision, device, compile
        torch.manual_seed(0)
        model = TextbookCNN() if name == TEXTBOOK else build_model(name, pooling=pooling)
        self.model = model.to(device)
        # A small learning rate, as random labels soon drive the gradients below the smallest normal
        # float32. Digits do not, and Intel CPUs take five times as long for a step with these.
        self.optimizer = OPTIMIZERS["adam"](self.model, lr=1e-6, weight_decay=1e-6)
        self.images = torch.rand(batch_size, 1, WIDTH, LENGTH, device=device)
        self.labels = torch.randint(CLASSES, (batch_size,), device=device)
        self.compute = compiled(self._loss, device) if compile else self._loss

    def _logits(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(self.images)

    def _loss(self) -> torch.Tensor:
        return F.cross_entropy(self._logits().float(), self.labels)

    def step(self) -> None:
        """One step of training, as train.py takes it."""
        self.model.train()
        self.optimizer.zero_grad()
        self.compute().backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        self.model.eval()
        self._logits()

    def conv_flop(self) -> float:
        """Floating point operations of the convolutions in a forward pass, by the formula."""
        flop = []

        def count(layer, inputs, output):
            c_out, c_in = output.shape[1], inputs[0].shape[1]
            k = layer.kernel_size if isinstance(layer.kernel_size, int) else layer.kernel_size[0]
            flop.append(2 * c_in * k**2 * c_out * output[:, 0].numel())

        hooks = [
            m.register_forward_hook(count)
            for m in self.model.modules() if isinstance(m, (MobiusConv, nn.Conv2d))
        ]
        self.infer()
        for hook in hooks:
            hook.remove()
        return sum(flop)


def seconds(function, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def matmul_rate(precision: str, device: torch.device, size: int | None = None) -> float:
    """Floating point operations per second of torch.matmul on two square matrices."""
    size = size or (2048 if device.type == "cpu" else 8192)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / statistics.median(times[2:])


def summary(times: list[float], batch_size: int) -> dict:
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median_ms": 1000 * quartiles[1],
        "quartiles_ms": [1000 * quartiles[0], 1000 * quartiles[2]],
        "min_ms": 1000 * min(times),
        "images_per_second": batch_size / quartiles[1],
    }


def measure(
    candidates: list[Candidate], rounds: int, batch_size: int, rates: dict[str, float]
) -> list[dict]:
    """The figures of each candidate; the first one is what the ratios are taken to.

    matmul_share is the rate of the convolutions, counted as the plain formula needs them, relative
    to that of torch.matmul. It exceeds 1 where the former are the work of a faster library, or take
    less arithmetic.
    """
    rows = [{"model": c.name, "precision": c.precision, "compile": c.compile} for c in candidates]
    # Inference first, when nothing changes the weights between two rounds.
    for task, flop in (("infer", 1), ("step", 3)):
        measured = [  # inference is not compiled
            (row, candidate) for row, candidate in zip(rows, candidates)
            if task == "step" or not candidate.compile
        ]
        times = take_turns([candidate for _, candidate in measured], task, rounds)
        for (row, candidate), collected in zip(measured, times):
            row[task] = summary(collected, batch_size)
            row[task]["ratio"] = statistics.median(collected) / statistics.median(times[0])
            rate = flop * candidate.conv_flop() / statistics.median(collected)
            row[task]["matmul_share"] = rate / rates[candidate.precision]
    return rows


def measure_pooling(
    models: list[str], precisions: list[str], rounds: int, batch_size: int, device: torch.device
) -> list[dict]:
    """Each model with polyphase and with fixed pooling in turns: seconds, and their ratios."""
    rows = []
    for precision in precisions:
        for name in models:
            row = {"model": name, "precision": precision}
            for task in ("infer", "step"):
                pair = [
                    Candidate(name, precision, batch_size, device, pooling) for pooling in POOLINGS
                ]
                times = take_turns(pair, task, rounds)
                row[task] = {
                    "fixed": summary(times[0], batch_size),
                    "polyphase": summary(times[1], batch_size),
                }
                row[task]["ratio"] = statistics.median(times[1]) / statistics.median(times[0])
            rows.append(row)
            print(
                f"{name:18} {precision}   polyphase / fixed: "
                f"training step {row['step']['ratio']:.3f}, "
                f"inference {row['infer']['ratio']:.3f}",
                flush=True,
            )
    return rows


def take_turns(candidates: list[Candidate], task: str, rounds: int) -> list[list[float]]:
    """Seconds of a task, for each candidate those of every round."""
    times = [[] for _ in candidates]
    for i in range(rounds + 1):
        for candidate, collected in zip(candidates, times):
            # The first of three finds the caches full of another model's data; in training none
            # does.
            turn = [seconds(getattr(candidate, task), candidate.device) for _ in range(3)][1:]
            if i:  # after warm-up
                collected.append(statistics.mean(turn))
    return times


def launches(models: list[str]) -> dict[str, dict[str, int]]:
    """Launches of a training step of each model with each pooling; {} if PyTorch cannot count."""
    command = [sys.executable, "-m", "training.pretended_gpu", *models]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return {} if output.returncode else json.loads(output.stdout)


def peak_memory(
    name: str, precision: str, batch_size: int, device: torch.device, compile: bool = False
) -> float | None:
    """MB that three training steps take at most: of the GPU, or of a process of its own.

    What was in use before does not count.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        candidate = Candidate(name, precision, batch_size, device, compile=compile)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            candidate.step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if compile:  # the compiler's own memory would count
        return None
    command = [
        sys.executable, __file__, "--memory_of", name, "--precision", precision,
        "--batch_size", str(batch_size),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    output = subprocess.run(command, capture_output=True, text=True, env=environment)
    if output.returncode:
        last_line = output.stderr.strip().splitlines()[-1:]
        raise OSError(f"measuring the memory of {name} failed: {last_line}")
    return float(output.stdout) if output.stdout.strip() else None


def _print_memory_of(name: str, precision: str, batch_size: int) -> None:
    def resident_peak() -> float:
        with contextlib.suppress(OSError):
            status = Path("/proc/self/status").read_text()
            return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 2**10
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    # The smallest batch first, so that what PyTorch loads once does not count.
    Candidate(name, precision, 2, torch.device("cpu")).step()
    with contextlib.suppress(OSError):  # Linux: begin a new peak
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    candidate = Candidate(name, precision, batch_size, torch.device("cpu"))
    for _ in range(3):
        candidate.step()
    print(resident_peak() - before)


def table(rows: list[dict]) -> str:
    lines = [
        f"{'':41}{'training step':^40}   {'inference':^36}",
        f"{'model':18} {'precision':19}   {'ms':>7} {'quartiles':>13} {'ratio':>6} {'images/s':>9} "
        f"  {'ms':>7} {'quartiles':>13} {'ratio':>6} {'images/s':>9} "
        f"  {'peak MB':>8} {'ratio':>6}   matmul share   launches",
    ]
    for row in rows:
        precision = row["precision"] + ", compiled" * row["compile"]
        line = f"{row['model']:18} {precision:19}"
        for task in ("step", "infer"):
            figures = row.get(task)
            if figures is None:
                line += " " * 41
                continue
            quartiles = "{:.0f} … {:.0f}".format(*figures["quartiles_ms"])
            line += (
                f"   {figures['median_ms']:7.1f} {quartiles:>13} {figures['ratio']:6.2f}"
                f" {figures['images_per_second']:9.0f}"
            )
        memory = row["peak_memory_mb"]
        line += (
            f"   {memory:8.0f} {row['memory_ratio']:6.2f}"
            if memory and row["memory_ratio"] else f"   {'':8} {'':6}"
        )
        lines.append(
            f"{line}   {row['step']['matmul_share']:12.2f}   {row['launches'] or '':>8}"
        )
    return "\n".join(lines)


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL",
        help="all seven",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), metavar="P",
        help="fp32, bf16 or both (both)",
    )
    parser.add_argument("--batch_size", type=int, default=128, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N",
        help="of which the medians are taken (%(default)s)",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto",
        help="auto is cuda where there is one (%(default)s)",
    )
    parser.add_argument(
        "--pooling", action="store_true",
        help="compare polyphase with fixed pooling, and nothing else",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also training steps under torch.compile"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="(results/benchmark.json; with --pooling results/benchmark_pooling.json)",
    )
    parser.add_argument(
        "--memory_of", help="print the peak memory of one model in MB, and nothing else"
    )
    return parser


def compare(options, device: torch.device) -> dict:
    """The models side by side with the textbook CNN."""
    precisions = dict.fromkeys(("fp32", *options.precision))
    rates = {precision: matmul_rate(precision, device) for precision in precisions}
    for precision, rate in rates.items():
        print(f"matrix multiplication, {precision}: {rate / 1e9:.0f} GFLOP/s", flush=True)
    new = partial(Candidate, batch_size=options.batch_size, device=device)
    candidates = [new(TEXTBOOK, "fp32")]
    for compile in (False, True) if options.compile else (False,):
        candidates += [
            new(m, p, compile=compile) for p in options.precision for m in options.models
        ]
    # They share the cache of `Candidate._loss`, of 8 versions by default.
    torch._dynamo.config.recompile_limit = len(candidates)
    rows = measure(candidates, options.rounds, options.batch_size, rates)
    counts = launches(options.models)
    for row in rows:
        row["launches"] = None  # of the eager formulas in bfloat16
        if not row["compile"]:
            row["launches"] = counts.get(row["model"], {}).get("fixed")
        row["peak_memory_mb"] = peak_memory(
            row["model"], row["precision"], options.batch_size, device, row["compile"]
        )
        memory, reference = row["peak_memory_mb"], rows[0]["peak_memory_mb"]
        row["memory_ratio"] = memory / reference if memory and reference else None
    return {
        "matmul_gflop_per_second": {precision: rate / 1e9 for precision, rate in rates.items()},
        "rows": rows,
    }


def main(argv=None) -> None:
    parser = command_line()
    options = parser.parse_args(argv)
    if options.batch_size < 2:
        parser.error("--batch_size must be at least 2 (batch normalisation needs two)")
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    if options.memory_of:
        if options.memory_of not in (TEXTBOOK, *MODELS):
            names = ", ".join((TEXTBOOK, *MODELS))
            parser.error(f"--memory_of must be one of {names}, got {options.memory_of!r}")
        with contextlib.suppress(ImportError):  # Windows does not tell: no figure there
            _print_memory_of(options.memory_of, options.precision[0], options.batch_size)
        return
    file_name = "benchmark_pooling.json" if options.pooling else "benchmark.json"
    out = options.out or RESULTS / file_name
    keep_freed_memory()
    try:
        device = select_device(options.device)
        with write_atomically(out) as file:  # before the minutes of work: can it be written at all?
            result = {
                "environment": describe_environment(device),
                "batch_size": options.batch_size,
                "rounds": options.rounds,
            }
            if options.pooling:
                result["rows"] = measure_pooling(
                    options.models, options.precision, options.rounds, options.batch_size, device
                )
            else:
                result |= compare(options, device)
            file.write((json.dumps(result, indent=2) + "\n").encode())
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if not options.pooling:
        print(table(result["rows"]))
    print(f"{out}: written")


if __name__ == "__main__":
    main()
