"""What DPO, PPO and GRPO on requests are made of."""

import torch

import train
from data import TASKS
from rlhf import methods, ppo
from rlhf.methods import Config, leaving_points, settings, with_rule
from tests.small import SHAPE, Unsaved, rollout_of, small_model

REQUESTS = TASKS["requests"]


def config_of(**changes):
    how = {"preset": "tiny", "max_new_tokens": 6, "max_level": 2, "steps": 4}
    return Config(**how | SHAPE | changes).filled()


def test_rl_asks_requests_with_the_jobs_settings_and_its_own():
    """PPO's defaults stand where they are not GRPO's; a stage looks at its end alone."""
    config = config_of(prompts=3, variant="dr_grpo", beta=0.3, lr=1e-5)
    for kind, variant in ((train.Config, "dr_grpo"), (ppo.Config, "dapo")):
        found = settings(config, kind, beta=0.7)
        assert type(found) is kind and found.variant == variant
        assert (found.task, found.levels, found.eval_every) == ("requests", range(1, 2), 4)
        assert (found.beta, found.prompts, found.lr, found.steps) == (0.7, 3, 1e-5, 4)
    assert settings(config, train.Config).beta == 0.3
    assert settings(config, ppo.Config, beta=0.0).clip_high == 0.2


def test_a_rule_takes_a_price_for_each_sentence_said_twice():
    """And leaves the judge's score otherwise."""
    problem = REQUESTS.ask("about", 7, "en")
    texts = [" sure! it is small.", " sure! sure! it is small. sure!", " it is small. it is small"]
    rollout = rollout_of([problem], texts)
    rollout_words = {"reward": torch.tensor([1.0, 2.0, 3.0])}
    reward = with_rule(lambda problems, rollout, step: rollout_words, 0.5)
    assert reward([problem], rollout, 0)["reward"].tolist() == [1.0, 2.0 - 2 * 0.5, 3.0]


def test_a_policy_is_left_as_it_was_before_a_step(monkeypatch):
    monkeypatch.setattr(methods, "POINTS", 3)
    run, config = Unsaved(), settings(config_of(steps=6), train.Config)
    sample = leaving_points(run)
    for step in run.steps("grpo", 6, None):
        sample(config, small_model(step, task="world"), step)
    assert list(run.written) == ["grpo_2.pt", "grpo_4.pt"]
    for step in (2, 4):
        weights = small_model(step, task="world").embedding.weight
        assert torch.equal(run.written[f"grpo_{step}.pt"].embedding.weight, weights)
