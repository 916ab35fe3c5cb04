"""The tokenizer of a GGUF file: llama.cpp's byte-level BPE, as which bytes and characters can be written too."""

from transformers import PreTrainedTokenizerFast

from training.data.tokenizers import BYTE_VOCABULARY, backend_state, characters_of, splits_as_gpt2, tokenizer_kind
from training.system.errors import UserError

LETTERS = {byte: letter for letter, byte in BYTE_VOCABULARY.items()}  # byte: how byte-level vocabularies write it
# llama.cpp wants one merge at least; these two bytes are in no UTF-8 text.
NO_MERGE = f"{LETTERS[0xC0]} {LETTERS[0xC1]}"
GPT2 = "gpt-2"  # llama.cpp's name of the rule by which GPT-2 takes a text apart before the merges
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Others by llama.cpp's names: the pattern, and whether a piece that is an entry is taken whole
RULES = {
    "llama-bpe": (rf"{CONTRACTIONS}\p{{N}}{{1,3}}{REST}", True),
    "qwen2": (rf"{CONTRACTIONS}\p{{N}}{REST}", False),
}
DEFAULT_END = 11  # llama.cpp's end of text where a file names none
PLAIN = {"dropout": None, "byte_fallback": False}  # of a BPE that merges by rank alone


def add_vocabulary(writer, tokenizer: PreTrainedTokenizerFast, model) -> None:
    """Add entries, merges, special tokens and the chat template of a tokenizer to a GGUFWriter; UserError if it cannot.

    Entries that the model has beyond the tokenizer's are marked as unused. Nothing is put around a text.
    """
    is_characters = tokenizer_kind(tokenizer) == "char"
    entries, merges = characters(tokenizer) if is_characters else byte_pairs(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(GPT2 if is_characters else splitting_rule(tokenizer))
    texts, types = whole_list(tokenizer, entries, model.config.vocab_size)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges or [NO_MERGE])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    add_special(writer, tokenizer, model)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        named = [{"name": name, "template": text} for name, text in template.items()] if type(template) is dict else []
        writer.add_chat_template(named or template)


def add_special(writer, tokenizer, model) -> None:
    """Which tokens begin, end and fill a text; of several that end one, the first two."""
    for add, token in zip((writer.add_eos_token_id, writer.add_eot_token_id), ends(tokenizer, model), strict=False):
        add(token)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(ends(tokenizer, model)), None)
    for add, token in ((writer.add_bos_token_id, begin), (writer.add_pad_token_id, tokenizer.pad_token_id)):
        if token is not None:
            add(token)


def ends(tokenizer, model) -> list[int]:
    """The tokens that end a text: the model's, the tokenizer's, or else an entry that no text has.

    Where a file names none, llama.cpp takes entry 11. None at all: the list is empty.
    """
    named = model.generation_config.eos_token_id
    found = named if isinstance(named, list) else [tokenizer.eos_token_id if named is None else named]
    unused = list(range(len(tokenizer), model.config.vocab_size))
    return [token for token in found if token is not None] or unused[-1:]


def note(tokenizer, model) -> list[str]:
    """A line on what llama.cpp will do otherwise than the model."""
    if ends(tokenizer, model) or len(tokenizer) <= DEFAULT_END:
        return []
    entry = tokenizer.decode([DEFAULT_END])
    return [
        f"The tokenizer has no end-of-text token: llama.cpp takes entry {DEFAULT_END}, {entry!r}, and will stop there."
    ]


def whole_list(tokenizer, entries: dict[int, str], size: int) -> tuple[list[str], list[int]]:
    """(texts, GGUF's token types) of `size` entries, in the order of their ids."""
    from gguf import TokenType

    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    texts, types = [], []
    for index in range(size):
        if index in added:
            texts.append(added[index].content)
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        elif index in entries:
            texts.append(entries[index])
            types.append(TokenType.NORMAL)
        else:
            texts.append(f"[UNUSED{index}]")
            types.append(TokenType.UNUSED)
    return texts, types


def byte_pairs(tokenizer) -> tuple[dict[int, str], list[str]]:
    """(entries by id, merges) of a byte-level BPE."""
    model = backend_state(tokenizer.backend_tokenizer)["model"]
    if model["type"] != "BPE" or any(model.get(name, value) != value for name, value in PLAIN.items()):
        raise UserError(f"the tokenizer is a {model['type']}: bytes, characters and byte-level BPE can be written")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {index: text for text, index in model["vocab"].items()}, merges


def splitting_rule(tokenizer) -> str:
    """llama.cpp's name of how a text is taken apart before the merges; UserError for a rule that is none of ours."""
    state = backend_state(tokenizer.backend_tokenizer)
    is_whole = state["model"].get("ignore_merges", False)
    # Bytes are not taken apart, and have no merges that would be kept apart.
    if not is_whole and (tokenizer_kind(tokenizer) == "byte" or splits_as_gpt2(state)):
        return GPT2
    split, *rest = (state["pre_tokenizer"] or {}).get("pretokenizers") or [{}]
    to_bytes = [(step.get("type"), step.get("add_prefix_space"), step.get("use_regex")) for step in rest]
    if (split.get("type"), split.get("behavior"), split.get("invert")) == ("Split", "Isolated", False) and (
        to_bytes == [("ByteLevel", False, False)] and (state["normalizer"] or {"type": "NFC"}) == {"type": "NFC"}
    ):
        found = (split["pattern"].get("Regex"), is_whole)
        if name := next((name for name, rule in RULES.items() if rule == found), None):
            return name
    known = ", ".join([GPT2, *RULES])
    raise UserError(f"the tokenizer's rule of taking texts apart is none that can be written ({known} of llama.cpp's)")


def characters(tokenizer) -> tuple[dict[int, str], list[str]]:
    """(entries by id, merges) that make characters of their UTF-8 bytes.

    Each merge adds one byte to the first ones of a character, so that none reaches over the border of two.
    """
    entries, merges = {}, {}  # of merges the keys alone, in their order
    for index, character in enumerate(characters_of(tokenizer)):
        letters = [LETTERS[byte] for byte in character.encode()]
        entries[index] = "".join(letters)
        merges |= dict.fromkeys(f"{''.join(letters[:n])} {letters[n]}" for n in range(1, len(letters)))
    return entries, list(merges)
