"""The study: measurements of completions, variations, controls, the plan and its results."""

import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import sample
import train
from data import TASKS, get_tokenizer
from data.batches import padded
from data.problem import sample_problems, stream
from experiments.study import (
    changes,
    collect,
    measure,
    pictures,
    rejection_sampling,
    report,
    study,
    variations,
)
from experiments.watch.plot import read_log
from grpo import token_logps
from kit import flags
from rewards import accuracy_reward, format_reward
from tests.small import CHAINS, PROSE, SHAPE_FLAGS, SMALL, rollout_of, small_model, tokenizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"

CLEAN = "<think>\n#1 7 plus 8 is 15\n#2 15 minus 3 is 12</think><answer> 12</answer>"
CAUGHT = "<think>\n#1 7 plus 8 is 14 wait 15\n#2 15 minus 3 is 12 ok</think><answer> 12</answer>"
BLIND = "<think>\n#1 7 plus 8 is 14 ok\n#2 14 minus 3 is 11 wait 10</think><answer> 10</answer>"
KOREAN = "\n#1 7 더하기 8 은 16 잠깐 15\n#2 15 빼기 3 은 12 맞아\n 답은 12"
GLIB = "<think> easy</think><answer> 12</answer>"
UNTHOUGHT = "<answer> 12</answer>"  # right, and not in the format
WRONG = GLIB.replace("12", "11")
ASKED = CHAINS.ask("7 + 8 - 3")

FEW = ["--pretrain_steps=2", "--prompts=4", "--eval_problems=10", "--eval_samples=8"]
FEW += ["--max_new_tokens=20", *SHAPE_FLAGS]


def refusal(program, arguments, capsys):
    """The one line with which a program refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    return said


# ------------------------------------------------------------------------ what a completion shows


def test_the_style_of_a_completion():
    """A check makes it "checked", else a step makes it "steps", else it is "glib"."""
    checked = dict.fromkeys((CAUGHT, BLIND, KOREAN), "checked")
    styles = {CLEAN: "steps", **checked, **dict.fromkeys((GLIB, " 12.", ""), "glib")}
    assert {text: measure.style_of(text) for text in styles} == styles


def test_the_lenient_reading_wants_no_tags():
    """The lenient answer is the last number, in a tag or not."""
    said = {CLEAN: "12", " it is 12.": "12", " 12 or 13": "13", BLIND: "10", " 112": "112"}
    said |= dict.fromkeys(("", " easy"), None)
    assert {text: measure.last_number(text) for text in said} == said


def test_checks_are_counted():
    """Checked steps are counted as right or wrong, and by what the check says of them."""
    counts = sum((measure.checks(text) for text in (CLEAN, CAUGHT, KOREAN, BLIND)), Counter())
    right = {"right": 3, "right, called wrong": 1}
    assert counts == {**right, "wrong": 3, "wrong, called wrong": 2, "wrong, mended": 2}


def answers_to(*groups):
    return [[(text, len(text)) for text in group] for group in groups]


def test_measures_are_of_the_completions_given():
    """Styles, pass@k, votes and lengths are the numbers worked out by hand."""
    problems = [ASKED, CHAINS.ask("7 + 5")]
    keys = measure.own(problems)
    answers = answers_to([CLEAN, GLIB, " 12", " 11"], [GLIB, GLIB, CLEAN.replace("12<", "13<"), ""])
    styles = measure.by_style(answers, keys)
    assert styles == {
        "glib": {"share": 6 / 8, "right": 4 / 6, "counted": 3 / 4},
        "steps": {"share": 2 / 8, "right": 1 / 2, "counted": 1.0},
    }
    accuracy = sum(style["share"] * style["right"] * style["counted"] for style in styles.values())
    assert accuracy == pytest.approx(4 / 8), "what the accuracy rule gives"
    found = measure.pass_at(problems, answers, keys)
    assert found["2"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0})
    assert measure.votes(problems, answers, 2) == 0.5, "no answer is no vote"
    tail = GLIB + " 13"  # which the accuracy rule counts, though its last number is another
    found = measure.by_style(answers_to([tail]), keys[:1])
    assert found == {"glib": {"share": 1, "right": 1, "counted": 1}}
    found = measure.lengths(problems, answers)
    assert found["2"]["right"] == (len(CLEAN) + len(GLIB)) / 2 and found["2"]["wrong"] == 3
    assert found["1"]["steps"] == len(CLEAN)


# Of level 2 the answers 12, 12 and 3; of level 3 the answers 20, 11 and 2; of level 4 one alone.
KNOWN = [ASKED, CHAINS.ask("4 + 9 - 1"), CHAINS.ask("1 + 1 + 1")]
KNOWN += [CHAINS.ask(text) for text in ("9 + 9 + 1 + 1", "9 + 1 + 1 - 0", "1 + 1 + 1 - 1")]
KNOWN += [CHAINS.ask("1 + 1 + 1 + 1 + 1")]


def saying(*answers):
    return [f"<answer> {answer}</answer>" for answer in answers]


SAID = answers_to(
    *(saying(12, 12, 3, 7), saying(12, 3, 3, 3), saying(12, 12, 12, 3)),
    *(saying(20, 2, 11, 11), saying(2, 11, 7, 7), saying(20, 20, 11, 7)),
    saying(5, 5, 7, 7),
)


def test_chance_is_the_answers_of_all_others():
    """The keys for chance are the level's other answers; a level with one answer has no keys."""
    keys = measure.of_others(KNOWN)
    assert keys[:3] == [["3"], ["3"], ["12", "12"]]
    assert keys[3:] == [["11", "2"], ["20", "2"], ["20", "11"], []]
    found = measure.pass_at(KNOWN, SAID, keys)
    assert found["2"]["1"] == pytest.approx((1 / 4 + 3 / 4 + 3 / 4) / 3)
    one = ((2 + 1) / 2 + (0 + 1) / 2 + (2 + 1) / 2) / 3 / 4  # right by chance, of 4
    two = ((5 / 6 + 1 / 2) / 2 + (0 + 1 / 2) / 2 + (5 / 6 + 1 / 2) / 2) / 3
    assert found["3"] == pytest.approx({"1": one, "2": two, "4": (1 + 1 / 2 + 1) / 3})
    assert found["4"] == {"1": None, "2": None, "4": None}, "unknown, neither 0 nor 1"
    (style,) = measure.by_style(SAID[:3], keys[:3]).values()
    assert style == {"share": 1.0, "right": pytest.approx((1 + 3 + 3) / 12), "counted": 1.0}
    (style,) = measure.by_style(SAID[6:], keys[6:]).values()
    assert style == {"share": 1.0, "right": None, "counted": None}


