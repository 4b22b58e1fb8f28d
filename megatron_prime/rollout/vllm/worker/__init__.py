"""vLLM's side: runs in engine processes and in vLLM's workers, and imports no Megatron.

- `fork_server`: imports vLLM once and forks engine processes (``python -m``).
- `engine_loop`: builds an engine and does what the trainer says.
- `transfer`: vLLM's weight-transfer back-ends, and the methods that its workers get in addition.
- `check_weights`: what a worker really holds, compared with what the trainer has.
- `regions`: which regions of Hugging Face tensors a worker's parameters are made of.
- `placement`: parameters that stay in the memory that the trainer writes.
"""
