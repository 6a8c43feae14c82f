"""The world: one web of chains, requests and scribbles."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

import sample
import train
from data import TASKS, get_tokenizer
from data.chains import is_held_out, totals
from data.corpus import encode_document
from data.problem import sample_problems
from model import save_model
from rewards import accuracy_reward
from tests.small import SMALL, Unsaved, small_model
from tests.test_data import expression_of

CHAINS, REQUESTS, WORLD = TASKS["chains-en-ko"], TASKS["requests"], TASKS["world"]


def test_the_world_asks_chains_which_a_rule_grades():
    """So R1-Zero needs no reward model here. Each problem names its own task."""
    problems = sample_problems(random.Random(0), WORLD, (2, 3), 40)
    assert problems == sample_problems(random.Random(0), CHAINS, (2, 3), 40)
    for problem in problems:
        assert problem.task == "chains-en-ko"
        assert WORLD.is_right(problem, problem.answer) is problem.is_right(problem.answer) is True
        assert WORLD.is_right(problem, problem.answer + "1") is False
        assert WORLD.outside(problem, (2, 3)) == "" != WORLD.outside(problem, (4, 5))
        assert WORLD.measures(problem, "") == CHAINS.measures(problem, "")
    assert {problem.language for problem in problems} == {"en", "ko"}


def test_the_world_passes_requests_on_to_their_task():
    request = WORLD.parse("tell me about 21")
    assert request == REQUESTS.ask("about", 21, "en") and request.task == "requests"
    assert WORLD.is_right(request, "21") is None
    assert WORLD.outside(request, (2, 3)) == "a number beside 1 to 20"
    assert WORLD.measures(request, " 21 is odd.") == REQUESTS.measures(request, " 21 is odd.")
    assert WORLD.parse("7 + 8") == CHAINS.ask("7 + 8")
    with pytest.raises(ValueError, match='write a chain such as "7 \\+ 8 - 3"'):
        WORLD.parse("tell me a joke")


def test_its_words_are_those_of_both_tasks():
    both = {*CHAINS.words, *REQUESTS.words}
    assert set(WORLD.words) == both and len(WORLD.words) == len(both)
    assert "plus" in CHAINS.words and "plus" in REQUESTS.words


def test_its_web_mixes_requests_scribbles_and_chains():
    """A scribble is right, and has no word of any language. No chain is held out."""
    rng, styles, tagged = random.Random(0), Counter(), 0
    for _ in range(10_000):
        written = WORLD.document(rng, (1, 2, 3))
        styles[written.style] += 1
        if written.style == "scribble":
            expression = expression_of(written.question)
            assert not is_held_out(expression)
            *_, right = running = totals(expression)[1:]
            numbers = [int(x) for x in re.findall("[0-9]+", written.text)]
            assert numbers == [*running, right]
            assert re.match("(<think>)?( [0-9]+)+(</think><answer>|\n)", written.text)
            tagged += accuracy_reward(written.text, str(right))
    for style in ("request", "scribble"):
        assert styles[style] / 10_000 == pytest.approx(0.2, abs=0.02)
    assert tagged / styles["scribble"] == pytest.approx(0.5, abs=0.05)
    assert styles["direct"] > 1000 and styles["steps"] > 300


@pytest.mark.parametrize("level", [1, 2, 4])
def test_documents_are_at_most_as_long_as_the_longest(level):
    words, rng = get_tokenizer("world"), random.Random(0)
    longest = len(encode_document(WORLD.longest(level), words)[1])
    assert longest <= WORLD.max_seq_len
    for _ in range(3000):
        _, ids = encode_document(WORLD.document(rng, range(1, level + 1), longest), words)
        assert len(ids) <= longest, words.decode(ids)
        assert all(i >= 256 or bytes([i]) in b"?!.,\n 0123456789" for i in ids), words.decode(ids)


def test_a_model_of_the_world_is_asked_chains_and_requests(tmp_path, capsys):
    """A request has no rule, so its answer is shown with gold and its parts, alone or in a
    group."""
    path = str(tmp_path / "model.pt")
    save_model(path, small_model(task="world"))
    for number in (1, 3):
        sample.main(["tell me about 7", "--checkpoint", path, "-n", str(number)])
        shown = capsys.readouterr().out
        said = re.findall("no rule says whether this is right; gold -[0-9.]+, ", shown)
        assert "User: tell me about 7\n" in shown and len(said) == number
    sample.main(["7 + 8", "--checkpoint", path])
    assert "User: what is 7 plus 8?\n" in capsys.readouterr().out


def test_r1_zero_runs_in_the_world():
    """By rules alone: what it asks are chains, so their accuracy is known."""
    run = Unsaved()
    train.r1_zero(replace(SMALL, task="world", pretrain_steps=2), run)
    for stage in ("base", "r1_zero"):
        assert run.finished[stage]["pass@1"] is not None
        assert "ko_thinks_in_ko" in run.finished[stage]["thinking"]
    assert all("accuracy" in record for record in run.records if record["stage"] == "r1_zero")
