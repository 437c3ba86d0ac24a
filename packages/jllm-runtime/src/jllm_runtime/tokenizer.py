"""Text to token ids and back, with the publisher's own tokenizer and chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer as RawTokenizer

from jllm_runtime.errors import ModelError, RequestError


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_ids: ids of the tokens that the tokenizer's own settings say end a text.
        chat_template: the Jinja template, or None where the model is not for chats.
    """

    def __init__(self, raw: RawTokenizer, settings: Mapping[str, Any], chat_template: str | None) -> None:
        self._raw = raw
        self._settings = settings
        self.chat_template = chat_template
        self._added = {number: token.content for number, token in raw.get_added_tokens_decoder().items()}
        # A decoder tells what it is nowhere but in its state, which is JSON.
        state = (raw.decoder and raw.decoder.__getstate__()) or b""
        self._byte_letters = _byte_letters() if b'"ByteLevel"' in state else None
        eos = self._special_text("eos_token")
        eos_id = None if eos is None else raw.token_to_id(eos)
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer in a checkpoint, or None where it has none.

        Raises:
            ModelError: its files are damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        settings_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            raw = RawTokenizer.from_file(str(path))
            settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
            if not isinstance(settings, dict):
                raise ValueError(f"{settings_path.name} must be a JSON object, got {type(settings).__name__}")
            template = template_path.read_text(encoding="utf-8") if template_path.is_file() else None
        except Exception as error:  # tokenizers raises bare Exception for every kind of damage
            raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
        # A stored truncation or padding would silently change what a prompt says.
        raw.no_truncation()
        raw.no_padding()
        return cls(raw, settings, template or _default_template(settings.get("chat_template")))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._raw.get_vocab_size())

    def to_json(self) -> str:
        """The tokenizer in the form of ``tokenizer.json``."""
        return str(self._raw.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with ``add_special_tokens`` the ones that the model wants around it (such as BOS)."""
        return list(self._raw.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self._raw.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and so on.
            variables: more variables for the template, such as ``enable_thinking=False``.

        Raises:
            RequestError: the model has no chat template, or the template refuses the messages.
        """
        # The template writes out every special token itself.
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text that ``encode_chat`` encodes.

        The template comes with the model, from strangers, and so runs in Jinja's sandbox.
        """
        if self.chat_template is None:
            raise RequestError("the model has no chat template; give it a raw text (--raw) instead of a conversation")
        special = {
            name: self._special_text(name) or "" for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        try:
            template = _sandbox().from_string(self.chat_template)
            # The variables that transformers always passes, so that `tools is none` means the same here.
            usual = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
            return str(template.render({**usual, **special, **variables}))
        except Exception as error:  # the template is a program: it can fail in every way
            raise RequestError(f"the model's chat template does not take this conversation: {error}") from error

    def chat_variables(self) -> frozenset[str]:
        """The variables that the chat template reads, those included that every template has; none without one."""
        if self.chat_template is None:
            return frozenset()
        from jinja2 import TemplateError
        from jinja2.meta import find_undeclared_variables

        environment = _sandbox()
        try:
            found = find_undeclared_variables(environment.parse(self.chat_template))
        except TemplateError:  # told to whoever renders it
            return frozenset()
        return frozenset(found - environment.globals.keys())

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, in UTF-8, of which it may hold a part of a character; a special token's name.

        Nothing for an id that is no token.
        """
        token = self._raw.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if self._byte_letters is not None:
            return b"".join(self._byte_letters.get(letter, letter.encode()) for letter in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def is_added(self, text: str) -> bool:
        """Whether a text is a token of its own that was added to the vocabulary, such as a mark around thoughts."""
        return text in self._added.values()

    def is_special(self, text: str) -> bool:
        """Whether a text is one of the special tokens, which never show in decoded text."""
        return any(token.special and token.content == text for token in self._raw.get_added_tokens_decoder().values())

    def detokenizer(self) -> "Detokenizer":
        """A new text that token ids are added to one by one."""
        return Detokenizer(self._raw)

    def _special_text(self, name: str) -> str | None:
        value = self._settings.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        return value if isinstance(value, str) else None


class Detokenizer:
    """Token ids to text as they come: a character is given out when all of its bytes are there, never in parts."""

    # As DecodeStream of tokenizers, which raises an error when bytes that looked like a character turn out to be none.

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw
        # The tokens whose text was given out last (how a token reads may depend on the one before it), then newer ones.
        self._ids: list[int] = []
        self._given_ids = 0
        self._given = ""

    def add(self, token_id: int) -> str:
        """The text that this token completes, often empty."""
        self._ids.append(token_id)
        text = self._text()
        if len(text) <= len(self._given) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = text[len(self._given) :]
        self._ids = self._ids[self._given_ids :]
        self._given_ids, self._given = len(self._ids), self._text()
        return new

    def _text(self) -> str:
        return str(self._raw.decode(self._ids, skip_special_tokens=True))


def _byte_letters() -> dict[str, bytes]:
    """The byte that each letter stands for in a byte-level vocabulary: the letter itself where it can be seen."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes([byte]) for byte in visible} | {
        chr(256 + number): bytes([byte]) for number, byte in enumerate(others)
    }


def _default_template(stored: Any) -> str | None:
    """The template of tokenizer_config.json: a text, or a list of named ones of which "default" is for chats."""
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, Mapping)}
        stored = named.get("default")
    return stored if isinstance(stored, str) else None


def _sandbox() -> Any:
    """The environment that chat templates are written for (transformers' ``apply_chat_template``), in a sandbox."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        from jinja2 import TemplateError

        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
