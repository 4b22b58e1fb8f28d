"""Contains everything that touches Megatron-Core.

Megatron is imported only inside `cpu.megatron_platform`, so that a process without CUDA sees a
changed torch only while Megatron itself runs.
"""
