"""Several processes that run one model together (``jax.distributed``)."""
