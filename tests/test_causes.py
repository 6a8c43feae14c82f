"""The study of what makes thoughts grow: other documents, other rewards, the blind searcher."""

import copy
import json
import random
import re
from dataclasses import replace

import pytest
import torch

import train
from data import TASKS
from data.signs import Signs, candidates, parts_of
from experiments.study import causes, corpora, variations
from kit import flags
from tests.small import SMALL, rollout_of

SIGNS = TASKS["signs"]
MAKE_7 = SIGNS.ask((4, 3, 6), 7)  # one of six candidates hits
MISS, HIT = "\n 7 : 4 - 3 = 1 * 6 = 6 no", "\n 7 : 4 - 3 = 1 + 6 = 7 yes"
SAID = f"<think>{MISS}{HIT}</think><answer> 4 - 3 + 6</answer>"


# ---------------------------------------------------------------------------------- the documents


@pytest.mark.parametrize(
    ("task", "first"),
    [("signs-end", "4 - 3 = 1 * 6 = 6 : 7 no"), ("signs-bare", "4 - 3 = 1 * 6 = 6 no")],
)
def test_a_thought_in_another_form_is_read_as_the_same(task, first):
    """Forth and back, and so its measures are those of signs. What was cut is read so too."""
    other = TASKS[task]
    text = corpora.rewritten(SAID, corpora.AT_HEAD, other.form)
    assert f"\n {first}\n" in text
    assert other.tries(MAKE_7, text) == SIGNS.tries(MAKE_7, SAID)
    assert other.measures(MAKE_7, text) == SIGNS.measures(MAKE_7, SAID)
    cut = text[: text.index(" yes")]
    assert len(other.tries(MAKE_7, cut)) == 1
    assert not SIGNS.tries(MAKE_7, text)[0].expression, "in the form of signs it is no try"


def test_documents_differ_in_their_form_alone():
    """The same problems, tries and answers; "signs-bare" never says the target in a thought."""
    for seed in range(200):
        plain, end, bare = (
            TASKS[name].document(random.Random(seed), [2, 3])
            for name in ("signs", "signs-end", "signs-bare")
        )
        assert plain.question == end.question == bare.question
        if plain.style == "search":
            problem = SIGNS.parse(plain.question[6:].partition("\n")[0])
            for task, document in (("signs-end", end), ("signs-bare", bare)):
                assert TASKS[task].tries(problem, document.text) == SIGNS.tries(problem, plain.text)
            assert ":" not in bare.text
        else:
            assert plain.text == end.text == bare.text


def test_shuffled_verdicts_know_nothing():
    """ "yes" is as frequent behind a hit as behind a miss, over all levels together, and behind
    equal numbers of a table as behind others. It ends a thought; few answers are right."""
    said, equal, ends, right = {True: [], False: []}, {True: [], False: []}, [], []
    for seed in range(8000):
        document = TASKS["signs-shuffled"].document(random.Random(seed), [1, 2, 3, 4])
        for one, other, verdict in re.findall(r" (\d+) : (\d+) (yes|no)[,.]", document.text):
            equal[one == other].append(verdict == "yes")
        if document.style == "search":
            problem = SIGNS.parse(document.question[6:].partition("\n")[0])
            tries = SIGNS.tries(problem, document.text)
            assert all(each.copied and each.computed for each in tries)
            assert all(each.verdict == "no" for each in tries[:-1])
            ends.append((len(tries), tries[-1].verdict))
            right.append(tries[-1].hits)
            for each in tries:
                said[each.hits].append(each.verdict == "yes")
    for shares, expected in ((said, 0.2), (equal, 0.5)):
        for values in shares.values():
            assert sum(values) / len(values) == pytest.approx(expected, abs=0.04)
    assert any(count < 3 and verdict == "no" for count, verdict in ends), "nobody gives up"
    assert sum(right) / len(right) < 0.3


# ------------------------------------------------------------------------- advantages and rewards


@pytest.mark.parametrize(("name", "weight"), [("positives_alone", 0), ("negatives_lighter", 0.4)])
def test_negative_advantages_weigh_less(name, weight):
    config, rewards = replace(SMALL, group_size=4), {"reward": torch.tensor([2.0, 1, 1, 0] * 2)}
    own = train.outcome_advantages(config, rewards, None)
    found = variations.VARIATIONS[name](config)["advantage"](config, rewards, None)
    assert (own < 0).any() and (own > 0).any()
    torch.testing.assert_close(found, own.clamp(min=0) + weight * own.clamp(max=0))


