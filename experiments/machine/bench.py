"""The speed of this code, of the machine at best, and of other libraries on the same work.

    python -m experiments.machine.bench sample --shape 5M --rows 512 --tokens 128
    python -m experiments.machine.bench sample --shape 5M --rows 512 --tokens 128 --ends
    python -m experiments.machine.bench step --shape 1M
    python -m experiments.machine.bench step --shape 1M --silent 0.5
    python -m experiments.machine.bench table

The first command times the sampler when no row ends early, the second when rows end by themselves.
The third times each part of a GRPO step, the fourth the same when half of the groups have no
signal. The last writes all results into the README's table. Results are added to
experiments/results/bench.json.

The peers need `pip install -r experiments/machine/requirements.txt`; a missing peer is named and
left out. They are TRL's GRPOTrainer, and Hugging Face `generate` on a LLaMA with our weights, after
a check that its logits are ours. On a GPU "ours" decodes by CUDA graphs, and the plain path is one
more contestant. The contestants take turns, and the median of each counts.

Tokens are sampled tokens up to and including the end token. On a CPU, seconds are the CPU time of
this process with one thread, so other processes do not count. On a GPU they are wall-clock time.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import train
from data import TASKS, get_tokenizer
from data.problem import sample_problems, stream
from experiments.study import collect
from kit.captured import CapturedDecoder
from kit.flags import command_line
from model import ROTARY_BASE, ModelConfig, Transformer
from sample import generate

RESULTS = collect.RESULTS / "bench.json"
# A model with random weights samples nearly uniformly. With 80 words and 128 tokens, its rows end
# after 64 tokens on average.
VOCABULARY, END = 80, 0
PROMPT = 16  # tokens
GROUP = 16


def preset_shape(name: str) -> tuple[int, ...]:
    """The shape of the models of a preset of train.py."""
    config = train.Config(**train.PRESETS[name])
    return config.n_layer, config.n_head, config.n_kv_head, config.d_model, config.d_ff


SHAPES = {  # layers, heads, key/value heads, width, feed-forward width
    "1M": (4, 4, 4, 128, 352),
    "5M": (6, 8, 8, 256, 704),
    "10M": (6, 6, 6, 384, 1024),
    **{name: preset_shape(name) for name in ("cpu", "gpu")},
}


# ------------------------------------------------------------------------------------ the machine


@dataclass
class Machine:
    """A device, the dtype of its products, and measurements on it."""

    device: str
    dtype: torch.dtype

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def median(self, job: Callable[[], object], repeat: int = 5) -> float:
        """The median seconds of a job, after one turn as a warm-up."""
        seconds = []
        for _ in range(repeat + 1):
            start = self.now()
            job()
            seconds.append(self.now() - start)
        return statistics.median(seconds[1:])

    def bytes_per_second(self) -> float:
        """The rate of a copy, counting read and written bytes: a bound for reading a cache."""
        size = 2**28 if self.device != "cpu" else 2**25
        source = torch.ones(size, dtype=self.dtype, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.median(lambda: target.copy_(source))

    def flops_per_second(self) -> float:
        n = 8192 if self.device != "cpu" else 1024
        a, b = (torch.randn(n, n, dtype=self.dtype, device=self.device) for _ in range(2))
        return 2 * n**3 / self.median(lambda: a @ b)

    def peak_bytes(self) -> int:
        if self.device == "cpu":
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return torch.cuda.max_memory_allocated()


def made_with(machine: Machine) -> dict[str, str]:
    """The hardware and the versions behind a number."""
    if machine.device == "cpu":
        processor = (collect.processor_names() or [platform.processor()])[0]
        name = f"{processor}, {torch.get_num_threads()} thread(s)"
    else:
        name = torch.cuda.get_device_name()
    packages = [package for package in ("torch", "transformers", "trl") if find_spec(package)]
    versions = {package: version(package) for package in packages}
    return {"hardware": name, "python": platform.python_version(), **versions}


# ------------------------------------------------------------------------------------- the models


def our_model(flags: argparse.Namespace, machine: Machine) -> Transformer:
    model = Transformer(ModelConfig(VOCABULARY, *SHAPES[flags.shape], PROMPT + flags.tokens))
    model.in_bfloat16 = machine.dtype == torch.bfloat16
    return model.to(machine.device)


def our_sampler(model: Transformer, flags: argparse.Namespace, machine: Machine) -> Callable:
    """`sample.generate`, or on a GPU the same by CUDA graphs."""
    if machine.device == "cpu":
        return generate
    return CapturedDecoder(model, flags.rows, PROMPT + flags.tokens).generate


def multiplied_weights(model: Transformer) -> int:
    """The number of weights in matrix products."""
    return sum(weight.numel() for weight in model.parameters())


def random_prompts(flags: argparse.Namespace) -> list[list[int]]:
    """Prompts without the end token, the same for every contestant."""
    generator, shape = torch.Generator().manual_seed(0), (flags.rows // GROUP, PROMPT)
    return torch.randint(1, VOCABULARY, shape, generator=generator).tolist()


def as_llama(model: Transformer, machine: Machine) -> torch.nn.Module:
    """Hugging Face's LLaMA with the same weights, in float32. Raises AssertionError if its logits
    are not ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.d_model,
            intermediate_size=ours.d_ff,
            num_hidden_layers=ours.n_layer,
            num_attention_heads=ours.n_head,
            num_key_value_heads=ours.n_kv_head,
            max_position_embeddings=ours.max_seq_len,
            rms_norm_eps=torch.finfo(torch.float32).eps,
            rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=END,
            attn_implementation="sdpa",
        )
    )
    words = ("model.embed_tokens.weight", "lm_head.weight")
    weights = dict.fromkeys(words, model.embedding.weight)
    weights["model.norm.weight"] = model.norm.weight
    for i, block in enumerate(model.blocks):
        sizes = [heads * ours.head_dim for heads in block.attention.heads]
        parts = zip(("q_proj", "k_proj", "v_proj"), block.attention.qkv.weight.split(sizes))
        named = {f"self_attn.{name}": weight for name, weight in parts}
        named["self_attn.o_proj"] = block.attention.out.weight
        named["mlp.gate_proj"], named["mlp.up_proj"] = block.feed_forward.up.weight.chunk(2)
        named["mlp.down_proj"] = block.feed_forward.down.weight
        named["input_layernorm"] = block.attention_norm.weight
        named["post_attention_layernorm"] = block.feed_forward_norm.weight
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in named.items()}
    llama.load_state_dict(weights)
    llama = llama.to(machine.device).eval()
    tokens = torch.randint(1, VOCABULARY, (4, PROMPT), device=machine.device)
    with torch.no_grad():
        model.in_bfloat16 = False
        torch.testing.assert_close(llama(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
        model.in_bfloat16 = machine.dtype == torch.bfloat16
    return llama


# ------------------------------------------------------------------------------------ the sampler


def seconds_at_best(model: Transformer, machine: Machine, lengths: list[int]) -> float:
    """The seconds to sample rows of these lengths if only products and reads took time, at the
    rates measured here.

    Each token multiplies every weight and reads all keys and values before it; each step of the
    batch reads the weights once. That counts 1 to 3 % too much: the prompt's pass gives the first
    token, and nothing reads the last token. On a CPU the two times add up; on a GPU the longer
    time counts.
    """
    config, weights = model.config, multiplied_weights(model)
    kv_bytes = 2 * config.n_layer * config.n_kv_head * config.head_dim * machine.dtype.itemsize
    # How many positions all tokens read together.
    positions = sum(PROMPT * length + length * (length + 1) / 2 for length in lengths)
    attention = 4 * config.n_layer * config.d_model * positions
    compute = (2 * weights * sum(lengths) + attention) / machine.flops_per_second()
    read = kv_bytes * positions + weights * machine.dtype.itemsize * max(lengths)
    memory = read / machine.bytes_per_second()
    return compute + memory if machine.device == "cpu" else max(compute, memory)


def samplers(
    model: Transformer, flags: argparse.Namespace, machine: Machine, prompts: list[list[int]]
) -> dict[str, Callable[[], list[int]]]:
    """The contestants by name. Each samples the whole batch and returns the tokens of each row."""
    end = END if flags.ends else -1

    def ours(generate: Callable) -> list[int]:
        settings = {"group_size": GROUP, "max_new_tokens": flags.tokens, "eos_id": end}
        return generate(model, prompts, **settings).mask.sum(dim=1).tolist()

    sampler = our_sampler(model, flags, machine)
    contestants = {"ours": lambda: ours(sampler)}
    if sampler is not generate:
        contestants["our plain path"] = lambda: ours(generate)
    if not find_spec("transformers"):
        print("transformers is not installed (experiments/machine/requirements.txt): ours alone")
        return contestants
    llama = as_llama(model, machine).to(machine.dtype)
    rows = torch.tensor(prompts, device=machine.device).repeat_interleave(GROUP, dim=0)

    @torch.no_grad()
    def theirs(**cache: str) -> list[int]:
        out = llama.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=flags.tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=END if flags.ends else None,
            pad_token_id=END,
            **cache,
        )[:, PROMPT:]
        ends = (out == END) & flags.ends
        return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, out.shape[1]).tolist()

    contestants["generate, dynamic cache"] = theirs
    contestants["generate, static cache"] = lambda: theirs(cache_implementation="static")
    return contestants


