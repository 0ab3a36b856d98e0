"""Sequences, batches and the stores of frozen-teacher states and commit orders."""
