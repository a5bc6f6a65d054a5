"""A transformers model with random weights whose attention reads our pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu_machine import Row
from cache_policies.kernels.contract import Batch, Shape
from cache_policies.pages.plan import Plan
from cache_policies.policy import parse
from cache_policies.policy.layouts import layouts

if TYPE_CHECKING:
    from cache_policies.kernels.contract import Kernel

PAGE_TOKENS = 128
NAME = "kvthrift_pages"
CONFIG = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 4096, "initializer_range": 0.2,
}  # fmt: skip


@dataclass
class Pages:
    """Pages of all layers of one request.

    Attributes:
        kernel_class: attends and appends.
        policy: a policy string.
        device: where the pages are.
        computed: tokens in the pages.

    """

    kernel_class: type[Kernel]
    policy: str
    device: str
    computed: int = 0
    layers: dict[int, tuple[Any, torch.Tensor]] = field(default_factory=dict)
    table: torch.Tensor = field(init=False)
    plan: Plan = field(init=False)

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: Any, scaling: float = 0.0, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Transformers' attention function: ``[1, heads, tokens, head_size]`` each."""
        tokens = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        kernel, pages = self._layer(module.layer_idx, tokens, scaling)
        output = torch.empty_like(tokens[0])
        kernel.attend(pages, self._batch, *tokens, output)
        kernel.append(pages, self._batch, *tokens[1:])
        return output[None], None

    def step(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the last of some more tokens ``[1, count]``."""
        self._fresh, self._batch_made = tokens.shape[1], None
        position = torch.arange(self.computed, self.computed + self._fresh, device=self.device)
        logits: torch.Tensor = model(tokens, position_ids=position[None], use_cache=False).logits
        self.computed += self._fresh
        return logits[0, -1].float()

    @property
    def _batch(self) -> Batch:
        if self._batch_made is None:
            start = np.array([0, self._fresh], dtype=np.int32)
            computed = np.array([self.computed], dtype=np.int32)
            self._batch_made: Batch | None = Batch.of(self.plan, start, computed, self.table)
        return self._batch_made

    def _layer(self, index: int, tokens: list[torch.Tensor], scaling: float) -> Any:
        if index not in self.layers:
            (_, heads, size), kv_heads = tokens[0].shape, tokens[1].shape[1]
            packing = self.kernel_class.packing
            policy = parse(self.policy)
            layout = layouts(policy, size, PAGE_TOKENS, tokens[0].dtype, packing)[0]
            self.plan = Plan.of(layout)
            count = self.plan.ring_pages + 8
            self.table = torch.arange(1, count + 1, dtype=torch.int32, device=self.device)[None]
            shape = (count + 1, kv_heads, layout.head_bytes)
            pages = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            self.layers[index] = self.kernel_class(layout, Shape(heads, kv_heads, scaling)), pages
        return self.layers[index]


def random_model(device: str, dtype: torch.dtype) -> Any:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))  # type: ignore[arg-type]
    return model.to(device=device, dtype=dtype).eval()


@torch.inference_mode()
def logits_over_pages(
    model: Any, kernel_class: type[Kernel], policy: str, tokens: torch.Tensor, chunks: list[int]
) -> torch.Tensor:
    """Logits of the last token, the tokens given in chunks."""
    from transformers import AttentionInterface

    pages = Pages(kernel_class, policy, str(tokens.device))
    AttentionInterface.register(NAME, pages)
    model.set_attn_implementation(NAME)
    for part in tokens.split(chunks, 1):
        logits = pages.step(model, part)
    return logits


def model_row(
    policy: str, device: str, kernel_class: type[Kernel], oracle: type[Kernel], chunks: list[int]
) -> Row:
    """Raw pages against the stock model, or a codec against the oracle's kernels."""
    tokens = torch.randint(256, (1, sum(chunks)), generator=torch.Generator().manual_seed(1))
    stock, ours = random_model("cpu", torch.float32), random_model(device, torch.float32)
    if policy == "raw":
        with torch.inference_mode():
            expected = stock(tokens).logits[0, -1].float()
    else:
        expected = logits_over_pages(stock, oracle, policy, tokens, chunks)
    got = logits_over_pages(ours, kernel_class, policy, tokens.to(device), chunks).cpu()
    error = float((got - expected).norm() / expected.norm())
    note = f"relative difference of the logits {error:.1e}"
    return Row(f"transformers model over {policy} pages", error < 2e-2, note)
