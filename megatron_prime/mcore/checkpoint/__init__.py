"""Checkpoints of a run: which tensors (`state`), written in the background and committed (`checkpointer`), found again
(`resume`)."""