@pytest.mark.parametrize(
    ("name", "paid"), [("paid_by_no", [0.5, 1.0, 0.0]), ("paid_by_right_no", [0.5, 0.0, 0.0])]
)
def test_a_no_that_a_try_follows_is_paid_for(name, paid):
    """In the right format, or with the right answer alone. A thought was cut: it has no format."""
    wrong = "</think><answer> 4 + 3 + 6</answer>"
    texts = [SAID, f"<think>{MISS}{MISS}{HIT}{wrong}", f"<think>{MISS}{MISS}"]
    rollout = rollout_of([MAKE_7], texts)
    config = replace(SMALL, task="signs", group_size=3)
    found = variations.VARIATIONS[name](config)["reward"]([MAKE_7], rollout, 0)
    assert found["noes"].tolist() == paid
    assert found["reward"].tolist() == [2 + paid[0], 1 + paid[1], 0]


def test_a_completion_is_counted_where_it_had_a_choice():
    """The last "no" of a thought that was cut was no choice to give up or to go on."""
    ends = "</think><answer> 4 - 3 * 6</answer>"
    for text, tries, noes, gave_up in (
        (SAID, 2, 1, 0),
        (f"<think>{MISS}{MISS}{ends}", 2, 2, 1),
        (f"<think>{MISS}{MISS}", 2, 1, 0),
        (f"<think>{MISS}\n 7 : 4", 1, 1, 0),
    ):
        found = variations.counted(MAKE_7, text)
        assert (found["tries"], found["noes"], found["gave_up"]) == (tries, noes, gave_up), text
        assert found["no_try"] == 0
    assert variations.counted(MAKE_7, "<think> easy</think><answer> no")["noes"] == 0
    assert variations.counted(MAKE_7, "<think> easy</think>")["no_try"] == 1
    record = {"asked_3": 0.5, "right_3": 0.25, "no_try_3": 0.1, "tries_3": 1.0}
    told = variations.told_of(record | {"noes_3": 0.8, "gave_up_3": 0.2}, 3)
    assert told == {"right": 0.5, "no_try": 0.2, "tries": 2.0, "gives_up": 0.25}


# ------------------------------------------------------------------------------- the blind searcher


@pytest.mark.parametrize(("gives_up", "no_try"), [(0.0, 0.0), (0.3, 0.2), (1.0, 0.0)])
def test_the_blind_searcher_is_what_blind_tries_come_to(gives_up, no_try):
    """Against 20,000 thoughts that were rolled with dice."""
    wrong, most, rng = {"hit": 0.2, "miss": 0.1}, 4, random.Random(0)
    problems = [MAKE_7, SIGNS.ask((2, 5), 7), SIGNS.ask((1, 1, 2, 3), 4)]
    right = tries = 0
    for i in range(20_000):
        problem = problems[i % len(problems)]
        numbers, target = parts_of(problem)
        values = list(candidates(numbers).values())
        if rng.random() < no_try:
            right += rng.choice(values) == target
            continue
        for _ in range(most):
            hit = rng.choice(values) == target
            yes = rng.random() < (1 - wrong["hit"] if hit else wrong["miss"])
            tries += 1
            if yes or rng.random() < gives_up:
                right += hit
                break
    found = causes.expected(problems, gives_up, no_try, wrong, most)
    assert found["right"] == pytest.approx(right / 20_000, abs=0.015)
    assert found["tries"] == pytest.approx(tries / 20_000, rel=0.03)


def test_as_many_tries_are_expected_as_fit_into_a_completion():
    config = train.Config(task="signs").filled()
    tokenizer = train.get_tokenizer("signs")
    for level in (2, 3):
        most, tried = causes.most_tries(config, level), " + ".join(["1"] * (level + 1))
        for count, fits in ((most, True), (most + 1, False)):
            text = causes.line(level + 1, tried) * count
            document = causes.written(SIGNS.ask((1,) * (level + 1), level + 1), text, tried, "")
            tokens = len(tokenizer.encode(document.text, tags=True)) + 1
            assert (tokens <= config.max_new_tokens) == fits


# --------------------------------------------------------------------------------------- the study


def test_each_run_of_a_cause_can_be_made(tmp_path):
    """Its flags are train.py's, it starts from the base model of its task, and all are read."""
    assert float(causes.PLAIN) == train.Config().lr
    for name in causes.CAUSES:
        cause = causes.CAUSES[name]
        *_, base, _, run, read = jobs = causes.jobs(tmp_path, 1, name, causes.PLAIN)
        assert read.needs == (run,)
        if name == "rejection":
            assert [need.name for need in run.needs] == [f"as_it_is_{causes.PLAIN}"]
            continue
        _, module, variation, *asked = run.command()
        assert module == "experiments.study.variations" and variation in variations.VARIATIONS
        config = flags.parse(train.Config, train.PRESETS, asked, "", "causes")
        assert config.task == cause.task and isinstance(TASKS[config.task], Signs)
        assert config.init == str(base.makes.parent / "base.pt") and config.lr == 6e-4
        assert config.levels[-1] == 3 and run.needs == (base,)
        assert len(causes.once(jobs + jobs)) == len(jobs)


