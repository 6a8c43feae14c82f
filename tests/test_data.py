"""Problems, documents and tokens: the web in miniature is what it says it is."""

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import TASKS, get_tokenizer
from data.chains import (
    APPLY,
    GUESS,
    HELD_OUT,
    LANGUAGE_SHARES,
    SHARES,
    SLIP,
    SMALL_TEXT,
    SWITCH,
    TAGGED,
    Chains,
    is_held_out,
)
from data.languages import LANGUAGES, language_of
from data.problem import sample_problems, stream
from data.tokenizer import MAX_STEP, TAGS, Tokenizer
from rewards import extract_answer, format_reward

LEVELS = range(2, 6)
STEP = re.compile(r"\n#(\d+) (\d+) (\w+) (\d+) (?:is|은) (\d+)( ok| wait (\d+)| 맞아| 잠깐 (\d+))?")
ROOM = 160
CHAINS, TWO = TASKS["chains"], TASKS["chains-99"]
SIGNS = {word: sign for language in LANGUAGES.values() for sign, word in language.operators.items()}
tokenizer = get_tokenizer("chains")


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(1)
    return [CHAINS.document(rng, LEVELS) for _ in range(20_000)]


@pytest.fixture(scope="module")
def two_languages():
    """With all three operators."""
    rng = random.Random(2)
    return [TWO.document(rng, LEVELS, ROOM) for _ in range(20_000)]


def expression_of(question):
    words = (SIGNS.get(word, word) for word in re.findall(r"\w+", question))
    return " ".join(word for word in words if word in APPLY or word.isdigit())


