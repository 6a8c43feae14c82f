"""Sampling on a GPU by CUDA graphs: each step after the first token is one launch, not a hundred.

    decoder = CapturedDecoder(model, rows, positions)
    rollout = decoder.generate(model, prompts, ...)        # as sample.generate, token for token

Elsewhere than on a GPU the same step runs as it is.
"""

import math

import torch
from torch import Tensor

from model import KVCache, Transformer
from sample import Generation, Rollout, draw, empty_rollout, generate, new_cache

LOOK_EVERY = 16  # tokens between two looks: these steps are so short that a look costs several
FEWEST_ROWS = 64  # the smallest batch that has graphs: fewer rows would take as long
FILLED_EVERY = 32  # positions by which graphs differ


def corner(x: Tensor, like: Tensor) -> Tensor:
    """The first entries of x along each dimension, as many as `like` has; in the memory of x."""
    return x[tuple(map(slice, like.shape))]


class CapturedDecoder:
    """The `decode` of sample.py, each step replayed as one CUDA graph.

    A graph reads and writes fixed addresses and takes no arguments. So all that a step needs lies
    in tensors that live as long as the decoder. What the host knows of a step (how many rows, how
    many positions) is in the key of the graph, rounded up so that there are few graphs. Weights are
    found at their addresses too: a decoder follows weights that are changed in place, by an
    optimizer or by `load_state_dict`, and no others.
    """

    def __init__(self, model: Transformer, rows: int, positions: int):
        self.model, self.device = model, model.embedding.weight.device
        self.positions = positions
        self.cache = new_cache(model, rows, positions)
        self.rollout = empty_rollout(rows, positions, 0, self.device)
        self.noise = torch.zeros((rows, positions), device=self.device)
        self.rows = torch.arange(rows, device=self.device)  # the rollout's row of each cache row
        self.current = torch.zeros_like(self.rows)  # the last token of each
        # The batches that have graphs; a batch between two is filled up with finished rows.
        self.sizes = [rows]
        while self.sizes[-1] >= 2 * FEWEST_ROWS:
            self.sizes.append((self.sizes[-1] + 1) // 2)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)  # the default stream cannot be captured
            self.pool = torch.cuda.graph_pool_handle()  # shared: nothing in it outlives a step

    def generate(self, model: Transformer, prompts: list[list[int]], **how) -> Rollout:
        """As `sample.generate`. Raises ValueError also for another model, and for more rows or
        positions than the decoder was made for."""
        return generate(model, prompts, new_cache=self.first_rows, decode=self.decode, **how)

    def first_rows(self, model: Transformer, rows: int, positions: int) -> KVCache:
        """The decoder's own cache in the place of a new one."""
        if model is not self.model:
            raise ValueError("the decoder is another model's")
        if rows > self.sizes[0] or positions > self.positions:
            limits = f"a decoder for {self.sizes[0]} rows of {self.positions} positions"
            raise ValueError(f"{rows} rows of {positions} positions do not fit {limits}")
        return self.cache.first(rows, 0)

    def decode(self, generation: Generation, sampled: Tensor, steps: int) -> None:
        """As `sample.decode`, for the cache that `first_rows` gave."""
        cache, rollout, noise = generation.cache, generation.rollout, generation.noise
        self.rollout.finished.fill_(True)  # rows that this rollout does not have are never read
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
        """The size of the smallest batch that holds the rows that still run, 0 if none runs. Where
        it is below `size`, these rows move to the front, and finished rows after them."""
        finished = self.rollout.finished[self.rows[:size]]
        running = size - int(finished.sum())  # the one wait for the GPU
        fitting = min(each for each in self.sizes if each >= running) if running else 0
        if 0 < fitting < size:
            order = finished.int().argsort(stable=True)[:fitting]
            kept = self.cache.first(size, filled)
            kept.select(order)  # in the memory of the cache, but for the lengths
            self.cache.lengths[:fitting] = kept.lengths
            for x in (self.rows, self.current):
                x[:fitting] = x[order]  # indexing copies first: no row is overwritten unread
        return fitting

    def step(self, size: int, filled: int, temperature: float, eos_id: int) -> None:
        """One token more for the first rows, none of which then holds more than `filled` positions.
        A graph captures this: nothing here may wait for the GPU, or come from the host and differ
        from step to step."""
        cache = self.cache.first(size, filled - 1)  # the model adds the position that it fills
        # Autocast keeps the weights it has cast. From a cache filled before the capture, a graph
        # would go on reading weights of then; without one, each replay casts anew.
        with torch.autocast(self.device.type, enabled=False, cache_enabled=False):
            logits = self.model(self.current[:size, None], cache)[:, 0]
        rows, lengths = self.rows[:size], cache.lengths
        self.current[:size] = draw(
            self.rollout, self.noise, rows, lengths, logits, temperature, eos_id
        )

    def replay(self, *key) -> None:
        """A step, from its graph where there is one. The first step with a key runs as it is, on a
        stream of its own: a capture needs this warm-up. The capture then records kernels and runs
        none."""
        if self.device.type != "cuda":
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
            self.graphs[key] = graph  # only now: an interrupted capture leaves none