def result_of(seed):
    """Results of a seed as `results_of` has them, with numbers that can be told apart."""
    measures = dict.fromkeys(("pass@1", "verdicts true", "format"), 0.5)
    measures |= {"tries": 5.0, "lift": 1.2, "tokens": 60.0}
    ends = {"entropy": 0.2, "no_signal": 0.25, "base_kl": 0.1, "reward": 1.0, "accuracy": 0.5}
    log = [{"step": 1, **ends}, {"step": 30, **ends, "reward": 2.0}]
    row = {"levels": {str(level): dict(measures) for level in causes.LEVELS}, "log": log}
    found = {"seed": seed}
    for name, cause in causes.CAUSES.items():
        found[name] = copy.deepcopy(row)
        if cause.task != "signs":
            found[f"base_{name}"] = {"levels": copy.deepcopy(row["levels"])}
    found["rejection"]["log"] = []
    found["base"] = {"levels": copy.deepcopy(row["levels"])}
    found["base"]["levels"]["3"]["tries"] = 1.0 + seed
    found["base"]["levels"]["1"]["pass@1"] = 0.6
    found["no_twos"]["levels"]["1"]["pass@1"] = 0.1
    for name in causes.HACKED:
        found[name]["diagnose"] = ["length"] if name == "paid_by_no" and seed else []
    line = {"level": 3, "steps": [1, 2], "right": 0.4, "tries": 2.0, "no_try": 0.1}
    line |= {"gives_up": 0.3, "blind right": 0.35, "blind tries": 2.5}
    found["as_it_is"]["model"] = [line]
    return found


def results_of_two():
    described = {
        name: {"label": x.label, "flags": x.flags, "rate": "6e-4", "searched": {}}
        for name, x in causes.CAUSES.items()
    }
    described["lighter"]["searched"] = {"3e-4": 0.7, "6e-4": 0.8}
    made = {"command": "c", "hardware": "h", "torch": "t", "seeds": [result_of(0), result_of(1)]}
    return made | {"causes": described}


def test_the_tables_tell_the_numbers_of_the_runs():
    tables = {name: table(results_of_two()) for name, table in causes.TABLES.items()}
    row = "5.00 (5.00 to 5.00) | 1.20 (1.20 to 1.20)"
    assert (
        f"| G = 4 `--group_size 4 --prompts 64` | 6e-4 | {'50.0 % (50.0-50.0) | ' * 4}{row} |"
        in (tables["causes"])
    )
    assert "| base model | - |" in tables["causes"] and "1.50 (1.00 to 2.00)" in tables["causes"]
    assert "| verdicts by chance: its base model | - |" in tables["causes"]
    assert "| negative advantages times 0.4 | 3e-4: 70.0 % | 6e-4: 80.0 % |" in tables["rates"]
    assert tables["signals"].count("\n| ") == len(causes.CAUSES) and "| G = 4" in tables["signals"]
    model = "30.0 % (30.0-30.0) | 10.0 % (10.0-10.0) | 40.0 % (40.0-40.0) | 35.0 % (35.0-35.0)"
    assert f"| 4 numbers, steps 1 to 2 | {model} | 2.00" in tables["model"]
    hacked = "| half a point for each try more | 1.00 (1.00 to 1.00) -> 2.00 (2.00 to 2.00)"
    assert hacked in tables["hacked no"] and "| length (1) |" in tables["hacked no"]


def test_a_claim_is_seen_where_its_margin_is_kept():
    """More tries than the base model by more than one; a claim of less wants less by more."""
    claims = {claim.text: claim for claim in causes.CLAIMS}
    grow, lost = claims["thoughts grow: tries over four numbers"], causes.CLAIMS[8]
    seed = result_of(0)
    assert grow.seen(seed) and lost.seen(seed)
    seed["base"]["levels"]["3"]["tries"] = 4.0
    seed["no_twos"]["levels"]["1"]["pass@1"] = 0.58
    assert not grow.seen(seed) and not lost.seen(seed)
    shown = causes.claims_table(results_of_two())
    assert (
        "| thoughts grow: tries over four numbers | 5.00 (5.00 to 5.00) | its base model: " in shown
    )
    assert shown.count(" of 2 |") == len(causes.CLAIMS)


