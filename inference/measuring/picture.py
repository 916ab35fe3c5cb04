"""What was seen of a prompt as one picture: what comes next, how positions are told apart, what each head looks at."""

import warnings
from pathlib import Path

import numpy as np

from training.system.files import write_picture

from .attention import Expected, Head, Look, in_percent
from .position_tables import PositionTable

LAST = 24  # positions whose next tokens are listed
WIDTH, TOP, CELL = 15, 6.4, 2.6  # inches: the picture, its upper part, the most that one attention map takes
GAP = 0.14  # between maps, as a share of one
LABELLED = 1.6  # inches of a map from which its tokens are written beside it
FUTURE, PALE = "#eceff1", 0.55  # the colour of what no query sees; the power that makes faint weights visible


def draw_look(look: Look, tables: list[PositionTable] | str, heads: list[Head], path: Path, title: str) -> None:
    """Write the picture as a PNG. tables: or the words that stand in their place."""
    from matplotlib.figure import Figure

    layers = sorted({head.layer for head in heads})
    per_layer = max((len(look.attention[layer]) for layer in layers), default=0)
    cell = min(CELL, (WIDTH - 1) / per_layer / (1 + GAP)) if per_layer else 0
    lower = len(layers) * cell * (1 + GAP) + 1.1 if layers else 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure = Figure(figsize=(WIDTH, TOP + lower), layout="constrained")
        figure.suptitle(title, fontsize=13, parse_math=False)
        upper, below = figure.subfigures(2, 1, height_ratios=(TOP, lower))
        left, right = upper.subfigures(1, 2, width_ratios=(1.9, 1))
        draw_expected(left.subplots(), look)
        draw_positions(right, tables)
        draw_attention(below.subplots(), look, heads, layers, per_layer, cell)
        write_picture(path, figure, dpi=110)


# ---- what comes next


def draw_expected(axes, look: Look) -> None:
    """A line a position: the token, the likeliest to follow it, and the one that does, which is framed among them."""
    first = max(0, len(look.tokens) - LAST)
    rows, following = look.expected[first:], [*look.tokens[first + 1 :], ""]
    chances = [[expected.probability for expected in row] for row in rows]
    chances = [[*row, chance] for row, chance in zip(chances, [*look.probabilities[first:], 0.0], strict=True)]
    axes.imshow(np.array(chances) ** PALE, cmap="Greens", vmin=0, vmax=1.25, aspect="auto")
    size, last = min(9.5, 230 / max(len(rows), 10)), len(rows[0])
    for line, (row, token) in enumerate(zip(rows, following, strict=True)):
        for place, expected in enumerate([*row, Expected(token, chances[line][-1])]):
            is_next = expected.text == token
            words = f"{shortened(expected.text, 11)}  {in_percent(expected.probability)}" if expected.text else ""
            weight = "bold" if is_next else "normal"
            axes.text(place, line, words, ha="center", va="center", fontsize=size, fontweight=weight, parse_math=False)
            if is_next and place < last:
                axes.add_patch(frame(place, line))
    labels = [shortened(token, 14) for token in look.tokens[first:]]
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set_xticks(range(last + 1), [*(f"{place + 1}." for place in range(last)), "what follows"])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.axvline(last - 0.5, color="white", linewidth=6)
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    some = f" (the last {LAST} of {len(look.tokens)} tokens)" if first else ""
    axes.set_title(f"What the model expects after each token{some}; framed: what does follow", fontsize=11)


def frame(place: int, line: int):
    """An outline around a cell."""
    from matplotlib.patches import Rectangle

    return Rectangle((place - 0.49, line - 0.46), 0.98, 0.92, fill=False, edgecolor="tab:red", linewidth=1.6)


def shortened(text: str, most: int) -> str:
    """The text, cut where it is long."""
    return text if len(text) <= most else text[: most - 1] + "…"


# ---- positions


