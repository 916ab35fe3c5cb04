"""The page's tokens as HTML; page.css colours them, page.js shows what else was likely."""

import html
import json
import math
from collections.abc import Iterable

from .writing import Passage, Token

MOST = 5  # tokens that are listed of what a head attends to
# From likely to unlikely: the least probability of each shade, and its name in page.css.
SHADES = ((0.9, "p0"), (0.5, "p1"), (0.2, "p2"), (0.05, "p3"), (0.01, "p4"), (0.0, "p5"))


def shade(probability: float) -> str:
    return next(name for least, name in SHADES if probability >= least or least == 0)


def passage_html(passage: Passage, given: Iterable[str] = (), number: int = 0) -> str:
    """The tokens of a passage as spans; given: the pieces of the prompt, where it is shown; number: the passage's."""
    first = len(passage.given)
    spans = [span(text, number, place, "given") for place, text in enumerate(given)]
    spans += [token_span(token, number, first + place) for place, token in enumerate(passage.tokens)]
    return "".join(spans)


def token_span(token: Token, number: int, place: int) -> str:
    likely = [(text, round(probability, 6)) for text, probability in token.likely]
    card = {"p": round(token.probability, 6), "likely": likely, "rank": token.rank}
    kind = shade(token.probability) + " special" * token.is_special
    return span(token.text, number, place, kind, json.dumps(card))


def span(text: str, number: int, place: int, kind: str, card: str = "", style: str = "") -> str:
    """One token; its text is escaped, as a model may write `<script>`."""
    classes = f"token {kind}" + " half" * (not text) + " break" * ("\n" in text)
    more = f' data-card="{html.escape(card)}"' * bool(card) + f' style="{style}"' * bool(style)
    return f'<span class="{classes}" data-at="{number}:{place}"{more}>{html.escape(text)}</span>'


def attention_html(pieces: list[str], weights: list[float], chosen: str, number: int, first: int) -> str:
    """The tokens before the chosen one, each as dark as the model attended to it; `first`: the place of the first.

    The root of a weight is its darkness: heads that look everywhere stay light, and small weights are still seen.
    """
    spans = []
    for place, (text, weight) in enumerate(zip(pieces, weights, strict=True)):
        card = json.dumps({"weight": weight})
        spans.append(span(text, number, first + place, "seen", card, f"--w:{math.sqrt(weight):.3f}"))
    return "".join(spans) + f'<span class="token chosen">{html.escape(chosen) or "&nbsp;"}</span>'


def heads_html(maps: list[list[list[float]]], pieces: list[str]) -> str:
    """All heads at once, a row a layer: as dark as the largest weight on one token; hovering shows on which."""
    rows = []
    for layer, heads in enumerate(maps, 1):
        cells = []
        for head, weights in enumerate(heads, 1):
            most = sorted(range(len(weights)), key=lambda place, weights=weights: -weights[place])[:MOST]
            looks = [(pieces[place], round(weights[place], 6)) for place in most]
            card = html.escape(json.dumps({"head": f"layer {layer}, head {head}", "looks": looks}))
            style = f"--w:{math.sqrt(looks[0][1]):.3f}"
            cells.append(f'<i class="head" data-at="{layer}:{head}" data-card="{card}" style="{style}"></i>')
        rows.append(f'<div class="layer"><span>{layer}</span>{"".join(cells)}</div>')
    return "".join(reversed(rows))


def chat_html(turns: Iterable[tuple[str, str]]) -> str:
    """A conversation: (question, HTML of the answer) of each exchange."""
    bubble = '<div class="turn {}"><div class="bubble">{}</div></div>'.format
    return "".join(bubble("user", html.escape(question)) + bubble("assistant", answer) for question, answer in turns)


def message_html(text: str, is_refusal: bool = False) -> str:
    """A line below the text: what was written and how fast, or why nothing was."""
    return f'<div class="said{" refusal" * is_refusal}" role="status">{html.escape(text)}</div>'


def title_html(name: str, about: str) -> str:
    return f'<div class="title"><b>{html.escape(name)}</b><span>{html.escape(about)}</span></div>'


LEGEND = (
    '<div class="legend">probability of each token: '
    + "".join(f'<span class="token {name}">{f"≥ {least:g}" if least else "less"}</span>' for least, name in SHADES)
    + "<span class='hint'>hover: what else was likely · click: attention</span></div>"
)
