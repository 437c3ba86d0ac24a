# Answers as a reader may give them at first, each wrong.

# %% 3.1
def prefill_in_pieces(tokens, size):
    cache = empty_cache(config, 1, 128)
    for start in range(0, tokens.shape[1], size):
        logits, cache = step(tokens[:, start : start + size], 0, cache, weights, config)
    return logits


# %% 3.1
def prefill_in_pieces(tokens, size):
    return step(tokens, 0, empty_cache(config, 1, 128), weights, config)[0]


# %% 3.1
def prefill_in_pieces(tokens, size):
    cache = empty_cache(config, 1, 128)
    for piece in range(tokens.shape[1] // size):
        start = piece * size
        logits, cache = step(tokens[:, start : start + size], start, cache, weights, config)
    return logits


# %% 3.2
def decode_rate(config, size, batch, slots, bytes_per_s, flops_per_s):
    reading = 2 * size / bytes_per_s
    computing = batch * 2 * size / flops_per_s
    return batch / max(reading, computing)