def draw_positions(figure, tables: list[PositionTable] | str) -> None:
    """The first table as a map, and of each the likeness of two positions over their distance."""
    if isinstance(tables, str):
        figure.text(0.5, 0.55, tables, ha="center", va="center", fontsize=12)
        return
    grid, curve = figure.subplots(2, 1, height_ratios=(1.3, 1))
    table = tables[0]
    image = grid.imshow(table.values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    grid.set_title(f"Positions: {table.title}", fontsize=11)
    grid.set(xlabel="position", ylabel=table.rows)
    figure.colorbar(image, ax=grid, pad=0.01)
    for other in tables:
        curve.plot(other.similarity.numpy(), label=other.title)
    if len(tables) > 1:
        curve.legend(fontsize=8)
    curve.axhline(0, color="grey", linewidth=0.6)
    curve.set_title("how alike two positions are", fontsize=11)
    curve.set(xlabel="tokens between them", ylabel="cosine", xlim=(0, len(table.similarity)))


# ---- attention


def draw_attention(axes, look: Look, heads: list[Head], layers: list[int], per_layer: int, cell: float) -> None:
    """Every head's map, a row a layer: from each token (down) to those before it (across)."""
    axes.set_axis_off()
    if not layers:
        axes.text(0.5, 0.5, "This model does not give its attention weights.", ha="center", fontsize=12)
        return
    queries, keys = look.attention[layers[0]].shape[1:]
    high, wide = queries * (1 + GAP), keys * (1 + GAP)
    named = {(head.layer, head.head): head for head in heads}
    colours = palette()
    for row, layer in enumerate(layers):
        for column, weights in enumerate(look.attention[layer]):
            left, top = column * wide, row * high
            box = (left, left + keys, top + queries, top)
            axes.imshow(future_hidden(weights.numpy(), look.virtual), cmap=colours, vmin=0, vmax=1, extent=box)
            write_pattern(axes, named[layer, column], left, top - high * 0.01, cell)
            if row == 0:
                axes.text(left + keys / 2, -high * 0.13, f"head {column}", ha="center", fontsize=9, color="dimgrey")
        window = look.windows[layer]
        words = f"layer {layer}" + (f"\nsees {window} tokens" if window else "")
        axes.text(-wide * 0.3, top + queries / 2, words, rotation=90, ha="right", va="center", fontsize=10)
    has_labels = cell >= LABELLED and write_tokens(axes, look, len(layers), high, cell)
    edge = wide * 0.36 if has_labels else wide * 0.4
    axes.set(xlim=(-edge, per_layer * wide), ylim=(len(layers) * high + has_labels * high * 0.25, -high * 0.2))
    axes.set_aspect("equal")
    virtual = f", after {look.virtual} virtual ones" if look.virtual else ""
    axes.set_title(
        f"What each head looks at: a line a token, from the first to the last; across, the tokens it sees{virtual}.\n"
        "Dark is much; in red, what a head mostly looks at and the share of its attention that goes there",
        fontsize=11,
    )


def write_pattern(axes, head: Head, left: float, bottom: float, cell: float) -> None:
    """Above a map: what its head mostly looks at."""
    words = f"{head.pattern} {head.share:.0%}" if head.pattern else "mixed"
    style = {"color": "tab:red", "fontweight": "bold"} if head.pattern else {"color": "grey"}
    axes.text(left, bottom, words, fontsize=max(4.0, min(9.5, 5.5 * cell)), va="bottom", **style)


def write_tokens(axes, look: Look, rows: int, high: float, cell: float) -> bool:
    """The tokens, left of the first map of each layer and below that of the last; False where they are too many."""
    size = min(8.0, 0.8 * 72 * cell / len(look.tokens))
    if size < 4.5:
        return False
    style = {"fontsize": size, "parse_math": False, "color": "dimgrey"}
    for place, token in enumerate(look.tokens):
        for row in range(rows):
            words = shortened(token, 9)
            axes.text(-0.3, row * high + place + 0.5, words, ha="right", va="center", **style)
        across = look.virtual + place + 0.5
        axes.text(
            across, rows * high - high * GAP / (1 + GAP) + 0.3, words, rotation=90, ha="center", va="top", **style
        )
    return True


def palette():
    """White to dark blue; what no query sees is grey."""
    from matplotlib import colormaps

    colours = colormaps["Blues"].copy()
    colours.set_bad(FUTURE)
    return colours


def future_hidden(weights: np.ndarray, virtual: int) -> np.ndarray:
    """Weights, (queries, keys), so that faint ones show, and nothing where a key comes after its query."""
    queries, keys = weights.shape
    is_future = np.arange(keys)[None] > np.arange(queries)[:, None] + virtual
    return np.where(is_future, np.nan, weights**PALE)
