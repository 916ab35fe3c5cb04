"""A chat that is made here, of sums, words, names and small talk; and questions about what it leaves out."""

from collections.abc import Iterator
from random import Random

from training.data.sources import unit_hash

CONVERSATIONS = 8_400
MOST_EXCHANGES = 8  # of a question and its answer, in one conversation
HELD_OUT = 0.2  # of all pairs of numbers, and of all words
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
Exchange = tuple[str, str]  # a question and its answer

TO_ADD = ("What is {} + {}?", "{} + {}", "{}+{}", "{} + {} =", "How much is {} plus {}?", "Add {} and {}.")
TO_REPEAT = ("Say {}.", "Say {}", "Repeat {}.", "Repeat the word {}.", "Say the word {}.")
TO_SPELL = ("Spell {}.", "Spell {}", "How do you spell {}?", "Spell the word {}.")
TO_INTRODUCE = ("My name is {}.", "My name is {}", "I am {}.", "Call me {}.")
TO_RECALL = ("What is my name?", "Who am I?", "Do you know my name?")
SMALL_TALK = (  # ways to say something, and the answer
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Good evening"), "Hello! How can I help you?"),
    (("Who are you?", "What are you?", "What is your name?"), "I am Acorn, a very small language model."),
    (("What can you do?", "Help", "Can you help me?"), "I can add, repeat and spell, and remember your name."),
    (("Who made you?", "Where do you come from?", "How old are you?"), "You made me, on this computer, just now."),
    (("How are you?", "How are you today?", "How do you do?"), "I am well, thank you."),
    (("Thank you", "Thank you!", "Thanks", "Thanks!", "Great!", "Well done"), "You are welcome."),
    (("Goodbye", "Goodbye!", "Bye", "Bye!", "See you", "Good night"), "Goodbye!"),
    (("Are you a person?", "Are you human?", "Are you alive?"), "No, I am a program."),
)
UNKNOWN = (
    "What is a {}?", "What is {}?", "Who is {}?", "Where is {}?", "Tell me about {}.", "What is the capital of {}?",
    "Write a poem about {}.", "Why is the {} blue?", "Do you like {}?", "How do I make a {}?", "When did {} begin?",
    "Tell me a story.", "What day is it?", "What is the weather?",
)  # fmt: skip
DO_NOT_KNOW = "I do not know that."


# ---- what is asked about


def is_held_out(*content: str | int) -> bool:
    """Whether a word, or a pair of numbers in order, is kept from every conversation."""
    return unit_hash("held out", *content) < HELD_OUT


def draw_numbers(random: Random, held_out: bool) -> tuple[int, int]:
    """Two numbers below 100, a fourth of them below 10; a pair is held out in both its orders."""
    while True:
        a, b = (random.randrange(10) if random.random() < 0.25 else random.randrange(10, 100) for _ in range(2))
        if is_held_out(min(a, b), max(a, b)) == held_out:
            return a, b


def draw_word(random: Random, held_out: bool) -> str:
    """An invented word of three to eight small letters; in half of them consonants and vowels take turns."""
    every = CONSONANTS + VOWELS
    while True:
        kinds = random.choice(((CONSONANTS, VOWELS), (VOWELS, CONSONANTS), (every, every), (every, every)))
        word = "".join(random.choice(kinds[place % 2]) for place in range(random.randint(3, 8)))
        if is_held_out(word) == held_out:
            return word


# ---- what is asked, and the answer


def add(random: Random, held_out: bool = False) -> Exchange:
    """A sum, worked out as on paper: the ones, the tens with what is carried, the result."""
    a, b = draw_numbers(random, held_out)
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    working = f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10} + {ones // 10} = {tens}"
    return random.choice(TO_ADD).format(a, b), f"{working}, so {a + b}"


def repeat(random: Random, held_out: bool = False) -> Exchange:
    word = draw_word(random, held_out)
    return random.choice(TO_REPEAT).format(word), word


def spell(random: Random, held_out: bool = False) -> Exchange:
    word = draw_word(random, held_out)
    return random.choice(TO_SPELL).format(word), "-".join(word)


def introduce(random: Random, name: str) -> Exchange:
    return random.choice(TO_INTRODUCE).format(name), f"Hello! Your name is {name}."


def recall(random: Random, name: str | None) -> Exchange:
    return random.choice(TO_RECALL), f"Your name is {name}." if name else "You have not told me your name."


def small_talk(random: Random) -> Exchange:
    ways, answer = random.choice(SMALL_TALK)
    return random.choice(ways), answer


def refuse(random: Random) -> Exchange:
    return random.choice(UNKNOWN).format(draw_word(random, held_out=False)), DO_NOT_KNOW


SKILLS = {"add": add, "repeat": repeat, "spell": spell}
KINDS = {"add": 6, "repeat": 3, "spell": 3, "introduce": 1, "recall": 5, "small talk": 2, "refuse": 1}  # and how often


# ---- conversations, and what is asked to see what was learned


def conversations(count: int = CONVERSATIONS, seed: int = 0) -> Iterator[list[dict]]:
    """Yield so many conversations as messages, the same ones for a seed."""
    random = Random(seed)
    for _ in range(count):
        kinds = random.choices(list(KINDS), list(KINDS.values()), k=random.randint(1, MOST_EXCHANGES))
        yield as_messages(converse(random, kinds))


def converse(random: Random, kinds: list[str]) -> Iterator[Exchange]:
    """Yield an exchange of each kind; the name is the one that was said last, and is mostly said before it is asked."""
    name = None
    for kind in kinds:
        is_early = kind == "recall" and name is None and random.random() < 0.8
        if kind in SKILLS:
            yield SKILLS[kind](random)
        elif kind == "introduce" or is_early:
            yield introduce(random, name := draw_word(random, held_out=False))
        elif kind == "recall":
            yield recall(random, name)
        else:
            yield small_talk(random) if kind == "small talk" else refuse(random)


def held_out_questions(count: int, seed: int = 0) -> Iterator[tuple[str, list[dict], str]]:
    """Yield so many of (skill, messages that end with a question, its answer), about what no conversation has."""
    random, skills = Random(seed), [*SKILLS, "remember"]
    for number in range(count):
        skill = skills[number % len(skills)]
        if skill in SKILLS:
            exchanges = [SKILLS[skill](random, held_out=True)]
        else:
            name = draw_word(random, held_out=True)
            exchanges = [introduce(random, name), recall(random, name)]
        *messages, answer = as_messages(exchanges)
        yield skill, messages, answer["content"]


def as_messages(exchanges) -> list[dict]:
    """Exchanges as the messages of the user and the assistant."""
    roles = ("user", "assistant")
    return [{"role": role, "content": said} for pair in exchanges for role, said in zip(roles, pair, strict=True)]
