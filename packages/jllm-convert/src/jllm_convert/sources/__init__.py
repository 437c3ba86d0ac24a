"""Sources of models: Hugging Face folders, GGUF files, JLLM checkpoints."""
