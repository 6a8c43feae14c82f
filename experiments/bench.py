"""How fast it is, how fast the machine could be, and how fast others are on the same work.

    python experiments/bench.py sample --shape 5M --rows 512 --tokens 128          # the sampler, no row ends early
    python experiments/bench.py sample --shape 5M --rows 512 --tokens 128 --ends   # rows end by themselves
    python experiments/bench.py step --shape 1M                                    # a step of GRPO, part by part
    python experiments/bench.py step --shape 1M --silent 0.5                       # half of the groups without signal
    python experiments/bench.py table                                              # the results as the README's table

Each adds to experiments/results/bench.json, and the last writes the README's table.

Peers (`pip install -r experiments/bench-requirements.txt`): Hugging Face `generate` on a LLaMA of the same weights,
whose logits are compared first, and TRL's GRPOTrainer. What is not installed is named and left out. On a GPU "ours"
decodes by CUDA graphs, and our plain path is one more contestant. All contestants of a command take turns, and medians
are kept. A token is a useful one: sampled, up to and including the end token. Seconds are those of this process's CPU
where the device is a CPU, so that neighbours do not count (on one thread), else the clock's.
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file finds the rooms above it

import torch

import train
from data.tokenizer import get_tokenizer
from experiments.collect import processor_names, write_into_readme
from grpo import group_advantages
from model import ROTARY_BASE, ModelConfig, Transformer
from sample import CapturedDecoder, Rollout, decode_completions, generate

RESULTS = ROOT / "experiments" / "results" / "bench.json"
# So small a vocabulary that a model with random weights, nearly uniform, ends a row after 64 of 128 tokens on average.
VOCABULARY, END = 80, 0
PROMPT = 16  # tokens
GROUP = 16

SHAPES = {  # layers, heads, key/value heads, width, feed-forward width
    "1M": (4, 4, 4, 128, 352),
    "5M": (6, 8, 8, 256, 704),
    "10M": (6, 6, 6, 384, 1024),
    "cpu": (3, 4, 2, 64, 192),  # the presets' own
    "gpu": (6, 8, 4, 256, 768),
}


# ---------------------------------------------------------------------------------------------------- the machine


@dataclass
class Machine:
    """A device, and how time is taken on it."""

    device: str
    dtype: torch.dtype

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, job: Callable[[], object]) -> float:
        start = self.now()
        job()
        return self.now() - start

    def median(self, job: Callable[[], object], repeat: int = 5) -> float:
        job()
        return statistics.median(self.seconds(job) for _ in range(repeat))

    def bytes_per_second(self) -> float:
        """Of a copy, read and write counted, as cache reads of a sampler would go at best."""
        source = torch.ones(2**28 if self.device != "cpu" else 2**25, dtype=self.dtype, device=self.device)
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


def made_with(machine: Machine) -> dict:
    """What a number needs beside it to be read."""
    if machine.device == "cpu":
        name = f"{(processor_names() or [platform.processor()])[0]}, {torch.get_num_threads()} thread(s)"
    else:
        name = torch.cuda.get_device_name()
    packages = [package for package in ("torch", "transformers", "trl") if find_spec(package)]
    return {"hardware": name, "python": platform.python_version(), **{name: version(name) for name in packages}}


# ------------------------------------------------------------------------------------------------------ the models


def our_model(flags: argparse.Namespace, machine: Machine) -> Transformer:
    layers, heads, kv_heads, width, ff = SHAPES[flags.shape]
    model = Transformer(ModelConfig(VOCABULARY, layers, heads, kv_heads, width, ff, PROMPT + flags.tokens))
    torch.nn.init.zeros_(model.position.weight)  # a LLaMA has rotary positions alone
    model.in_bfloat16 = machine.dtype == torch.bfloat16
    return model.to(machine.device)


def multiplied_weights(model: Transformer) -> int:
    """All but the positions', which are looked up."""
    return sum(weight.numel() for weight in model.parameters()) - model.position.weight.numel()


def random_prompts(flags: argparse.Namespace) -> list[list[int]]:
    """The same for every contestant, none with the end token."""
    shape = flags.rows // GROUP, PROMPT
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(0)).tolist()


