"""The tables of README.md and docs/, filled in from results/ and from the options.

    python -m study.pages        # after new results or options

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``, where NAME is one of `TABLES`.
"""

import itertools
import json
import re
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import benchmark
import convert_mnist
import reproduce
import train
import visualize
from models import (
    MODELS, POOLINGS, MobiusGaugeCNN, build_model, count_parameters, has_sign_flip_fields,
)
from study.runs import RESULTS, Study
from study.shifts import read_error_against_shift
from study.statistics import compare
from study.table import PAPER_RUNS, Cell, markdown, protocol_cells, summary
from training.files import say, write_atomically
from training.options import PRECISIONS, TRAIN_MODES

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER_FORMATS = {"fp32": "float32", "bf16": "bfloat16"}


def filled(text: str) -> str:
    """A page with its tables as they should be."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n\n{block[3]}", text)


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def recipe_cell(recipe: str, version: str, precision: str = "bf16") -> Cell:
    options = {"precision": precision, "recipe": recipe}
    study = Study(reproduce.plan(PAPER_RUNS, ["mobius_regular"], ["centered"], options))
    return Cell(study, "mobius_regular", "centered", version)


# --------------------------------------------------------------------------------------------------
# Results


def table5() -> str:
    """A row for each model."""
    rows = []
    for model in MODELS:
        cells = protocol_cells(model, "shifted", reproduce.PAPER, precision="bf16")
        texts = [text for cell in cells for text in (str(cell), str(cell.paper or ""))]
        rows.append([f"`{model}`", *texts])
    return markdown(["model", "trained on centered", "paper", "trained on shifted", "paper"], rows)


def results() -> str:
    """All runs of the paper's protocol."""
    options = {"precision": "bf16"}
    study = Study(reproduce.plan(PAPER_RUNS, list(MODELS), list(TRAIN_MODES), options))
    text = reproduce.table(study, reproduce.PAPER, "markdown")
    return text.partition("Not the defaults")[0].rstrip()


def signs() -> str:
    """Networks with sign-flip fields: each version of the sign, in each precision."""
    inexact, rows = {}, []
    for run in read("inexact_sign.json")["runs"]:
        key = tuple(run[name] for name in ("model", "train_mode", "precision", "pooling"))
        inexact.setdefault(key, []).append(run["test_error"]["shifted"])
    for model in filter(has_sign_flip_fields, MODELS):
        cells = partial(protocol_cells, model, "shifted", reproduce.PAPER)
        published = cells(precision="fp32", sign_eps=1e-8)
        columns = [
            TRAIN_MODES,
            *(cells(precision=precision) for precision in PRECISIONS),
            *([summary(inexact.get((model, mode, precision, "fixed"), [])) for mode in TRAIN_MODES]
              for precision in PRECISIONS),
            published,
            [cell.paper for cell in published],
        ]
        rows += [[f"`{model}`", *row] for row in zip(*columns)]
    versions = itertools.product(("sign(x)", "rounding is not 0"), PRECISIONS)
    return markdown([
        "model", "trained on", *(f"{sign}, {NUMBER_FORMATS[name]}" for sign, name in versions),
        "x / (\\|x\\| + 1e-8), float32", "paper",
    ], rows)


def regular() -> str:
    """`mobius_regular` with other rounding and on other training digits."""
    measured = {("1 to 12,000", NUMBER_FORMATS[precision]):
                recipe_cell("paper", "shifted", precision).errors for precision in ("bf16", "fp32")}
    for run in read("regular_difference.json")["runs"]:
        start, stop = run["training_digits"]
        key = (f"{start + 1:,} to {stop:,}", run["computation"])
        measured.setdefault(key, []).append(run["test_error"]["shifted"])
    samples = {key: (mean(errors), stdev(errors), len(errors)) for key, errors in measured.items()}
    paper = reproduce.PAPER["mobius_regular"]["centered"]
    samples["the paper's", "-"] = (paper.mean, paper.std, PAPER_RUNS)
    first, *others = samples.values()
    differences = ["-", *(compare(sample, first, paper.margin) for sample in others)]
    texts = [*map(summary, measured.values()), f"{paper} ({PAPER_RUNS})"]
    rows = [[*key, *cells] for key, *cells in zip(samples, texts, differences)]
    return markdown(
        ["training digits", "computed in", "test error in %", "difference from the first (95 %)"],
        rows)


def digits() -> str:
    rows = []
    study = Study([])
    for result in (study.read(run) for run in study.stored() if run.startswith("digits-")):
        errors = [f"{result['test_error'][version]:.2f}" for version in ("shifted", "centered")]
        rows.append([f"`{result['config']['model']}`", result["config"]["seed"], *errors])
    return markdown(["model", "seed", "shifted test digits", "centered test digits"], rows)


