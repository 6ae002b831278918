"""The options of a run. Each is said once, as an entry of `Config`.

The entry gives the check of the value, the option of train.py and reproduce.py, its help, its row
in docs/training.md, and its key in result.json. A new option is a new entry.
"""

import argparse
import math
import operator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from convert_mnist import SOURCES
from fields import as_integer
from models import DROPOUT, MODELS, POOLINGS, has_sign_flip_fields
from training.augmentation import LARGEST_SCALING, LARGEST_STRENGTH
from training.files import CommandLine
from training.optimization import LR_SCHEDULES, OPTIMIZERS

TRAIN_MODES = ("centered", "shifted")
TEST_MODES = ("shifted", "centered", "both")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")

COMPARISONS = {
    "at least": operator.ge, "above": operator.gt, "below": operator.lt, "at most": operator.le
}


def option(
    default, text: str, *, belongs: str = "training", choices=None, metavar: str | None = None,
    at_least=None, above=None, below=None, at_most=None,
):
    """An entry of `Config`.

    Args:
        default: MISSING for an option that must be given.
        text: for the help and the docs.
        belongs: "network": to the arguments of `build_model`. "training": to what is trained, and
            how. "test": to what is tested. "report": it changes what a run reports, not what it
            computes. "input", "output": it names a file or device of this machine, and
            result.json does not have it. With --eval_only there are network, test and input.
        choices: all allowed values, or a table of them.
        metavar: stands for the value in the help.
        at_least, above, below, at_most: bounds of an allowed number.
    """
    bounds = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    return field(default=default, metadata={
        "text": text,
        "belongs": belongs,
        "choices": choices,
        "metavar": metavar,
        "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
    })


