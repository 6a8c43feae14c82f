"""R1's stages at a tiny size, and what each part of them promises."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from data import TASKS, get_tokenizer
from data.chains import work
from data.problem import sample_problems, stream
from experiments.study import r1 as study
from kit.run import Run, open_run
from r1 import controls
from r1 import four_stages as job
from r1.distill import rollouts_for, teacher_costs
from r1.for_all import asked_of_all, rules_or_judge
from r1.four_stages import SPOKEN, Config
from r1.lessons import ROWS, batches, curated, lessons, tokens_of, written
from r1.measure import readable
from r1.table import COLUMNS, SIGNS, head, line, signs
from rlhf import preferences
from tests.small import SHAPE, rollout_of, small_model

CHAINS, REQUESTS = TASKS["chains-en-ko"], TASKS["requests"]
words = get_tokenizer("world")
ENGLISH = CHAINS.ask("7 + 8 - 3", "en")
KOREAN = CHAINS.ask("7 + 8 - 3", "ko")
CLEAN = "<think>\n#1 7 plus 8 is 15\n#2 15 minus 3 is 12</think><answer> 12</answer>"
KLAR = "<think>\n#1 7 더하기 8 은 15\n#2 15 빼기 3 은 12</think><answer> 12</answer>"


def small_config(**changes):
    settings = {"preset": "tiny", "max_level": 2, "pretrain_steps": 3, "max_new_tokens": 24}
    settings |= {"steps": 2, "cold_documents": 40, "cold_steps": 10, "reasoning_steps": 2}
    settings |= {"curated": 20, "sft_steps": 3, "sft_lr": 1e-2, "pairs": 100}
    settings |= {"all_steps": 2, "judged_from": 0.5}
    settings |= {"student_layers": 1, "student_width": 8, "student_steps": 3, "distill_steps": 3}
    settings |= {
        "prompts": 4,
        "group_size": 4,
        "eval_problems": 8,
        "min_lead": 0.1,
        "reward_batch": 8,
    }
    return Config(**settings | SHAPE | {"d_model": 32, "d_ff": 48} | changes).filled()


def test_readable_is_each_step_in_order_and_nothing_else():
    """In the language of the question. A wrong result is readable; accuracy sees to it."""
    assert readable(ENGLISH, CLEAN) and readable(KOREAN, KLAR)
    assert readable(ENGLISH, CLEAN.replace("12", "11"))
    one = CHAINS.ask("7 + 8", "en")
    assert readable(one, "<think>\n#1 7 plus 8 is 15</think><answer> 15</answer>")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 12",
        "<think> 15 12</think><answer> 12</answer>",  # a scribble
        CLEAN.replace("\n#2 15 minus 3 is 12", ""),  # a step is missing
        CLEAN.replace("minus 3", "minus 4"),  # another problem
        CLEAN.replace("#2 15", "#2 14"),  # not from where the first step ended
        CLEAN.replace("#2", "#3"),
        CLEAN.replace("plus", "더하기"),  # two languages
        CLEAN.replace("is 15", "is 15 ok"),
        CLEAN + " bye for now!",
        " sure!" + CLEAN,
        CLEAN.replace("<think>", "").replace("</think>", ""),
        CLEAN.replace("</think>", "\n#3 12 plus 1 is 13</think>"),
        "<think>\n#2 15 minus 3 is 12\n#1 7 plus 8 is 15</think><answer> 12</answer>",
        KLAR,  # of the English question
    ],
)
def test_what_is_not_readable(text):
    assert not readable(ENGLISH, text)


def test_documents_of_the_cold_start_are_readable_and_right():
    """In both languages, and none is held out."""
    config = small_config(max_level=4)
    rows = written(config, words, 40)
    asked = sample_problems(stream(0, "cold start"), TASKS["world"], config.levels, 40)
    assert len(rows) == 40 and {problem.language for problem in asked} == {"en", "ko"}
    texts = [words.decode(ids[:-1]) for _, ids in rows]
    for start, ids in rows:
        assert ids[-1] == words.eos_id and words.decode(ids[:start]).endswith("Assistant:")
    for text in texts:
        question, _, completion = text.partition("Assistant:")
        problem = CHAINS.parse(question.removeprefix("User: ").strip())
        assert readable(problem, completion) and f"<answer> {problem.answer}<" in completion


class Said:
    """In place of `answer_problems`: every third problem is never answered right and readably."""

    def __init__(self):
        self.asked = []

    def __call__(self, model, problems, samples, **how):
        self.asked = problems
        return [
            [(self.say(problem, i, j), 9) for j in range(samples)]
            for i, problem in enumerate(problems)
        ]

    def say(self, problem, i, j):
        languages = [problem.language] * problem.level
        thought, answer = work(stream(0, "work"), problem, languages, slip=0.0, checked=False)
        good = f"<think>{thought}</think><answer> {answer}</answer>"
        if i % 3 == 0 or j == 0:
            return good.replace("#1", "") if i % 2 else good.replace("<answer> ", "<answer> 1")
        return good


def test_stage_3_has_three_rows_of_reasoning_to_one_curated(monkeypatch):
    """Each problem once, and only what is right and readable."""
    said = Said()
    monkeypatch.setattr("r1.lessons.answer_problems", said)
    rows = lessons(small_config(curated=24), small_model(task="world"))
    assert len(said.asked) == 72 and len(rows) == 48 + 16
    texts = [words.decode(ids) for _, ids in rows]
    reasoning = [text for text in texts if "<think>" in text]
    assert len(reasoning) == 48 and all("<think>" not in text for text in texts[48:])
    for text in reasoning:
        question, _, completion = text.partition("Assistant:")
        problem = CHAINS.parse(question.removeprefix("User: ").strip())
        completion = completion.removesuffix("<eos>")
        assert readable(problem, completion) and f"<answer> {problem.answer}<" in completion
    assert rows[48:] == curated(small_config(), words, 16)


def test_stage_3_without_any_reasoning_is_refused():
    with pytest.raises(ValueError, match=r"0 of 60 problems .* more --reasoning_steps would give"):
        lessons(small_config(), small_model(task="world"))


def test_fine_tuning_sees_each_row_once_in_an_epoch():
    """In another order each time; `tokens_of` counts what is predicted."""
    rows = [(2, [i, i, *[7] * (i % 5 + 1)]) for i in range(ROWS + 8)]
    batch = batches(rows, 0, "dev1", 0)
    orders, counted = [], 0
    for epoch in range(2):
        parts = [batch(2 * epoch + i) for i in (0, 1)]
        orders.append([row[0].item() for tokens, _, _ in parts for row in tokens])
        counted += sum(int(mask.sum()) for _, mask, _ in parts)
        assert [len(tokens) for tokens, _, _ in parts] == [ROWS, 8]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(ROWS + 8))
    assert orders[0] != orders[1] and counted == tokens_of(rows, 4)


def test_requests_are_asked_in_the_last_part_of_stage_4_alone():
    config = replace(small_config(prompts=8, judged_from=0.75, request_share=0.25), steps=8)
    for step in range(8):
        tasks = [problem.task for problem in asked_of_all(config, step)]
        late = 2 if step >= 6 else 0
        assert tasks == ["chains-en-ko"] * (8 - late) + ["requests"] * late
    everything = replace(config, judged_from=0.0, request_share=1.0)
    assert {problem.task for problem in asked_of_all(everything, 0)} == {"requests"}


def test_chains_have_rules_and_requests_the_judge():
    """Each is 0 where it has no say, and the sum is the reward."""
    problems = [REQUESTS.ask("about", 7, "en"), ENGLISH, REQUESTS.ask("greet", 0, "ko")]
    texts = [" sure!", " no.", CLEAN, "<think> 12</think><answer> 12</answer>", " wow!", CLEAN]
    asked = [replace(problem, task="world") for problem in problems]  # the words of both
    rollout, told = rollout_of(asked, texts), []

    def judge(problems, rollout, step):
        told.append((problems, step))
        return {"reward": 20 + torch.arange(6.0)}

    found = rules_or_judge(SPOKEN | {"format": 0.5}, words, judge)(problems, rollout, 5)
    assert found["rules"].tolist() == [0, 0, 2.5, 1.5, 0, 0]
    assert found["judge"].tolist() == [20, 21, 0, 0, 24, 25]
    assert found["reward"].tolist() == [20, 21, 2.5, 1.5, 24, 25] and told == [(problems, 5)]


def test_grpo_of_the_student_gets_about_as_many_tokens():
    config = small_config(distill_steps=100, prompts=4, group_size=4)
    rows = [(2, [0] * 12) for _ in range(ROWS * 3)]
    assert tokens_of(rows, 100) == 100 * ROWS * 10
    assert rollouts_for(config, rows) == 100 * ROWS // 16
    found = {name: {"tokens": 2, "seconds": 3} for name in ("base", "dev1", "dev2", "dev3")}
    assert teacher_costs(found) == {"tokens": 6, "seconds": 9}


STAGES = [
    "base",
    "r1_zero",
    "dev1",
    "dev2",
    "dev3",
    "r1",
    "student_base",
    "student",
    "student_grpo",
]


def as_in_the_paper():
    names = ("right", "readable", "korean", "gold_held_out")
    rows = {
        "base": (0.2, 0, 0, 0), "r1_zero": (0.9, 0, 0, 0), "dev1": (0.5, 0.6, 0.6, 0),
        "dev2": (0.9, 1, 1, 0), "dev3": (0.9, 1, 1, 1), "r1": (0.91, 1, 1, 2),
        "student": (0.8, 1, 1, 1), "student_grpo": (0.5, 1, 1, 0),
    }  # fmt: skip
    return {stage: dict(zip(names, row)) for stage, row in rows.items()}


def test_signs_are_seen_where_they_are_and_not_elsewhere():
    """Where all stages are the same, no difference is seen."""
    assert all(signs(as_in_the_paper()).values()) and len(SIGNS) == 9
    same = dict.fromkeys(as_in_the_paper(), as_in_the_paper()["base"])
    seen = [text for text, found in signs(same).items() if found]
    assert len(seen) == 2 and all("as often as" in text for text in seen)


def run_job(config):
    with open_run(config, "-m r1.four_stages") as run:
        job.four_stages(config, run)


@pytest.fixture(scope="module")
def small_sizes():
    """The sizes that no flag has. What a model this small says is kept as it is."""
    with pytest.MonkeyPatch.context() as patch:
        asked = preferences.requests
        patch.setattr("rlhf.measure.requests", lambda count, *how: asked(16, *how))
        patch.setattr("r1.lessons.ASKED", 16)
        for rule in ("is_right", "readable"):
            patch.setattr(f"r1.lessons.{rule}", lambda *_: True)
        patch.setattr("r1.measure.TESTED", 20)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_sizes):
    """The folder of a run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_job(small_config(out=str(folder)))
    return folder, printed.getvalue()


