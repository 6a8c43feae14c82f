"""Set before any test imports torch, as train.py and sample.py do for themselves."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested is the same on every machine
