"""What is reckoned from a step's figures, and which of them the progress line shows. Pure."""

from __future__ import annotations

from collections.abc import Mapping


def rates(values: Mapping[str, float]) -> dict[str, float]:
    """How much came of a step's wall time, and what of it the learner and the sampler waited."""
    step_s = max(values["time/step_s"], 1e-9)
    found = {"idle/learner_share": values["learner/fetch_s"] / max(values["learner/step_s"], 1e-9)}
    # A step whose rollout another learner had fetched before has no figures of it.
    if "time/sampler_s" in values:
        found["idle/sampler_share"] = max(0.0, 1 - values["time/sampler_s"] / step_s)
        for what in ("sampled_tokens", "branches"):
            found[f"rate/{what}_per_s"] = values[f"rollout/{what}"] / step_s
    return found


def shown(values: Mapping[str, float], check: str) -> dict[str, str]:
    """What the progress line says of a step, the most important first."""
    first = {
        "gain_over_max-pressure": ("reward/gain_over_max_pressure_veh_s", "{:.1f} veh s"),
        "strict": ("format/strict_share", "{:.2f}"),
        "entropy": ("entropy", "{:.3f}"),
    }
    others = {name: f.format(values[key]) for name, (key, f) in first.items() if key in values}
    reward = f"{values.get('reward/mean', float('nan')):.2f}"
    return {"reward": reward, **({"check": check} if check else {}), **others}
