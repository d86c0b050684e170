"""The study's tables and pictures from results.jsonl: `python .study/figures.py`.

It writes law_of_scale.png and tokens.png, the tables of RESULTS.md between their markers, and submission.json's list `study`.

A cell is a vocabulary, a width and a number of steps. In it a head's gain is the mean bpb of tied less the head's, at equal
bytes and equal steps. Its price is the break-even ratio: how many times longer its step may take before tied, with the steps
of the time saved, is as good; by the line through tied at the cell's steps and at a tenth more.
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from train_gpt import welch  # noqa: E402

HEADS = dict(
    untied="untied",
    mos2="mixture, K = 2",
    mos4="mixture, K = 4",
    delta64="delta, R = 64",
    late="delta from 2/3 on",
)
T_95 = dict(zip((3, 6, 9), (3.18, 2.45, 2.26)))  # Student's t, by degrees of freedom


def read_results(first):
    """The results whose row begins with `first`, each with the other parts of its row's name."""
    for line in (HERE / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        start, *rest = result["row"].split("-")
        if re.fullmatch(first, start):
            yield start, rest, result


def read_cells(first=r"v\d+", figure="val_bpb"):
    """By (vocabulary, width, steps): by head, its seeds' figures; and the same for `tied+10%`."""
    bpb = defaultdict(dict)
    for vocab, (*_, dim, steps, head, seed), result in read_results(first):
        vocab = result["settings"].get("vocab_size", 1024)
        bpb[vocab, int(dim[1:]), int(steps[1:]), head][int(seed)] = result[figure]

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
    freedom = min(9, 3 * (min(len(tied), len(longer), len(head)) - 1))
    return 1 + 0.1 * gain / slope, 0.1 * T_95[freedom] * math.sqrt(variance)


def compared(cells):
    """For each head of each cell: cell, head, gain, half interval, p, (ratio, half) or None, seeds."""
    found = []
    for cell, heads in cells.items():
        tied, longer = heads.get("tied"), heads.get("tied+10%")
        for head in ("tied+10%", *HEADS):
            sample = heads.get(head)
            if not tied or not sample or min(len(tied), len(sample)) < 3:
                continue
            _, p, half = welch(sample, tied)
            price = None
            if longer and len(longer) > 2 and head != "tied+10%":
                price = break_even(tied, longer, sample)
            gain = np.mean(tied) - np.mean(sample)
            found.append((cell, head, gain, half, p, price, len(sample)))
    return found


def law_table(first=r"v\d+"):
    lines = [
        "| V / D | V | D | tokens | head | gain over tied, bpb, 95% | p | break-even time ratio, 95% | gain before packing | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found, before = (compared(read_cells(first, name)) for name in ("val_bpb", "pre_quant_val_bpb"))
    for row, (*_, raw, _, _, _, _) in zip(found, before):
        (vocab, dim, steps), head, gain, half, p, price, seeds = row
        ratio = f"{price[0]:.3f} +- {price[1]:.3f}" if price else ""
        name = HEADS.get(head, "tied, 10% more steps")
        lines.append(
            f"| {vocab // dim} | {vocab} | {dim} | {steps * 2048 / 1e6:.1f}M | {name}"
            f" | {gain:+.4f} +- {half:.4f} | {p:.2g} | {ratio} | {raw:+.4f} | {seeds} |"
        )
    return "\n".join(lines)


def rate_table():
    """Mean bpb by head, width and the embedding's learning rate."""
    bpb = defaultdict(list)
    for _, (dim, _, name, _), result in read_results("rate1024"):
        head, rate = name.split("_")
        bpb[int(dim[1:]), head, rate].append((result["val_bpb"], result["pre_quant_val_bpb"]))
    lines = [
        "| D | head | `TIED_EMBED_LR` | bpb | before packing | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for (dim, head, rate), pairs in sorted(bpb.items()):
        after, before = np.transpose(pairs)
        spread = f" +- {np.std(after, ddof=1):.4f}" if len(after) > 1 else ""
        figures = f"{np.mean(after):.4f}{spread} | {np.mean(before):.4f} | {len(after)} |"
        lines.append(f"| {dim} | {head} | {rate} | {figures}")
    return "\n".join(lines)


def frozen_table():
    """Study A's heads, untrained as they were, and trained."""
    bpb = defaultdict(list)
    for _, (*_, name, _), result in read_results("frozen1024"):
        bpb[name].append(result["val_bpb"])
    lines = ["| head | untrained, as study A's were | trained |", "|---|---|---|"]
    if len(bpb["tied"]) > 1:
        tied = f"{np.mean(bpb['tied']):.4f} +- {np.std(bpb['tied'], ddof=1):.4f}"
        lines.append(f"| tied | | {tied} ({len(bpb['tied'])}) |")
    for head in ("factorized", "mos", "simplex"):
        cells = []
        for sample in (bpb[head + "0"], bpb[head + "1"]):
            spread = f" +- {np.std(sample, ddof=1):.4f}" if len(sample) > 1 else ""
            cells.append(f"{np.mean(sample):.4f}{spread} ({len(sample)})" if sample else "")
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def best_table():
    """PRESET=best, its parts and heads on it, each against the run that it changes."""
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


def draw(found, axis, label, title, name):
    """Gain with its 95% interval, a line a head; `axis` gives a cell's place, or None where it is not shown."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="bits per byte won over the tied head")
    axes.set_title(title, fontsize=11)
    places = set()
    for i, head in enumerate(HEADS):
        points = [(axis(row[0]), row[2], row[3]) for row in found if row[1] == head]
        points = sorted(point for point in points if point[0] is not None)
        if points:
            x, gain, half = zip(*points)
            places |= set(x)
            axes.errorbar(x, gain, yerr=half, fmt="o-", color=f"C{i}", capsize=4, label=HEADS[head])
    axes.axhline(0, color="grey", linewidth=1)
    axes.annotate(
        "better than tied", (0.01, 0.97), xycoords="axes fraction", va="top", color="grey"
    )
    axes.annotate("worse than tied", (0.01, 0.02), xycoords="axes fraction", color="grey")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(places))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.legend(loc="upper right")
    figure.savefig(HERE / name, dpi=120)


def insert(name, table):
    """Put a table between its markers in RESULTS.md."""
    path = HERE / "RESULTS.md"
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, _, rest = path.read_text().partition(begin)
    path.write_text(before + begin + table + "\n" + end + rest.partition(end)[2])


def update_submission():
    """The list `study` of submission.json: the figures of every run of results.jsonl."""
    path = HERE.parent / "submission.json"
    submission = json.loads(path.read_text())
    kept = "row head seed val_bpb pre_quant_val_bpb step_stop wallclock_seconds bytes_total hardware source_sha256"
    submission["study"] = [
        {name: result[name] for name in kept.split()} for _, _, result in read_results(".*")
    ]
    path.write_text(json.dumps(submission, indent=1))


def main():
    found = compared(read_cells())
    insert("law", law_table())
    insert("file order", law_table("file_order"))
    insert("rate", rate_table())
    insert("frozen", frozen_table())
    insert("best", best_table())
    update_submission()
    draw(
        found,
        lambda cell: cell[0] / cell[1] if cell[2] == 1500 else None,
        "V / D, the vocabulary over the width (1024 / 256, 1024 / 128, 1024 / 64)",
        "Untying wins the more, the wider the model; the mixture wins nothing",
        "law_of_scale.png",
    )
    draw(
        found,
        lambda cell: round(cell[2] * 2048 / 1e6, 1) if cell[:2] == (1024, 128) else None,
        "training tokens, millions (V = 1024, D = 128)",
        "By length of training",
        "tokens.png",
    )


if __name__ == "__main__":
    main()
