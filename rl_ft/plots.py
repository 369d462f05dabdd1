"""The report's pictures: inline SVG whose text and lines follow the page's light or dark theme.

Every policy has one colour and one name everywhere. Figures are small, one fact each, so that a
page can flow them on a phone. No global matplotlib state is touched; nothing is read or written.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders that `_svg` turns into CSS variables: SVG inside a page inherits them.
INK, MUTED, GRID = "#010203", "#040506", "#070809"
_THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}

_COLOURS = {
    "fixed": "#8b93a1",
    "random": "#b4bac4",
    "actuated": "#6f7f8f",
    "max_pressure": "#d98a00",
    "max_wave": "#c2542f",
    "max_wave_extended": "#8f3b5c",
    "lookahead": "#2f9e6e",
    "sft:max_pressure": "#86b4ee",
    "grpo:max_pressure": "#2f6fde",
    "sft:lookahead": "#c9a3ea",
    "grpo:lookahead": "#8a45d0",
    "sft:given": "#8fc9b4",
    "grpo:given": "#12805c",
}
_OTHERS = ("#1699a8", "#d0518f", "#7c8c2b", "#a0673c")
_NAMES = {
    "fixed": "fixed program",
    "max_pressure": "max-pressure",
    "max_wave": "max-wave",
    "max_wave_extended": "extended max-wave",
    "lookahead": "lookahead",
    "sft:given": "the given model",
    "grpo:given": "GRPO from the given model",
}
_WIDTH_IN = 4.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One policy on one scenario: the mean with its interval, and what every seed gave."""

    policy: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    gridlocks: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A paired difference with its interval, labelled by what it was measured on."""

    label: str
    policy: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A check during training: mean delay over its episodes, and how many locked up."""

    step: int
    delay_s: float
    gridlocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A trial of a sweep: what it was set to, its checks, and the delay that counts, if any."""

    name: str
    settings: Mapping[str, Any]
    checks: tuple[Checked, ...]
    delay_s: float | None
    gridlocks: int
    is_finished: bool


def colour(policy: str) -> str:
    """The policy's colour, readable on white and on near-black."""
    known = _COLOURS.get(policy)
    return known or _OTHERS[sum(policy.encode()) % len(_OTHERS)]


def label(policy: str) -> str:
    """The policy's name as a person says it."""
    if policy in _NAMES:
        return _NAMES[policy]
    kind, _, start = policy.partition(":")
    if start and kind in ("sft", "grpo"):
        return f"{kind.upper()} from {start.replace('_', '-')}"
    return policy.rstrip("/").rsplit("/", 1)[-1].replace("_", "-")


