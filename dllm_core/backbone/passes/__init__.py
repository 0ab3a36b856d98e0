"""Passes of a decoder for decoding, without gradients.

- `choice`: which pass serves a model, and why.
- `protocol`: what every pass takes and gives.
- `plain`: through transformers' modules; serves every family, and is what the others are compared with.
- `quick`, over `quick_weights`: llama, qwen2 and qwen3 on a CPU.
- `joined`, over `joined_weights`: the same families in few launches, for a GPU or compiled.
- `captured`, of `recording`s: joined passes as CUDA graphs.
- `rotation`: the tables by which both kinds turn heads.
"""