def as_llama(model: Transformer, machine: Machine) -> torch.nn.Module:
    """Hugging Face's LLaMA with the same weights, in float32; its logits are compared with ours, or AssertionError."""
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
    weights = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.embedding.weight
    for i, block in enumerate(model.blocks):
        sizes = [heads * ours.head_dim for heads in block.attention.heads]
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), block.attention.qkv.weight.split(sizes)))
        named = {f"self_attn.{name}": weight for name, weight in parts.items()}
        named["self_attn.o_proj"] = block.attention.out.weight
        named["mlp.gate_proj"], named["mlp.up_proj"] = block.feed_forward.up.weight.chunk(2)
        named["mlp.down_proj"] = block.feed_forward.down.weight
        named |= {"input_layernorm": block.attention_norm.weight}
        named |= {"post_attention_layernorm": block.feed_forward_norm.weight}
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in named.items()}
    llama.load_state_dict(weights)
    llama = llama.to(machine.device).eval()
    tokens = torch.randint(1, VOCABULARY, (4, PROMPT), device=machine.device)
    with torch.no_grad():
        model.in_bfloat16 = False
        torch.testing.assert_close(llama(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
        model.in_bfloat16 = machine.dtype == torch.bfloat16
    return llama


# ----------------------------------------------------------------------------------------------------- the sampler


def seconds_at_best(model: Transformer, machine: Machine, lengths: list[int]) -> float:
    """What the arithmetic and the bytes of rows of these lengths take at the rates measured here: keys and values are
    read once per token, and weights multiplied once. (The first token comes from the prompt's pass and the last is not
    read again: 1 to 3 % too much.) On a CPU the two add up, on a GPU the longer one counts."""
    config, weights = model.config, multiplied_weights(model)
    kv_bytes = 2 * config.n_layer * config.n_kv_head * config.head_dim * machine.dtype.itemsize
    positions = sum(PROMPT * length + length * (length + 1) / 2 for length in lengths)  # read in all
    attention = 4 * config.n_layer * config.d_model * positions
    compute = (2 * weights * sum(lengths) + attention) / machine.flops_per_second()
    memory = (kv_bytes * positions + weights * machine.dtype.itemsize * max(lengths)) / machine.bytes_per_second()
    return compute + memory if machine.device == "cpu" else max(compute, memory)


def samplers(
    model: Transformer, flags: argparse.Namespace, machine: Machine, prompts: list[list[int]]
) -> dict[str, Callable[[], list[int]]]:
    """The contestants: each samples the whole batch and gives the useful tokens of its rows."""

    def ours(decoder: CapturedDecoder | None = None) -> list[int]:
        end = END if flags.ends else -1
        rollout = generate(model, prompts, group_size=GROUP, max_new_tokens=flags.tokens, eos_id=end, decoder=decoder)
        return rollout.mask.sum(dim=1).tolist()

    contestants = {"ours": ours}
    if machine.device == "cuda":
        decoder = CapturedDecoder(model, flags.rows, PROMPT + flags.tokens)
        contestants = {"ours": lambda: ours(decoder), "our plain path": ours}
    if not find_spec("transformers"):
        print("transformers is not installed (experiments/bench-requirements.txt): no peers")
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
    prompts = random_prompts(flags)
    contestants = samplers(model, flags, machine, prompts)
    rates, lengths = {name: [] for name in contestants}, {}
    for turn in range(-flags.warmup, flags.repeat):
        for name, job in contestants.items():
            start = machine.now()
            lengths[name] = job()
            if turn >= 0:
                rate, length = sum(lengths[name]) / (machine.now() - start), statistics.mean(lengths[name])
                rates[name].append(rate)
                print(f"{name:26} {rate:10,.0f} tokens/s   mean length {length:.1f}", flush=True)
    best = sum(lengths["ours"]) / seconds_at_best(model, machine, lengths["ours"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_second": medians,
        "all": rates,
        "mean_length": {name: statistics.mean(values) for name, values in lengths.items()},
        "roofline": best,
        "share_of_roofline": medians["ours"] / best,
        "times_as_fast_as": {name: medians["ours"] / rate for name, rate in medians.items() if name != "ours"},
        "process_peak_bytes": machine.peak_bytes(),
    }


# ---------------------------------------------------------------------------------------------------- a GRPO step


class Parts:
    """Seconds by part of a step."""

    def __init__(self, machine: Machine):
        self.machine, self.seconds = machine, {}

    def timed(self, name: str, job: Callable) -> Callable:
        """The same job, its seconds booked under `name`."""

        def run(*args: object, **kwargs: object) -> object:
            start = self.machine.now()
            result = job(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.machine.now() - start
            return result

        return run


def rewards_for(rows: int, silent: float, seed: int) -> torch.Tensor:
    """Rewards (B,) of 0, 1 and 2; in the first groups, a share of `silent`, they are all equal."""
    rewards = torch.randint(0, 3, (rows // GROUP, GROUP), generator=torch.Generator().manual_seed(seed)).float()
    rewards[: round(silent * len(rewards))] = 1.0
    return rewards.flatten()


class OurStep:
    """One step of GRPO as `train.grpo` does it: one update on all rows."""

    def __init__(self, flags: argparse.Namespace, machine: Machine, prompts: list[list[int]]):
        self.flags, self.machine, self.prompts, self.count = flags, machine, prompts, 0
        self.model = our_model(flags, machine)
        self.optimizer = train.make_optimizer(self.model, weight_decay=0.0)
        self.config = replace(
            train.Config(), micro_batch=flags.micro_batch, max_new_tokens=flags.tokens, group_size=GROUP, beta=0.0
        )
        self.tokenizer = get_tokenizer()

    def __call__(self) -> dict[str, float]:
        self.count += 1
        parts, start = Parts(self.machine), self.machine.now()
        rollout: Rollout = parts.timed("sample", generate)(
            self.model, self.prompts, group_size=GROUP, max_new_tokens=self.flags.tokens, eos_id=END, seed=self.count
        )
        parts.timed("reward", decode_completions)(rollout, self.tokenizer)
        rewards = rewards_for(len(rollout.tokens), self.flags.silent, self.count)
        advantages = group_advantages(rewards, GROUP).to(self.machine.device)
        forward, honest = parts.timed("forward", self.model), torch.Tensor.backward
        torch.Tensor.backward = parts.timed("backward", honest)
        try:
            rows = torch.arange(len(advantages), device=self.machine.device)
            train.accumulate_gradient(self.config, forward, rollout, advantages, None, rows)
        finally:
            torch.Tensor.backward = honest
        parts.timed("optimizer", train.optimizer_step)(self.model, self.optimizer, 1e-6, 1.0)
        whole = self.machine.now() - start
        self.tokens = int(rollout.mask.sum())
        taught = rollout.mask[advantages != 0]
        self.trained = len(taught) * PROMPT + int(taught.sum())
        return {**parts.seconds, "other": whole - sum(parts.seconds.values()), "whole": whole}


def words_tokenizer() -> object:
    """A tokenizer for TRL that knows the words w0, w1, ... and reads no file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def trl_trainer(
    flags: argparse.Namespace, machine: Machine, prompts: list[list[int]], after_step: Callable[[float], None]
) -> object:
    """A GRPOTrainer that does the same work as `OurStep`, and calls `after_step` with the seconds of each step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    llama = as_llama(our_model(flags, machine), machine)  # as ours: weights in float32, products by autocast
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
    return GRPOTrainer(
        llama,
        reward,
        arguments,
        Dataset.from_dict({"prompt": texts}),
        processing_class=words_tokenizer(),
        callbacks=[Timer()],
    )


def bench_step(flags: argparse.Namespace, machine: Machine) -> dict:
    prompts = random_prompts(flags)
    our_step, ours, theirs = OurStep(flags, machine, prompts), [], []

    def turn(their_seconds: float | None = None) -> None:
        ours.append(our_step())
        theirs.append(their_seconds)
        print(f"ours {ours[-1]['whole']:.2f} s" + (f", TRL {their_seconds:.2f} s" if their_seconds else ""), flush=True)

    if find_spec("trl"):
        trl_trainer(flags, machine, prompts, turn).train()
    else:
        print("trl is not installed (experiments/bench-requirements.txt): ours alone")
        for _ in range(flags.repeat + flags.warmup):
            turn()
    ours, theirs = ours[flags.warmup :], theirs[flags.warmup :]
    seconds = {part: statistics.median(step[part] for step in ours) for part in ours[0]}
    weights = multiplied_weights(our_step.model)
    update = seconds["forward"] + seconds["backward"]
    return {
        "seconds": seconds,
        "tokens": our_step.tokens,
        "update_flop_utilisation": 6 * weights * our_step.trained / update / machine.flops_per_second(),
        "process_peak_bytes": machine.peak_bytes(),
        "all": {"ours": ours, "TRL": theirs},
        "times_as_fast_as": {} if None in theirs else {"TRL": statistics.median(theirs) / seconds["whole"]},
    }


# --------------------------------------------------------------------------------------------------------- results


def table(results: list[dict]) -> str:
    """What the README shows: a row for each result."""
    lines = ["| work | hardware | ours | products and copies alone | times as fast as |", "| --- " * 5 + "|"]
    for row in results:
        result, settings = row["result"], row["settings"]
        peers = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in result["times_as_fast_as"].items())
        if row["command"] == "sample":
            length = result["mean_length"]["ours"]
            work = f"sample, {settings['shape']}, {settings['rows']} rows, {length:.0f} of {settings['tokens']} tokens"
            ours = f"{result['tokens_per_second']['ours']:,.0f} tokens/s"
            share = result["share_of_roofline"]
        else:
            silent = f", {100 * settings['silent']:.0f} % of groups silent" if settings["silent"] else ""
            work = f"GRPO step, {settings['shape']}, {settings['rows']} rows{silent}"
            ours, share = f"{result['seconds']['whole']:.2f} s", result["update_flop_utilisation"]
        lines.append(f"| {work} | {row['made_with']['hardware']} | {ours} | {100 * share:.0f} % | {peers or '-'} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=["sample", "step", "table"])
    parser.add_argument("--shape", choices=SHAPES, default="1M")
    parser.add_argument("--rows", type=int, default=512, help="completions, 16 of each prompt [512]")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most [64]")
    parser.add_argument("--ends", action="store_true", help="sample: rows end by themselves")
    parser.add_argument("--silent", type=float, default=0.0, help="step: share of groups without signal [0]")
    parser.add_argument("--micro_batch", type=int, default=32, help="step: rows that go through our model at once [32]")
    parser.add_argument("--trl_micro_batch", type=int, default=128, help="step: and through TRL's [128]")
    parser.add_argument("--repeat", type=int, default=3, help="turns that count [3]")
    parser.add_argument("--warmup", type=int, default=1, help="turns before them [1]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU [1]")
    flags = parser.parse_args(arguments)
    if min(flags.repeat, flags.tokens, flags.micro_batch, flags.trl_micro_batch) < 1 or not 0 <= flags.silent <= 1:
        parser.error("counts must be at least 1, and --silent a share")
    if flags.rows < GROUP or flags.rows % GROUP:
        parser.error(f"--rows must be a multiple of {GROUP}")
    if flags.job == "step" and flags.rows % min(flags.trl_micro_batch, flags.rows):
        parser.error("--rows must be a multiple of --trl_micro_batch, or the peer does less work")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if flags.job != "table":
        torch.set_num_threads(flags.threads)
        machine = Machine(flags.device, torch.float32 if flags.device == "cpu" else torch.bfloat16)
        settings = vars(flags)
        result = {"sample": bench_sample, "step": bench_step}[flags.job](flags, machine)
        command = " ".join(["python experiments/bench.py", *arguments])
        row = {"command": flags.job, "line": command, "settings": settings, "made_with": made_with(machine)}
        row["result"] = result
        same = [old for old in results if (old["line"], old["made_with"]) == (command, row["made_with"])]
        results = [old for old in results if old not in same] + [row]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if flags.job == "table":
        write_into_readme("bench: made by experiments/bench.py table", table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
