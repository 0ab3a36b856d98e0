"""`python -m dllm_core`: see `dllm_core.cli`."""

from __future__ import annotations

import sys

from dllm_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
