"""From the data arguments to what is trained on: prepared tokens for text, tokenized examples for chats and pairs.

Of a chat or a pair only the answers count in the loss.
"""

import copy
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from training.data.corpus import Corpus, Inputs, load_corpus
from training.data.documents import skipped_in_words
from training.data.encoding import encode_documents
from training.data.preparation import prepare
from training.data.sources import check_split_options, source_kind, unit_hash
from training.data.tokenizers import begin_ids
from training.model.chat_template import render_messages
from training.model.sampling import Rendered, encode_prompt, encode_spelled
from training.system.errors import UserError, log
from training.system.files import digest

from .chat_files import Conversation, Pair, find_format, read_conversations, read_pairs

# For tokenizers without a template of their own. It needs no new tokens: the end-of-text token ends an answer.
PLAIN_TEMPLATE = (
    "{%- if tools %}{{- 'Tools: ' + tools | tojson + '\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- 'Assistant:' }}"
    "{%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}"
    "{%- elif message['role'] == 'user' %}{{- 'User: ' + message['content'] | trim }}"
    "{%- elif message['role'] == 'system' %}{{- 'System: ' + message['content'] | trim }}"
    "{%- elif message['role'] == 'tool' %}{{- 'Tool: ' + message['content'] | trim }}"
    "{%- else %}{{- raise_exception('roles are system, user, assistant and tool') }}"
    "{%- endif %}"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)


class Example(NamedTuple):
    """ids: int64 [tokens]; counts: bool [tokens], those whose prediction is in the loss; where: file and line."""

    ids: np.ndarray
    counts: np.ndarray
    where: str


def with_template(tokenizer):
    """The tokenizer, with the plain template where it has none of its own."""
    if not tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        begin = tokenizer.decode(begin_ids(tokenizer))
        tokenizer.chat_template = f"{{{{- {begin!r} }}}}{PLAIN_TEMPLATE}" if begin else PLAIN_TEMPLATE
    return tokenizer


def render(tokenizer, conversation: Conversation, add_generation_prompt: bool = False) -> str:
    """The text that the chat template makes of a conversation."""
    return render_messages(tokenizer, *conversation, add_generation_prompt=add_generation_prompt)


def answer_spans(tokenizer, conversation: Conversation, text: str) -> list[tuple[int, int]]:
    """Where in the rendered `text` each answer lies, (first, last + 1) in characters, its end-of-turn token included.

    An answer is what the template adds to the prompt before it; template text after the end-of-turn token is not.
    """
    specials = [token for token in tokenizer.all_special_tokens if token]
    messages, spans = conversation.messages, []
    for number in [number for number, message in enumerate(messages) if message["role"] == "assistant"]:
        before = render(tokenizer, conversation._replace(messages=messages[:number]), add_generation_prompt=True)
        after = render(tokenizer, conversation._replace(messages=messages[: number + 1]))
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{conversation.where}: the chat template rewrites earlier turns, so what is an answer cannot be told; "
                "give the tokenizer another chat_template"
            )
        answer = after[len(before) :]
        ends = [answer.rfind(token) + len(token) for token in specials if token in answer]
        spans.append((len(before), len(before) + (max(ends) if ends else len(answer))))
    return spans


def encode_messages(tokenizer, conversation: Conversation) -> Example:
    """One conversation through the chat template, as `apply_chat_template` tokenizes it."""
    text = render(tokenizer, conversation)
    encoded = encode_spelled(tokenizer, text, conversation.where, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    counts = np.zeros(len(starts), dtype=bool)
    for first, end in answer_spans(tokenizer, conversation, text):
        counts |= (starts >= first) & (starts < end)
    return Example(np.array(encoded["input_ids"], dtype=np.int64), counts, conversation.where)


def encode_conversation(tokenizer, conversation: Conversation, limit: int) -> list[Example]:
    """The conversation as examples of at most `limit` predicted tokens each.

    One that is longer is split before a user's turn, as late as fits, and every part begins with the system message if
    there is one; a single exchange that does not fit is cut every `limit` tokens. Parts without an answer are left out.
    """
    messages, whole = conversation.messages, encode_messages(tokenizer, conversation)
    if not whole.counts[1:].any():
        raise UserError(
            f"{conversation.where}: the tokenizer's chat template leaves no answer; give the tokenizer another"
        )
    if len(whole.ids) <= limit + 1:
        return [whole]
    system = messages[:1] if messages[0]["role"] == "system" else []
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    parts: list[Conversation] = []
    for start, end in zip(starts, [*starts[1:], len(messages)], strict=True):
        before = parts[-1].messages if parts else system
        longer = conversation._replace(messages=before + messages[start:end])
        if parts and len(encode_messages(tokenizer, longer).ids) <= limit + 1:
            parts[-1] = longer
        else:
            parts.append(conversation._replace(messages=system + messages[start:end]))
    return [piece for part in parts for piece in cut(encode_messages(tokenizer, part), limit)]


def encode_pair(tokenizer, pair: Pair, limit: int) -> list[Example]:
    """Prompt, completion and the end-of-text token; the loss is on the last two. What is too long is cut.

    The two are tokenized apart, the prompt as it will be when the model is asked.
    """
    prompt = encode_prompt(tokenizer, pair.prompt, pair.where)
    completion = encode_documents(tokenizer, [pair.completion], [pair.where])[0]
    ids = np.concatenate((prompt, completion, [tokenizer.eos_token_id])).astype(np.int64)
    counts = np.arange(len(ids)) >= len(prompt)
    return cut(Example(ids, counts, pair.where), limit)


def cut(example: Example, limit: int) -> list[Example]:
    """Consecutive pieces of at most `limit` predicted tokens, those that have an answer.

    The last token of one piece is the first of the next.
    """
    ids, counts, where = example
    starts = range(0, max(1, len(ids) - 1), limit)
    pieces = [Example(ids[at : at + limit + 1], counts[at : at + limit + 1], where) for at in starts]
    return [piece for piece in pieces if piece.counts[1:].any()]


@dataclass
class Examples:
    """Chats or pairs, tokenized and split; the trainer takes it where it takes a Corpus of text.

    question: what the first held-out document asks, in words. sources: how many documents there were.
    """

    tokenizer: object
    is_chat: bool
    train: list[Example]
    validation: list[Example]
    question: str
    inputs: Inputs
    sources: int
    directory: None = None  # it is stored nowhere

    @cached_property
    def manifest(self) -> dict:
        """As of a Corpus; of each split also what counts in the loss, in tokens and in UTF-8 bytes."""
        splits = {"train": self.train, "validation": self.validation}
        counts = {name: count(examples, self.tokenizer) for name, examples in splits.items()}
        return {"vocab_size": len(self.tokenizer), "licence": None, "splits": counts}

    def summary(self) -> str:
        splits = self.manifest["splits"]
        counts = [f"{split['answer_tokens']:,} of {split['tokens']:,} {name}" for name, split in splits.items()]
        return f"{self.sources:,} documents: the loss is on {' and '.join(counts)} tokens (the answers)."

    def prompt(self, question: str) -> str:
        """A question as the model is asked it: of a chat rendered up to where the answer begins."""
        return as_prompt(self.tokenizer, question) if self.is_chat else question


def count(examples: list[Example], tokenizer) -> dict:
    """Documents, tokens, and what counts in the loss, in tokens and in UTF-8 bytes."""
    answers = [example.ids[1:][example.counts[1:]] for example in examples]
    return {
        "documents": len({example.where for example in examples}),
        "tokens": sum(len(example.ids) for example in examples),
        "answer_tokens": sum(len(ids) for ids in answers),
        "bytes": sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in answers),
    }


