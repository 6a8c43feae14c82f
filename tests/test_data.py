"""Problems, documents and tokens: the web in miniature is what it says it is."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.arithmetic import (
    APPLY,
    CHAINS,
    HELD_OUT,
    Task,
    is_held_out,
    parse_problem,
    random_operation,
    write_problem,
)
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
from data.problem import sample_problems, stream
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
    words = (SIGNS.get(word, word) for word in re.findall(r"\w+", question))
    return " ".join(word for word in words if word in APPLY or word.isdigit())


def token_count(written):
    """Tokens of a document, its question included and the end token not."""
    question, text = tokenizer.encode(written.question), tokenizer.encode(written.text, tags=True)
    return len(question) + len(text)


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
                problem = task.problem(rng, level, language=language)
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
    english, korean = write_problem("1 + 2 * 3"), write_problem("1 + 2 * 3", "ko")
    assert english.answer == korean.answer == "9"
    assert english.prompt == "User: what is 1 plus 2 times 3?\nAssistant:"
    assert korean.prompt == "User: 1 더하기 2 곱하기 3 은 얼마?\nAssistant:"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"operators": "+*"}, "--operators +* must be of +-"),
        ({"operators": "+-/"}, "--operators +-/ must be of +-"),
        ({"operators": ""}, "--operators  must be of +-"),
        ({"languages": ("en", "fr")}, "--languages en,fr must be of en,ko, each at most once"),
        ({"languages": ("en", "en")}, "--languages en,en must be of en,ko, each at most once"),
        ({"languages": ("",)}, "--languages  must be of en,ko"),
        ({"max_total": 16}, "--max_total must be from 17 to 99, not 16"),
        ({"max_total": 100}, "--max_total must be from 17 to 99, not 100"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(settings, complaint):
    with pytest.raises(ValueError, match="^" + re.escape(complaint)) as error:
        Task(**settings)
    assert "\n" not in str(error.value)


def test_an_operator_that_a_language_has_no_word_for_is_refused(monkeypatch):
    """Only the languages of the task need the word."""
    monkeypatch.delitem(LANGUAGES["ko"].operators, "*")
    Task("+-*", 99, ("en",))
    Task("+-", 99, ("en", "ko"))
    with pytest.raises(ValueError, match="has no word for one of them in ko"):
        Task("+-*", 99, ("en", "ko"))


@pytest.mark.parametrize("operators", ["+-", "+-*"])
def test_at_the_least_limit_every_total_allows_an_operation(operators):
    """Whatever the operand is; choosing among no operators would raise."""
    task = Task(operators, 17)
    for total in range(18):
        drawn = [random_operation(random.Random(seed), total, task) for seed in range(100)]
        assert {operand for _, operand in drawn} == set(range(1, 10))
        assert all(0 <= APPLY[operator](total, operand) <= 17 for operator, operand in drawn)


def test_levels_and_languages_take_turns_over_several_calls():
    """Problems are drawn in parts, and each level in each language comes as often."""
    turns = [(level, language) for level in (2, 3, 4) for language in ("en", "ko")]
    parts = [
        sample_problems(stream(0, "turns", step), TWO, (2, 3, 4), 5, first=5 * step)
        for step in range(6)
    ]
    drawn = [(problem.level, problem.language) for part in parts for problem in part]
    assert drawn == 5 * turns
    assert not any(is_held_out(problem.expression) for part in parts for problem in part)
    held_out = sample_problems(stream(0, "turns"), TWO, (2, 3, 4), 12, held_out=True)
    assert all(is_held_out(problem.expression) for problem in held_out)


def test_random_numbers_depend_on_seed_purpose_and_step_alone():
    drawn = [stream(*key).random() for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 1))]
    assert len(set(drawn)) == 4
    assert stream(0, "a", 0).random() == drawn[0]


def test_training_and_held_out_problems_are_disjoint():
    """And problems of both are made."""
    rng = random.Random(0)
    train = {CHAINS.problem(rng, 2).expression for _ in range(4000)}
    held_out = {CHAINS.problem(rng, 2, held_out=True).expression for _ in range(400)}
    assert len(train) > 500
    assert len(held_out) > 50
    assert not train & held_out
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))


def test_one_expression_in_ten_is_held_out():
    rng = random.Random(0)
    expressions = [" + ".join(str(rng.randint(1, 9)) for _ in range(6)) for _ in range(5000)]
    assert sum(map(is_held_out, expressions)) == pytest.approx(5000 / HELD_OUT, rel=0.2)


def test_no_document_holds_a_held_out_problem(documents, two_languages):
    """Neither as its question nor as an opening of its question, which its steps would work out."""
    questions = [written.question for written in documents + two_languages if written.question]
    asked = [expression_of(question).split(" ") for question in questions]
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
    # Within the tags the mix of styles is the same: reinforcement learning samples from that mix.
    for style in set(SHARES["en"]) - {"other"}:
        texts = [written.text for written in documents if written.style == style]
        assert sum(map(format_reward, texts)) / len(texts) == pytest.approx(TAGGED, abs=0.06)


def given_and_right(documents, style):
    """The last number of each document, and the value of its problem."""
    for written in documents:
        if written.style == style:
            right = value_of(expression_of(written.question))
            yield int(re.findall(r"\d+", written.text)[-1]), right


def test_clean_and_checked_steps_are_right_guesses_often_not(documents, two_languages):
    """Direct answers are wrong as often as they should be."""
    for style in ("steps", "checked"):
        pairs = list(given_and_right(documents + two_languages, style))
        assert len(pairs) > 1000
        assert all(given == right for given, right in pairs)
    wrong = [given != right for given, right in given_and_right(documents, "direct")]
    assert sum(wrong) / len(wrong) == pytest.approx(GUESS, abs=0.05)


def test_steps_follow_the_problem_and_checked_slips_are_mended(documents, two_languages):
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
            # A document has the slips of the language that it goes over to.
            if language_of(steps[-1][0]) == language:
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
            wrong, right = (slips[language, style, slipped] for slipped in (True, False))
            # The share is a little lower: a slip below 0 becomes 0, which may be right.
            assert 0.7 * SLIP[language] < wrong / (wrong + right) < 1.1 * SLIP[language]


def test_languages_have_their_shares_and_some_documents_switch(two_languages):
    asked = [language_of(written.question) for written in two_languages if written.question]
    assert asked.count("ko") / len(asked) == pytest.approx(LANGUAGE_SHARES["ko"], rel=0.05)
    kinds = Counter()
    for written in two_languages:
        if written.style in ("steps", "slips", "checked"):
            asked_in = language_of(written.question)
            languages = [language_of(step[0]) for step in STEP.finditer(written.text)]
            changes = sum(one != two for one, two in zip([asked_in, *languages], languages))
            assert changes <= 1
            kinds[asked_in, changes] += 1
    # A document in steps about a Korean question went over to English, or it stayed in Korean.
    english, korean = (
        sum(SHARES[language][style] for style in ("steps", "slips", "checked"))
        for language in ("en", "ko")
    )
    gone_over = kinds["ko", 1] / (kinds["ko", 0] + kinds["ko", 1])
    ratio = SWITCH["ko"] / (1 - SWITCH["ko"]) * english / korean
    assert gone_over == pytest.approx(ratio / (1 + ratio), rel=0.05)
    assert kinds["en", 1] > 20


def test_every_index_occurs_and_texts_fill_but_fit_the_context(two_languages):
    """So a chain longer than any in the corpus can at least be written down, and each position of
    the context is learned."""
    longest = max(token_count(written) + 1 for written in two_languages)  # and the end token
    assert 0.7 * ROOM < longest <= ROOM
    text = "".join(written.text for written in two_languages)
    assert all(f"\n#{index} " in text for index in range(1, MAX_STEP + 1))
    longest = max((small_text(random.Random(i), CHAINS, "en") for i in range(20_000)), key=len)
    # A line break or the end token comes after it.
    assert len(tokenizer.encode(longest)) + 1 <= SMALL_TEXT


@pytest.mark.parametrize("task", [CHAINS, TWO])
def test_the_longest_document_is_at_least_as_long_as_any(task, documents, two_languages):
    limit = token_count(longest_document(LEVELS[-1], task))
    for written in two_languages if task == TWO else documents:
        assert not written.question or token_count(written) <= limit


def test_tagged_documents_can_be_read_by_the_rules(documents):
    tagged = [written.text for written in documents if "<answer>" in written.text]
    assert all(extract_answer(text) for text in tagged)
    assert all(format_reward(text) for text in tagged)


def test_documents_come_back_from_tokens_one_for_each_word(documents, two_languages):
    """A word that is not one token would be spelt in bytes."""
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
    ends = {tokenizer.eos_id, tokenizer.pad_id}
    special = ends | {tokenizer.encode(tag, tags=True)[0] for tag in TAGS}
    assert len(special) == 6
    assert not special & set(tokenizer.encode(text))
    assert not ends & set(tokenizer.encode(text, tags=True))


def test_end_and_padding_are_different_known_tokens():
    assert tokenizer.eos_id != tokenizer.pad_id
    assert max(tokenizer.eos_id, tokenizer.pad_id) < tokenizer.vocab_size


@pytest.mark.parametrize(
    "text",
    ["7 + 8 - 3", "7+8-3", " what is 7 plus 8 minus 3? ", "7 plus 8 - 3", "What is 7 + 8 - 3"],
)
def test_problems_that_people_type_are_understood(text):
    problem = parse_problem(text)
    assert problem.prompt == "User: what is 7 plus 8 minus 3?\nAssistant:"
    assert (problem.answer, problem.level, problem.language) == ("12", 2, "en")


@pytest.mark.parametrize(
    "text",
    ["7 + banana", "", "7", "7 +", "7 + + 8", "7 8", "7 / 8", "-7 + 8", "7.5 + 1", "٣ + 4",
     "7_8 + 1", "what is", "9" * 5000 + " + 1", "<think> + 1", "__import__('os')"],
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
