"""The same as one page of HTML that needs no network: point at a token or a map for the numbers."""

import base64
import io
import json
from pathlib import Path

from training.system.errors import UserError
from training.system.files import write_whole

from .attention import Head, Look
from .picture import draw_positions
from .position_tables import PositionTable

TEMPLATE = Path(__file__).with_name("page.html")
MOST_BYTES = 64 << 20  # of attention maps in one page: browsers take seconds for more


def write_page(look: Look, tables: list[PositionTable] | str, heads: list[Head], path: Path, title: str) -> None:
    """Write the page; UserError where its maps would be too many for a browser."""
    size = sum(look.attention[head.layer][head.head].numel() for head in heads)
    if size > MOST_BYTES:
        raise UserError(
            f"--output={path}: {len(heads)} maps of {len(look.tokens)} tokens make {size >> 20} MB, more than a page "
            "can hold; choose --layers, shorten the prompt, or write a .png"
        )
    data = {
        "title": title,
        "tokens": look.tokens,
        "virtual": look.virtual,
        "probabilities": look.probabilities,
        "expected": look.expected,
        "heads": [head._asdict() for head in heads],
        "maps": [in_bytes(look.attention[head.layer][head.head]) for head in heads],
        "positions": {"words": tables} if isinstance(tables, str) else {"picture": picture_of(tables)},
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # so that no token ends the script
    write_whole(path, TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1))


def in_bytes(weights) -> str:
    """Weights between 0 and 1 as a byte each, in base64."""
    return base64.b64encode((weights * 255).round().byte().numpy().tobytes()).decode()


def picture_of(tables: list[PositionTable]) -> str:
    """The positions as a PNG in base64."""
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(9, 6), layout="constrained"), io.BytesIO()
    draw_positions(figure, tables)
    figure.savefig(file, format="png", dpi=90)
    return base64.b64encode(file.getvalue()).decode()
