"""Made-up documents; needs nothing, so that another process can import it alone."""

import random

WORDS = "def return class self import value for in range print list row token model loss step data"


def sentence(seed: int, words: int = 40) -> str:
    """Return lines of words, a different text for every seed."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choice(WORDS.split()) for _ in range(8)) for _ in range(words // 8)]
    return f"# text {seed}\n" + "\n".join(lines) + "\n"
