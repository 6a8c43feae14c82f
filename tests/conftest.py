"""Set before any test imports torch, as train.py and sample.py do for themselves."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
