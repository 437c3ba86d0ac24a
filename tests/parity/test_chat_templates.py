"""Chat templates beside transformers' ``apply_chat_template``: the same text for the same conversation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from jllm_runtime import RequestError, Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "Hi"}

# Kinds of templates: by what they do with white space and with what the assistant said.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = PLAIN.replace("{{ m.content }}", "\n\n{{ m.content | trim }}")
MARKED = """\
{%- set said = 'nothing' -%}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {% generation %}
        {%- set said = m.content -%}
        {{ '<assistant>' + said.lstrip('\n') + eos_token }}
        {%- for call in m.tool_calls %}
            {{- '\n' if not loop.first }}{{ call.function.arguments | tojson }}
        {%- endfor %}
        {%- endgeneration %}
    {%- else %}
        {{- '<' + m.role + '>' + m.content + eos_token }}
    {%- endif %}
{%- endfor -%}
{{ said }}{% if add_generation_prompt %}<assistant>{% endif %}"""
TWO_MARKS = "{%generation%}{{ messages[0].content }}{%endgeneration%}{%- generation -%} b {%- endgeneration -%}"
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content if m.content is defined else 'no content' }}<end>{% endfor %}"
)
CUTTING = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
TEMPLATES = {
    **{"plain": PLAIN, "trimming": TRIMMING, "marked": MARKED, "two marks": TWO_MARKS},
    **{"thinking": THINKING, "cutting": CUTTING},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "answered": [USER, {"role": "assistant", "content": "Hello "}],
    "in lines": [USER, {"role": "assistant", "content": "\n One\n\ntwo \n"}],
    "nothing said": [USER, {"role": "assistant", "content": ""}],
    "thinking": [USER, {"role": "assistant", "content": "<think>\nhm"}],
    "thought": [USER, {"role": "assistant", "content": "<think>hm</think>Hello"}],
    "reasoning_content": [USER, {"role": "assistant", "content": "Hello", "reasoning_content": "hm"}],
    "reasoning": [USER, {"role": "assistant", "content": "Hello", "reasoning": "hm", "tool_calls": None}],
    "older name": [USER, {"role": "assistant", "content": None, "thinking": "hm"}],
    "call": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}] * 2},
        {"role": "tool", "content": "rain"},
    ],
    "of the user": [USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And then"}],
}
FLAGS: list[dict[str, bool]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"continue_final_message": True, "add_generation_prompt": True},
]


@pytest.fixture(scope="module")
def raw() -> RawTokenizer:
    return RawTokenizer(models.BPE(vocab={"a": 0}, merges=[]))


def assert_same(theirs: Callable[[], str], ours: Callable[[], str]) -> None:
    """The same text, or an error from both."""
    try:
        expected = theirs()
    except Exception:
        with pytest.raises(RequestError):
            ours()
    else:
        assert ours() == expected


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ", ".join(f"{name}={flag}" for name, flag in flags.items()))
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_texts(template: str, conversation: str, flags: dict[str, bool], raw: RawTokenizer) -> None:
    messages, source = CONVERSATIONS[conversation], TEMPLATES[template]
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=source, **SPECIAL)
    tokenizer = Tokenizer(raw, SPECIAL, source)
    if (template, conversation) == ("trimming", "nothing said") and flags == {"continue_final_message": True}:
        # transformers takes the line breaks of the message's header away, as if they were the message's.
        assert tokenizer.render_chat(messages, **flags) == "<s><user>\n\nHi</user>\n<assistant>\n\n"
        return
    for given in ({}, {"tools": [TOOL]}):
        if given and "tools" not in source:  # transformers leaves them out without a word
            with pytest.raises(RequestError):
                tokenizer.render_chat(messages, **flags, **given)
            continue
        assert_same(
            lambda given=given: reference.apply_chat_template(messages, tokenize=False, **flags, **given),  # type: ignore[misc]
            lambda given=given: tokenizer.render_chat(messages, **flags, **given),  # type: ignore[misc]
        )


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": f"{name} of the settings"} for name in names]


@pytest.mark.parametrize(
    ("stored", "files"),
    [
        ("the settings", []),
        (named("default"), []),
        (named("default", "tool_use"), []),
        (named("rag", "tool_use", "default"), []),
        ("the settings", ["chat_template.jinja"]),
        (named("default", "tool_use"), ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]),
        (None, ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]),
        (None, ["chat_template.jinja", "additional_chat_templates/rag.jinja"]),
    ],
)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["without tools", "with tools"])
def test_the_choice_of_a_named_template(
    stored: Any, files: list[str], tools: Any, raw: RawTokenizer, tmp_path: Path
) -> None:
    raw.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    settings |= {} if stored is None else {"chat_template": stored}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "additional_chat_templates").mkdir()
    for name in files:
        (tmp_path / name).write_text(f"{name} as a file")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    given = {} if tools is None else {"tools": tools}
    assert tokenizer.render_chat([USER], **given) == reference.apply_chat_template([USER], tokenize=False, **given)
