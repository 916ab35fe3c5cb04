"""Text from a model token by token, each with its probability and what else was likely; it travels with a Hub Space."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from transformers import set_seed
from transformers.generation import BaseStreamer, LogitsProcessorList

ALTERNATIVES = 10  # likely tokens that are kept of every step


class Refused(Exception):
    """What a person asked for and cannot have, in one sentence that the page shows."""


@dataclass
class Token:
    """A token that was written: its text (empty while a character is half there), its probability, and its rivals.

    likely: (text, probability) of the likeliest tokens, the likeliest first; rank: which of them it is, None for a less
    likely one. seen: how many tokens the model read for it. is_special: it is no text, as the one that ends a text.
    """

    id: int
    text: str
    probability: float
    likely: list[tuple[str, float]]
    rank: int | None
    seen: int
    is_special: bool = False


@dataclass
class Passage:
    """What was given and what the model wrote after it."""

    given: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.given + [token.id for token in self.tokens]


class Writer:
    """A causal LM and its tokenizer as the page uses them, by transformers alone.

    `encode`, `encode_chat` and `grow` are what Acorn does more carefully where it is installed. context: tokens that
    the model reads. more_ends: tokens that end a text, beside those that the model names.
    """

    def __init__(self, model, tokenizer, context: int, more_ends: Sequence[int] = ()):
        self.model, self.tokenizer, self.context = model, tokenizer, context
        own = model.generation_config.eos_token_id
        self.ends = list(dict.fromkeys([*(own if isinstance(own, list) else [own]), *more_ends]))
        self.ends = [token for token in self.ends if token is not None]

    # ---- what a subclass may do in its own way

    def encode(self, prompt: str) -> list[int]:
        """Ids of a text that is to be continued; an empty one starts a document."""
        start = next((i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None), None)
        try:
            ids = self.tokenizer(prompt)["input_ids"] or ([] if start is None else [start])
        except Exception as error:  # the only class that `tokenizers` raises
            raise Refused(f"The tokenizer cannot read this: {error}") from error
        if not ids:
            raise Refused("The prompt is empty, and this model has no token that starts a text: type something.")
        return ids

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, up to where the answer begins."""
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # a template is a program: what it raises is of every class
            raise Refused(f"The chat template refuses this conversation: {error}") from error

    def grow(self, ids: torch.Tensor, max_new_tokens: int, **generation) -> None:
        """Write on after `ids`, (1, tokens), with generate()'s arguments, a streamer among them."""
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, min(max_new_tokens, self.context - ids.shape[1])),
            eos_token_id=self.ends or None,
            pad_token_id=self.ends[0] if self.ends else None,
            num_beams=1,
            **generation,
        )

    # ---- the same for all

    def fitted(self, messages: list[dict], answer_tokens: int) -> tuple[list[int], int]:
        """(ids of a conversation with room for an answer, how many of its oldest turns are left out for that)."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns, first = messages[len(system) :], 0
        limit = self.context - min(answer_tokens, self.context // 4)
        while len(ids := self.encode_chat(system + turns[first:])) > limit:
            later = [number for number in range(first + 1, len(turns)) if turns[number]["role"] == "user"]
            if not later:
                raise Refused(f"The message has {len(ids)} tokens; with an answer the model reads {self.context}.")
            first = later[0]
        return ids, first

    def write(self, passage: Passage, max_new_tokens: int, seed: int, stop: threading.Event, **sampling) -> Iterator:
        """Add tokens to `passage` as they come, and yield after each, until the text ends or `stop` is set."""
        if len(passage.given) > self.context:
            raise Refused(f"The prompt has {len(passage.given)} tokens; the model reads {self.context}. Shorten it.")
        virtual = getattr(getattr(self.model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        watcher = Watcher(self.tokenizer, passage.given, virtual, stop)
        ids = torch.tensor([passage.given], device=self.model.device)
        arguments = {"streamer": watcher, "logits_processor": LogitsProcessorList([watcher.look]), **sampling}

        def work() -> None:
            hook = self._inner().register_forward_pre_hook(watcher.read, with_kwargs=True)
            try:
                set_seed(seed)
                with suppress(Stopped):
                    self.grow(ids, max_new_tokens, **arguments)
                watcher.tokens.put(None)
            except Exception as error:  # of whatever class: it is raised where the tokens are waited for
                watcher.tokens.put(error)
            finally:
                hook.remove()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (token := watcher.tokens.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                passage.tokens.append(token)
                yield
        except GeneratorExit:  # nobody waits for the rest any more
            stop.set()
            raise
        finally:
            thread.join()

    def about(self) -> str:
        """What kind of model it is, in a line."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{count / 1e6:,.1f} M parameters" if count >= 1e5 else f"{count:,} parameters"
        where = f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device.type}"
        return f"{size} · context of {self.context:,} tokens · {len(self.tokenizer):,} kinds of token · {where}"

    def plain(self, passage: Passage) -> str:
        """What the model wrote, without special tokens."""
        ids = [token.id for token in passage.tokens]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def why_it_ended(self, passage: Passage, max_new_tokens: int) -> str:
        """Why there is no more of a passage that nobody stopped."""
        if passage.tokens and passage.tokens[-1].id in self.ends:
            return "the model ended its text"
        return "as many as were asked for" if len(passage.tokens) >= max_new_tokens else "the context is full"

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each of `ids`; together they are the text of them all."""
        decoder = PieceDecoder(self.tokenizer, [])
        return [decoder.add(token) for token in ids]

    @torch.no_grad()
    def attention(self, passage: Passage, place: int) -> torch.Tensor:
        """What the model attended to as it wrote the token at `place`: (layers, heads, tokens before it that it read).

        Raises Refused where nothing comes before, and for models that give out no attention.
        """
        written = place - len(passage.given)
        seen = passage.tokens[written].seen if written >= 0 else min(place, self.context)
        if seen == 0:
            raise Refused("Nothing comes before the first token.")
        ids = torch.tensor([passage.ids[place - seen : place]], device=self.model.device)
        inner = self._inner()
        kept = inner.config._attn_implementation
        try:
            inner.set_attn_implementation("eager")  # the others compute no weights
            output = self.model(input_ids=ids, output_attentions=True, use_cache=False)
        except (ValueError, NotImplementedError, TypeError) as error:  # another's model that has no such attention
            raise Refused("This model gives out no attention weights.") from error
        finally:
            inner.set_attn_implementation(kept)
        layers = [layer for layer in getattr(output, "attentions", None) or () if layer is not None]
        if not layers:
            raise Refused("This model gives out no attention weights.")
        return torch.stack([layer[0, :, -1, -seen:].float().cpu() for layer in layers])

    def _inner(self):
        """The model itself, without an adapter's wrapping."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


