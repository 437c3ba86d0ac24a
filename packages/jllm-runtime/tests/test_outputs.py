"""Outputs: the text of an answer from its tokens, where it ends, and when a stream gives it out."""

import dataclasses
from typing import Any

import pytest
from jllm_runtime import GenerationOutput, Model, Piece, SamplingParams, generate, stream_generate
from jllm_runtime.outputs import OutputStream
from jllm_runtime.programs import contiguous_batch


def answer(model: Model, prompt: str, **fields: object) -> GenerationOutput:
    return generate(model, prompt, SamplingParams(**{"max_tokens": 30, **fields}))[0]


def stream(model: Model, prompt: str, **fields: object) -> list[Piece]:
    return list(stream_generate(model, prompt, SamplingParams(**{"max_tokens": 30, **fields})))


# ---- End of text.


def test_an_end_of_text_token_ends_the_answer(tiny) -> None:
    model = tiny.saying([*b">done", tiny.end], eos_ids=(tiny.end,))
    output = answer(model, ">")
    assert (output.text, output.finish_reason) == ("done", "stop")
    assert output.token_ids == [*b"done", tiny.end]


@pytest.mark.parametrize("count", [1, 4, 5])
def test_every_one_of_several_end_of_text_ids_ends_the_answer(count: int, tiny) -> None:
    eos_ids = (260, 261, 262, 263, 264)[:count]
    for eos_id in eos_ids:
        output = answer(tiny.saying([*b">done", eos_id], eos_ids=eos_ids), ">")
        assert (output.text, output.finish_reason, output.token_ids[-1]) == ("done", "stop", eos_id)


def test_special_tokens_are_shown_where_that_is_wanted(tiny) -> None:
    """Those in the middle; the one that ends the answer is no part of it, as in vLLM."""
    marker = tiny.im_end - 1
    model = tiny.saying([*b">do", marker, *b"ne", tiny.end], eos_ids=(tiny.end,))
    shown = tiny.tokenizer.decode([marker], skip_special_tokens=False)
    assert answer(model, ">").text == "done"
    assert answer(model, ">", skip_special_tokens=False).text == f"do{shown}ne"
    assert "".join(piece.text for piece in stream(model, ">", skip_special_tokens=False)) == f"do{shown}ne"
    with_end = answer(model, ">", skip_special_tokens=False, ignore_eos=True, max_tokens=6).text
    assert with_end == f"do{shown}ne<|end|>"
    ended_by_id = answer(model, ">", skip_special_tokens=False, stop_token_ids=[marker])
    assert (ended_by_id.text, ended_by_id.finish_reason) == ("do", "stop")


def test_an_end_of_text_id_may_be_an_ordinary_token_or_the_first(tiny) -> None:
    output = answer(tiny.saying(">a", eos_ids=(ord("a"),)), ">")
    assert (output.token_ids, output.finish_reason) == ([ord("a")], "stop")


def test_ignore_eos_goes_on(tiny) -> None:
    model = tiny.saying([*b">do", tiny.end, *b"ne"], eos_ids=(tiny.end,))
    output = answer(model, ">", ignore_eos=True, max_tokens=6)
    assert output.token_ids == [*b"do", tiny.end, *b"nee"]
    assert (output.text, output.finish_reason) == ("donee", "length")


def test_ignore_eos_is_each_rows_own(tiny) -> None:
    model = tiny.saying([*b">do", tiny.end, *b"ne"], eos_ids=(tiny.end,))
    params = [SamplingParams(max_tokens=6, ignore_eos=ignore) for ignore in (False, True, False)]
    outputs = generate(model, [">", ">", "d"], params)
    assert [output.text for output in outputs] == ["do", "donee", "o"]
    assert [output.finish_reason for output in outputs] == ["stop", "length", "stop"]


def test_the_last_allowed_token_may_end_the_text(tiny) -> None:
    output = answer(tiny.saying([*b">do", tiny.end], eos_ids=(tiny.end,)), ">", max_tokens=3)
    assert (len(output.token_ids), output.finish_reason) == (3, "stop")