def test_known_completions_are_described():
    """Numbers of the trained levels, of the next level and of chance do not mix."""
    found = measure.describe(KNOWN, SAID, hardest=2)
    own = [2 + 1 + 1, 1 + 1 + 0, 2]  # right of each level
    assert found["pass@1"] == found["lenient"] == pytest.approx(own[0] / 12)
    ones = {level: curve["1"] for level, curve in found["pass@k"].items()}
    assert ones == pytest.approx({"2": own[0] / 12, "3": own[1] / 12, "4": own[2] / 4})
    chance = {level: curve["1"] for level, curve in found["pass@k by chance"].items()}
    assert chance == {"2": pytest.approx(7 / 12), "3": pytest.approx(7 / 24), "4": None}
    for name, right in (
        ("styles", own[0] / 12),
        ("styles, one operation more", own[1] / 12),
        ("the same by chance", 7 / 24),
    ):
        assert found[name]["glib"]["right"] == pytest.approx(right), name
    assert found["checks"] == {"completions": 12} and set(found["lengths"]) == {"2", "3", "4"}


def test_the_parts_of_a_gain():
    """The parts add up to the gain, and a factor that did not change has the part 0."""

    def glib(share, right):
        return {"glib": {"share": share, "right": right, "counted": 1.0}}

    steps = {"share": 0.2, "right": 0.9, "counted": 0.5}
    base = {"glib": {"share": 0.8, "right": 0.25, "counted": 0.5}, "steps": steps}
    after = {"steps": {"share": 1.0, "right": 0.95, "counted": 1.0}}
    parts = measure.gain_parts(base, after)
    assert sum(parts.values()) == pytest.approx(0.95 - (0.8 * 0.25 + 0.2 * 0.9) * 0.5)
    # What each of two changes adds depends on whether the other came first: both orders count half.
    parts = measure.gain_parts(glib(0.5, 1.0), glib(1.0, 0.5))
    assert parts == pytest.approx({"share": 0.375, "right": -0.375, "counted": 0})
    only = {name: style | {"counted": 1.0} for name, style in base.items()}
    parts = measure.gain_parts(base, only)
    assert parts == pytest.approx({"share": 0, "right": 0, "counted": 0.38 * 0.5})


def test_an_opened_thought():
    """An opening is part of the completion, and its tokens count."""
    problems = [CHAINS.ask("7 + 8"), ASKED]
    config = replace(SMALL, max_new_tokens=9)
    for opening, tokens in (("", 0), ("<think>", 1), ("<think>\n#1", 2)):
        answers = measure.ask(config, small_model(), problems, 3, opening)
        assert [len(group) for group in answers] == [3, 3]
        for text, length in itertools.chain(*answers):
            assert text.startswith(opening) and tokens < length <= 9


def test_noise_is_of_the_problem_and_of_no_model(monkeypatch):
    """Models share their noise, problems do not, and sampling in parts changes no completion."""
    problems, seen = [ASKED] * 4, []
    config = replace(SMALL, max_new_tokens=9)

    def generate(model, prompts, **how):
        seen.append((how["seed"], how["first_row"]))
        return sample.generate(model, prompts, **how)

    monkeypatch.setattr(measure, "generate", generate)
    whole = measure.ask(config, small_model(), problems, 16)
    assert len({text for text, _ in itertools.chain(*whole)}) > 16, "not one noise for all"
    monkeypatch.setattr(measure, "ROWS", 32)
    assert measure.ask(config, small_model(), problems, 16) == whole
    measure.ask(config, small_model(1), problems, 16)
    (seed, _), *parts = seen
    assert parts == [(seed, 0), (seed, 32)] * 2
    measure.ask(replace(config, seed=1), small_model(), problems, 16)
    assert seen[-1][0] != seed


def test_forced_checks():
    """Forced checks are the model's probabilities of the next words."""
    model = small_model()
    found = measure.forced_checks(SMALL, model, [ASKED])
    ids = {word: tokenizer.encode(f" {word}")[0] for word in ("ok", "wait", "12")}
    begun = ASKED.prompt + "<think>\n#1 7 plus 8 is 15 ok\n#2 15 minus 3 is "

    def after(text):
        with torch.no_grad():
            return model(torch.tensor([tokenizer.encode(text, tags=True)]))[0, -1].softmax(-1)

    def is_mean_of(name, values):
        assert found[name] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)

    for kind, saids in (("right", [12]), ("wrong", [10, 11, 13, 14])):
        probabilities = [after(f"{begun}{said}") for said in saids]
        checked = [p[ids["ok"]] + p[ids["wait"]] for p in probabilities]
        is_mean_of(f"{kind}, checked", checked)
        called = [p[ids["wait"]] / c for p, c in zip(probabilities, checked)]
        is_mean_of(f"{kind}, called wrong", called)
    is_mean_of("mended", [after(f"{begun}{said} wait")[ids["12"]] for said in (10, 11, 13, 14)])


