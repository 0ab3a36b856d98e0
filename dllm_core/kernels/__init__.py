"""Numerics that decide speed and memory: one package per operation, `reference.py` is the CPU path and the oracle."""
