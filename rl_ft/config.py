"""Everything a run can be told, as one frozen tree; recipes are small YAML files over its defaults.

The sections are those of `rl_ft.sections`; here is how they must fit each other. This module does
not read the command line and imports nothing heavy.
"""

from __future__ import annotations

import math

from pydantic import model_validator

from envs.answers import HOLD_INTERVALS
from envs.scenario import expand, traffic
from envs.types import DecisionFormat, SignalTiming
from rl_ft.environment import in_a_job
from rl_ft.sections import (
    CheckConfig,
    EvaluateConfig,
    GenerationConfig,
    GrpoConfig,
    HealthConfig,
    ModelConfig,
    MonitorConfig,
    ParityConfig,
    PrepareConfig,
    RayConfig,
    RewardConfig,
    RolloutConfig,
    ScenarioConfig,
    Section,
    SftConfig,
)


class Config(Section):
    """One run, completely."""

    recipe: str = "tiny-cpu"
    seed: int = 1
    decision_format: DecisionFormat = "phase"
    """What a junction is asked: the next phase, the next phase and for how long (phase_duration),
    or whether the running green goes on (extend)."""
    scenarios: ScenarioConfig = ScenarioConfig()
    model: ModelConfig = ModelConfig()
    prepare: PrepareConfig = PrepareConfig()
    sft: SftConfig = SftConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    generation: GenerationConfig = GenerationConfig()
    parity: ParityConfig = ParityConfig()
    health: HealthConfig = HealthConfig()
    check: CheckConfig = CheckConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ray: RayConfig = RayConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def joins_a_cluster(self) -> bool:
        """Whether a session is one of a cluster that is there, named or that of a Ray job."""
        return self.ray.address is not None or in_a_job()

    @property
    def exports_ray_metrics(self) -> bool:
        """Whether Ray's metrics are told what the run measures."""
        asked = self.monitor.ray
        return self.ray.address is not None if asked is None else asked

    @property
    def cpus_per_engine(self) -> float:
        """Logical CPUs of one generator, all its processes together."""
        return self.ray.cpus_per_generator * self.generation.tensor_parallel_size

    @property
    def num_gpu_holders(self) -> int:
        """What wants a GPU during GRPO: processes of engines and learners."""
        num_processes = self.ray.num_generators * self.generation.tensor_parallel_size
        return num_processes + self.ray.num_learners

    @property
    def cpus_wanted(self) -> float:
        """Logical CPUs that GRPO takes: world actors, generators and learners at once."""
        return (
            self.ray.num_world_actors * self.ray.cpus_per_world_actor
            + self.ray.num_generators * self.cpus_per_engine
            + self.ray.num_learners * self.ray.cpus_per_learner
        )

    @property
    def lookahead_horizon_s(self) -> float:
        """How far the controller `lookahead` tries."""
        return self.evaluate.lookahead_horizon_s or self.reward.horizon_s

    @model_validator(mode="after")
    def _kl_is_over_samples(self) -> Config:
        if self.grpo.beta and self.rollout.counterfactuals:
            raise ValueError(
                f"grpo.beta is {self.grpo.beta:g}, but TRL estimates the KL term from answers that "
                "the policy gave: set rollout.counterfactuals to false as well"
            )
        return self

    @model_validator(mode="after")
    def _every_world_actor_works(self) -> Config:
        if self.rollout.num_worlds < self.ray.num_world_actors and not self.rollout.offline:
            raise ValueError(
                f"rollout.num_worlds is {self.rollout.num_worlds}, but ray.num_world_actors "
                f"{self.ray.num_world_actors} want one each"
            )
        return self

    @model_validator(mode="after")
    def _every_rank_has_as_much(self) -> Config:
        if self.rollout.num_groups % self.ray.num_learners:
            raise ValueError(
                f"rollout.num_groups is {self.rollout.num_groups}, which ray.num_learners "
                f"{self.ray.num_learners} cannot share equally: make it a multiple"
            )
        return self

    @model_validator(mode="after")
    def _shards_can_be_trained(self) -> Config:
        if self.ray.learner_sharding == "none":
            return self
        if self.ray.num_learners == 1:
            raise ValueError(
                f"ray.learner_sharding={self.ray.learner_sharding} splits the model up, "
                "but ray.num_learners is 1: set it to 2 or more, or ray.learner_sharding to none"
            )
        if self.grpo.muon_ratio is not None:
            raise ValueError(
                f"grpo.muon_ratio is {self.grpo.muon_ratio:g}, but Muon needs whole matrices and "
                f"ray.learner_sharding={self.ray.learner_sharding} leaves each learner a part: set "
                "grpo.muon_ratio to null (AdamW for everything)"
            )
        return self

    @model_validator(mode="after")
    def _what_is_given_is_there(self) -> Config:
        if "given" in self.prepare.teachers and self.model.name_or_path == "tiny":
            raise ValueError(
                "prepare.teachers has given, the start from a model that was trained before: set "
                "model.name_or_path to its folder, such as runs/best/grpo/max_pressure/model"
            )
        return self

    @model_validator(mode="after")
    def _an_adapter_is_trained(self) -> Config:
        if self.ray.weight_transport == "adapter" and self.model.lora is None:
            raise ValueError(
                "ray.weight_transport=adapter sends an adapter, but model.lora is not set"
            )
        return self

    @model_validator(mode="after")
    def _a_layer_can_be_shared(self) -> Config:
        size = self.generation.tensor_parallel_size
        if self.model.name_or_path == "tiny":
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
                number = getattr(self.model.tiny, name)
                if number % size:
                    raise ValueError(
                        f"model.tiny.{name} is {number}, which the {size} processes of "
                        "generation.tensor_parallel_size cannot share equally: make it a multiple"
                    )
        return self

    @model_validator(mode="after")
    def _a_private_cluster_has_room(self) -> Config:
        wanted = self.cpus_wanted
        if self.ray.address is None and wanted > self.ray.num_cpus:
            raise ValueError(
                f"world actors, generators and learners want {wanted:g} CPUs, but ray.num_cpus of "
                f"the private cluster is {self.ray.num_cpus}: set it to {math.ceil(wanted)}, or "
                "join a larger cluster: ray.address"
            )
        return self

    @model_validator(mode="after")
    def _what_is_answered_shows(self) -> Config:
        longest_s = HOLD_INTERVALS[-1] * SignalTiming().decision_interval_s
        if self.decision_format == "phase_duration" and self.reward.horizon_s <= longest_s:
            raise ValueError(
                f"reward.horizon_s is {self.reward.horizon_s:g}, within which a green that is "
                f"settled for {longest_s} s costs as much as a shorter one: set it to 60"
            )
        return self

    @model_validator(mode="after")
    def _each_once(self) -> Config:
        for key, names in (
            ("check.scenarios", self.check.scenarios),
            ("scenarios.held_out", self.scenarios.held_out),
        ):
            expanded = expand(names)
            if len(set(expanded)) < len(expanded):
                raise ValueError(
                    f"{key} names a scenario twice, which would count twice: once each"
                )
        return self

    @model_validator(mode="after")
    def _judged_on_what_made_nothing(self) -> Config:
        trained, judged, checked = (
            set(map(traffic, expand(names)))
            for names in (self.scenarios.train, self.scenarios.held_out, self.check.scenarios)
        )
        pairs = {"scenarios.train and scenarios.held_out": trained & judged}
        if self.check.every_steps:
            pairs["check.scenarios and scenarios.train"] = checked & trained
            pairs["check.scenarios and scenarios.held_out"] = checked & judged
        for keys, shared in pairs.items():
            if shared:
                raise ValueError(
                    f"{keys} share {', '.join(sorted(shared))}: training makes the model, checks "
                    "choose it, and what it is judged on must be something else "
                    "(evaluate.num_train_scenarios has it driven on what it was trained on too)"
                )
        return self

    @model_validator(mode="after")
    def _baseline_plays(self) -> Config:
        models = [f"{kind}:{start}" for start in self.prepare.teachers for kind in ("sft", "grpo")]
        policies = [*self.evaluate.controllers, *models]
        if self.evaluate.baseline not in policies:
            raise ValueError(
                f"evaluate.baseline is {self.evaluate.baseline}, which does not play: choose one "
                f"of {', '.join(policies)}, or add it to evaluate.controllers"
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Config:
        needed = self.model.max_prompt_length + self.grpo.max_completion_length
        if self.generation.max_model_len < needed:
            raise ValueError(
                f"generation.max_model_len is {self.generation.max_model_len}, but "
                f"model.max_prompt_length + grpo.max_completion_length is {needed}"
            )
        return self
