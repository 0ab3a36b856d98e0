"""`python -m steps.tracking ui`: the MLflow browser UI on the local store, one worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from steps.tracking.store import tracking_uri


def ui_command(runs_dir: Path, port: int = 5000) -> tuple[dict[str, str], list[str]]:
    """Return (environment additions, arguments) of a lean local UI: one worker, no job runner."""
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", str(port), "--host", "127.0.0.1"]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return environment, [*command, "--backend-store-uri", tracking_uri(runs_dir)]


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m steps.tracking ui [--port N] [--runs-dir DIR]`."""
    import argparse

    from steps.context import default_runs_dir

    parser = argparse.ArgumentParser(prog="python -m steps.tracking", description="Browse the tracked runs.")
    parser.add_argument("command", choices=["ui"])
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--runs-dir", type=Path, default=default_runs_dir())
    options = parser.parse_args(arguments)
    uri = tracking_uri(options.runs_dir)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        print(f"There is no run to show: {uri.removeprefix('sqlite:///')} does not exist.", file=sys.stderr)
        print("Start one with: python flows/compare_grid.py run", file=sys.stderr)
        return 2
    if not uri.startswith("sqlite:"):
        print(f"MLFLOW_TRACKING_URI is {uri}: open that server in the browser.")
        return 0
    environment, command = ui_command(options.runs_dir, options.port)
    print(f"MLflow on http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    os.execvpe(command[0], command, {**os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main())
