"""From the data arguments to what is trained on: prepared tokens for text, tokenized examples for chats and pairs."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from training.data.corpus import Corpus, load_corpus, prepare
from training.data.inputs import Inputs
from training.data.reading import log, skipped_in_words
from training.data.sources import unit_hash
from training.data.splitting import check_split_options
from training.model.sampling import Rendered
from training.system.errors import UserError
from training.system.files import digest

from .chat_files import Conversation, Pair, find_format, read_conversations, read_pairs
from .conversations import Example, encode_conversation, encode_pair, render, with_template


@dataclass
class Examples:
    """Chats or pairs, tokenized and split; the trainer takes it where it takes a Corpus of text.

    question: what the first held-out document asks, in words; sample_prompt: the same as the model is asked it.
    """

    tokenizer: object
    train: list[Example]
    validation: list[Example]
    question: str
    sample_prompt: str
    inputs: Inputs
    sources: int = 0
    directory: None = None
    manifest: dict = field(default_factory=dict)

    def __post_init__(self):
        splits = {"train": self.train, "validation": self.validation}
        self.manifest = {
            "vocab_size": len(self.tokenizer),
            "licence": None,
            "splits": {name: count(examples, self.tokenizer) for name, examples in splits.items()},
        }


def count(examples: list[Example], tokenizer) -> dict:
    """Documents, tokens, and what counts in the loss, in tokens and in UTF-8 bytes."""
    answers = [example.ids[1:][example.counts[1:]] for example in examples]
    return {
        "documents": len({example.where for example in examples}),
        "tokens": sum(len(example.ids) for example in examples),
        "answer_tokens": sum(len(ids) for ids in answers),
        "bytes": sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in answers),
    }


def read_data(data, tokenizer, limit: int, name: str, is_resumed: bool = False) -> Corpus | Examples:
    """What the data arguments name, tokenized; `limit` is the longest row. Text is prepared as for pretraining."""
    if is_resumed and data.data_dir and Path(data.data_dir).is_dir():
        return load_corpus(data.data_dir)
    kind = find_format(data)
    if kind == "text":
        return prepare(data, tokenizer=tokenizer, name=name)
    if data.mixture:
        raise UserError(f"mixture: mixes texts; give {kind} as --text_files, --data_files or --dataset")
    check_split_options(data)
    return read_examples(data, kind, tokenizer, limit)


def read_examples(data, kind: str, tokenizer, limit: int) -> Examples:
    """Chats or pairs as examples, split by documents as text is."""
    tokenizer = with_template(tokenizer) if kind == "chat" else tokenizer
    left_out: dict = {}
    documents = list(read_conversations(data, left_out) if kind == "chat" else read_pairs(data, left_out))
    for name, why in skipped_in_words(left_out).items():
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
    question, prompt = ask(tokenizer, documents[min(held_out)])
    examples = splits[False] + splits[True]
    inputs = {"the data": digest(*(example.ids.tobytes() + example.counts.tobytes() for example in examples))}
    return Examples(tokenizer, splits[False], splits[True], question, prompt, inputs, len(documents))


def validation_numbers(count: int, data) -> set[int]:
    """Which of so many documents validate: the last ones by position, or a seeded choice; at least one, never all."""
    if data.validation_by == "position":
        first = min(max(1, round(count * (1 - data.validation_fraction))), count - 1)
        return set(range(first, count))
    points = [unit_hash("validation", data.validation_seed, number) for number in range(count)]
    chosen = {number for number, point in enumerate(points) if point < data.validation_fraction}
    chosen = chosen or {points.index(min(points))}
    return chosen - {points.index(max(points))} if len(chosen) == count else chosen


def ask(tokenizer, document: Conversation | Pair) -> tuple[str, str]:
    """The first question of a document: in words, and as the model is asked it."""
    if isinstance(document, Pair):
        return document.prompt, document.prompt
    question = next(message["content"] for message in document.messages if message["role"] == "user")
    return question, as_prompt(tokenizer, question)


def as_prompt(tokenizer, question: str) -> Rendered:
    """A user's message rendered up to where the answer begins."""
    return Rendered(render(tokenizer, [{"role": "user", "content": question}], "prompt", add_generation_prompt=True))


def describe(material: Corpus | Examples) -> str:
    """One line that says what there is to train on."""
    splits = material.manifest["splits"]
    if isinstance(material, Examples):
        counts = [f"{split['answer_tokens']:,} of {split['tokens']:,} {name}" for name, split in splits.items()]
        return f"{material.sources:,} documents: the loss is on {' and '.join(counts)} tokens (the answers)."
    return " and ".join(f"{splits[name]['tokens']:,} {name}" for name in splits) + " tokens of text."
