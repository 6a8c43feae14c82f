"""The web in miniature: the tasks, the documents written about them, and the tokenizer of each.

A task is a row of TASKS: a frozen dataclass whose fields are its settings, with

    name, example                                       its row; a problem as a person types it
    levels, languages                                   what is asked unless somebody says otherwise
    more_turns                                          levels that training asks for more often
    apart                                               levels that are evaluated on their own
    beyond                                              how many levels above are evaluated too
    hardest                                             the highest level that it can ask
    max_seq_len, max_new_tokens                         tokens of a row, of a completion
    words                                               its vocabulary, beside numbers and tags
    verdicts                                            those of them that judge a try, if any
    problem(rng, level, *, language, held_out) -> Problem
    document(rng, levels, room) -> Document             no longer than `longest` or `room`
    longest(level) -> Document                          as long as a document of this level can be
    is_right(problem, given) -> bool | None             None where there is no rule
    parse(text) -> Problem                              raises ValueError, in one line
    outside(problem, levels) -> str                     what of it no training at these levels had
    measures(problem, completion) -> {name: float}      how it thinks

`problem` is asked for both splits of the trained levels, and for held-out problems of the levels
`apart` and of the levels beyond. `is_right` is asked about any text, the empty one too, and
never raises. data/signs.py is a task to read; the task that tests/test_task.py throws away, in 60
lines, is one to copy.
"""

from functools import cache

from data.chains import Chains
from data.requests import Requests
from data.signs import Signs
from data.tokenizer import Tokenizer
from data.world import World

CHAINS_EN_KO, REQUESTS = Chains("chains-en-ko", languages=("en", "ko")), Requests()
TASKS = {
    task.name: task
    for task in (
        Signs("signs"),
        Chains("chains"),
        CHAINS_EN_KO,
        Chains(
            "chains-99",
            "+-*",
            max_total=99,
            languages=("en", "ko"),
            levels=(1, 8),
            max_seq_len=192,
            max_new_tokens=112,
        ),
        REQUESTS,
        World("world", CHAINS_EN_KO, REQUESTS),
    )
}

NEEDS = "name example levels languages more_turns apart beyond hardest max_seq_len max_new_tokens "
NEEDS += "words verdicts problem document longest is_right parse outside measures"


def check_task(task: str) -> None:
    """Raise ValueError, in one line, for a row of TASKS that lacks something a task needs."""
    if missing := [name for name in NEEDS.split() if not hasattr(TASKS[task], name)]:
        reason = f"the task {task} has no {', no '.join(missing)}"
        raise ValueError(f"{reason}: the head of data/__init__.py says what each is")


@cache
def get_tokenizer(task: str) -> Tokenizer:
    """The tokenizer of a row of TASKS: numbers, tags and the words of that task."""
    return Tokenizer(TASKS[task].words)
