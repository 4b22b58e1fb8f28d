"""The shape of a model, for checks that need one."""

from types import SimpleNamespace

SHAPE = SimpleNamespace(
    experts=None,
    num_layers=6,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    ffn_hidden_size=96,
    max_position_embeddings=2048,
    vocab_size=128,
)
