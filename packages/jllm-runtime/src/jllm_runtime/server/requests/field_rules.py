"""Field rules: the fields of other servers and clients that are ignored, renamed, or refused with what to do instead.

The fields that are honoured are those of ``schemas``. A field that is in neither place is refused: nobody knows whether
it matters. ``docs/request-fields.md`` has the same tables for readers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jllm_runtime.sampling import PENALTIES


@dataclass(frozen=True)
class Only:
    """A field that is ignored at some values, because they ask for what happens anyway, and refused at all others.

    Attributes:
        values: those values; none for a field that is always refused.
        instead: what to do, for the error.
        matters_with: sampling parameters; where all of them are off, it changes nothing, whatever its value.
        stands_for: values that are taken, too, since other fields say the same, with those fields.
    """

    values: tuple[Any, ...]
    instead: str
    matters_with: tuple[str, ...] = ()
    stands_for: tuple[tuple[Any, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class FieldRules:
    """The rules of one object of a request.

    Attributes:
        ignored: fields that change nothing at any value, by the reason.
        only: fields that change nothing at some values.
        renamed: other names of honoured fields.
        renamed_texts: those names that mean another field where their value is a text.
    """

    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only: Mapping[str, Only] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    renamed_texts: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, more: "FieldRules") -> "FieldRules":
        return FieldRules(
            {**self.ignored, **more.ignored},
            {**self.only, **more.only},
            {**self.renamed, **more.renamed},
            {**self.renamed_texts, **more.renamed_texts},
        )

    def is_ignored(self, name: str) -> bool:
        """Whether a field changes nothing at any value."""
        return any(name in names for names in self.ignored.values())


_ADAPTER = "merge the adapter into the model: jllm-convert convert SRC DST --adapter DIR"

EVERY_REQUEST = FieldRules(
    ignored={
        "They say who asks, and are notes for the caller's own logs.": (
            *("user", "safety_identifier", "metadata", "request_id", "rid", "session_id", "conversation_id", "chat_id"),
            *("litellm_call_id", "litellm_metadata", "litellm_session_id", "litellm_trace_id", "additional_data"),
        ),
        "They are settings of a client library, which it should not have sent.": (
            *("timeout", "num_retries", "max_retries", "drop_params", "additional_drop_params", "caching", "cache"),
            "allowed_openai_params",
        ),
        "They are about when and where a request is computed.": (
            *("service_tier", "priority", "keep_alive", "prompt_cache_key", "prompt_cache_retention", "routed_dp_rank"),
            "data_parallel_rank",
        ),
        "The server has read the model already, with its own settings.": (
            *("num_batch", "num_thread", "num_gpu", "main_gpu", "low_vram", "f16_kv", "use_mmap", "use_mlock", "numa"),
        ),
        "The context is the server's: what is too long for it is refused, and never cut.": (
            *("num_ctx", "num_keep", "n_keep", "n_discard", "truncation_side"),
        ),
        "They are about images, sounds and films, of which a request has none.": (
            *("mm_processor_kwargs", "media_io_kwargs", "return_mm_kwargs"),
        ),
    },
    only={
        "store": Only((False,), "nothing is stored here, so that nothing could be retrieved later; leave it out"),
        "options": Only(({},), "give its members beside model, as in OpenAI's API"),
    },
)

GENERATION = EVERY_REQUEST | FieldRules(
    ignored={
        "They make an answer come sooner elsewhere, and do not change it.": (
            *("prediction", "cache_prompt", "id_slot", "n_cache_reuse", "backend_sampling"),
        ),
        "They add numbers to a response, or change the size of its parts.": (
            *("timings_per_token", "return_progress", "verbose", "sse_ping_interval", "stream_interval"),
        ),
        "They belong to a sampler or a search that is refused unless it is off.": (
            *("length_penalty", "early_stopping", "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length"),
            *("dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "adaptive_decay"),
            "routed_experts_prompt_start",
        ),
        "They choose among libraries that a server may have; here there is one.": ("guided_decoding_backend",),
    },
    only={
        "best_of": Only((1,), "ask for n answers, with logprobs, and choose among them"),
        "use_beam_search": Only((False,), "there is no beam search; leave it out"),
        "num_beams": Only((1,), "there is no beam search; leave it out"),
        "repeat_penalty": Only(
            (),
            "use repetition_penalty, which looks at the whole prompt and output",
            # The publisher's penalty may be on.
            stands_for=((1, {"repetition_penalty": 1}),),
        ),
        "repeat_last_n": Only(
            (-1,),
            "penalties look at the whole text; leave it out",
            matters_with=PENALTIES,
            stands_for=((0, {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}),),
        ),
        "no_repeat_ngram_size": Only((0,), "use repetition_penalty or frequency_penalty"),
        "encoder_repetition_penalty": Only((1,), "use repetition_penalty"),
        "mirostat": Only((0,), "use temperature, top_k, top_p and min_p"),
        "mirostat_mode": Only((0,), "use temperature, top_k, top_p and min_p"),
        "dry_multiplier": Only((0,), "use repetition_penalty or frequency_penalty"),
        "xtc_probability": Only((0,), "use temperature, top_k, top_p and min_p"),
        "dynatemp_range": Only((0,), "use temperature"),
        "typical_p": Only((1,), "use top_p or min_p"),
        "tfs_z": Only((1,), "use top_p or min_p"),
        "top_a": Only((0,), "use min_p"),
        "top_n_sigma": Only((-1, 0), "use min_p"),
        "adaptive_target": Only((-1,), "use temperature"),
        "smoothing_factor": Only((0,), "use temperature"),
        "temperature_last": Only(
            (False,), "the filters work in the order temperature, top_k, top_p, min_p; leave it out"
        ),
        "penalty_alpha": Only((0,), "there is no contrastive search; leave it out"),
        "guidance_scale": Only((1,), "there is no guidance by a second prompt; leave it out"),
        "negative_prompt": Only(("",), "there is no guidance by a second prompt; leave it out"),
        "ban_eos_token": Only((False,), "use ignore_eos"),
        "format": Only(("",), "use response_format of a chat, or guided_json"),
        "epsilon_cutoff": Only((0,), "use min_p"),
        "eta_cutoff": Only((0,), "use min_p"),
        "min_keep": Only((0, 1), "one token is always kept; leave it out", ("top_p", "min_p")),
        "samplers": Only((), "the filters work in the order temperature, top_k, top_p, min_p; leave it out"),
        "n_indent": Only((0,), "use a grammar"),
        "t_max_predict_ms": Only((-1, 0), "use max_tokens"),
        "n_probs": Only((0,), "use logprobs"),
        "top_n_tokens": Only((0,), "use logprobs"),
        "post_sampling_probs": Only((False,), "log-probabilities are the model's own; leave it out"),
        "prompt_logprobs": Only((), "use echo and logprobs of /v1/completions"),
        "logprob_token_ids": Only((), "use logprobs"),
        "details": Only((False,), "use logprobs"),
        "decoder_input_details": Only((False,), "use echo and logprobs of /v1/completions"),
        "return_full_text": Only((False,), "use echo of /v1/completions"),
        "return_tokens": Only((False,), "use logprobs, or POST /tokenize"),
        "return_token_ids": Only((False,), "use logprobs, or POST /tokenize"),
        "return_tokens_as_token_ids": Only((False,), "use logprobs, or POST /tokenize"),
        "return_token_offsets": Only((False,), "use logprobs of /v1/completions"),
        "return_prompt_text": Only((False,), "use POST /tokenize"),
        "return_hidden_states": Only((False,), "use Model.inspect of the library"),
        "return_routed_experts": Only((False,), "use Model.inspect of the library"),
        "response_fields": Only(([],), "a response has all of its fields; leave it out"),
        "include_stop_str_in_output": Only((False,), "add the stop to the text where finish_reason is stop"),
        "no_stop_trim": Only((False,), "add the stop to the text where finish_reason is stop"),
        "spaces_between_special_tokens": Only(
            (True,), "special tokens are shown as the tokenizer decodes them; leave it out", ("skip_special_tokens",)
        ),
        "truncate_prompt_tokens": Only((-1,), "shorten the prompt; POST /tokenize counts its tokens"),
        "truncate": Only((), "shorten the prompt; POST /tokenize counts its tokens"),
        "allowed_token_ids": Only(([],), "use choice, regex or grammar"),
        "bad_words": Only(([],), "use logit_bias, or a grammar"),
        "logits_processors": Only(([],), "use logit_bias, or a grammar"),
        "custom_logit_processor": Only((), "use logit_bias, or a grammar"),
        "grammar_lazy": Only((False,), "use tools, whose calls are free text before and beside them"),
        "structural_tag": Only((), "use tools, or grammar"),
        "guided_whitespace_pattern": Only((), "JSON is written on one line; leave it out"),
        "repetition_detection": Only((), "use repetition_penalty"),
        "thinking_token_budget": Only((-1,), "use max_tokens, or turn thinking off with enable_thinking"),
        "thinking_budget": Only((-1,), "use max_tokens, or turn thinking off with enable_thinking"),
        "cache_salt": Only((), "all requests share the prefix cache; run a server for each group of users"),
        "kv_transfer_params": Only((), "one server computes prompt and output; leave it out"),
        "ec_transfer_params": Only((), "one server computes prompt and output; leave it out"),
        "lora": Only(([],), _ADAPTER),
        "lora_path": Only((), _ADAPTER),
        "adapter_id": Only((), _ADAPTER),
        "vllm_xargs": Only(({},), "leave it out"),
        "custom_params": Only(({},), "leave it out"),
        "watermark": Only((False,), "answers have no watermark; leave it out"),
        "watermarking": Only((False,), "answers have no watermark; leave it out"),
        "image_data": Only(([],), "the model reads text only"),
    },
    renamed={
        "n_predict": "max_tokens",
        "num_predict": "max_tokens",
        "max_new_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "stop_sequences": "stop",
        "n_cmpl": "n",
        "random_seed": "seed",
        "json_schema": "guided_json",
        "ebnf": "grammar",
    },
)

CHAT = GENERATION | FieldRules(
    ignored={"They say how thoughts come out of a stream; here they come as they are made.": ("stream_reasoning",)},
    only={
        "functions": Only(([],), "use tools"),
        "function_call": Only(("none", "auto"), "use tool_choice, with tools"),
        "audio": Only((), "the model reads and writes text only"),
        "web_search_options": Only((), "the server does not search the web; give the model a tool that does"),
        "enable_search": Only((False,), "the server does not search the web; give the model a tool that does"),
        "verbosity": Only(("medium",), "say in a message how long the answer should be"),
        "tool_prompt": Only((), "put it into a message"),
        "guideline": Only((), "put it into a message"),
        "system": Only((), "put it into messages, with the role system"),
        "documents": Only(([],), "put them into a message"),
        "safe_prompt": Only((False,), "put the instructions into a message"),
        "chat_template": Only((), "a request cannot bring its template; convert the model with the right one"),
        "add_special_tokens": Only((False,), "the chat template writes the special tokens"),
        "echo": Only((False,), "put the last message before the answer"),
        "include_reasoning": Only((True,), "leave reasoning_content of the answer out"),
        "separate_reasoning": Only((True,), "put reasoning_content and content together"),
        "reasoning_format": Only(("auto", "deepseek", "parsed"), "put reasoning_content and content together"),
        "thinking_forced_open": Only((False,), "the chat template says whether the answer begins with thoughts"),
        "parse_tool_calls": Only((True,), "leave tools out, or use /v1/completions"),
    },
    renamed={"think": "enable_thinking"},
    renamed_texts={"think": "reasoning_effort"},
)

COMPLETIONS = GENERATION | FieldRules(
    only={
        "add_special_tokens": Only((True,), "give the prompt as token ids, from POST /tokenize"),
        "add_bos_token": Only((True,), "give the prompt as token ids, from POST /tokenize"),
        "response_format": Only(({"type": "text"},), "use guided_json, regex, choice or grammar"),
        "return_full_text": Only((False,), "use echo", stands_for=((True, {"echo": True}),)),
        "prompt_embeds": Only((), "give the prompt as text or token ids"),
    }
)

EMBEDDINGS = EVERY_REQUEST | FieldRules(
    ignored={
        "A text that is too long is refused, not cut.": ("truncate",),
    },
    only={
        "truncate_prompt_tokens": Only((-1,), "shorten the texts; POST /tokenize counts their tokens"),
        "add_special_tokens": Only((True,), "give the texts as token ids, from POST /tokenize"),
        "embd_normalize": Only((), "use normalize", stands_for=((2, {"normalize": True}), (-1, {"normalize": False}))),
        "embed_dtype": Only(("float32",), "use encoding_format"),
        "endianness": Only(("native", "little"), "base64 is of little-endian float32"),
        "input_type": Only((), "put the words that the model expects before each text"),
        "prompt_name": Only((), "put the words that the model expects before each text"),
        "task": Only((), "put the words that the model expects before each text"),
    },
    renamed={"normalize_embeddings": "normalize"},
)

TOKENIZE = EVERY_REQUEST | FieldRules(
    ignored={"The texts of the tokens always come.": ("return_token_strs",)},
    only={
        "with_pieces": Only((False,), "the texts of the tokens are in token_strs; leave it out"),
        "chat_template": CHAT.only["chat_template"],
    },
)

REQUESTS: Mapping[str, FieldRules] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/embeddings": EMBEDDINGS,
    "/tokenize": TOKENIZE,
    "/detokenize": EVERY_REQUEST,
}
"""The rules of each endpoint's body."""

