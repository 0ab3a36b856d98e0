"""Blocks that rooms with networks of their own share: attention, feed-forward, Perceiver, DiT, time embedding.

Shape letters: B batch, L positions of the sequence, M positions attended to, P prompt positions, W width, N heads,
H head width. Positions are integers, may be negative (a prompt ends at -1) and may differ between the rows of a batch.
"""
