"""vLLM in a process of its own: the trainer's side never imports vLLM, the engine's side never imports Megatron.

`engine` (the trainer's side) -> `process` (starts and talks to) -> `parent` (imports vLLM once, forks) -> `server`
(one engine) -> `transfer` (vLLM's weight-transfer back-ends) and `verify` (what the engine really holds).
"""
