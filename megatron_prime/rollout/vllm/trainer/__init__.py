"""The trainer's side of vLLM: runs in the trainer's ranks and imports no vLLM.

- `base`: what every arrangement does alike (`VllmEngine`).
- `beside`: an engine process beside each copy of the model, with the weights in shared memory.
- `beside_buckets`: the same with weights that pass through two buckets.
- `process`: starts, asks and ends these processes (`worker.fork_server`, `worker.engine_loop`).
- `weight_writer`: writes the ranks' weights into the memory that an engine reads.
- `remote`: servers on other hosts; `http_client` asks one, `remote_sampling` samples on one, `refit_failures` says
  which of them is to blame for a refit that failed.
- `answers`: between prompts and answers and what an engine takes and gives.
"""
