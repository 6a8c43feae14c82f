"""The task "signs": its problems, its rule, its documents, and how its thoughts are read."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import TASKS, get_tokenizer
from data.corpus import encode_document
from data.problem import sample_problems
from data.signs import (
    APPLY,
    MAX_TOTAL,
    NO_WAY,
    SHARES,
    Signs,
    Try,
    candidates,
    is_for_training,
    is_held_out,
    parts_of,
    tries_of,
)
from rewards import RULES, extract_answer, format_reward

SIGNS = TASKS["signs"]
LEVELS = range(1, 5)
LINE = re.compile(r"\n (\d+) : (\d+(?: [-+*] \d+ = \d+)+) (yes|no)")
tokenizer = get_tokenizer("signs")


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(1)
    return [SIGNS.document(rng, LEVELS) for _ in range(20_000)]


def of_style(documents, style):
    """The documents of a style, each with its problem."""
    chosen = (each for each in documents if each.style == style)
    asked = re.compile("User: (.*)\nAssistant:")
    return [(SIGNS.parse(asked.fullmatch(each.question)[1]), each) for each in chosen]


def evaluated(text, numbers, target):
    """The second evaluator: brackets from the left, then Python's own arithmetic."""
    if not re.fullmatch("[1-9]( [-+*] [1-9])*", text):
        return False
    nested = text.split(" ")[0]
    for sign, number in re.findall(r"([-+*]) (\d)", text):
        nested = f"({nested} {sign} {number})"
    return [int(x) for x in re.findall(r"\d", text)] == list(numbers) and eval(nested) == target


# --------------------------------------------------------------------------------------- problems


def test_each_problem_has_an_answer_and_a_wrong_candidate():
    """Of each level and split; the answer is right by the rule and by the second evaluator."""
    for held_out in (True, False):
        for problem in sample_problems(
            random.Random(0), SIGNS, range(1, 9), 400, held_out=held_out
        ):
            numbers, target = parts_of(problem)
            assert len(numbers) == problem.level + 1 and 0 <= target <= MAX_TOTAL
            assert SIGNS.is_right(problem, problem.answer)
            assert evaluated(problem.answer, numbers, target)
            assert not all(SIGNS.is_right(problem, x) for x in candidates(numbers))


def test_the_target_is_the_value_of_a_random_candidate():
    """Not of a random value: a target that many candidates hit is asked for as often."""
    rng, asked = random.Random(0), Counter()
    for _ in range(30_000):
        numbers, target = parts_of(SIGNS.problem(rng, 1, held_out=is_held_out((2, 2))))
        if numbers == (2, 2):
            asked[target] += 1
    assert set(asked) == {0, 4} and Counter(candidates((2, 2)).values()) == {4: 2, 0: 1}
    assert asked[4] / (asked[4] + asked[0]) == pytest.approx(2 / 3, abs=0.08)


def test_candidates_are_worked_from_left_to_right_within_the_limit():
    assert candidates((4, 3, 6)) == {
        "4 + 3 + 6": 13,
        "4 + 3 - 6": 1,
        "4 - 3 + 6": 7,
        "4 - 3 * 6": 6,
        "4 * 3 + 6": 18,
        "4 * 3 - 6": 6,
    }
    unlimited = candidates((4, 3, 6), limited=False)
    assert len(unlimited) == 9 and unlimited["4 + 3 * 6"] == 42 and unlimited["4 - 3 - 6"] == -5


def test_the_order_of_numbers_and_the_target_change_no_split():
    """A list is held out with all its orders and targets, about one in six."""
    rng = random.Random(0)
    lists = [tuple(rng.choices(range(1, 10), k=rng.randint(2, 5))) for _ in range(3000)]
    held_out = [x for x in lists if is_held_out(x)]
    assert len(held_out) / len(lists) == pytest.approx(1 / 6, abs=0.03)
    for numbers in held_out:
        assert is_held_out(rng.sample(numbers, len(numbers)))
        assert not is_for_training(numbers)
        assert len(numbers) < 3 or not is_for_training((*numbers, 1))
    for _ in range(500):
        assert is_held_out(parts_of(SIGNS.problem(rng, 3, held_out=True))[0])


# --------------------------------------------------------------------------------------- the rule