STREAM_OPTIONS = FieldRules(
    ignored={
        "The usage comes at the end, with include_usage.": ("continuous_usage_stats", "chunk_include_usage"),
        "It is a padding against who listens to encrypted lines.": ("include_obfuscation",),
    }
)

TOOL = FieldRules(
    ignored={"They are about the prompt cache of others.": ("cache_control",)},
    only={"defer_loading": Only((False,), "the model is told of all tools; leave out those that it need not know")},
)

REASONING = FieldRules(
    only={
        "exclude": Only((False,), "leave reasoning_content of the answer out"),
        "max_tokens": Only((), "use max_tokens of the request, or turn thinking off"),
        "summary": Only((), "the thoughts come as they are, in reasoning_content"),
    }
)

THINKING = FieldRules(only={"budget_tokens": Only((), "use max_tokens of the request, or turn thinking off")})

STRUCTURED_OUTPUTS = FieldRules(
    ignored={"There is one library for grammars, and it writes JSON on one line.": ("disable_any_whitespace",)},
    only={
        "disable_fallback": Only((False, True), "leave it out"),
        "disable_additional_properties": Only((False,), "say additionalProperties: false in the schema"),
        "whitespace_pattern": Only((), "JSON is written on one line; leave it out"),
        "structural_tag": Only((), "use tools, or grammar"),
    },
)

INNER: Mapping[str, FieldRules] = {
    "stream_options": STREAM_OPTIONS,
    "structured_outputs": STRUCTURED_OUTPUTS,
    "reasoning": REASONING,
    "thinking": THINKING,
}
"""The rules of objects inside of a body, by their field; those of tools are ``TOOL``."""
