"""The README and the walkthrough: commands, options, figures, pictures and code."""

import contextlib
import io
import json
import os
import re

import torch

import benchmark
import convert_mnist
import reproduce
import train
import visualize
from models import MODELS, MODES, POOLINGS, build_model
from study import figures
from study.runs import Study, run_name
from study.shifts import consistency
from study.table import Cell
from tests.reference import PARAMETERS
from tests.support import ROOT, FilesCase
from training.options import PRECISIONS, RECIPES, TRAIN_MODES


class TestReadme(FilesCase):
    TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

    def rows(self, first):
        """Cells of the table rows whose first cell is `first`."""
        table = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in self.TEXT.splitlines() if line.startswith("|")
        ]
        return [row for row in table if row[0] == first]

    def test_commands(self):
        setup = (
            "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
            ".venv/bin/python "
        )
        blocks = re.findall(r"```sh\n(.*?)```", self.TEXT, re.DOTALL)
        commands = [line for block in blocks for line in block.splitlines()]
        self.assertEqual(
            commands[:2],
            [setup + "train.py --model mobius_regular --dataset digits", setup + "unit_tests.py"],
        )
        page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        commands += block.splitlines()
        scripts = (train, convert_mnist, benchmark, reproduce, visualize)
        modules = {f"{module.__name__}.py": module for module in scripts}
        for command in commands[3:]:
            words = command.split("#")[0].split()
            if words[0] == "tensorboard":
                continue
            script = 1 if words[0] == "python" else words.index("reproduce.py")
            self.assertIn(words[0], ("python", "torchrun"))
            modules[words[script]].command_line().parse_args(words[script + 1:])

    def test_options(self):
        """The tables of train.py and convert_mnist.py are those that their options give."""
        for module in (train, convert_mnist):
            name, table = module.__name__, module.command_line().markdown()
            self.assertTrue(
                f"\n\n{table}\n\n" in self.TEXT,
                f"python -c 'import {name}; print({name}.command_line().markdown())' gives another",
            )
        options = {action.dest for action in train.command_line()._actions}
        for module in (benchmark, reproduce):
            for action in module.command_line()._actions[1:]:
                if (
                    action.dest in ("memory_of", "models", "precision", "out")
                    and module is benchmark
                    or action.dest in options and module is reproduce
                ):
                    continue
                names = ", ".join(f"`{name}`" for name in action.option_strings)
                rows = self.rows(names)
                self.assertTrue(rows, f"{module.__name__} {names}")
                if type(action.default) in (int, float, str) and action.dest != "results":
                    shown = [row[1].strip("`") for row in rows]
                    self.assertIn(str(action.default), shown, f"{module.__name__} {names}")

    def test_parameters(self):
        for name, count in PARAMETERS.items():
            rows = self.rows(f"`{name}`")
            (row,) = [row for row in rows if len(row) == 4 and not row[1].startswith("`")]
            self.assertEqual(row[3], f"{count:,}")
            if name.startswith("mobius"):
                base = MODES[name.removeprefix("mobius_")]
                self.assertEqual(row[2], str(tuple(4 * m for m in base)))

    def test_files(self):
        for link in (
            *re.findall(r"\]\(([^)#:]+)\)", self.TEXT),
            *re.findall(r'src(?:set)?="([^"]+)"', self.TEXT),
        ):
            self.assertTrue((ROOT / link).exists(), link)
        for path in ROOT.glob("*.py"):
            self.assertIn(f"]({path.name})", self.TEXT)

    def test_snippets(self):
        snippets = re.findall(r"```python\n(.*?)```", self.TEXT, re.DOTALL)
        self.assertEqual(len(snippets), 4)
        run = self.folder / re.search('run = "(.*)"', snippets[3])[1]
        run.mkdir(parents=True)
        torch.save(build_model("mobius_regular").state_dict(), run / "weights.pt")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        for snippet in snippets:
            exec(snippet, {})

    def test_results(self):
        """Each measured figure in the README is that of the files in results/."""
        groups = {}
        for path in sorted((ROOT / "results" / "runs").glob("*.json")):
            result = json.loads(path.read_text())
            self.assertEqual(result["status"], "finished", path)
            config = train.Config(**result["config"])
            self.assertEqual(run_name(config), path.stem)
            group = config.dataset, config.model, config.train_mode
            groups.setdefault(group, []).append(result)
        for (dataset, model, train_mode), results in groups.items():
            if dataset == "mnist":
                continue  # in the table
            self.assertEqual(train_mode, "centered")
            cells = [" ".join(row) for row in self.rows(f"`{model}`") if row[1] == dataset]
            self.assertEqual(len(cells), 1, f"{dataset} {model}")
            self.assertIn(", ".join(str(result["config"]["seed"]) for result in results), cells[0])
            for version in ("shifted", "centered"):
                errors = ", ".join(f"{result['test_error'][version]:.2f}" for result in results)
                self.assertIn(errors, cells[0], f"{dataset} {model} {version}")

    def test_table(self):
        """The README has what reproduce.py prints of the committed results."""
        options = re.search(r"`python reproduce.py (--table markdown[^`]*)`", self.TEXT)[1].split()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            reproduce.main(options)
        lines = printed.getvalue().splitlines()
        shown = set(self.TEXT.splitlines())
        for line in lines[:lines.index("Not the paper's protocol: precision bf16")]:
            self.assertTrue(line in shown, line)
        self.assertGreaterEqual(len([line for line in lines if line.startswith("| `")]), 14)

    def test_pooling_and_recipe(self):
        """The tables on polyphase pooling and on the recipe, from the files."""
        def cell(model, train_mode, version, runs, **options):
            settings = {"precision": "bf16", **options}
            study = Study(reproduce.plan(runs, [model], [train_mode], settings))
            return Cell(study, model, train_mode, version)

        def shown(cell):
            spread = f" ± {cell.std:.2f}" if cell.n > 1 else ""
            return f"{cell.mean:.2f}" + spread + f" ({cell.n})"

        for pooling in POOLINGS:
            (row,) = [row for row in self.rows("`mobius_regular`") if row[1] == f"`{pooling}`"]
            expected = [
                shown(cell("mobius_regular", mode, "shifted", 3, pooling=pooling))
                for mode in TRAIN_MODES
            ]
            self.assertEqual(row[2:], expected)
        for recipe in RECIPES:
            (row,) = self.rows(f"`--recipe {recipe}`")
            of_recipe = [
                cell("mobius_regular", "centered", version, 5, recipe=recipe)
                for version in ("shifted", "centered")
            ]
            errors = ", ".join(f"{error:.2f}" for error in of_recipe[0].errors)
            self.assertEqual(row[1:], [*map(shown, of_recipe), errors])
            options = {"precision": "bf16", "recipe": recipe}
            configs = reproduce.plan(5, ["mobius_regular"], ["centered"], options)
            for config in Study(configs).finished():
                name = run_name(config)  # which a recipe of other settings could bear too
                self.assertEqual(Study([config]).result(config)["status"], "finished", name)
        for row in json.loads((ROOT / "results" / "error_against_shift.json").read_text())["rows"]:
            settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
            (cells,) = [
                cells for cells in self.rows(f"`{row['model']}`")
                if cells[1] == str(row["seed"]) and cells[2] == settings
            ]
            expected = [
                f"{row['changed']:,} of {row['predictions']:,}",
                consistency(row),
                f"{min(row['errors']):.2f} … {max(row['errors']):.2f} %",
            ]
            self.assertEqual(cells[3:], expected)
        rows = json.loads((ROOT / "results" / "benchmark_pooling.json").read_text())["rows"]
        for model in MODELS:
            ratios = {row["precision"]: row for row in rows if row["model"] == model}
            expected = [
                f"{ratios[precision][task]['ratio']:.2f}"
                for task in ("step", "infer") for precision in PRECISIONS
            ]
            of_model = [row for row in self.rows(f"`{model}`") if len(row) == 5]
            self.assertIn([f"`{model}`", *expected], of_model)
        for run in json.loads((ROOT / "results" / "recipe_search.json").read_text())["runs"]:
            names = ("lr", "deformation", "stroke_width", "scaling", "label_smoothing", "dropout")
            self.assertIn(
                [*(f"{run[name]:g}" for name in names), run["besides"], f"{run['error']:.2f}"],
                [row[1:] for row in self.rows(str(run["batch_size"]))],
            )

    def test_pictures(self):
        """All that visualize.py draws is there, on this page, in both styles, and small.

        It is drawn from networks whose runs are there.
        """
        page = ROOT / "docs" / "walkthrough.md"
        folder, walkthrough = ROOT / "visualizations", page.read_text(encoding="utf-8")
        names = {
            f"{name}{style}.{'png' if picture.pixels else 'svg'}"
            for name, picture in visualize.PICTURES.items()
            for style in (figures.STYLES if picture.text else [""])
        }
        self.assertEqual({path.name for path in folder.iterdir()}, names | {"README.md"})
        for text, prefix in ((self.TEXT, ""), (walkthrough, "../")):
            pattern = rf'(?:src="|srcset="|\]\(){re.escape(prefix)}visualizations/([^")]+)'
            shown = re.findall(pattern, text)
            self.assertEqual(len(shown), len(set(shown)))
            self.assertLessEqual(set(shown), names)
            for name in shown:  # with its other style
                plain = name.replace("-dark", "")
                in_both = {plain, plain.replace(".", "-dark.")} <= set(shown)
                self.assertEqual(visualize.PICTURES[plain.split(".")[0]].text, in_both, name)
            if text is self.TEXT:
                self.assertEqual(set(shown), names)
        texts = walkthrough + self.TEXT
        described = len(re.findall("alt=", texts)) + len(re.findall(r"!\[.+?\]", texts))
        self.assertEqual(described, len(visualize.PICTURES) + 6)
        self.assertLess(sum(path.stat().st_size for path in folder.iterdir()), 3_000_000)
        # Those of results are of these results.
        arguments = [
            "results", "error_against_shift", "gradient_norm", "training_curves", "models",
            "--out", str(self.folder),
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            visualize.main(arguments)

        for path in self.folder.iterdir():
            drawn, committed = path.read_text(), (folder / path.name).read_text()
            version = re.search(r"Matplotlib v[\d.]+", committed)[0]
            if version in drawn:  # another one may write it otherwise
                self.assertEqual(drawn, committed, f"python visualize.py {path.stem.split('-')[0]}")
        content = json.loads((ROOT / "results" / "error_against_shift.json").read_text())
        for row in content["rows"]:
            stored = json.loads((ROOT / "results" / "runs" / f"{row['run']}.json").read_text())
            self.assertAlmostEqual(row["errors"][0], stored["test_error"]["centered"], delta=0.05)

    def test_walkthrough(self):
        """Six steps, each with a picture and five to fifteen lines.

        Together they are a program, and what it asserts is true.
        """
        text = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
        steps = re.split(r"^## \d\. .+$", text, flags=re.MULTILINE)[1:]
        self.assertEqual(len(steps), 6)
        torch.manual_seed(0)
        namespace = {}
        for step in steps:
            (snippet,) = re.findall(r"```python\n(.*?)```", step, re.DOTALL)
            self.assertIn("visualizations/", step)
            lines = [line for line in snippet.splitlines() if line.strip()]
            self.assertIn(len(lines), range(5, 16))
            self.assertIn("assert", snippet)
            exec(snippet, namespace)

    def test_reliability(self):
        result = json.loads((ROOT / "results" / "reliability.json").read_text())
        for what, count in result["survived"].items():
            (row,) = self.rows(what)
            self.assertEqual(row[1], str(count), what)

    def test_benchmark(self):
        result = json.loads((ROOT / "results" / "benchmark.json").read_text())
        for row in result["rows"]:
            name = row["model"] if row["model"] == benchmark.TEXTBOOK else f"`{row['model']}`"
            precision = {"fp32": "float32", "bf16": "bfloat16"}[row["precision"]]
            (cells,) = [cells for cells in self.rows(name) if cells[1] == precision]
            figures = [
                f"{row['step']['ratio']:.2f}", f"{row['step']['images_per_second']:,.0f}",
                f"{row['infer']['ratio']:.2f}", f"{row['infer']['images_per_second']:,.0f}",
                f"{row['memory_ratio']:.2f}",
            ]
            self.assertEqual(cells[2:], figures, cells)
