"""Observes a run: its folder, metrics and plots."""

from megatron_prime.observe.metrics import RunLog
from megatron_prime.observe.report import draw_plots, final_table, read_metrics, write_summary
from megatron_prime.observe.run_folder import RunFolder

__all__ = ["RunFolder", "RunLog", "draw_plots", "final_table", "read_metrics", "write_summary"]
