"""The GRPO loop on one page.

    learner (Ray Train) --publish v--> buffer --v--> generator loads v
                                                        |
    learner <--groups of step v-- buffer <--groups-- worlds + generator, at version v
       |
       +-- optimiser step v -> v + 1 -> publish

Everybody waits for weights: a publication, be it the first one, the next one or that of a
restarted learner, is what makes the loop collect the groups of step v. So a restart needs no code
of its own. Nothing waits for ever: every wait looks whether the learner still lives.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from envs.scenario import expand
from rl_ft.check import Checks
from rl_ft.cluster import ray_session
from rl_ft.config import Config
from rl_ft.health import HealthMonitor
from rl_ft.monitor import LoadSampler, MetricLog
from rl_ft.parity import UNKNOWN, ParityError
from rl_ft.progress import Progress
from rl_ft.recall import Recall
from rl_ft.render import Renderer
from rl_ft.rollout import Collected, Score, Tally, collect_groups, metrics
from rl_ft.run_folder import RunFolder
from rl_ft.snapshots import Snapshots
from rl_ft.types import RolloutGroup, WeightsRef
from rl_ft.worlds import shares

log = logging.getLogger(__name__)

POLL_S = 2.0
"""How often a wait looks whether the other side still lives."""


def train_grpo(config: Config, folder: RunFolder) -> None:
    """Reinforce every supervised start of the run; finished ones are skipped.

    Needs `sft/<start>/`; leaves `grpo/<start>/model/`, checkpoints, examples and metrics.
    """
    starts = [s for s in config.prepare.teachers if not folder.stage_done(f"grpo/{s}")]
    if not starts:
        return
    with ray_session(config), MetricLog(folder.root) as record:
        from rl_ft.actors import start_actors

        model = str(folder.path("sft", starts[0]))
        worlds, generator = start_actors(config, model, expand(config.scenarios.train))
        for start in starts:
            loop = GrpoLoop(config, folder, start, worlds, generator, record)
            asyncio.run(loop.run())
            folder.mark_done(f"grpo/{start}")
            loop.forget()
        _stop(worlds, generator)


class GrpoLoop:
    """One start's training; `run()` once."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        start: str,
        worlds: Sequence[Any],
        generator: Any,
        record: MetricLog,
        *,
        score: Score | None = None,
    ) -> None:
        from rl_ft.actors import BufferActor, RemoteAsk

        self._config, self._folder, self._record = config, folder, record
        self._stage = f"grpo/{start}"
        self._model_path = str(folder.path("sft", start))
        self._worlds, self._generator = worlds, generator
        self._score = score
        self._quotas = shares(config.rollout.num_groups, len(worlds))
        self._recalls: list[Recall] = []
        self._buffer = BufferActor.remote()
        self._health = HealthMonitor(config)
        self._load = LoadSampler()
        self._renderer = Renderer(
            self._model_path, max_prompt_length=config.model.max_prompt_length
        )
        self._pending: dict[int, dict[str, float]] = {}
        self._refs: list[WeightsRef] = []
        self._groups: list[RolloutGroup] = []
        self.snapshots = Snapshots(folder.path(self._stage, "snapshots"))
        self._checks = Checks(
            config, folder, start, RemoteAsk(generator, self._renderer, config), record
        )
        self._progress = Progress(self._stage, total=config.grpo.max_steps, unit="steps")
        self._steps_start = time.perf_counter()

    async def run(self) -> None:
        """Until the last step is trained.

        Raises:
            ParityError: trainer and sampler disagree.
            HealthError: a budget of failures is exceeded.
            RuntimeError: the learner gave up; the cause is its own error.
        """
        with self._progress:
            await self._train()

    def forget(self) -> None:
        """The weights that were kept on the way are needed no more."""
        self.snapshots.clear()
        self._checks.forget()

    async def _train(self) -> None:
        await self._check_parity()
        learner = self._start_learner()
        sequence = 0
        while (published := await self._next_weights(sequence, learner)) is not None:
            sequence, ref = published
            self._refs = [*self._refs[-1:], ref]
            started = time.perf_counter()
            await self._generator.load.remote(ref)
            sync_s = time.perf_counter() - started
            await self._take_metrics()
            if len(self._refs) == 1 or ref.version <= self._refs[0].version:
                self._go_on_from(ref)
            if await self._is_last(ref):
                await self._buffer.end.remote()
                break
            await self._collect(ref.version, sync_s)
        await asyncio.wrap_future(learner)
        await self._take_metrics()
        await self._save_model()

    def _go_on_from(self, ref: WeightsRef) -> None:
        """A learner has begun, or begun again: what comes after its checkpoint is made anew."""
        self._record.rewind(self._stage, ref.version)
        self.snapshots.rewind(ref.version)
        self._checks.rewind(ref.version)
        self._progress.update(ref.version)
        steps = self._config.rollout.retell_after_steps
        self._recalls = [
            Recall(seed=self._config.seed * 1_000 + i, num_waiting=round(steps * quota))
            for i, quota in enumerate(self._quotas)
        ]
        log.info(
            "%s: from step %d of %d, weights %s",
            self._stage,
            ref.version,
            self._config.grpo.max_steps,
            ref.digest[:12],
        )

    async def _collect(self, step: int, sync_s: float) -> None:
        """The groups of one step, admitted to the buffer."""
        from rl_ft.actors import RemoteGenerate, RemoteWorlds

        started = time.perf_counter()
        generate = RemoteGenerate(self._generator, self._config)
        parts: list[Collected] = await asyncio.gather(
            *(
                collect_groups(
                    RemoteWorlds(actor),
                    generate,
                    self._renderer,
                    self._config,
                    quota=quota,
                    seed=(self._config.seed * 100_003 + step) * 1_000 + i * 100,
                    score=self._score,
                    recall=recall,
                )
                for i, (actor, quota, recall) in enumerate(
                    zip(self._worlds, self._quotas, self._recalls, strict=True)
                )
            )
        )
        groups: list[RolloutGroup] = [group for part in parts for group in part.groups]
        tally = Tally()
        for part in parts:
            tally.add(part.tally)
        values = metrics(tally) | {
            "time/sync_s": sync_s,
            "time/rollout_s": time.perf_counter() - started,
        }
        self._health.observe(step, values)
        self._pending[step + 1] = values
        self._write_examples([example for part in parts for example in part.examples])
        self._groups = groups
        await self._buffer.put_groups.remote(step, groups)

    async def _next_weights(
        self, sequence: int, learner: Future[Any]
    ) -> tuple[int, WeightsRef] | None:
        """The next publication; None when the learner has ended without one."""
        while True:
            found = await self._buffer.next_weights.remote(sequence, POLL_S)
            if found is not None:
                return found
            await self._take_metrics()
            await self._raise_refusal()
            if learner.done():
                learner.result()
                return None

    async def _raise_refusal(self) -> None:
        """ParityError with its cause if the learner refused to update."""
        refused = await self._buffer.refused.remote()
        if refused is None:
            return
        step, mismatch = refused
        bound = self._config.parity.max_logprob_diff
        cause = UNKNOWN
        if len(self._refs) > 1:
            old, new = self._refs
            cause = await self._generator.diagnose.remote(
                self._model_path, new, old, self._groups, bound
            )
        raise ParityError(
            cause,
            f"at step {step} trainer and sampler differ by {mismatch:.3g} nats per token on "
            f"average, more than parity.max_logprob_diff = {bound:g}; nothing was updated",
        )

    async def _take_metrics(self) -> None:
        """Join the learner's metrics with the rollout's, record them, and look at the gates."""
        for step, learned in await self._buffer.take_metrics.remote():
            now = time.perf_counter()
            values = {
                **self._pending.pop(step, {}),
                **learned,
                **self._load.sample(),
                "time/train_s": learned["learner/step_s"] - learned["learner/fetch_s"],
                "time/step_s": now - self._steps_start,
            }
            self._steps_start = now
            self._record.log(self._stage, step, values)
            await self._buffer.confirm.remote(step)
            self._progress.update(step, **_figures(values, self._checks.latest))
            self._progress.say()
            self._health.observe(step, {"entropy": learned["entropy"]})

    async def _check_parity(self) -> None:
        """Before anything is trained on: a non-zero change of the weights must arrive."""
        rows = self._folder.path("data", f"eval_{self._stage.split('/')[1]}.jsonl").open()
        with rows:
            messages = [json.loads(line)["messages"] for line in rows]
        prompts = [
            self._renderer.prompt_ids(chat) for chat in messages[: self._config.parity.num_prompts]
        ]
        report = await self._generator.check_parity.remote(
            self._model_path,
            prompts,
            self._config.grpo.max_completion_length,
            self._config.parity.max_logprob_diff,
        )
        log.info("%s: trainer and sampler agree: %s", self._stage, report)

    def _start_learner(self) -> Future[Any]:
        """Ray Train in a thread of its own; a daemon, so that a failed run can end."""
        from rl_ft.actors import LearnerLink
        from rl_ft.learner import TrainConfig, run_learner

        link = LearnerLink(self._buffer, self._config.parity.max_logprob_diff)
        train_config = TrainConfig(
            config=self._config.model_dump(mode="json"),
            model_path=self._model_path,
            output_dir=str(self._folder.path(self._stage, "checkpoints")),
            num_groups=self._config.rollout.num_groups,
            fetch=link.fetch,
            publish=link.publish,
            on_metrics=link.report,
            before_update=link.check,
            before_checkpoint=link.await_record,
        )
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(
                    run_learner(
                        train_config,
                        storage_path=self._folder.path(self._stage, "ray").absolute(),
                        num_cpus=self._config.ray.cpus_per_learner,
                        max_failures=1,
                    )
                )
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="learner", daemon=True).start()
        return future

    def _write_examples(self, examples: Sequence[dict[str, Any]]) -> None:
        """The latest decisions at which the answer made a difference, for the report."""
        telling = [e for e in examples if len(e["cost_veh_s"]) > 1]
        if telling:
            file = self._folder.path(self._stage, "examples.json")
            file.write_text(json.dumps(telling, indent=1), encoding="utf-8")

    async def _is_last(self, ref: WeightsRef) -> bool:
        """Check what the sampler holds, keep what the final model is the mean of; is it enough?"""
        import ray

        from rl_ft.learner import latest_step
        from rl_ft.weights import fetch

        grpo, version = self._config.grpo, ref.version
        weights = partial(fetch, ref, ray.get)
        checkpoints = self._folder.path(self._stage, "checkpoints")
        await self._checks.look(version, weights, resumable_from=latest_step(checkpoints))
        is_last = version >= grpo.max_steps or self._checks.on_plateau
        is_late = version >= round(grpo.average_from * grpo.max_steps)
        if is_last or (is_late and version % grpo.save_steps == 0):
            self.snapshots.add(version, weights())
        if is_last and version < grpo.max_steps:
            log.info("%s: ends at step %d, check.patience is over", self._stage, version)
        return is_last

    async def _save_model(self) -> None:
        """The mean of the kept versions, or the best checked, as a Hugging Face folder."""
        from rl_ft.weights import save_folder

        target = self._folder.path(self._stage, "model")
        averaged = self.snapshots.versions()
        save_folder(self.snapshots.mean(), self._model_path, target)
        if self._checks.best is None:
            log.info("%s: the model is the mean of versions %s", self._stage, averaged)
            return
        await self._generator.load_folder.remote(str(target))
        better = await self._checks.choose(averaged)
        if better is not None:
            save_folder(better, self._model_path, target)


def _figures(values: Mapping[str, float], check: str) -> dict[str, str]:
    """What the progress line says of a step, the most important first."""
    shown = {
        "gain_over_max-pressure": ("reward/gain_over_max_pressure_veh_s", "{:.1f} veh s"),
        "strict": ("format/strict_share", "{:.2f}"),
        "entropy": ("entropy", "{:.3f}"),
    }
    others = {name: f.format(values[key]) for name, (key, f) in shown.items() if key in values}
    reward = f"{values.get('reward/mean', float('nan')):.2f}"
    return {"reward": reward, **({"check": check} if check else {}), **others}


def _stop(worlds: Sequence[Any], generator: Any) -> None:
    import ray

    ray.get([actor.close.remote() for actor in worlds])
    for actor in (*worlds, generator):
        ray.kill(actor)
