"""Evaluation of a model on a text: jllm eval."""
