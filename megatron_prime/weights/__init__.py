"""Hugging Face weights <-> Megatron shards: one table per model family, and everything derived from it."""