def read_data(recipe, tokenizer, limit: int, is_resumed: bool) -> Corpus | Examples:
    """What a recipe's data section names, in rows of at most `limit` tokens; text is prepared as for pretraining."""
    data = recipe.data_arguments()
    if is_resumed and data.data_dir and Path(data.data_dir).is_dir():
        return load_corpus(data.data_dir)
    kind = find_format(data)
    if kind == "text":
        return prepare(data, tokenizer=tokenizer, name=recipe.name)
    if data.mixture:
        raise UserError(f"mixture: mixes texts; give {kind} as --text_files, --data_files or --dataset")
    source_kind(data)
    check_split_options(data)
    return read_examples(data, kind, tokenizer, limit)


def read_examples(data, kind: str, tokenizer, limit: int) -> Examples:
    """Chats or pairs as examples, split by documents as text is."""
    tokenizer = with_template(tokenizer) if kind == "chat" else tokenizer
    skipped: dict = {}
    documents = list(read_conversations(data, skipped) if kind == "chat" else read_pairs(data, skipped))
    for name, why in skipped_in_words(skipped).items():
        log(f"skipped: {name}: {why}")
    if len(documents) < 2:
        raise UserError(f"{kind}: the data has {len(documents)} document(s) and 2 are needed, one of them to validate")
    held_out = validation_numbers(len(documents), data)
    splits: dict[bool, list[Example]] = {False: [], True: []}
    encode = encode_conversation if kind == "chat" else encode_pair
    for number, document in enumerate(tqdm(documents, desc="tokens", unit=kind, disable=not sys.stderr.isatty())):
        splits[number in held_out] += encode(tokenizer, document, limit)
    for is_held_out, examples in splits.items():
        if not examples:
            split = "validation" if is_held_out else "training"
            raise UserError(f"validation_fraction={data.validation_fraction}: no answer is left for {split}; change it")
    examples = splits[False] + splits[True]
    inputs = {"the data": digest(*(example.ids.tobytes() + example.counts.tobytes() for example in examples))}
    question = question_of(documents[min(held_out)])
    return Examples(tokenizer, kind == "chat", splits[False], splits[True], question, inputs, len(documents))


def validation_numbers(count: int, data) -> set[int]:
    """Which of so many documents validate: the last ones by position, or a seeded choice; at least one, never all."""
    if data.validation_by == "position":
        first = min(max(1, round(count * (1 - data.validation_fraction))), count - 1)
        return set(range(first, count))
    points = [unit_hash("validation", data.validation_seed, number) for number in range(count)]
    chosen = {number for number, point in enumerate(points) if point < data.validation_fraction}
    chosen = chosen or {points.index(min(points))}
    return chosen - {points.index(max(points))} if len(chosen) == count else chosen


def question_of(document: Conversation | Pair) -> str:
    """The first question of a document, in words."""
    if isinstance(document, Pair):
        return document.prompt
    return next(message["content"] for message in document.messages if message["role"] == "user")


def as_prompt(tokenizer, question: str) -> Rendered:
    """A user's message rendered up to where the answer begins."""
    asked = Conversation("prompt", [{"role": "user", "content": question}])
    return Rendered(render(tokenizer, asked, add_generation_prompt=True))
