"""Pictures of tokens: what was predicted right, and when each token was committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prediction_strips(strips: dict[str, dict[str, Any]]) -> Figure | None:
    """One strip of tokens per row: given, predicted right, predicted wrong, at one mask ratio."""
    from matplotlib.figure import Figure

    strips = {k: v for k, v in strips.items() if v}
    if not strips:
        return None
    colours = {"given": "#ECECEC", "right": "#009E73", "wrong": "#D55E00"}
    per_line, count = 16, max(len(s["tokens"]) for s in strips.values())
    lines = -(-count // per_line)
    figure = Figure(figsize=(12, 0.5 + len(strips) * (0.3 + 0.24 * lines)), layout="constrained")
    axes_list = figure.subplots(len(strips), squeeze=False)[:, 0]
    for axes, (name, strip) in zip(axes_list, strips.items(), strict=True):
        masked = [s for s in strip["state"] if s != "given"]
        right = sum(s == "right" for s in masked)
        axes.set_title(
            f"{name}: {right} of {len(masked)} masked tokens right at mask ratio {strip['mask_ratio']:g}",
            fontsize=9,
            loc="left",
        )
        for i, (token, state) in enumerate(zip(strip["tokens"], strip["state"], strict=True)):
            column, line = i % per_line, i // per_line
            axes.add_patch(_box(column, -line, colours[state]))
            axes.text(column + 0.5, -line + 0.5, _short(token), ha="center", va="center", fontsize=6)
        axes.set_xlim(0, per_line)
        axes.set_ylim(-lines + 1, 1)
        axes.axis("off")
    return figure


def commit_order(histories: dict[str, dict[str, Any]]) -> Figure | None:
    """Heat map of the denoising step at which each generated token was committed."""
    from matplotlib.figure import Figure

    histories = {k: v for k, v in histories.items() if v and v.get("commit_step")}
    if not histories:
        return None
    per_line = 16
    lines = [-(-len(h["commit_step"]) // per_line) for h in histories.values()]
    figure = Figure(figsize=(12, 0.6 + sum(0.35 + 0.26 * n for n in lines)), layout="constrained")
    axes_list = figure.subplots(len(histories), squeeze=False, height_ratios=lines)[:, 0]
    from matplotlib import colormaps

    palette = colormaps["viridis"]
    for axes, (name, history), n in zip(axes_list, histories.items(), lines, strict=True):
        last = max(history["commit_step"])
        axes.set_title(f"{name}: denoising step of each token, first (dark) to {last} (light)", fontsize=9, loc="left")
        for i, (token, step) in enumerate(zip(history["tokens"], history["commit_step"], strict=True)):
            shade = (step - 1) / max(1, last - 1)
            axes.add_patch(_box(i % per_line, -(i // per_line), palette(shade)))
            axes.text(
                i % per_line + 0.5,
                -(i // per_line) + 0.5,
                _short(token),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if shade < 0.6 else "black",
            )
        axes.set_xlim(0, per_line)
        axes.set_ylim(-n + 1, 1)
        axes.axis("off")
    return figure


def _box(x: float, y: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, facecolor=colour, edgecolor="none")


def _short(token: str, limit: int = 11) -> str:
    text = token.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$").strip() or "·"
    return text if len(text) <= limit else text[: limit - 1] + "…"
