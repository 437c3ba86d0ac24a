"""Chat templates: rendering, the sandbox, and the variables that a template reads."""

import subprocess
import sys
from datetime import datetime
from typing import Any

import pytest
from jllm_runtime import RequestError, Tokenizer
from jllm_runtime.chat_template import find_variables
from tokenizers import Tokenizer as RawTokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def raw(tiny) -> RawTokenizer:
    return RawTokenizer.from_str(tiny.tokenizer._raw.to_str())


def render(raw: RawTokenizer, template: str, messages: list[dict[str, Any]] = HELLO, **variables: Any) -> str:
    settings = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": None}
    return Tokenizer(raw, settings, template).render_chat(messages, **variables)


# ---- What a template can do.


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for n in range(9) %}{% if n == 2 %}{% continue %}{% endif %}{{ n }}{% endfor %}", "01345678"),
        ("{% for n in range(9) %}{{ n }}{% if n == 4 %}{% break %}{% endif %}{% endfor %}", "01234"),
        ("{{ {'a': 'é漢', 'b': [1, true, none]} | tojson }}", '{"a": "é漢", "b": [1, true, null]}'),
        ("{{ '<a href=\"x\">' | tojson }}", '"<a href=\\"x\\">"'),  # Jinja's own filter would escape for HTML
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}", "<|bos|>|<|end|>||"),
        ("{{ add_generation_prompt }}", "True"),
        ("{{ messages[0]['content'] }} {{ messages[0].role }}", "hello user"),
        ("{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("  {% if true %}\nyes\n  {% endif %}\nend", "yes\nend"),  # blocks leave no white space
        ("{{ 'a<b' }}", "a<b"),
        ("{{ 'x'.upper() }}{{ 'a,b'.split(',')[1] }}{{ ' c '.strip() }}", "Xbc"),
        ("{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say('hi') }}", "[hi]"),
        ("{% if tools %}tools{% else %}none{% endif %}", "none"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),  # as transformers passes them
    ],
)
def test_a_template_renders(template: str, text: str, raw: RawTokenizer) -> None:
    assert render(raw, template) == text


def test_a_template_knows_the_date(raw: RawTokenizer) -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    text = render(raw, "{{ strftime_now('%Y-%m-%d') }}")
    assert text in (before, datetime.now().strftime("%Y-%m-%d"))


def test_more_variables_reach_the_template(raw: RawTokenizer) -> None:
    template = "{{ enable_thinking }} {{ add_generation_prompt }}"
    assert render(raw, template, enable_thinking=False, add_generation_prompt=False) == "False False"


def test_what_the_assistant_has_written_may_be_marked(raw: RawTokenizer) -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}{% if m.role == 'user' %}{% continue %}"
        "{% endif %}{% endgeneration %}.{% endfor %}{{ enable_thinking }}"
    )
    messages = [*HELLO, {"role": "assistant", "content": "hi"}]
    assert render(raw, template, messages, enable_thinking=True) == "1hello2hi.True"
    assert Tokenizer(raw, {}, template).chat_variables() == {"messages", "enable_thinking"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ tools }}{{ xml_tools }}", "[1]"),
        (
            "{{ xml_tools }}{{ python_tools }}",
            "[1]",
        ),  # SmolLM3: the calls that its template describes for these are JSON
        ("{{ python_tools }}", "[1]"),
        ("{% set tools = tools or xml_tools %}{{ tools }}", "[1]"),
    ],
)
def test_tools_are_given_under_the_name_that_the_template_reads(template: str, text: str, raw: RawTokenizer) -> None:
    assert render(raw, template, tools=[1]) == text


def test_tools_that_the_template_would_leave_out_are_refused(raw: RawTokenizer) -> None:
    with pytest.raises(RequestError, match="knows no tools"):
        render(raw, "{{ messages[0].content }}", tools=[1])
    assert render(raw, "{{ messages[0].content }}", tools=[]) == render(raw, "{{ messages[0].content }}")


def test_a_variable_that_the_template_does_not_read_is_refused(raw: RawTokenizer) -> None:
    template = "{{ messages[0].content }}{{ enable_thinking }}"
    assert render(raw, template, enable_thinking=False).endswith("False")
    with pytest.raises(RequestError, match="no variable 'enable_thinkng'; it has enable_thinking"):
        render(raw, template, enable_thinkng=False)