def test_the_job_writes_a_file_for_each_stage_and_a_table(whole):
    folder, printed = whole
    found = json.loads((folder / "result.json").read_text())
    assert list(found["stages"]) == STAGES
    assert head() in printed
    for stage, row in found["stages"].items():
        assert (folder / f"{stage}.pt").is_file()
        assert line(stage, row) in printed and row["tokens"] > 0
        assert all(math.isfinite(x) for x in row.values())
    assert (folder / "reward.pt").is_file() and set(found["signs"]) == set(SIGNS)
    samples = (folder / "samples.txt").read_text()
    assert samples in printed and "User: tell me about 17" in samples
    assert samples.count("[r1: ") == samples.count("[student_grpo: ") == 2


def test_the_log_tells_what_the_judge_gave(whole):
    """In the second of two rollouts of stage 4; without a KL there is none in stage 2."""
    records = [json.loads(x) for x in (whole[0] / "log.jsonl").read_text().splitlines()]
    r1 = [record for record in records if record["stage"] == "r1"]
    assert r1[0]["judge"] == 0 and r1[0]["judge_std"] == 0 and r1[1]["judge_std"] > 0
    assert "k3_ref" in r1[0] and "language" not in r1[0]
    for stage, rule in (("r1_zero", False), ("dev2", True), ("student_grpo", True)):
        of_stage = [record for record in records if record["stage"] == stage]
        assert of_stage and all(("language" in x) is rule and "k3_ref" not in x for x in of_stage)


