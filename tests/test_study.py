"""What experiments/study.py does: the plan and its order, what is measured of completions, variations and controls."""

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

import train
from data.arithmetic import write_problem
from experiments import collect, measure, plot, rejection_sampling, report, study, variations
from grpo import VARIANTS, group_advantages, loss_normalizer, token_logps
from rewards import accuracy_reward, format_reward
from sample import decode_completions
from tests.small import SMALL, small_model, tokenizer, unsaved

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"

CLEAN = "<think>\n#1 7 plus 8 is 15\n#2 15 minus 3 is 12</think><answer> 12</answer>"
CAUGHT = "<think>\n#1 7 plus 8 is 14 wait 15\n#2 15 minus 3 is 12 ok</think><answer> 12</answer>"
BLIND = "<think>\n#1 7 plus 8 is 14 ok\n#2 14 minus 3 is 11 wait 10</think><answer> 10</answer>"
KOREAN = "\n#1 7 더하기 8 은 16 잠깐 15\n#2 15 빼기 3 은 12 맞아\n 답은 12"
GLIB = "<think> easy</think><answer> 12</answer>"


# ------------------------------------------------------------------------------------- what a completion shows


def test_the_style_of_a_completion_is_told_by_its_steps_and_checks():
    styles = {
        CLEAN: "steps",
        CAUGHT: "checked",
        BLIND: "checked",
        KOREAN: "checked",
        GLIB: "glib",
        " 12.": "glib",
        "": "glib",
    }
    assert {text: measure.style_of(text) for text in styles} == styles


def test_the_lenient_reading_wants_no_tags():
    for text, right in (
        (CLEAN, True),
        (" it is 12.", True),
        (" 12 or 13", False),
        ("", False),
        (BLIND, False),
        (" 112", False),
    ):
        assert measure.says(text, "12") == right, text


def test_checks_count_right_and_wrong_steps_and_what_became_of_them():
    counts = sum((measure.checks(text) for text in (CLEAN, CAUGHT, KOREAN, BLIND)), Counter())
    assert counts == {
        "right": 3, "right, called wrong": 1,
        "wrong": 3, "wrong, called wrong": 2, "wrong, mended": 2,
    }  # fmt: skip


def answers_to(*groups):
    return [[(text, len(text)) for text in group] for group in groups]


def test_styles_lengths_votes_and_pass_at_k_are_of_the_completions_given():
    problems = [write_problem("7 + 8 - 3"), write_problem("7 + 5")]
    answers = answers_to([CLEAN, GLIB, " 12", " 11"], [GLIB, GLIB, CLEAN.replace("12<", "13<"), ""])
    styles = measure.by_style(problems, answers)
    assert styles == {
        "glib": {"share": 6 / 8, "right": 4 / 6, "counted": 3 / 4},
        "steps": {"share": 2 / 8, "right": 1 / 2, "counted": 1.0},
    }
    accuracy = sum(style["share"] * style["right"] * style["counted"] for style in styles.values())
    assert accuracy == pytest.approx(4 / 8), "what the accuracy rule gives"
    assert measure.pass_at(problems, answers)["2"] == {"1": 0.5, "2": pytest.approx(5 / 6), "4": 1.0}
    assert measure.votes(problems, answers, 2) == 0.5, "no answer is no vote"
    more = [*problems, write_problem("8 + 5 - 1"), write_problem("1 + 1 + 1"), write_problem("7 + 4")]
    assert [problem.answer for problem in measure.of_others(more)] == ["3", "11", "3", "12", "12"]
    assert [problem.answer for problem in measure.of_others(problems)] == [None, None], "one problem a level"
    tail = GLIB + " 13"  # which the accuracy rule counts, though its last number is another
    assert measure.by_style(problems[:1], answers_to([tail])) == {"glib": {"share": 1, "right": 1, "counted": 1}}
    found = measure.lengths(problems, answers)
    assert found["2"]["right"] == (len(CLEAN) + len(GLIB)) / 2 and found["2"]["wrong"] == 3
    assert found["1"]["steps"] == len(CLEAN)


