"""An engine whose requests grow, come and go compiles no kernel after its start."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cache_policies.kernels import contract
from cache_policies.kernels.contract import Mass, Reads
from cache_policies.kernels.triton import sparse, tasks, warm
from cache_policies.kernels.triton.device.launched import VARYING
from cache_policies.kernels.triton.kernel import TritonKernel
from cache_policies.kernels.triton.launch import Launch, recorded
from tests.kernels.triton.setup import make

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted are not compiled", allow_module_level=True)

from tests.kernels.triton.aot import launches, specialized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cache_policies.kernels.contract import Batch

SEQS, LISTED = 7, 128  # queries of a list of a sparse prefill
LENGTHS = (0, 1, 15, 16, 100, 128, 129, 640, 1000, 2048, 4111)  # tokens computed before a step
CHUNKS = (1, 1, 2, 16, 33, 1, 128, 250)  # fresh tokens


def packed(
    columns: Sequence[torch.Tensor], device: torch.device, buffer: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """As on a GPU, where counts lie behind one another."""
    assert buffer is None
    return torch.cat(tuple(columns)).to(device).split([len(column) for column in columns])


class Layer:
    """A layer that does in every step all that methods may ask of it."""

    def __init__(self, policy: str, **options: Any) -> None:
        options = {"heads": 4, "kv_heads": 2, "dtype": torch.bfloat16} | options
        self.setup = make(policy, seqs=SEQS, max_tokens=4608, **options)
        # an odd width, so that rows begin anywhere
        self.setup.block_table = self.setup.block_table.repeat(1, 2)[:, :39].contiguous()
        self.kernel = TritonKernel(self.setup.layout, self.setup.shape)

    def step(self, computed: list[int], fresh: list[int], splits: int) -> list[Launch]:
        """What is launched; ``splits`` is also the number of pages that are listed."""
        setup, kernel, pages = self.setup, self.kernel, self.setup.pages
        kernel.splits, count = splits, len(computed)
        batch = replace(setup.batch(computed, fresh), block_table=setup.block_table[:count])
        tokens, heads = setup.tokens(sum(fresh), 0), setup.shape.num_kv_heads
        first = torch.arange(count, dtype=torch.int32)
        held = max(c + f for c, f in zip(computed, fresh, strict=True))
        mass = Mass(0 * first, 0 * first, 0 * first, torch.zeros(heads, held))
        lists = -(-max(fresh) // LISTED)
        reads = Reads(*self._listed(count, splits), first)
        own = Reads(*self._listed(count * lists, splits), first * lists, LISTED)
        blocks = torch.tensor([(i, 0, min(LISTED, f)) for i, f in enumerate(fresh)])
        map_ = torch.zeros(count, heads, splits + setup.block_table.shape[1], dtype=torch.int32)
        with recorded() as calls:
            for options in ((), (mass, None)):
                kernel.attend(pages, batch, *tokens, torch.empty_like(tokens[0]), *options)
            for there in (batch, replace(batch, slots=map_)):  # of which lists say what heads lack
                for options in ((None, reads), (mass, reads), (mass, own)):
                    kernel.attend(pages, there, *tokens, torch.empty_like(tokens[0]), *options)
                kernel.append(pages, there, *tokens[1:])
                self._cut(there.after_append(), tokens)
                kernel.page_mass(pages, there, *tokens[:2], blocks.int(), 8)
        return calls

    def _listed(self, lists: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.setup.shape.num_kv_heads
        count = torch.zeros(lists, heads, dtype=torch.int32)
        return torch.zeros(lists, heads, width, dtype=torch.int32), count

    def _cut(self, batch: Batch, tokens: Sequence[torch.Tensor]) -> None:
        """Read and write all tokens of all requests."""
        held = (batch.stored + batch.ring).tolist()
        index = torch.cat([torch.arange(n, dtype=torch.int32) for n in held])
        index = index.expand(self.setup.shape.num_kv_heads, -1)
        start = torch.tensor([0, *held]).cumsum(0).int()
        key, value = self.kernel.read(self.setup.pages, batch, *tokens[1:], index, start)
        self.kernel.write(self.setup.pages, batch, index.contiguous(), key, value, start)


def kinds(calls: list[Launch]) -> dict[tuple[Any, ...], str]:
    """What Triton would compile for launches, each with the names of its arguments."""
    found = {}
    for call in calls:
        key, *_ = specialized(call)
        known = dict(zip(call.function.arg_names, key, strict=True))
        found[call.function.__name__, key, str(call.options)] = f"{call.function.__name__}: {known}"
    return found


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        *((policy, {}) for policy in ("kivi-4bit", "flexgen-4bit", "rotated-3bit", "int8", "raw")),
        ("kivi-2bit+layers(codec=fp16)", {}),
        ("kivi(k_bits=8,v_bits=4,group=16,residual=32)", {"head_size": 80, "page_tokens": 32}),
        ("rotated-3bit", {"head_size": 96, "kv_heads": 1, "sinks": True}),
        ("int8", {"head_size": 256, "kv_heads": 4, "soft_cap": 50.0, "dtype": torch.float16}),
        ("raw", {"head_size": 128, "dtype": torch.float32}),
    ],
)
def test_triton_compiles_at_start_what_all_steps_launch(
    policy: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (contract, tasks, sparse):
        monkeypatch.setattr(module, "beside", packed)
    layer = Layer(policy, **options)
    known = kinds(warm.launches(layer.setup.layout, layer.setup.shape, (8,)))
    assert len(known) <= 36, "of all methods together, for one layout of pages"
    assert known.keys() == kinds(layer.step([300, 200], [1, 250], 3)).keys(), "no more, no fewer"
    for number in range(12):
        seqs = range(1 + number % SEQS)
        computed = [LENGTHS[(number * 3 + seq * 5) % len(LENGTHS)] for seq in seqs]
        fresh = [CHUNKS[(number + seq) % len(CHUNKS)] for seq in seqs]
        more = kinds(layer.step(computed, fresh, 1 + number * 5))
        assert not [text for key, text in more.items() if key not in known]


def test_triton_arguments_that_are_not_specialized_exist() -> None:
    functions = {call.function for call in launches("kivi-4bit").values()}
    plain = {p.name for f in functions for p in f.params if p.do_not_specialize}
    assert plain == set(VARYING)