def controls_of(folder, tmp_path, *more):
    arguments = ["--of", str(folder), "--out", str(tmp_path / "controls"), *more]
    controls.main(arguments)
    return json.loads((tmp_path / "controls" / "result.json").read_text())["controls"]


@pytest.mark.slow
def test_every_control_is_made_from_a_finished_run(whole, tmp_path, capsys):
    """With the settings of that run."""
    found = controls_of(whole[0], tmp_path)
    assert list(found) == list(controls.CONTROLS)
    printed = capsys.readouterr().out
    for row, measures in found.items():
        assert line(row, measures) in printed and (tmp_path / f"controls/{row}.pt").is_file()
    again = json.loads((tmp_path / "controls" / "config.json").read_text())
    first = json.loads((whole[0] / "config.json").read_text())
    own = {"program", "out", "init", "of", "only"}
    assert {x for x in again if x not in own and again[x] != first[x]} == set()


def test_a_cold_start_of_too_few_own_samples_is_told_and_left_out(
    whole, tmp_path, monkeypatch, capsys
):
    """The other rows are made."""
    monkeypatch.setattr("r1.lessons.is_right", lambda *_: False)
    found = controls_of(whole[0], tmp_path, "--only", "cold_own,cold_2x")
    assert list(found) == ["cold_2x"]
    told = f"{'cold_own':16} left out: R1-Zero says 0 of"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--only", "cold_3x"], "--only cold_3x: the rows are zero_longer, cold_own, "),
        (["--only", "long_on_base"], "--only long_on_base needs long_dev2 beside it"),
        (["--of", "nowhere"], "--of nowhere must be the folder of a finished run"),
        ([], "--of . must be the folder of a finished run"),
    ],
)
def test_controls_refuse_what_they_cannot_make(flags, said, capsys):
    with pytest.raises(SystemExit):
        controls.main(flags)
    assert said in " ".join(capsys.readouterr().err.split())


