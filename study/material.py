"""What the pictures are drawn from: digits, networks and results."""

import itertools
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from convert_mnist import SCALAR, Split
from fields import isometry_action
from models import MODELS, build_model, has_sign_flip_fields
from nn_layers import MobiusConv
from study.features import NetworkFeatures, features_and_shift
from study.gradients import EPOCHS, FORMAT, measure_gradient_norms
from study.pretrained import FOLDER as PRETRAINED
from study.runs import OTHER_DEFAULTS, Study
from study.shifts import read_error_against_shift
from study.table import protocol_cells
from training.checkpoints import load_network
from training.data import Data, find_data
from training.files import read_results_file, say, write_json
from training.options import PRECISIONS, TRAIN_MODES, Config

NETWORKS = {"gauge_cnn": "mobius_regular", "cnn": "cnn_same_channels"}
FIELDS = (1, 1, 1)  # one of each type
SHIFT = 16  # of the digit that the networks are shown


class Material:
    """Data of the pictures, each read or computed when a picture asks for it.

    Every property raises ValueError or OSError if its data cannot be had.

    Args:
        options: the command line of visualize.py.
    """

    def __init__(self, options) -> None:
        self.options = options

    def train_options(self, **options) -> dict:
        """Options of train.py for the digits of the pictures."""
        options |= {name: getattr(self.options, name) for name in ("dataset", "data", "mnist_root")}
        return {name: value for name, value in options.items() if value is not None}

    @cached_property
    def data(self) -> Data:
        config = Config(**self.train_options(model=NETWORKS["gauge_cnn"]))
        return find_data(config, torch.device("cpu"))

    @property
    def splits(self) -> dict[str, Split]:
        return self.data.splits

    @property
    def digit(self) -> Tensor:
        """A digit ``(1, 1, W, L)``."""
        return self.splits["train_centered"].images[:1]

    @property
    def digits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eight digits centered and shifted, ``(8, 1, W, L)``, their shifts and labels."""
        centered, shifted = (self.splits[f"train_{mode}"].images[:8] for mode in TRAIN_MODES)
        shifts = torch.tensor([shift_between(*pair)
                               for pair in zip(centered.split(1), shifted.split(1))])
        return centered, shifted, shifts, self.splits["train_centered"].labels[:8]

    @cached_property
    def features(self) -> Tensor:
        """Features of the digit with one field of each type, ``(1, 4, W, L)``."""
        torch.manual_seed(0)
        return MobiusConv(SCALAR, FIELDS, kernel_size=5)(self.digit).detach()

    @property
    def kernels(self) -> MobiusConv:
        torch.manual_seed(0)
        return MobiusConv(FIELDS, FIELDS, kernel_size=5)

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """All models by name, without weights."""
        return {name: build_model(name, device="meta") for name in MODELS}

    @cached_property
    def networks(self) -> dict[str, torch.nn.Module]:
        """Trained networks by name, in float64: a difference between features is no rounding."""
        networks = {}
        for option, model in NETWORKS.items():
            file = getattr(self.options, option) or PRETRAINED / f"{model}.pt"
            network = load_network(file, {"model": model}).model
            networks[model] = network.double().eval()
        return networks

    @cached_property
    def shifted_wrongly(self) -> Tensor:
        """The first test digit that both networks know, and the CNN does not when it is shifted."""
        images, labels = (part[:200] for part in self.splits["test_centered"])
        images = images.double()
        cnn = self.networks[NETWORKS["cnn"]]
        with torch.no_grad():
            known = [network(images).argmax(1) == labels for network in self.networks.values()]
            lost = cnn(isometry_action(images, SHIFT, SCALAR)).argmax(1) != labels
        index = int((torch.stack(known).all(0) & lost).int().argmax())  # 0 if there is none
        return images[index:index + 1]

    @cached_property
    def network_features(self) -> dict[str, NetworkFeatures]:
        """Features of `shifted_wrongly` in both networks."""
        return {name: features_and_shift(network, self.shifted_wrongly, SHIFT)
                for name, network in self.networks.items()}

    @property
    def rows(self) -> list[dict]:
        """Rows of error_against_shift.json."""
        return read_error_against_shift(Path(self.options.results) / "error_against_shift.json")

    @cached_property
    def errors(self) -> dict[tuple[str, str], list[float]]:
        """Test errors on shifted digits by model and training mode, in the paper's protocol.

        Of the precisions and of both functions for sign-flip fields, those with the most runs.
        """
        results, errors = Path(self.options.results), {}
        for model in MODELS:
            signs = (0.0, 1e-8) if has_sign_flip_fields(model) else (0.0,)
            choices = [
                protocol_cells(model, "shifted", results=results, sign_eps=value, precision=name)
                for value, name in itertools.product(signs, ("bf16", "fp32"))
            ]
            most = max(choices, key=lambda cells: sum(cell.n for cell in cells))
            errors |= {(model, cell.train_mode): cell.errors for cell in most}
        if not any(errors.values()):
            raise ValueError(f"there is no finished run of the paper's protocol in {results}: "
                             "python reproduce.py makes them")
        return errors

    @property
    def gradient_norms(self) -> list[dict]:
        """Curves of gradient_norms.json, which are measured first if there is no such file."""
        path = Path(self.options.results) / "gradient_norms.json"
        if not path.exists():
            say(f"there is no {path}: two networks are trained for {EPOCHS} epochs")
            write_json(path, measure_gradient_norms(self.data, **self.train_options()))
        return read_results_file(path, FORMAT)["curves"]

    @property
    def curves(self) -> list[dict]:
        """Results of both networks: the paper's protocol on centered digits, seed 0.

        Of the precisions, the one in which the networks were tested after most epochs.
        """
        best, most = None, 0
        for precision in PRECISIONS:
            configs = [Config(name, precision=precision, **OTHER_DEFAULTS)
                       for name in NETWORKS.values()]
            study = Study(configs, self.options.results)
            results = [study.result(config) for config in configs]
            tested = min(sum("test_error_shifted" in record for record in result["epochs"])
                         if result else 0 for result in results)
            if tested > most:
                best, most = results, tested
        if best is None:
            raise ValueError(f"there are no runs of {' and '.join(NETWORKS.values())} in "
                             f"{study.results}: python reproduce.py makes them")
        return best


def shift_between(before: Tensor, after: Tensor) -> int:
    """The shift t of the isometry that moves a digit ``(1, 1, W, L)`` to where it is afterwards.

    Raises:
        ValueError: if there is none.
    """
    for shift in range(2 * before.shape[3]):
        if torch.equal(isometry_action(before, shift, SCALAR), after):
            return shift
    raise ValueError("a shifted digit of the data set is no isometry's image of the centered one")
