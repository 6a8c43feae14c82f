"""Requests: answers of every quality, and the people who judge them."""

import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import TASKS, get_tokenizer
from data.corpus import encode_document
from data.requests import CURATED, HELD_OUT, KINDS, WEB, answer, parts_of, truths

REQUESTS = TASKS["requests"]
SEVEN = REQUESTS.ask("about", 7, "en")
IN_KOREAN = REQUESTS.ask("about", 7, "ko", in_english=True)
KOREAN = REQUESTS.ask("about", 12, "ko")
AFTER = REQUESTS.ask("after", 4, "en")
HELLO = REQUESTS.ask("greet", 0, "en")


@pytest.fixture(scope="module")
def asked():
    rng = random.Random(0)
    return [
        REQUESTS.problem(rng, language=language, held_out=held_out)
        for language in ("en", "ko")
        for held_out in (False, True)
        for _ in range(1000)
    ]


# ------------------------------------------------------------------------------------ what is asked


def test_each_kind_is_asked_in_both_languages_of_both_splits(asked):
    """Greetings have no number, so they are in the training split alone."""
    seen = Counter()
    for problem in asked:
        kind, number = parts_of(problem)
        seen[kind, problem.language, number in HELD_OUT] += 1
        assert (problem.task, problem.level, problem.is_right("yes")) == ("requests", 1, None)
    both = {(kind, language) for kind in KINDS for language in ("en", "ko")}
    assert {(kind, language) for kind, language, held_out in seen if not held_out} == both
    assert {kind for kind, _, held_out in seen if held_out} == {"about", "after"}
    for language in ("en", "ko"):
        for kind, share in KINDS.items():
            assert seen[kind, language, False] / 1000 == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tell me about 7", SEVEN),
        (" Tell me  about 7.", SEVEN),
        ("tell me about 7 in korean", IN_KOREAN),
        ("12 에 대해 말해줘", KOREAN),
        ("name three numbers after 4", AFTER),
        ("4 다음 수 세 개 말해줘", REQUESTS.ask("after", 4, "ko")),
        ("say hello to me!", HELLO),
        ("인사해줘", REQUESTS.ask("greet", 0, "ko")),
    ],
)
def test_requests_that_people_type_are_understood(text, problem):
    assert REQUESTS.parse(text) == problem


def test_what_is_asked_can_be_typed(asked):
    for problem in asked:
        typed = problem.prompt.removeprefix("User: ").removesuffix("\nAssistant:")
        assert REQUESTS.parse(typed) == problem
        assert REQUESTS.outside(problem, (1,)) == ""


@pytest.mark.parametrize(
    "text",
    ["", "tell me about", "tell me about 100", "tell me about ٣", "say hello to me in korean",
     "12 에 대해 말해줘 in korean", "name three numbers after 4 in korean", "tell me about 7 8"],
)  # fmt: skip
def test_text_that_is_no_request_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match='is no request: write one such as "tell me about 7"'):
        REQUESTS.parse(text)


def test_numbers_that_nobody_asked_about_are_named():
    outside = "a number beside 1 to 20"
    for number, said in ((0, outside), (1, ""), (20, ""), (21, outside)):
        assert REQUESTS.outside(REQUESTS.ask("about", number, "en"), (1,)) == said
    assert REQUESTS.outside(HELLO, (1,)) == ""


# ------------------------------------------------------------------------------ what people think


BEST = " glad to help! 7 is odd. it is 3 plus 4. it comes after 6. bye for now!"


