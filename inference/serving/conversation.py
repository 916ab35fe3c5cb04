"""What a person and a model have said, and the ids that the model is asked with: a chat, or a text that goes on."""

from abc import ABC, abstractmethod

from training.model.chat_template import end_of_turn, render_messages
from training.model.sampling import Rendered, encode_prompt, stop_tokens
from training.system.errors import UserError

YOU = "your message"  # what a refusal names


class Conversation(ABC):
    """Turns ({"role", "content"}) of the user and the assistant, the newest of which fit the model's context.

    context_length: tokens that the model reads. system: what the model is told before the first turn.
    fallen: how much of the beginning the model reads no more, in turns or in tokens as `unit` says.
    """

    unit: str

    def __init__(self, tokenizer, context_length: int):
        self.tokenizer, self.context_length, self.system = tokenizer, context_length, ""
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system's message stays."""
        self.turns: list[dict] = []
        self.fallen = 0

    @property
    def messages(self) -> list[dict]:
        """All that was said, the system's message first."""
        return self._system_message() + self.turns

    def ask(self, text: str, answer_tokens: int) -> list[int]:
        """Ids of the conversation and the user's `text`, with room for an answer: for so many tokens, or a quarter.

        Where they would not fit, the oldest turns fall away. Raises UserError, and keeps nothing of it, for a text that
        does not fit alone.
        """
        refuse_broken(text)
        self.turns.append({"role": "user", "content": text})
        fallen, limit = self.fallen, self.context_length - min(answer_tokens, self.context_length // 4)
        try:
            while len(ids := self.ids()) > limit:
                self.drop(len(ids) - limit)
        except UserError:
            self.take_back()
            self.fallen = fallen
            raise
        return ids

    def take_back(self) -> None:
        """Forget the newest turn, which was not answered."""
        self.turns.pop()

    def answered(self, text: str) -> None:
        """Keep what the model said."""
        self.turns.append({"role": "assistant", "content": text})

    @abstractmethod
    def ids(self) -> list[int]:
        """What the model is given: all that has not fallen away."""

    @abstractmethod
    def drop(self, tokens: int) -> None:
        """Let what is oldest fall away, as the ids are so many tokens too long; refuse it where only `text` is left."""

    def _system_message(self) -> list[dict]:
        return [{"role": "system", "content": self.system}] if self.system else []


class Chat(Conversation):
    """Turns as the tokenizer's chat template writes them."""

    unit = "turns"

    def answered(self, text: str) -> None:
        super().answered(text.strip())  # a template sets the spaces around it

    def ids(self) -> list[int]:
        messages = self._system_message() + self.turns[self.fallen :]
        text = render_messages(self.tokenizer, YOU, messages, add_generation_prompt=True)
        return encode_prompt(self.tokenizer, Rendered(text), YOU)

    def drop(self, tokens: int) -> None:
        later = range(self.fallen + 1, len(self.turns))
        first = next((number for number in later if self.turns[number]["role"] == "user"), None)
        if first is None:
            room = f"the model's context of {self.context_length} tokens with room for an answer"
            raise UserError(f"{YOU}: is {tokens} tokens longer than fits {room}; shorten it")
        self.fallen = first


class Continuation(Conversation):
    """For a base model: one text, which the user and the model write in turns, each of the user's on a line of its own.

    An empty one lets the model go on.
    """

    unit = "tokens"

    def ids(self) -> list[int]:
        text = ""
        for turn in self.turns:
            is_new_line = text and turn["content"] and turn["role"] == "user"
            text += ("\n" if is_new_line else "") + turn["content"]
        return encode_prompt(self.tokenizer, text, YOU)[self.fallen :]

    def drop(self, tokens: int) -> None:
        self.fallen += tokens


def conversation_with(tokenizer, context_length: int) -> Conversation:
    """A chat where the tokenizer has a template for one, else a text that goes on."""
    return (Chat if tokenizer.chat_template else Continuation)(tokenizer, context_length)


def answer_ends(model, tokenizer) -> list[int]:
    """The tokens at which an answer ends: where the model's text does, and where the template ends a turn."""
    end = end_of_turn(tokenizer)
    return list(dict.fromkeys([*stop_tokens(model), *([] if end is None else [end])]))


def refuse_broken(text: str) -> None:
    """Refuse what no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{YOU}: is not UTF-8 (at character {error.start}); type it in UTF-8") from error
