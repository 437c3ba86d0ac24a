"""Layer maths: pure functions of arrays. The letters in the shapes are those of docs/notation.md.

Some are wrapped in ``jax.jit(inline=True)``: inside a program that changes nothing, and called by themselves, as a
notebook does, they are compiled as one piece and not operation by operation.
"""