def test_the_rule_takes_any_signs_that_make_the_target():
    """Each number once and in order, as one word each; nothing beside them."""
    problem = SIGNS.ask((4, 3, 6), 6)
    for right in ("4 - 3 * 6", "4 * 3 - 6"):
        assert SIGNS.is_right(problem, right)
    wrong = (
        "4 + 3 + 6|4-3*6|4 - 3  * 6|3 - 4 * 6|4 - 3 * 6 +|+ 4 - 3 * 6|4 - 3 * 6 = 6|6|4 3 6||no way"
    )
    wrong += "|04 - 3 * 6|4 - 3 * 6 - 0|4 - 3|4 − 3 * 6|４ - 3 * 6|4 / 3 + 6|4\n- 3 * 6|4 - 3 * 6 "
    for text in wrong.split("|"):
        assert not SIGNS.is_right(problem, text), text
    assert SIGNS.is_right(SIGNS.ask((9, 9, 9), 99), NO_WAY)
    assert SIGNS.is_right(SIGNS.ask((9, 9, 9), 81 * 9), "9 * 9 * 9")


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_second_evaluator_agrees_on_random_text(data):
    """On signs between the right numbers, on numbers and signs in any order, on any text."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    problem = SIGNS.problem(rng, rng.randint(1, 4))
    numbers, target = parts_of(problem)
    words = st.sampled_from([*map(str, range(10)), *APPLY, "=", "", "10"])
    signs = st.lists(st.sampled_from(list(APPLY)), min_size=len(numbers), max_size=len(numbers))
    filled = signs.map(
        lambda xs: " ".join(w for pair in zip(map(str, numbers), xs) for w in pair)[:-2]
    )
    text = data.draw(st.one_of(filled, st.lists(words).map(" ".join), st.text()))
    assert SIGNS.is_right(problem, text) == evaluated(text, numbers, target)


@pytest.mark.parametrize("piece", ["9", "4 - ", "(", "4 ** ", "\ud800", "\0", "9 * 9 * "])
def test_hostile_text_of_any_size_earns_0_at_once(piece):
    problem = SIGNS.ask((4, 3, 6), 7)
    text = piece * 1_000_000
    assert RULES["accuracy"](f"<answer>{text}</answer>", problem) == 0
    assert not tries_of(problem, f"<think>{text}")
    assert not any(
        each.hits for each in tries_of(problem, f"<think>\n 7 : {text}\n 7 : 4 - 3 {text}")
    )


# ------------------------------------------------------------------------------------- as one types


def test_a_person_may_type_it_in_two_ways():
    problem = SIGNS.parse("make 7 from 4 3 6")
    assert problem.prompt == "User: make 7 from 4 3 6\nAssistant:" and problem.answer == "4 - 3 + 6"
    assert (problem.level, problem.language, problem.task) == (2, "en", "signs")
    for text in ("4 3 6 make 7", "  Make 07  from 4, 3, 6 ", "4,3,6 make 7?"):
        assert SIGNS.parse(text) == problem
    assert SIGNS.parse(SIGNS.example) == problem
    rng = random.Random(0)
    for level in LEVELS:
        problem = SIGNS.problem(rng, level)
        assert SIGNS.parse(problem.expression) == problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "4 3 6",
        "make 7",
        "make 7 from 4",
        "4 - 3 make 1",
        "make -1 from 4 3",
        "make 7 from" + " 1" * 10,
        "make 12345 from 4 3",
        "make 7 from 4 ٣",
    ],
)
def test_what_is_no_such_problem_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=re.escape(SIGNS.example)) as error:
        SIGNS.parse(text)
    assert "\n" not in str(error.value)


def test_a_person_is_told_what_no_training_had():
    for text, told in {
        "make 7 from 4 3 6": "",
        "make 7 from 4 3 6 1 1 1": "6 numbers, not 2 to 5",
        "make 17 from 14 3": "numbers beside 1 to 9",
        "make 81 from 9 9": "a target above 40",
        "make 2 from 9 9": "no signs make this target",
        "make 5 from 3 7 9": "a running total beside 0 to 40",
    }.items():
        assert SIGNS.outside(SIGNS.parse(text), LEVELS) == told, text


# -------------------------------------------------------------------------------------- documents


def test_styles_come_as_often_as_said(documents):
    styles = Counter(each.style for each in documents)
    for style, share in SHARES.items():
        assert styles[style] / len(documents) == pytest.approx(share, abs=0.02)
    for level in LEVELS:
        problems = [p for style in ("glib", "search") for p, _ in of_style(documents, style)]
        assert sum(p.level == level for p in problems) / len(problems) == pytest.approx(
            0.25, abs=0.02
        )


def test_no_document_goes_on_after_a_third_no(documents):
    """Nor after a "yes"; every shorter way to end is there."""
    ends = Counter()
    for _, each in of_style(documents, "search"):
        thought = re.fullmatch("<think>(.*)</think><answer> .*</answer>", each.text, re.DOTALL)[1]
        assert re.fullmatch(f"({LINE.pattern})+", thought)
        verdicts = [verdict for *_, verdict in LINE.findall(thought)]
        assert len(verdicts) <= SIGNS.most_tries == 3 and "yes" not in verdicts[:-1]
        ends[len(verdicts), verdicts[-1]] += 1
    assert set(ends) == {(n, verdict) for n in (1, 2, 3) for verdict in ("yes", "no")}
    gone_on = sum(count for (n, _), count in ends.items() if n > 1)
    assert gone_on / (gone_on + ends[1, "no"]) == pytest.approx(1 - SIGNS.give_up, abs=0.02)


def test_every_try_and_verdict_of_the_corpus_is_true(documents):
    """Told by Python's arithmetic; the last candidate is the answer, and none comes twice."""
    for problem, each in of_style(documents, "search"):
        numbers, target = parts_of(problem)
        tried = []
        for restated, tape, verdict in LINE.findall(each.text):
            assert int(restated) == target
            total, *steps = re.split(r" (?=[-+*])", tape)
            assert all(0 <= int(x) <= MAX_TOTAL for x in re.findall(r"= (\d+)", tape))
            for step in steps:
                made, result = step.split(" = ")
                assert eval(f"{total} {made}") == int(result)
                total = result
            tried.append(re.sub(r" = \d+", "", tape))
            assert [int(x) for x in tried[-1].split(" ")[::2]] == list(numbers)
            assert (verdict == "yes") == (int(total) == target)
        assert len(set(tried)) == len(tried) and extract_answer(each.text) == tried[-1]


