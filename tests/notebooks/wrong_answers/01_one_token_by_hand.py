# Answers as a reader may give them at first, each wrong.

# %% 1.1
def nearest(token, embedding, count):
    return jnp.argsort(-(embedding @ embedding[token]))[:count]


# %% 1.1
def nearest(token, embedding, count):
    return jnp.argsort(jnp.linalg.norm(embedding - embedding[token], axis=1))[:count]


# %% 1.2
def softmax(scores):
    exponentials = jnp.exp(scores)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


# %% 1.3
def count_numbers(config):
    width = config.hidden_size
    attention = 4 * width * config.num_heads * config.head_dim
    feed_forward = 3 * width * config.intermediate_size
    return 2 * config.vocab_size * width + config.num_layers * (attention + feed_forward + 2 * width) + width
