"""What the layers of this worker's model are, and the pages that follow from it.

vLLM takes blocks of one size from one pool for all layers. Where full-attention layers, which are
ours, stand beside sliding windows, it packs the layers of a block into as many bytes as the widest
group needs, if blocks are the outermost axis of memory; layers with chunked local attention stay
one page a block. Either way pages of ours that hold fewer bytes than a window's page would waste
the rest, so they hold more tokens there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin.config import settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ONE_KIND = (
    "a cache policy with layers(...) cannot serve a model with layers of another kind than full "
    "attention"
)
FILLED = 0.9  # of a block of the windows that a block of ours fills at least


@dataclass(frozen=True)
class Kinds:
    """Layers of a worker.

    Attributes:
        ours: numbers of the layers under the policy, ascending.
        windows: sliding-window layers.
        chunked: layers with chunked local attention.
        states: layers with a state of constant size.
        token_bytes: bytes of a token in a sliding-window or chunked layer, the largest of them.

    """

    ours: tuple[int, ...]
    windows: int
    chunked: int
    states: int
    token_bytes: int

    @property
    def plain(self) -> bool:
        """Whether every layer is ours."""
        return not self.windows + self.chunked + self.states

    @property
    def packed(self) -> bool:
        """Whether groups of unlike page sizes are to be packed into blocks."""
        return bool(self.ours) and self.windows > 0 and not self.chunked

    def page_tokens(self, block: int, our_bytes: int) -> int:
        """Tokens of our pages: the fewest that fill a block.

        Args:
            block: vLLM's block size.
            our_bytes: bytes of a token in one layer of ours.

        """
        share = len(self.ours) if self.packed else 1  # layers of ours in a block
        most = FILLED * self.token_bytes * block
        return block * max(1, -int(-most // (share * our_bytes * block)))


def kinds_of(vllm_config: VllmConfig) -> Kinds:
    """Look at the layers that the model has made in this process."""
    modules = vllm_config.compilation_config.static_forward_context
    ours, windows, chunked, states, token_bytes = [], 0, 0, 0, 0
    for name, module in modules.items():
        if isinstance(module, MambaBase):
            states += 1
        elif isinstance(module, Attention) and getattr(module.impl, "is_ours", False):
            ours.append(extract_layer_index(name))
        elif isinstance(module, Attention) and (local := _local(module)):
            chunked += local == "chunked"
            windows += local == "window"
            size = 2 * module.num_kv_heads * module.head_size * module.kv_cache_torch_dtype.itemsize
            token_bytes = max(token_bytes, size)
    return Kinds(tuple(sorted(ours)), windows, chunked, states, token_bytes)


def _local(module: Attention) -> str:
    if isinstance(module, ChunkedLocalAttention):
        return "chunked"
    return "window" if module.sliding_window is not None else ""


def refuse_other_layers(vllm_config: VllmConfig) -> None:
    """Refuse a model of which a policy would leave layers alone whose cache grows, or all layers.

    Raises:
        PolicyError: naming what was found.

    """
    model, kinds = vllm_config.model_config.model, kinds_of(vllm_config)
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        if _grows(module) and not getattr(module.impl, "is_ours", False):
            raise PolicyError(
                "a cache policy cannot serve layers that bring an attention backend of their own; "
                f"layer {extract_layer_index(name)} of {model} has "
                f"{module.attn_backend.get_name()}; drop the policy"
            )
    if not kinds.ours and vllm_config.parallel_config.pipeline_parallel_size == 1:
        raise PolicyError(
            f"a cache policy is for layers of full attention, and {model} has none: its cache "
            "does not grow; drop the policy, or give --disable-sliding-window if it has windows"
        )
    asked = settings(vllm_config)
    if asked is not None and asked.policy.edges and not kinds.plain:
        raise PolicyError(f"{ONE_KIND}; {model} has")


def _grows(module: object) -> bool:
    decoder = isinstance(module, Attention) and module.attn_type == AttentionType.DECODER
    return decoder and not _local(module)


def policy_layers(vllm_config: VllmConfig) -> tuple[int, ...]:
    """Numbers of the model's layers that are under the policy, those of other ranks included.

    Raises:
        PolicyError: they cannot be told from this rank.

    """
    kinds = kinds_of(vllm_config)
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return kinds.ours
    if not kinds.plain:
        raise PolicyError(
            "a cache policy cannot be combined with pipeline parallelism on a model with layers of "
            "several kinds; drop --pipeline-parallel-size"
        )
    return tuple(range(vllm_config.model_config.get_total_num_hidden_layers()))


def next_layer(vllm_config: VllmConfig) -> int:
    """Number of the attention layer that is being made; vLLM registers it afterwards."""
    made = vllm_config.compilation_config.static_forward_context.values()
    return sum(hasattr(module, "impl") for module in made)  # others than attention are in it too


def is_full_attention(
    num_heads: int,  # noqa: ARG001
    head_size: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    num_kv_heads: int,  # noqa: ARG001
    alibi_slopes: list[float] | None = None,  # noqa: ARG001
    sliding_window: int | None = None,
    kv_cache_dtype: str = "auto",  # noqa: ARG001
    logits_soft_cap: float | None = None,  # noqa: ARG001
    attn_type: str = AttentionType.DECODER,
    *_: Any,
    **__: Any,
) -> bool:
    """Whether a layer with these arguments of an attention implementation is ours."""
    return sliding_window is None and attn_type == AttentionType.DECODER