def test_glib_answers_are_candidates_and_mostly_wrong(documents):
    right = []
    for problem, each in of_style(documents, "glib"):
        assert extract_answer(each.text) in candidates(parts_of(problem)[0])
        right.append(RULES["accuracy"](each.text, problem))
    assert 0.1 < sum(right) / len(right) < 0.35


def test_tables_tell_true_facts(documents):
    kinds = Counter()
    for each in documents:
        if each.style == "facts":
            assert each.question == ""
            for fact in each.text.removesuffix(".").split(","):
                if found := re.fullmatch(r" (\d+) : (\d+) (yes|no)", fact):
                    kinds[found[3]] += 1
                    assert (found[1] == found[2]) == (found[3] == "yes")
                else:
                    made, result = re.fullmatch(r" (\d+ [-+*] [1-9]) = (\d+)", fact).groups()
                    assert eval(made) == int(result) <= MAX_TOTAL
                    kinds["sum"] += 1
    assert kinds["yes"] / kinds["no"] == pytest.approx(1, abs=0.1)
    assert (kinds["yes"] + kinds["no"]) / kinds.total() == pytest.approx(0.4, abs=0.03)


def test_no_document_works_out_a_held_out_list(documents):
    """Nor a longer list that opens with one, of three numbers or more."""
    for style in ("glib", "search"):
        for problem, each in of_style(documents, style):
            assert not is_held_out(parts_of(problem)[0])
            tapes = [tape for _, tape, _ in LINE.findall(each.text)]
            for tape in (*tapes, extract_answer(each.text)):
                worked = [int(x) for x in re.findall(r"\d+", re.sub(r" = \d+", "", tape))]
                for end in range(3, len(worked) + 1):
                    assert not is_held_out(worked[:end])


def test_each_word_is_one_token_and_the_longest_is_longest(documents):
    room = {level: len(encode_document(SIGNS.longest(level), tokenizer)[1]) for level in LEVELS}
    for style in ("glib", "search"):
        for problem, each in of_style(documents, style):
            _, ids = encode_document(each, tokenizer)
            assert all(i >= 256 or i in b"\n" for i in ids)
            assert len(ids) <= room[problem.level]


# --------------------------------------------------------------------------------------- thoughts

MAKE_7 = SIGNS.ask((4, 3, 6), 7)
TRUE_MISS = Try("4 - 3 * 6", "no", True, True, True, False, False)


