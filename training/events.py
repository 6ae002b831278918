"""What TensorBoard shows of a run: curves; digits of the run; the kernels of the first layer after
each epoch; and at the end, misclassified digits and the error against the shift.

    tensorboard --logdir logs --samples_per_plugin images=100     # else only some epochs' kernels
"""

from pathlib import Path

from torch import Tensor, nn

from convert_mnist import Split
from training.files import write_atomically

# TensorBoard's cards are small, and pictures must be readable there.
SHOWN, COLUMNS = 20, 4  # digits in a picture, and in a row of it
CARD = (4.2, 3)  # inches


class RunEvents:
    """Writes the events of a run into its folder, and pictures into pictures/ in it.

    When a run goes on, TensorBoard discards all curves, and they are written anew. In the separate
    folder, it discards only the pictures of this and later epochs.

    Args:
        path: of the run's folder.
        epochs: records of the finished epochs.

    Raises:
        ValueError: if TensorBoard or matplotlib is not installed.
    """

    def __init__(self, path, epochs: list[dict]) -> None:
        new_writer = summary_writer()
        from study import figures

        epoch = len(epochs)
        self._figures = figures
        self.continued = epoch > 0 and any(Path(path, "pictures").glob("events.*"))
        self._writer = new_writer(path, purge_step=1)
        # The run may have ended before it drew the pictures of its last epoch.
        self._picture_writer = new_writer(Path(path, "pictures"), purge_step=epoch)
        for record in epochs:
            self.scalars(record)

    def scalars(self, record: dict) -> None:
        """The curves' values of an epoch: test_loss_shifted is shown as loss/test_shifted."""
        for key, value in record.items():
            name, _, rest = key.partition("_")
            if name in ("train", "test"):
                kind, *version = rest.split("_")
                key = f"{kind}/{'_'.join([name, *version])}"
            if name in ("train", "test", "lr"):
                self._writer.add_scalar(key, value, record["epoch"])
        self._writer.flush()

    def _picture(self, tag: str, figure, epoch: int) -> None:
        self._picture_writer.add_figure(tag, figure, epoch)
        self._picture_writer.flush()

    def kernels(self, model: nn.Module, epoch: int) -> None:
        figure = self._figures.first_kernels(model, COLUMNS)
        self._picture("network/kernels of the first layer", figure, epoch)

    def digits(self, name: str, split: Split) -> None:
        images, labels = (part[:SHOWN].cpu() for part in split)
        figure = self._figures.digits(images, [str(label) for label in labels.tolist()], COLUMNS)
        self._picture(f"digits/{name}", figure, 0)

    def misclassified(self, name: str, split: Split, predictions: Tensor, epoch: int) -> None:
        """The first digits whose predicted class (n,) differs from their label, with both."""
        wrong = (predictions != split.labels).nonzero()[:, 0]
        title = f"{len(wrong):,} of {len(predictions):,} {name} test digits are misclassified"
        wrong = wrong[:SHOWN]
        classes = zip(split.labels[wrong].tolist(), predictions[wrong].tolist())
        titles = [f"{label} as {prediction}" for label, prediction in classes]
        figure = self._figures.digits(split.images[wrong].cpu(), titles, COLUMNS, title)
        self._picture(f"network/misclassified {name} test digits", figure, epoch)

    def error_against_shift(self, row: dict, digits: int, epoch: int) -> None:
        """A row as in error_against_shift.json, of this many digits."""
        figure = self._figures.error_against_shift([row], CARD)
        figure.axes[0].set_ylabel(f"error in % of {digits} test digits")
        self._picture("network/error against shift", figure, epoch)

    def hyperparameters(self, settings: dict, errors: dict[str, float]) -> None:
        metrics = {f"final_error/{version}": error for version, error in errors.items()}
        self._writer.add_hparams(settings, metrics, run_name=".")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
        self._picture_writer.close()


def check_matplotlib() -> None:
    """Raises ValueError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--out needs matplotlib ({error}): leave it out") from error


def save_error_against_shift(errors: list[float], config, path) -> None:
    """Draw the error in % at each shift into a PNG."""
    from study.figures import error_against_shift

    row = {
        "model": config.model, "train_mode": config.train_mode, "errors": errors,
        "settings": {} if config.pooling == "fixed" else {"pooling": config.pooling},
    }
    with write_atomically(path) as file:
        error_against_shift([row]).savefig(file, format="png", dpi=150)


def summary_writer() -> type:
    """TensorBoard's class. Raises ValueError if it, or matplotlib, is not installed."""
    # Imported here: it takes seconds, which -h and --no-tensorboard need not spend.
    try:
        import matplotlib.figure  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"TensorBoard and matplotlib are not both installed ({error}): take --no-tensorboard"
        ) from error
    return SummaryWriter
