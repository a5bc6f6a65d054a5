"""What codecs lose of keys with a large bias, as Qwen2.5's have: it turns with the position.

Usage: ``python -m benchmarks.quality_bias [--norm 600] [--head-size 128] [--longest 8192]
[--codec C ...]``

Keys are normal numbers plus a bias in a few channels, under rotary embedding (base 1e6); queries
are normal numbers. The bias is in channels that turn slowly, in those that turn fast, or absent.
The mean of the turned bias over ``longest`` positions is taken from the keys of codecs that profit,
as the engine does (``longest`` is its ``--max-model-len``); ``as it is``: without that.
Prints the root mean square error of the scores q.k / sqrt(d), of 32 queries after the last of
2,048 tokens; the exact scores' own spread is about 1 without a bias. An error of 0.1 changes a
token's weight by a tenth; from about 1 on the attention is another one.
"""

from __future__ import annotations

import argparse

import torch

from cache_policies.pages.layout import PageLayout
from cache_policies.policy import parse
from cache_policies.retention.rope import Rope

TOKENS, QUERIES, PAGE, HEADS = 2048, 32, 128, 4
CODECS = (
    "fp16", "bf16", "int8", "kivi(k_bits=8,v_bits=4)", "kivi-4bit", "kivi-2bit", "flexgen-4bit",
    "rotated(k_bits=8,v_bits=4)", "rotated-4bit", "rotated-3bit",
)  # fmt: skip


def rope(head_size: int, longest: int) -> Rope:
    """Rotary embedding of base 1e6, Qwen2.5's."""
    frequency = 1e6 ** (-torch.arange(0, head_size, 2).double() / head_size)
    angle = torch.arange(longest).double()[:, None] * frequency
    return Rope(torch.cat([angle.cos(), angle.sin()], 1).float(), head_size)


def bias(norm: float, head_size: int, pairs: range) -> torch.Tensor:
    """``[head_size]``: of this norm, in both channels of a few pairs."""
    out = torch.zeros(head_size)
    channels = [*pairs, *(pair + head_size // 2 for pair in pairs)]
    out[channels] = norm * len(channels) ** -0.5
    return out


def score_error(codec: str, keys: torch.Tensor, queries: torch.Tensor) -> float:
    """RMS error of the scores of ``queries`` ``[heads, m, d]`` with ``keys`` ``[heads, n, d]``."""
    size = keys.shape[2]
    layout = PageLayout(parse(codec).codec, size, PAGE, torch.float32)
    stored = []
    for page in keys.split(PAGE, 1):
        views = layout.views(torch.zeros(HEADS, layout.head_bytes, dtype=torch.uint8))
        turned = layout.codec.turned(page)
        layout.codec.write(views, 0, turned, turned)
        stored.append(layout.codec.turned(layout.codec.read(views, PAGE)[0]))
    error = queries @ (torch.cat(stored, 1) - keys).transpose(1, 2) * size**-0.5
    # what all scores of a query have in common does not change its softmax
    return float((error - error.mean(2, keepdim=True)).square().mean().sqrt())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--norm", type=float, default=600.0)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--codec", action="append")
    options = parser.parse_args()
    torch.manual_seed(0)
    size, half = options.head_size, options.head_size // 2
    turned, place = rope(size, options.longest), torch.arange(TOKENS)
    plain = torch.randn(HEADS, TOKENS, size)
    ahead = torch.randn(HEADS, QUERIES, size)
    queries = turned.rotate(ahead, torch.arange(TOKENS, TOKENS + QUERIES))
    places = {"none": None, "slow": range(half - 2, half), "fast": range(2)}
    columns = ("no bias", "slow", "slow, as it is", "fast", "fast, as it is")
    print(f"{'codec':30}{'bytes':>8}" + "".join(f"{name:>16}" for name in columns))
    mean = turned.mean_rotation(0, options.longest)
    for codec in options.codec or CODECS:
        errors = []
        for pairs in places.values():
            added = torch.zeros(size) if pairs is None else bias(options.norm, size, pairs)
            keys = turned.rotate(plain + added, place)
            offset = mean @ added if parse(codec).codec.takes_key_offset else torch.zeros(size)
            errors.append(score_error(codec, keys - offset, queries))
            if pairs is not None:
                errors.append(score_error(codec, keys, queries))
        stored = PageLayout(parse(codec).codec, size, PAGE, torch.float32).bytes_per_token
        print(f"{codec:30}{stored:8.0f}" + "".join(f"{error:16.4f}" for error in errors))


if __name__ == "__main__":
    main()
