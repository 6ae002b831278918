"""What TensorBoard shows of a run: curves, its digits, the kernels of its first layer after each epoch, and at the end what it
gets wrong and how its error depends on where the digits lie.

    tensorboard --logdir logs --samples_per_plugin images=100     # else it shows the kernels of ten epochs only
"""

from pathlib import Path

from torch import Tensor, nn

from convert_mnist import Split

# TensorBoard's cards are small: to be read there, pictures must be so too.
SHOWN, COLUMNS = 20, 4  # digits in a picture, and in a row of it
CARD = (4.2, 3)  # inches


class RunEvents:
    """Writes the events of a run into its folder, pictures into pictures/ there, so that TensorBoard can forget the one without the other.

    Args:
        path: of the folder.
        epoch: the last one that is finished. TensorBoard forgets all curves that it had, which are to be written anew, and the
            pictures of this and later epochs, for the run may have ended before they were written.

    Raises:
        ValueError: if TensorBoard or matplotlib are not installed.
    """

    def __init__(self, path, epoch: int) -> None:
        new_writer = summary_writer()
        from study import figures

        self._figures = figures
        self.continued = epoch > 0 and any(Path(path, "pictures").glob("events.*"))
        self._writer = new_writer(path, purge_step=1)
        self._picture_writer = new_writer(Path(path, "pictures"), purge_step=epoch)

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, epoch)
        self._writer.flush()

    def _picture(self, tag: str, figure, epoch: int) -> None:
        self._picture_writer.add_figure(tag, figure, epoch)
        self._picture_writer.flush()

    def kernels(self, model: nn.Module, epoch: int) -> None:
        self._picture("network/kernels of the first layer", self._figures.first_kernels(model, COLUMNS), epoch)

    def digits(self, name: str, split: Split) -> None:
        images, labels = (part[:SHOWN].cpu() for part in split)
        figure = self._figures.digits(images, [str(label) for label in labels.tolist()], COLUMNS)
        self._picture(f"digits/{name}", figure, 0)

    def misclassified(self, name: str, split: Split, predictions: Tensor, epoch: int) -> None:
        """Some of the digits whose predicted class (n,) is not their label, with both."""
        wrong = (predictions != split.labels).nonzero()[:, 0]
        title = f"{len(wrong):,} of {len(predictions):,} {name} test digits are misclassified"
        wrong = wrong[:SHOWN]
        titles = [f"{label} as {prediction}" for label, prediction in zip(split.labels[wrong].tolist(), predictions[wrong].tolist())]
        figure = self._figures.digits(split.images[wrong].cpu(), titles, COLUMNS, title)
        self._picture(f"network/misclassified {name} test digits", figure, epoch)

    def error_against_shift(self, row: dict, digits: int, epoch: int) -> None:
        """Of the first `digits` test digits, moved by each isometry; `row` as in error_against_shift.json."""
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


def summary_writer() -> type:
    """TensorBoard's class. Raises ValueError if it, or matplotlib, is not installed."""
    # Not at the head: it takes seconds, and -h and --no-tensorboard do without.
    try:
        import matplotlib.figure  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"TensorBoard and matplotlib are not both installed ({error}): take --no-tensorboard") from error
    return SummaryWriter