def untimed(lines):
    return [
        {name: x for name, x in json.loads(each).items() if not name.endswith("seconds")}
        for each in lines.splitlines()
    ]


@pytest.mark.slow
def test_a_job_stopped_in_every_stage_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch):
    """Stopped by SIGINT in the second step of each, and called again each time."""
    config, stopped, steps = small_config(out=str(tmp_path / "run")), [], Run.steps

    def stop(self, stage, *state, **more):
        for step in steps(self, stage, *state, **more):
            if step == 1 and stage not in stopped:
                stopped.append(stage)
                os.kill(os.getpid(), signal.SIGINT)
            yield step

    monkeypatch.setattr(Run, "steps", stop)
    for _ in range(len(STAGES) + 1):
        with pytest.raises(SystemExit):
            run_job(config)
        config = replace(config, resume=config.out)
    run_job(config)
    assert stopped == [*STAGES[:5], "reward", *STAGES[5:]]
    for name in (*(f"{stage}.pt" for stage in stopped), "log.jsonl", "looks.jsonl", "samples.txt"):
        one, other = ((folder / name).read_bytes() for folder in (tmp_path / "run", whole[0]))
        if name == "log.jsonl":  # all but the seconds
            one, other = (untimed(lines) for lines in (one, other))
        assert one == other, name


# ---------------------------------------------------------------------------------------- the page


def found_by(seed, lead=0.0):
    """A run as `published` has it, with numbers that can be told apart."""
    measures = {name: 0.5 for name in COLUMNS} | {"tokens": 1000 + seed, "seconds": 10}
    rows = {stage: measures | {"right": 0.5 + 0.1 * seed} for stage in STAGES}
    control = measures | {"right": 0.5 + 0.1 * seed + lead, "gold": 0.25}
    return {"seed": seed, "stages": rows, "controls": {"dev3_on_dev2": control}}


def test_the_table_of_stages_has_means_and_ranges():
    results = {"seeds": [found_by(0), found_by(1)], "command": "x", "hardware": "y", "torch": "z"}
    lines = study.stages(results).splitlines()
    assert len(lines) == 2 + len(STAGES) + 2
    assert lines[2].startswith("| base | 55.0 % (50.0-60.0) | 50.0 % (50.0-50.0) |")
    assert "| 0.50 (0.50 to 0.50) |" in lines[2] and lines[2].endswith("| 1,000 | 10 |")


