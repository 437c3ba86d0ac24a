"""Named chat templates of a model: the choice of one, the names that it reads, and a last message that is continued.

Everything that reaches a template is plain data: texts, numbers, lists and objects.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm_runtime.chat_template import RESERVED_VARIABLES, check_variables, find_variables, render
from jllm_runtime.errors import RequestError
from jllm_runtime.reasoning import closes_thinking, detect_thinking

DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"
"""Names of the templates for conversations, and for those in which tools are given."""

TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
"""Names of the file of the default template, and of the folder of the others, ``NAME.jinja`` each."""

TOOL_VARIABLES = ("tools", "xml_tools", "python_tools")
"""Variables that take the tools; a template gets them in the first that it reads. The last two are SmolLM3's."""

# Names that clients give to a message's thinking; templates are written for the first.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Stands behind the text that the answer goes on from, to find its end in the prompt. Its own space at the end is gone
# where a template has trimmed the text.
_END_MARK = "[jllm:end-of-the-last-message] "


class ChatTemplates:
    """A model's chat templates.

    Args:
        sources: Jinja sources by their names.
        special: texts of the special tokens by their names, such as ``bos_token``.

    Attributes:
        sources, special: as given.
    """

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self.special = dict(special)

    def choose(self, tools: bool = False) -> str | None:
        """The source for a conversation, by the names of transformers; None without any.

        Args:
            tools: whether tools are given.
        """
        # A list without a default is used in its order. transformers would refuse the conversation.
        default = self.sources.get(DEFAULT_TEMPLATE, next(iter(self.sources.values()), None))
        return self.sources.get(TOOL_TEMPLATE, default) if tools else default

    def render(
        self, messages: Sequence[Mapping[str, Any]], continue_final_message: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation; arguments and errors are those of ``Tokenizer.encode_chat``."""
        template = self.choose(tools=bool(variables.get("tools")))
        if template is None:
            raise RequestError("the model has no chat template; give it a raw text (--raw) instead of a conversation")
        if continue_final_message and variables.get("add_generation_prompt"):
            raise RequestError("continue_final_message and add_generation_prompt exclude each other")
        check_variables(template, variables.keys() - RESERVED_VARIABLES)
        plain = [_plain_message(message) for message in messages]
        given = {**self.special, **_tool_variables(template, variables)}
        return (_render_continued if continue_final_message else render)(template, plain, given)

    def variables(self) -> frozenset[str]:
        """Names of the variables that the template reads, ``messages`` included; none without a template."""
        template = self.choose()
        return frozenset() if template is None else find_variables(template)

    def check_variables(self, names: Iterable[str], tools: bool = False) -> None:
        """Refuse variables that the template does not read; errors are those of ``Tokenizer.check_variables``.

        Args:
            names: theirs.
            tools: whether tools are given, for which there may be another template.
        """
        check_variables(self.choose(tools) or "", names)

    def thinks(self, **variables: Any) -> bool:
        """Whether the model may think before it answers, with these variables of the template."""
        template = self.choose()
        if template is None or not detect_thinking(template):
            return False
        # A template that turns thinking off closes it in the prompt. What turns it off has many names, so the prompt
        # itself is asked.
        variables = {name: value for name, value in variables.items() if name != "continue_final_message"}
        try:
            text = self.render([{"role": "user", "content": "?"}], **variables)
        except RequestError:  # it wants other messages, and has not said
            return True
        return not closes_thinking(text)


def named_sources(stored: Any) -> dict[str, str]:
    """Sources by name, from the ``chat_template`` of a tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(stored, str):
        return {DEFAULT_TEMPLATE: stored}
    if isinstance(stored, list):
        stored = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, Mapping)}
    if not isinstance(stored, Mapping):
        return {}
    return {name: text for name, text in stored.items() if isinstance(name, str) and isinstance(text, str)}


def read_sources(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name, from the files of a checkpoint.

    Args:
        folder: the checkpoint's.
        settings: its tokenizer_config.json.

    Raises:
        OSError, ValueError: a file cannot be read, or is no text.
    """
    sources = named_sources(settings.get("chat_template"))
    named = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    # As in transformers, a file stands above what the settings have under the same name.
    for name, path in {DEFAULT_TEMPLATE: folder / TEMPLATE_FILE, **named}.items():
        if path.is_file() and (text := path.read_text(encoding="utf-8")):
            sources[name] = text
    return sources


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates are written for it, as in transformers: without fields that are None, and with its
    thinking under the name that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    thinking = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
    return fields if thinking is None else {"thinking": thinking, **fields, "reasoning_content": thinking}


def _tool_variables(template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables, with ``tools`` under the name by which the template reads them."""
    given = dict(variables)
    if given.get("tools") and (read := find_variables(template)):
        name = next((name for name in TOOL_VARIABLES if name in read), None)
        if name is None:
            raise RequestError(
                "the model's chat template knows no tools; leave them out, or describe them in a message"
            )
        given.setdefault(name, given["tools"])
    return given


def _render_continued(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a conversation up to the end of its last message's content, which the answer goes on from.

    Args:
        template, messages, variables: those of ``render``.

    Raises:
        RequestError: as ``render``; or the last message has no text, or the template leaves it out or changes it.
    """
    last = messages[-1] if messages else {}
    content = last.get("content")
    if not isinstance(content, str) or last.get("tool_calls"):
        what = "there is no message" if not messages else "the last message must have a text, and no tool calls"
        raise RequestError(f"continue_final_message: {what}")
    marked = [*messages[:-1], {**last, "content": content + _END_MARK}]
    text = render(template, marked, {**variables, "add_generation_prompt": False})
    end = text.rfind(_END_MARK.rstrip())
    if end < 0 or content.strip() not in text:
        raise RequestError(
            "continue_final_message: the model's chat template leaves the last message out, or changes it "
            f"({content.strip()!r:.80}), so no answer can go on from it"
        )
    if text.startswith(_END_MARK, end):
        return text[:end]
    # A template that trims messages would have trimmed the space before the mark, too.
    return text[: end - len(content) + len(content.rstrip())]
