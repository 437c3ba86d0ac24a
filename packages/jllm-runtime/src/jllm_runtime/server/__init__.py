"""The engine over HTTP, in the form of the OpenAI API. Needs the extra ``jllm-runtime[serve]``."""