def test_a_control_is_compared_with_its_stage_seed_by_seed():
    """Seeds without the row do not count in either mean."""
    without = found_by(9) | {"controls": {}}
    (line,) = study.controls({"seeds": [found_by(0, 0.2), found_by(1), without]}).splitlines()[2:3]
    assert line.startswith("| `dev3_on_dev2` | Dev3, on Dev2 in place of the base | 2 | ")
    assert "| 65.0 % (+10.0) |" in line and "| 0.25 (-0.25*) |" in line


def test_every_control_is_told_on_the_page():
    assert list(study.ROWS) == list(controls.CONTROLS)
    assert list(study.NAMES) == STAGES and {stage for stage, _ in study.ROWS.values()} < set(STAGES)


def test_only_finished_runs_of_one_setting_are_published(whole, tmp_path):
    """Each seed once. Controls that lie beside a run come with it."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    beside = tmp_path / "run-controls"
    beside.mkdir()
    (beside / "config.json").write_text(json.dumps({"program": "-m r1.controls"}))
    (beside / "result.json").write_text(json.dumps({"controls": {"no_kl": {"right": 1}}}))
    (seed,) = study.published([folder])["seeds"]
    assert seed["controls"] == {"no_kl": {"right": 1}} and "[r1: " in seed["samples"]
    assert study.samples({"seeds": [seed]}).startswith("```text\nUser: ")
    assert study.costs({"seeds": [seed]}).count("\n| 0 | ") == 1
    with pytest.raises(ValueError, match="a seed comes twice"):
        study.published([folder, folder])
    with pytest.raises(ValueError, match="no finished run"):
        study.published([tmp_path])
    with pytest.raises(ValueError, match=r"run-controls was made by -m r1.controls, not by"):
        study.published([beside])
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    settings = json.loads((other / "config.json").read_text()) | {"all_beta": 0.5, "seed": 7}
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"other differs from .*run in all_beta$"):
        study.published([folder, other])


@pytest.mark.docs
@pytest.mark.parametrize("name", study.TABLES)
def test_the_page_has_the_tables_of_the_results(name):
    results = json.loads((study.RESULTS / "r1.json").read_text())
    assert study.TABLES[name](results) in study.PAGE.read_text()


def test_what_the_page_says_of_the_choices_holds_in_every_seed():
    """Of stage 4, and of the three settings in which going back to the base might pay."""
    seeds = json.loads((study.RESULTS / "r1.json").read_text())["seeds"]
    assert len(seeds) >= 3
    for seed in seeds:
        stages, rows = seed["stages"], seed["controls"]
        r1, dev3 = stages["r1"], stages["dev3"]
        assert 0 < r1["right"] - dev3["right"] < 0.04
        assert r1["gold"] > dev3["gold"] and r1["gold_held_out"] > dev3["gold_held_out"]
        assert 0.06 < r1["right"] - rows["no_arithmetic"]["right"] < 0.46
        assert 0.015 < r1["right"] - rows["no_kl"]["right"] < 0.1
        assert 0.4 < r1["gold"] - rows["no_kl"]["gold"] < 0.8
        assert abs(rows["r1_on_dev2"]["right"] - r1["right"]) < 0.03
        assert rows["r1_on_dev2"]["gold"] > r1["gold"] - 0.1
        for name in ("long", "forgotten"):
            base, on = rows[f"{name}_on_base"], rows[f"{name}_on_dev2"]
            assert on["right"] > base["right"] and on["gold"] > base["gold"] - 0.1
            assert 0.2 < on["web_loss"] - base["web_loss"] < 0.7
        assert 0.2 < rows["r1_on_dev2"]["web_loss"] - r1["web_loss"] < 0.7
    hacked = seeds[1]["controls"]["judged_half"]["gold_held_out"]
    assert (round(hacked, 1), round(seeds[1]["stages"]["r1"]["gold_held_out"], 1)) == (-0.6, 1.1)
    for seed in (seeds[0], seeds[2]):
        for name in ("gold", "gold_held_out"):
            assert abs(seed["controls"]["judged_half"][name] - seed["stages"]["r1"][name]) < 0.2
