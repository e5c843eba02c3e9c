"""The project's root goes first on the path; one thread, so that small networks are quick and sums are reproducible."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
