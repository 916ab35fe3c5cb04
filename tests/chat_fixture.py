"""A conversation file of more than 200 turns, with real variety, made the same in every test; and a ChatML template."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TREES = {
    "oak": ("acorn", "six hundred years", "barrels and beams"),
    "birch": ("winged nutlet", "eighty years", "plywood and brooms"),
    "beech": ("beechnut", "three hundred years", "chairs and stairs"),
    "walnut": ("walnut", "two hundred years", "gunstocks and veneer"),
    "pine": ("winged seed in a cone", "three hundred years", "masts and matches"),
    "ash": ("ash key", "two hundred years", "oars and axe handles"),
    "maple": ("pair of winged samaras", "a hundred and fifty years", "violins and floors"),
    "willow": ("cottony seed", "sixty years", "baskets and cricket bats"),
}
ASKED = (
    ("What is the fruit of the {tree}?", "It is called a {fruit}."),
    ("How old does a {tree} grow?", "About {age}, if it is let alone."),
    ("What do people make of {tree} wood?", "They make {use}.\nOf course it must dry first."),
    ("Where should I plant a {tree}?", "Where it has light, room for {age}, and no drain under it."),
    ("Spell {tree}.", "{letters}"),
)


def many_conversations() -> list[list[dict]]:
    """48 conversations of two or three exchanges, some with a system message: 248 turns."""
    found = []
    for number in range(48):
        tree = list(TREES)[number % len(TREES)]
        fruit, age, use = TREES[tree]
        words = {"tree": tree, "fruit": fruit, "age": age, "use": use, "letters": "-".join(tree.upper())}
        turns = [{"role": "system", "content": "You are a forester."}] if number % 6 == 0 else []
        for step in range(2 + number % 2):
            question, answer = ASKED[(number // len(TREES) + step) % len(ASKED)]
            turns.append({"role": "user", "content": question.format(**words)})
            turns.append({"role": "assistant", "content": answer.format(**words)})
        found.append(turns)
    return found


def chat_text() -> str:
    """The conversations as a `User:`/`Assistant:` text file, a blank line between two."""
    return "\n".join(
        "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns) for turns in many_conversations()
    )
