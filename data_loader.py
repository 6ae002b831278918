from training.data import CLASSES  # for benchmark.py, until it imports this itself
