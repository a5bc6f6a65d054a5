"""How much cache 10^2 to 10^6 users need, from bytes per token: the table of docs/scaling.md.

Usage: ``python -m benchmarks.sizing [--context 8192] [--requests-a-day 20] [--seconds 15]``

Bytes are those of the page declaration, which the block manager's own counts agree with
(``tests/engine/test_api.py``). Memory only: whether a machine computes fast enough is for
``kvthrift loadtest`` to say.
"""

from __future__ import annotations

import argparse
import math

import torch

from cache_policies.policy import parse
from server.capacity import capacity
from server.model_shape import ModelShape

POLICIES = ("fp16", "kivi-4bit", "kivi-2bit", "snapkv(budget=1024)+kivi-4bit")
SHAPE = ModelShape(32, 8, 128, torch.bfloat16)  # of an 8B model with 8 KV heads, as Llama 3.1's
MACHINE = 64 << 30  # bytes of cache beside the weights, e.g. on a GPU of 80 GB
PEAK = 0.1  # share of a day's requests in its busiest hour


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a request")
    parser.add_argument("--requests-a-day", type=float, default=20, help="of a user")
    parser.add_argument("--seconds", type=float, default=15, help="a request stays")
    asked = parser.parse_args()
    fit = {p: capacity(parse(p), SHAPE, MACHINE, asked.context).requests for p in POLICIES}
    each = ", ".join(f"{p}: {MACHINE / n / 2**20:.0f} MiB" for p, n in fit.items())
    print(f"a request of {asked.context} tokens takes {each}\n")
    print("| users | requests/s at the peak | at a time | " + " | ".join(POLICIES) + " |")
    print("| " + "--- | " * (3 + len(POLICIES)))
    for power in range(2, 7):
        rate = 10**power * asked.requests_a_day * PEAK / 3600
        together = math.ceil(rate * asked.seconds)  # Little's law
        machines = " | ".join(str(math.ceil(together / n)) for n in fit.values())
        print(f"| 10^{power} | {rate:.2g} | {together:,} | {machines} |")


if __name__ == "__main__":
    main()
