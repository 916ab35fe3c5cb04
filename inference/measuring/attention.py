"""One forward of a prompt, looked into: what each head attends to, and what the model expects after each token."""

from typing import NamedTuple

import torch

from training.data.tokenizers import BYTE_VOCABULARY
from training.model.loading import without_adapter, without_warnings
from training.model.sizes import text_config

NAMED_FROM = 0.35  # share of a head's attention that must be on what it is named after
NEARBY = "last 4 tokens"
TIMES_EVEN = 1.5  # and how many times what would be there if the head looked at all that it sees alike


class Head(NamedTuple):
    """What a head mostly looks at, in words, and the share of its attention that is there; no words where mixed."""

    layer: int
    head: int
    pattern: str
    share: float


class Expected(NamedTuple):
    """A token that may come next, and its probability."""

    text: str
    probability: float


class Look(NamedTuple):
    """What was seen of a prompt.

    tokens: each one's text, to be shown. attention: one (heads, tokens, virtual + tokens) a layer, none where the model
    does not give its weights, or has layers without any. windows: how many tokens each layer sees at most, None for
    all. virtual: tokens of a prompt or prefix adapter, which come before the others. expected: after each token, the
    likeliest first. probabilities: of each token but the first, as it was expected before it.
    """

    ids: list[int]
    tokens: list[str]
    attention: list[torch.Tensor]
    windows: list[int | None]
    virtual: int
    expected: list[list[Expected]]
    probabilities: list[float]


@torch.no_grad()
def look_into(model, tokenizer, ids: torch.Tensor, top_k: int) -> Look:
    """Run the model on a prompt's ids, (1, tokens), with attention by plain matmuls: no other gives its weights."""
    inner = without_adapter(model)
    try:
        inner.set_attn_implementation("eager")
        with without_warnings():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True)
    except (ValueError, NotImplementedError, TypeError):  # another's model that has no such attention
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    count = ids.shape[1]
    maps = [weights for weights in getattr(output, "attentions", None) or () if weights is not None]
    types = getattr(text_config(inner.config), "layer_types", None) or ()
    attention = [] if "linear_attention" in types else [weights[0, :, -count:].float().cpu() for weights in maps]
    probabilities = output.logits[0, -count:].float().softmax(-1).cpu()
    best = probabilities.topk(min(top_k, probabilities.shape[-1]))
    following = ids[0, 1:].cpu()
    return Look(
        ids[0].tolist(),
        [shown(tokenizer, token) for token in ids[0].tolist()],
        attention,
        windows_of(inner.config, len(attention)),
        attention[0].shape[-1] - count if attention else 0,
        [
            [Expected(shown(tokenizer, token), value) for token, value in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        probabilities[:-1].gather(1, following[:, None])[:, 0].tolist(),
    )


def windows_of(config, layers: int) -> list[int | None]:
    """How many tokens each layer sees at most, as a configuration of transformers' kind says it."""
    text = text_config(config)
    types = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    return (
        [window if kind == "sliding_attention" else None for kind in types] if len(types) == layers else [None] * layers
    )


def shown(tokenizer, token: int) -> str:
    """A token so that all of it is seen: spaces and line breaks by signs, parts of characters by their numbers."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" in text or not text:
        spelled = str(tokenizer.convert_ids_to_tokens(token))
        if spelled and BYTE_VOCABULARY.keys() >= set(spelled):
            return f"‹{bytes(BYTE_VOCABULARY[letter] for letter in spelled).hex(' ')}›"
        text = spelled
    signs = {" ": "␣", "\n": "↵", "\t": "→", "\r": "←"}
    return "".join(signs.get(letter) or (letter if letter.isprintable() else f"‹{ord(letter):x}›") for letter in text)


def in_percent(probability: float) -> str:
    """A probability in few characters."""
    return f"{probability:.0%}" if probability >= 0.01 else f"{probability:.1%}" if probability >= 0.001 else "<0.1%"


def name_heads(look: Look, layers: list[int]) -> list[Head]:
    """What each head of these layers mostly looks at."""
    places = patterns(torch.tensor(look.ids))
    return [
        Head(layer, head, *name_head(look.attention[layer][head, :, look.virtual :], places, look.windows[layer]))
        for layer in layers
        for head in range(len(look.attention[layer]))
    ]


def name_head(weights: torch.Tensor, places: dict[str, torch.Tensor], window: int | None = None) -> tuple[str, float]:
    """(pattern, share): the pattern that most of a head's weights, (tokens, tokens), lie on; "" for none.

    window: how many tokens it sees at most. Where it could hardly look elsewhere nothing is said.
    """
    even = torch.ones_like(weights).tril()
    even = even if window is None else even.triu(1 - window)
    even = even / even.sum(1, keepdim=True)
    found = {}
    for pattern, where in places.items():
        rows = where.any(1)
        share, by_chance = ((w * where)[rows].sum(1).mean().item() for w in (weights, even))
        if share >= max(NAMED_FROM, TIMES_EVEN * by_chance):
            found[pattern] = share
    if len(found) > 1:
        found.pop(NEARBY, None)  # it holds others
    return max(found.items(), key=lambda item: item[1], default=("", 0.0))


def patterns(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pattern to where its weights would lie: bool (tokens, tokens), queries first; left out where it says too little.

    After a repeat: the token that followed an earlier appearance of this one ("induction", arXiv 2209.11895).
    """
    count = len(ids)
    query, key = torch.arange(count)[:, None], torch.arange(count)[None]
    is_same = (ids[:, None] == ids[None]) & (key < query)
    after = torch.zeros_like(is_same)
    after[:, 1:] = is_same[:, :-1]
    found = {
        "previous token": (key == query - 1),
        "itself": (key == query) & (query > 0),
        "first token": (key == 0) & (query > 1),
        "same token": is_same & (key < query - 1),
        "after a repeat": after & (key < query - 1),
        NEARBY: (key > query - 4) & (key <= query) & (query > 7),
    }
    return {pattern: where for pattern, where in found.items() if where.any(1).sum() >= 3}
