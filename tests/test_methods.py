"""What DPO, PPO and GRPO on requests are made of."""

import torch

import train
from data import TASKS
from rlhf import dpo, methods, ppo, scalar_model
from rlhf.methods import METHODS, Config, Start, leaving_points, settings, with_rule
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


def test_each_method_starts_from_the_same_models_with_its_own_knobs(monkeypatch):
    """From copies: the fine-tuned model and the reward model stay as they are."""
    sft, given = small_model(1, task="world"), {}
    reward = scalar_model(small_model(2, task="world"))
    at = Start(small_model(task="world"), sft, reward, pairs=[0] * 48, choosing=[1], answers=[])
    for room, name in ((dpo, "dpo"), (ppo, "ppo")):
        monkeypatch.setattr(room, name, lambda *args, by=name: given.update({by: args}))
    config = config_of(lr=1.0, beta=0.1, ppo_lr=2.0, ppo_beta=0.2, dpo_lr=3.0, reward_batch=2)
    for name in ("dpo", "ppo"):
        policy = METHODS[name](config, Unsaved(), name, at)
        how, _, stage, learns, reference, *rest = given[name]
        assert stage == name and learns is policy and reference is sft
        assert policy is not sft and torch.equal(policy.embedding.weight, sft.embedding.weight)
        if name == "ppo":
            assert (how.lr, how.beta) == (2.0, 0.2)
            value = rest[0]
            assert value is not reward
            assert torch.equal(value.trunk.embedding.weight, reward.trunk.embedding.weight)
        else:
            assert how.eval_every == 24 // 24 and rest == [at.pairs, at.choosing]
