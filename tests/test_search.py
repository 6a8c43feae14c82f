"""The study of how a model searches, on completions that are known."""

import json
import random
from collections import defaultdict
from dataclasses import asdict

import numpy as np
import pytest
import torch

import train
from data import TASKS, get_tokenizer
from data.problem import sample_problems
from data.signs import candidates, line, parts_of, tries_of
from experiments.study import search
from experiments.study.collect import RESULTS, at
from kit.evaluate import answer_problems
from kit.run import ROOT
from tests.small import PROSE, small_model

SIGNS = TASKS["signs"]
MAKE_7 = SIGNS.ask((4, 3, 6), 7)  # one of six candidates hits
MISS, HIT, SLIP = (
    "\n 7 : 4 - 3 = 1 * 6 = 6 no",
    "\n 7 : 4 - 3 = 1 + 6 = 7 yes",
    "\n 7 : 4 + 3 = 8 + 6 = 14 yes",
)
ENDS = "</think><answer> 4 - 3 + 6</answer>"


def described(*thoughts):
    return search.describe([MAKE_7], [[(f"<think>{thought}", 10) for thought in thoughts]])


def test_tries_are_counted_and_judged():
    found = described(MISS + HIT + ENDS, MISS + MISS + ENDS, " easy" + ENDS, SLIP + MISS + "\n 7 :")
    assert found["tries"] == 6 / 4 and found["most tries"] == 2
    assert found["pass@1"] == found["format"] == 3 / 4 and found["tokens"] == 10
    assert found["totals right"] == found["verdicts true"] == 5 / 6
    assert found["numbers and target copied"] == 1 and found["repeats"] == 1 / 6
    assert found["ends"] == {"gave up": 1 / 4, "limit": 1 / 4, "no try": 1 / 4, "yes": 1 / 4}
    assert found["goes on"] == {"1": (1.0, 2), "2": (0.0, 1)}


def test_lift_compares_with_the_share_of_candidates_that_hit():
    """Six tries, each with a chance of one in six; one hits."""
    assert described(MISS + HIT + ENDS, MISS + MISS + ENDS, MISS + MISS)["lift"] == pytest.approx(1)
    assert described(HIT + ENDS)["lift"] == pytest.approx(6)
    assert described(" easy" + ENDS)["lift"] is None


def test_uniform_repeats_are_what_random_tries_would_repeat():
    """A second try misses with chance 5/6, and is then one of five misses, one of them seen."""
    found = described(MISS + MISS + ENDS)
    assert found["repeats"] == 1 / 2
    assert found["uniform repeats"] == pytest.approx((0 + 5 / 6 * 1 / 5) / 2)


def test_random_tries_have_lift_1_under_any_rule_of_stopping():
    """And repeat as often as is said; simulated, giving up after a third miss."""
    rng = random.Random(0)
    texts = []
    for _ in range(4000):
        lines = []
        while len(lines) < 3 and not (lines and lines[-1].endswith("yes")):
            lines.append(line(7, rng.choice(list(candidates((4, 3, 6))))))
        texts.append("".join(lines) + ENDS)
    found = described(*texts)
    assert found["lift"] == pytest.approx(1, abs=0.07)
    assert found["repeats"] == pytest.approx(found["uniform repeats"], abs=0.02)


def test_a_model_that_may_not_give_up_tries_again():
    """After <think> and each "no" comes a line break, and nothing else changes."""
    model = small_model(task="signs")
    words = get_tokenizer("signs")
    no, think = words.encode("<think> no", tags=True)[::-1]
    tokens = torch.tensor([[words.encode(" yes")[0], no, 300, think]])
    forced = search.MayNotGiveUp(model)
    found, expected = forced(tokens, None), model(tokens)
    assert torch.equal(found[0, [0, 2]], expected[0, [0, 2]])
    for column in (1, 3):
        assert words.decode([found[0, column].argmax().item()]) == "\n"
        assert found[0, column].isfinite().sum() == 1
    ((text, _),) = answer_problems(forced, [MAKE_7], 1, limit=60, seed=0)[0:1][0]
    assert all(part[:1] in ("\n", "") for part in text.split("<think>")[1:])


