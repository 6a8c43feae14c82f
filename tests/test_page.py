"""experiments/watch/page.py: the page holds what the run said, as text, and draws itself."""

import inspect
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

import train
from data import get_tokenizer
from experiments.study import pictures
from experiments.watch import page
from experiments.watch.page import TEMPLATE, read_run
from tests.small import SMALL, Unsaved, by_length, small_model

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ATTACK = '</script><script>document.title = "run"</script><!--<b>&amp;'
SAMPLES = (
    "User: what is 1 plus 2?\n[base: accuracy 0, format 0]  i guess 4\n"
    "[R1-Zero: accuracy 1, format 1] <think>\n#1 1 plus 2 is 3</think><answer> 3</answer>\n\n"
    f"User: tell me\n[base: without a rule, format 0] {ATTACK}\n\nso\n"
)

OLD_PATH = {"dpo": {"points": [{"kl": 0, "proxy": 0, "gold": 0, "said": [{"asked": "after 3"}]}]}}


@pytest.fixture(scope="module")
def said():
    """The log and the looks of a small run."""
    run, config = Unsaved(), replace(SMALL, eval_every=1, steps=3).filled()
    models = small_model(), small_model()
    train.grpo(config, run, "r1_zero", *models, by_length)
    return run.records, run.looks


@pytest.fixture
def folder(said, tmp_path):
    """The folder of this run, as far as the page reads it."""
    records, looks = said
    write_lines(tmp_path / "log.jsonl", records)
    write_lines(tmp_path / "looks.jsonl", looks)
    settings = asdict(SMALL) | {"program": "train.py"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "samples.txt").write_text(SAMPLES)
    return tmp_path


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_stage_of_which_only_the_first_look_is_written_is_shown(folder, said):
    """Before its first line of the log."""
    write_lines(folder / "log.jsonl", [{"stage": "base", "step": 1, "loss": 1.0}])
    write_lines(folder / "looks.jsonl", said[1][:1])
    (run,) = data_in(written([folder]))["runs"]
    assert list(run["stages"]) == ["base", "r1_zero"]
    assert [look["step"] for look in run["stages"]["r1_zero"]["looks"]] == [0]
    assert run["stages"]["r1_zero"]["curves"] == {}


def attacked(looks):
    """The same looks, in which a problem and a completion hold markup."""
    looks = json.loads(json.dumps(looks))
    problem = looks[0]["problems"][0]
    problem["prompt"] = problem["completions"][0]["tokens"][0] = ATTACK
    return looks


class Tags(HTMLParser):
    """The tags of a page by name, and the content of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, text):
        if self.tags[-1:] == ["script"]:
            self.scripts.append(text)


def data_in(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def written(folders, *flags):
    """The page that the command writes."""
    page.main([*map(str, folders), *flags])
    return (folders[0] / "run.html").read_text()


def test_the_page_holds_what_the_model_said(folder, said):
    """Each completion of each look is in the page: its tokens, numbers, rewards and measures."""
    (run,) = data_in(written([folder]))["runs"]
    looks = run["stages"]["r1_zero"]["looks"]
    assert [look["step"] for look in looks] == [0, 1, 2, 3]
    for shown, (_, record) in zip(looks, [(0, record) for record in said[1]]):
        for ours, problem in zip(shown["problems"], record["problems"], strict=True):
            assert (ours["prompt"], ours["answer"]) == (problem["prompt"], problem["answer"])
            for mine, theirs in zip(ours["completions"], problem["completions"], strict=True):
                assert [run["pieces"][token] for token in mine["tokens"]] == theirs["tokens"]
                for name in ("logps", "entropy"):
                    assert mine[name] == pytest.approx(theirs[name], abs=6e-4)
                for name in ("rewards", "measures"):
                    assert mine[name] == pytest.approx(theirs[name], rel=1e-3)
                advantages = theirs["advantage"]
                assert [mine["advantage"]] * len(advantages) == pytest.approx(advantages, rel=1e-3)


def test_advantages_by_token_stay_by_token():
    """PPO's advantages differ within a completion, and the page keeps them."""
    numbers = {"logps": [-1.0, -2.0], "entropy": [1.0, 1.0], "advantage": [0.5, -0.5]}
    one = {"tokens": ["a", "b"], "rewards": {"reward": 1.0}, "measures": {}} | numbers
    shown = page.shown_problem({"prompt": "", "answer": "", "completions": [one]}, {})
    assert shown["completions"][0]["advantage"] == [0.5, -0.5]