@pytest.mark.parametrize(
    "line, expected",
    [
        (" 7 : 4 - 3 = 1 * 6 = 6 no", TRUE_MISS),
        (" 7 : 4 - 3 = 1 + 6 = 7 yes", Try("4 - 3 + 6", "yes", True, True, True, True, False)),
        # A hit that is called a miss, and a miss that is called a hit.
        (" 7 : 4 - 3 = 1 + 6 = 7 no", Try("4 - 3 + 6", "no", True, True, False, True, False)),
        (" 7 : 4 - 3 = 1 * 6 = 6 yes", Try("4 - 3 * 6", "yes", True, True, False, False, False)),
        # A slip: the verdict is true of what is written.
        (" 7 : 4 - 3 = 1 * 6 = 7 yes", Try("4 - 3 * 6", "yes", True, False, True, False, False)),
        (" 7 : 4 - 3 = 2 + 6 = 8 no", Try("4 - 3 + 6", "no", True, False, True, True, False)),
        # Another target, another number, a number less.
        (" 6 : 4 - 3 = 1 * 6 = 6 yes", Try("4 - 3 * 6", "yes", False, True, False, False, False)),
        (" 7 : 4 - 3 = 1 + 5 = 6 no", Try("4 - 3 + 5", "no", False, True, True, False, False)),
        (" 7 : 4 + 3 = 7 yes", Try("4 + 3", "yes", False, True, True, False, False)),
        (" 7 : 4 no", Try("", "no", False, False, False, False, False)),
        (" easy", Try("", "", False, False, False, False, False)),
    ],
)
def test_a_thought_is_read_try_by_try(line, expected):
    (found,) = tries_of(MAKE_7, f"<think>\n{line}</think><answer> 4 - 3 + 6</answer>")
    assert found == expected


def test_a_repeated_try_and_one_that_is_cut_are_known():
    """A thought cut within a line did not try it; a thought without lines tries nothing."""
    line = "\n 7 : 4 - 3 = 1 * 6 = 6 no"
    tries = tries_of(MAKE_7, f"<think>{line}{line}{line}\n 7 : 4 - 3")
    assert [each.repeated for each in tries] == [False, True, True] and tries[0] == TRUE_MISS
    assert tries_of(MAKE_7, f"<think>{line}") == [TRUE_MISS]
    for text in ("<think> easy</think><answer> 4 + 3 + 6</answer>", "", line):
        assert not tries_of(MAKE_7, text)


def test_measures_are_of_each_completion():
    miss, hit = "\n 7 : 4 - 3 = 1 * 6 = 6 no", "\n 7 : 4 - 3 = 1 + 6 = 7 yes"
    ends = "</think><answer> 4 - 3 + 6</answer>"
    shares = {"worked_out_right": 1.0, "verdicts_true": 1.0, "tried_before": 0.0}
    for thought, expected in {
        miss + hit + ends: {"tries": 2.0, "gives_up": 0.0} | shares,
        miss + miss + ends: {"tries": 2.0, "gives_up": 1.0} | shares | {"tried_before": 0.5},
        miss + "\n 7 : 4 + 3 = 8 + 6 = 14 yes": {"tries": 2.0, "gives_up": 0.0}
        | shares
        | {"worked_out_right": 0.5, "verdicts_true": 0.5},
        miss + miss: {"tries": 2.0, "gives_up": 0.0} | shares | {"tried_before": 0.5},
        " easy" + ends: {"tries": 0.0},
    }.items():
        assert SIGNS.measures(MAKE_7, f"<think>{thought}") == expected


def test_documents_read_as_they_were_written(documents):
    """Measured, a document of the corpus is right in all it says."""
    for problem, each in of_style(documents, "search"):
        measures = SIGNS.measures(problem, each.text)
        assert measures["worked_out_right"] == measures["verdicts_true"] == 1
        assert measures["tried_before"] == 0 and 1 <= measures["tries"] <= 3
        assert measures["gives_up"] == 1 - RULES["accuracy"](each.text, problem)
        assert format_reward(each.text) == 1


def test_more_tries_are_a_setting():
    """What an experiment varies: the most tries of a document, and the chance to give up."""
    rng, task = random.Random(0), Signs(most_tries=5, give_up=0.0)
    counts = Counter(task.document(rng, [4]).text.count("\n") for _ in range(500))
    assert max(counts) == 5 and counts[5] > 150
