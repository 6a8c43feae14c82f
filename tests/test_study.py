"""What experiments/study.py does: the plan and its order, what is measured of completions, variations and controls."""

import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from data.arithmetic import write_problem
from experiments import measure, plot, rejection_sampling, report, study, variations
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
    assert [problem.answer for problem in measure.of_others([*problems, write_problem("1 + 1 + 1")])] == [
        "3",
        "12",
        "12",
    ]
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

    for kind, said in (("right", 12), ("wrong", 13)):
        p = after(f"{begun}{said}")
        assert found[f"{kind}, checked"] == pytest.approx((p[ids["ok"]] + p[ids["wait"]]).item(), rel=1e-4)
        called = p[ids["wait"]] / (p[ids["ok"]] + p[ids["wait"]])
        assert found[f"{kind}, called wrong"] == pytest.approx(called.item(), rel=1e-4)
    assert found["mended"] == pytest.approx(after(f"{begun}13 wait")[ids["12"]].item(), rel=1e-4)


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
    stopped = []
    train_main = train.main

    def seen(flags, program):
        stopped.append(program)

    try:
        train.main = seen
        variations.main(["paid_by_step", "--help"])
    finally:
        train.main = train_main
    assert stopped == ["experiments/variations.py paid_by_step"]
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
    for named in (study.LEVERS, study.HACKED):
        jobs += study.levers(tmp_path / "more", preset, named, jobs[0])
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


def test_the_base_is_ahead_from_the_least_k_at_which_it_is():
    seed = {
        "base": {"by_level": {"2": 0.5}},
        "measured": {
            "base": {"pass@k": {"3": {"1": 0.1, "2": 0.2, "4": 0.5}}},
            "r1_zero": {"pass@k": {"3": {"1": 0.2, "2": 0.2, "4": 0.3}}},
        },
    }
    assert report.crossing(1)(seed) == 4
    seed["measured"]["r1_zero"]["pass@k"]["3"]["4"] = 0.6
    assert report.crossing(1)(seed) == float("inf")


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