@dataclass(frozen=True)
class Config:
    """What defines a run. The defaults are the paper's protocol.

    Raises:
        ValueError: for a value that is not allowed.
    """

    model: str = option(MISSING, "the network", belongs="network", choices=MODELS)
    pooling: str = option(
        "fixed", "grid of the pooling windows: as published, or chosen by the data",
        belongs="network", choices=POOLINGS,
    )
    dropout: float = option(
        DROPOUT, "probability in the classifier", belongs="network", metavar="P",
        at_least=0, below=1,
    )
    sign_eps: float = option(
        0.0, "sign-flip fields: x / (|x| + X) in place of sign(x); the published runs had 1e-8",
        belongs="network", metavar="X", at_least=0, below=math.inf,
    )
    init: str | None = option(
        None, "begin with the weights of another run, in its folder or file, instead of random "
        "ones", metavar="FILE",
    )
    train_mode: str = option("centered", "version of the training digits", choices=TRAIN_MODES)
    test_mode: str = option(
        "both", "version of the test digits", belongs="test", choices=TEST_MODES
    )
    num_epochs: int = option(20, "passes over the training set", metavar="N", at_least=1)
    batch_size: int = option(
        128, "digits in a step, at least 2 for batch normalisation; a last, smaller batch is "
        "dropped", metavar="N", at_least=2,
    )
    optimizer: str = option(
        "adam", "muon: orthogonalized momentum for the kernels, Adam for all other parameters",
        choices=OPTIMIZERS,
    )
    weight_decay: float = option(  # a larger one would overflow in Adam's step
        1e-6, "L2 penalty on all parameters; with --optimizer muon decoupled, of the kernels only",
        metavar="X", at_least=0, below=1e30,
    )
    lr: float = option(5e-3, "learning rate", metavar="X", above=0, below=1e30)
    lr_decay_period: int = option(
        4, "divide the learning rate after every N epochs, 0: never", metavar="N", at_least=0
    )
    lr_decay_factor: float = option(
        2, "divide the learning rate by this", metavar="X", at_least=1, below=math.inf
    )
    lr_schedule: str = option(
        "step", "step: the learning rate is divided as above; cosine: it falls to 0",
        choices=LR_SCHEDULES,
    )
    warmup_epochs: int = option(
        0, "epochs in which the learning rate rises first", metavar="N", at_least=0
    )
    deformation: float = option(
        0.0, "strength of random deformations of training digits, in pixels (root mean square), "
        f"0 to {LARGEST_STRENGTH:g}", metavar="X", at_least=0, at_most=LARGEST_STRENGTH,
    )
    stroke_width: float = option(
        0.0, "amount by which strokes of training digits are thickened or thinned at random, "
        "0 to 1", metavar="X", at_least=0, at_most=1,
    )
    scaling: float = option(
        0.0, "standard deviation of the random size of training digits, along and across the "
        f"strip independently (0.1: a tenth), 0 to {LARGEST_SCALING:g}",
        metavar="X", at_least=0, at_most=LARGEST_SCALING,
    )
    label_smoothing: float = option(
        0.0, "part of the target that is spread over all classes, in training", metavar="X",
        at_least=0, below=1,
    )
    eval_freq: int = option(
        1, "test after every N epochs, 0: only at the end", belongs="report", metavar="N",
        at_least=0,
    )
    dataset: str = option(
        "mnist", "source of the digits; mnist_validation has other training digits in place of the "
        "test set, to choose settings with. If its npz is not in data/, it is made",
        belongs="test", choices=SOURCES,
    )
    data: str | None = option(
        None, "an npz to use instead, in the layout of convert_mnist.py", belongs="input",
        metavar="FILE",
    )
    mnist_root: str | None = option(
        None, "folder with MNIST's four files, for making the npz; without it they are downloaded",
        belongs="input", metavar="FOLDER",
    )
    seed: int = option(
        0, "of initialisation, order and dropout; on the same CPU with as many threads, it gives "
        "the same numbers", metavar="N", at_least=0, below=2**63,
    )
    device: str = option(
        "auto", "auto is cuda if there is a GPU", belongs="input", choices=DEVICES
    )
    precision: str = option(
        "fp32", "of training, bf16: automatic mixed precision; tests are in float32",
        choices=PRECISIONS,
    )
    compile: bool = option(
        False, "torch.compile the training step, with CUDA graphs on a GPU; other rounding, and "
        "dropout draws other numbers",
    )
    log_dir: str = option(
        "logs", "the run's folder is made in it", belongs="output", metavar="FOLDER"
    )
    tensorboard: bool = option(True, "write TensorBoard events", belongs="output")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            check(entry.name, value, entry.type, **entry.metadata)
            if entry.type is float:  # 1 and 1.0 are one setting
                object.__setattr__(self, entry.name, float(value))

        def require(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        require(
            self.mnist_root is None or SOURCES[self.dataset].from_mnist,
            "mnist_root", f"left out with dataset {self.dataset}",
        )
        require(
            not self.sign_eps or has_sign_flip_fields(self.model),
            "sign_eps", f"0 with {self.model}, which has no sign-flip fields",
        )
        for name in ("lr_decay_period", "lr_decay_factor"):
            require(
                self.lr_schedule == "step" or getattr(self, name) == DEFAULTS[name],
                name, f"left out with lr_schedule {self.lr_schedule}; lr_schedule step uses it",
            )
        require(
            self.warmup_epochs < self.num_epochs,
            "warmup_epochs", f"below num_epochs {self.num_epochs}",
        )

    def learning_rate(self, time: float) -> float:
        """The learning rate at a time in epochs. It has no other state."""
        if time < self.warmup_epochs:
            return self.learning_rate(self.warmup_epochs) * time / self.warmup_epochs
        return self.lr * LR_SCHEDULES[self.lr_schedule](self, time)

    def protocol(self) -> dict:
        """All settings that result.json has: those that define what is trained and tested."""
        unrecorded = names_of("input", "output")
        return {name: value for name, value in asdict(self).items() if name not in unrecorded}

    def settings_not_in_paper(self, omit: tuple[str, ...] = ()) -> dict:
        """Settings that change the outcome and differ from the paper's, without those to omit."""
        omit += names_of("report")
        return {
            name: value for name, value in self.protocol().items()
            if name not in omit and value != DEFAULTS.get(name)
        }

    def network(self) -> dict:
        """The arguments of `build_model` beside the name."""
        return {name: getattr(self, name) for name in names_of("network") if name != "model"}

    @property
    def digits(self) -> str:
        """A word for the digits, for names of files."""
        return Path(self.data).stem if self.data else self.dataset

    @property
    def test_versions(self) -> tuple[str, ...]:
        return ("shifted", "centered") if self.test_mode == "both" else (self.test_mode,)


def check(name: str, value, kind: type, *, choices, bounds, **_) -> None:
    """Check a value by its entry in `Config`. Raises ValueError if it is not allowed."""
    if choices is not None:
        holds, allowed = value in list(choices), f"one of {', '.join(choices)}"
    elif kind in (int, float):
        if kind is int:
            as_integer(value, name)
        allowed = " and ".join(
            "finite" if bound == math.inf else f"{word} {bound}" for word, bound in bounds.items()
        )
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        holds = is_number and all(  # nan fails every comparison
            COMPARISONS[word](value, bound) for word, bound in bounds.items()
        )
        allowed = f"a number {allowed}"
    elif kind is bool:
        holds, allowed = isinstance(value, bool), "True or False"
    else:
        optional = value is None and kind != str
        holds, allowed = optional or isinstance(value, str) and value != "", "a path"
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def names_of(*belongs: str) -> tuple[str, ...]:
    """Names of the options that belong to one of these."""
    return tuple(entry.name for entry in fields(Config) if entry.metadata["belongs"] in belongs)


REPORTING = names_of("report")
DEFAULTS = {entry.name: entry.default for entry in fields(Config) if entry.default is not MISSING}

# Settings under one name, for --recipe.
RECIPES = {
    "paper": {},
    "improved": {
        "pooling": "polyphase", "dropout": 0.1, "batch_size": 64,
        "optimizer": "muon", "lr": 3e-3, "lr_schedule": "cosine", "warmup_epochs": 1,
        "deformation": 0.5, "stroke_width": 0.35, "scaling": 0.15, "label_smoothing": 0.1,
    },
}


def follow_recipe(options: dict) -> dict:
    """Replace the name of a recipe by its settings; options beside it override them.

    Raises:
        ValueError: for a name that is not in `RECIPES`.
    """
    options = dict(options)
    recipe = options.pop("recipe", "paper")
    if recipe not in list(RECIPES):
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe] | options


def add_train_options(parser: CommandLine, *left_out: str, **other_defaults) -> None:
    """Add an option for each entry of `Config`. The parsed options have those that are given.

    Args:
        parser: gets the options.
        left_out: names of options that it does not get.
        other_defaults: to be shown in the help.
    """
    defaults = {"model": "required"} | DEFAULTS | other_defaults
    recipes = "; ".join(
        f"{recipe}: " + " ".join(f"--{name} {value}" for name, value in settings.items())
        for recipe, settings in RECIPES.items() if settings
    )
    parser.option(
        "recipe", f"other defaults for some of the options below; {recipes}", "paper",
        choices=RECIPES,
    )
    for entry in fields(Config):
        if entry.name in left_out:
            continue
        settings = {"action": argparse.BooleanOptionalAction}
        if entry.type is not bool:
            kind = entry.type if entry.type in (int, float) else str
            settings = {"type": kind, **{k: entry.metadata[k] for k in ("choices", "metavar")}}
        parser.option(entry.name, entry.metadata["text"], defaults[entry.name], **settings)
