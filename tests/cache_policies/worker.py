"""One request, or several, in one attention layer, driven through ``Step`` without vLLM."""

from __future__ import annotations

import numpy as np
import torch

from cache_policies.kernels.contract import Kernel, Shape
from cache_policies.kernels.cpu import CpuKernel
from cache_policies.pages.plan import Plan
from cache_policies.policy import parse, parse_method
from cache_policies.policy.layouts import layouts
from cache_policies.retention.rope import Rope
from cache_policies.step.cut import Layer, Tokens
from cache_policies.step.heads import Latest, Slots
from cache_policies.step.request import Engine, RequestState, span_of
from cache_policies.step.step import Step

PAGE, HEADS, KV_HEADS, SIZE = 128, 6, 2, 64
SCALE = SIZE**-0.5
THETA = 10000.0
_ANGLES = torch.arange(4096).double()[:, None] * THETA ** (-torch.arange(0, SIZE, 2) / SIZE)
ROPE = Rope(torch.cat([_ANGLES.cos(), _ANGLES.sin()], 1).float(), SIZE)


class Text:
    """Queries, keys and values of a text: random, with keys that matter to some queries."""

    def __init__(self, length: int, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.query = torch.randn(length, HEADS, SIZE, generator=rng) * 1.5
        self.key = torch.randn(length, KV_HEADS, SIZE, generator=rng) * 1.5
        self.value = torch.randn(length, KV_HEADS, SIZE, generator=rng)


class Sequence:
    """A request: its text, what the worker knows of it, and its row."""

    def __init__(self, text: Text, method: str, prompt: int, engine: Engine) -> None:
        self.text, self.computed, self.row = text, 0, torch.zeros(0, dtype=torch.int32)
        span = span_of(parse_method(method), engine, prompt)
        plain = parse_method(method).is_plain
        self.state = None if plain else RequestState(parse_method(method), span)
        self.span = span


class Worker:
    """A layer with pages, and the scheduler's part of the work."""

    def __init__(
        self,
        codec: str = "raw",
        *,
        kernel: type[Kernel] = CpuKernel,
        caching: bool = True,
        pages: int = 200,
        layer: tuple[int, int] = (0, 1),
    ) -> None:
        policy = parse(codec)
        layout = layouts(policy, SIZE, PAGE, torch.float32)[policy.edges is not None]
        self.plan = Plan.of(layout)
        self.engine = Engine(self.plan, layer[1], 8000, 10**6 if caching else None)
        memory = torch.full((pages, KV_HEADS, layout.head_bytes), 255, dtype=torch.uint8)
        one = kernel(layout, Shape(HEADS, KV_HEADS, SCALE))
        self.layer = Layer(*layer, layout, one, memory, ROPE, SCALE)
        self.free = list(range(1, pages))

    def start(self, text: Text, method: str, prompt: int) -> Sequence:
        return Sequence(text, method, prompt, self.engine)

    def step(self, work: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
        """Compute ``fresh`` tokens of every sequence; returns the outputs."""
        for sequence, fresh in work:
            self._give_back(sequence)
            after = sequence.computed + fresh
            missing = sequence.span.pages(after) - len(sequence.row)
            new = [self.free.pop(0) for _ in range(missing)]
            sequence.row = torch.cat([sequence.row, torch.tensor(new, dtype=torch.int32)])
            if sequence.state is not None:
                sequence.state.advance(sequence.computed, after)
        width = max(len(s.row) for s, _ in work)
        table = torch.zeros(len(work), width, dtype=torch.int32)
        for i, (sequence, _) in enumerate(work):
            table[i, : len(sequence.row)] = sequence.row
        start = np.concatenate([[0], np.cumsum([f for _, f in work])]).astype(np.int32)
        computed = np.array([s.computed for s, _ in work], dtype=np.int32)
        step = Step(self.plan, start, computed, [s.state for s, _ in work], table)
        spans = [(s.text, slice(s.computed, s.computed + f)) for s, f in work]
        tokens = Tokens(
            *(
                torch.cat([getattr(text, name)[span] for text, span in spans])
                for name in Tokens._fields
            )
        )
        output = torch.zeros_like(tokens.query)
        step.run(self.layer, tokens, output)
        for sequence, fresh in work:
            sequence.computed += fresh
        return list(output.split([f for _, f in work]))

    def run(self, sequence: Sequence, chunks: list[int]) -> list[torch.Tensor]:
        return [self.step([(sequence, chunk)])[0] for chunk in chunks]

    def positions(self, sequence: Sequence) -> torch.Tensor:
        """Positions of the tokens held, ``[num_kv_heads, held]``; -1 where a head lacks one."""
        assert sequence.state is not None
        known = sequence.state.layers[self.layer.index]
        return known.positions(KV_HEADS, sequence.computed)

    def held(self, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values read back from the pages, in the order of ``positions``."""
        keep = None
        if sequence.state is not None and (retention := sequence.state.method.retention):
            keep = retention.kept(sequence.span.prompt, self.layer.index, self.layer.layers)
        count = sequence.span.held(sequence.computed, keep)
        row, division = sequence.span.store_row(sequence.computed), None
        if sequence.state is not None:
            division = sequence.state.layers[self.layer.index].division
        step = Step(self.plan, np.array([0, 0], dtype=np.int32),
                    np.array([0], dtype=np.int32), [None], sequence.row[None])  # fmt: skip
        batch = step._of_layer(self.layer, {}).slots.batch
        count += division.budgets.lead if division else 0
        one = batch.one(0, held=count, stored=self.plan.stored(count),
                        store_row=self.plan.ring_pages if division else row)  # fmt: skip
        if division:
            slots = Slots(one, self.plan, KV_HEADS, {0: (division.budgets, row)})
            one = slots.given({0: division}, Latest())
        empty = torch.zeros(0, KV_HEADS, SIZE)
        return self.layer.kernel.read(self.layer.pages, one, empty, empty)

    def release(self, sequence: Sequence) -> None:
        """Give every page back, poisoned."""
        self._give_back(sequence)
        self._free([int(p) for p in sequence.row if p])
        sequence.row = sequence.row[:0]

    def _give_back(self, sequence: Sequence) -> None:
        gone = sequence.span.given_back(sequence.computed)
        if len(gone):
            self._free([int(sequence.row[i]) for i in gone if sequence.row[i]])
            sequence.row[gone.start : gone.stop] = 0

    def _free(self, pages: list[int]) -> None:
        self.layer.pages[pages] = 255
        self.free = pages + self.free  # handed out next, so that a stale read shows


# Largest mean error of a held token. Keys of KIVI are encoded anew at every cut, which adds up.
GROUP_ERROR = {"raw": 1e-6, "fp16": 1e-3, "int8": 1e-2, "flexgen-4bit": 0.15, "kivi-4bit": 0.2,
               "kivi-2bit": 0.8, "kivi-2bit+layers(codec=fp16)": 1e-3,
               "rotated-4bit": 0.15, "rotated-3bit": 0.3}  # fmt: skip
