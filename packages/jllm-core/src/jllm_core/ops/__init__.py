"""The layer math: pure functions of arrays. The letters in the shapes are those of docs/notation.md."""