# ---- Stop texts. Each letter of these answers is a token of its own, but for "the".


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("STOP", "hey "),  # spread over four tokens
        ("S", "hey "),
        ("y STOP!", "he"),
        ("h", ""),
        (["P", "TO"], "hey S"),  # the one that is complete first
        (["STOP", "T"], "hey S"),
        (["TOP", "OP", "P"], "hey S"),  # complete at once: the one that begins first
        (["P", "OP", "TOP"], "hey S"),
        (["never", "STOP", "nor this"], "hey "),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(stop: str | list[str], text: str, tiny) -> None:
    output = answer(tiny.saying(">hey STOP!"), ">", stop=stop)
    assert (output.text, output.finish_reason) == (text, "stop")


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|end|>", "hey"),
        ("<|end|>\n", "hey"),  # whatever comes behind the token
        ("<|end|>go on", "hey"),
        ("ey<|end|>", "h"),  # the text before it is no part of the answer,
        (["no<|end|>", "y<|end|>"], "he"),
        ("no<|end|>", "hey"),  # but it ends there in any case
        ("<|end|><|im_end|>", "hey"),
        (["never", "<|end|>", "<|im_end|>"], "hey"),
    ],
)
def test_a_stop_with_a_special_token_ends_the_answer_at_its_id(
    stop: str | list[str], text: str, eos: bool, ignore_eos: bool, tiny
) -> None:
    """The text does not show the token, so the stop is never found there: lm-eval and chat clients send such stops."""
    model = tiny.saying([*b">hey", tiny.end, *b"go n"], eos_ids=(tiny.end,) if eos else ())
    fields = {"stop": stop, "ignore_eos": ignore_eos}
    output = answer(model, ">", **fields)
    assert (output.text, output.finish_reason, output.token_ids) == (text, "stop", [*b"hey", tiny.end])
    pieces = stream(model, ">", **fields)
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].output.token_ids == output.token_ids
    assert generate(model, ">", SamplingParams(max_tokens=30, **fields), lookup=4)[0].text == text


def test_a_special_token_that_no_stop_names_does_not_end_the_answer(tiny) -> None:
    model = tiny.saying([*b">hey", tiny.end, *b"go n", tiny.im_end])
    output = answer(model, ">", stop=["<|im_end|>", "<|end", "|end|>"])
    assert (output.text, output.token_ids[-1]) == ("heygo n", tiny.im_end)


def test_a_special_token_of_a_stop_may_be_spelt_in_ordinary_ones(tiny) -> None:
    model = dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer)
    output = OutputStream(model, ">", SamplingParams(stop="<|end|>"))
    for token in b"a<|end|>":
        assert output.finish_reason is None
        output.accept(token)
    assert (output.take_text(), output.finish_reason) == ("a", "stop")


def test_the_text_before_a_special_token_of_a_stop_is_held_back(tiny) -> None:
    model = tiny.saying([*b">hey", tiny.end, *b"go n", tiny.im_end])
    pieces = stream(model, ">", stop="ey<|im_end|>", max_tokens=8)
    assert (pieces[0].text, "".join(piece.text for piece in pieces)) == ("h", "heygo n")  # it was not the end after all
    seen = ""
    for piece in stream_generate(model, ">", SamplingParams(stop="y<|end|>", max_tokens=8)):
        seen += piece.text
        assert "he".startswith(seen)


def test_the_tokens_of_a_stop_text_are_in_the_ids_and_no_later_ones(tiny) -> None:
    assert answer(tiny.saying(">hey STOP!"), ">", stop="TO").token_ids == list(b"hey STO")


def test_a_stop_text_within_a_token(tiny) -> None:
    model = tiny.saying([*b">a ", 257, *b"n"])
    assert tiny.tokenizer.decode([257]) == "the"
    output = answer(model, ">", stop="h")
    assert (output.text, output.token_ids) == ("a t", [*b"a ", 257])
    output = answer(model, ">", stop=["en", "th"])
    assert output.text == "a "


def test_a_stop_text_of_several_bytes_a_character(tiny) -> None:
    assert answer(tiny.saying(">a漢😀"), ">", stop="😀").text == "a漢"


@pytest.mark.parametrize("stop", ["STEP", "STOP!?", "P!!x", "hey stop"])
def test_what_only_begins_like_a_stop_text_stays(stop: str, tiny) -> None:
    model = tiny.saying([*b">hey STOP!", tiny.end], eos_ids=(tiny.end,))
    output = answer(model, ">", stop=stop)
    assert (output.text, output.finish_reason) == ("hey STOP!", "stop")
    pieces = stream(model, ">", stop=stop)
    assert "".join(piece.text for piece in pieces) == "hey STOP!"


def test_a_begun_stop_text_is_given_out_when_the_answer_ends_by_length(tiny) -> None:
    output = answer(tiny.saying(">hey STOP!"), ">", stop="STOP", max_tokens=7)
    assert (output.text, output.finish_reason) == ("hey STO", "length")


def test_a_stream_holds_back_what_may_begin_a_stop_text(tiny) -> None:
    seen, model = "", tiny.saying(">hey STOP!")
    for piece in stream_generate(model, ">", SamplingParams(stop="STOP", max_tokens=30)):
        seen += piece.text
        assert "hey ".startswith(seen)
    assert seen == "hey "


def test_a_stream_gives_out_what_can_begin_no_stop_text(tiny) -> None:
    """Holding everything back to the end would be no stream."""
    pieces = stream(tiny.saying(">hey STOP!"), ">", stop="STOP")
    assert pieces[0].text == "h"


def test_stop_texts_are_each_rows_own(tiny) -> None:
    params = [SamplingParams(stop=stop, max_tokens=9) for stop in (["y"], [], ["O"])]
    outputs = generate(tiny.saying(">hey STOP!"), [">"] * 3, params)
    assert [output.text for output in outputs] == ["he", "hey STOP!", "hey ST"]
    assert [output.finish_reason for output in outputs] == ["stop", "length", "stop"]


