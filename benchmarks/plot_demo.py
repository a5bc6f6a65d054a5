"""Plot `make demo`'s results: passkey quality against capacity, output speed as colour.

Usage: ``python benchmarks/plot_demo.py demo-results/results.json docs/demo.png``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Read the results and write the picture."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    result = json.loads(source.read_text())
    rows, settings = result["rows"], result["settings"]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    speed = [row["output_tokens_per_second"] for row in rows]
    points = axis.scatter(
        [row["capacity_tokens"] / 1000 for row in rows],
        [100 * row["partial"] for row in rows],
        c=speed, s=140, cmap="viridis", edgecolor="black", zorder=3,
    )  # fmt: skip
    for row in rows:
        place = row["capacity_tokens"] / 1000, 100 * row["partial"]
        axis.annotate(row["policy"], place, xytext=(9, 5), textcoords="offset points")
    memory = settings["memory_bytes"] >> 20
    axis.set_xlabel(f"capacity, thousand tokens in {memory} MiB of cache")
    axis.set_ylabel("passkey found, % of its digits")
    axis.set_xlim(0, 1.25 * max(row["capacity_tokens"] for row in rows) / 1000)
    axis.set_ylim(0, 105)
    axis.grid(alpha=0.3)
    figure.colorbar(points, label="output tokens/s")
    axis.set_title(f"{settings['model']}: what a smaller cache costs and buys")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
