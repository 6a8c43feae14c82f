"""DeepSeek-R1 in miniature: four stages from one base model, and a student that learns from them.

The paper is DeepSeek-AI 2025, "DeepSeek-R1 incentivizes reasoning in LLMs through reinforcement
learning" (Nature 645).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin are slow here
