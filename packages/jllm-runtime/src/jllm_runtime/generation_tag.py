"""Jinja's ``{% generation %}`` tag of chat templates, which marks what the assistant has written.

transformers masks the loss of training by it. In a prompt it changes nothing.
"""

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``: the block between, as it is."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only looks names up in it

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block, from the tag's name on."""
        line = next(parser.stream).lineno
        # In transformers the block is a macro's: a variable that is set in it ends with it.
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
