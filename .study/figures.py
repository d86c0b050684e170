"""The study's tables and pictures from results.jsonl: `python .study/figures.py`, which writes law_of_scale.png, tokens.png
and prints Markdown for RESULTS.md and README.md.

A cell is a vocabulary, a width and a number of steps. In it a head's gain is the mean bpb of tied less the head's, at equal
bytes and equal steps. Its price is the break-even ratio: how many times longer its step may take before tied, with the steps
of the time saved, is as good; by the line through tied at the cell's steps and at a tenth more.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from train_gpt import welch  # noqa: E402

HEADS = ("untied", "mos2", "mos4", "delta64", "late")
T_95 = 2.26  # Student's t for 9 degrees of freedom: three samples of four seeds


def read_results(first):
    """The results whose row begins with `first`, each with the other parts of its row's name."""
    for line in (HERE / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        start, *rest = result["row"].split("-")
        if start.startswith(first):
            yield start, rest, result


def read_cells():
    """By (vocabulary, width, steps): by head, the bpb of its seeds; and the same for `tied+10%`."""
    bpb = defaultdict(dict)
    for vocab, (dim, steps, head, seed), result in read_results("v"):
        bpb[int(vocab[1:]), int(dim[1:]), int(steps[1:]), head][int(seed)] = result["val_bpb"]

    cells = defaultdict(dict)
    for (vocab, dim, steps, head), seeds in sorted(bpb.items()):
        if head == "tied" and steps % 11 == 0:
            cells[vocab, dim, steps * 10 // 11]["tied+10%"] = list(seeds.values())
        else:
            cells[vocab, dim, steps][head] = list(seeds.values())
    return cells


def break_even(tied, longer, head):
    """The ratio and half its 95% interval, by the delta method."""
    gain, slope = np.mean(tied) - np.mean(head), np.mean(tied) - np.mean(longer)
    v_tied, v_longer, v_head = (np.var(x, ddof=1) / len(x) for x in (tied, longer, head))
    variance = (v_tied + v_head) / slope**2 + gain**2 * (v_tied + v_longer) / slope**4
    variance -= 2 * gain * v_tied / slope**3
    return 1 + 0.1 * gain / slope, 0.1 * T_95 * math.sqrt(variance)


def rows(cells):
    """A row for each head of each cell: the cell, head, gain, half interval, p, ratio, half interval, seeds."""
    found = []
    for cell, heads in cells.items():
        tied, longer = heads.get("tied"), heads.get("tied+10%")
        for head in HEADS:
            sample = heads.get(head)
            if not tied or not sample or min(len(tied), len(sample)) < 3:
                continue
            _, p, half = welch(sample, tied)
            price = break_even(tied, longer, sample) if longer and len(longer) > 2 else None
            gain = np.mean(tied) - np.mean(sample)
            found.append((cell, head, gain, half, p, price, len(sample)))
    return found


def markdown(found, cells):
    lines = [
        "| V | D | V / D | tokens | head | gain over tied, 95% | p | break-even time ratio, 95% | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (vocab, dim, steps), head, gain, half, p, price, seeds in found:
        ratio = f"{price[0]:.3f} +- {price[1]:.3f}" if price else "-"
        lines.append(
            f"| {vocab} | {dim} | {vocab // dim} | {steps * 2048 / 1e6:.1f}M | {head}"
            f" | {gain:+.4f} +- {half:.4f} | {p:.2g} | {ratio} | {seeds} |"
        )
    for (vocab, dim, steps), heads in cells.items():
        if len(heads.get("tied", [])) > 2 and len(heads.get("tied+10%", [])) > 2:
            a, b = heads["tied"], heads["tied+10%"]
            lines.append(
                f"| {vocab} | {dim} | {vocab // dim} | {steps * 2048 / 1e6:.1f}M | tied, 10% more steps"
                f" | {np.mean(a) - np.mean(b):+.4f} +- {welch(b, a)[2]:.4f} | {welch(b, a)[1]:.2g} | | {len(b)} |"
            )
    return "\n".join(lines)


def best_table():
    """PRESET=best, its parts and heads on it, each against the run that it changes, as Markdown."""
    bpb = defaultdict(list)
    for _, (steps, name, _), result in read_results("best11"):
        bpb[name, int(steps[1:])].append(result["val_bpb"])
    lines = ["| run | steps | bpb | difference, 95% | p | seeds |", "|---|---|---|---|---|---|"]
    for (name, steps), sample in bpb.items():
        other = "best" if name.startswith("best_") else "study"
        against = bpb.get((other, steps), [])
        difference = "| "
        if name != other and min(len(sample), len(against)) > 2:
            _, p, half = welch(sample, against)
            shift = np.mean(sample) - np.mean(against)
            difference = f"{shift:+.4f} +- {half:.4f} to {other} | {p:.2g}"
        spread = f" +- {np.std(sample, ddof=1):.4f}" if len(sample) > 1 else ""
        lines.append(
            f"| {name} | {steps} | {np.mean(sample):.4f}{spread} | {difference} | {len(sample)} |"
        )
    return "\n".join(lines)


def draw(found, axis, label, name):
    """Gain with its 95% interval, a line a head; `axis` gives a cell's place, or None where it is not shown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="gain over tied, bits per byte (up is better)")
    for i, head in enumerate(HEADS):
        points = [(axis(row[0]), row[2], row[3]) for row in found if row[1] == head]
        points = sorted(point for point in points if point[0] is not None)
        if points:
            x, gain, half = zip(*points)
            axes.errorbar(x, gain, yerr=half, fmt="o-", color=f"C{i}", capsize=4, label=head)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(HERE / name, dpi=120)


def main():
    cells = read_cells()
    found = rows(cells)
    print(markdown(found, cells))
    print(best_table())
    draw(found, lambda c: c[0] / c[1] if c[2] == 1500 else None, "V / D", "law_of_scale.png")
    at_128 = "training tokens, millions (V = 1024, D = 128)"
    draw(found, lambda c: c[2] * 2048 / 1e6 if c[:2] == (1024, 128) else None, at_128, "tokens.png")


if __name__ == "__main__":
    main()