def test_tools_that_are_given_by_another_name_stay(raw: RawTokenizer) -> None:
    template = "{{ xml_tools }}{{ python_tools }}"
    assert render(raw, template, tools=[1], xml_tools=[2]) == "[2]"
    assert render(raw, template, tools=[1], python_tools=["def f(): ..."]) == "[1]['def f(): ...']"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_has_the_name_that_templates_read(name: str, raw: RawTokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.content is defined }}{{ m.x is defined }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": None, name: "hm", "x": None}]
    assert render(raw, template, messages) == "hmFalseFalse"
    assert messages == [{"role": "assistant", "content": None, name: "hm", "x": None}]


# ---- Going on with the last message.

CONTINUE = {"continue_final_message": True}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "there is no message"),
        ([{"role": "assistant"}], "must have a text"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}], "no tool calls"),
        ([{"role": "assistant", "content": "left out"}], "leaves the last message out, or changes it .'left out'"),
        ([{"role": "assistant", "content": "shouted"}], "leaves the last message out, or changes it .'shouted'"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(messages: Any, complaint: str, raw: RawTokenizer) -> None:
    template = (
        "{% for m in messages if not 'out' in m.content or 'shout' in m.content %}"
        "{{ m.content | upper if 'shout' in m.content else m.content }}{% endfor %}"
    )
    with pytest.raises(RequestError, match=f"^continue_final_message: .*{complaint}"):
        render(raw, template, messages, **CONTINUE)


def test_to_go_on_excludes_a_new_message(raw: RawTokenizer) -> None:
    messages, template = (
        [*HELLO, {"role": "assistant", "content": "hi"}],
        "{{ messages[-1].content }}{{ add_generation_prompt }}",
    )
    assert render(raw, template, messages, **CONTINUE) == "hi"
    assert render(raw, template, messages, **CONTINUE, add_generation_prompt=False) == "hi"
    with pytest.raises(RequestError, match="exclude each other"):
        render(raw, template, messages, **CONTINUE, add_generation_prompt=True)


# ---- What a template cannot do.


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'].__mro__[1].__subclasses__() }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['Path'] }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('content') }}",
    ],
)
def test_a_template_that_reaches_out_of_the_sandbox_is_refused(template: str, raw: RawTokenizer) -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(RequestError, match="chat template does not take this conversation"):
        render(raw, template, messages)
    assert messages == HELLO


@pytest.mark.parametrize(
    "endless",
    [
        "{{ 9 ** 999999999 }}",
        "{% set x = 9 ** 999999999 %}",
        "{% autoescape 9 ** 999999999 %}{% endautoescape %}",
        "{{ 'x'|center(10 ** 11)|length }}",
    ],
)
def test_a_constant_is_computed_only_where_it_is_rendered(endless: str) -> None:
    """Jinja would compute it to find the variables, which the server does in its own process."""
    code = (
        "import sys; from jllm_runtime.chat_template import find_variables, render\n"
        "print(*find_variables(sys.argv[1])); print(render(sys.argv[1], [], {}))"
    )
    template = f"{{% if messages %}}{endless}{{% endif %}}{{{{ thinking }}}}ok"
    # In a process that can be ended: nothing interrupts such a power.
    ran = subprocess.run([sys.executable, "-c", code, template], capture_output=True, text=True, timeout=60)
    names, text = ran.stdout.splitlines()
    assert {"messages", "thinking"} <= {*names.split()} <= {"messages", "thinking", "x"}
    assert text == "ok"


def test_a_template_that_cannot_be_parsed_has_no_variables() -> None:
    for template in ("{% for %}", f"{{{{ {'9' * 5000} }}}}", "{{ " + "(" * 10_000):
        assert find_variables(template) == frozenset()


def test_a_template_refuses_a_conversation_with_its_own_words(raw: RawTokenizer) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('system first, please') }}{% endif %}"
    with pytest.raises(RequestError, match="system first, please"):
        render(raw, template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",  # wrong syntax
        "{{ messages[7].content }}",
        "{{ messages[0].content.no_such_method() }}",
        "{{ messages[0].content + 1 }}",  # the rest raise errors of Python, not of Jinja
        "{{ 1 / 0 }}",
        "{{ strftime_now(1) }}",
        "{{ range(10**9) | length }}",
        "{% include 'other' %}",
        "{{ raise_exception | tojson }}",
    ],
)
def test_a_template_that_fails_is_refused(template: str, raw: RawTokenizer) -> None:
    with pytest.raises(RequestError, match="chat template does not take this conversation"):
        render(raw, template)


# ---- What a template reads.


def test_the_variables_of_a_template(raw: RawTokenizer) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if thinking is defined %}!{% endif %}"
        "{% set ns = namespace(a=1) %}{{ ns.a }}{{ strftime_now('%Y') }}{{ raise_exception('no') }}"
    )
    assert Tokenizer(raw, {}, template).chat_variables() == {"bos_token", "messages", "thinking"}
    assert Tokenizer(raw, {}, None).chat_variables() == set()
    assert Tokenizer(raw, {}, "{% broken").chat_variables() == set()