def test_a_row_that_a_stop_text_ended_leaves_the_others_alone(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device learns of it with the next block."""
    model, decode, done = tiny.saying(">hey STOP!"), contiguous_batch.decode, []

    def record(*arguments: Any) -> Any:
        done.append(arguments[4].tolist())
        return decode(*arguments)

    monkeypatch.setattr(contiguous_batch, "decode", record)
    params = [SamplingParams(stop="e", max_tokens=100), SamplingParams(max_tokens=100)]
    ended, other = generate(model, [">", ">"], params)
    assert ended.token_ids == list(b"he")
    assert done[0] == [False, False]
    assert len(done) > 3
    assert done[2:] == [[True, False]] * (len(done) - 2)  # the first call is for its compilation
    assert other.token_ids == answer(model, ">", max_tokens=100).token_ids


# ---- Characters of several tokens.

EMOJI = ">é漢😀z"


def test_characters_only_come_whole(tiny) -> None:
    pieces = stream(tiny.saying(EMOJI), ">", max_tokens=10)
    assert [char for piece in pieces for char in piece.text] == ["é", "漢", "😀", "z"]
    assert [token for piece in pieces for token in piece.token_ids] == list("é漢😀z".encode())


@pytest.mark.parametrize(
    ("max_tokens", "text"), [(1, "\ufffd"), (2, "é"), (4, "é\ufffd"), (5, "é漢"), (8, "é漢\ufffd"), (9, "é漢😀")]
)
def test_a_character_that_the_end_cuts_off_comes_as_decode_gives_it(max_tokens: int, text: str, tiny) -> None:
    output = answer(tiny.saying(EMOJI), ">", max_tokens=max_tokens)
    assert (output.text, len(output.token_ids)) == (text, max_tokens)
    assert output.text == tiny.tokenizer.decode(output.token_ids)
    assert "".join(piece.text for piece in stream(tiny.saying(EMOJI), ">", max_tokens=max_tokens)) == text


@pytest.mark.parametrize("said", [b"a\x80b", b"\xc3(", b"\xef\xbf\xbd!", b"\xf0\x9f\x98", b"\xff"], ids=repr)
def test_bytes_that_are_no_character_come_as_decode_gives_them(said: bytes, tiny) -> None:
    """A true U+FFFD, too, which used to be held back for ever."""
    model = tiny.saying([*b">", *said, tiny.end], eos_ids=(tiny.end,))
    output = answer(model, ">")
    assert output.text == said.decode(errors="replace")
    pieces = stream(model, ">")
    assert "".join(piece.text for piece in pieces) == output.text


def test_a_prompt_may_end_within_a_character(tiny) -> None:
    model = tiny.saying([*">é漢z".encode(), tiny.end], eos_ids=(tiny.end,))
    start = [*">é".encode(), "漢".encode()[0]]
    assert answer(model, start).text == "漢z"
    assert answer(model, start, max_tokens=1).text == "\ufffd"


def test_ids_that_the_tokenizer_does_not_know_have_no_text(tiny) -> None:
    output = answer(tiny.saying([*b">a", 271, *b"b", tiny.end], eos_ids=(tiny.end,)), ">")
    assert (output.text, output.token_ids) == ("ab", [ord("a"), 271, ord("b"), tiny.end])


# ---- Streams.


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_tokens": 1}, {"stop": "OP"}, {"max_tokens": 100}, {"temperature": 1.5, "seed": 4, "max_tokens": 70}],
    ids=str,
)
def test_a_stream_adds_up_to_the_answer(fields: dict[str, object], tiny) -> None:
    model = tiny.saying([*b">hey STOP!", tiny.end], eos_ids=(tiny.end,))
    whole, pieces = answer(model, ">", **fields), stream(model, ">", **fields)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [piece.output is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1].output
    assert last is not None
    assert dataclasses.replace(last, timings=whole.timings) == whole


def test_a_stream_begins_with_the_first_token(tiny) -> None:
    pieces = stream(tiny.saying(">hey STOP!"), ">")
    assert pieces[0].token_ids == [ord("h")]
    assert len(pieces) > 5


def test_a_stream_of_a_full_context_is_one_empty_piece(tiny) -> None:
    [piece] = list(stream_generate(tiny.plain, [1] * tiny.config.context_length))
    assert (piece.text, piece.token_ids) == ("", [])
    assert piece.output is not None
    assert piece.output.finish_reason == "length"


def test_a_stream_may_be_closed_early(tiny) -> None:
    model = tiny.saying(">hey STOP!")
    pieces = stream_generate(model, ">", SamplingParams(max_tokens=200))
    assert next(pieces).text == "h"
    pieces.close()
    assert list(pieces) == []
    assert answer(model, ">", max_tokens=3).text == "hey"


def test_a_stream_that_is_never_read_does_no_work(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jllm_runtime.programs.contiguous_batch.prefill", None)
    stream_generate(tiny.plain, [1]).close()
