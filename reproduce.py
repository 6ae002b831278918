"""Many runs: the paper's Table 5, measured again.

    python reproduce.py                                 # seven models, trained on centered and on
                                                        # shifted digits, 32 seeds
    python reproduce.py --runs 2 --models mobius_regular cnn_same_channels --precision bf16
    python reproduce.py --table                         # of finished runs; or --table markdown,
                                                        # --table csv
    python reproduce.py --pack                          # moves finished runs into one file
    python reproduce.py --error_against_shift           # of networks trained here, on test digits
                                                        # moved by each isometry
    torchrun --nproc_per_node 8 reproduce.py            # eight processes, on eight GPUs if there
                                                        # are so many

Stop or kill it at any moment: the same command goes on where it was. Any number of processes, on
any number of machines, may share a results folder; docs/reproduce.md says how.

Source of the figures to compare with: arXiv:2106.06020, Section 5, Table 5.
"""

import os
import sys

import torch

from models import MODELS
from study.runs import OTHER_DEFAULTS, RESULTS, Study, load_data, train_all
from study.shifts import measure_error_against_shift, with_weights
from study.table import PAPER_RUNS, Published, table
from fast import keep_freed_memory
from training.checkpoints import BadCheckpoint
from training.environment import select_device
from training.files import CommandLine, say
from training.options import TRAIN_MODES, Config, add_train_options, follow_recipe

# Test error in % on shifted test digits, by model and training mode.
PAPER = {
    "cnn_same_channels": {
        "centered": Published(42.99, 2.65, margin=2), "shifted": Published(1.97, 0.11)
    },
    "cnn_same_params": {
        "centered": Published(43.68, 2.85, margin=2), "shifted": Published(2.08, 0.10)
    },
    "mobius_scalar": {"centered": Published(1.60, 0.09), "shifted": Published(1.60, 0.10)},
    "mobius_signflip": {"centered": Published(4.89, 0.36), "shifted": Published(4.27, 0.24)},
    "mobius_regular": {"centered": Published(1.23, 0.07), "shifted": Published(1.24, 0.08)},
    "mobius_irrep": {"centered": Published(1.64, 0.12), "shifted": Published(1.65, 0.09)},
    "mobius_mixed": {"centered": Published(1.42, 0.10), "shifted": Published(1.43, 0.09)},
}


def plan(runs: int, models: list[str], train_modes: list[str], options: dict) -> list[Config]:
    """The runs in the order in which they are trained.

    A seed of every cell of the table comes before the next seed: at any time, the table is even.

    Args:
        runs: number of seeds.
        models, train_modes: of the table.
        options: of train.py.

    Raises:
        ValueError: for an option that is not allowed.
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    options = OTHER_DEFAULTS | follow_recipe(options)
    return [Config(model=model, train_mode=mode, seed=seed, **options) for seed in range(runs)
            for mode in dict.fromkeys(train_modes) for model in dict.fromkeys(models)]


def launched_as() -> tuple[int, int, int]:
    """Rank, number of processes and local rank, from the environment that a launcher sets.

    Raises:
        ValueError: if a variable has no such value.
    """
    values = {"RANK": os.environ.get("RANK", "0"), "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1")}
    values["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", values["RANK"])
    if all(value.isdigit() for value in values.values()):
        rank, processes, local_rank = map(int, values.values())
        if rank < processes:
            return rank, processes, local_rank
    found = ", ".join(f"{name}={value}" for name, value in values.items())
    raise ValueError(f"the environment has {found}: these are for launchers such as torchrun to "
                     "set; unset them")


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--runs", type=int, default=PAPER_RUNS, metavar="N",
        help="number of seeds of each model and training mode, from seed 0 on (%(default)s)")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL",
        help="all seven, unless some are named")
    add("--train_modes", nargs="+", choices=TRAIN_MODES, default=list(TRAIN_MODES), metavar="MODE",
        help="centered, shifted or both (both)")
    add("--results", default=str(RESULTS), metavar="FOLDER",
        help="folder of runs, logs and results (results)")
    add("--table", nargs="?", const="text", choices=("text", "markdown", "csv"),
        help="print the table of finished runs, train nothing")
    add("--pack", action="store_true",
        help="move finished runs of any settings from the folder runs into table5.json, without "
             "their training curves; train nothing")
    add("--error_against_shift", action="store_true",
        help="test finished networks whose weights are here on digits moved by each isometry, "
             "train nothing; writes error_against_shift.json")
    add_train_options(parser, "model", "init", "train_mode", "seed", "log_dir", **OTHER_DEFAULTS)
    return parser


def main(argv=None) -> None:
    parser = command_line()
    options = vars(parser.parse_args(argv))
    runs, models, train_modes, results, style, pack, shifts = (
        options.pop(name) for name in
        ("runs", "models", "train_modes", "results", "table", "pack", "error_against_shift"))
    if bool(style) + pack + shifts > 1:
        parser.error("--table, --pack and --error_against_shift: take one at a time")
    if results == "":
        parser.error("results must be a path, got ''")
    keep_freed_memory()
    rank, failures = 0, {}
    try:
        rank, processes, local_rank = launched_as()
        study = Study(plan(runs, models, train_modes, options), results, bar=rank == 0)
        if rank and (style or pack or shifts):
            return
        if style:
            return say(table(study, PAPER, style))
        if pack:
            return say(study.pack())
        if shifts:
            study.configs = with_weights(study)
        device = select_device(study.configs[0].device)
        if device.type == "cuda" and processes > 1:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        data = load_data(study.configs[0], device)
        if shifts:
            return say(f"wrote {measure_error_against_shift(study, data, device)}")
        failures = train_all(study, data, rank, processes)
        if rank == 0:
            say("\n" + table(study, PAPER))
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        parser.error(error if rank == 0 else f"process {rank}: {error}")
    except KeyboardInterrupt:
        if rank == 0:
            say("stopped; the same command goes on")
        sys.exit(130)
    if failures and rank == 0:  # the failure of another process would have torchrun end them all
        damaged = any(isinstance(error, BadCheckpoint) for error in failures.values())
        sys.exit(2 if damaged else 1)


if __name__ == "__main__":
    main()