def test_planted_tries_are_hits_and_misses():
    """Each after as many misses as asked; only the last verdict is missing."""
    rng, gaps = random.Random(0), defaultdict(set)
    for asked in sample_problems(rng, SIGNS, [2, 3], 50):
        for kind, (problem, thought) in search.plant(rng, asked, failures=2).items():
            (numbers, target), tries = parts_of(problem), tries_of(problem, f"<think>{thought} no")
            assert numbers == parts_of(asked)[0] and len(tries) == 3
            assert all(each.copied and each.computed for each in tries)
            assert not any(each.hits or not each.truthful for each in tries[:2])
            assert not thought.endswith((" no", " yes"))
            gaps[kind].add(abs(candidates(numbers)[tries[2].expression] - target))
    assert gaps["hit"] == {0} and gaps["miss by one"] == {1}
    assert 0 not in gaps["miss"] and len(gaps["miss"]) > 3


def test_the_probability_of_yes_is_told():
    """Of a model that finds every token as likely."""
    model = small_model(task="signs")
    with torch.no_grad():
        model.norm.weight.zero_()
    assert search.verdicts(model, 2, failures=0, seed=0, count=4) == pytest.approx(
        dict.fromkeys(("hit", "miss", "miss by one"), 1 / model.config.vocab_size)
    )


def test_its_numbers_are_plain_as_json_needs():
    """Of each level that is asked."""
    model = small_model(task="signs")
    found = search.examine(model, [2, 3], 4, 2, limit=40, seed=0)
    assert set(json.loads(json.dumps(found))) == {"2", "3"}


def test_the_table_has_a_row_for_each_measure_and_level():
    """A number of one seed stands alone, numbers of several with their range."""
    found = {name: 0.5 for name in search.ROWS}
    found |= {"ends": {"yes": 0.75, "limit": 0.25}, "goes on": {"1": [0.9, 20], "2": [0.8, 19]}}
    planted = {n: {"hit": 1.0, "miss": 0.0, "miss by one": 0.0} for n in ("0", "9")}
    models = ("base", "base that may not give up", "R1-Zero")
    one = {name: {"2": found, "3": found} for name in models}
    one[search.FORCED] = {"2": found, "3": found | {"pass@1": 0.25}}
    one["planted"] = {"base": planted, "R1-Zero": planted}
    results = {"command": "c", "hardware": "h", "torch": "t", "seeds": [{"seed": 3, "search": one}]}
    lines = search.table(results).splitlines()
    counts = len(search.ROWS), len(search.ENDS), len(search.NOES)
    assert len([line for line in lines if "numbers |" in line]) == 2 * (sum(counts) + 1)
    assert "| right, 4 numbers | 50.0 % | 25.0 % | 50.0 % |" in lines
    assert "| margin over it, in points, 4 numbers |  |  | 25.00 |" in lines
    assert "| ends by giving up, 3 numbers | 0.0 % | 0.0 % | 0.0 % |" in lines
    assert "| ends by the limit of tokens, 3 numbers | 25.0 % | 25.0 % | 25.0 % |" in lines
    for index, shown in ("1", "90.0 %"), ("2", "-"), ("3", "-"):  # "-": of fewer than 20
        row = f'goes on after "no" number {index}, 3 numbers'
        assert f"| {row} | {shown} | {shown} | {shown} |" in lines
    assert '| P("yes") after 9 misses and a planted hit | 100.0 % | - | 100.0 % |' in lines


def finished(folder, **settings):
    """The files of a run of these settings that `published` reads."""
    config = asdict(train.Config(**settings).filled())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text('{"stage": "r1_zero", "step": 0, "tries": 1.0}\n')
    (folder / "result.json").write_text(json.dumps({"seed": config["seed"]}))
    (folder / "search.json").write_text("{}")
    return folder


