"""Sampling on a GPU by CUDA graphs: each step after the first token is one launch, not hundreds.

    decoder = CapturedDecoder(model, rows, positions)
    rollout = decoder.generate(model, prompts, ...)        # as sample.generate, token for token

Without a GPU the same step runs without a graph.
"""

import math

import torch
from torch import Tensor

from kit.parallel import generate
from model import KVCache, Transformer
from sample import Generation, Rollout, draw, empty_rollout, new_cache

LOOK_EVERY = 16  # steps between two checks for finished rows: a check costs several steps
FEWEST_ROWS = 64  # the smallest batch that has graphs: a smaller one takes as long
FILLED_EVERY = 32  # positions between two sizes of the cache that have graphs


def corner(x: Tensor, like: Tensor) -> Tensor:
    """The view of x with the shape of `like`: the first entries along each dimension."""
    return x[tuple(map(slice, like.shape))]


class CapturedDecoder:
    """The `decode` of sample.py, each step replayed as one CUDA graph.

    A graph reads and writes fixed addresses and takes no arguments. So all tensors of a step live
    as long as the decoder. The numbers that the host knows, of rows and of positions, choose the
    graph. They are rounded up, so that there are few graphs. Weights have fixed addresses too: the
    decoder sees changes in place, by an optimizer or by `load_state_dict`, and no new tensors.

    experiments/machine/README.md says, kernel by kernel, why a step can be captured.
    """

    def __init__(self, model: Transformer, rows: int, positions: int):
        self.model, self.device = model, model.embedding.weight.device
        self.positions = positions
        self.cache = new_cache(model, rows, positions)
        self.rollout = empty_rollout(rows, positions, 0, self.device)
        self.noise = torch.zeros((rows, positions), device=self.device)
        self.rows = torch.arange(rows, device=self.device)  # cache row -> row of the rollout
        self.current = torch.zeros_like(self.rows)  # cache row -> its last token
        # The sizes of batch that have graphs. Finished rows fill a batch up to the next size.
        self.sizes = [rows]
        while self.sizes[-1] >= 2 * FEWEST_ROWS:
            self.sizes.append((self.sizes[-1] + 1) // 2)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.captures = self.device.type == "cuda"
        if self.captures:
            # The default stream cannot be captured. Warm-up and capture share a stream, because
            # cuBLAS makes a workspace for each: the warm-up makes it, outside of any graph's pool.
            self.stream = torch.cuda.Stream(self.device)
            # What a step allocates ends with it, so the graphs can share memory, in any order.
            self.pool = torch.cuda.graph_pool_handle()

    def generate(self, model: Transformer, prompts: list[list[int]], **how) -> Rollout:
        """`sample.generate`, by graphs. Also raises ValueError for another model, and for more rows
        or positions than the decoder was made for."""
        return generate(model, prompts, new_cache=self.first_rows, decode=self.decode, **how)

    def first_rows(self, model: Transformer, rows: int, positions: int) -> KVCache:
        """The first rows of the decoder's cache, instead of a new cache."""
        if model is not self.model:
            raise ValueError("the decoder is another model's")
        if rows > self.sizes[0] or positions > self.positions:
            limits = f"a decoder for {self.sizes[0]} rows of {self.positions} positions"
            raise ValueError(f"{rows} rows of {positions} positions do not fit {limits}")
        return self.cache.first(rows, 0)

    def decode(self, generation: Generation, sampled: Tensor, steps: int) -> None:
        """`sample.decode`, for the cache from `first_rows`."""
        cache, rollout, noise = generation.cache, generation.rollout, generation.noise
        self.rollout.finished.fill_(True)  # rows beyond this rollout count as finished
        self.cache.lengths.zero_()
        self.rows.copy_(torch.arange(len(self.rows), device=self.device))
        names = ("tokens", "mask", "logps", "entropy", "finished")
        results = [(getattr(self.rollout, name), getattr(rollout, name)) for name in names]
        others = [(self.cache.lengths, cache.lengths), (self.noise, noise), (self.current, sampled)]
        for mine, given in (*results, *others):
            corner(mine, given).copy_(given)
        size, constants = self.sizes[0], (generation.temperature, generation.eos_id)
        for step in range(steps):
            filled = cache.filled + step
            if step % LOOK_EVERY == 0:
                size = self.compact(size, filled)
                if size == 0:
                    break
            filled = math.ceil((filled + 1) / FILLED_EVERY) * FILLED_EVERY
            self.replay(size, min(filled, self.positions), *constants)
        for mine, given in results:
            given.copy_(corner(mine, given))

    def compact(self, size: int, filled: int) -> int:
        """The smallest size of batch that holds all unfinished rows, or 0 if all are finished. If
        it is smaller than `size`, unfinished rows move to the front, and finished rows follow."""
        finished = self.rollout.finished[self.rows[:size]]
        running = size - int(finished.sum())  # the only wait for the GPU
        fitting = min(each for each in self.sizes if each >= running) if running else 0
        if 0 < fitting < size:
            order = finished.int().argsort(stable=True)[:fitting]
            kept = self.cache.first(size, filled)
            kept.select(order)  # moves keys and values within the cache, but returns new lengths
            self.cache.lengths[:fitting] = kept.lengths
            for x in (self.rows, self.current):
                x[:fitting] = x[order]  # x[order] is a copy, so no row is overwritten unread
        return fitting

    def step(self, size: int, filled: int, temperature: float, eos_id: int) -> None:
        """Sample one more token for the first `size` rows. After it, no row has more than `filled`
        positions. A graph captures this: nothing here may wait for the GPU, or depend on a number
        of the host that differs between steps."""
        cache = self.cache.first(size, filled - 1)  # the model adds the position that it fills
        # Autocast would cache its cast weights, and a graph would read these old copies for ever.
        # Without the cache, each replay casts the weights again.
        with torch.autocast(self.device.type, enabled=False, cache_enabled=False):
            logits = self.model(self.current[:size, None], cache)[:, 0]
        rows, lengths = self.rows[:size], cache.lengths
        self.current[:size] = draw(
            self.rollout, self.noise, rows, lengths, logits, temperature, eos_id
        )

    def replay(self, *key) -> None:
        """Run a step by its graph. The first step with a key has no graph yet: it runs on a stream
        of its own, as the warm-up that a capture needs. Then the graph is captured, which records
        kernels and runs none. So each call is one step, the first too."""
        if not self.captures:
            self.step(*key)
        elif key in self.graphs:
            self.graphs[key].replay()
        else:
            main = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(main)
            with torch.cuda.stream(self.stream):
                self.step(*key)
            main.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.step(*key)
            self.graphs[key] = graph  # last, so that an interrupted capture leaves no graph
