"""Streaming parsers of a model's output: thinking, content, tool calls."""
