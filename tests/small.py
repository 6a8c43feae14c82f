"""Runs small enough for a test, shared by the tests that make them."""

import torch

import train
from data import get_tokenizer
from data.batches import padded
from data.chains import Chains
from kit.run import ROOT
from model import ModelConfig, Transformer
from sample import Rollout
from train import Config

PAGES = [
    ROOT / "README.md",
    ROOT / "README.ko.md",
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / "rlhf").rglob("*.md")),
    *sorted((ROOT / "r1").rglob("*.md")),
]
PROSE = "\n".join(page.read_text() for page in PAGES)
CHAINS = Chains()
tokenizer = get_tokenizer("chains")
SHAPE = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_model": 16, "d_ff": 24, "max_seq_len": 96}
SMALL = Config(
    **{
        "task": "chains",
        "preset": "tiny",
        "min_level": 2,
        "prompts": 4,
        "group_size": 4,
        "max_new_tokens": 12,
    },
    **{"steps": 2, "eval_problems": 8},
    **SHAPE,
)
SHAPE_FLAGS = [f"--{name}={value}" for name, value in SHAPE.items()]


def small_model(seed=0, task="chains"):
    words = get_tokenizer(task)
    shape = {"vocab_size": words.vocab_size, "vocabulary": words.fingerprint, "task": task}
    model = Transformer(ModelConfig(**shape, **SHAPE))
    model.init_weights(seed, words.pieces)
    return model


class Unsaved:
    """A run in no folder: it keeps the lines of its logs, and saves nothing."""

    def __init__(self):
        self.records, self.looks, self.shown = [], [], []
        self.written, self.finished, self.folder = {}, {}, "nowhere"

    def steps(self, stage, count, model, **state):
        self.stage, self.state = stage, state
        for self.step in range(count):
            yield self.step

    def once(self, name, make):
        return make()

    def write(self, name, text):
        self.written[name] = text

    def write_model(self, name, model):
        self.written[name] = model

    def finish(self, result):
        self.finished = result

    def times(self):
        return "no time"

    def log(self, record):
        self.records.append({"stage": self.stage, "step": self.step + 1, **record})

    def look(self, record):
        self.looks.append({"stage": self.stage, **record})

    def tell(self, text):
        self.shown.append(text)

    def show(self, numbers, keep=False):
        self.shown.append((numbers, keep))


def rollout_of(problems, texts):
    """A rollout in which these texts, G for each problem, were sampled and ended by themselves."""
    words, rows = get_tokenizer(problems[0].task), []
    for row, text in enumerate(texts):
        prompt = words.encode(problems[row * len(problems) // len(texts)].prompt)
        rows.append((len(prompt), [*prompt, *words.encode(text, tags=True), words.eos_id]))
    tokens, mask, _ = padded(rows, words.eos_id)
    zeros = torch.zeros(tokens.shape)
    return Rollout(tokens, mask, zeros, zeros, torch.ones(len(rows), dtype=torch.bool))


def by_length(problems, rollout, step):
    """Rewards that differ within nearly every group, so that even a random model is updated."""
    texts = train.decode_completions(rollout, tokenizer)
    rewards = torch.tensor([float(len(text) % 5) for text in texts])
    return dict.fromkeys(("reward", "accuracy", "format"), rewards)


def run_grpo(config, reward=None, policy=None, **how):
    """GRPO from a small model; the model that came out, and the lines of the log."""
    run, policy = Unsaved(), policy or small_model(task=config.task)
    weights = train.rule_weights(config.rewards)
    reward = reward or train.rules(weights, get_tokenizer(config.task))
    train.grpo(config, run, "r1_zero", policy, small_model(task=config.task), reward, **how)
    return policy, run.records
