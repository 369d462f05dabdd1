"""The sections of a run's configuration, each by itself: names, defaults, bounds.

Names of GRPO hyper-parameters are TRL's. A key that does not exist is an error, never ignored. How
sections must fit each other is `rl_ft.config`'s business.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.reward import TrafficTerm

Teacher = Literal["max_pressure", "lookahead", "given"]
Base = Literal["max_wave", "max_wave_extended", "max_pressure"]
Controller = Literal["fixed", "actuated", "random", "lookahead", Base]


class Section(BaseModel):
    """Base of every part of the tree: immutable, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScenarioConfig(Section):
    """Which traffic worlds a run trains on and which it is judged on."""

    train: tuple[str, ...] = ("generated:1-96",)
    """Scenario names; `generated:1-96` stands for 96 of them, `my.sumocfg*12` for the same one
    twelve times."""
    held_out: tuple[str, ...] = ("generated:1001-1002", "resco:cologne1", "resco:ingolstadt1")


class TinyModelConfig(Section):
    """Size of the from-scratch model (Qwen3 architecture) of the laptop recipe."""

    hidden_size: int = Field(128, gt=0, multiple_of=32)
    intermediate_size: int = Field(384, gt=0)
    num_hidden_layers: int = Field(2, gt=0)
    head_dim: int = 32
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(4, gt=0)


class LoraSettings(Section):
    """PEFT adapter; None in `ModelConfig.lora` trains all parameters."""

    r: int = Field(16, gt=0)
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """The policy."""

    name_or_path: str = "tiny"
    """`tiny` builds the from-scratch model; else the folder of a Hugging Face model."""
    tiny: TinyModelConfig = TinyModelConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSettings | None = None
    max_prompt_length: int = Field(512, gt=0)
    instructions: bool = False
    """Explain the dialect in a system message; a model that is trained on it needs none."""


class BehaviourConfig(Section):
    """Who drives while decision states are collected: a share for each, normalised."""

    policy: float = Field(0.0, ge=0)
    max_pressure: float = Field(0.4, ge=0)
    max_wave: float = Field(0.4, ge=0)
    random: float = Field(0.2, ge=0)
    swap_interval_s: float = Field(60.0, gt=0)
    """How often the driver is drawn again."""

    @model_validator(mode="after")
    def _somebody_drives(self) -> BehaviourConfig:
        if not self.policy + self.max_pressure + self.max_wave + self.random:
            raise ValueError("at least one share of the behaviour must be above 0")
        return self


class PrepareConfig(Section):
    """Decision states with the teachers' answers."""

    dataset: str | None = None
    """A folder with a dataset, as a run's `data/`: used as it is, nothing is collected."""
    num_states: int = Field(1600, gt=0)
    num_lesson_states: int | None = Field(None, gt=0)
    """How many of them become lessons of the supervised start; None: all."""
    num_eval_states: int = Field(200, gt=0)
    teachers: tuple[Teacher, ...] = ("max_pressure",)
    """One supervised start each, and each is reinforced by itself; `given` is the model of
    `model.name_or_path` as it is, which was trained before."""
    tellings: int = Field(12, gt=0)
    """Training rows per state, each with the phases in another order and under other names."""
    lookahead_temperature_veh_s: float = Field(6.0, gt=0)
    """Lookahead's lessons are drawn from softmax(-cost / temperature)."""
    min_queue_veh: int = Field(1, ge=0)
    """States with fewer queued and approaching vehicles teach little and are skipped."""
    states_per_episode: int = Field(35, gt=0)
    warm_up_s: float = Field(120.0, ge=0)
    behaviour: BehaviourConfig = BehaviourConfig()

    @model_validator(mode="after")
    def _no_policy_yet(self) -> PrepareConfig:
        if self.behaviour.policy:
            raise ValueError("prepare.behaviour.policy must be 0: there is no policy yet")
        return self


