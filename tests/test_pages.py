"""README.md and docs/: commands, tables, figures in the text, links, pictures and code."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections import Counter

import torch

import benchmark
import convert_mnist
import reproduce
import train
import visualize
from models import MODELS
from study import figures, pages
from study.runs import Study, run_name
from study.table import protocol_cells
from tests.support import ROOT, FilesCase

TEXTS = {page.relative_to(ROOT): page.read_text(encoding="utf-8") for page in pages.PAGES}
README = (ROOT / "README.md").read_text(encoding="utf-8")


class TestPages(FilesCase):
    def test_readme_is_short(self):
        self.assertLessEqual(len(README.splitlines()), 200)

    def test_commands(self):
        setup = (
            "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
            ".venv/bin/python "
        )
        text = "".join(TEXTS.values())
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        commands = [line for block in blocks for line in block.splitlines()]
        for command in ("train.py --model mobius_regular --dataset digits", "unit_tests.py"):
            self.assertEqual(commands.count(setup + command), 1)
        scripts = (train, convert_mnist, benchmark, reproduce, visualize)
        modules = {f"{module.__name__}.py": module for module in scripts}
        parsed = 0
        for command in commands:
            words = command.split("#")[0].split()
            script = next((word for word in words if word in modules), None)
            if script and words[0] in ("python", "torchrun", "OMP_NUM_THREADS=1"):
                modules[script].command_line().parse_args(words[words.index(script) + 1:])
                parsed += 1
        self.assertGreater(parsed, 20)

    def test_tables(self):
        """They are what the files in results/ and the options give."""
        for page, text in TEXTS.items():
            self.assertTrue(pages.filled(text) == text, f"{page}: run python -m study.pages")
        used = {match[1] for text in TEXTS.values() for match in pages.BLOCK.findall(text)}
        self.assertEqual(used, set(pages.TABLES))

    def test_a_table_that_is_wrong_is_found(self):
        page = "a\n\n<!-- digits -->\n| 3.6 |\n<!-- end -->\n\nb\n"
        self.assertIn("3.60 | 2.80 |\n\n<!-- end -->\n\nb", pages.filled(page))

    def test_figures_in_the_text(self):
        regular = {
            recipe: pages.recipe_cell(recipe, "shifted") for recipe in ("paper", "improved")
        }
        cells = {model: protocol_cells(model, "shifted", reproduce.PAPER, precision="bf16")
                 for model in MODELS}
        self.assertEqual({(cell.config.precision, cell.config.sign_eps)
                          for row in cells.values() for cell in row}, {("bf16", 0)})
        cnn, _ = cells["cnn_same_channels"]
        verdicts = {(model, mode): verdict for model, mode, verdict in re.findall(
            r"^\| `(\w+)` \| (\w+) \|.*\| (differs|equal within 0.1|undecided) \|",
            self.page("results"), re.MULTILINE)}
        count = Counter(verdicts.values())
        differ = {cell for cell, verdict in verdicts.items() if verdict == "differs"}
        self.assertEqual(differ, {("mobius_signflip", "centered"),
                                  ("mobius_signflip", "shifted"),
                                  ("mobius_mixed", "shifted"),
                                  ("mobius_regular", "centered"),
                                  ("cnn_same_params", "shifted")})
        differences = {
            (model, cell.config.train_mode): cell.comparison.difference
            for model, row in cells.items() for cell in row
        }
        moved = pages.read("error_against_shift.json")["rows"]
        changed = {(row["model"], *row["settings"].values()): row["changed"] for row in moved}
        self.assertEqual(len(changed), len(moved))
        self.assertEqual({row["predictions"] for row in moved}, {560_000})
        formulas = {row["model"]: row["changed_formulas"] for row in moved
                    if row["settings"] and row["model"].startswith("mobius_")}
        self.assertEqual(formulas, {model: 0 for model in MODELS if model.startswith("mobius_")})
        self.assertEqual({changed[model, "polyphase"] for model in formulas}, {0})
        step = {
            row["precision"]: row["step"]["ratio"] for row in pages.read("benchmark.json")["rows"]
            if row["model"] == "mobius_regular"
        }
        curves = pages.read("gradient_norms.json")["curves"]
        confused = {
            name: (10000 - sum(rows[i][i] for i in range(10)), rows[2][5] + rows[5][2])
            for name, rows in pages.read("confusions.json")["confusions"].items()
        }
        for text, figure in [
            (README, f"{regular['paper'].mean:.1f} % test error"),
            (README, f"conventional CNN has {cnn.mean:.0f} %"),
            (self.page("results"), f"{cnn.mean:.0f} % on shifted ones"),
            (README, "0 of 560,000 predictions of each gauge CNN change"),
            (README, f"where {changed['mobius_regular',]:,} of `mobius_regular` do"),
            *((README, f"{cell.mean:.2f} ± {cell.std:.2f} % ({cell.n} runs)")
              for cell in regular.values()),
            (README, f"takes {step['fp32']:.2f} times as long"),
            (README, f"bfloat16 {step['bf16']:.2f} times"),
            (self.page("results"),
             f"Of the {len(verdicts)} cells in bfloat16, {count['differs']} differ from the paper, "
             f"{count['equal within 0.1']} are equal within 0.1 percentage points, and "
             f"{count['undecided']} are undecided."),
            *((self.page("results"),
               f"`{model}`, trained on {mode} digits, has {abs(differences[model, mode]):.2f} "
               f"percentage points {'more' if differences[model, mode] > 0 else 'fewer'}")
              for model, mode in differ if model != "mobius_signflip"),
            *((page, text.format(abs(differences["mobius_signflip", mode])))
              for mode in ("centered", "shifted")
              for page, text in ((README, "by -{:.2f} percentage points in both cells"),
                                 (self.page("results"), "`mobius_signflip` has {:.2f} percentage "
                                  "points fewer in both of its cells"))),
            (README, "Three other cells differ by about 0.1"),
            (self.page("results"), "{1} times among its {0} errors on centered digits".format(
                *confused["mobius_regular"]
            )),
            (self.page("results"), f"the CNN never among its {confused['cnn_same_channels'][0]}"),
            (self.page("results"), "its maximum " + " and ".join(
                f"{max(curve['norms']):.3g}" for curve in curves
            )),
        ]:
            self.assertIn(figure, text.replace("\n", " "))

    @staticmethod
    def page(name: str) -> str:
        return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")

    def test_committed_runs(self):
        study = Study([])
        for name in study.stored():
            result = study.read(name)
            self.assertEqual(result["status"], "finished", name)
            self.assertEqual(run_name(train.Config(**result["config"])), name)
        self.assertGreater(len(study.stored()), 50)

    def test_links(self):
        for page, text in TEXTS.items():
            for link in (
                *re.findall(r"\]\(([^)#:]+)[)#]", text),
                *re.findall(r'src(?:set)?="([^"]+)"', text),
            ):
                self.assertTrue((ROOT / page.parent / link).exists(), f"{page}: {link}")
        for path in (*ROOT.glob("*.py"), *ROOT.glob("docs/*.md")):
            name = path.relative_to(ROOT)
            linked = any(f"{path.name}" in text for page, text in TEXTS.items() if page != name)
            self.assertTrue(linked, name)

    def test_code(self):
        """The code of each page is a program. That of docs/layers.md has a test of its own."""
        for page, text in TEXTS.items():
            snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            if page.name != "layers.md" and snippets:
                torch.manual_seed(0)
                with self.subTest(page):
                    namespace = {}
                    for snippet in snippets:
                        exec(snippet, namespace)

    def test_files_to_copy(self):
        """Those that the README names are enough to use the layers elsewhere."""
        for name in ("nn_layers.py", "fields.py", "fast"):
            self.assertIn(f"`{name}", README)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.folder / name)
        code = ("import sys; sys.path[0:0] = ['.']; import torch, nn_layers as n;"
                "f = (1, 1, 1); x = torch.rand(1, 1, 8, 8);"
                "print(n.MobiusPool(f)(n.EquivNonlin(f)(n.MobiusConv((1, 0, 0), f, 5)(x))).shape)")
        done = subprocess.run([sys.executable, "-I", "-c", code], cwd=self.folder,
                              capture_output=True, text=True)
        self.assertEqual(done.stdout.strip(), "torch.Size([1, 4, 4, 4])", done.stderr)

    def test_walkthrough(self):
        """Seven steps, each with five to fifteen lines and something that it asserts."""
        steps = re.split(r"^## \d\. .+$", self.page("walkthrough"), flags=re.MULTILINE)[1:]
        self.assertEqual(len(steps), 7)
        for step in steps:
            (snippet,) = re.findall(r"```python\n(.*?)```", step, re.DOTALL)
            lines = [line for line in snippet.splitlines() if line.strip()]
            self.assertIn(len(lines), range(5, 16))
            self.assertRegex(snippet, r"assert")

    def test_pictures(self):
        """All that visualize.py draws is shown, in both styles, with a description, and small."""
        folder = ROOT / "visualizations"
        names = {
            f"{name}{style}.{'png' if picture.pixels else 'svg'}"
            for name, picture in visualize.PICTURES.items()
            for style in (figures.STYLES if picture.text else [""])
        }
        self.assertEqual({path.name for path in folder.iterdir()}, names | {"README.md"})
        everywhere = set()
        for page, text in TEXTS.items():
            shown = re.findall(r'(?:src="|srcset="|\]\()(?:\.\./)?visualizations/([^")]+)', text)
            self.assertEqual(len(shown), len(set(shown)), page)
            self.assertEqual(
                len({name.replace("-dark", "") for name in shown}),
                len(re.findall("alt=|!\\[.+?\\]", text)), page,
            )
            for name in shown:  # with its other style
                plain = name.replace("-dark", "")
                in_both = {plain, plain.replace(".", "-dark.")} <= set(shown)
                self.assertEqual(visualize.PICTURES[plain.split(".")[0]].text, in_both, name)
            everywhere |= set(shown)
        self.assertEqual(everywhere, names)
        self.assertLess(sum(path.stat().st_size for path in folder.iterdir()), 3_000_000)

    def test_pictures_of_results(self):
        """They are of the results that are there."""
        names = ["results", "error_against_shift", "gradient_norm", "training_curves", "models"]
        with contextlib.redirect_stdout(io.StringIO()):
            visualize.main([*names, "--out", str(self.folder)])
        for path in self.folder.iterdir():
            committed = (ROOT / "visualizations" / path.name).read_text()
            version = re.search(r"Matplotlib v[\d.]+", committed)[0]
            if version in path.read_text():  # another one may write it otherwise
                about = f"python visualize.py {path.stem.split('-')[0]}"
                self.assertEqual(path.read_text(), committed, about)
        for row in pages.read("error_against_shift.json")["rows"]:
            stored = Study([]).read(row["run"])
            self.assertAlmostEqual(row["errors"][0], stored["test_error"]["centered"], delta=0.05)

    def test_citation(self):
        """CITATION.cff has the paper and the book."""
        citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
        for name in ("arXiv preprint arXiv:2106.06020", "World Scientific", "10.1142/14143"):
            self.assertIn(name, README)
            self.assertIn(name, citation)
