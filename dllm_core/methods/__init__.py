"""One room per method. A room is a package `dllm_core/methods/<name>/` with `options.py` and `method.py`."""