class SftConfig(Section):
    """Supervised warm start; names are TRL's `SFTConfig`."""

    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(32, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    muon_ratio: float | None = Field(2.5, gt=0)
    """Hidden matrices learn by Muon at this multiple of the rate; None: AdamW for everything."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    torch_threads: int = Field(2, gt=0)
    """Nothing else runs meanwhile."""
    label_noise: float = Field(0.1, ge=0, lt=1)
    """Share of rows whose answer is replaced by a random legal one: keeps entropy to explore."""


class RewardConfig(Section):
    """What an answer earns: weights on the terms of a measured Outcome, plus the format."""

    horizon_s: float = Field(30.0, gt=0)
    follow: Base = "max_wave"
    """Base controller that continues after the candidate action."""
    traffic: TrafficTerm = "regret"
    """How a cost becomes a reward: regret, tanh or tanh_relative (`envs.reward`)."""
    time_loss: float = 1.0
    junction_time_loss: float = 0.0
    halting: float = 0.0
    scale_veh_s: float = Field(30.0, gt=0)
    """The cost that one unit of reward stands for: the same at every instant, so the few at which
    the choice matters most lead."""
    max_regret_veh_s: float = Field(60.0, gt=0)
    """An answer that costs this much more than the best of its group costs as much as any worse:
    one terrible phase must not decide how far apart the good ones are."""
    format_strict: float = 0.0
    format_partial: float = -0.5
    format_invalid: float = -2.0

    @model_validator(mode="after")
    def _not_all_alike(self) -> RewardConfig:
        default = type(self).model_fields["scale_veh_s"].default
        if self.traffic == "tanh" and self.scale_veh_s == default:
            raise ValueError(
                "reward.traffic=tanh squashes the whole cost, hundreds of vehicle seconds: set "
                "reward.scale_veh_s to such a number too, or all answers earn -1"
            )
        return self


class RolloutConfig(Section):
    """How groups are made."""

    offline: bool = False
    """Take instants and what they lead to from the dataset in `data/`: nothing is simulated for the
    training, though checks still drive (`check.every_steps`). `num_worlds` is then how many
    instants are asked about at once, and what drives worlds (`behaviour`, `max_pause`, `episode_s`,
    `warm_up_s`, `min_queue_veh`) counts for nothing."""
    num_groups: int = Field(48, gt=0)
    """Groups per optimiser step: one telling of one decision state each."""
    tellings: int = Field(4, gt=0)
    """How often a state is told as long as it teaches: each time in a step of its own, with the
    order of its phases, their names and the answers drawn anew. It is simulated once, and if it may
    be told again over all legal phases."""
    retell_after_steps: float = Field(5.0, ge=0)
    """About how many steps lie between two tellings of a state."""
    num_worlds: int = Field(32, gt=0)
    """Simulations alive at once, spread over `ray.num_world_actors`."""
    behaviour: BehaviourConfig = BehaviourConfig(
        policy=0.7, max_pressure=0.1, max_wave=0.1, random=0.1
    )
    min_queue_veh: int = Field(2, ge=0)
    max_pause: int = Field(4, ge=0)
    """Between two questions a world is driven for 0 to this many decision intervals: neighbouring
    instants are alike and teach the same. Where the policy drives, it does so by its most likely
    answers."""
    counterfactuals: bool = True
    """A repeated answer makes way for a legal one that the policy did not give, so that phases
    which it would never try are learnt about too (`rl_ft.counterfactual`). Wants a
    `grpo.target_coef` above 0."""
    max_staleness: int = Field(0, ge=0)
    """Groups are collected up to so many steps ahead of the learner, by a policy so many versions
    older: 0 takes turns, 1 overlaps rollout and training. Every `grpo.save_steps` steps they take
    turns once in any case (`rl_ft.admission`)."""
    max_refills: int = Field(2, ge=0)
    """Further rounds that replace groups without variance."""
    episode_s: float = Field(1800.0, gt=0)
    warm_up_s: float = Field(60.0, ge=0)
    call_timeout_s: float = Field(120.0, gt=0)


class GrpoConfig(Section):
    """The objective; names and meaning are TRL's `GRPOConfig`."""

    max_steps: int = Field(300, gt=0)
    num_generations: int = Field(8, gt=1)
    max_completion_length: int = Field(16, gt=0)
    learning_rate: float = Field(2e-3, ge=0)
    muon_ratio: float | None = Field(3.0, gt=0)
    """Hidden matrices learn by Muon at this multiple of the rate; None: AdamW for everything."""
    warmup_steps: int = Field(10, ge=0)
    lr_scheduler_type: str = "cosine"
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: float = Field(1.0, gt=0)
    loss_type: str = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    beta: float = 0.0
    entropy_coef: float = Field(0.0, ge=0)
    """TRL's bonus in the loss, over the whole vocabulary."""
    target_coef: float = Field(0.3, ge=0)
    """Above 0, a group's answers weigh what they weigh in the policy, not how often they were
    drawn, and coef * KL(target || policy) over them is taken off the reward (`rl_ft.target`); 0:
    every row of a group counts alike, as in TRL."""
    target_temperature: float = Field(0.2, gt=0)
    """The target is softmax(reward / temperature) over the legal answers: the policy of maximum
    entropy at a temperature of so many times `reward.scale_veh_s`."""
    groups_per_micro_batch: int = Field(16, gt=0)
    gradient_checkpointing: bool = False
    """Trades time for memory: for models that do not fit otherwise."""
    save_steps: int = Field(10, gt=0)
    save_total_limit: int = Field(3, gt=0)
    """How many checkpoints stay: if the newest is broken, the one before is gone on from."""
    average_from: float = Field(0.8, ge=0, le=1)
    """The model that is left is the mean of the weights at every `save_steps` steps from this share
    of the steps on, each on disk as a whole until the stage is done; 1: the last weights alone.
    Where the best version that was checked (`check`) drives better, that one is left."""
    min_entropy: float = Field(0.001, ge=0)
    """Entropy guard: below it for `patience` steps the run stops with the cause."""
    patience: int = Field(20, gt=0)


class GenerationConfig(Section):
    """The vLLM engine."""

    tensor_parallel_size: int = Field(1, gt=0)
    """Processes that share every layer of one engine, a whole GPU each; they are on one node.
    Works on CPU too."""
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = Field(1.0, gt=0)
    """CPU only; for each process of an engine."""
    max_model_len: int = Field(640, gt=0)
    max_num_seqs: int = Field(512, gt=0)
    call_timeout_s: float = Field(900.0, gt=0)
    """For one batch, the start of the engine included; then it counts as dead."""
    reproducible: bool = True
    """Seed every request: identical runs. Costs nothing measurable on CPU."""


class ParityConfig(Section):
    """The gate: trainer and sampler must agree on the log-probs of real completions."""

    max_logprob_diff: float = Field(1e-3, gt=0)
    """Largest mean absolute difference tolerated (float32: about 1e-6; bfloat16: use 5e-2)."""
    max_stale_logprob_diff: float = Field(0.5, gt=0)
    """The same where older weights sampled (`rollout.max_staleness`), so that the policy's own
    movement is in it: beyond this most ratios are clipped, and the rest mislead."""
    num_prompts: int = Field(8, gt=0)


class HealthConfig(Section):
    """Budgets: beyond one of them the run stops and names it."""

    max_failed_share: float = Field(0.2, ge=0, le=1)
    max_invalid_share: float = Field(0.5, ge=0, le=1)
    max_zero_variance_share: float = Field(0.98, ge=0, le=1)
    patience: int = Field(5, gt=0)
    """Consecutive steps beyond a budget before the run stops."""


class CheckConfig(Section):
    """The closed loop now and then while GRPO trains: which weights are left, when to stop.

    More episodes tell smaller differences apart and cost more; a gridlock is worse than any delay.
    """

    every_steps: int = Field(60, ge=0)
    """Steps from one check to the next, the start being the first; 0: no checks."""
    scenarios: tuple[str, ...] = Field(("generated:901-904",), min_length=1)
    """None of those that the run is judged on: these choose the model."""
    seeds: int = Field(1, gt=0)
    """Simulation seeds 1..n on each, the same in every check."""
    episode_s: float = Field(3600.0, gt=0)
    """Traffic per episode; a scenario that is shorter is played to its end."""
    min_improvement_s: float = Field(1.0, ge=0)
    """Less delay by no more than this counts as equally good: of two versions the earlier stays the
    best, of the best and the mean the mean is left. Four episodes tell less from chance."""
    patience: int = Field(0, ge=0)
    """Checks without an improvement after which training ends; 0: it goes on to the last step."""
    num_worlds: int = Field(8, gt=0)
    """Episodes that run side by side, about 120 MB each."""


class EvaluateConfig(Section):
    """The closed loop that decides."""

    seeds: int = Field(5, gt=0)
    """Simulation seeds 1..n, the same for every policy (paired)."""
    controllers: tuple[Controller, ...] = ("fixed", "max_pressure", "max_wave")
    """`lookahead`, a strong reference, takes longer than all others together."""
    baseline: str = "max_pressure"
    """What differences are to: one of the controllers, or a model such as `sft:max_pressure`."""
    num_train_scenarios: int = Field(1, ge=0)
    """Training scenarios that are evaluated beside the held-out ones."""
    num_worlds: int = Field(32, gt=0)
    """Episodes of a model that run side by side, about 120 MB each."""
    lookahead_horizon_s: float | None = Field(None, gt=0)
    """None: as far as rewards are measured, `reward.horizon_s`."""
    fallback: Literal["max_pressure", "max_wave", "random"] = "max_pressure"
    """Decides where a model's answer is invalid; counted."""
    num_tellings: int = Field(3, ge=1)
    """A model that is not sure is asked so often, in other orders and names, and its answers vote
    (`rl_ft.vote`); 1: once."""


class RayConfig(Section):
    """Resources."""

    address: str | None = None
    """None starts a private local cluster, and in a Ray job joins the one that runs it; `auto` or
    host:port joins one."""
    num_cpus: int = Field(4, gt=0)
    """Logical CPUs of a private cluster."""
    num_world_actors: int = Field(2, gt=0)
    num_generators: int = Field(1, gt=0)
    """vLLM engines; the one with the least to do is asked next."""
    num_learners: int = Field(1, gt=0)
    """Ranks of Ray Train; each takes its share of a step's groups."""
    learner_sharding: Literal["none", "fsdp"] = "none"
    """Every rank holds all of the model, its gradients and its optimiser, or (FSDP2) a share of
    each: for a model that does not fit one GPU. Weights come out the same, by AdamW alone. The
    supervised start is not sharded."""
    cpus_per_world_actor: float = 0.5
    cpus_per_generator: float = 1.0
    """For each process of an engine, of which there are `generation.tensor_parallel_size`."""
    cpus_per_learner: float = 1.0
    placement_strategy: Literal["PACK", "SPREAD"] = "PACK"
    """Whether actors and ranks share nodes as far as they fit, or lie on as many as there are."""
    weight_transport: Literal["object_store", "adapter", "nccl", "gloo"] = "object_store"
    """What samplers are sent after every step, and how: all weights by Ray's object store; or, of a
    run with `model.lora`, the adapter alone, which they merge into the start's weights (`sft/`, on
    a disk that they see). `nccl` broadcasts all weights from the learner's GPU to those of the
    engines, by vLLM's weight transfer; `gloo` does the same between processes without a GPU.
    Either way the object store gets a copy, for checks and for engines that are replaced."""
    max_failures: int = Field(3, ge=0)
    """How often an actor, or the group of learners, may die or stop answering and be replaced."""
    learner_timeout_s: float = Field(1800.0, gt=0)
    """For one optimiser step and its checkpoint, its groups being there, or to begin again after a
    death; then it counts as hung."""
    torch_threads: int = Field(2, gt=0)

    @property
    def broadcasts(self) -> bool:
        """Whether the learner sends weights to the engines itself."""
        return self.weight_transport in ("nccl", "gloo")


class MonitorConfig(Section):
    """Who watches; `metrics.jsonl` and TensorBoard always do. And where a copy is kept."""

    mirror: str | None = None
    """Any fsspec path, such as s3://bucket/first: a copy of the run folder after every stage and
    every checkpoint of GRPO; `rl-ft pull` brings it back. Checked when a stage starts."""

    ray: bool | None = None
    """Ray's metrics, for Prometheus; None: where `ray.address` joins a cluster. The exporter of Ray
    2.60 can crash a process, so a private cluster has none unless it is asked for."""
    engine: bool = False
    """Some of vLLM's own metrics among Ray's: requests, tokens, key-value cache."""
    mlflow: str | None = None
    """Tracking URI, such as http://host:5000 or a folder."""
    wandb: str | None = None
    """Project of Weights & Biases; `WANDB_MODE=offline` needs no network."""