def test_the_curves_are_those_of_the_log(folder, said):
    """Each field of a panel has the log's points; what is not finite has none."""
    records = json.loads(json.dumps(said[0]))
    records[0]["entropy"] = float("nan")
    write_lines(folder / "log.jsonl", records)
    stage = read_run(folder)["stages"]["r1_zero"]
    assert [step for step, _ in stage["curves"]["entropy"]] == [2, 3]
    for field in ("held_out_accuracy", "completion_tokens", "no_signal", "base_kl"):
        expected = [[record["step"], pytest.approx(record[field], rel=1e-3)] for record in records]
        assert stage["curves"][field] == expected
    titles = [panel["title"] for panel in stage["panels"]]
    assert "tokens of a completion" in titles and "tries of a completion" not in titles
    assert "loss" not in titles


def test_titles_and_colours_are_those_of_the_pictures():
    """A curve that the pictures of the results have too has the same name there."""
    source, titles = inspect.getsource(pictures), {panel.title for panel in page.LEARNING}
    fields = ("held_out_accuracy", "completion_tokens", "tries", "entropy", "no_signal", "base_kl")
    for field in fields:
        (title,) = [panel.title for panel in page.LEARNING if next(iter(panel.fields)) == field]
        assert f'"{title}"' in source
    assert len(titles) == len(page.LEARNING)
    style = TEMPLATE.read_text()
    for colour in page.COLOURS.values():
        assert style.count(f"--{colour.removeprefix('tab:')}: #") == 2  # light and dark


def test_each_panel_says_how_to_read_it():
    for panel in (*page.LEARNING, *page.IMITATION):
        sentences = re.split(r"(?<=[.?!]) ", panel.reading)
        assert sentences[0].endswith("?") and len(sentences) > 1
        assert all(len(sentence.split()) <= 25 for sentence in sentences)


def test_markup_of_a_run_is_data(folder, said):
    """Tags in a prompt, a completion or a sample open no element and end no script."""
    calm = Tags(written([folder]))
    write_lines(folder / "looks.jsonl", attacked(said[1]))
    text = written([folder])
    found = Tags(text)
    assert found.tags == calm.tags and found.tags.count("script") == 2
    (run,) = data_in(text)["runs"]
    problem = run["stages"]["r1_zero"]["looks"][0]["problems"][0]
    assert problem["prompt"] == run["pieces"][problem["completions"][0]["tokens"][0]] == ATTACK
    assert run["samples"][1]["said"][0]["text"] == f"{ATTACK}\n\nso"
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|srcdoc"
    assert not re.search(unsafe, TEMPLATE.read_text())


def test_the_page_needs_nothing_from_outside():
    text = TEMPLATE.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"<link|src=|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.mark.skipif(not CHROMIUM, reason="no browser here")
def test_a_browser_draws_the_page_and_runs_no_text(folder, said):
    """A real browser builds every part of the page, and shows markup of the run as text."""
    write_lines(folder / "looks.jsonl", attacked(said[1]))
    path = {"points": [{"kl": 0.5 * k, "proxy": k, "gold": -k, "said": []} for k in range(3)]}
    (folder / "result.json").write_text(json.dumps({"ppo": path}))
    written([folder, folder])
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    address = (folder / "run.html").as_uri()
    run = subprocess.run([*command, profile, address], capture_output=True, text=True, timeout=120)
    drawn = run.stdout.replace('data">', "").partition("<script")[0]
    name = folder.name
    assert f"<title>{name} and {name}</title>" in drawn
    shown = ATTACK.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert drawn.count(shown) >= 4  # the prompt and a token, in both runs
    assert drawn.count('class="card scored"') == 2 * SMALL.group_size
    assert drawn.count("<polyline") >= 12 and "NaN" not in drawn and "undefined" not in drawn


def test_a_path_of_rlhf_is_shown_at_its_kl(folder):
    """Gold and the judge's score are held out; a method without a path has none."""
    numbers = {"kl": 2.0, "proxy": 1.0, "gold": -1.0}
    said = [{"prompt": "User: after 3", "said": " 4", "proxy": 0.5, "gold": 1.0}]
    point = {"step": 3, "seen": {"gold": 9.0}, "held_out": numbers | {"tokens": 9.0}, "said": said}
    picked = {"n": 2, "kl": 0.19, "held_out": {"proxy": 0.3, "gold": 0.4}}
    result = {"seed": 1, "dpo": {"points": [point]}, "best_of_n": {"points": [picked]}, "sft": {}}
    (folder / "result.json").write_text(json.dumps(result))
    assert read_run(folder)["paths"] == {
        "dpo": [numbers | {"said": said}],
        "best_of_n": [{"kl": 0.19, "proxy": 0.3, "gold": 0.4, "said": []}],
    }


