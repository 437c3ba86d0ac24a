"""JLLM's cache on disk: ``jllm cache``."""