def shifts() -> str:
    """A row for each model: the fixed grid, then polyphase pooling."""
    measured = {
        (row["model"], row["settings"].get("pooling", "fixed")): row
        for row in read_error_against_shift(RESULTS / "error_against_shift.json")
    }

    def cells(row: dict) -> list[str]:
        ends = (f"{end(row['errors']):.2f}" for end in (min, max))
        return [f"{row['changed']:,}", " … ".join(dict.fromkeys(ends)) + " %"]

    rows = []
    for model in MODELS:
        fixed, polyphase = (measured[model, pooling] for pooling in POOLINGS)
        formulas = polyphase.get("changed_formulas", "-")
        seeds = f"{fixed['seed']}, {polyphase['seed']}"
        rows.append([f"`{model}`", seeds, *cells(fixed), *cells(polyphase), formulas])
    return markdown([
        "network", "seeds", "fixed grid: changed", "test error", "polyphase: changed",
        "test error", "changed, by the formulas alone",
    ], rows)


def poolings() -> str:
    rows = []
    for model in MODELS:
        cells = [protocol_cells(model, "shifted", precision="bf16", pooling=pooling)
                 for pooling in POOLINGS]
        rows.append([f"`{model}`", *itertools.chain(*zip(*cells))])
    columns = itertools.product(TRAIN_MODES, POOLINGS)
    return markdown(["model", *(f"{mode}, {pooling}" for mode, pooling in columns)], rows)


def recipes() -> str:
    rows = []
    for recipe in ("improved", "paper"):
        cells = [recipe_cell(recipe, version) for version in ("shifted", "centered")]
        errors = ", ".join(f"{error:.2f}" for error in cells[0].errors)
        rows.append([f"`--recipe {recipe}`", *cells, errors])
    return markdown([
        "`mobius_regular`, trained on centered digits", "shifted test digits",
        "centered test digits", "seeds",
    ], rows)


def reliability() -> str:
    survived = read("reliability.json")["survived"]
    return markdown(["", "times"], [[what, count] for what, count in survived.items()])


# --------------------------------------------------------------------------------------------------
# Models and time


def models() -> str:
    words = {
        "cnn_same_channels": "conventional CNN, as many channels",
        "cnn_same_params": "conventional CNN, about as many parameters",
        "mobius_scalar": "scalar fields only",
        "mobius_signflip": "sign-flip fields only",
        "mobius_regular": "regular fields only",
        "mobius_irrep": "scalar and sign-flip fields",
        "mobius_mixed": "all three",
    }
    rows = []
    for name in MODELS:
        model, fields = build_model(name, device="meta"), ""
        if isinstance(model, MobiusGaugeCNN):
            fields = tuple(model.mobius_cnn[0].out_fields)
        rows.append([f"`{name}`", words.get(name, ""), fields, f"{count_parameters(model):,}"])
    return markdown(["`--model`", "", "fields of the first convolution", "parameters"], rows)


def speed() -> str:
    rows = []
    for row in read("benchmark.json")["rows"]:
        name = row["model"] if row["model"] == benchmark.TEXTBOOK else f"`{row['model']}`"
        figures = [
            text for task in ("step", "infer")
            for text in (f"{row[task]['ratio']:.2f}", f"{row[task]['images_per_second']:,.0f}")
        ]
        rows.append([
            name, NUMBER_FORMATS[row["precision"]], *figures, f"{row['memory_ratio']:.2f}"
        ])
    return markdown([
        "model", "precision", "training step, ratio", "images/s", "inference, ratio", "images/s",
        "peak memory, ratio",
    ], rows)


def pooling_cost() -> str:
    measured = read("benchmark_pooling.json")["rows"]
    rows = []
    for model in MODELS:
        ratios = {row["precision"]: row for row in measured if row["model"] == model}
        rows.append([f"`{model}`", *(
            f"{ratios[precision][task]['ratio']:.2f}"
            for task in ("step", "infer") for precision in PRECISIONS
        )])
    return markdown([
        "model", "training step, float32", "bfloat16", "inference, float32", "bfloat16"
    ], rows)


def options_of(module) -> str:
    """All options of a script; of reproduce.py, those that train.py has not."""
    table = module.command_line().markdown()
    if module is not reproduce:
        return table
    of_train = train.command_line().markdown().splitlines()[2:]
    return "\n".join(line for line in table.splitlines() if line not in of_train)


TABLES = {
    "table5": table5, "results": results, "regular": regular, "signs": signs, "digits": digits,
    "shifts": shifts, "poolings": poolings, "recipes": recipes, "reliability": reliability,
    "models": models, "speed": speed, "pooling_cost": pooling_cost,
    **{
        f"{module.__name__}_options": partial(options_of, module)
        for module in (train, convert_mnist, reproduce, visualize, benchmark)
    },
}


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            with write_atomically(page) as file:
                file.write(new.encode())
            say(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
