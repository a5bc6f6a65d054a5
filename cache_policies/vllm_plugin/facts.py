"""What a request held in the cache, counted by the block manager when the request ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.request import Request

    from cache_policies.vllm_plugin.manager import RingStoreManager

KV_CACHE = "kv_cache"


@dataclass(frozen=True)
class KVCacheFacts:
    """One request at its end.

    Attributes:
        policy: what was applied, method and codec.
        prompt_tokens: of the prompt.
        cached_tokens: of the prompt, found in the prefix cache.
        computed_tokens: of prompt and answer, that passed through the model or were found.
        kept_tokens: of those, still held (in the layer that holds most).
        pages: owned, counted in the block table.
        bytes: of those pages in all layers.
        compression_ratio: bytes the computed tokens take in 16 bit, over ``bytes``.
        read_share: of the prompt's reads of store pages under a sparse prefill, those that were
            made; None for other requests.

    """

    policy: str
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    kept_tokens: int
    pages: int
    bytes: int
    compression_ratio: float | None
    read_share: float | None = None

    @property
    def dropped_tokens(self) -> int:
        """Computed tokens that are held no more."""
        return self.computed_tokens - self.kept_tokens

    def as_dict(self) -> dict[str, Any]:
        """For a response; ``read_share`` where there is one."""
        return {k: v for k, v in asdict(self).items() if v is not None or k != "read_share"}


def processed_tokens(request: Request) -> int:
    """Tokens of a request that passed through the model, without those of a step under way."""
    return max(0, request.num_computed_tokens - request.num_in_flight_tokens)


def facts_of(
    managers: Sequence[RingStoreManager], request: Request, hit: int, read_share: float | None
) -> KVCacheFacts:
    """Count what a request holds, before its pages are freed.

    Args:
        managers: of the KV cache groups that are ours, usually one.
        request: that ends.
        hit: tokens found in the prefix cache.
        read_share: as in ``KVCacheFacts``.

    """
    computed, first = processed_tokens(request), managers[0]
    pages = [m.owned_pages(request.request_id) for m in managers]
    used = sum(n * m.page_bytes for n, m in zip(pages, managers, strict=True))
    whole = computed * sum(m.half_bytes_per_token for m in managers)
    method = first.method(request)
    return KVCacheFacts(
        policy=first.codec if method.is_plain else f"{method}+{first.codec}",
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=hit,
        computed_tokens=computed,
        kept_tokens=first.span(request).held(computed),
        pages=sum(pages),
        bytes=used,
        compression_ratio=round(whole / used, 4) if used else None,
        read_share=None if read_share is None else round(read_share, 4),
    )
