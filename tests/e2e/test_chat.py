"""The chat as a person has it: on a terminal, with the real model."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from .terminal import ASKS, ENTER, Terminal

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
STORY = "Write a very long story about a dragon and a knight."
PASTE_START, PASTE_END = "\033[200~", "\033[201~"
UP = "\033[A"


@pytest.fixture
def terminal(smollm2_folder, cache_folder):
    made = []

    def start(*options: object, **settings: object) -> Terminal:
        made.append(Terminal("chat", smollm2_folder, *options, cache=cache_folder, **settings))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def saved(terminal: Terminal, path: Path) -> list[dict[str, str]]:
    """The conversation, by ``/save``."""
    terminal.say(f"/save {path}")
    terminal.wait_for(f"in {path})")
    return json.loads(path.read_text(encoding="utf-8"))


def test_chat_remembers_resets_and_survives_ctrl_c(terminal, tmp_path):
    chat = terminal("--max-tokens", 400)
    chat.say("/help")
    chat.wait_for("/reset")
    chat.say(QUESTION)
    chat.wait_for(ANSWER)
    chat.say(STORY)
    chat.wait_for(" the ")
    chat.interrupt()
    chat.wait_for("(stopped)")
    messages = saved(chat, tmp_path / "chat.json")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert " the " in messages[-1]["content"]
    chat.say("/reset")
    chat.wait_for("forgotten")
    chat.say(QUESTION)
    chat.wait_for(ANSWER)
    chat.wait_for(ASKS)
    chat.type("\x04")
    assert chat.close() == 0


def test_what_is_pasted_is_one_message_and_the_history_outlives_the_chat(terminal, cache_folder, tmp_path):
    chat = terminal("--max-tokens", 8)
    chat.wait_for("greedy, at most 8 tokens")
    chat.wait_for(ASKS)
    chat.type(f"{PASTE_START}one\n/reset\ntwo{PASTE_END}{ENTER}")
    chat.wait_for("(cut at 8 tokens; /continue goes on)")
    messages = saved(chat, tmp_path / "first.json")
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one\n/reset\ntwo"]
    chat.say("/exit")
    assert chat.close() == 0
    history = cache_folder / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    chat = terminal("--max-tokens", 8)
    chat.wait_for(ASKS)
    chat.type(3 * UP + ENTER)  # past /exit and /save
    chat.wait_for("(cut at 8 tokens; /continue goes on)")
    messages = saved(chat, tmp_path / "second.json")
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one\n/reset\ntwo"]
    chat.say("/exit")
    assert chat.close() == 0


def test_words_wrap_at_the_width_of_the_terminal(terminal, tmp_path):
    chat = terminal("--max-tokens", 60, columns=30)
    chat.say(STORY)
    shown = chat.wait_for("(cut at 60 tokens").removesuffix("(cut at 60 tokens")
    # That line does not wrap: a terminal cuts it, and it is erased.
    shown = re.sub(r"compiling \d+ programs?.*? \.\.\.", "", shown).strip()
    assert max(map(len, shown.splitlines())) <= 30
    assert len(shown.splitlines()) > 5
    [*_, message] = saved(chat, tmp_path / "story.json")
    assert shown.split() == message["content"].split()
    chat.say("/exit")
    assert chat.close() == 0


def test_an_answer_is_stopped_again_and_again_and_goes_on(terminal, tmp_path):
    """JAX has a callback of the garbage collector, in which Python drops an exception of Ctrl-C."""
    chat = terminal("--max-tokens", 400, "--temperature", 0.7, "--seed", 3)
    chat.say(STORY)
    for command in ("/regenerate", "/continue", "/regenerate", "/continue", None):
        chat.wait_for(" the ")
        chat.interrupt()
        chat.wait_for("(stopped)")
        if command is not None:
            chat.say(command)
    assert "Exception ignored" not in chat.screen
    assert "Traceback" not in chat.screen
    messages = saved(chat, tmp_path / "story.json")
    assert [message["role"] for message in messages] == ["user", "assistant"]
    chat.say("/exit")
    assert chat.close() == 0


def test_ctrl_c_twice_leaves_and_once_does_not(terminal):
    chat = terminal()
    for _ in range(2):
        chat.wait_for(ASKS)
        chat.interrupt()
        chat.wait_for("Ctrl-D or /exit leaves")
        chat.say("/undo")  # what is typed between them makes each of them the first
        chat.wait_for("nothing has been asked yet")
    chat.wait_for(ASKS)
    chat.interrupt()
    chat.wait_for(ASKS)
    chat.interrupt()
    assert chat.close() == 0


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(terminal):
    chat = terminal()
    chat.say("a\udcff")
    chat.wait_for("is not valid text: character 2 is the byte 0xFF")
    chat.say(QUESTION)
    chat.wait_for(ANSWER)
    chat.say("/exit")
    assert chat.close() == 0


def test_compiling_is_said_while_the_first_answer_is_waited_for(smollm2_folder, tmp_path):
    chat = Terminal("chat", smollm2_folder, cache=tmp_path)
    try:
        chat.say(QUESTION)
        chat.wait_for("compiling 1 program, kept for next time ...")
        chat.wait_for(ANSWER)
        chat.say("/exit")
        assert chat.close() == 0
    finally:
        chat.kill()


def test_a_terminal_without_escape_sequences_has_plain_lines(terminal, tmp_path):
    chat = terminal(term="dumb")
    chat.wait_for(">>> ")
    for line in ('"""', QUESTION):
        chat.type(f"{line}\n")
        chat.wait_for("... ")
    chat.type('"""\n')
    chat.wait_for(ANSWER)
    chat.wait_for(">>> ")
    chat.type(f"/save {tmp_path / 'chat.json'}\n")
    chat.wait_for("(2 messages in")
    assert json.loads((tmp_path / "chat.json").read_text())[0]["content"] == QUESTION
    chat.wait_for(">>> ")
    chat.type("/exit\n")
    assert chat.close() == 0


def test_a_pipe_needs_no_terminal(smollm2_folder, cache_folder):
    done = subprocess.run(
        [sys.executable, "-m", "jllm_runtime.cli", "chat", str(smollm2_folder)],
        input=f"{QUESTION}\n//help me\n",
        capture_output=True,
        text=True,
        env={**os.environ, "JLLM_CACHE": str(cache_folder)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # Answers alone: nobody is asked.
    assert done.stdout.startswith(f"{ANSWER}\n")
    assert ">>>" not in done.stdout


def test_a_turn_reuses_the_one_before_it(smollm2_folder):
    from jllm_runtime import SamplingParams, load_model
    from jllm_runtime.chat.local import ChatSession

    session = ChatSession(load_model(smollm2_folder), SamplingParams(max_tokens=100))
    list(session.send(STORY))
    # What is known of the next prompt is taken in while nobody waits.
    session._preparing.results(timeout=240)
    before = session.engine.stats()
    list(session.send("And then?"))
    after = session.engine.stats()
    prompt = len(session._newest.prompt_ids)
    reused = after.reused_tokens - before.reused_tokens
    assert prompt > 128
    assert reused >= (prompt - 64) // 64 * 64
    session.close()