def test_only_seeds_of_one_configuration_are_published(tmp_path):
    """A run comes once, and each with the settings of the first; seeds have their own folders."""
    one, two, again, longer = (
        finished(tmp_path / name, out=name, init=f"{name}.pt", **settings)
        for name, settings in {
            "one": {"seed": 1, "steps": 7},
            "two": {"seed": 2, "steps": 7},
            "again": {"seed": 1, "steps": 7},
            "longer": {"seed": 3, "steps": 8, "lr": 1e-3},
        }.items()
    )
    found = search.published([one, two])
    assert found["command"] == "python train.py --seed SEED --steps 7"
    assert [each["seed"] for each in found["seeds"]] == [1, 2]
    with pytest.raises(ValueError, match="a seed comes twice: give each run once"):
        search.published([one, again])
    with pytest.raises(ValueError, match=r"longer differs from .*one in steps, lr"):
        search.published([one, longer])


def test_every_base_model_of_the_study_can_check():
    """Without true verdicts persistence does not pay: GRPO is then not worth starting."""
    seeds = json.loads((RESULTS / "search.json").read_text())["seeds"]
    assert len(seeds) >= 3
    for each in seeds:
        verdicts = each["search"]["planted"]["base"]["0"]
        assert verdicts["hit"] >= 0.99
        assert verdicts["miss"] <= 0.01 and verdicts["miss by one"] <= 0.01


def test_a_run_is_examined_with_its_own_limit(monkeypatch, tmp_path):
    """Its base, the same where it may not give up, and R1-Zero: each up to the run's limit."""
    config, model = train.Config(max_new_tokens=77).filled(), small_model(task="signs")
    monkeypatch.setattr(search, "finished_run", lambda folder: config)
    monkeypatch.setattr(search, "load_policy", lambda path: model)
    monkeypatch.setattr(search, "verdicts", lambda *args: {})

    def examine(model, levels, *counts, temperature=1.0, limit, seed):
        return type(model).__name__, levels, counts, temperature, limit

    monkeypatch.setattr(search, "examine", examine)
    monkeypatch.setattr(search, "spend", lambda model, *given, **how: (*given, how["limit"]))
    found = search.examine_run(tmp_path, 6, 2)
    kinds = {name: found[name][0] for name in search.MODELS}
    forced = {search.FORCED: "MayNotGiveUp"}
    assert kinds == {"base": "Transformer", **forced, "R1-Zero": "Transformer"}
    for name in kinds:
        assert found[name][1:] == ([2, 3, 4], (6, 2), 1.0, 77)
    assert found["greedy"][1:] == ([2, 3, 4], (6, 1), 0.0, 77)
    assert found["one of k"] == ([2, 3, 4], 6, 77)


def test_what_tokens_buy_is_counted():
    """Right within so many tokens; one of k answers, against the formula of pass@k."""
    hit, miss = (f"<think>{thought}{ENDS}" for thought in (HIT, MISS.replace("4 - 3", "4 + 3")))
    wrong = miss.replace("<answer> 4 - 3 + 6", "<answer> 4 + 3 + 6")
    found = search.describe([MAKE_7], [[(hit, 32), (hit, 100), (wrong, 20), (wrong, 20)]])
    assert found["within"] == {"32": 0.25, "64": 0.25, "128": 0.5, "256": 0.5}


def test_one_of_k_answers_of_the_base_model(monkeypatch):
    """Two problems: of one 4 of 16 answers are right, of the other none."""
    hit = f"<think>{HIT}{ENDS}"
    groups = [[(hit if i < count else "", 10) for i in range(16)] for count in (4, 0)]
    monkeypatch.setattr(search, "held_out_problems", lambda *given: [MAKE_7, MAKE_7])
    monkeypatch.setattr(search, "answer_problems", lambda *given, **how: groups)
    found = search.spend(small_model(task="signs"), [2], 2, limit=40, seed=0)["2"]
    assert found["1"] == (pytest.approx(4 / 32), 10) and found["16"] == (0.5, 160)
    missed = 12 / 16 * 11 / 15
    assert found["2"] == (pytest.approx((1 - missed) / 2), 20)


def test_the_table_of_what_tokens_buy():
    found = {"within": dict.fromkeys(map(str, search.WITHIN), 0.5)}
    one = {name: {"2": found} for name in search.MODELS}
    one |= {"greedy": {"2": {"pass@1": 0.4, "repeats": 0.7}}}
    one |= {"one of k": {"2": {"1": (0.2, 30.0), "2": (0.3, 60.0)}}}
    results = {"command": "c", "hardware": "h", "torch": "t", "seeds": [{"seed": 3, "search": one}]}
    lines = search.compute_table(results).splitlines()
    assert "| right within 64 tokens, 3 numbers | 50.0 % | 50.0 % | 50.0 % |" in lines
    assert "| a right one among 2, 3 numbers | 30.0 %, 60 tokens |  |  |" in lines
    assert "| greedy: tries that repeat one, 3 numbers |  |  | 70.0 % |" in lines


