"""One SUMO simulation in this process: start, observe, apply, step, branch, trips.

libsumo holds one simulation per process, and forking it is exact only while the process has one
thread; `envs.world` therefore runs this class in a lean child process. Use that one from outside.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

import libsumo

from envs import detectors, heap, signals
from envs.controllers import CONTROLLERS, PROGRAMS
from envs.errors import UserError
from envs.fork import fork_map
from envs.layout import junction_specs, running_program
from envs.ledger import Ledger, world_digest
from envs.metrics import trip_stats
from envs.scenario_check import check_step_length
from envs.types import (
    NUM_RNGS,
    Action,
    Decision,
    JointAction,
    JunctionSpec,
    Observation,
    Outcome,
    Scenario,
    TripStats,
)

LOOK_EVERY = 32
"""Of so many calls of `branch`, one looks where forks write, page by page."""


class Simulation:
    """A running scenario under signal control; starting one ends any other of the process.

    With `program="fixed"` or `"actuated"` SUMO runs the network's own programs and actions are
    not accepted.
    """

    def __init__(self, scenario: Scenario, seed: int, *, program: str | None = None) -> None:
        check_step_length(scenario)
        self.scenario = scenario
        self.seed = seed
        self.program = program
        self._directory = tempfile.TemporaryDirectory(prefix="rl-ft-world-")
        self._trips_file = Path(self._directory.name) / "trips.xml"
        _load(scenario, self._options())
        if program == "actuated":
            self._reload_actuated()
        self.junctions = junction_specs()
        self._lanes = {s.tls_id: [lane.chain for lane in s.lanes] for s in self.junctions}
        self._current = {spec.tls_id: 0 for spec in self.junctions}
        self._green_since = {spec.tls_id: scenario.begin_s for spec in self.junctions}
        self._held_until_s = {spec.tls_id: scenario.begin_s for spec in self.junctions}
        self._seen: dict[str, tuple[set[str], ...]] = {}
        self._decisions: tuple[Decision, ...] | None = None
        self._queue_samples: list[float] = []
        self._num_branched = 0
        self._busy: Sequence[heap.Stretch] = ()
        if program is None:
            for spec in self.junctions:
                libsumo.trafficlight.setRedYellowGreenState(spec.tls_id, spec.phases[0].state)

    def _options(self, additional: Sequence[str] = ()) -> list[str]:
        scenario = self.scenario
        extra = [*scenario.additional_files, *additional]
        given = {f"--{key}": value for key, value in scenario.options}
        options = (
            {"--thread-rngs": str(NUM_RNGS)}
            | given
            | {
                "--net-file": scenario.net_file,
                "--route-files": ",".join(scenario.route_files),
                "--begin": str(scenario.begin_s),
                # A flow that has a number of vehicles and no end spreads them until here.
                "--end": str(scenario.end_s),
                "--step-length": str(scenario.step_length_s),
                "--seed": str(self.seed),
                "--time-to-teleport": "-1",
                "--tripinfo-output": str(self._trips_file),
                "--tripinfo-output.write-unfinished": "true",
                "--no-step-log": "true",
                "--no-warnings": "true",
                "--duration-log.disable": "true",
            }
        )
        if extra:
            options["--additional-files"] = ",".join(extra)
        return ["sumo", *(text for option in options.items() for text in option)]

    def _reload_actuated(self) -> None:
        programs = Path(self._directory.name) / "actuated.add.xml"
        programs.write_text(_actuated_programs(self.scenario), encoding="utf-8")
        libsumo.close()
        _load(self.scenario, self._options([str(programs)]))

    @property
    def time_s(self) -> float:
        """Simulated time."""
        return libsumo.simulation.getTime()

    @property
    def done(self) -> bool:
        """The scenario's window is over."""
        return self.time_s >= self.scenario.end_s

    def decisions(self) -> tuple[Decision, ...]:
        """Every controlled junction with what it sees and may do now."""
        if self._decisions is None:
            self._decisions = tuple(self._decision(spec) for spec in self.junctions)
        return self._decisions

    def _decision(self, spec: JunctionSpec) -> Decision:
        observation = self._observe(spec)
        legal = signals.legal_phases(spec, observation, self.scenario.timing)
        # What was settled gives way to maximum green and to the rule against starvation.
        held = self.time_s < self._held_until_s[spec.tls_id]
        if held and observation.current in legal:
            legal = (observation.current,)
        return Decision(
            scenario=self.scenario.name,
            seed=self.seed,
            junction=spec,
            observation=observation,
            legal=legal,
            timing=self.scenario.timing,
        )

    def _observe(self, spec: JunctionSpec) -> Observation:
        current = self._current[spec.tls_id]
        # Lanes and phases share roads behind them and ways through the junction: each is looked at
        # once.
        counted = functools.cache(detectors.present)
        halting_veh = functools.cache(libsumo.lane.getLastStepHaltingNumber)
        sightings = [detectors.sight(lane, counted) for lane in spec.lanes]
        now = tuple(ids for _, ids in sightings)
        everywhere = set().union(*now)
        before = self._seen.get(spec.tls_id, now)
        served = {v for lane in spec.phases[current].lanes for v in before[lane]} - everywhere
        self._seen[spec.tls_id] = now
        space = [detectors.downstream(phase.downstream) for phase in spec.phases]
        return Observation(
            time_s=self.time_s,
            lanes=tuple(state for state, _ in sightings),
            downstream_free=tuple(free for free, _ in space),
            downstream_queue_veh=tuple(queue for _, queue in space),
            inside_veh=tuple(sum(map(halting_veh, phase.inside)) for phase in spec.phases),
            upstream_veh=tuple(detectors.behind(phase.upstream, counted) for phase in spec.phases),
            current=current,
            green_s=round(self.time_s - self._green_since[spec.tls_id]),
            served_veh=len(served),
        )

    def step(self, actions: JointAction, *, ledger: Ledger | None = None) -> None:
        """One decision interval under the given phases; unnamed junctions keep theirs.

        Raises:
            UserError: a phase that is not legal now, or an unknown junction.
        """
        switching = self._switching(actions)
        timing = self.scenario.timing
        start = self.time_s
        for spec, target in switching:
            self._show(spec, signals.transition_state(self._state(spec), target))
        for elapsed in self._seconds(timing.decision_interval_s):
            for spec, target in switching:
                if elapsed == timing.yellow_s + timing.all_red_s:
                    self._show(spec, target)
                elif elapsed == timing.yellow_s:
                    self._show(spec, signals.clearance_state(self._state(spec), target))
            libsumo.simulationStep()
            if ledger:
                ledger.step()
        for tls_id, action in actions.items():
            if action.phase != self._current[tls_id] or start >= self._held_until_s[tls_id]:
                self._held_until_s[tls_id] = start + action.hold_s
        for spec, _ in switching:
            self._current[spec.tls_id] = actions[spec.tls_id].phase
            self._green_since[spec.tls_id] = start + timing.yellow_s + timing.all_red_s
        self._decisions = None

    def _require_legal(self, actions: JointAction) -> None:
        legal = {d.junction.tls_id: d.legal for d in self.decisions()}
        for tls_id, action in actions.items():
            if self.program or action.phase not in legal.get(tls_id, ()):
                raise UserError(
                    f"phase {action.phase} of junction {tls_id!r} cannot be chosen at "
                    f"{self.time_s:g} s: "
                    f"legal are {legal.get(tls_id, 'none, it is not controlled')}"
                )
            if action.hold_s < 0:
                raise UserError(f"phase {action.phase} cannot be held for {action.hold_s} s")

    def _switching(self, actions: JointAction) -> list[tuple[JunctionSpec, str]]:
        if not actions:
            return []
        self._require_legal(actions)
        return [
            (spec, spec.phases[actions[spec.tls_id].phase].state)
            for spec in self.junctions
            if spec.tls_id in actions and actions[spec.tls_id].phase != self._current[spec.tls_id]
        ]

    def _seconds(self, duration_s: float) -> list[float]:
        length = self.scenario.step_length_s
        return [round(i * length, 6) for i in range(round(duration_s / length))]

    def _state(self, spec: JunctionSpec) -> str:
        return spec.phases[self._current[spec.tls_id]].state

    @staticmethod
    def _show(spec: JunctionSpec, state: str) -> None:
        libsumo.trafficlight.setRedYellowGreenState(spec.tls_id, state)

    def follow(self, controller: str, *, ledger: Ledger | None = None) -> None:
        """One decision interval under a classical controller (or the net's own program)."""
        self.step(self._choices(controller), ledger=ledger)

    def _choices(self, controller: str) -> dict[str, Action]:
        if controller in PROGRAMS:
            return {}
        decide = CONTROLLERS[controller]
        return {d.junction.tls_id: decide(d) for d in self.decisions()}

    def drive(self, controller: str, until_s: float, *, horizon_s: float = 60.0) -> None:
        """Follow a controller until a time; `lookahead` branches over `horizon_s`."""
        while self.time_s < until_s:
            self.sample_queue()
            if controller == "lookahead":
                self.step(self.lookahead(horizon_s, "max_wave"))
            else:
                self.follow(controller)

    def lookahead(self, horizon_s: float, follow: str) -> dict[str, Action]:
        """For every junction the phase whose branch costs least, the others following the base."""
        chosen = {}
        for decision in self.decisions():
            tls_id = decision.junction.tls_id
            actions = [Action(phase=phase) for phase in decision.legal]
            outcomes = self.branch([{tls_id: action} for action in actions], horizon_s, follow)
            costs = [o.time_loss_veh_s for o in outcomes]
            chosen[tls_id] = actions[costs.index(min(costs))]
        return chosen

    def branch(
        self,
        candidates: Sequence[JointAction],
        horizon_s: float,
        follow: str,
        *,
        parallel: int = 1,
    ) -> tuple[Outcome, ...]:
        """What each candidate would cost, tried from this very instant in forks of the process.

        Identical candidates are simulated once. The running simulation is not touched.

        Raises:
            UserError: a candidate is not legal now.
        """
        distinct = list({tuple(sorted(c.items())): c for c in candidates}.values())
        for candidate in distinct:
            self._require_legal(candidate)
        looks = self._num_branched % LOOK_EVERY == 0
        self._num_branched += 1

        def tried(action: JointAction) -> tuple[Outcome, Sequence[heap.Stretch]]:
            if not looks:
                heap.copy(self._busy)
            outcome = self.play(action, horizon_s, follow)
            return outcome, heap.busy() if looks else self._busy

        found = fork_map(tried, distinct, parallel=parallel)
        if found:
            self._busy = found[0][1]
        return tuple(found[distinct.index(candidate)][0] for candidate in candidates)

    def play(self, action: JointAction, horizon_s: float, follow: str) -> Outcome:
        """Execute an action here, follow a controller for the rest of the horizon, measure."""
        self._require_legal(action)
        lanes = [lane for tls_id in action for chain in self._lanes[tls_id] for lane, _ in chain]
        ledger = Ledger(lanes)
        end_s = self.time_s + horizon_s
        self.step({**self._choices(follow), **action}, ledger=ledger)
        ledger.interval_digest = world_digest()
        while self.time_s < end_s:
            self.follow(follow, ledger=ledger)
        return ledger.outcome()

    def sample_queue(self) -> None:
        """Record the mean number of halting vehicles per junction for `trips`."""
        queues = [sum(lane.queue_veh for lane in d.observation.lanes) for d in self.decisions()]
        self._queue_samples.append(sum(queues) / len(queues))

    def trips(self) -> TripStats:
        """End the simulation and count its trips."""
        end_s = self.time_s
        delay = libsumo.vehicle.getDepartDelay
        pending = [end_s - delay(v) for v in libsumo.simulation.getPendingVehicles()]
        libsumo.close()
        samples = self._queue_samples
        return trip_stats(
            self._trips_file,
            end_s=end_s,
            not_departed_depart_s=pending,
            queue_veh=sum(samples) / len(samples) if samples else 0.0,
        )

    def close(self) -> None:
        """End the simulation and remove its files."""
        if libsumo.isLoaded():
            libsumo.close()
        self._directory.cleanup()


def _load(scenario: Scenario, options: list[str]) -> None:
    try:
        libsumo.start(options)
    except (libsumo.TraCIException, libsumo.FatalTraCIError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"SUMO cannot load scenario {scenario.name} with network {scenario.net_file}: {reason}"
        ) from None


def _actuated_programs(scenario: Scenario) -> str:
    """The loaded network's programs as gap-based actuated ones (SUMO's defaults)."""
    timing = scenario.timing
    lines = ["<additional>"]
    for tls_id in libsumo.trafficlight.getIDList():
        lines.append(
            f"<tlLogic id={quoteattr(tls_id)} type='actuated' programID='rlft' offset='0'>"
        )
        for phase in running_program(tls_id).phases:
            limits = (
                f" minDur='{timing.min_green_s}' maxDur='50'"
                if signals.green_states([phase.state])
                else ""
            )
            lines.append(f"<phase duration='{phase.duration:g}' state='{phase.state}'{limits}/>")
        lines.append("</tlLogic>")
    return "\n".join([*lines, "</additional>"])