def token_count(written, task):
    """Tokens of a document, its question included and the end token not."""
    words = get_tokenizer(task.name)
    return len(words.encode(written.question)) + len(words.encode(written.text, tags=True))


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
    english, korean = CHAINS.ask("1 + 2 * 3"), TWO.ask("1 + 2 * 3", "ko")
    assert english.answer == korean.answer == "9"
    assert english.prompt == "User: what is 1 plus 2 times 3?\nAssistant:"
    assert korean.prompt == "User: 1 더하기 2 곱하기 3 은 얼마?\nAssistant:"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"operators": "+*"}, "operators +* must be of +-"),
        ({"operators": "+-/"}, "operators +-/ must be of +-"),
        ({"operators": ""}, "operators  must be of +-"),
        ({"languages": ("en", "fr")}, "languages en,fr must be of en,ko, each at most once"),
        ({"languages": ("en", "en")}, "languages en,en must be of en,ko, each at most once"),
        ({"languages": ("",)}, "languages  must be of en,ko"),
        ({"max_total": 16}, "max_total must be from 17 to 99, not 16"),
        ({"max_total": 100}, "max_total must be from 17 to 99, not 100"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(settings, complaint):
    with pytest.raises(ValueError, match="^" + re.escape(complaint)) as error:
        Chains(**settings)
    assert "\n" not in str(error.value)


def test_an_operator_that_a_language_has_no_word_for_is_refused(monkeypatch):
    """Only the languages of the task need the word."""
    monkeypatch.delitem(LANGUAGES["ko"].operators, "*")
    Chains("any", "+-*", 99, ("en",))
    Chains("any", "+-", 99, ("en", "ko"))
    with pytest.raises(ValueError, match="has no word for one of them in ko"):
        Chains("any", "+-*", 99, ("en", "ko"))


@pytest.mark.parametrize("operators", ["+-", "+-*"])
def test_at_the_least_limit_every_total_allows_an_operation(operators):
    """Whatever the operand is; choosing among no operators would raise."""
    task = Chains("any", operators, 17)
    for total in range(18):
        drawn = [task.operation(random.Random(seed), total) for seed in range(100)]
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


def test_level_1_is_trained_on_but_for_its_held_out_problems():
    """As questions of documents, too. Both splits of level 1 are there."""
    rng = random.Random(0)
    train = {CHAINS.problem(rng, 1).expression for _ in range(2000)}
    held_out = {CHAINS.problem(rng, 1, held_out=True).expression for _ in range(200)}
    written = [CHAINS.document(rng, range(1, 3)) for _ in range(2000)]
    asked = {expression_of(x.question) for x in written if x.question}
    asked = {expression for expression in asked if len(expression.split(" ")) == 3}
    assert len(train) > 80 and len(held_out) > 5 and len(asked) > 80
    assert not (train | asked) & held_out
    assert not any(map(is_held_out, train | asked)) and all(map(is_held_out, held_out))


def test_one_expression_in_ten_is_held_out():
    rng = random.Random(0)
    expressions = [" + ".join(str(rng.randint(1, 9)) for _ in range(9)) for _ in range(5000)]
    assert sum(map(is_held_out, expressions)) == pytest.approx(5000 / HELD_OUT, rel=0.2)


def worked_out(expression):
    """Every chain of two or more operations that the steps of this one work out."""
    parts = expression.split(" ")
    for start in range(1, len(parts), 2):
        total = value_of(" ".join(parts[:start]))
        if 1 <= total <= 9:  # where a problem begins
            for end in range(start + 4, len(parts) + 1, 2):
                yield " ".join([str(total), *parts[start:end]])


def signed_numbers(expression):
    """What all reorderings of a chain have in common."""
    parts = ["+", *expression.split(" ")]
    return tuple(sorted(zip(parts[::2], parts[1::2])))


def test_no_document_holds_a_held_out_problem(documents, two_languages):
    """As its question or as steps of it, the first or later; nor a reordering of one."""
    for task, written in ((CHAINS, documents), (TWO, two_languages)):
        rng = random.Random(3)
        held_out = {task.problem(rng, n, held_out=True).expression for n in (2, 3) * 1500}
        held_out = set(map(signed_numbers, held_out))
        asked = {expression_of(each.question) for each in written if each.question}
        later = {chain for expression in asked for chain in worked_out(expression)}
        assert len(held_out) > 300 and len(asked) > 5000 and len(later - asked) > 1000
        assert not held_out & set(map(signed_numbers, asked | later))
        assert not any(map(is_held_out, asked | later))


def test_what_is_held_out_leaves_every_kind_of_step(documents):
    """Each number is added to and taken from each running total where the limits allow it."""
    clean = (x for x in documents if x.style == "steps")
    steps = {match.groups()[1:4] for x in clean for match in STEP.finditer(x.text)}
    words = {sign: word for word, sign in SIGNS.items() if word.isascii()}
    for total, sign, operand in itertools.product(range(21), "+-", range(1, 10)):
        if 0 <= APPLY[sign](total, operand) <= 20:
            assert (str(total), words[sign], str(operand)) in steps


def test_held_out_problems_are_asked_once():
    """While there are enough: level 1 has a handful."""
    asked = sample_problems(stream(0, "once"), CHAINS, (2, 3), 250, held_out=True)
    assert len({problem.prompt for problem in asked}) == 250
    asked = sample_problems(stream(0, "once"), CHAINS, (1,), 100, held_out=True)
    assert len(asked) == 100 and 5 < len({problem.prompt for problem in asked}) < 30


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
    longest = max(token_count(written, TWO) + 1 for written in two_languages)  # and the end token
    assert 0.7 * ROOM < longest <= ROOM
    text = "".join(written.text for written in two_languages)
    assert all(f"\n#{index} " in text for index in range(1, MAX_STEP + 1))
    longest = max((CHAINS.small_text(random.Random(i), "en") for i in range(20_000)), key=len)
    # A line break or the end token comes after it.
    assert len(tokenizer.encode(longest)) + 1 <= SMALL_TEXT


@pytest.mark.parametrize("task", [CHAINS, TWO])
def test_the_longest_document_is_at_least_as_long_as_any(task, documents, two_languages):
    limit = token_count(task.longest(LEVELS[-1]), task)
    for written in two_languages if task == TWO else documents:
        assert not written.question or token_count(written, task) <= limit


def test_tagged_documents_can_be_read_by_the_rules(documents):
    tagged = [written.text for written in documents if "<answer>" in written.text]
    assert all(extract_answer(text) for text in tagged)
    assert all(format_reward(text) for text in tagged)


def test_documents_come_back_from_tokens_one_for_each_word(documents, two_languages):
    """A word that is not one token would be spelt in bytes."""
    for task, some in ((CHAINS, documents[:3000]), (TWO, two_languages[:3000])):
        words = get_tokenizer(task.name)
        for written in some:
            for text, tags in ((written.question, False), (written.text, True)):
                ids = words.encode(text, tags=tags)
                assert words.decode(ids) == text
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
    ("words", "twice"),
    [(("a", "b", "a"), "a"), (("a", "5"), "5"), (("a", "99"), "99"), (("",), "")],
)
def test_a_word_that_stands_twice_is_refused(words, twice):
    """Also as a number or a byte: one of two equal tokens would never be met."""
    with pytest.raises(ValueError, match=f"^the word '{twice}' stands twice") as error:
        Tokenizer(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["two words", "don't", "a1", "1a", "\n", "<think>", "x."])
def test_a_word_that_texts_split_is_refused(word):
    """It would be a token that no text ever has."""
    with pytest.raises(ValueError, match="is not one word: letters alone") as error:
        Tokenizer(["once", word])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TASKS)
def test_every_word_of_every_task_is_one_token(name):
    """And no token stands for two of them."""
    words, task = get_tokenizer(name), TASKS[name]
    ids = [words.encode(f" {word}") for word in (*task.words, *range(100))]
    assert all(len(found) == 1 and found[0] >= 256 for found in ids)
    assert len({found[0] for found in ids}) == len(task.words) + 100
    assert [words.decode(found) for found in ids[: len(task.words)]] == [
        f" {x}" for x in task.words
    ]
    assert len(words.pieces) == len(set(words.pieces)) == words.vocab_size


