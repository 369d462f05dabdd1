"""Weights and groups of which only the version counts.

Shared by the tests of admission, buffer and lineage.
"""

from __future__ import annotations

from rl_ft.types import Completion, RolloutGroup, WeightsRef


def group(*versions: int) -> RolloutGroup:
    """A group whose completions were sampled under these versions."""
    return RolloutGroup(
        group_id="g",
        prompt_ids=(1,),
        completions=tuple(
            Completion(
                token_ids=(1,), logprobs=(0.0,), text="", finish_reason="stop", weights_version=v
            )
            for v in versions
        ),
        rewards=(0.0,) * len(versions),
        advantages=(0.0,) * len(versions),
        valid=(True,) * len(versions),
        canonical=(True,) * len(versions),
        times_given=(1,) * len(versions),
    )


def weights(version: int) -> WeightsRef:
    return WeightsRef(version=version, digest=f"digest of {version}", payload=None)
