# %% 4.1


def min_p(logits, p):
    # As if p were a factor between logits.
    return np.where(logits >= p * logits.max(), logits, -np.inf)


# %% 4.2


def perplexity(logits, tokens):
    # The logits at t taken for those of token t.
    logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return np.exp(-logprobs[np.arange(len(tokens)), tokens].mean())


# %% 4.3


def induction_scores(maps, n):
    # The earlier occurrence itself, not the token behind it.
    t = np.arange(n + 1, 2 * n + 1)
    return maps[:, :, t, t - n].mean(axis=-1)
