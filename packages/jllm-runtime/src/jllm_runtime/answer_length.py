"""Default length of an answer in a conversation."""

DEFAULT_MAX_TOKENS = 2048
"""Most tokens of an answer in a conversation, where nobody says: a few pages. A model that never ends stops there."""

DEFAULT_MAX_TOKENS_THINKING = 16384
"""The same for a model that thinks first. Thoughts take thousands of tokens, and an answer cut inside them is none."""


def default_max_tokens(thinks: bool) -> int:
    """Most tokens of an answer in a conversation, where nobody says.

    Args:
        thinks: the model may think before it answers; ``Tokenizer.thinks`` tells.
    """
    return DEFAULT_MAX_TOKENS_THINKING if thinks else DEFAULT_MAX_TOKENS
