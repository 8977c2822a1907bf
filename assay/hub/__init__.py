"""Hugging Face and GGUF, in and out: configurations, tensors, parity."""