FLIPS = {  # for each claim the level, the measure, and two models' numbers that show it
    0: ("3", "tries", {"as_it_is": 3.0, "base": 1.9}),
    1: ("3", "tries", {"bare": 1.0, "as_it_is": 2.1}),
    2: ("3", "tries", {"shuffled": 1.0, "as_it_is": 2.1}),
    3: ("3", "tries", {"positives": 1.0, "as_it_is": 2.1}),
    4: ("3", "lift", {"positives": 1.3, "as_it_is": 1.1}),
    5: ("3", "tries", {"end": 3.0, "base_end": 1.9}),
    6: ("3", "lift", {"end": 1.0, "as_it_is": 1.2}),
    7: ("3", "pass@1", {"as_it_is": 0.6, "rejection": 0.5}),
    8: ("1", "pass@1", {"no_twos": 0.1, "base": 0.6}),
    9: ("4", "pass@1", {"as_it_is": 0.4, "base": 0.1}),
    10: ("3", "pass@1", {"paid_by_no": 0.2, "as_it_is": 0.7}),
}


@pytest.mark.parametrize("index", range(len(causes.CLAIMS)))
def test_each_claim_compares_what_its_text_names(index):
    """Seen with these numbers, not with the two exchanged, and not with no number."""
    level, name, models = FLIPS[index]
    (one, x), (other, y) = models.items()
    for a, b, seen in ((x, y, True), (y, x, False), (None, y, False)):
        seed = result_of(0)
        seed[one]["levels"][level][name], seed[other]["levels"][level][name] = a, b
        assert causes.CLAIMS[index].seen(seed) == seen


def test_runs_are_read_and_told_as_they_were(tmp_path, monkeypatch):
    """Two steps of a small model: the blind searcher meets the problems of the run, levels are told
    apart, and the base model and the trained one are measured, two numbers included."""
    monkeypatch.setattr(causes, "PROBLEMS", 3)
    monkeypatch.setattr(causes, "WINDOWS", ((1, 1), (2, 2)))
    small = ["--n_layer=1", "--d_model=16", "--n_head=2", "--n_kv_head=1", "--d_ff=16"]
    small += ["--pretrain_steps=2", "--steps=2", "--prompts=8", "--group_size=2"]
    small += ["--max_new_tokens=12", "--eval_problems=8", "--device=cpu", "--seed=3"]
    base, run = (causes.base_of(tmp_path, "signs", 3).makes.parent, tmp_path / "as_it_is_6e-4")
    variations.main(["told", *small, "--out", str(base)])
    shorter = [*small, "--max_level=3", f"--init={base / 'base.pt'}"]
    variations.main(["told", *shorter, "--out", str(run)])
    for folder in (base, run):
        causes.main(["--read", str(folder)])
    of_base, of_run = (json.loads((x / "described.json").read_text()) for x in (base, run))
    assert list(of_base["levels"]) == list(of_run["levels"]) == ["1", "2", "3", "4"]
    assert "planted" in of_base and "planted" not in of_run

    config, log = causes.finished_run(run), causes.read_log(run)
    for step, record in enumerate(log):
        problems, _ = train.sample(config, causes.load_policy(run / "base.pt"), step)
        assert problems == causes.problems_of(config, step)
        for level in config.levels:
            share = sum(problem.level == level for problem in problems) / len(problems)
            assert record[f"asked_{level}"] == pytest.approx(share)
        assert sum(record[f"right_{x}"] for x in config.levels) == pytest.approx(record["accuracy"])
    found = causes.run_of(tmp_path, "as_it_is", "6e-4")
    assert found["levels"] == of_run["levels"] and found["diagnose"] is not None
    wrong = {"hit": 1 - of_base["planted"]["hit"], "miss": of_base["planted"]["miss"]}
    line, told = found["model"][2], causes.told_of(log[0], 3)
    asked = [x for x in causes.problems_of(config, 0) if x.level == 3]
    most = causes.most_tries(config, 3)
    blind = causes.expected(asked, told["gives_up"], told["no_try"], wrong, most)
    assert line["level"] == 3 and line["steps"] == [1, 1]
    assert line["blind right"] == pytest.approx(blind["right"])


def test_the_rate_that_is_right_most_often_is_chosen(tmp_path):
    """By three and four numbers alone."""
    for rate, shares in {"3e-4": (0.9, 0.5, 0.5), "6e-4": (0.1, 0.7, 0.6)}.items():
        folder = tmp_path / f"as_it_is_{rate}"
        folder.mkdir()
        levels = {str(i): {"pass@1": x} for i, x in enumerate(shares, 1)}
        (folder / "described.json").write_text(json.dumps({"levels": levels}))
    other = json.loads((tmp_path / "as_it_is_3e-4" / "described.json").read_text())
    (tmp_path / "as_it_is_1.2e-3").mkdir()
    (tmp_path / "as_it_is_1.2e-3" / "described.json").write_text(json.dumps(other))
    rate, found = causes.chosen(tmp_path, "as_it_is")
    assert rate == "6e-4" and found["6e-4"] == pytest.approx(0.65)
