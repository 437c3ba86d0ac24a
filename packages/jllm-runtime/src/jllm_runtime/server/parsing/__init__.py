"""Parsers of a model's text as it comes: thinking, content, tool calls."""
