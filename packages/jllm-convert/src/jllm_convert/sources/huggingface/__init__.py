"""Hugging Face model folders: config.json and safetensors."""