# ------------------------------------------------------------------------------------- variations


def test_mean_only_takes_the_mean_away():
    """The variation changes the advantage alone: not the reward, not the sampling."""
    how = variations.mean_only(SMALL)
    advantages = how.pop("advantage")(SMALL, {"reward": torch.tensor([2.0, 0, 0, 0])}, None)
    assert advantages.tolist() == [1.5, -0.5, -0.5, -0.5] and not how


def signal_in(share):
    """A rule that rewards every second completion in a share of the groups, and none elsewhere."""

    def rule(problems, rollout, step):
        numbers = (sum(map(ord, problem.prompt)) for problem in problems)
        chosen = [stream(0, "test", number).random() < share for number in numbers]
        G = len(rollout.tokens) // len(problems)
        points = [float(chosen[row // G] and row % 2) for row in range(len(rollout.tokens))]
        return {"reward": torch.tensor(points)}

    return rule


@pytest.mark.parametrize(
    ("share", "rounds"), [(1.0, 1), (0.4, None), (0.0, variations.MOST_ROUNDS)]
)
def test_dynamic_sampling_fills_a_rollout(share, rounds):
    """All groups have a signal if enough of them are found, and rows keep their rewards."""
    config, model = replace(SMALL, prompts=8, max_level=5), small_model()
    problems, rollout, spent = variations.refilled(config, model, 3, signal_in(share))
    assert len(problems) == 8 and len(rollout.tokens) == 32
    assert spent == rounds if rounds else 1 < spent < variations.MOST_ROUNDS
    groups = signal_in(share)(problems, rollout, 3)["reward"].view(8, 4)
    assert ((groups != groups[:, :1]).any(dim=1) == (share > 0)).all()
    logps = token_logps(model(rollout.tokens), rollout.tokens) * rollout.mask
    torch.testing.assert_close(logps.detach(), rollout.logps, rtol=0, atol=1e-5)
    for row, tokens in enumerate(rollout.tokens.tolist()):
        prompt = tokenizer.encode(problems[row // 4].prompt)
        assert tokens[: len(prompt)] == prompt
    assert len({problem.prompt for problem in problems}) > 1


def test_where_steps_are_paid_for():
    """Steps earn in the right format, or only with a right answer, on top of the run's rules."""
    bare, astray = CLEAN.removeprefix("<think>"), CLEAN.replace("12<", "13<")
    problems, texts = [ASKED], [CLEAN, astray, bare, GLIB]
    rollout = rollout_of(problems, texts)
    for name, weights, steps, rewards in (
        ("paid_by_step", "accuracy=1,format=1", [1, 1, 0, 0], [3, 2, 0, 2]),
        ("paid_by_right_step", "accuracy=1,format=1", [1, 0, 0, 0], [3, 1, 0, 2]),
        ("paid_by_step", "accuracy=1", [1, 1, 0, 0], [2, 1, 0, 1]),
    ):
        config = replace(SMALL, rewards=weights)
        found = variations.VARIATIONS[name](config)["reward"](problems, rollout, 0)
        assert found["steps"].tolist() == steps and found["reward"].tolist() == rewards


def test_a_variation_runs_logs_and_tells_how_to_go_on(tmp_path, capsys):
    """A variation resumes by its own name alone, and only with the code that it began with."""
    run, resume = tmp_path / "run", ["--resume", str(tmp_path / "run")]
    asked = ["dynamic_sampling", "--preset=tiny", *FEW, "--steps=2", "--out", str(run)]
    variations.main(asked)
    rounds = [record["rounds"] for record in read_log(run)]
    assert rounds == [variations.MOST_ROUNDS] * 2, "nothing that it says is ever right"
    (run / "result.json").unlink()
    for program, first in ((train.main, []), (variations.main, ["paid_by_step"])):
        made = "-m experiments.study.variations dynamic_sampling made it, and must go on with it"
        assert made in refusal(program, [*first, *resume], capsys)
    kept = run / "experiments" / "study" / "variations.py"
    code = kept.read_bytes()
    kept.write_bytes(code + b"#")
    said = refusal(variations.main, ["dynamic_sampling", *resume], capsys)
    assert "experiments/study/variations.py is not the" in said
    kept.write_bytes(code)
    variations.main(["dynamic_sampling", *resume])
    assert (run / "result.json").exists()
    said = refusal(variations.main, ["dynamic"], capsys)
    assert "name one of mean_only, positives_alone, " in said
    graphs = ["--device=cuda", "--cuda_graphs", "--out", str(tmp_path / "other")]
    config = flags.parse(train.Config, train.PRESETS, ["--preset=tiny", *graphs], "", "train.py")
    with pytest.raises(ValueError, match="samples without --cuda_graphs"):
        variations.dynamic_sampling(config)


# ----------------------------------------------------------------------------- rejection sampling


def test_rejection_sampling_keeps_what_earns_all():
    """A kept row earns both rules, and nothing follows its end token."""
    problems, said = [ASKED, CHAINS.ask("7 + 5")], [CLEAN, GLIB, WRONG, UNTHOUGHT, " 12"] * 2
    rows, kept = rejection_sampling.split(problems, rollout_of(problems, said))
    earned = [(accuracy_reward(text, "12"), format_reward(text)) for text in said]
    assert set(earned) == {(1, 1), (1, 0), (0, 1), (0, 0)}, "each rule alone is not enough"
    assert kept == [row for row, points in zip(rows, earned) if points == (1, 1)]
    assert len(kept) == 4
    for i, (text, (start, tokens)) in enumerate(zip(said, rows)):
        prompt, completion = tokens[:start], tokens[start:]
        assert prompt == tokenizer.encode(problems[i // 5].prompt)
        assert completion == [*tokenizer.encode(text, tags=True), tokenizer.eos_id]


def test_rejection_sampling_spends_what_it_sampled(monkeypatch):
    """It trains on as many tokens as it sampled, and makes what it kept likelier."""
    config = replace(SMALL, steps=4, pretrain_tokens=100)
    model, trained, steps = small_model(), [], []

    def sample(config, model, step, said=(CLEAN, *[WRONG] * 15)):
        steps.append(step)
        return [ASKED], rollout_of([ASKED], said)

    def seen(batch, pad_id):
        trained.append(sum(len(tokens) for _, tokens in batch))
        return padded(batch, pad_id)

    rows, ((start, best),) = rejection_sampling.split(*sample(config, model, 0))
    steps.clear()

    def likelihood():
        with torch.no_grad():
            return token_logps(model(torch.tensor([best])), torch.tensor([best]))[0, start:].sum()

    monkeypatch.setattr(rejection_sampling, "padded", seen)
    before = likelihood()
    found = rejection_sampling.rejection_sampling(config, model, 2, 1e-2, sample)
    assert steps == [0, 1, 2, 3]
    sampled = 4 * sum(len(tokens) for _, tokens in rows)
    assert found == {"tokens": sampled, "kept": [1 / 16] * 2}
    beyond = sum(trained) - sampled
    assert 0 <= beyond <= 2 * (100 + len(best)), "the last batch of a round may go beyond"
    assert likelihood() > before + 5

    def useless(config, model, step):
        return sample(config, model, step, [WRONG] * 16)

    with pytest.raises(ValueError, match="round 1 has no completion to keep"):
        rejection_sampling.rejection_sampling(config, model, 2, 1e-2, useless)


# -------------------------------------------------------------------------------------- the study


def job(folder, name, code, *needs):
    made = folder / name
    return study.Job(folder, name, lambda: ["-c", code, str(made)], made, needs, 1.0)


WRITE = "import sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text(str(time.time()))"


def test_jobs_are_done_after_what_they_need(tmp_path, capsys):
    """A job starts after the jobs that it needs, and is not done twice."""
    first = job(tmp_path, "first", "import time; time.sleep(0.2); " + WRITE)
    second, third = job(tmp_path, "second", WRITE, first), job(tmp_path, "third", WRITE, first)

    def times():
        return [float(each.makes.read_text()) for each in (first, second, third)]

    study.do([third, second, first], lanes=2)
    one, two, three = times()
    assert one < min(two, three)
    second.makes.unlink()
    study.do([third, second, first], lanes=1)
    again = times()
    assert again[0] == one and again[1] > two and again[2] == three


def test_a_job_that_fails_is_named(tmp_path):
    """The study ends with the name of the job and of the file that says why."""
    bad = job(tmp_path, "bad", "import sys; sys.exit('no luck')")
    with pytest.raises(SystemExit, match=r"bad failed: .*bad\.txt says why"):
        study.do([bad, job(tmp_path, "after", WRITE, bad)], lanes=2)
    assert (tmp_path / "bad.txt").read_text() == "no luck\n"
    assert not (tmp_path / "after").exists()
    with pytest.raises(SystemExit, match="idle failed"):
        study.do([job(tmp_path, "idle", "pass")], lanes=1)


def test_a_stopped_study_stops_its_jobs(tmp_path):
    """Stopping the study stops its processes, which save first; it says how to go on."""
    code = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1] + '.saved').write_text('')
    sys.exit()
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1] + '.begun').write_text('')
time.sleep(60)
"""

    def stop():
        while not (tmp_path / "long.begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    started, before = time.time(), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="stopped: the same command goes on"):
            study.do([job(tmp_path, "long", code)], lanes=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "long.saved").exists() and time.time() - started < 30


def test_each_run_of_the_plan_can_be_made(tmp_path):
    """Its program exists and takes its flags, its table takes it, and it resumes when stopped."""
    jobs = study.phenomena(tmp_path, 1)
    jobs += study.levers(tmp_path / "more", jobs[0])
    assert len({each.makes for each in jobs}) == len(jobs)
    for each in jobs:
        program, *rest = each.command()
        if program == "-m":
            module, *rest = rest
            program = module.replace(".", "/") + ".py"
        assert (ROOT / program).exists()
        if program == "experiments/study/variations.py":
            vary = variations.VARIATIONS[rest.pop(0)]
        elif program == "train.py":
            vary = None
        else:  # a measurement of the first run
            assert each.needs == (jobs[0],) and rest[0] == str(jobs[0].makes.parent)
            continue
        bases = {Path(flag).parent for flag in rest if flag.endswith("base.pt")}
        assert {need.makes.parent for need in each.needs} == bases
        config = flags.parse(train.Config, train.PRESETS, rest, "", "train.py")
        assert Path(config.out) / "result.json" == each.makes
        if vary:
            assert set(vary(config)) <= {"reward", "sample", "advantage"}
        completions = config.eval_problems * config.eval_samples
        assert report.evaluated(each.name) == completions, "what its shares are of"
        Path(config.out).mkdir(parents=True)
        (Path(config.out) / "last.pt").touch()
        assert each.command()[-2:] == ["--resume", config.out]
        # The table of a run, and the columns in which it stands.
        tables = {"language": ("language", [0, 1]), "language_reward": ("language", [0, 2])}
        if each.name in tables:
            name, columns = tables[each.name]
            settings = {"program": program, **asdict(config)}
            (Path(config.out) / "config.json").write_text(json.dumps(settings))
            each.makes.write_text('{"base": 1, "r1_zero": 1}')
            run = collect.read_run(Path(config.out), collect.TABLES[name])
            picks = collect.TABLES[name].columns.values()
            assert [i for i, pick in enumerate(picks) if pick(run)] == columns


# ------------------------------------------------------------------------------- tables, pictures


def results_of(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.docs
@pytest.mark.parametrize("name", report.TABLES)
def test_the_readmes_tables_of_the_study(name):
    """The pages have the tables of experiments/results."""
    assert report.TABLES[name](results_of(name)) in PROSE


def test_the_results_are_of_the_plan():
    """The flags in the results are the flags that the plan and the recipes have today."""
    for name, part, plan in (
        ("levers", "levers", study.LEVERS),
        ("hacked", "rewards", study.HACKED),
    ):
        found = {each["name"]: each for each in results_of(name)[part]}
        assert list(found) == list(plan)
        for label, lever in plan.items():
            assert vars(lever).items() <= found[label].items()
    assert {run["name"]: run["flags"] for run in results_of("changes")["runs"]} == changes.RUNS


def test_every_seed_of_the_study_ends_above_90_percent():
    seeds = results_of("phenomena")["seeds"]
    assert len(seeds) >= 3
    assert min(seed["r1_zero"]["pass@1"] for seed in seeds) > 0.9


@pytest.mark.docs
def test_the_readmes_pictures_are_drawn_from_the_results(tmp_path):
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pictures.main([str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {f"{name}.png" for name in pictures.PICTURES}
    for name in drawn:
        assert name in PROSE
        shown, expected = (Image.open(folder / name).text for folder in (RESULTS, tmp_path))
        assert shown["Description"] == expected["Description"], f"{name}: draw it anew"


def test_a_pictures_lines_are_the_numbers_of_the_results():
    """Two seeds of two steps, the means worked out by hand; a step that one seed lacks has none."""
    log = [
        [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}],
        [{"step": 1, "reward": 1.5}, {"step": 2, "reward": 1.5}, {"step": 3, "reward": 9.0}],
    ]
    figure = Figure()
    axis = figure.subplots()
    pictures.draw_spread(axis, log, "reward", [0.0, 0.5], label="GRPO")
    assert axis.lines[0].get_xydata().tolist() == [[0, 0.25], [1, 1.0], [2, 1.25]]
    (band,) = axis.collections
    edges = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert edges == {(0, 0), (0, 0.5), (1, 0.5), (1, 1.5), (2, 1.0), (2, 1.5)}
    before = pictures.shown_in(figure)
    axis.lines[0].set_ydata([0.25, 1.0, 1.26])
    assert pictures.shown_in(figure) != before


def test_a_generated_block_is_written_anew(tmp_path):
    """Only the text between its comments changes; a page without the comments stays as it is."""
    page = tmp_path / "page.md"
    text = "one\n<!-- a: made by x -->\n{}<!-- end -->\ntwo\n<!-- b: made by x -->\n<!-- end -->\n"
    page.write_text(text.format("old\n"))
    collect.write_into_page("a: made by x", "| new |", [page])
    assert page.read_text() == text.format("| new |\n")
    with pytest.raises(SystemExit, match="has lost the comments"):
        collect.write_into_page("c: made by x", "| new |", [page])
    assert page.read_text() == text.format("| new |\n")


def test_collect_refuses_a_run_of_other_settings(tmp_path):
    """It refuses a folder without a run too. The rules with a weight decide a run's column."""
    with pytest.raises(SystemExit, match="not the folder of a finished run"):
        collect.main(["cpu", str(tmp_path)])
    (tmp_path / "result.json").write_text('{"seed": 0}')
    table = collect.TABLES["language"]
    for program, change, fits in (
        ("train.py", {"seed": 7, "rewards": "accuracy=2"}, True),
        ("train.py", {"lr": 1.0}, False),
        ("-m experiments.study.variations mean_only", {"rewards": "accuracy=2"}, False),
    ):
        settings = asdict(replace(table.settings, **change).filled())
        (tmp_path / "config.json").write_text(json.dumps({"program": program, **settings}))
        if fits:
            assert collect.read_run(tmp_path, table)["settings"] == {"rewards": "accuracy=2"}
            continue
        with pytest.raises(SystemExit, match=r"its config.json differs"):
            collect.read_run(tmp_path, table)
    pick = collect.after("accuracy=1,format=1")
    for rewards, own in (
        ("accuracy=1,format=1,language=0", True),
        ("accuracy=1,format=1,language=1", False),
        ("accuracy=1", False),
    ):
        run = {"r1_zero": "found", "settings": {"rewards": rewards}}
        assert pick(run) == ("found" if own else None)


def test_a_summary_of_a_change_is_of_its_log(tmp_path):
    """Means over all steps, over the first and last ten, and around step 20."""
    lines = [
        {"stage": "r1_zero", "step": i, "accuracy": i / 8} | ({"cut": 1.0} if i > 20 else {})
        for i in range(1, 41)
    ]
    folder = tmp_path / "k1"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base, ended = {"pass@1": 0.25}, {"pass@1": 0.5, "completion_tokens": 27.0}
    (folder / "result.json").write_text(json.dumps({"base": base, "r1_zero": ended}))
    found = changes.summary(folder)
    assert found["flags"] == "--beta 0.05 --kl k1" and found["pass@1"] == 0.5
    assert found["first 10"] == {"accuracy": 5.5 / 8}
    assert found["last 10"] == {"accuracy": 35.5 / 8, "cut": 1.0}
    assert found["all steps"]["cut"] == 1.0, "over the lines that have it"
    assert found["after 20"] == 20.5 / 8


def test_the_least_k_from_which_the_base_is_ahead():
    """The base stays ahead from this k on, by more than the noise of the problems."""
    base = {"1": 0.5, "2": 0.1, "4": 0.6, "16": 0.6}
    r1_zero = {"1": 0.2, "2": 0.2, "4": 0.3, "16": 0.5}
    models = {"base": {"pass@k": {"3": base}}, "r1_zero": {"pass@k": {"3": r1_zero}}}
    seed = {"base": {"by_level": {"2": 0.5}}, "measured": models | {"problems": 40}}
    assert report.crossing(1)(seed) == float("inf"), "ten points of 40 problems are no lead"
    models["problems"] = seed["measured"]["problems"] = 1000
    assert report.crossing(1)(seed) == 4, "it was ahead at 1 too, but not to stay"


def test_a_share_is_clear_above_twice_its_error():
    """The error is binomial, and differences and factors propagate it."""
    share = report.share_of
    assert share(0.5, 98).variance == pytest.approx(0.25 / 98)
    assert share(1.0, 98).variance == pytest.approx(0.99 * 0.01 / 98), "0 or 1 is not certain"
    gap = share(0.5, 98) - share(0.25, 98) * 2
    assert gap.value == 0.0
    assert gap.variance == pytest.approx(share(0.5, 98).variance + 4 * share(0.25, 98).variance)
    error = gap.variance**0.5
    assert report.Share(2.01 * error, gap.variance).clear
    assert not report.Share(1.99 * error, gap.variance).clear
    assert not report.Share(-3 * error, gap.variance).clear
    for n, clear in ((100, False), (1000, True)):
        assert (share(0.5, n) - share(0.4, n)).clear == clear


def test_a_gain_on_hard_problems_needs_a_margin():
    """Two points more at the hardest level are noise, four are not; levels go by number."""
    row = next(row for row in report.ROWS if row.what.startswith("hard problems"))

    def seen(hard):
        base = {"10": 0.1815, "2": 0.219, "3": 0.2, "4": 0.2}
        r1_zero = {"10": hard, "2": 0.993, "3": 0.2, "4": 0.2}
        return row.seen({"base": {"by_level": base}, "r1_zero": {"by_level": r1_zero}})

    assert [seen(0.9765), seen(0.996)] == [False, True]


def test_a_slope_is_tokens_for_an_operation_more():
    """The fit takes the trained levels alone, not the levels beyond."""
    found = {str(level): {"all": 5 + 6 * level} for level in (2, 3, 5)} | {"6": {"all": 0}}
    levels = {"by_level": {"2": 0, "3": 0, "5": 0}}
    seed = {"base": levels, "measured": {"r1_zero": {"lengths": found}}}
    assert report.slope("r1_zero")(seed) == pytest.approx(6)


def test_a_spread_is_mean_and_range():
    """A spread formats as percent, as a number, or as a range of whole numbers."""
    spread = report.Spread
    assert f"{spread([0.25, 0.5]):%}" == "37.5 % (25.0-50.0)"
    assert f"{spread([0.5, 0.5]):%}" == "50.0 %"
    assert f"{spread([1.25]):.1f}" == "1.2"
    assert f"{spread([16, 4]):d}" == "4-16" and f"{spread([4, 4]):d}" == "4"
    assert f"{spread([4, float('inf')]):d}" == "4-never"
    assert f"{spread([1.0, None]):%}" == "-"


def one_seed():
    """A seed as from study.phenomena_of that shows every row of the table, with two trained
    levels."""
    checks = {"right": 40, "right, called wrong": 4}
    checks |= {"wrong": 8, "wrong, called wrong": 6, "wrong, mended": 3}
    common = {
        "pass@1": 0.2,
        "lenient": 0.375,
        "opened": {"<think>": 0.4, "<think>\n#1": 0.625},
        "pass@k by chance": {"4": {"16": 0.5}},
        "styles, one operation more": {"glib": {"right": 0.2}, "steps": {"right": 0.08}},
        "the same by chance": {"glib": {"right": 0.05}, "steps": {"right": 0.08}},
        "checks": checks,
        "forced checks": {"right, called wrong": 0.125, "wrong, called wrong": 0.25},
    }
    base = common | {
        "votes": {"16": 0.5},
        "pass@k": {"3": {"1": 0.125, "16": 0.5}, "4": {"1": 0.1, "16": 0.75}},
        "styles": {
            "steps": {"share": 0.25, "right": 0.8, "counted": 0.5},
            "checked": {"share": 0.1},
        },
        "lengths": {"2": {"all": 8, "steps": 24}, "3": {"all": 9, "steps": 27}},
    }
    r1_zero = common | {
        "votes": {"16": 1.0},
        "pass@k": {"3": {"1": 0.875, "16": 0.2}, "4": {"1": 0.2, "16": 0.25}},
        "styles": {"steps": {"share": 0.75, "right": 0.95}, "checked": {"share": 0.2}},
        "lengths": {"2": {"all": 18, "steps": 54}, "3": {"all": 24, "steps": 72}},
    }
    gain = {"share": 0.375, "right": 0.125, "counted": 0.125}
    measured = {"problems": 40, "samples": 256}

    def evaluation(accuracy, levels, tokens):
        korean = {"by_language": {"ko": 0.5}, "thinking": {"ko_thinks_in_en": 0.625}}
        ended = {"pass@1": accuracy, "greedy": accuracy, "completion_tokens": tokens}
        return {**ended, "by_level": levels, **korean}

    run = {
        "base": evaluation(0.1875, {"2": 0.25, "3": 0.125}, 10.0),
        "r1_zero": evaluation(0.8125, {"2": 0.75, "3": 0.875}, 30.0),
        "log": [
            {"step": i, "entropy": 1 / (1 + i), "no_signal": i / 20, "wrong_tokens": 20.0 + i}
            | ({"base_kl": i / 400} if i % 10 == 0 else {})
            for i in range(1, 21)
        ],
    }
    in_korean = {"by_language": {"ko": 0.25}, "thinking": {"ko_thinks_in_en": 0.0}}
    controls = {"longer": 0.25, "rejection sampling": 0.5, "online rejection sampling": 0.75}
    tokens = {"GRPO": 1.5e6, "longer": 1.25e6}
    tokens |= {"rejection sampling": 1e6, "online rejection sampling": 1.75e6}
    seed = {
        "seed": 0,
        **run,
        **{"dr_grpo": run, "language": run},
        "language_reward": run | {"r1_zero": run["r1_zero"] | in_korean},
        "tokens": tokens,
        **{name: {"pass@1": accuracy} for name, accuracy in controls.items()},
        "measured": {**measured, "base": base, "r1_zero": r1_zero, "gain": gain},
    }
    return json.loads(json.dumps(seed))  # so that no two parts of it are one


EXPECTED = """\
18.8 % -> 81.2 %; greedy 18.8 % -> 81.2 % | \
the base read leniently, tags or no tags: 37.5 %; its thought opened for it, up to `#1`: 62.5 %
50.0 % -> 100.0 % | pass@1 of the same completions: 20.0 % -> 20.0 %
level 2: 25.0 % -> 75.0 %; level 3: 12.5 % -> 87.5 % | \
level 4, beyond the trained ones: 10.0 % -> 20.0 %
81.2 %, for 1.50 million tokens sampled and read | \
pretraining, 1.25 million more: 25.0 %; rejection sampling, 1.00: 50.0 %; \
the same online, 1.75: 75.0 %
of 62.5 points: better style 37.5, right more often in a style 12.5, \
tags around right answers 12.5 | \
completions in steps: 25.0 % -> 75.0 %; right among these: 80.0 % -> 95.0 %
KL(R1-Zero, base) of a completion: 1.50 nats, compared with the least by which all could be right: \
1.61 (-ln of the base's share of right completions) | \
the least by which all could be right and in steps: 2.30
level 3, the hardest trained one, k = 16: base 50.0 %, R1-Zero 20.0 % | \
the base is ahead from k on: 16
level 4, k = 16: base 75.0 % (by chance 50.0 %), R1-Zero 25.0 % (by chance 50.0 %) | \
right of the base's direct answers: 20.0 % (by chance 5.0 %); \
of its steps: 8.0 % (by chance 8.0 %)
10.0 -> 30.0 tokens | \
Dr. GRPO's loss, which favours no length: 30.0; wrong answers at the end: 39.5, by Dr. GRPO's 39.5
1.0 -> 6.0 tokens for each operation more | within thoughts in steps alone the base has 3.0
10.0 % -> 20.0 % of the completions check a step | \
base: calls 75.0 % of its wrong steps wrong (mends 50.0 % of these), 10.0 % of its right ones; \
of given 25.0 %, 12.5 %
Korean questions thought through in English: 62.5 % -> 62.5 % | with the language reward: 0.0 %
right answers to Korean questions: 25.0 % with it | without: 50.0 %
0.417 -> 0.049 nats a token | \
groups without signal: 7.5 % -> 97.5 %; KL to the base at the end: 0.050 nats a token
"""


def cells_of(seed):
    results = {"seeds": [seed], "spread": "1 seed", "command": "c", "hardware": "h", "torch": "t"}
    lines = report.phenomena_table(results | {"made_at": "abc"}).splitlines()
    assert lines[-1] == "`c`, 1 seed: mean (lowest-highest). h, torch t. Made at abc."
    assert report.phenomena_table(results).endswith(". h, torch t.")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]


def test_each_row_of_the_phenomena_says_the_numbers_of_the_seeds():
    rows = cells_of(one_seed())
    assert [f"{here} | {against}" for _, _, here, against, _ in rows] == EXPECTED.splitlines()
    assert [seen for *_, seen in rows] == ["1 of 1"] * len(report.ROWS)


LATE = [{"entropy": 1.0, "no_signal": 0.5, "base_kl": 0.05, "wrong_tokens": 1.0}]
FAR = [{"entropy": x, "no_signal": 0.5, "base_kl": 0.07, "wrong_tokens": 1.0} for x in (1.0, 0.1)]


@pytest.mark.parametrize(
    ("what", "path", "value"),
    [
        ("right answers", ("measured", "base", "opened", "<think>\n#1"), 0.8),
        ("right answers", ("measured", "base", "lenient"), 0.81),
        ("the majority", ("measured", "r1_zero", "votes", "16"), 0.25),
        ("hard problems", ("r1_zero", "by_level", "2"), 0.98),
        ("GRPO is worth", ("online rejection sampling", "pass@1"), 0.805),
        ("GRPO is worth", ("longer", "pass@1"), 0.8),
        ("more than half of the gain", ("measured", "gain", "counted"), 0.4),
        ("it goes no further", ("log",), FAR),
        ("it goes no further", ("measured", "base", "pass@1"), 0.24),
        ("pass@k", ("measured", "r1_zero", "pass@k", "3", "16"), 0.4),
        ("beyond what", ("measured", "base", "pass@k by chance", "4", "16"), 0.6),
        ("beyond what", ("measured", "base", "pass@k by chance", "4", "16"), None),
        ("beyond what", ("measured", "r1_zero", "pass@k", "4", "16"), 0.6),
        ("completions grow", ("dr_grpo", "r1_zero", "completion_tokens"), 12.0),
        ("harder problems", ("measured", "r1_zero", "lengths", "3", "all"), 19),
        ("self-checks", ("measured", "r1_zero", "styles", "checked", "share"), 0.155),
        ("the language of", ("language", "r1_zero", "thinking", "ko_thinks_in_en"), 0.52),
        ("the language reward", ("language_reward", "r1_zero", "by_language", "ko"), 0.48),
        ("entropy", ("log",), LATE),
    ],
)
def test_a_row_is_not_seen_in_a_seed_without_it(what, path, value):
    seed = one_seed()
    *way, last = path
    collect.at(*way)(seed)[last] = value
    for name, *_, seen in cells_of(seed):
        assert seen == ("0 of 1" if name.startswith(what) else "1 of 1"), name


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """A study's folder with copies of one very small run and of its measurements. Accuracy beyond
    the trained levels is set to a tenth of the level: so small a model has nothing right."""
    folder = tmp_path_factory.mktemp("study")
    first, rewards = folder / "seed0" / "main", "--rewards=accuracy=1,format=1,language=0"
    asked = ["--task=chains-en-ko", "--steps=3", "--eval_every=1", "--group_size=8", rewards]
    train.main(["--preset=cpu", *FEW, *asked, "--out", str(first)])
    result = json.loads((first / "result.json").read_text())
    for evaluation in (result["base"], result["r1_zero"]):
        evaluation["beyond"] = {level: int(level) / 10 for level in evaluation["beyond"]}
    (first / "result.json").write_text(json.dumps(result))
    measure.main([str(first), "--problems=2", "--samples=16"])
    (first / "measured_2x16.json").rename(first / "measured.json")
    for rounds in (1, 80):
        evaluation = json.loads((first / "result.json").read_text())["base"]
        written = {"tokens": 1000 * rounds, "kept": [0.5], "model": evaluation}
        (first / f"rejection_sampling_{rounds}.json").write_text(json.dumps(written))
    jobs = study.phenomena(folder / "seed0", 0)
    for each in (*jobs, *study.levers(folder / "levers", jobs[0])):
        if not each.makes.exists():
            shutil.copytree(first, each.makes.parent)
        if each.name == "dynamic":  # whose log tells of two rollouts a step
            path = each.makes.parent / "log.jsonl"
            path.write_text(path.read_text().replace("{", '{"rounds": 2.0, '))
    return folder


def test_the_study_collects_what_its_runs_left(small_study, tmp_path, monkeypatch, capsys):
    """The study collects, tabulates and draws the results of its runs."""
    monkeypatch.setattr(study, "SEEDS", 1)
    study.write_results(small_study, tmp_path, quick=False)
    log = read_log(small_study / "seed0/main")
    (seed,) = json.loads((tmp_path / "phenomena.json").read_text())["seeds"]
    assert [record["step"] for record in seed["log"]] == [1, 2, 3]
    assert seed["log"][2]["base_kl"] == pytest.approx(log[2]["base_kl"], rel=1e-3)
    prompts = [  # of all steps, as levels and languages take turns
        len(get_tokenizer("chains-en-ko").encode(problem.prompt))
        for step in range(3)
        for problem in sample_problems(
            stream(0, "problems", step), TASKS["chains-en-ko"], range(1, 6), 4, first=4 * step
        )
    ]
    tokens = 8 * sum(prompts) + 32 * sum(record["completion_tokens"] for record in log)
    assert seed["tokens"]["GRPO"] == pytest.approx(tokens, abs=1)
    assert seed["tokens"]["online rejection sampling"] == 80_000

    levers = json.loads((tmp_path / "levers.json").read_text())["levers"]
    assert [lever["name"] for lever in levers] == list(study.LEVERS)
    for each in levers[0]["seeds"]:
        assert each["beyond"] == 0.6, "the level after the trained ones, which are 1 to 5"
        assert each["completions"] == 3 * 32
        assert each["base_kl"] == pytest.approx(log[-1]["base_kl"], rel=1e-3)
    for each in levers[list(study.LEVERS).index("dynamic")]["seeds"]:
        assert each["completions"] == 2 * 3 * 32 and each["silent"] is None
    rewards = json.loads((tmp_path / "hacked.json").read_text())["rewards"]
    assert [lever["name"] for lever in rewards] == list(study.HACKED)
    ends = [log[0]["reward"], log[-1]["reward"]]
    assert rewards[0]["seeds"][0]["reward"] == pytest.approx(ends, abs=1e-3)

    report.main(tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    heads = 3 * 2  # and the lines under them
    assert len(rows) == len(report.ROWS) + len(study.LEVERS) + len(study.HACKED) + heads
    pictures.main([str(tmp_path)])
    others = {"search", "value", "pushed"}  # of other studies
    assert {path.stem for path in tmp_path.glob("*.png")} == set(pictures.PICTURES) - others


def test_measure_gives_both_models_the_same_noise(small_study, tmp_path):
    """Equal models get equal numbers. Level 1 is left out, as no problem of it is held out."""
    run = tmp_path / "run"
    shutil.copytree(small_study / "seed0/main", run)
    shutil.copy(run / "base.pt", run / "r1_zero.pt")
    measure.main([str(run), "--problems=1", "--samples=16"])
    found = json.loads((run / "measured_1x16.json").read_text())
    assert found["base"] == found["r1_zero"]
    assert list(found["base"]["lengths"]) == [str(level) for level in range(2, 10)]
    assert set(found["gain"].values()) == {0.0}


def test_commands_refuse_in_one_line(small_study, capsys):
    """Arguments that rejection_sampling.py and measure.py cannot use, and folders without a run."""
    run = str(small_study / "seed0/main")
    for program, arguments, complaint in (
        (rejection_sampling.main, [run], "has no completion to keep"),
        (rejection_sampling.main, [run, "--rounds=9"], "from 1 to the 3 steps of the run"),
        (rejection_sampling.main, [str(small_study)], "not the folder of a run that has ended"),
        (measure.main, [str(small_study)], "not the folder of a run that has ended"),
        (measure.main, [run, "--samples=4"], "--samples at least 16"),
    ):
        assert complaint in refusal(program, arguments, capsys)