def test_what_the_page_says_of_tokens_holds():
    """In each seed and level; eight answers of the base model come to as much, to a point."""
    seeds = [each["search"] for each in json.loads((RESULTS / "search.json").read_text())["seeds"]]
    tokens = {}
    for level in "234":
        for seed in seeds:
            base, forced, trained = (seed[name][level]["within"] for name in search.MODELS)
            limits = ("64",) if level == "2" else ("64", "128", "256")
            assert all(trained[n] > max(base[n], forced[n]) for n in limits)
        eight, one, greedy, sampled = (
            np.mean([pick(seed) for seed in seeds])
            for pick in (
                lambda seed, level=level: seed["one of k"][level]["8"][0],
                lambda seed, level=level: seed["R1-Zero"][level]["pass@1"],
                lambda seed, level=level: seed["greedy"][level]["repeats"],
                lambda seed, level=level: seed["R1-Zero"][level]["repeats"],
            )
        )
        assert abs(eight - one) < 0.01 and greedy > 0.66 and sampled < 0.4
        many = np.mean([seed["one of k"][level]["8"][1] for seed in seeds])
        few = np.mean([seed["R1-Zero"][level]["tokens"] for seed in seeds])
        tokens[level] = (round(many), round(few))
    assert tokens == {"2": (219, 68), "3": (285, 115), "4": (355, 152)}


@pytest.mark.docs
def test_the_table_of_the_search_is_of_the_results():
    results = json.loads((RESULTS / "search.json").read_text())
    assert len(results["seeds"]) >= 3 and search.table(results) in PROSE
    assert search.compute_table(results) in PROSE


@pytest.mark.docs
def test_the_readmes_sentences_are_of_the_results():
    """The numbers of "What we found" are means over the seeds of search.json and cpu.json."""
    seeds = [each["search"] for each in json.loads((RESULTS / "search.json").read_text())["seeds"]]
    runs = json.loads((RESULTS / "cpu.json").read_text())["runs"]

    def of(model, level, name):
        return 100 * np.mean([seed[model][level][name] for seed in seeds])

    def ends(*keys):
        return [np.mean([at(*keys)(run[model]) for run in runs]) for model in ("base", "r1_zero")]

    forced, trained = (
        [of(model, level, "pass@1") for level in "234"] for model in (search.FORCED, "R1-Zero")
    )
    tokens, tries = ends("completion_tokens"), ends("thinking", "tries")
    most = max(seed["R1-Zero"][level]["most tries"] for seed in seeds for level in "234")
    hit = 100 * np.mean([seed["planted"]["R1-Zero"]["0"]["hit"] for seed in seeds])
    form = [of(model, x, "format") for model in ("R1-Zero", search.FORCED) for x in "34"]
    sloppy = [of(model, "3", "totals right") for model in ("base", "R1-Zero")]
    told = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"{tokens[0]:.0f} -> {tokens[1]:.0f} tokens, {tries[0]:.1f} -> {tries[1]:.1f} tries, "
        f"up to {most} tries",
        f'says "yes" with {hit:.1f} %',
        "right on {:.1f}, {:.1f} and {:.1f} % of".format(*forced),
        "R1-Zero on {:.1f}, {:.1f} and {:.1f} %".format(*trained),
        "({:.0f} and {:.0f} % in the format at 4 and 5 numbers, where the other is cut to "
        "{:.0f} and {:.0f} %)".format(*form),
        "is right in {:.1f} % before GRPO, in {:.1f} % after".format(*sloppy),
        "for {:.0f} tokens against {:.0f}".format(
            np.mean([seed["one of k"]["3"]["8"][1] for seed in seeds]),
            np.mean([seed["R1-Zero"]["3"]["tokens"] for seed in seeds]),
        ),
    ):
        assert sentence in told, sentence
