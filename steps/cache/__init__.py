"""Content-addressed results of steps: `runs/cache/<kind>/<key>/{manifest.json,payload/}`.

Two runs that would compute the same thing share it. `python -m steps.cache --help` lists, explains and clears entries.
"""

from steps.cache.store import Entry, StepCache

__all__ = ["Entry", "StepCache"]
