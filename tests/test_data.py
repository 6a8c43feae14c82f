"""Problems, documents and tokens: the web in miniature is what it says it is."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.arithmetic import APPLY, CHAINS, HELD_OUT, Task, is_held_out, make_problem, parse_problem, write_problem
from data.corpus import (
    GUESS,
    LANGUAGE_SHARES,
    SHARES,
    SLIP,
    SMALL_TEXT,
    SWITCH,
    TAGGED,
    document,
    longest_document,
    small_text,
)
from data.languages import LANGUAGES, language_of
from data.tokenizer import MAX_STEP, TAGS, get_tokenizer
from rewards import extract_answer, format_reward

LEVELS = range(2, 6)
STEP = re.compile(r"\n#(\d+) (\d+) (\w+) (\d+) (?:is|은) (\d+)( ok| wait (\d+)| 맞아| 잠깐 (\d+))?")
ROOM = 160
TWO = Task("+-*", 99, ("en", "ko"))
SIGNS = {word: sign for language in LANGUAGES.values() for sign, word in language.operators.items()}
tokenizer = get_tokenizer()


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(1)
    return [document(rng, LEVELS) for _ in range(20_000)]


@pytest.fixture(scope="module")
def two_languages():
    """With all three operators."""
    rng = random.Random(2)
    return [document(rng, LEVELS, TWO, ROOM) for _ in range(20_000)]


def expression_of(question):
    return " ".join(SIGNS.get(word, word) for word in re.findall(r"\w+", question) if word in SIGNS or word.isdigit())


def value_of(expression):
    """The value of a chain, worked from left to right."""
    first, *rest = expression.split(" ")
    value = first
    for sign, operand in zip(rest[::2], rest[1::2]):
        value = f"({value} {sign} {operand})"
    return eval(value)


@pytest.mark.parametrize("task", [CHAINS, TWO])
def test_problems_have_their_level_their_answer_and_small_totals(task):
    rng, signs = random.Random(0), set()
    for level in range(1, 9):
        for language in task.languages:
            for _ in range(50):
                problem = make_problem(rng, level, task, language=language)
                parts = problem.expression.split(" ")
                assert problem.level == level == len(parts) // 2
                assert problem.answer == str(value_of(problem.expression))
                for end in range(1, len(parts) + 1, 2):
                    assert 0 <= value_of(" ".join(parts[:end])) <= task.max_total
                assert expression_of(problem.prompt) == problem.expression
                assert (problem.language, language_of(problem.prompt)) == (language, language)
                signs |= set(parts[1::2])
    assert signs == set(task.operators)


def test_a_chain_is_worked_from_left_to_right_in_either_language():
    assert write_problem("1 + 2 * 3").answer == write_problem("1 + 2 * 3", "ko").answer == "9"
    assert write_problem("1 + 2 * 3").prompt == "User: what is 1 plus 2 times 3?\nAssistant:"
    assert write_problem("1 + 2 * 3", "ko").prompt == "User: 1 더하기 2 곱하기 3 은 얼마?\nAssistant:"


def test_training_and_held_out_problems_are_disjoint_and_both_are_made():
    rng = random.Random(0)
    train = {make_problem(rng, 2).expression for _ in range(4000)}
    held_out = {make_problem(rng, 2, held_out=True).expression for _ in range(400)}
    assert len(train) > 500
    assert len(held_out) > 50
    assert not train & held_out
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))


def test_one_expression_in_ten_is_held_out():
    rng = random.Random(0)
    expressions = {make_problem(rng, 5, held_out=held_out).expression for held_out in (False, True) for _ in range(10)}
    random_ones = [" + ".join(str(rng.randint(1, 9)) for _ in range(6)) for _ in range(5000)]
    assert sum(map(is_held_out, random_ones)) == pytest.approx(5000 / HELD_OUT, rel=0.2)
    assert len(expressions) == 20


def test_no_document_holds_a_held_out_problem(documents, two_languages):
    """Neither as its question nor as the opening of one, which its steps would work out on the way."""
    asked = [expression_of(written.question).split(" ") for written in documents + two_languages if written.question]
    assert len(asked) > 30_000
    for parts in asked:
        for end in range(5, len(parts) + 1, 2):
            assert not is_held_out(" ".join(parts[:end])), parts


def test_styles_have_their_shares(documents):
    counts = Counter(written.style for written in documents)
    for shares in SHARES.values():
        assert sum(shares.values()) == pytest.approx(1)
    for style, share in SHARES["en"].items():
        assert counts[style] / len(documents) == pytest.approx(share, rel=0.1)
    for style in set(SHARES["en"]) - {"other"}:  # what reinforcement learning samples is the mix within the tags
        texts = [written.text for written in documents if written.style == style]
        assert sum(map(format_reward, texts)) / len(texts) == pytest.approx(TAGGED, abs=0.06)


def given_and_right(documents, style):
    """The last number of each document, and the value of its problem."""
    for written in documents:
        if written.style == style:
            yield re.findall(r"\d+", written.text)[-1], str(value_of(expression_of(written.question)))


def test_clean_and_checked_steps_are_right_and_direct_answers_as_often_wrong(documents, two_languages):
    for style in ("steps", "checked"):
        assert all(given == right for given, right in given_and_right(documents + two_languages, style))
    wrong = [given != right for given, right in given_and_right(documents, "direct")]
    assert sum(wrong) / len(wrong) == pytest.approx(GUESS, abs=0.05)


def test_steps_follow_the_problem_and_slips_are_mended_where_they_are_checked(documents, two_languages):
    slips = Counter()
    for written in documents + two_languages:
        if written.style in ("direct", "other"):
            continue
        parts = expression_of(written.question).split(" ")
        total, steps = int(parts[0]), list(STEP.finditer(written.text))
        assert len(steps) == len(parts) // 2
        for number, step in enumerate(steps, 1):
            index, before, word, operand, said, verdict, *mended = step.groups()
            assert (int(index), int(before)) == (number, total)
            assert (SIGNS[word], operand) == (parts[2 * number - 1], parts[2 * number])
            right = max(0, APPLY[SIGNS[word]](total, int(operand)))
            slipped, language = int(said) != right, language_of(step[0])
            if language_of(steps[-1][0]) == language:  # the slips are those of the language that it goes over to
                slips[language, written.style, slipped] += 1
            if written.style == "checked":
                spoken = LANGUAGES[language]
                assert verdict == (f" {spoken.wrong} {right}" if slipped else f" {spoken.right}")
            else:
                assert verdict is None
            total = int(next(filter(None, mended), said))
        assert re.findall(r"\d+", written.text)[-1] == str(total)
    for language in SLIP:
        assert slips[language, "steps", True] == 0
        for style in ("slips", "checked"):
            share = slips[language, style, True] / (slips[language, style, True] + slips[language, style, False])
            assert 0.7 * SLIP[language] < share < 1.1 * SLIP[language]  # a slip below 0 becomes 0, which may be right


def test_languages_have_their_shares_and_some_documents_go_over_to_the_other(two_languages):
    asked = [language_of(written.question) for written in two_languages if written.question]
    assert asked.count("ko") / len(asked) == pytest.approx(LANGUAGE_SHARES["ko"], rel=0.05)
    kinds = Counter()
    for written in two_languages:
        if written.style in ("steps", "slips", "checked"):
            languages = [language_of(step[0]) for step in STEP.finditer(written.text)]
            changes = sum(one != two for one, two in zip([language_of(written.question), *languages], languages))
            assert changes <= 1
            kinds[written.question != "" and language_of(written.question), changes] += 1
    styles = SHARES["en"]["steps"] + SHARES["en"]["slips"] + SHARES["en"]["checked"]
    others = SHARES["ko"]["steps"] + SHARES["ko"]["slips"] + SHARES["ko"]["checked"]
    gone_over = kinds["ko", 1] / (kinds["ko", 0] + kinds["ko", 1])
    ratio = SWITCH["ko"] / (1 - SWITCH["ko"]) * styles / others
    assert gone_over == pytest.approx(ratio / (1 + ratio), rel=0.05)
    assert kinds["en", 1] > 20


def test_every_index_occurs_and_texts_fill_the_context_but_never_exceed_it(two_languages):
    """A chain longer than any in the corpus can at least be written down."""
    lengths = Counter()
    for written in two_languages:
        question, text = tokenizer.encode(written.question), tokenizer.encode(written.text, tags=True)
        lengths[len(question) + len(text) + 1] += 1
    assert 0.7 * ROOM < max(lengths) <= ROOM
    text = "".join(written.text for written in two_languages)
    assert all(f"\n#{index} " in text for index in range(1, MAX_STEP + 1))
    longest = max((small_text(random.Random(i), CHAINS, "en") for i in range(20_000)), key=len)
    assert len(tokenizer.encode(longest)) + 1 <= SMALL_TEXT  # a line break or the end token comes after it


@pytest.mark.parametrize("task", [CHAINS, TWO])
def test_the_longest_document_is_at_least_as_long_as_any(task, documents, two_languages):
    longest = longest_document(LEVELS[-1], task)
    limit = len(tokenizer.encode(longest.question)) + len(tokenizer.encode(longest.text, tags=True))
    for written in two_languages if task == TWO else documents:
        if written.question:
            assert len(tokenizer.encode(written.question)) + len(tokenizer.encode(written.text, tags=True)) <= limit


def test_tagged_documents_can_be_read_by_the_rules(documents):
    tagged = [written.text for written in documents if "<answer>" in written.text]
    assert all(extract_answer(text) for text in tagged)
    assert all(format_reward(text) for text in tagged)


def test_documents_come_back_from_their_tokens_and_every_word_is_one_token(documents, two_languages):
    for written in documents[:3000] + two_languages[:3000]:
        for text, tags in ((written.question, False), (written.text, True)):
            ids = tokenizer.encode(text, tags=tags)
            assert tokenizer.decode(ids) == text
            assert all(i >= 256 or bytes([i]) in b"?.,\n 0123456789" for i in ids), text


@settings(max_examples=500, deadline=None)
@given(st.text())
def test_any_text_comes_back_from_its_tokens(text):
    for tags in (False, True):
        assert tokenizer.decode(tokenizer.encode(text, tags=tags)) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "<eos>", "<pad>", "hi", " "]), max_size=6).map("".join))
def test_text_from_users_never_becomes_a_special_token(text):
    special = {tokenizer.encode(tag, tags=True)[0] for tag in TAGS} | {tokenizer.eos_id, tokenizer.pad_id}
    assert len(special) == 6
    assert not special & set(tokenizer.encode(text))
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokenizer.encode(text, tags=True))


def test_end_and_padding_are_different_tokens_inside_the_vocabulary():
    assert tokenizer.eos_id != tokenizer.pad_id
    assert max(tokenizer.eos_id, tokenizer.pad_id) < tokenizer.vocab_size


@pytest.mark.parametrize(
    "text", ["7 + 8 - 3", "7+8-3", " what is 7 plus 8 minus 3? ", "7 plus 8 - 3", "What is 7 + 8 - 3"]
)
def test_problems_that_people_type_are_understood(text):
    problem = parse_problem(text)
    assert problem.prompt == "User: what is 7 plus 8 minus 3?\nAssistant:"
    assert (problem.answer, problem.level, problem.language) == ("12", 2, "en")


@pytest.mark.parametrize(
    "text",
    ["7 + banana", "", "7", "7 +", "7 + + 8", "7 8", "7 / 8", "-7 + 8", "7.5 + 1", "٣ + 4", "7_8 + 1", "what is",
     "9" * 5000 + " + 1", "<think> + 1", "__import__('os')"],
)  # fmt: skip
def test_text_that_is_no_problem_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match='write a chain such as "7 \\+ 8 - 3"') as error:
        parse_problem(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 150


@settings(deadline=None)
@given(st.text() | st.text("79+- \n\t?x"))
def test_no_text_raises_anything_but_value_error(text):
    try:
        problem = parse_problem(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert problem.answer == str(eval(problem.expression))