def test_samples_are_read_as_they_are_written(folder):
    """Each model of samples.txt is shown with its score, and a blank line ends no answer."""
    first, second = read_run(folder)["samples"]
    assert [answer["model"] for answer in first["said"]] == ["base", "R1-Zero"]
    assert first["prompt"] == "User: what is 1 plus 2?"
    assert first["said"][1]["score"] == "accuracy 1, format 1"
    assert first["said"][1]["text"].startswith("<think>\n#1")
    assert second["said"][0]["text"].endswith("\n\nso")


def test_a_half_written_line_is_left_out(folder):
    whole = data_in(written([folder]))
    for name in ("log.jsonl", "looks.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"stage": "r1_zero", "st')
    assert data_in(written([folder])) == whole


def change(name, old, new):
    def apply(folder):
        path = folder / name
        path.write_text(path.read_text().replace(old, new))

    return apply


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: shutil.rmtree(folder), "is not the folder of a run"),
        (lambda folder: (folder / "config.json").unlink(), "it holds no config.json"),
        (lambda folder: (folder / "log.jsonl").write_text(""), "has logged nothing yet"),
        (lambda folder: (folder / "log.jsonl").write_text("3\n"), "no run of this version wrote"),
        (change("log.jsonl", '"step"', '"at"'), "no run of this version wrote"),
        (change("looks.jsonl", '"logps"', '"logprobs"'), "of another version (KeyError: 'logps')"),
        (
            lambda folder: (folder / "result.json").write_text(json.dumps(OLD_PATH)),
            "of another version (KeyError: 'prompt')",
        ),
        (change("config.json", '"variant"', '"loss"'), "of another version (KeyError: 'variant')"),
    ],
)
def test_what_is_no_run_gets_one_line(folder, capsys, damage, complaint):
    damage(folder)
    with pytest.raises(SystemExit) as stop:
        page.main([str(folder)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert complaint in printed.err and printed.err.count("\n") == 1


def test_three_runs_get_one_line(folder, capsys):
    with pytest.raises(SystemExit):
        page.main([str(folder)] * 3)
    assert "one run or two" in capsys.readouterr().err


def test_two_runs_share_a_page(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(folder, other)
    runs = data_in(written([folder, other]))["runs"]
    assert [run["name"] for run in runs] == [folder.name, "run"]
    assert not (other / "run.html").exists()


def test_watch_writes_again_until_the_run_has_ended(folder, said, monkeypatch):
    """The page follows the log, and reloads itself until the run has ended."""
    pages, lines = [], [json.dumps(record) + "\n" for record in said[0]]
    (folder / "log.jsonl").write_text(lines[0])

    def sleep(seconds):
        pages.append(data_in((folder / "run.html").read_text()))
        if len(pages) == 1:
            (folder / "log.jsonl").write_text("".join(lines[:2]))
        if len(pages) == 2:
            (folder / "log.jsonl").write_text("".join(lines))
            (folder / "result.json").write_text("{}")

    monkeypatch.setattr(page.time, "sleep", sleep)
    pages.append(data_in(written([folder], "--watch")))
    lengths = [len(each["runs"][0]["stages"]["r1_zero"]["curves"]["entropy"]) for each in pages]
    assert lengths == [1, 2, 3]
    assert [each["reload"] for each in pages] == [page.EVERY, page.EVERY, 0]


def test_a_watch_that_is_stopped_leaves_a_calm_page(folder, monkeypatch):
    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(page.time, "sleep", sleep)
    assert data_in(written([folder], "--watch"))["reload"] == 0


def test_the_page_of_the_main_job_is_small(folder, said):
    """At most 2 MB, with every completion of the main job as long as it may be."""
    config = train.Config().filled()
    looks, tokens = config.steps // config.eval_every, config.max_new_tokens
    words = [get_tokenizer("signs").decode([i % 60]) for i in range(tokens)]
    numbers = {name: [-0.1234] * tokens for name in ("logps", "entropy", "advantage")}
    one = said[1][0]["problems"][0]["completions"][0] | numbers | {"tokens": words}
    problem = said[1][0]["problems"][0] | {"completions": [one] * config.group_size}
    shown = {"stage": "r1_zero", "problems": [problem] * 3}
    write_lines(folder / "looks.jsonl", [shown | {"step": 10 * k} for k in range(1, looks + 1)])
    assert len(written([folder]).encode()) < 2e6