def delay_bars(bars: Sequence[Bar], *, name: str) -> str:
    """Mean delay per policy, whiskers for its interval, a dot per seed; the shorter the better.

    A bar beyond two and a half times the typical one is cut and says its number, so that one
    gridlock does not flatten the rest.
    """
    means = sorted(bar.mean for bar in bars)
    cut = 2.5 * means[(len(means) - 1) // 2]
    shown = max(_reach(bar) for bar in bars if bar.mean <= cut)
    figure, axes = _figure(0.3 * len(bars) + 0.5, width=3.8)
    for y, bar in enumerate(bars):
        is_cut = bar.mean > cut
        axes.barh(
            y, shown if is_cut else bar.mean, height=0.68, color=colour(bar.policy), linewidth=0
        )
        if not is_cut:
            axes.plot(bar.values, [y + 0.2] * len(bar.values), "o", ms=2.4, color=INK, mew=0)
            if bar.low > float("-inf"):
                axes.plot([max(0.0, bar.low), bar.high], [y - 0.1, y - 0.1], color=INK, lw=1.3)
        axes.annotate(
            (f"\N{RIGHTWARDS ARROW} {bar.mean:.0f}" if is_cut else f"{bar.mean:.1f}")
            + (f"  gridlock {bar.gridlocks}x" if bar.gridlocks else ""),
            (shown if is_cut else _reach(bar), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontweight="bold" if bar.gridlocks else "normal",
        )
    axes.set_xlim(0, (1.75 if any(bar.gridlocks for bar in bars) else 1.2) * shown)
    axes.set_yticks(range(len(bars)), [label(bar.policy) for bar in bars])
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_xlabel("mean delay, s per vehicle")
    return _svg(figure, name, f"Mean delay of {len(bars)} policies")


def differences(rows: Sequence[Difference], *, name: str, xlabel: str) -> str:
    """Intervals of paired differences around zero; left of zero is better.

    A row that reaches four times as far as the typical one lies at the edge, as a triangle with
    its number.
    """
    groups = list(dict.fromkeys(row.label for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    reaches = sorted(_far(row) for row in rows)
    limit = 4 * reaches[len(reaches) // 2]
    inside = [row for row in rows if _far(row) <= limit]
    ends = [0.0, *(x for row in inside for x in (row.low, row.mean, row.high) if math.isfinite(x))]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    left, right = min(ends) - margin, max(ends) + margin
    figure, axes = _figure(0.22 * len(groups) * len(policies) + 0.14 * len(groups) + 0.5)
    for row in rows:
        y = groups.index(row.label) + (policies.index(row.policy) - (len(policies) - 1) / 2) * 0.34
        hue = colour(row.policy)
        if math.isfinite(row.low):
            axes.plot([row.low, row.high], [y, y], color=hue, lw=2, solid_capstyle="round")
        if left <= row.mean <= right:
            axes.plot([row.mean], [y], "o", color=hue, ms=5.5, mew=0)
            continue
        side = left if row.mean < 0 else right
        axes.plot([side], [y], "<" if row.mean < 0 else ">", color=hue, ms=7, clip_on=False)
        axes.annotate(
            f"{row.mean:+.0f}".replace("-", "\N{MINUS SIGN}"),
            (side, y),
            xytext=(7 if row.mean < 0 else -7, -9),
            textcoords="offset points",
            ha="left" if row.mean < 0 else "right",
            color=INK,
        )
    axes.axvline(0, color=MUTED, lw=1)
    axes.set_xlim(left, right)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_xlabel(xlabel)
    return _svg(figure, name, f"Differences in delay on {len(groups)} scenarios")


def curve(
    series: Mapping[str, Sequence[tuple[int, float]]],
    *,
    name: str,
    log: bool = False,
    share: bool = False,
) -> str:
    """One metric over steps, a line per policy: measured thin, smoothed thick."""
    figure, axes = _figure(1.75, width=3.6)
    for policy, points in series.items():
        steps, values = [step for step, _ in points], [value for _, value in points]
        hue = colour(policy)
        axes.plot(steps, values, color=hue, lw=0.7, alpha=0.3)
        axes.plot(steps, smooth(values), color=hue, lw=1.8)
    if log:
        axes.set_yscale("log")
    if share:
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.0001])
        axes.set_ylim(max(-0.02, low), min(1 + 0.03 * (1 - low), high))
        axes.yaxis.set_major_formatter(lambda tick, _: f"{round(100 * tick, 3):g} %")
    axes.grid(color=GRID, lw=0.6)
    axes.set_xlabel("optimiser step")
    return _svg(figure, name, f"{name} over optimiser steps")


def check_curve(series: Mapping[str, Sequence[Checked]], *, reference_s: float, name: str) -> str:
    """Delay of every check over steps, a line per policy; max-pressure's delay is a dashed line.

    Checks with a gridlock are crosses, at the upper edge where they would flatten the rest.
    """
    flowing = [c.delay_s for points in series.values() for c in points if not c.gridlocks]
    top = 1.25 * max([reference_s, *flowing])
    figure, axes = _figure(2.3, width=5.2)
    axes.axhline(reference_s, color=colour("max_pressure"), lw=1.4, ls="--")
    for policy, points in series.items():
        hue = colour(policy)
        shown = [min(point.delay_s, top) for point in points]
        axes.plot([point.step for point in points], shown, color=hue, lw=1.4)
        for point, delay_s in zip(points, shown, strict=True):
            axes.plot([point.step], [delay_s], "X" if point.gridlocks else "o", ms=5, color=hue)
    axes.grid(color=GRID, lw=0.6)
    axes.set_xlabel("optimiser step")
    return _svg(figure, name, "Delay of the checks over optimiser steps")


def sweep_picture(trials: Sequence[Tried], *, keys: Sequence[str]) -> bytes:
    """A PNG: delay over steps for every trial, then the delay that counts over each swept key.

    Hollow dots were stopped early, crosses had a gridlock; what is far beyond the others lies at
    the upper edge.
    """
    from matplotlib.figure import Figure

    flowing = sorted(c.delay_s for trial in trials for c in trial.checks if not c.gridlocks)
    everything = sorted(c.delay_s for trial in trials for c in trial.checks)
    typical = (flowing or everything)[len(flowing or everything) // 2]
    top = min(2.5 * typical, max(flowing or everything) * 1.05)
    columns = min(3, 1 + len(keys))
    rows = math.ceil((1 + len(keys)) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained", dpi=130)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    over_steps = next(panels)
    over_steps.set_xlabel("optimiser step")
    over_steps.set_ylabel("delay in the closed loop, s per vehicle")
    for trial in trials:
        steps = [check.step for check in trial.checks]
        delays = [min(check.delay_s, top) for check in trial.checks]
        (line,) = over_steps.plot(steps, delays, lw=1.2, label=trial.name)
        for check, delay_s in zip(trial.checks, delays, strict=True):
            marker = "X" if check.gridlocks else "o"
            over_steps.plot([check.step], [delay_s], marker, ms=4, color=line.get_color())
    if len(trials) <= 12:
        over_steps.legend(title="trial", fontsize=7, title_fontsize=7)
    for key in keys:
        _over_key(next(panels), key, [t for t in trials if t.delay_s is not None], top)
    for panel in panels:
        panel.set_axis_off()
    for panel in figure.axes:
        panel.grid(color="#e3e6ea", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _over_key(axes: Axes, key: str, trials: Sequence[Tried], top: float) -> None:
    values = [trial.settings[key] for trial in trials]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    labels = list(dict.fromkeys(map(str, values)))
    if len(numbers) < len(values):
        axes.set_xticks(range(len(labels)), labels)
    elif numbers and 0 < min(numbers) < max(numbers) / 8:
        axes.set_xscale("log")
    for trial, value in zip(trials, values, strict=True):
        at = value if len(numbers) == len(values) else labels.index(str(value))
        hue = colour("grpo:max_pressure")
        axes.plot(
            [at],
            [min(trial.delay_s or 0.0, top)],
            "X" if trial.gridlocks else "o",
            color=hue,
            mfc=hue if trial.is_finished else "none",
        )
    axes.set_xlabel(key)


def stage_bar(rows: Mapping[str, Mapping[str, float]], *, name: str) -> str:
    """Seconds of a typical step by stage, one stacked bar per policy."""
    stages = list(dict.fromkeys(stage for parts in rows.values() for stage in parts))
    figure, axes = _figure(0.36 * len(rows) + 0.5, width=6.6)
    for y, parts in enumerate(rows.values()):
        left = 0.0
        for stage, seconds in parts.items():
            hue = stage_colour(stages.index(stage))
            axes.barh(y, seconds, left=left, height=0.62, color=hue, linewidth=0)
            if seconds > 0.05 * max(sum(p.values()) for p in rows.values()):
                axes.annotate(
                    f"{seconds:.2g}",
                    (left + seconds / 2, y),
                    ha="center",
                    va="center",
                    color="#ffffff",
                    fontsize=8.5,
                )
            left += seconds
    axes.set_yticks(range(len(rows)), [label(policy) for policy in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_xlabel("seconds of a step (median)")
    return _svg(figure, name, "Time of a step by stage")


def stage_colour(index: int) -> str:
    """The colour of the n-th stage of a step."""
    palette = ("#4d7ea8", "#2f6fde", "#2f9e6e", "#8a45d0", "#d98a00", "#8b93a1")
    return palette[index % len(palette)]


def smooth(values: Sequence[float], *, span: int = 8) -> list[float]:
    """Exponential mean over about `span` values, unbiased at the start."""
    decay, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        out.append(total / weight)
    return out


def _reach(bar: Bar) -> float:
    """How far to the right the bar, its whisker and its dots go."""
    return max(bar.mean, *bar.values, *(x for x in (bar.high,) if math.isfinite(x)))


def _far(row: Difference) -> float:
    """How far from zero the row goes."""
    return max(abs(x) for x in (row.low, row.mean, row.high) if math.isfinite(x))


def _figure(height_in: float, *, width: float = _WIDTH_IN) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "font.size": 8.5,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height_in), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element: themed, with ids of its own, as wide as its place."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for placeholder, variable in _THEME.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