def test_a_word_more_makes_another_vocabulary():
    """So that a model of fewer words is refused, though each of its words is there."""
    words = CHAINS.words
    found = [Tokenizer(x) for x in (words, words, (*words, "moon"), words[::-1])]
    assert found[0].fingerprint == found[1].fingerprint == tokenizer.fingerprint
    assert len({x.fingerprint for x in found}) == 3
    assert set(found[2].pieces) - set(found[0].pieces) == {b" moon"}


@pytest.mark.parametrize(
    "text",
    ["7 + 8 - 3", "7+8-3", " what is 7 plus 8 minus 3? ", "7 plus 8 - 3", "What is 7 + 8 - 3"],
)
def test_problems_that_people_type_are_understood(text):
    problem = CHAINS.parse(text)
    assert problem.prompt == "User: what is 7 plus 8 minus 3?\nAssistant:"
    assert (problem.answer, problem.level, problem.language) == ("12", 2, "en")


@pytest.mark.parametrize(
    "text",
    ["7 + banana", "", "7", "7 +", "7 + + 8", "7 8", "7 / 8", "-7 + 8", "7.5 + 1", "٣ + 4",
     "7_8 + 1", "what is", "9" * 5000 + " + 1", "<think> + 1", "__import__('os')"],
)  # fmt: skip
def test_text_that_is_no_problem_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match='write a chain such as "7 \\+ 8 - 3"') as error:
        CHAINS.parse(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 150


@settings(deadline=None)
@given(st.text() | st.text("79+- \n\t?x"))
def test_no_text_raises_anything_but_value_error(text):
    try:
        problem = CHAINS.parse(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert problem.answer == str(eval(problem.expression))


@pytest.mark.parametrize(
    ("expression", "outside"),
    [
        ("7 + 8", ""),
        ("9 + 9 + 2 - 9 - 9", ""),  # just within: totals of 20 and 2
        ("7 + 8 - 3 + 1 + 1 + 1", "5 operations, not 1 to 4"),
        ("7 * 2 + 1", "operators beside + -"),
        ("9 + 9 + 3", "a running total beside 0 to 20"),
        ("3 - 4", "a running total beside 0 to 20"),
        ("10 + 3", "numbers beside 1 to 9"),
        ("3 + 0", "numbers beside 1 to 9"),
        ("50 * 2", "operators beside + -, numbers beside 1 to 9, a running total beside 0 to 20"),
    ],
)
def test_what_training_never_had_is_named(expression, outside):
    assert CHAINS.outside(CHAINS.ask(expression), range(1, 5)) == outside


def test_nothing_that_training_had_is_outside():
    rng = random.Random(0)
    for task in (CHAINS, TWO):
        drawn = sample_problems(rng, task, LEVELS, 400)
        assert not any(task.outside(problem, LEVELS) for problem in drawn)
        assert task.outside(drawn[0], range(3, 6)) == "2 operations, not 3 to 5"
    assert TWO.outside(TWO.ask("7 * 2 + 1"), LEVELS) == ""


@pytest.mark.parametrize(
    ("thought", "spoken"),
    [
        ("\n#1 7 plus 8 is 15\n#2 15 minus 3 is 12", "en"),
        ("\n#1 7 더하기 8 은 15\n#2 15 빼기 3 은 12", "ko"),
        ("\n#1 7 plus 8 is 15\n#2 15 빼기 3 은 12", "both"),
        ("\n#1", "none"),
        (" i know this", "none"),
    ],
)
def test_measures_tell_steps_and_the_language_of_the_thought(thought, spoken):
    """The question's language is in the name; the shares of its kinds sum to 1."""
    completion = f"<think>{thought}</think><answer> 12</answer>"
    in_steps = {"in_steps": float("#" in thought)}
    assert CHAINS.measures(CHAINS.ask("7 + 8 - 3"), completion) == in_steps
    for asked in ("en", "ko"):
        found = TWO.measures(TWO.ask("7 + 8 - 3", asked), completion)
        kinds = {f"{asked}_thinks_in_{kind}": 0.0 for kind in ("en", "ko", "both", "none")}
        assert found == in_steps | kinds | {f"{asked}_thinks_in_{spoken}": 1.0}
        assert sum(found[kind] for kind in kinds) == 1


@pytest.mark.parametrize(
    "completion", ["", "15", "#1 7", "</think>#1<think>", "<answer>#</answer>"]
)
def test_what_is_no_thought_is_in_no_steps(completion):
    found = TWO.measures(TWO.ask("7 + 8", "ko"), completion)
    assert found["in_steps"] == 0
    assert found["ko_thinks_in_none"] == 1
