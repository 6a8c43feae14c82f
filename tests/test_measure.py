"""What is said of a policy that was pushed: KL, best-of-n, bytes; against loops."""

import math

import numpy as np
import pytest
import torch

from data import TASKS, get_tokenizer
from data.requests import HELD_OUT, parts_of
from model import ScalarModel
from rlhf import measure as room
from rlhf import scalar_model
from rlhf.measure import (
    ask,
    best_of,
    best_of_kl,
    bytes_held,
    evaluation_requests,
    gold_of_best,
    log_ratios,
    point,
    point_requests,
)
from rlhf.reward_model import Config, judge
from sample import complete
from tests.small import SHAPE, small_model

REQUESTS, words = TASKS["requests"], get_tokenizer("world")


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(room, "ASKED", 9)
    return Config(preset="tiny", max_new_tokens=10, **SHAPE).filled()


def other_model():
    model = small_model(1, task="world")
    with torch.no_grad():
        model.embedding.weight *= 20
    return model


def some_judge():
    model = scalar_model(small_model(task="world"))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    return judge(model)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_kl_of_a_completion_is_the_sum_over_its_tokens(size):
    """Also of rows of other lengths beside it, and whatever the micro-batches."""
    policy, reference = other_model(), small_model(task="world")
    problems = [REQUESTS.ask("about", 7, "en"), REQUESTS.ask("greet", 0, "ko")]
    rollout = complete(policy, problems, group_size=6, max_new_tokens=12, seed=3)
    rollout.mask &= rollout.mask.cumsum(dim=1) <= torch.arange(12)[:, None] + 1
    rollout.logps *= rollout.mask
    assert set(rollout.ends - rollout.starts) == set(range(1, 13))
    found = log_ratios(reference, rollout, size)
    for row, ids in enumerate(rollout.tokens):
        total = 0.0
        for t in range(rollout.starts[row], rollout.ends[row]):
            pi, ref = (m(ids[None, :t])[0, -1].log_softmax(-1)[ids[t]] for m in (policy, reference))
            total += (pi - ref).item()
        assert found[row].item() == pytest.approx(total, abs=1e-3)
    assert (log_ratios(policy, rollout, size).abs() < 1e-3).all()


def test_the_mean_of_the_log_ratios_is_the_kl():
    """Of completions of one token, where the KL can be summed over all that can be said."""
    policy, reference = other_model(), small_model(task="world")
    problem = REQUESTS.ask("about", 7, "en")
    rollout = complete(policy, [problem], group_size=4000, max_new_tokens=1, seed=0)
    prompt = torch.tensor([words.encode(problem.prompt)])
    p, q = (m(prompt)[0, -1].double().log_softmax(-1) for m in (policy, reference))
    exact = (p.exp() * (p - q)).sum().item()
    spread = (p.exp() * (p - q - exact) ** 2).sum().sqrt().item() / math.sqrt(4000)
    assert exact > 0.5
    found = log_ratios(reference, rollout, 512).mean().item()
    assert found == pytest.approx(exact, abs=4 * spread)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_point_tells_kl_proxy_and_gold_of_the_same_answers(held_out, config):
    policy, sft, score = other_model(), small_model(task="world"), some_judge()
    told = point(config, policy, sft, score, held_out)
    problems = point_requests(config.seed, held_out)
    rollout, texts, scores, golds = ask(config, policy, score, problems, 4)
    assert len(problems) == 9 and len(texts) == 36
    assert {parts_of(p)[1] in HELD_OUT for p in problems} == {held_out}
    right = [REQUESTS.gold(problems[i // 4], text) for i, text in enumerate(texts)]
    assert golds.tolist() == pytest.approx(right)
    assert told["gold"] == pytest.approx(np.mean(right), abs=1e-5)
    assert told["proxy"] == pytest.approx(score(problems, rollout, 0)["reward"].mean().item())
    assert told["kl"] == pytest.approx(log_ratios(sft, rollout, 64).mean().item(), abs=1e-5)
    assert told["kl"] > 0.5
    assert point(config, sft, sft, score)["kl"] == pytest.approx(0, abs=1e-3)
    assert len(told["said"]) == 8
    for i, shown in enumerate(told["said"]):
        assert shown["prompt"] == problems[i].prompt and shown["said"] == texts[4 * i]
        assert shown["gold"] == pytest.approx(right[4 * i])
        assert shown["proxy"] == pytest.approx(scores[4 * i].item())


@pytest.mark.parametrize("held_out", [True, False])
def test_the_gold_of_best_of_n_is_of_the_requests_that_models_are_measured_on(config, held_out):
    """Four picks for each request, each the highest score of three answers."""
    model, score = other_model(), some_judge()
    problems = evaluation_requests(config.seed, held_out)
    assert len(problems) == 240 and {parts_of(p)[1] in HELD_OUT for p in problems} == {held_out}
    _, _, scores, golds = ask(config, model, score, problems, 12)
    picked = []
    for start in range(0, len(golds), 3):
        part = scores[start : start + 3].tolist()
        picked.append(golds[start + part.index(max(part))].item())
    found = gold_of_best(config, model, score, 3, held_out)["gold"]
    assert found == pytest.approx(np.mean(picked), abs=1e-5)
    assert found != pytest.approx(golds.mean().item(), abs=1e-3)


def test_best_of_n_picks_the_highest_score():
    """Of the first n answers, of the next n, and so on; all of them are used once."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 12, generator=generator)
    for n in (1, 2, 3, 4, 12):
        picks = best_of(scores, n)
        assert picks.shape == (5, 12 // n)
        for row in range(5):
            for group, pick in enumerate(picks[row].tolist()):
                part = scores[row, group * n : (group + 1) * n].tolist()
                assert group * n <= pick < (group + 1) * n
                assert scores[row, pick].item() == max(part)
    with pytest.raises(ValueError, match="12 answers are not groups of 5"):
        best_of(scores, 5)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_kl_of_best_of_n_is_gaos_formula(n):
    """Summed over 100,000 equally likely answers without a tie. With ties it is less."""

    def summed(answers):
        below = torch.arange(answers + 1, dtype=torch.float64) / answers
        picked = (below**n).diff()  # the highest of n has rank k
        return (picked * (picked * answers).log()).nan_to_num(0.0).sum().item()

    assert best_of_kl(n) == pytest.approx(summed(100_000), abs=1e-3)
    assert summed(3) <= best_of_kl(n) + 1e-9


def test_bytes_are_those_of_weights_gradients_and_moments():
    """Float32: 16 for each weight that is trained, 4 for each that is not. No model changes."""
    policy = small_model(task="world")
    value = ScalarModel(policy.config)
    before = [weight.clone() for weight in policy.parameters()]
    small, large = (sum(w.numel() for w in m.parameters()) for m in (policy, value))
    assert large == small + 17
    assert bytes_held([policy, value], [policy]) == 16 * (small + large) + 4 * small
    assert bytes_held([], [value]) == 4 * large
    assert all(torch.equal(x, y) for x, y in zip(policy.parameters(), before))