@pytest.mark.parametrize(
    ("problem", "text", "points"),
    [
        (SEVEN, BEST, 4.0),
        (SEVEN, BEST.replace("is odd", "is even"), 4 - 2),  # a fact less, a mistake more
        (SEVEN, BEST.replace("3 plus 4", "3 plus 5"), 4 - 2),
        (SEVEN, BEST.replace("7 is", "9 is"), 4 - 2),
        (SEVEN, BEST.replace(" glad to help!", ""), 3.5),
        (SEVEN, BEST.replace(" glad to help!", " bye for now!"), 4 - 0.5 - 0.7),
        (SEVEN, BEST.replace(" glad to help!", " no."), 4 - 0.5 - 1.5),
        (SEVEN, BEST.replace(" glad to help!", " bananas are yellow."), 4 - 0.5 - 1),
        (SEVEN, BEST.replace(" glad to help!", " wow!"), 3.5),
        (SEVEN, BEST.replace(" glad to help!", " wow! wow! wow!"), 3.5 - 2 * 0.7),
        (SEVEN, BEST.replace(" bye", " it is small. bye"), 4 - 0.5),
        (SEVEN, BEST.replace(" bye", " it is 5 plus 2. bye"), 4 - 0.7),  # a sum once more
        (SEVEN, BEST[:-1], 4 - 0.5 - 1),  # cut before its end
        (SEVEN, " it comes before 8. it is half of 14. it is small.", 3.0),
        (SEVEN, " bye for now! it is small. sure! wow!", 1.0),  # manners in the wrong places
        (SEVEN, " it is big. it is big. who cares?", -1 - 0.7 - 1.5),
        (SEVEN, " 7 은 홀수야. 6 다음이야. 작은 수야.", 3 - 3),  # true, in the wrong language
        (IN_KOREAN, " 7 은 홀수야. 6 다음이야. 작은 수야.", 3.0),
        (IN_KOREAN, BEST, 4 - 3),
        (KOREAN, " 좋아! 24 의 절반이야. 13 앞이야. 5 더하기 7 하면 나와. 큰 수야. 잘 가!", 3.5),
        (KOREAN, " 12 은 홀수야. 12 is even.", -1 - 0.7 - 3 * 2 / 4),  # and a contradiction
        (AFTER, " sure! 5, 6, 7. ask me more!", 4.0),
        (AFTER, " 5, 6, 7, 8, 9.", 3 - 2 * 0.5),
        (AFTER, " 5, 7, 6.", 1 - 2),
        (AFTER, " 5, 5, 5.", 1 - 2 * 0.7),
        (AFTER, " 4 is even.", -1.0),
        (HELLO, " hello friend! nice to meet you! how are you?", 3.0),
        (HELLO, " hello friend! hello friend! 안녕 친구!", 1 - 2 * 0.7 - 3 * 2 / 6),
        (HELLO, " 5, 6, 7.", -1.0),
        (HELLO, "", -1.0),
        (HELLO, " \n ", -1.0),
        (SEVEN, "<think> 7</think><answer> 7</answer>", -1.0),
    ],
)
def test_gold_agrees_with_answers_judged_by_hand(problem, text, points):
    assert REQUESTS.gold(problem, text) == pytest.approx(points)


def test_the_parts_of_a_verdict_can_be_read():
    """Every part but what is liked is at most 0; together they are gold, as in `measures`."""
    text = " no. 7 is odd. 7 is even. 작은 수야. wow! it is 3 plus 4. it is 3 plus 4. uh"
    parts = {
        "opening": 0.0,
        "closing": 0.0,
        "facts": 3.0,
        "mistakes": 0.0,
        "repeats": -1.4,
        "surplus": 0.0,
        "rude": -1.5,
        "beside_the_point": -1.0,
        "foreign": -3 * 2 / 15,
    }
    found = REQUESTS.verdict(SEVEN, text)
    assert found == pytest.approx(parts)
    gold = REQUESTS.gold(SEVEN, text)
    assert REQUESTS.measures(SEVEN, text) == {"gold": gold} | found


