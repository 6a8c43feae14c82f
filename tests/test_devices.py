"""What other devices ask of the code. MPS has no float64: nothing may make a tensor of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from rlhf import dpo, ppo
from sample import sample_tokens, uniform
from tests.small import SHAPE_FLAGS

FLAGS = ["--task=chains", "--device=cpu", "--pretrain_steps=3", "--steps=2", "--prompts=2"]
FLAGS += ["--group_size=4", "--eval_every=1", "--eval_problems=8", "--max_new_tokens=16"]
FLAGS += ["--max_level=3", *SHAPE_FLAGS]


class NoDouble(TorchDispatchMode):
    """Refuses every operation that gives a tensor in float64."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = operator(*args, **kwargs or {})
        for x in filter(torch.is_tensor, tree_leaves(given)):
            assert x.dtype != torch.float64, operator
            self.seen += 1
        return given

    seen = 0


def test_the_guard_sees_float64():
    with NoDouble(), pytest.raises(AssertionError):
        torch.zeros(1).double()


@pytest.mark.parametrize("more", [[], ["--beta=0.1", "--reference_every=1", "--variant=gspo"]])
def test_a_run_makes_no_tensor_in_float64(more, tmp_path):
    """Pretraining, evaluation, GRPO with its looks and saves, and the samples at the end."""
    with NoDouble() as guard:
        train.main([*FLAGS, *more, f"--out={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "result.json").exists() and guard.seen > 10_000


@pytest.mark.slow
def test_ppo_and_dpo_make_no_tensor_in_float64(tmp_path):
    """Nor do the reward model, the value model and fine-tuning on the way."""
    few = ["--preset=tiny", "--pretrain_steps=2", "--sft_steps=2", "--pairs=60", "--min_lead=0.3"]
    few += ["--max_new_tokens=8", "--reward_batch=8", "--curated=20"]
    with NoDouble() as guard:
        ppo.main([*FLAGS, f"--out={tmp_path / 'ppo'}"])
        dpo.main([*few, "--device=cpu", *SHAPE_FLAGS, f"--out={tmp_path / 'dpo'}"])
    assert all((tmp_path / name / "result.json").exists() for name in ("ppo", "dpo"))
    assert guard.seen > 10_000


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_the_sampler_draws_the_same_on_mps():
    """Its noise and its sums are whole numbers up to 2^62, which must not be rounded."""
    rows, positions = torch.arange(64)[:, None], torch.arange(100)
    noise = uniform(2**62 + 1, rows, positions)
    assert torch.equal(uniform(2**62 + 1, rows.to("mps"), positions.to("mps")).cpu(), noise)
    logits = 3 * torch.randn((64, 90), generator=torch.Generator().manual_seed(0))
    for column in noise.T:
        tokens, *_ = sample_tokens(logits, column, 1.0)
        others, *_ = sample_tokens(logits.to("mps"), column.to("mps"), 1.0)
        assert (others.cpu() == tokens).float().mean() > 0.98  # but for the rounding of exp
