"""Prompts of unequal lengths, as people type them, for benchmarks/serve.py and benchmarks/soak.py."""

PARAGRAPH = (
    "The lighthouse stood at the end of the pier, and its keeper climbed the stairs every evening to light the lamp. "
    "Ships passed far out, on their way to harbours whose names he knew only from letters. In the autumn a boy came "
    "over from the village with bread and oil, and asked how the light could turn when nobody pushed it. The keeper "
    "showed him the clockwork, the weights on their chains, and the log in which each night had a line: wind, weather, "
    "sails in sight. "
)
CODE = """
def merge(left, right):
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i]); i += 1
        else:
            merged.append(right[j]); j += 1
    return merged + left[i:] + right[j:]
"""
TABLE = """
city      | country | inhabitants | river
Hamburg   | Germany | 1,850,000   | Elbe
Lyon      | France  | 520,000     | Rhône
Porto     | Portugal| 230,000     | Douro
Gdańsk    | Poland  | 470,000     | Motława
Cologne   | Germany | 1,080,000   | Rhine
"""

PROMPTS = [
    "Hi!",
    "What is the capital of Portugal?",
    f"Summarise this story in one sentence: {PARAGRAPH}",
    "Write a haiku about rain on a tin roof.",
    f"What does this function do, and how would you test it?\n{CODE}",
    "Explain to a child of eight why the sky is blue and the evening is red.",
    "Which is heavier, a kilogram of feathers or a kilogram of lead?",
    f"Which of these cities is the largest, and on which river does it lie?\n{TABLE}",
    "Give me three names for a grey cat.",
    f"Continue the story where it ends, in the same tone. {PARAGRAPH * 2}",
    "Translate to French: 'Where is the nearest station, please?'",
    "I have eggs, spinach, an onion and half a lemon. What can I cook in twenty minutes, and what do I begin with?",
    "How do I undo the last commit in git without losing my changes?",
    f"Rewrite the function below so that it needs no list for its result.\n{CODE}\nKeep its name.",
    "Thank you, that was all.",
    "List the planets of the solar system from the largest to the smallest, with a remark about each that fits a line.",
    f"Who are the people in this story, and what does each of them want?\n\n{PARAGRAPH}\n\nAnswer in a list.",
    "What is 17 times 24? Show how you get there.",
    "Write an email to a landlord: the heating has been out since Monday, it is cold, and there is a baby in the flat.",
    f"Turn the table into JSON, an object a city.\n{TABLE}",
    "Is a tomato a fruit?",
    "Compare bicycles and trams as means of transport in a city of two hundred thousand people, in ten sentences.",
    "Write a limerick about a programmer who could not find a semicolon.",
    f"Correct the spelling and give the text only: {PARAGRAPH.replace('keeper', 'keepr').replace('oil', 'oyl')}",
    "What should I see in Lisbon in one day?",
    "Explain the difference between a process and a thread as you would to somebody who cooks for a living.",
    f"Here are two tables, the second with newer numbers. What has changed?\n{TABLE}\n{TABLE.replace('520', '525')}",
    "Yes or no: can penguins fly?",
    "Give me a regular expression that matches dates such as 2024-02-29, and say what it gets wrong.",
    f"{PARAGRAPH * 3}\n\nWrite three questions about this text that a teacher might ask, easy ones first.",
    "Tell me a joke about a lighthouse.",
    "My plant has yellow leaves at the bottom and the soil is always wet. What is wrong with it?",
    "Name five uses for an old bath tub.",
    f"Add type hints and a docstring:\n{CODE}",
    "What time is it in Tokyo when it is noon in London in January?",
    "Plan a birthday party for twelve children in a small garden. There is rain in the forecast. Be brief.",
    f"Which city in the table has a name that changed in the last hundred years? Say if you are not sure.\n{TABLE}",
    "Why do cats purr?",
    f"Retell this as a letter from the boy to his sister. {PARAGRAPH}",
    "Count from one to twenty in German.",
]


def messages(number: int) -> list[dict[str, str]]:
    """A conversation that begins like no other, so that no earlier one has left a part of it."""
    return [{"role": "user", "content": f"({number}) {PROMPTS[number % len(PROMPTS)]}"}]


def answer_length(number: int) -> int:
    """Tokens of the answer to it: from 16 to 96, in no order."""
    return 16 + number * 37 % 81


def long_text(seed: int, tokens: int, tokenizer: object) -> str:
    """A text of about so many tokens that begins like no other."""
    words = " ".join(f"Chapter {seed}.{part}. {PARAGRAPH}" for part in range(tokens // 90 + 1))
    ids = tokenizer.encode(words, add_special_tokens=False)[:tokens]  # type: ignore[attr-defined]
    return tokenizer.decode(ids)  # type: ignore[attr-defined]