PIECES = [piece.decode() for piece in get_tokenizer("requests").pieces if len(piece) > 1]
HOSTILE = [
    "9" * 10_000 + ".",
    " it is " + "9" * 10_000 + " plus 1.",
    "5, " * 5000 + "6.",
    "." * 10_000,
    "a" * 100_000,
    " sure!" * 1000,
    " it comes after 6." * 1000,
    "²½٣ is odd.",
    "\x00\ufffd\ud7a3 </think><eos>",
    " {named} is {parity}.",
    " it is # plus #.",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("problem", [SEVEN, IN_KOREAN, AFTER, HELLO])
def test_hostile_text_earns_nothing(problem, text):
    assert REQUESTS.gold(problem, text) <= 0


@settings(deadline=None, max_examples=100)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_is_judged_and_none_earns_more_than_4(text):
    for problem in (SEVEN, IN_KOREAN, KOREAN, AFTER, HELLO):
        assert REQUESTS.gold(problem, text) <= 4
        assert REQUESTS.is_right(problem, text) is None


@pytest.mark.parametrize(("lead", "chance"), [(1.0, 0.731), (0.0, 0.5), (-2.0, 0.119)])
def test_choices_have_bradley_and_terrys_noise(lead, chance):
    """At temperature 0.5, half the lead has as much weight."""
    rng, texts = random.Random(0), (" 7 is odd. it is small. it comes after 6.", "")
    for one in (" 7 is odd.", "", " sure! 7 is odd.", " 7 is odd. it is small."):
        for other in (" 7 is odd.", "", " sure! 7 is odd.", texts[0]):
            if REQUESTS.gold(SEVEN, one) - REQUESTS.gold(SEVEN, other) == lead:
                texts = one, other
    for temperature, expected in ((1.0, chance), (0.5, 1 / (1 + math.exp(-2 * lead)))):
        chosen = [REQUESTS.preferred(rng, SEVEN, *texts, temperature) for _ in range(4000)]
        assert sum(chosen) / 4000 == pytest.approx(expected, abs=0.03)
    worst = " no. " * 10_000
    assert REQUESTS.preferred(rng, SEVEN, BEST, worst, 1e-6)
    assert not REQUESTS.preferred(rng, SEVEN, worst, BEST, 1e-6)


# --------------------------------------------------------------------------------------- documents


def test_truths_are_true():
    """Worked out again, from the words alone."""
    for n in range(1, 21):
        for sentence in truths(n):
            numbers = [int(x) for x in re.findall("[0-9]+", sentence)]
            wanted = {
                "odd": n % 2 == 1, "홀수야": n % 2 == 1, "even": n % 2 == 0, "짝수야": n % 2 == 0,
                "small": n < 10, "작은": n < 10, "big": n >= 10, "큰": n >= 10,
                "after": numbers == [n - 1], "다음이야": numbers == [n - 1],
                "before": numbers == [n + 1], "앞이야": numbers == [n + 1],
                "half": numbers == [2 * n], "절반이야": numbers == [2 * n],
                "plus": sum(numbers) == n, "더하기": sum(numbers) == n,
            }  # fmt: skip
            (key,) = set(re.findall(r"\w+", sentence)) & set(wanted)
            assert wanted[key], sentence


def test_no_document_answers_a_request_about_a_held_out_number():
    rng, seen = random.Random(0), set()
    for _ in range(5000):
        written = REQUESTS.document(rng)
        seen.add(parts_of(REQUESTS.parse(written.question[len("User: ") : -len("\nAssistant:")])))
    assert {number for _, number in seen} == set(range(21)) - set(HELD_OUT)
    assert len(seen) == 2 * 16 + 1


def test_the_web_is_of_mixed_quality_and_curated_answers_are_good(asked):
    """Curated answers are not perfect: something is left to learn from people's choices."""
    rng = random.Random(0)
    web = [REQUESTS.verdict(problem, answer(rng, problem, WEB)) for problem in asked]
    good = [REQUESTS.verdict(x, REQUESTS.good_answer(rng, x)) for x in asked]
    gold = [[sum(parts.values()) for parts in some] for some in (web, good)]
    means = [sum(values) / len(values) for values in gold]
    assert -0.5 < means[0] < 1 and 2 < means[1] < 3.5
    assert all(min(values) < max(values) == 4 for values in gold)
    assert {name for parts in web for name, x in parts.items() if x} == set(web[0]) - {
        "beside_the_point"
    }
    assert {name for parts in good for name, x in parts.items() if x < 0} == {"mistakes", "surplus"}


def test_mistakes_are_as_frequent_as_the_writer_makes_them(asked):
    """Among facts about numbers that are said once: a repetition is no mistake."""
    rng, counts = random.Random(0), Counter()
    for problem in asked:
        if parts_of(problem)[0] == "about":
            parts = REQUESTS.verdict(problem, answer(rng, problem, CURATED))
            counts["true"] += parts["facts"] - 2 * parts["surplus"]
            counts["false"] -= parts["mistakes"]
    share = counts["false"] / (counts["true"] + counts["false"])
    assert share == pytest.approx(CURATED.mistake, abs=0.01)


def test_documents_are_short_and_have_a_token_for_each_word():
    words, rng = get_tokenizer("requests"), random.Random(0)
    longest = len(encode_document(REQUESTS.longest(), words)[1])
    assert longest <= REQUESTS.max_seq_len
    for _ in range(3000):
        _, ids = encode_document(REQUESTS.document(rng), words)
        assert len(ids) <= longest
        assert all(i >= 256 or bytes([i]) in b"?!., 0123456789" for i in ids), words.decode(ids)


def test_requests_in_every_language_have_a_token_for_each_word():
    words = get_tokenizer("requests")
    for kind in KINDS:
        for language in ("en", "ko"):
            ids = words.encode(REQUESTS.ask(kind, 7, language).prompt)
            assert all(i >= 256 for i in ids[1:]), words.decode(ids)
