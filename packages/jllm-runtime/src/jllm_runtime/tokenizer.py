"""Tokenizer: texts to token ids and back, by the files that the model was published with."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from jllm_runtime.errors import ModelError, check_text

if TYPE_CHECKING:
    from jllm_runtime.detokenizer import Detokenizer, TokenDecoder


class ChatPrompt(list[int]):
    """Token ids of a conversation, up to where the assistant's message begins: the answer is a text of its own.

    What follows other ids goes on with their text, and keeps the space of its first token.
    """


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_ids: ids of the EOS tokens by tokenizer_config.json; a model may have further ones.
        templates: the chat templates; without sources where the model is not for chats.

    Args:
        raw: of the tokenizers library.
        settings: the fields of tokenizer_config.json.
        chat_template: Jinja source, or several by their names.
    """

    def __init__(
        self, raw: RawTokenizer, settings: Mapping[str, Any], chat_template: str | Mapping[str, str] | None
    ) -> None:
        from jllm_runtime.named_templates import ChatTemplates, named_sources  # of conversations, not of texts

        self._raw = raw
        self._settings = settings
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: self._special_text(name) or "" for name in names}
        self.templates = ChatTemplates(named_sources(chat_template), special)
        self._added = {number: token.content for number, token in raw.get_added_tokens_decoder().items()}
        eos = self._special_text("eos_token")
        eos_id = None if eos is None else raw.token_to_id(eos)
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint, None where it has none.

        Raises:
            ModelError: tokenizer.json or tokenizer_config.json is damaged.
        """
        from jllm_runtime.named_templates import read_sources

        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        settings_path = folder / "tokenizer_config.json"
        try:
            raw = RawTokenizer.from_file(str(path))
            settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
            if not isinstance(settings, dict):
                raise ValueError(f"{settings_path.name} must be a JSON object, got {type(settings).__name__}")
            templates = read_sources(folder, settings)
        except Exception as error:  # tokenizers raises bare Exception for all damage
            raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
        # A stored truncation or padding is a setting of the training, and would silently change prompts.
        raw.no_truncation()
        raw.no_padding()
        return cls(raw, settings, templates)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._raw.get_vocab_size())

    def to_json(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``."""
        return str(self._raw.to_str())

    def files(self) -> dict[str, str]:
        """The texts of the files that ``from_folder`` reads, by their names."""
        settings, sources = dict(self._settings), self.templates.sources
        # Several go into a list there: their names are a publisher's, and as names of files could lead anywhere.
        if sources.keys() - {"default"}:
            settings["chat_template"] = [{"name": name, "template": text} for name, text in sources.items()]
        texts = {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
        return {**texts, "chat_template.jinja": sources["default"]} if "default" in sources else texts

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with ``add_special_tokens``, those that the model wants around it (such as BOS), too.

        Raises:
            RequestError: the text has half of a surrogate pair, so it is no Unicode.
        """
        return list(self.encoding(text, add_special_tokens).ids)

    def encoding(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """As ``encode``, with the token's places in the text."""
        check_text(text, "the text")
        return self._raw.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        detokenizer = self.detokenizer(hidden=None if skip_special_tokens else ())
        return "".join([*map(detokenizer.add, token_ids), detokenizer.finish()])

    @property
    def chat_template(self) -> str | None:
        """Source of the template for conversations without tools; None where the model is not for chats."""
        return self.templates.choose()

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation, up to where the assistant's message begins.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and so on.
            variables: more variables of the template, such as ``enable_thinking=False`` and ``tools=[...]``, with
                which the template for tools is taken. With ``continue_final_message=True`` the text ends with the last
                message's content, so that the answer goes on from it.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages or does not read a variable.
        """
        continued = bool(variables.get("continue_final_message"))
        return self.encode_rendered(self.render_chat(messages, **variables), continued)

    def encode_rendered(self, text: str, continued: bool = False) -> list[int]:
        """Token ids of what ``render_chat`` returned; with ``continued``, of a text that the answer goes on from."""
        # The template writes all special tokens itself; BOS would come twice.
        return (list if continued else ChatPrompt)(self.encode(text, add_special_tokens=False))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text that ``encode_chat`` encodes; arguments and errors are the same."""
        return self.templates.render(messages, **variables)

    def check_variables(self, names: Iterable[str]) -> None:
        """Refuse variables that the chat template does not read, which would have no effect.

        Raises:
            RequestError: there is one.
        """
        self.templates.check_variables(names)

    def thinks(self, **variables: Any) -> bool:
        """Whether the model may think before it answers, with these variables of the chat template."""
        return self.templates.thinks(**variables)

    def chat_variables(self) -> frozenset[str]:
        """Names of the variables that the chat template reads, ``messages`` included; none without a template."""
        return self.templates.variables()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, in UTF-8, which may be a part of a character.

        Of an added token, its name; of an id without a token, nothing.
        """
        return self._decoder.token_bytes(token_id)

    def token_id(self, name: str) -> int | None:
        """The id of the token with this name, None where there is none."""
        number: int | None = self._raw.token_to_id(name)
        return number

    def is_added(self, text: str) -> bool:
        """Whether a text is a token that was added to the vocabulary, such as ``<think>``."""
        return text in self._added.values()

    def special_stops(self, stops: Iterable[str]) -> dict[int, list[str]]:
        """The first special token, which decoded text leaves out, of each stop that has one; with what is before it."""
        special = [(self._added[number], number) for number in self._decoder.special_ids]
        found: dict[int, list[str]] = {}
        for stop in stops:
            places = [(stop.find(text), -len(text), number) for text, number in special if text in stop]
            if places:
                at, _, number = min(places)
                found.setdefault(number, []).append(stop[:at])
        return found

    def detokenizer(self, behind: Sequence[int] = (), hidden: Collection[int] | None = None) -> "Detokenizer":
        """A detokenizer for a new text, or for one that goes on ``behind`` other tokens.

        Args:
            behind: theirs.
            hidden: special tokens that the text leaves out; all of them when None.
        """
        from jllm_runtime.detokenizer import Detokenizer

        return Detokenizer(self._decoder, behind, hidden)

    @cached_property
    def _decoder(self) -> "TokenDecoder":
        from jllm_runtime.detokenizer import TokenDecoder

        return TokenDecoder(self._raw)

    def _special_text(self, name: str) -> str | None:
        value = self._settings.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        return value if isinstance(value, str) else None
