"""The comparison grid: one autoregressive model in, one row per method and seed out, measured side by side.

python flows/compare_grid.py run                          the laptop preset, all rows
python flows/compare_grid.py run --preset smoke           needs no weights, under two minutes
python flows/compare_grid.py run --dry-run                settings, estimates, and nothing else
python flows/compare_grid.py resume                       go on after a failure: only what failed runs again
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0:0] = [p for p in (str(Path(__file__).resolve().parents[1]),) if p not in sys.path]

from flows import launcher

sys.argv[1:] = launcher.prepare_environment(sys.argv[1:])

from metaflow import FlowSpec, Parameter, card, catch, current, step
from metaflow.exception import MetaflowException

from steps import grid
from steps.failures import RowFailed, leave_closing


class CellFailed(MetaflowException):
    """A failure that has already been explained in full: Metaflow prints one line of it and no traceback."""

    headline = "The grid stopped"


class CompareGrid(FlowSpec):
    """Convert one autoregressive model by several methods and compare quality, speed and cost.

    Failures are recorded first and raised later (`repair`), so that every row gets its chance and a plain `resume`
    runs again only what failed. Every expensive step is cached across runs: see `python -m steps.cache`.
    """

    preset = Parameter("preset", default="laptop", help="File in params/presets (smoke, gpu_small ...) or a path.")
    cells = Parameter("cells", default=None, help="Rows of the table: a,b,c. Default: the preset's.")
    set = Parameter("set", default=None, help="Single settings: train.lr=1e-4,eval.nelbo_samples=64.")
    model = Parameter("model", default=None, help="Directory, hub name or embedded:NAME of the model that goes in.")
    data = Parameter("data", default=None, help="Text, JSONL or Parquet file, directory, or hf:NAME.")
    seeds = Parameter("seeds", default=None, help="0,1,2: every cell is trained once a seed.")
    no_cache = Parameter("no-cache", default=False, is_flag=True, help="Compute everything anew.")
    dry_run = Parameter("dry-run", default=False, is_flag=True, help="Print settings and estimates, then stop.")
    settings = Parameter("settings", default="", hidden=True, help="The resolved settings (written by the launcher).")
    command_line = Parameter("command-line", default="", hidden=True, help="What was typed (written by the launcher).")

    @step
    def start(self):
        """Open the record of the run: database, experiment, parent run. Settings were checked before Metaflow began."""
        self.run = grid.open_run(current.run_id, self.settings, use_cache=not self.no_cache, command=self.command_line)
        self.next(self.prepare_data)

    @step
    def prepare_data(self):
        """Convert the model; tokenise, cut and split the text."""
        self.shared = explained(grid.prepare, self.run)
        self.next(self.cache_anchors)

    @step
    def cache_anchors(self):
        """Store the frozen teacher's hidden states that the rows read, once for all rows."""
        self.shared = explained(grid.prepare_anchors, self.run, self.shared)
        self.next(self.extract_trajectories)

    @step
    def extract_trajectories(self):
        """Store commit orders; a failure here fails only the rows that need them."""
        self.shared = explained(grid.prepare_trajectories, self.run, self.shared)
        self.row_ids = self.run.training_order(self.shared.model.num_layers)
        self.next(self.train_and_evaluate, foreach="row_ids")

    @card(type="blank", refresh_interval=20)
    @catch(var="crash", print_exception=False)
    @step
    def train_and_evaluate(self):
        """Train and evaluate one row; a failure is recorded, not raised, so that it costs the other rows nothing."""
        self.outcome = grid.attempt(self.run, self.shared, self.input, tags=task_tags(), listeners=[curve(self.input)])
        self.next(self.collect)

    @step
    def collect(self, inputs):
        """Gather what became of the rows; a task that was killed left nothing, so the index tells which it was."""
        self.run, self.shared, self.row_ids = inputs[0].run, inputs[0].shared, inputs[0].row_ids
        found = {i.index: getattr(i, "outcome", None) for i in inputs}
        self.outcomes = grid.collect(self.run, self.row_ids, found)
        self.next(self.triage)

    @step
    def triage(self):
        """Send failed rows to repair."""
        self.failed = grid.failed_rows(self.row_ids, self.outcomes)
        self.route = "repair" if self.failed else "benchmark"
        self.next({"repair": self.fan_repair, "benchmark": self.benchmark}, condition="route")

    @step
    def fan_repair(self):
        """Fan out over the failed rows."""
        self.next(self.repair, foreach="failed")

    @card(type="blank", refresh_interval=20)
    @step
    def repair(self):
        """Try a failed row again and raise its real error; `resume` comes back to exactly this task."""
        self.outcome = explained(
            grid.repair, self.run, self.shared, self.input, tags=task_tags(), listeners=[curve(self.input)]
        )
        self.next(self.merge)

    @step
    def merge(self, inputs):
        """Put the repaired rows in the place of the failed ones."""
        self.run, self.shared = inputs[0].run, inputs[0].shared
        self.outcomes = grid.merge(inputs[0].outcomes, [i.outcome for i in inputs])
        self.next(self.benchmark)

    @step
    def benchmark(self):
        """Measure decoding speed of all rows in one process, interleaved, so that machine noise hits all alike."""
        self.bench = explained(grid.benchmark, self.run, self.shared, self.outcomes)
        self.next(self.report)

    @card(type="blank")
    @step
    def report(self):
        """Write table, figures and results.json; close the record."""
        from flows.cards import show_report

        self.result = explained(grid.report, self.run, self.shared, self.outcomes, self.bench)
        show_report(self.result.markdown_path, self.result.figures)
        self.next(self.end)

    @step
    def end(self):
        """Say where everything is and what to do next."""
        leave_closing(grid.closing_lines(self.run, self.result))


def explained(work, *arguments, **options):
    """Call a function of steps/; a failure that was already explained ends the task without a traceback."""
    try:
        return work(*arguments, **options)
    except RowFailed as failed:
        raise CellFailed(str(failed)) from None


def curve(row_id):
    """Return a listener that draws the row's loss on the task's card."""
    from flows.cards import LossCurve

    return LossCurve(row_id)


def task_tags():
    """Return the tags that lead from a tracked run back to its Metaflow task."""
    return {"metaflow.run": current.run_id, "metaflow.step": current.step_name, "metaflow.task": current.task_id}


if __name__ == "__main__":
    sys.exit(launcher.main(CompareGrid))