def test_the_parts_of_a_gain_add_up_to_it_and_are_where_the_change_was():
    base = {
        "glib": {"share": 0.8, "right": 0.25, "counted": 0.5},
        "steps": {"share": 0.2, "right": 0.9, "counted": 0.5},
    }
    after = {"steps": {"share": 1.0, "right": 0.95, "counted": 1.0}}
    parts = measure.gain_parts(base, after)
    assert sum(parts.values()) == pytest.approx(0.95 - (0.8 * 0.25 + 0.2 * 0.9) * 0.5)
    # Of one style: what each change adds depends on whether the other has come before, and both orders count half.
    one, other = (
        {"glib": {"share": 0.5, "right": 1.0, "counted": 1.0}},
        {"glib": {"share": 1.0, "right": 0.5, "counted": 1.0}},
    )
    assert measure.gain_parts(one, other) == pytest.approx({"share": 0.375, "right": -0.375, "counted": 0})
    only = {name: dict(values) for name, values in base.items()}
    for style in only.values():
        style["counted"] = 1.0
    assert measure.gain_parts(base, only) == pytest.approx({"share": 0, "right": 0, "counted": 0.38 * 0.5})


def test_an_opened_thought_is_part_of_the_completion_and_costs_its_tokens():
    problems = [write_problem("7 + 8"), write_problem("7 + 8 - 3")]
    config = replace(SMALL, max_new_tokens=9)
    for opening, tokens in (("", 0), ("<think>", 1), ("<think>\n#1", 2)):
        answers = measure.ask(config, small_model(), tokenizer, problems, 3, opening)
        assert [len(group) for group in answers] == [3, 3]
        for text, length in itertools.chain(*answers):
            assert text.startswith(opening) and tokens < length <= 9


