# Answers as a reader may give them at first, each wrong.

# %% 2.1
def visible(q_positions, k_positions, window):
    queries, keys = q_positions[:, None], k_positions[None, :]
    return (keys <= queries) & (keys >= queries - window)


# %% 2.1
def visible(q_positions, k_positions, window):
    queries, keys = q_positions[:, None], jnp.arange(len(k_positions))
    return (keys <= queries) & (keys > queries - window)


# %% 2.2
def complex_rope(x, positions, theta):
    half = x.shape[-1] // 2
    points = x[..., ::2] + 1j * x[..., 1::2]
    angles = positions[:, None, None] * theta ** -(jnp.arange(half) / half)
    points = points * jnp.exp(1j * angles)
    return jnp.concatenate([points.real, points.imag], axis=-1)


# %% 2.3
def ungrouped_weights(q, k, positions):
    copies = jnp.tile(k, (1, q.shape[1] // k.shape[1], 1))
    scores = einsum("TNH,SNH->NTS", q, copies) / q.shape[-1] ** 0.5
    seen = positions[None, :] <= positions[:, None]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
