"""What a standard deep-RL controller reaches on the map it was trained on: independent DQN.

One DQN per junction, as RESCO's IDQN (Ault and Sharon 2021), with its settings: nothing is shared
between junctions. Learner, replay and optimiser are Stable-Baselines3's; its own loop wants one
environment per learner, so here all junctions of a map act at once and each is fed by hand.

A learner sees what the language model's prompt is made of, as numbers, and chooses from the same
legal phases at the same instants. The last network is judged, greedy, by `rl_ft.evaluate`: the
loop, metrics and paired seeds of every policy. Unlike a model it has trained on the very map: its
column says what that is worth, not what transfers. Nothing is tuned for a map, and no checkpoint
is chosen.

The reward is minus the time loss of an interval in the whole network, pending vehicles included,
which is what models are rewarded by. All junctions share it; with `--reward local` each has its own
queue instead, the kind of reward that RESCO's learners have.

    python scripts/bench/deep_rl.py [--scenario resco:cologne1] [--episodes 100] [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from envs.answers import answer_text
from envs.scenario import load_scenario
from envs.types import Action, Decision, JunctionSpec, Scenario, TripStats
from envs.world import World
from rl_ft.closed_loop import Ask
from rl_ft.evaluate import evaluate, print_table
from rl_ft.recipe import DEFAULT_RECIPE, load_config
from rl_ft.run_folder import write_atomically
from rl_ft.types import Completion

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "buffer_size": 10_000,
    "batch_size": 32,
    "gamma": 0.99,
    "target_update_interval": 500,
    "exploration_initial_eps": 1.0,
    "exploration_final_eps": 0.0,
    "exploration_fraction": 0.8,
    "policy_kwargs": {"net_arch": [64, 64]},
}
"""RESCO's, in SB3's names and counted in decisions, one update per decision; its network has a
convolution over the lanes in front of the same two layers."""

DQN_NAME = "dqn"
CONTROLLERS = ("max_pressure", "max_wave")
NUM_VEH, NUM_S = 10.0, 60.0
"""Vehicles and seconds that one unit of the observation stands for."""
MAX_UNITS = 5.0
REWARD_VEH_S = 100.0
"""Vehicle seconds per junction that one unit of reward stands for."""
SEEDS_APART = 1000
"""Traffic of training has seeds from here on, 1000 per training; evaluation stays below."""

Vector = np.ndarray


def vector_length(junction: JunctionSpec) -> int:
    """Five numbers per lane, six per phase, and the seconds of green."""
    return 5 * len(junction.lanes) + 6 * len(junction.phases) + 1


def vector(decision: Decision) -> Vector:
    """What the detectors of a junction see; the last numbers are the mask of legal phases.

    Per lane queue, moving vehicles near, mid and far, and the first wait; seconds of green; per
    phase who stands within the junction, who halts and who moves further upstream, the free share
    of the road behind it, whether it runs, whether it is legal.
    """
    observation, num_phases = decision.observation, len(decision.junction.phases)
    lanes = [
        min(MAX_UNITS, value)
        for lane in observation.lanes
        for value in (
            lane.queue_veh / NUM_VEH,
            *(moving / NUM_VEH for moving in lane.moving_veh),
            lane.first_wait_s / NUM_S,
        )
    ]
    green = min(MAX_UNITS, observation.green_s / NUM_S)
    around = [
        min(MAX_UNITS, vehicles / NUM_VEH)
        for vehicles in (
            *observation.inside_veh,
            *(vehicles for counts in observation.upstream_veh for vehicles in counts),
        )
    ]
    running = [float(i == observation.current) for i in range(num_phases)]
    legal = [float(i in decision.legal) for i in range(num_phases)]
    return np.array(
        [*lanes, green, *around, *observation.downstream_free, *running, *legal],
        dtype=np.float32,
    )


class LegalQNetwork(QNetwork):
    """An illegal phase is worth minus infinity.

    In the network itself, so that neither the greedy choice nor the target of an update takes one:
    its value is never learned, and a maximum over it would be a guess.
    """

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Values of the phases; the mask is the end of the observation."""
        illegal = obs[:, -int(self.action_space.n) :] == 0
        return super().forward(obs).masked_fill(illegal, -torch.inf)


class LegalPolicy(DQNPolicy):
    """SB3's DQN policy around `LegalQNetwork`."""

    def make_q_net(self) -> QNetwork:
        """The online or the target network."""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return LegalQNetwork(**arguments).to(self.device)


class Spaces(gymnasium.Env):
    """Tells SB3 the shapes of a junction; never stepped."""

    def __init__(self, junction: JunctionSpec) -> None:
        shape = (vector_length(junction),)
        self.observation_space = gymnasium.spaces.Box(0.0, MAX_UNITS, shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(junction.phases))


class Learner:
    """The DQN of one junction, which explores less and less over `num_decisions` of training."""

    def __init__(self, junction: JunctionSpec, *, seed: int, num_decisions: int) -> None:
        self.dqn = DQN(LegalPolicy, Spaces(junction), seed=seed, device="cpu", **SETTINGS)
        self.dqn.set_logger(Logger(folder=None, output_formats=[]))
        self._random = random.Random(seed)
        self._num_seen, self._num_decisions = 0, num_decisions

    def best(self, seen: Vector) -> int:
        """The legal phase of the highest value."""
        return int(self.dqn.predict(seen, deterministic=True)[0])

    def explore(self, seen: Vector, legal: Sequence[int]) -> int:
        """The best phase, or any legal one: as often as the training is young."""
        share = self.dqn.exploration_schedule(1.0 - self._num_seen / self._num_decisions)
        return self._random.choice(legal) if self._random.random() < share else self.best(seen)

    def learn(self, seen: Vector, phase: int, reward: float, then: Vector) -> None:
        """Remember one interval and update once.

        The end of the window is never passed on as the end of the task: traffic would go on.
        """
        dqn = self.dqn
        dqn.replay_buffer.add(
            seen, then, np.array([phase]), np.array([reward]), np.array([False]), [{}]
        )
        self._num_seen += 1
        if self._num_seen >= dqn.batch_size:
            dqn.train(gradient_steps=1, batch_size=dqn.batch_size)
        if self._num_seen % dqn.target_update_interval == 0:
            polyak_update(dqn.q_net.parameters(), dqn.q_net_target.parameters(), dqn.tau)