def test_forced_checks_are_the_models_probabilities_of_the_words_that_follow():
    model, problem = small_model(), write_problem("7 + 8 - 3")
    found = measure.forced_checks(SMALL, model, tokenizer, [problem])
    ids = {word: tokenizer.encode(f" {word}")[0] for word in ("ok", "wait", "12")}
    begun = problem.prompt + "<think>\n#1 7 plus 8 is 15 ok\n#2 15 minus 3 is "

    def after(text):
        with torch.no_grad():
            return model(torch.tensor([tokenizer.encode(text, tags=True)]))[0, -1].softmax(-1)

    for kind, saids in (("right", [12]), ("wrong", [10, 11, 13, 14])):
        probabilities = [after(f"{begun}{said}") for said in saids]
        checked = [p[ids["ok"]] + p[ids["wait"]] for p in probabilities]
        assert found[f"{kind}, checked"] == pytest.approx(torch.stack(checked).mean().item(), rel=1e-4)
        called = [p[ids["wait"]] / c for p, c in zip(probabilities, checked)]
        assert found[f"{kind}, called wrong"] == pytest.approx(torch.stack(called).mean().item(), rel=1e-4)
    mended = [after(f"{begun}{said} wait")[ids["12"]] for said in (10, 11, 13, 14)]
    assert found["mended"] == pytest.approx(torch.stack(mended).mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ variations


@pytest.fixture
def restored(monkeypatch):
    """What a variation changes is put back."""
    monkeypatch.setattr(train, "sample_rollout", train.sample_rollout)
    monkeypatch.setattr(train, "score", train.score)
    monkeypatch.setitem(VARIANTS, "mean_only", None)


def test_mean_only_takes_the_mean_away_and_changes_nothing_else(restored):
    variations.mean_only()
    row, grpo = VARIANTS["mean_only"], VARIANTS["grpo"]
    assert replace(row, scale=grpo.scale, source=grpo.source) == grpo
    rewards = torch.tensor([2.0, 0, 0, 0])
    assert group_advantages(rewards, 4, row.scale).tolist() == [1.5, -0.5, -0.5, -0.5]
    assert loss_normalizer(torch.ones(4, 3, dtype=torch.bool), "mean_only") == 4


def signal_in(share):
    """A rule that is content with a share of the groups by halves, and with no completion of the others."""

    def rule(config, problems, completions):
        chance = [train.stream(0, "test", sum(map(ord, problem.prompt))).random() < share for problem in problems]
        values = [float(chance[i // config.group_size] and i % 2) for i in range(len(completions))]
        return {"reward": torch.tensor(values), "accuracy": torch.tensor(values)}

    return rule


@pytest.mark.parametrize(("share", "rounds"), [(1.0, 1), (0.4, None), (0.0, variations.MOST_ROUNDS)])
def test_dynamic_sampling_fills_a_rollout_with_groups_that_have_a_signal(share, rounds, restored, monkeypatch):
    monkeypatch.setattr(train, "score", signal_in(share))
    config = replace(SMALL, prompts=8, max_level=5)
    run, _ = unsaved(config, "grpo")
    problems, rollout, rewards = variations.refilled_rollout(config, run, tokenizer, 3, None)
    assert len(problems) == 8 and len(rollout.tokens) == len(rewards["reward"]) == 32
    spent = rewards["rounds"].unique().tolist()
    assert spent == [rounds] if rounds else 1 < spent[0] < variations.MOST_ROUNDS
    groups = rewards["reward"].view(8, 4)
    assert ((groups != groups[:, :1]).any(dim=1) == (share > 0)).all()
    expected = train.score(config, problems, decode_completions(rollout, tokenizer))
    assert rewards["reward"].tolist() == expected["reward"].tolist(), "each reward still stands beside its completion"
    logps = token_logps(run.model(rollout.tokens), rollout.tokens) * rollout.mask
    torch.testing.assert_close(logps.detach(), rollout.logps, rtol=0, atol=1e-5)
    for row, tokens in enumerate(rollout.tokens.tolist()):
        prompt = tokenizer.encode(problems[row // 4].prompt)
        assert tokens[: len(prompt)] == prompt
    assert len({problem.prompt for problem in problems}) > 1


def test_steps_are_paid_for_in_any_right_format_or_only_where_the_answer_is_right(restored):
    wrong, bare = CLEAN.replace("12<", "13<"), CLEAN.removeprefix("<think>")
    problems = [write_problem("7 + 8 - 3")]
    config = replace(SMALL, group_size=4)
    texts = [CLEAN, wrong, bare, GLIB]
    variations.paid_by_step()
    rewards = train.score(config, problems, texts)
    assert rewards["steps"].tolist() == [1, 1, 0, 0]
    assert rewards["reward"].tolist() == [3, 2, 0, 2]
    variations.paid_by_right_step()
    assert train.score(config, problems, texts)["reward"].tolist() == [3, 1, 0, 2]


def test_a_variation_runs_logs_and_tells_how_to_go_on(restored, tmp_path, capsys):
    shape = ["--n_layer=1", "--n_head=2", "--n_kv_head=1", "--d_model=16", "--d_ff=24"]
    few = [
        "--pretrain_steps=2",
        "--steps=2",
        "--prompts=4",
        "--eval_problems=8",
        "--eval_samples=8",
        "--max_new_tokens=20",
    ]
    variations.main(["dynamic_sampling", "--preset=tiny", *shape, *few, "--out", str(tmp_path / "run")])
    log = plot.read_log(tmp_path / "run")
    assert [record["rounds"] for record in log] == [variations.MOST_ROUNDS] * 2, "nothing that it says is ever right"
    (tmp_path / "run" / "result.json").unlink()
    for program in (train.main, lambda flags: variations.main(["paid_by_step", *flags])):
        with pytest.raises(SystemExit):
            program(["--resume", str(tmp_path / "run")])
        said = capsys.readouterr().err
        assert "was made by experiments/variations.py dynamic_sampling, which must go on with it" in said
    variations.main(["dynamic_sampling", "--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "result.json").exists()
    with pytest.raises(SystemExit, match="name one of mean_only, dynamic_sampling"):
        variations.main(["dynamic"])


# ------------------------------------------------------------------------------------------------ rejection sampling


def test_rejection_sampling_keeps_what_all_rules_are_content_with(monkeypatch):
    said = [CLEAN, GLIB, GLIB.replace("12", "11"), " 12"] * 4
    monkeypatch.setattr(rejection_sampling, "decode_completions", lambda *args: said)
    monkeypatch.setattr(rejection_sampling, "sample_problems", lambda *args, **kwargs: [write_problem("7 + 8 - 3")] * 4)
    rows, content = rejection_sampling.sampled_rows(SMALL, small_model(), tokenizer, 0)
    assert content == [format_reward(text) == accuracy_reward(text, "12") == 1 for text in said]
    assert content.count(True) == 8
    prompt = tokenizer.encode(write_problem("7 + 8 - 3").prompt)
    for start, tokens in rows:
        assert start == len(prompt) and tokens[:start] == prompt and start < len(tokens) <= start + SMALL.max_new_tokens
        assert tokenizer.eos_id not in tokens[:-1], "nothing after the end"


def test_rejection_sampling_trains_on_as_many_tokens_as_it_sampled_and_makes_what_it_kept_likelier(monkeypatch):
    config = replace(SMALL, steps=4, pretrain_tokens=100)
    model, trained = small_model(), []
    kept_tokens = tokenizer.encode(write_problem("7 + 8 - 3").prompt), tokenizer.encode(CLEAN, tags=True)
    row = (len(kept_tokens[0]), [*kept_tokens[0], *kept_tokens[1], tokenizer.eos_id])
    steps = []

    def sampled(config, model, tokenizer, step):
        steps.append(step)
        return [row] * 16, [True] + [False] * 15

    def seen(batch, pad_id):
        trained.append(sum(len(tokens) for _, tokens in batch))
        return train.padded(batch, pad_id)

    def likelihood():
        with torch.no_grad():
            return token_logps(model(torch.tensor([row[1]])), torch.tensor([row[1]]))[0, row[0] :].sum().item()

    monkeypatch.setattr(rejection_sampling, "sampled_rows", sampled)
    monkeypatch.setattr(rejection_sampling, "padded", seen)
    before = likelihood()
    found = rejection_sampling.rejection_sampling(config, model, tokenizer, rounds=2, lr=1e-2)
    assert steps == [0, 1, 2, 3]
    assert found == {"tokens": 64 * len(row[1]), "kept": [1 / 16] * 2}
    assert 0 <= sum(trained) - found["tokens"] <= 2 * (100 + len(row[1])), "the last batch of a round may go beyond"
    assert likelihood() > before + 5

    monkeypatch.setattr(rejection_sampling, "sampled_rows", lambda *args: ([row] * 16, [False] * 16))
    with pytest.raises(ValueError, match="round 1 has no completion to keep"):
        rejection_sampling.rejection_sampling(config, model, tokenizer, rounds=2, lr=1e-2)


# -------------------------------------------------------------------------------------------------------- the study


def job(folder, name, code, *needs):
    return study.Job(folder, name, lambda: ["-c", code, str(folder / name)], folder / name, needs, 1.0)


WRITE = "import sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text(str(time.time()))"


def test_jobs_are_done_after_what_they_need_and_only_once(tmp_path, capsys):
    first = job(tmp_path, "first", "import time; time.sleep(0.2); " + WRITE)
    second, third = job(tmp_path, "second", WRITE, first), job(tmp_path, "third", WRITE, first)
    study.do([third, second, first], lanes=2)
    times = {each.name: each.makes.read_text() for each in (first, second, third)}
    assert float(times["first"]) < min(float(times["second"]), float(times["third"]))
    second.makes.unlink()
    study.do([third, second, first], lanes=1)
    again = {each.name: each.makes.read_text() for each in (first, second, third)}
    assert again["first"] == times["first"] and again["third"] == times["third"] and again["second"] > times["second"]


def test_a_job_that_fails_is_named_with_the_file_that_says_why(tmp_path):
    bad = job(tmp_path, "bad", "import sys; sys.exit('no luck')")
    with pytest.raises(SystemExit, match=r"bad failed: .*bad\.txt says why"):
        study.do([bad, job(tmp_path, "after", WRITE, bad)], lanes=2)
    assert (tmp_path / "bad.txt").read_text() == "no luck\n"
    assert not (tmp_path / "after").exists()
    with pytest.raises(SystemExit, match="idle failed"):
        study.do([job(tmp_path, "idle", "pass")], lanes=1)


def test_a_stopped_study_stops_its_jobs_and_says_so(tmp_path):
    """A process that saves when it is told to stop, as train.py does."""
    code = "import signal, sys, time, pathlib\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path(sys.argv[1] + '.saved').write_text('')))\n"
    code += "pathlib.Path(sys.argv[1] + '.begun').write_text('')\ntime.sleep(60)"

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


@pytest.mark.parametrize("preset", study.PLANS)
def test_each_run_of_the_plan_has_flags_that_train_takes_and_goes_on_where_it_was_stopped(preset, tmp_path, restored):
    variations.mean_only()
    jobs = study.phenomena(tmp_path, preset, 1)
    jobs += study.levers(tmp_path / "more", preset, jobs[0])
    assert len({each.makes for each in jobs}) == len(jobs)
    for each in jobs:
        script, *rest = each.command()
        assert (ROOT / script).exists()
        assert {need.makes.parent for need in each.needs} == {
            Path(flag).parent for flag in rest if flag.endswith("base.pt")
        } or script not in ("train.py", "experiments/variations.py")
        if script not in ("train.py", "experiments/variations.py"):
            continue
        if script != "train.py":
            assert rest.pop(0) in variations.VARIATIONS
        config, _ = train.parse_config(rest)
        table = {"main": "cpu", "language": "language", "language_reward": "language"}.get(each.name)
        if table and preset == "cpu":
            folder = tmp_path / "of the readme" / each.name
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(asdict(config)))
            (folder / "result.json").write_text("{}")
            collect.read_run(folder, collect.TABLES[table])  # which wants a run of just these settings
        assert Path(config.out) / "result.json" == each.makes
        Path(config.out).mkdir(parents=True)
        (Path(config.out) / "last.pt").touch()
        assert each.command()[-2:] == ["--resume", config.out]


def results_of(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", report.TABLES)
def test_the_readmes_tables_of_the_study_are_those_of_the_results(name):
    assert report.TABLES[name](results_of(name)) in (ROOT / "README.md").read_text()


def test_every_seed_of_the_study_ends_above_90_percent():
    seeds = results_of("phenomena")["seeds"]
    assert len(seeds) >= 3
    assert min(seed["r1_zero"]["pass@1"] for seed in seeds) > 0.9


def test_the_readmes_pictures_are_drawn_from_the_results(tmp_path, monkeypatch):
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    plot.main([])
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {f"{name}.png" for name in plot.PICTURES}
    for name in pictures:
        assert f"experiments/results/{name}" in (ROOT / "README.md").read_text()
        assert (RESULTS / name).read_bytes().startswith(b"\x89PNG")


def test_the_base_is_ahead_from_the_least_k_from_which_on_it_is():
    base, r1_zero = {"1": 0.25, "2": 0.1, "4": 0.5, "8": 0.6}, {"1": 0.2, "2": 0.2, "4": 0.3, "8": 0.595}
    models = {"base": {"pass@k": {"3": base}}, "r1_zero": {"pass@k": {"3": r1_zero}}}
    seed = {"base": {"by_level": {"2": 0.5}}, "measured": models}
    assert report.crossing(1)(seed) == float("inf"), "half a point is no lead"
    r1_zero["8"] = 0.5
    assert report.crossing(1)(seed) == 4, "it was ahead at 1 too, but not to stay"


def test_a_slope_is_the_tokens_that_an_operation_more_adds():
    found = {str(level): {"all": 5 + 6 * level} for level in (2, 3, 5)}
    seed = {"base": {"by_level": {"2": 0, "3": 0, "5": 0}}, "measured": {"r1_zero": {"lengths": found}}}
    assert report.slope("r1_zero")(seed) == pytest.approx(6)


def test_a_spread_is_mean_and_range_in_the_format_asked_for():
    spread = report.Spread
    assert f"{spread([0.25, 0.5]):%}" == "37.5 % (25.0-50.0)"
    assert f"{spread([0.5, 0.5]):%}" == "50.0 %"
    assert f"{spread([1.25]):.1f}" == "1.2"
    assert f"{spread([16, 4]):d}" == "4-16" and f"{spread([4, 4]):d}" == "4"
    assert f"{spread([4, float('inf')]):d}" == "4-never"
    assert f"{spread([1.0, None]):%}" == "-"


def one_seed():
    """What study.phenomena_of gives, by hand: a seed in which every row of the table is seen, at two trained levels."""
    ks = ("1", "16")
    levels = {"base": {"2": 0.25, "3": 0.125}, "r1_zero": {"2": 0.75, "3": 0.875}}
    lengths = {"base": {"2": 8, "3": 9}, "r1_zero": {"2": 18, "3": 24}}
    pass_at_k = {
        "base": {"3": dict(zip(ks, (0.125, 0.5))), "4": dict(zip(ks, (0.1, 0.75)))},
        "r1_zero": {"3": dict(zip(ks, (0.875, 0.49))), "4": dict(zip(ks, (0.2, 0.25)))},
    }
    steps = {"share": 0.25, "right": 0.8, "counted": 0.5}
    styles = {"base": {"steps": steps, "checked": {"share": 0.1}}, "r1_zero": {"steps": {"share": 0.75, "right": 0.95}}}
    styles["r1_zero"]["checked"] = {"share": 0.2}
    thinks = {"en": 0.625}
    model = {
        name: {
            "pass@1": accuracy, "greedy": accuracy, "by_level": levels[name], "completion_tokens": tokens,
            "by_language": {"ko": 0.5}, "thinks_in": {"ko": dict(thinks)},
        }
        for name, accuracy, tokens in (("base", 0.1875, 10.0), ("r1_zero", 0.8125, 30.0))
    }  # fmt: skip
    log = [
        {"step": i, "entropy": 1 / (1 + i), "no_signal": i / 20, "wrong_tokens": 20.0 + i}
        | ({"base_kl": i / 250} if i % 10 == 0 else {})
        for i in range(1, 21)
    ]
    run = {**model, "log": log}
    measured = {
        name: {
            "pass@1": 0.2, "lenient": 0.375, "opened": {"<think>": 0.4, "<think>\n#1": 0.625},
            "votes": {"16": {"base": 0.5, "r1_zero": 1.0}[name]}, "pass@k": pass_at_k[name],
            "pass@k by chance": {"4": {"16": 0.5}}, "styles": styles[name],
            "styles, one operation more": {"glib": {"right": 0.2}, "steps": {"right": 0.08}},
            "the same by chance": {"glib": {"right": 0.05}, "steps": {"right": 0.08}},
            "lengths": {level: {"all": tokens, "steps": 3 * tokens} for level, tokens in lengths[name].items()},
            "checks": {"right": 40, "right, called wrong": 4, "wrong": 8, "wrong, called wrong": 6, "wrong, mended": 3},
            "forced checks": {"right, called wrong": 0.125, "wrong, called wrong": 0.25},
        }
        for name in ("base", "r1_zero")
    }  # fmt: skip
    rewarded = json.loads(json.dumps(run))
    rewarded["r1_zero"] |= {"by_language": {"ko": 0.25}, "thinks_in": {"ko": {"en": 0.0}}}
    return {
        "seed": 0, **run, "dr_grpo": run, "language": run, "language_reward": rewarded,
        "tokens": {"GRPO": 1.5e6, "longer": 1.25e6, "rejection sampling": 1e6, "online rejection sampling": 1.75e6},
        "longer": {"pass@1": 0.25},
        "rejection sampling": {"pass@1": 0.5}, "online rejection sampling": {"pass@1": 0.75},
        "measured": measured | {"gain": {"share": 0.375, "right": 0.125, "counted": 0.125}},
    }  # fmt: skip


EXPECTED = """\
18.8 % -> 81.2 %; greedy 18.8 % -> 81.2 % | the base read leniently, tags or no tags: 37.5 %; \
its thought opened for it, up to `#1`: 62.5 %
50.0 % -> 100.0 % | pass@1 of the same completions: 20.0 % -> 20.0 %
the fewest operations: 25.0 % -> 75.0 %; the most: 12.5 % -> 87.5 % | \
one operation more than trained on: 10.0 % -> 20.0 %
81.2 %, for 1.50 million tokens sampled and read | \
pretraining, 1.25 million more: 25.0 %; rejection sampling, 1.00: 50.0 %; the same online, 1.75: 75.0 %
of 62.5 points: better style 37.5, right more often in a style 12.5, tags around right answers 12.5 | \
completions in steps: 25.0 % -> 75.0 %; right among these: 80.0 % -> 95.0 %
KL(R1-Zero, base) of a completion: 2.40 nats | \
the least by which all could be right steps, -ln of the base's share of such: 2.30
most operations trained on, k = 16: base 50.0 %, R1-Zero 49.0 % | the base is ahead from k on: 16
one operation more, k = 16: base 75.0 % (by chance 50.0 %), R1-Zero 25.0 % (by chance 50.0 %) | \
right of the base's direct answers: 20.0 % (by chance 5.0 %); of its steps: 8.0 % (by chance 8.0 %)
10.0 -> 30.0 tokens | \
Dr. GRPO's loss, which favours no length: 30.0; wrong answers at the end: 39.5, by Dr. GRPO's 39.5
1.0 -> 6.0 tokens for each operation more | within thoughts in steps alone the base has 3.0
10.0 % -> 20.0 % of the completions check a step | \
base: calls 75.0 % of its wrong steps wrong (mends 50.0 % of these), 10.0 % of its right ones; of given 25.0 %, 12.5 %
Korean questions thought through in English: 62.5 % -> 62.5 % | with the language reward: 0.0 %
right answers to Korean questions: 25.0 % with it | without: 50.0 %
0.417 -> 0.049 nats a token | groups without signal: 7.5 % -> 97.5 %; KL to the base at the end: 0.080 nats a token
"""


def cells_of(seed):
    results = {"seeds": [seed], "spread": "1 seed", "command": "c", "hardware": "h", "torch": "t"}
    lines = report.phenomena_table(results).splitlines()
    assert lines[-1] == "`c`, 1 seed: mean (lowest-highest). h, torch t."
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]


def test_each_row_of_the_phenomena_says_the_numbers_of_the_seeds():
    assert [f"{here} | {against}" for _, _, here, against, _ in cells_of(one_seed())] == EXPECTED.splitlines()
    assert [seen for *_, seen in cells_of(one_seed())] == ["1 of 1"] * len(report.ROWS)


def put(seed, value, *path):
    *way, last = path
    for name in way:
        seed = seed[name]
    seed[last] = value


@pytest.mark.parametrize(
    ("what", "path", "value"),
    [
        ("right answers", ("measured", "base", "opened", "<think>\n#1"), 0.85),
        ("right answers", ("measured", "base", "lenient"), 0.85),
        ("the majority", ("measured", "r1_zero", "votes", "16"), 0.2),
        ("hard problems", ("r1_zero", "by_level", "2"), 0.99),
        ("GRPO is worth", ("online rejection sampling", "pass@1"), 0.9),
        ("GRPO is worth", ("longer", "pass@1"), 0.9),
        ("more than half of the gain", ("measured", "gain", "counted"), 0.4),
        ("it goes no further", ("measured", "base", "styles", "steps", "counted"), 1.0),
        ("pass@k", ("measured", "r1_zero", "pass@k", "3", "16"), 0.495),
        ("beyond what", ("measured", "base", "pass@k by chance", "4", "16"), 0.75),
        ("beyond what", ("measured", "r1_zero", "pass@k", "4", "16"), 0.75),
        ("completions grow", ("dr_grpo", "r1_zero", "completion_tokens"), 12.0),
        ("harder problems", ("measured", "r1_zero", "lengths", "3", "all"), 19),
        ("self-checks", ("measured", "r1_zero", "styles", "checked", "share"), 0.12),
        ("the language of", ("language", "r1_zero", "thinks_in", "ko", "en"), 0.4),
        ("the language reward", ("language_reward", "r1_zero", "by_language", "ko"), 0.49),
        ("entropy", ("log",), [{"entropy": 1.0, "no_signal": 0.5, "base_kl": 0.08, "wrong_tokens": 1.0}]),
    ],
)
def test_a_row_is_not_seen_in_a_seed_without_it(what, path, value):
    seed = json.loads(json.dumps(one_seed()))  # so that no two parts of it are one
    put(seed, value, *path)
    for name, *_, seen in cells_of(seed):
        assert seen == ("0 of 1" if name.startswith(what) else "1 of 1"), name


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """A study's folder in which each run is the same very small one, and each measurement is of it."""
    folder = tmp_path_factory.mktemp("study")
    shape = ["--n_layer=1", "--n_head=2", "--n_kv_head=1", "--d_model=16", "--d_ff=24", "--languages=en,ko"]
    few = ["--pretrain_steps=2", "--steps=3", "--prompts=4", "--eval_problems=8", "--eval_samples=8", "--eval_every=1"]
    first = folder / "seed0" / "main"
    train.main(["--preset=cpu", *shape, *few, "--max_new_tokens=20", "--out", str(first)])
    measure.main([str(first), "--problems=2", "--samples=16"])
    (first / "measured_2x16.json").rename(first / "measured.json")
    for rounds in (1, 80):
        evaluation = json.loads((first / "result.json").read_text())["base"]
        written = {"tokens": 1000 * rounds, "kept": [0.5], "model": evaluation}
        (first / f"rejection_sampling_{rounds}.json").write_text(json.dumps(written))
    jobs = study.phenomena(folder / "seed0", "cpu", 0)
    for each in (*jobs, *study.levers(folder / "levers", "cpu", jobs[0])):
        if not each.makes.exists():
            shutil.copytree(first, each.makes.parent)
    return folder


def test_the_study_collects_tabulates_and_draws_what_its_runs_left(small_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.PLANS, "cpu", (1, *study.PLANS["cpu"][1:]))
    study.write_results(small_study, "cpu", tmp_path, quick=False)
    log = plot.read_log(small_study / "seed0/main")
    (seed,) = json.loads((tmp_path / "phenomena.json").read_text())["seeds"]
    assert [record["step"] for record in seed["log"]] == [1, 2, 3]
    assert seed["log"][2]["base_kl"] == pytest.approx(log[2]["base_kl"], rel=1e-3)
    config = measure.finished_run(small_study / "seed0/main")
    rollouts = [train.sample_problems(config, "problems", i, 4, held_out=False, levels=range(2, 6)) for i in range(3)]
    prompts = [8 * len(tokenizer.encode(problem.prompt)) for problems in rollouts for problem in problems]
    completions = [32 * record["completion_tokens"] for record in log]
    assert seed["tokens"]["GRPO"] == pytest.approx(sum(prompts) + sum(completions), abs=1)
    assert seed["tokens"]["online rejection sampling"] == 80_000

    levers = json.loads((tmp_path / "levers.json").read_text())["levers"]
    assert [lever["name"] for lever in levers] == list(study.LEVERS)
    for each in levers[0]["seeds"]:
        assert each["completions"] == 3 * 32 and each["base_kl"] == pytest.approx(log[-1]["base_kl"], rel=1e-3)
    rewards = json.loads((tmp_path / "hacked.json").read_text())["rewards"]
    assert [lever["name"] for lever in rewards] == list(study.HACKED)
    assert rewards[0]["seeds"][0]["reward"] == pytest.approx([log[0]["reward"], log[-1]["reward"]], abs=1e-3)

    report.main(tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == len(report.ROWS) + len(study.LEVERS) + len(study.HACKED) + 3 * 2  # heads, and lines under them
    plot.draw_results(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(plot.PICTURES)


def test_rejection_sampling_refuses_what_it_cannot_do_in_one_line(small_study, capsys):
    run = str(small_study / "seed0/main")
    for flags, complaint in (
        ([run], "has no completion to keep"),
        ([run, "--rounds=9"], "from 1 to the 3 steps of the run"),
        ([str(small_study)], "is not the folder of a run that has ended"),
    ):
        with pytest.raises(SystemExit) as stop:
            rejection_sampling.main(flags)
        printed = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and complaint in printed[-1]
