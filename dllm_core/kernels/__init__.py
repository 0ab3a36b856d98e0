"""Numerics that decide speed and memory: one package per operation.

`reference.py` is plain torch, the CPU path and the oracle; `triton.py` is the same for GPUs, loaded when it is chosen.
"""
