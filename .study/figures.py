"""The study's tables and pictures from results.jsonl: `python .study/figures.py` (needs matplotlib and scipy).

It writes law_of_scale.png and tokens.png, the tables of RESULTS.md and README's between their markers, and submission.json's
list `study`.

A cell is a vocabulary, a width, a number of steps of so many tokens, a kind of machine and a rate of the embedding. In it a
head's gain is the mean bpb of tied less the head's, at equal bytes and equal steps. Its price is the break-even ratio: how many
times longer its step may take before tied, with the steps of the time saved, is as good; by the line through tied at the
cell's steps and at a tenth more, with an interval as Fieller's (1954) for a ratio of two means, but with Welch's degrees of
freedom.
"""

import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

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
NAMES = {"tied": "tied", "tied+10%": "tied, 10% more steps", **HEADS}
RATE = 0.0175  # TIED_EMBED_LR where a row's name has no other
TENTH_MORE = {steps + steps // 10: steps for steps in (375, 1500, 3000)}


def read_results(first):
    """The results whose row's name has a first part like `first`, each with the other parts."""
    for line in (HERE / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        start, *rest = result["row"].split("-")
        if re.fullmatch(first, start):
            yield start, rest, result


def machine(result):
    return "GPU" if "NVIDIA" in result["hardware"] else "CPU"


def device(result):
    """The kind of processor, in a word."""
    named = re.search("H100|H200", result["hardware"])
    return named[0] if named else machine(result)


class Cell(NamedTuple):
    """What all runs of a comparison have in common, but for bytes and seeds."""

    vocab: int
    dim: int
    steps: int
    batch: int  # tokens of a step
    machine: str
    rate: float = RATE

    @property
    def millions(self):
        """Of training tokens."""
        return self.steps * self.batch / 1e6

    @property
    def bottleneck(self):
        return self.vocab / self.dim

    @property
    def common(self):
        """Whether it has the length of most cells, 3.1M tokens."""
        return (self.steps, self.batch) == (1500, 2048)


def read_cells(first=r"(v|cpu|long)\d+"):
    """By Cell: by head, its results by seed; also for `tied+10%`."""
    cells = defaultdict(lambda: defaultdict(dict))
    for _, (*_, dim, length, name, seed), result in read_results(first):
        steps, _, times = length[1:].partition("x")  # of 2,048 tokens, or so many times that
        head, _, rate = name.partition("_")
        steps, batch = int(steps), 2048 * int(times or 1)
        if head == "tied" and steps in TENTH_MORE:
            head, steps = "tied+10%", TENTH_MORE[steps]
        vocab = result["settings"].get("vocab_size", 1024)
        cell = Cell(vocab, int(dim[1:]), steps, batch, machine(result), float(rate or RATE))
        assert seed not in cells[cell][head], f"{result['row']} is there under two names"
        cells[cell][head][seed] = result
    return dict(sorted(cells.items()))


def at_one_rate(found):
    """The Comparisons, of cells that differ in the rate alone only those of one: with most heads; of these, best for tied."""
    by_cell = defaultdict(list)
    for c in found:
        by_cell[c.cell].append(c)

    chosen = {}
    for cell, comparisons in by_cell.items():
        place = cell._replace(rate=None)
        candidate = (-len(comparisons), comparisons[0].tied, cell)
        chosen[place] = min(candidate, chosen.get(place, candidate))
    return [c for c in found if chosen[c.cell._replace(rate=None)][2] == c.cell]


def values(results, name="val_bpb"):
    """A figure of each seed, the seeds in one order for all heads."""
    return np.array([results[seed][name] for seed in sorted(results)])


@dataclass
class Difference:
    """Of the means of two samples: Welch's p and half of the 95% interval, and its half by pairs of one seed."""

    mean: float
    p: float
    welch: float
    paired: float

    @property
    def wider(self):
        return max(self.welch, self.paired)


def difference(some, others, name="val_bpb"):
    """Mean of a figure over the results `some`, less that over `others`, in the seeds that both have."""
    shared = some.keys() & others.keys()
    a, b = (values({seed: results[seed] for seed in shared}, name) for results in (some, others))
    _, p, half = welch(a, b)
    paired = student_t.ppf(0.975, len(shared) - 1) * np.std(a - b, ddof=1) / math.sqrt(len(shared))
    return Difference(a.mean() - b.mean(), p, half, paired)


def break_even(tied, longer, head):
    """The ratio, and the ends of its 95% interval, infinite where it has none; that runs share seeds is not used.

    The ratio 1 + r / 10 is even where (1 - r) tied + r longer = head. The interval holds each r at which the
    difference of the two sides is within its own 95% interval (Welch's degrees of freedom) of zero.
    """
    samples = (tied, longer, head)
    means = np.array([np.mean(x) for x in samples])
    variances = np.array([np.var(x, ddof=1) / len(x) for x in samples])
    free = np.array([len(x) - 1 for x in samples])

    r = np.linspace(-100, 100, 20_001)  # as fine as the table's third digit
    weights = np.stack([1 - r, r, -np.ones_like(r)])
    parts = weights**2 * variances[:, None]
    variance = parts.sum(0)
    freedom = variance**2 / (parts**2 / free[:, None]).sum(0)
    inside = (means @ weights) ** 2 <= student_t.ppf(0.975, freedom) ** 2 * variance

    ends = r[inside][[0, -1]] if inside.any() else np.full(2, np.nan)
    ends[np.abs(ends) == 100] *= math.inf
    return 1 + 0.1 * np.array([(means[0] - means[2]) / (means[0] - means[1]), *ends])


@dataclass
class Comparison:
    """A head against tied in one cell; gains are tied's bpb less the head's."""

    cell: Cell
    head: str
    tied: float  # its mean bpb
    gain: Difference
    raw: Difference  # before packing
    price: tuple  # break_even, or None
    seeds: int
    devices: str


def compare(cell, heads, head):
    """The Comparison of a head with tied in the seeds that both have; `heads` are the cell's results, by head and seed."""
    seeds = heads["tied"].keys() & heads[head].keys()
    tied, other = ({seed: heads[name][seed] for seed in seeds} for name in ("tied", head))
    gain, raw = difference(tied, other), difference(tied, other, "pre_quant_val_bpb")

    longer = heads.get("tied+10%", {})
    price = None
    if len(longer) > 2 and head != "tied+10%":
        price = break_even(values(tied), values(longer), values(other))
    devices = sorted({device(result) for result in (*tied.values(), *other.values())})
    mean = values(tied).mean()
    return Comparison(cell, head, mean, gain, raw, price, len(seeds), " and ".join(devices))


def compared(cells):
    """A Comparison for each head of each cell that shares three seeds or more with tied there."""
    found = []
    for cell, heads in cells.items():
        for head in ("tied+10%", *HEADS):
            if len(heads.get("tied", {}).keys() & heads.get(head, {}).keys()) > 2:
                found.append(compare(cell, heads, head))
    return found


def law_table(first=r"(v|cpu|long)\d+"):
    lines = [
        "| D | V | tokens | head | rate | gain over tied, bpb, 95% | p | paired by seed | before packing, the wider 95%"
        " | break-even time ratio, 95% | seeds | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in compared(read_cells(first)):
        ratio = ""
        if c.price is not None:
            value, low, high = c.price
            ratio = f"{value:.3f} ({low:.3f} to {high:.3f})"
            if math.isinf(low) and math.isinf(high):
                ratio = f"{value:.3f} (no bounds)"
            elif math.isinf(high):
                ratio = f"{value:.3f} (above {low:.3f})"
            elif high < 0:
                ratio = "none"
            elif low < 0:
                ratio = f"{value:.3f} (below {high:.3f})"
        lines.append(
            f"| {c.cell.dim} | {c.cell.vocab} | {c.cell.millions:.1f}M | {NAMES[c.head]} | {c.cell.rate:.3g}"
            f" | {c.gain.mean:+.4f} +- {c.gain.welch:.4f} | {c.gain.p:.2g} | +- {c.gain.paired:.4f}"
            f" | {c.raw.mean:+.4f} +- {c.raw.wider:.4f} | {ratio}"
            f" | {c.seeds} | {c.devices} |"
        )
    return "\n".join(lines)


def answer_table():
    """README's, of the cells on GPUs: gains with the wider interval, a line a cell, by V / D, then by training."""
    gains, seeds = defaultdict(dict), {}
    for c in at_one_rate(compared(read_cells())):
        if c.cell.machine == "GPU":
            half = c.gain.wider
            bold = "**" if c.head in HEADS and abs(c.gain.mean) > half else ""
            gains[c.cell][c.head] = f"{bold}{c.gain.mean:+.3f} +- {half:.3f}{bold}"
            seeds[c.cell] = min(c.seeds, seeds.get(c.cell, c.seeds))

    heads = ("untied", "mos2", "tied+10%")
    names = [HEADS.get(head, "yardstick: tied, 10% more steps") for head in heads]
    lines = [
        f"| tokens | V | D | V / D | seeds | {' | '.join(names)} |",
        f"|---|---|---|---|---|{'---|' * len(heads)}",
    ]

    def by_bottleneck_then_training(cell):
        width_of_others = 0 if cell.common else cell.dim
        return width_of_others, cell.bottleneck, cell.vocab, cell.millions

    for cell in sorted(gains, key=by_bottleneck_then_training):
        cells = " | ".join(gains[cell].get(head, "not run") for head in heads)
        vocab = cell.vocab if cell.rate == RATE else f"{cell.vocab}, rate {cell.rate:.3g}"
        place = f"{cell.millions:.1f}M | {vocab} | {cell.dim} | {cell.bottleneck:.0f}"
        lines.append(f"| {place} | {seeds[cell]} | {cells} |")
    return "\n".join(lines)


def rate_table():
    """Mean bpb by the embedding's learning rate, where a head has rows of more than one on one kind of machine."""
    found = defaultdict(dict)
    for cell, heads in read_cells(r"(v|cpu|rate)\d+").items():
        for head, results in heads.items():
            if cell.common:
                found[cell.vocab, cell.dim, cell.machine, head][cell.rate] = results
    lines = [
        "| V | D | on | head | `TIED_EMBED_LR` | bpb, standard deviation | before packing | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (vocab, dim, where, head), by_rate in sorted(found.items()):
        for rate, results in sorted(by_rate.items()):
            if len(by_rate) > 1:
                after, before = values(results), values(results, "pre_quant_val_bpb")
                spread = f" +- {np.std(after, ddof=1):.4f}" if len(after) > 1 else ""
                seeds = ", ".join(sorted(results, key=int))
                start = f"| {vocab} | {dim} | {where} | {NAMES[head]} | {rate:.3g}"
                figures = f"{after.mean():.4f}{spread} | {before.mean():.4f} | {seeds} |"
                lines.append(f"{start} | {figures}")
    return "\n".join(lines)


def span(texts):
    """The least and the greatest of some numbers, or the one they all are."""
    ordered = sorted(set(texts), key=float)
    return " to ".join(dict.fromkeys([ordered[0], ordered[-1]])) if ordered else ""


def rank_table():
    """By head and width: dimensions of 99.99% of the log-probabilities' energy; its share beyond D."""
    spectra = defaultdict(list)
    for _, (dim, length, head, _), result in read_results("(v|cpu)1024"):
        if "spectrum" in result and length == "s1500":
            spectra[head, int(dim[1:])].append(result["spectrum"])
    widths = sorted({dim for _, dim in spectra})
    lines = [
        f"| head | {' | '.join(f'D = {dim}' for dim in widths)} |",
        f"|---|{'---|' * len(widths)}",
    ]
    for head in ("tied", *HEADS):
        cells = []
        for dim in widths:
            found = spectra.get((head, dim), [])
            ranks = span(f"{one['rank_9999']}" for one in found)
            beyond = span(f"{one['energy_beyond_model_dim']:.1e}" for one in found)
            cells.append(f"{ranks}; {beyond}" if found else "not run")
        if set(cells) != {"not run"}:
            lines.append(f"| {NAMES[head]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def frozen_table():
    """Study A's heads, untrained as they were, and trained: bpb, and how much worse than tied, before packing, too."""
    runs = defaultdict(dict)
    for _, (*_, name, seed), result in read_results("frozen1024"):
        runs[name][seed] = result
    lines = [
        "| head | bpb, standard deviation | worse than tied, the wider 95%, Welch's p | before packing | worse than tied, likewise |",
        "|---|---|---|---|---|",
    ]
    names = {"0": ", untrained, as study A's were", "1": ", trained"}
    heads = [head + how for how in names for head in ("factorized", "mos", "simplex")]
    for name in ("tied", *heads):
        cells = [name.rstrip("01") + names.get(name[-1], "")]
        for figure in ("val_bpb", "pre_quant_val_bpb"):
            sample, worse = values(runs[name], figure), ""
            if name != "tied":
                d = difference(runs[name], runs["tied"], figure)
                worse = f"{d.mean:+.3f} +- {d.wider:.3f} (p {d.p:.1g})"
            cells += [f"{sample.mean():.4f} +- {np.std(sample, ddof=1):.4f}", worse]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def baselines(name):
    """The runs that a row of `best` is compared with."""
    if name.startswith("best_"):
        return ["best"]
    return dict(study=[], best=["study", "shuffle"]).get(name, ["study"])


def best_table():
    """PRESET=best, its parts and heads on it, each against the run that it changes."""
    bpb = defaultdict(dict)
    for _, (steps, name, seed), result in read_results("best11"):
        bpb[name, int(steps[1:])][seed] = result
    lines = [
        "| run | steps | bpb, standard deviation | difference, 95% | p | paired by seed | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, steps), runs in bpb.items():
        sample = values(runs)
        against = [
            other
            for other in baselines(name)
            if len(runs) > 2 and bpb.get((other, steps), {}).keys() == runs.keys()
        ]
        start = f"| {name} | {steps} | {sample.mean():.4f} +- {np.std(sample, ddof=1):.4f}"
        for other in against or [None]:
            shown = " |  | "
            if other:
                d = difference(runs, bpb[other, steps])
                shown = f"{d.mean:+.4f} +- {d.welch:.4f} to {other} | {d.p:.2g} | +- {d.paired:.4f}"
            lines.append(f"{start} | {shown} | {len(runs)} |")
    return "\n".join(lines)


STYLES = {
    "tied+10%": ("tied, 10% more steps: a yardstick", "grey", ":"),
    "untied": ("untied: a matrix of its own, same rank", "C0", "-"),
    "mos2": ("mixture of 2 softmaxes: higher rank", "C1", "-"),
    "mos4": ("mixture of 4", "C3", "-"),
}


def marker(c):
    """A dot for a GPU's cell of V = 1024, a triangle where its batch is larger; a diamond for a CPU's, a square for another V."""
    if c.cell.vocab != 1024:
        return "s"
    if c.cell.machine == "CPU":
        return "D"
    return "o" if c.cell.batch == 2048 else "^"


def draw(axes, found, place, tick):
    """Gain with the wider of its two 95% intervals, a colour a head.

    Dots are joined, and triangles with the dot that they begin at; beside them stand diamonds and squares. `place` gives a
    comparison's place on the axis, `tick` a place's name. Delta, far below the others, is in the table alone.
    """
    from matplotlib.ticker import NullFormatter

    shown = sorted((c for c in found if c.head in STYLES), key=place)
    for i, (head, (words, color, line)) in enumerate(STYLES.items()):
        for mark, shift in (("o", 0), ("^", 0), ("D", 4), ("s", -4)):
            some = [c for c in shown if (c.head, marker(c)) == (head, mark)]
            if not some:
                continue
            aside = 1.03 ** (i + shift - 2)
            x = [aside * place(c) for c in some]
            gain, half = [c.gain.mean for c in some], [c.gain.wider for c in some]

            style = dict(fmt=mark, color=color, capsize=4, linewidth=1, label=words)
            style |= dict(linestyle=line) if mark == "o" else dict(linestyle="", mfc="white")
            axes.errorbar(x, gain, half, **style)
            words = None  # once in the legend

            if mark == "^":
                begin = [c for c in shown if c.head == head and marker(c) == "o" and c.cell.common]
                x = [aside * place(c) for c in begin] + x
                axes.plot(x, [c.gain.mean for c in begin] + gain, "--", color=color, linewidth=1)

    # zero, and one scale for both pictures
    axes.axhline(0, color="black", linewidth=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.045), max(high, 0.095))

    # above the squares, what they are
    tops = defaultdict(lambda: -math.inf)
    for c in shown:
        if marker(c) == "s":
            words = f"V = {c.cell.vocab}\nD = {c.cell.dim}"
            if c.cell.rate != RATE:
                words += f"\nrate {c.cell.rate:.3g}"
            spot = place(c) * 0.86, words
            tops[spot] = max(tops[spot], c.gain.mean + c.gain.wider + 0.002)
    for (x, words), top in tops.items():
        axes.annotate(words, (x, top), ha="center", fontsize=9)

    # a tick at each place
    places = sorted({place(c) for c in shown})
    axes.set_xscale("log", base=2)
    axes.set_xlim(places[0] / 1.3, places[-1] * 1.5)
    axes.set_xticks(places, [tick(x) for x in places])
    axes.xaxis.set_minor_formatter(NullFormatter())


def new_figure(title, label, panels=1):
    """A figure and its panels, beside each other, on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for one in axes:
        one.set_xlabel(label)
    axes[0].set_ylabel("bits per byte won over the tied head")
    axes[0].annotate("above zero: better than tied", (0.01, 0.95), xycoords="axes fraction")
    return figure, axes


def save(figure, axes, name):
    """With a legend below of what any of the panels shows."""
    shown = {}
    for one in axes:
        handles, labels = one.get_legend_handles_labels()
        shown |= dict(zip(labels, handles))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(HERE / name, dpi=120)


def draw_bottleneck(found):
    """law_of_scale.png: gain against V / D."""
    cells = [c for c in found if c.cell.common]
    widths = {c.cell.bottleneck: c.cell.dim for c in sorted(cells, key=lambda c: -c.cell.dim)}
    figure, (axes,) = new_figure(
        "Gain over the tied head by V / D (3.1M tokens; the wider 95% interval; diamonds: CPU)",
        "vocabulary V / width D, tighter to the right (joined: V = 1024; a larger D is a larger model)",
    )
    draw(
        axes,
        cells,
        lambda c: c.cell.bottleneck,
        lambda ratio: f"{ratio:.0f}\nD = {widths[ratio]}",
    )
    save(figure, [axes], "law_of_scale.png")


def draw_training(found):
    """tokens.png: gain against training tokens at two widths."""
    widths = (128, 512)
    figure, panels = new_figure(
        "Gain over the tied head by training (V = 1024; the wider 95% interval)",
        "millions of training tokens",
        len(widths),
    )
    for axes, dim in zip(panels, widths):
        axes.set_title(f"D = {dim}", fontsize=10)
        cells = [c for c in found if c.cell[:2] == (1024, dim)]
        draw(axes, cells, lambda c: c.cell.millions, lambda millions: f"{millions:.1f}")
    keys = "dots: steps of 2,048 tokens\ntriangles: 1,500 steps, larger batches\ndiamonds: as dots, on a CPU"
    panels[1].annotate(keys, (0.99, 0.03), xycoords="axes fraction", ha="right", fontsize=9)
    save(figure, panels, "tokens.png")


def insert(name, table, path=HERE / "RESULTS.md"):
    """Put a table between its markers."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = path.read_text().partition(begin)
    _, also, after = rest.partition(end)
    assert found and also, f"{path} has lost the markers of {name}"
    path.write_text(before + begin + table + "\n" + end + after)


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
    found = at_one_rate(compared(read_cells()))
    insert("law", law_table())
    insert("file order", law_table("file_order"))
    insert("rate", rate_table())
    insert("rank", rank_table())
    insert("frozen", frozen_table())
    insert("best", best_table())
    insert("answer table", answer_table(), HERE.parent / "README.md")
    update_submission()
    draw_bottleneck(found)
    draw_training(found)


if __name__ == "__main__":
    main()