def train(
    scenario: Scenario,
    *,
    episodes: int,
    seed: int,
    reward: str,
    report: Callable[[int, TripStats], None],
) -> dict[str, Learner]:
    """The learners by junction after so many episodes, each with its own traffic.

    `report` is told of every episode as it ends; what it hears includes the exploration.
    """
    length_s = scenario.end_s - scenario.begin_s
    num_decisions = episodes * math.ceil(length_s / scenario.timing.decision_interval_s)
    first = SEEDS_APART * seed
    with World() as world:
        learners = {
            junction.tls_id: Learner(junction, seed=first + index, num_decisions=num_decisions)
            for index, junction in enumerate(world.reset(scenario, first))
        }
        for episode in range(episodes):
            world.reset(scenario, first + episode)
            _play(world, scenario, learners, reward)
            report(episode + 1, world.trips())
    return learners


def _play(world: World, scenario: Scenario, learners: dict[str, Learner], reward: str) -> None:
    """One episode from a fresh start, learning on the way."""
    interval_s = scenario.timing.decision_interval_s
    now = world.decisions()
    seen = {d.junction.tls_id: vector(d) for d in now}
    while now[0].observation.time_s < scenario.end_s:
        phases = {
            d.junction.tls_id: learners[d.junction.tls_id].explore(seen[d.junction.tls_id], d.legal)
            for d in now
        }
        # Every junction is named, so in the one interval no controller is followed.
        actions = {tls_id: Action(phase=phase) for tls_id, phase in phases.items()}
        outcome = world.play(actions, interval_s, "max_wave")
        now = world.decisions()
        then = {d.junction.tls_id: vector(d) for d in now}
        for d in now:
            tls_id = d.junction.tls_id
            if reward == "network":
                cost_veh_s = outcome.time_loss_veh_s / len(now)
            else:
                cost_veh_s = interval_s * sum(lane.queue_veh for lane in d.observation.lanes)
            gain = -cost_veh_s / REWARD_VEH_S
            learners[tls_id].learn(seen[tls_id], phases[tls_id], gain, then[tls_id])
        seen = then


def asker(learners: dict[str, Learner]) -> Ask:
    """The learners as something that is asked and answers as a language model does."""

    def answer(decision: Decision) -> Completion:
        phase = learners[decision.junction.tls_id].best(vector(decision))
        return Completion(
            token_ids=(),
            logprobs=None,
            text=answer_text(decision, Action(phase=phase)),
            finish_reason="stop",
            weights_version=0,
        )

    return lambda decisions: [answer(decision) for decision in decisions]


def main() -> None:
    """Train, evaluate beside the others, print and write."""
    arguments = _arguments()
    # One row of numbers at a time: threads would only wait for each other.
    torch.set_num_threads(1)
    delays_s: list[float] = []

    def report(episode: int, trips: TripStats) -> None:
        delays_s.append(trips.delay_s)
        jam = ", gridlock" if trips.gridlock else ""
        line = f"episode {episode} of {arguments.episodes}: delay {trips.delay_s:.1f} s{jam}"
        print(line, file=sys.stderr, flush=True)

    start = time.perf_counter()
    learners = train(
        load_scenario(arguments.scenario),
        episodes=arguments.episodes,
        seed=arguments.seed,
        reward=arguments.reward,
        report=report,
    )
    training = {
        "seconds": time.perf_counter() - start,
        "seed": arguments.seed,
        "reward": arguments.reward,
        "settings": SETTINGS,
        "delay_s": delays_s,
    }
    results = evaluate(
        load_config(DEFAULT_RECIPE),
        controllers=CONTROLLERS,
        models={str(model): model for model in arguments.model},
        splits={arguments.scenario: "train"},
        seeds=arguments.seeds,
        baseline=DQN_NAME,
        versus={},
        players={DQN_NAME: asker(learners)},
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**results, "training": training}, indent=1)
    write_atomically(arguments.out / "results.json", text)
    print_table(results)
    print(f"trained {arguments.episodes} episodes in {training['seconds']:.0f} s")


def _arguments() -> argparse.Namespace:
    """What is wrong is said before the training, not after it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="resco:cologne1", help="trained and judged on")
    parser.add_argument("--episodes", type=int, default=100, help="of training")
    parser.add_argument("--seeds", type=int, default=5, help="evaluation on seeds 1..N")
    parser.add_argument("--seed", type=int, default=1, help="of the training")
    parser.add_argument(
        "--reward",
        choices=("network", "local"),
        default="network",
        help="minus the time loss of all traffic, as models have it, or minus the own queue",
    )
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="model folder; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/deep_rl"))
    arguments = parser.parse_args()
    for name in ("episodes", "seeds", "seed"):
        if not 1 <= getattr(arguments, name) < SEEDS_APART:
            parser.error(f"--{name} {getattr(arguments, name)}: expected 1 to {SEEDS_APART - 1}")
    for model in arguments.model:
        if not (model / "config.json").is_file():
            parser.error(f"--model {model}: expected a model folder with a config.json")
    if (arguments.out / "results.json").exists():
        parser.error(f"--out {arguments.out} already holds results; give another")
    return arguments


if __name__ == "__main__":
    main()