class Stopped(Exception):
    """Raised within generate(), to end it."""


class PieceDecoder:
    """The text of one token after the other: decoded with those before it, which give it its space, and held back
    while a character is half there.
    """

    KEPT = 8  # tokens before the new ones that are decoded with them

    def __init__(self, tokenizer, ids: list[int]):
        self.tokenizer, self.ids, self.written = tokenizer, list(ids), len(ids)

    def add(self, token: int) -> str:
        self.ids.append(token)
        first = max(0, self.written - self.KEPT)
        before, whole = (self._decode(self.ids[first:end]) for end in (self.written, None))
        if whole.endswith("\ufffd"):
            return ""
        self.written = len(self.ids)
        return whole[len(before) :] if whole.startswith(before) else self._decode([token])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Watcher(BaseStreamer):
    """Sees each step of generate(): what the model reads, the probabilities, then the token that was drawn.

    given: ids of the prompt. virtual: tokens of an adapter's own, which are read with them.
    """

    def __init__(self, tokenizer, given: list[int], virtual: int, stop: threading.Event):
        self.tokenizer, self.virtual, self.stop = tokenizer, virtual, stop
        self.special, self.seen = set(tokenizer.all_special_ids), 0
        self.decoder = PieceDecoder(tokenizer, given)
        self.tokens: queue.Queue[Token | Exception | None] = queue.Queue()
        self.is_prompt_next = True

    def read(self, model, args: tuple, inputs: dict) -> None:
        """A hook before each forward pass: several tokens are a window read anew, one comes to what was read."""
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        count = embeddings.shape[1] - self.virtual if ids is None else ids.shape[1]
        self.seen = self.seen + 1 if count == 1 else count

    def look(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor that changes nothing; it stands before temperature, top-k and top-p."""
        self.probabilities = scores[0].float().softmax(-1)
        return scores

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt_next:  # generate() begins with what it was given
            self.is_prompt_next = False
            return
        token = int(value.flatten()[0])
        likely, ids = (part.tolist() for part in self.probabilities.topk(min(ALTERNATIVES, len(self.probabilities))))
        rivals = [(self.tokenizer.decode([rival]), p) for rival, p in zip(ids, likely, strict=True)]
        rank = ids.index(token) if token in ids else None
        probability = float(self.probabilities[token])
        is_special = token in self.special
        self.tokens.put(Token(token, self.decoder.add(token), probability, rivals, rank, self.seen, is_special))
        if self.stop.is_set():
            raise Stopped

    def end(self) -> None:
        self.is_prompt_next = True  # generate() ends here, but the text may go on in the next window
