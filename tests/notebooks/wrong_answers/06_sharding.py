# %% 6.1


def shard_shape(shape, spec, mesh_shape):
    # Rounds down what does not divide.
    return tuple(size // (1 if name is None else mesh_shape[name]) for size, name in zip(shape, spec, strict=True))


# %% 6.2


def device_block(x, up, down):
    # Each device keeps its own part of the sum.
    return jax.nn.silu(x @ up) @ down


# %% 6.3


def all_reduced_bytes(config, batch, tokens, bytes_a_number):
    # One all-reduce a layer, and none for the embedding.
    return config.num_layers * batch * tokens * config.hidden_size * bytes_a_number