def bench_sample(flags: argparse.Namespace, machine: Machine) -> dict:
    model = our_model(flags, machine)
    contestants = samplers(model, flags, machine, random_prompts(flags))
    rates, lengths = {name: [] for name in contestants}, {}
    for turn in range(-flags.warmup, flags.repeat):
        for name, job in contestants.items():
            start = machine.now()
            lengths[name] = job()
            rate = sum(lengths[name]) / (machine.now() - start)
            if turn >= 0:
                rates[name].append(rate)
                length = f"mean length {statistics.mean(lengths[name]):.1f}"
                print(f"{name:26} {rate:10,.0f} tokens/s   {length}", flush=True)
    best = sum(lengths["ours"]) / seconds_at_best(model, machine, lengths["ours"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    speedups = {name: medians["ours"] / rate for name, rate in medians.items() if name != "ours"}
    return {
        "tokens_per_second": medians,
        "all": rates,
        "mean_length": {name: statistics.mean(values) for name, values in lengths.items()},
        "roofline": best,
        "share_of_roofline": medians["ours"] / best,
        "times_as_fast_as": speedups,
        "process_peak_bytes": machine.peak_bytes(),
    }


# ------------------------------------------------------------------------------------ a GRPO step


def rewards_for(rows: int, silent: float, seed: int) -> torch.Tensor:
    """Random rewards (B,) of 0, 1 and 2. In a share `silent` of the groups, the first ones, all
    rewards are equal."""
    generator, shape = torch.Generator().manual_seed(seed), (rows // GROUP, GROUP)
    rewards = torch.randint(0, 3, shape, generator=generator).float()
    rewards[: round(silent * len(rewards))] = 1.0
    return rewards.flatten()


class OurStep:
    """A step of GRPO as in `train.grpo`, with one update on all rows."""

    def __init__(self, flags: argparse.Namespace, machine: Machine, prompts: list[list[int]]):
        self.flags, self.machine, self.prompts, self.count = flags, machine, prompts, 0
        self.model = our_model(flags, machine)
        self.generate = our_sampler(self.model, flags, machine)
        self.optimizer = train.make_optimizer(self.model)
        given = {"device": machine.device, "group_size": GROUP, "max_new_tokens": flags.tokens}
        self.config = replace(train.Config(), micro_batch=flags.micro_batch, **given)
        task, levels = self.config.task, self.config.levels
        asked = (TASKS[task], levels, len(prompts))
        self.problems = sample_problems(stream(0, "problems"), *asked)
        self.rules = train.rules({"accuracy": 1.0, "format": 1.0}, get_tokenizer(task))

    def __call__(self) -> dict[str, float]:
        """Take a step. Returns the seconds of each part and of the whole."""
        flags, config, model, times = self.flags, self.config, self.model, [self.machine.now()]
        self.count += 1
        settings = {"group_size": GROUP, "max_new_tokens": flags.tokens, "seed": self.count}
        rollout = self.generate(model, self.prompts, eos_id=END, **settings)
        times.append(self.machine.now())
        self.rules(self.problems, rollout, self.count)
        times.append(self.machine.now())
        # A model with random weights earns next to nothing, so the update gets random rewards.
        rewards = {"reward": rewards_for(flags.rows, flags.silent, self.count)}
        advantages = train.outcome_advantages(config, rewards, rollout)
        inputs, teaches = train.loss_inputs(config, model, None, rollout, advantages)
        train.add_gradient(config, model, rollout, inputs, np.arange(flags.rows), teaches)
        times.append(self.machine.now())
        train.optimizer_step(model, self.optimizer, 1e-6, 1.0)
        times.append(self.machine.now())
        self.tokens = int(rollout.mask.sum())
        self.trained = int(teaches.sum()) * PROMPT + int(rollout.mask[teaches].sum())
        parts = zip(("sample", "reward", "update", "optimizer"), np.diff(times).tolist())
        return dict(parts) | {"whole": times[-1] - times[0]}


def words_tokenizer() -> object:
    """A tokenizer for TRL with the words w0, w1, ... that needs no file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def trl_trainer(
    flags: argparse.Namespace,
    machine: Machine,
    prompts: list[list[int]],
    after_step: Callable[[float], None],
) -> object:
    """A GRPOTrainer that does the work of `OurStep`. After each step it calls `after_step` with the
    seconds of the step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    # Like our model, it keeps weights in float32 and multiplies under autocast.
    llama = as_llama(our_model(flags, machine), machine)
    llama.generation_config.eos_token_id = END
    calls = []

    def reward(completions: list[str], **_: object) -> list[float]:
        calls.append(1)
        return rewards_for(len(completions), flags.silent, len(calls)).tolist()

    class Timer(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.start = machine.now()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            after_step(machine.now() - self.start)

    micro_batch = min(flags.trl_micro_batch, flags.rows)
    arguments = GRPOConfig(
        output_dir="/tmp/trl-bench",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=flags.rows // micro_batch,
        num_generations=GROUP,
        max_completion_length=flags.tokens,
        beta=0.0,
        loss_type="grpo",
        max_steps=flags.repeat + flags.warmup,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        bf16=machine.dtype == torch.bfloat16,
        use_cpu=machine.device == "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
    data = Dataset.from_dict({"prompt": texts})
    others = {"processing_class": words_tokenizer(), "callbacks": [Timer()]}
    return GRPOTrainer(llama, reward, arguments, data, **others)


def bench_step(flags: argparse.Namespace, machine: Machine) -> dict:
    prompts = random_prompts(flags)
    our_step, ours, theirs = OurStep(flags, machine, prompts), [], []

    def turn(their_seconds: float | None = None) -> None:
        ours.append(our_step())
        theirs.append(their_seconds)
        peer = f", TRL {their_seconds:.2f} s" if their_seconds else ""
        print(f"ours {ours[-1]['whole']:.2f} s{peer}", flush=True)

    if find_spec("trl"):
        trl_trainer(flags, machine, prompts, turn).train()
    else:
        print("trl is not installed (experiments/machine/requirements.txt): ours alone")
        for _ in range(flags.repeat + flags.warmup):
            turn()
    ours, theirs = ours[flags.warmup :], theirs[flags.warmup :]
    seconds = {part: statistics.median(step[part] for step in ours) for part in ours[0]}
    speedups = {} if None in theirs else {"TRL": statistics.median(theirs) / seconds["whole"]}
    # Products a weight and token: forward 2, backward 4; in bfloat16 a forward more for old logps.
    products = 8 if our_step.model.in_bfloat16 else 6
    flops = products * multiplied_weights(our_step.model) * our_step.trained
    return {
        "seconds": seconds,
        "tokens": our_step.tokens,
        "update_flop_utilisation": flops / seconds["update"] / machine.flops_per_second(),
        "process_peak_bytes": machine.peak_bytes(),
        "all": {"ours": ours, "TRL": theirs},
        "times_as_fast_as": speedups,
    }


# ---------------------------------------------------------------------------------------- results


def cells(row: dict) -> list[str]:
    """A result as the cells of its row: work, hardware, ours, share of the best, peers."""
    result, settings = row["result"], row["settings"]
    work = f"{settings['shape']}, {settings['rows']} rows"
    if row["command"] == "sample":
        length = result["mean_length"]["ours"]
        work = f"sample, {work}, {length:.0f} of {settings['tokens']} tokens"
        ours = f"{result['tokens_per_second']['ours']:,.0f} tokens/s"
        share = result["share_of_roofline"]
    else:
        silent = f", {settings['silent']:.0%} of groups silent" if settings["silent"] else ""
        work = f"GRPO step, {work}{silent.replace('%', ' %')}"
        ours, share = f"{result['seconds']['whole']:.2f} s", result["update_flop_utilisation"]
    speedups = result["times_as_fast_as"].items()
    peers = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in speedups) or "-"
    return [work, row["made_with"]["hardware"], ours, f"{100 * share:.0f} %", peers]


def table(results: list[dict]) -> str:
    """The README's table, in Markdown: a row for each result."""
    columns = ["work", "hardware", "ours", "products and copies alone", "times as fast as"]
    lines = [columns, ["---"] * len(columns), *map(cells, results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("job", choices=["sample", "step", "table"])
    add("--shape", choices=SHAPES, default="1M")
    add("--rows", type=int, default=512, help="completions, 16 for each prompt [512]")
    add("--tokens", type=int, default=64, help="most new tokens of a completion [64]")
    add("--ends", action="store_true", help="sample: an end token ends a row early")
    add("--silent", type=float, default=0.0, help="step: share of groups without signal [0]")
    add("--micro_batch", type=int, default=32, help="step: rows of our micro-batch [32]")
    add("--trl_micro_batch", type=int, default=128, help="step: rows of TRL's micro-batch [128]")
    add("--repeat", type=int, default=3, help="turns that are timed [3]")
    add("--warmup", type=int, default=1, help="turns before the timed ones [1]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype", choices=["float32", "bfloat16"], help="of products [GPU: bfloat16; CPU: float32]"
    )
    add("--threads", type=int, default=1, help="threads of the CPU [1]")
    add("--results", type=Path, default=RESULTS, help="file of the results [results/bench.json]")
    flags = parser.parse_args(arguments)
    counts = (flags.repeat, flags.tokens, flags.micro_batch, flags.trl_micro_batch)
    if min(counts) < 1 or not 0 <= flags.silent <= 1:
        parser.error("counts must be at least 1, and --silent from 0 to 1")
    if flags.rows < GROUP or flags.rows % GROUP:
        parser.error(f"--rows must be a multiple of {GROUP}")
    if flags.job == "step" and flags.rows % min(flags.trl_micro_batch, flags.rows):
        parser.error("--rows must be a multiple of --trl_micro_batch, or the peer does less work")
    path = flags.results
    results = json.loads(path.read_text()) if path.exists() else []
    if flags.job != "table":
        torch.set_num_threads(flags.threads)
        torch.backends.cuda.enable_cudnn_sdp(False)  # as runs do
        flags.dtype = flags.dtype or ("float32" if flags.device == "cpu" else "bfloat16")
        machine = Machine(flags.device, getattr(torch, flags.dtype))
        result = {"sample": bench_sample, "step": bench_step}[flags.job](flags, machine)
        command = " ".join(["python -m experiments.machine.bench", *arguments])
        row = {
            "command": flags.job,
            "line": command,
            "settings": vars(flags) | {"results": path.name},
        }
        row |= {"made_with": made_with(machine), "result": result}
        same = ("line", "made_with")  # a result of the same command and machine is replaced
        results = [old for old in results if any(old[name] != row[name] for name in same)] + [row]
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if flags.job == "table":
        comment = "bench: made by experiments/machine/bench.py table"
        collect.write_into_page(comment, table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
