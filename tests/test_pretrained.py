"""The trained networks in pretrained/ are those that their JSONs describe."""

import numpy as np

from models import build_model
from study import pretrained
from tests.support import Case

EXPECTED = {
    "cnn_same_channels": {"model": "cnn_same_channels", "pooling": "fixed"},
    "mobius_regular": {"model": "mobius_regular", "pooling": "fixed"},
    "mobius_regular_improved": {"model": "mobius_regular", "pooling": "polyphase"},
}


class TestPretrained(Case):
    def test_networks(self):
        networks = pretrained.networks()
        self.assertEqual(set(networks), set(EXPECTED))
        with np.load(pretrained.FOLDER / "digits.npz") as npz:
            labels = npz["labels"]
        for name, record in networks.items():
            with self.subTest(name):
                config = record["config"]
                for option, value in EXPECTED[name].items():
                    self.assertEqual(config[option], value)
                self.assertEqual((record["status"], len(record["epochs"])), ("finished", 20))
                found = pretrained.predictions(pretrained.FOLDER / f"{name}.pt")
                for version, recorded in record["predictions"].items():
                    # Rounding differs between machines.
                    differ = np.not_equal(found[version], recorded).sum()
                    self.assertLessEqual(differ, 1, version)
                    # The error on all 10,000 digits, up to chance.
                    wrong = np.not_equal(recorded, labels).sum()
                    self.assertLess(abs(wrong - record["test_error"][version]), 15, version)

    def test_other_weights_are_found(self):
        """Negative control."""
        model = build_model("mobius_regular")
        digits = pretrained.hundred_digits()["centered"]
        found = pretrained.predict(model, digits).tolist()
        recorded = pretrained.networks()["mobius_regular"]["predictions"]["centered"]
        self.assertGreater(np.not_equal(found, recorded).sum(), 50)

    def test_size(self):
        files = pretrained.FOLDER.iterdir()
        self.assertLess(sum(path.stat().st_size for path in files), 13_000_000)
