"""The picture of `acorn lab kv`: what each cache loses against the bits that it holds, with the two lines to beat."""

import math

from .common import Output

LINES = {"window": ("sinks and recent tokens alone", "tab:red"), "random": ("tokens at random", "tab:grey")}
KINDS = {  # of a cache: its colour and its words
    "full": ("black", "everything, 16 bits a number"),
    "stores": ("tab:blue", "all tokens in fewer bits"),
    "drops": ("tab:orange", "fewer tokens"),
    "both": ("tab:green", "fewer tokens in fewer bits"),
    "other": ("tab:purple", "a smaller model's own cache"),
}
LINEAR = 1e-3  # bits a byte up to which the axis is linear: losses go down to none, and below


def draw(out: Output, rows: list[dict], kinds: list[str], title: str) -> None:
    """rows: of the results, the full cache first; kinds: of each, a key of KINDS."""
    with out.picture("kv", width=11, height=10) as figure:
        losses, recall = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for policy, (words, colour) in LINES.items():
            line = sorted((row for row in rows if row["cache"].split()[0] in (policy, "full")), key=bits_of)
            if len(line) > 1:
                style = {"color": colour, "linestyle": "--", "linewidth": 1, "label": words, "zorder": 1}
                losses.plot([bits_of(row) for row in line], [lost(row)[0] for row in line], **style)
                recall.plot([bits_of(row) for row in line], [row["recall"] for row in line], **style)
        for kind, (colour, words) in KINDS.items():
            own = [row for row, its in zip(rows, kinds, strict=True) if its == kind]
            if own:
                draw_points(losses, recall, own, colour, words)
        axis_of_bits(losses, rows[0])
        losses.set_yscale("symlog", linthresh=LINEAR)
        losses.set(ylabel="bits a byte lost, against the full cache (95 % interval)", title=title)
        recall.set(xlabel="bits a token and layer", ylabel="recall: nats a token gained")
        losses.legend(fontsize=8)
        for axes in (losses, recall):
            axes.grid(alpha=0.25)
            axes.axhline(0, color="grey", linewidth=0.6)


def draw_points(losses, recall, rows: list[dict], colour: str, words: str) -> None:
    """Caches of one kind: points with intervals and names above, recall below."""
    bits, values = [bits_of(row) for row in rows], [lost(row) for row in rows]
    ends = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
    style = {"color": colour, "marker": "o", "linestyle": "none", "markersize": 5}
    losses.errorbar(bits, [value for value, _, _ in values], yerr=ends, capsize=2, label=words, **style)
    recall.plot(bits, [row["recall"] for row in rows], **style)
    for row, place, value in zip(rows, bits, values, strict=True):
        near = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 7, "color": colour, "parse_math": False}
        losses.annotate(row["cache"], (place, value[0]), **near)
        recall.annotate(row["cache"], (place, row["recall"]), **near)


def axis_of_bits(axes, full: dict) -> None:
    """Bits a token and layer, by powers of two; above, what a whole sequence holds."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    kibibytes = full["bits"] / bits_of(full) / 8 / 1024
    above = axes.secondary_xaxis("top", functions=(lambda bits: bits * kibibytes, lambda size: size / kibibytes))
    above.set_xlabel(f"KiB that a sequence of {full['length']:,} tokens holds")
    first = math.ceil(math.log2(kibibytes))
    sizes = [2.0**power for power in range(first, first + 20)]
    above.set_xticks(sizes, [f"{size:,.4g}" for size in sizes], minor=False)
    above.set_xticks([], minor=True)


def bits_of(row: dict) -> float:
    return row["bits_per_token_layer"]


def lost(row: dict) -> tuple[float, float, float]:
    """(bits a byte lost, and the two ends of its interval)."""
    return tuple(row["lost_bits_per_byte"].values())
