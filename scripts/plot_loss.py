"""Draws the loss curve of a run from its metrics: ``python scripts/plot_loss.py shakespeare loss.svg``.

Needs the extra ``plots``. Losses are in nats a byte, so that runs with other vocabularies compare.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from hipgpt_jax.runs import directory


def main(run: str, output: Path) -> None:
    """Writes the figure of ``run`` to ``output``, PNG or SVG by its name."""
    lines = [json.loads(line) for line in (directory.find(run) / directory.METRICS_NAME).read_text().splitlines()]
    train = np.array([(line["step"], line["loss"]) for line in lines if "loss" in line])
    keys = ("step", "validation_nats_per_byte", "validation_loss")
    validation = np.array([[line[key] for key in keys] for line in lines if keys[1] in line])
    nats_of_token = validation[-1, 1] / validation[-1, 2]

    plt.rcParams.update({"svg.hashsalt": "hipgpt_jax", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(train[:, 0], train[:, 1] * nats_of_token, color="#9aa5b1", linewidth=1, label="training")
    axes.plot(validation[:, 0], validation[:, 1], color="#c0392b", marker="o", markersize=3, label="validation")
    axes.annotate(
        f"{validation[-1, 1]:.3f}",
        tuple(validation[-1, :2]),
        xytext=(4, 8),
        textcoords="offset points",
        color="#c0392b",
    )
    axes.set(xlabel="step", ylabel="loss, nats a byte", title=run, ylim=(1.2, 2.6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("plot_loss: error: give a run and a file: python scripts/plot_loss.py RUN FILE.svg")
    main(sys.argv[1], Path(sys.argv[2]))
