"""The version of jllm-runtime, read by hatch at build time."""

__version__ = "0.1.0"
