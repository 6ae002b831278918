"""Draw the pictures of the README from measured results.

    python visualize.py                     # visualizations/error_against_shift.svg from results/error_against_shift.json

Each picture is drawn twice, for light and dark pages: NAME.svg and NAME-dark.svg.
"""

import io
from pathlib import Path

from convert_mnist import CommandLine, write_atomically
from reproduce import RESULTS, read_error_against_shift

FOLDER = Path(__file__).resolve().parent / "visualizations"

LABELS = {
    "cnn_same_channels": "CNN (channels)", "cnn_same_params": "CNN (params)", "mobius_scalar": "gauge CNN (scalar)",
    "mobius_signflip": "gauge CNN (sign-flip)", "mobius_regular": "gauge CNN (regular)", "mobius_irrep": "gauge CNN (irreps)",
    "mobius_mixed": "gauge CNN (mixed)",
}
# Told apart by colour-blind readers too (Okabe and Ito), on white and on black.
COLOURS = dict(zip(LABELS, ("#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#009E73", "#999999")))
STYLES = {
    "": {},
    "-dark": {name: "#E6EDF3" for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
}


def error_against_shift(rows: list[dict]):
    """Test error of networks on digits moved by each isometry, as a figure of matplotlib; `rows` as in the file of that name.

    Runs that differ in the seed alone are one line, their mean.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    groups = {}
    for row in rows:
        settings = "".join(f", {name} {value}" for name, value in row.get("settings", {}).items())
        groups.setdefault((row["model"], settings, row["train_mode"]), []).append(row["errors"])
    lines = {}  # of each model, in the order of its settings
    for (model, settings, train_mode), errors in sorted(groups.items(), key=lambda group: list(LABELS).index(group[0][0])):
        means = [sum(column) / len(column) for column in zip(*errors)]
        style = lines[model] = (lines.get(model, -1) + 1) % 4
        axes.plot(range(len(means)), means, color=COLOURS[model], markersize=3 + style % 2, marker="os^x"[style],
                  markerfacecolor="none" if style % 2 else COLOURS[model], linestyle=("-", "--", ":", "-.")[style],
                  label=f"{LABELS[model]}{settings}, trained on {train_mode} digits")
    length = len(rows[0]["errors"]) // 2
    axes.axvline(length, linewidth=1, linestyle=":", color="grey")
    axes.annotate("once around: the digit is reflected", (length, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                  textcoords="offset points", ha="center", va="bottom", fontsize=9, color="grey")
    axes.set(xlabel="shift of the test digits along the strip, in pixels", ylabel="test error in %", xlim=(-1, 2 * length), yscale="log")
    axes.set_xticks(range(0, 2 * length, 4))
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= 1.3 * max(max(row["errors"]) for row in rows)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.45))
    return figure


def save(draw, name: str, folder: Path) -> list[Path]:
    """Draw a picture in both styles. Returns the files' paths. Raises ValueError or OSError if one cannot be written."""
    import matplotlib

    paths = []
    for suffix, style in STYLES.items():
        # No date and no random names: the same results give the same file.
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name, "font.size": 10} | style):
            file = io.BytesIO()
            draw().savefig(file, format="svg", transparent=True, metadata={"Date": None})
        paths.append(folder / f"{name}{suffix}.svg")
        with write_atomically(paths[-1]) as target:
            target.write(file.getvalue())
    return paths


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    parser.add_argument("--results", default=str(RESULTS), metavar="FOLDER", help="of the results (results)")
    parser.add_argument("--out", default=str(FOLDER), metavar="FOLDER", help="for the pictures (visualizations)")
    return parser


def main(argv=None) -> None:
    parser = command_line()
    options = parser.parse_args(argv)
    try:
        rows = read_error_against_shift(Path(options.results) / "error_against_shift.json")
        for path in save(lambda: error_against_shift(rows), "error_against_shift", Path(options.out)):
            print(path)
    except (ValueError, OSError, ImportError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
