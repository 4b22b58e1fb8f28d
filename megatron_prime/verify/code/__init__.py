"""Python programs against unit tests: extraction, tests, comparison, scores, and the sandbox that runs them.

Everything below `sandbox` and the modules that it needs import the standard library only: they run in worker
processes that must start fast and hold nothing of the trainer.
"""
