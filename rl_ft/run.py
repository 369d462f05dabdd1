"""The GRPO loop on one page.

    learner (Ray Train) --publish v--> buffer --v--> generator loads v
                                                        |
    learner <--groups of step t-- buffer <--groups-- worlds + generator, at version v
       |                                             for every step t that v admits
       +-- optimiser step t -> version t + 1 -> publish

Everybody waits for weights: a publication, be it the first one, the next one or that of a
restarted learner, is what makes the loop collect the groups of the steps that it admits
(`rl_ft.admission`): of step v alone, or of up to S later ones while the learner still trains. So a
restart needs no code of its own. Nothing waits for ever: every wait looks whether the learner still
lives.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rl_ft.admission import Admission, staleness
from rl_ft.check import Checks
from rl_ft.checkpoints import checkpoint_steps, latest_checkpoint
from rl_ft.cluster import ray_session
from rl_ft.config import Config
from rl_ft.dataset import read_lessons
from rl_ft.figures import rates, shown
from rl_ft.health import HealthMonitor
from rl_ft.lineage import Lineage
from rl_ft.memory import Memories, Memory
from rl_ft.mirror import Copier
from rl_ft.monitor import LoadSampler, MetricLog
from rl_ft.parity import UNKNOWN, MismatchGate, ParityError
from rl_ft.progress import Progress
from rl_ft.recall import Recall
from rl_ft.render import Renderer
from rl_ft.rollout import Collected, Score, Tally, collect_groups, metrics
from rl_ft.run_folder import RunFolder
from rl_ft.sinks import open_sinks
from rl_ft.snapshots import Snapshots, is_averaged
from rl_ft.types import Publication, RolloutGroup, WeightsRef
from rl_ft.worlds import shares

if TYPE_CHECKING:
    from rl_ft.crew import RemoteWorlds, Samplers
    from rl_ft.learner import RemoteLearner

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
    with (
        ray_session(config),
        open_sinks(config, folder.root) as sinks,
        MetricLog(folder.root, sinks) as record,
    ):
        from rl_ft.actors import start_actors

        model = str(folder.path("sft", starts[0]))
        worlds, samplers = start_actors(config, model, folder.path("data"))
        try:
            for start in starts:
                loop = GrpoLoop(config, folder, start, worlds, samplers, record)
                asyncio.run(loop.run())
                folder.mark_done(f"grpo/{start}")
                loop.forget()
        finally:
            for team in (*worlds, samplers):
                team.close()


class GrpoLoop:
    """One start's training; `run()` once."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        start: str,
        worlds: Sequence[RemoteWorlds],
        samplers: Samplers,
        record: MetricLog,
        *,
        score: Score | None = None,
    ) -> None:
        from rl_ft.actors import RemoteAsk, start_buffer

        self._config, self._folder, self._record = config, folder, record
        self._stage = f"grpo/{start}"
        self._model_path = str(folder.path("sft", start))
        self._worlds, self._samplers = worlds, samplers
        self._score = score
        self._quotas = shares(config.rollout.num_groups, len(worlds))
        self._recalls: list[Recall] = []
        self._admission = Admission(
            max_staleness=config.rollout.max_staleness,
            fence_steps=config.grpo.save_steps,
            num_steps=config.grpo.max_steps,
        )
        self._buffer = start_buffer(self._admission)
        self._health = HealthMonitor(config)
        self._load = LoadSampler()
        self._renderer = Renderer(
            self._model_path, max_prompt_length=config.model.max_prompt_length
        )
        self._pending: dict[int, dict[str, float]] = {}
        self.lineage = Lineage(config.rollout.max_staleness)
        self._copier = Copier(config.monitor.mirror, folder.root)
        self._memories = Memories(folder.path(self._stage, "memory"))
        self.snapshots = Snapshots(folder.path(self._stage, "snapshots"))
        self._checks = Checks(
            config, folder, start, RemoteAsk(samplers, self._renderer, config), record
        )
        self._progress = Progress(self._stage, total=config.grpo.max_steps, unit="steps")
        self._steps_start = time.perf_counter()

    async def run(self) -> None:
        """Until the last step is trained.

        Raises:
            ParityError: trainer and sampler disagree.
            HealthError: a budget of failures is exceeded.
            LearnerError, RuntimeError: the learner hung too often; it gave up, with its own cause.
        """
        with self._progress:
            await self._train()
        # The stage makes the next copy, of the same folder.
        self._copier.wait()

    def forget(self) -> None:
        """The weights that were kept on the way are needed no more."""
        self.snapshots.clear()
        self._checks.forget()
        self._memories.keep_only(())

    async def _train(self) -> None:
        await self._check_parity()
        learner = self._start_learner()
        try:
            await self._follow(learner)
        finally:
            # After a failure nobody else would: it waits for groups, with all that it holds.
            learner.stop()
        await self._save_model()

    async def _follow(self, learner: RemoteLearner) -> None:
        """Groups for every version that is published, until the learner has ended."""
        number = next_step = 0
        while (published := await self._next_weights(number, learner)) is not None:
            number, ref = published.number, published.weights
            # Meanwhile the worlds are observed; what samples waits for it.
            loading = asyncio.ensure_future(self._samplers.load(ref))
            self.lineage.load(ref)
            await self._take_metrics()
            if published.begins:
                await self._go_on_from(ref)
                next_step = ref.version
            if await self._is_last(ref, loading):
                await loading
                await self._buffer.end.remote()
                break
            opened = self._admission.opened(next_step, ref.version)
            for step in opened:
                await self._collect(step, number, loading)
            await loading
            next_step = opened.stop
        # It waits for the record of its last steps.
        learner.fed(begun=True)
        while not await learner.wait(POLL_S):
            await self._take_metrics()
            await learner.look_after()
        learner.ended.result()

    async def _go_on_from(self, ref: WeightsRef) -> None:
        """A learner has begun, or begun again: what comes after its checkpoint is made anew."""
        self._record.rewind(self._stage, ref.version)
        # Steps that are done again must not count twice.
        self._health = HealthMonitor(self._config)
        self.snapshots.rewind(ref.version)
        self._pending.clear()
        self._checks.rewind(ref.version)
        self._progress.update(ref.version)
        steps = self._config.rollout.retell_after_steps
        self._recalls = [
            Recall(seed=self._config.seed * 1_000 + i, num_waiting=round(steps * quota))
            for i, quota in enumerate(self._quotas)
        ]
        num_worlds = shares(self._config.rollout.num_worlds, len(self._worlds))
        memory = self._memories.get(ref.version, num_worlds=num_worlds)
        if memory is not None:
            memory.restore(self._recalls)
            await asyncio.gather(
                *(w.stand(s) for w, s in zip(self._worlds, memory.standings, strict=True))
            )
        elif ref.version == 0:
            await self._remember(0)
        else:
            log.warning(
                "%s: where worlds stood at step %d is not known, they begin anew",
                self._stage,
                ref.version,
            )
        log.info(
            "%s: from step %d of %d, weights %s",
            self._stage,
            ref.version,
            self._config.grpo.max_steps,
            ref.digest[:12],
        )

    async def _remember(self, version: int) -> None:
        """What a run must know to go on from this version; before its checkpoint is written."""
        standings = await asyncio.gather(*(worlds.standing() for worlds in self._worlds))
        self._memories.add(version, Memory.of(standings, self._recalls))
        checkpoints = self._folder.path(self._stage, "checkpoints")
        self._memories.keep_only({0, version, *checkpoint_steps(checkpoints)})

    async def _collect(self, step: int, number: int, loading: Awaitable[None]) -> None:
        """The groups of one step, admitted to the buffer, under publication `number`, whose weights
        the sampler is loading."""
        from rl_ft.actors import RemoteGenerate

        started = time.perf_counter()
        generate = RemoteGenerate(self._samplers, self._config, after=loading)
        parts: list[Collected] = await asyncio.gather(
            *(
                collect_groups(
                    worlds,
                    generate,
                    self._renderer,
                    self._config,
                    quota=quota,
                    seed=(self._config.seed * 100_003 + step) * 1_000 + i * 10**12,
                    score=self._score,
                    recall=recall,
                )
                for i, (worlds, quota, recall) in enumerate(
                    zip(self._worlds, self._quotas, self._recalls, strict=True)
                )
            )
        )
        groups: list[RolloutGroup] = [group for part in parts for group in part.groups]
        tally = Tally()
        for part in parts:
            tally.add(part.tally)
        sync_s = max(generate.waited_s, default=0.0)
        values = {
            **metrics(tally),
            **staleness(step, groups),
            "time/sync_s": sync_s,
            "time/sampler_s": generate.busy_s,
            "time/rollout_s": time.perf_counter() - started - sync_s,
        }
        values["time/generate_s"] -= sum(generate.waited_s)
        self._health.observe(step, values)
        self._pending[step + 1] = values
        self._write_examples([example for part in parts for example in part.examples])
        self.lineage.sample(step, groups)
        await self._buffer.put_groups.remote(step, groups, under=number)

    async def _next_weights(self, after: int, learner: RemoteLearner) -> Publication | None:
        """The next publication; None when the learner has ended without one."""
        # Ray Train restarts a learner that refused, and a long rollout may have hidden both.
        await self._raise_refusal()
        learner.fed(begun=after > 0)
        while (found := await self._buffer.next_weights.remote(after, POLL_S)) is None:
            await self._take_metrics()
            await self._raise_refusal()
            if learner.ended.done():
                learner.ended.result()
                return None
            await learner.look_after()
        return found

    async def _raise_refusal(self) -> None:
        """ParityError with its cause if the learner refused to update."""
        refused = await self._buffer.refused.remote()
        if refused is None:
            return
        await self._take_metrics()
        step, why = refused
        try:
            cause = await self._samplers.diagnose(
                self._model_path,
                self.lineage.suspects(step),
                self._config.parity.max_logprob_diff,
            )
        except Exception:  # whatever keeps it from being found out, the refusal must be told
            log.exception("%s: why the update was refused cannot be found out", self._stage)
            cause = UNKNOWN
        raise ParityError(cause, why)

    async def _take_metrics(self) -> None:
        """Join the learner's metrics with the rollout's, record them, and look at the gates."""
        for step, learned in await self._buffer.take_metrics.remote():
            now = time.perf_counter()
            values = {
                **self._pending.pop(step, {}),
                **learned,
                **self._load.sample(),
                **await self._buffer.counts.remote(),
                "time/train_s": learned["learner/step_s"] - learned["learner/fetch_s"],
                "time/step_s": now - self._steps_start,
            }
            self._steps_start = now
            values |= rates(values)
            self._record.log(self._stage, step, values)
            if step % self._config.grpo.save_steps == 0:
                await self._remember(step)
            if (step - 1) % self._config.grpo.save_steps == 0:
                # The checkpoint before this step is there.
                self._copier.begin()
            await self._buffer.confirm.remote(step)
            self._progress.update(step, **shown(values, self._checks.latest))
            self._progress.say()
            self._health.observe(step, {"entropy": learned["entropy"]})

    async def _check_parity(self) -> None:
        """Before anything is trained on: a non-zero change of the weights must arrive."""
        name = f"eval_{self._stage.split('/')[1]}.jsonl"
        rows = read_lessons(self._folder.path("data", name))
        prompts = [
            self._renderer.prompt_ids(row.prompt) for row in rows[: self._config.parity.num_prompts]
        ]
        reports = await self._samplers.check_parity(
            self._model_path,
            prompts,
            self._config.grpo.max_completion_length,
            self._config.parity.max_logprob_diff,
        )
        for report in reports:
            log.info("%s: trainer and sampler agree: %s", self._stage, report)

    def _start_learner(self) -> RemoteLearner:
        from rl_ft.learner import RemoteLearner, TrainConfig
        from rl_ft.link import LearnerLink

        parity = self._config.parity
        gate = MismatchGate(parity.max_logprob_diff, stale_bound=parity.max_stale_logprob_diff)
        adapter_only = self._config.ray.weight_transport == "adapter"
        base = self._model_path if adapter_only else None
        link = LearnerLink(self._buffer, gate, self._config, base=base)
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
        # What is passed over is to be read in the run's log, not in a worker's.
        latest_checkpoint(train_config["output_dir"])
        return RemoteLearner(
            train_config, self._config, self._folder.path(self._stage, "ray").absolute()
        )

    def _write_examples(self, examples: Sequence[dict[str, Any]]) -> None:
        """The latest decisions at which the answer made a difference, for the report."""
        telling = [e for e in examples if len(e["cost_veh_s"]) > 1]
        if telling:
            file = self._folder.path(self._stage, "examples.json")
            file.write_text(json.dumps(telling, indent=1), encoding="utf-8")

    async def _is_last(self, ref: WeightsRef, loading: Awaitable[None]) -> bool:
        """Check what the sampler loads, keep what the final model is the mean of; is it enough?"""
        import ray

        from rl_ft.weights import fetch

        grpo, version = self._config.grpo, ref.version
        weights = partial(fetch, ref, ray.get)
        if self._checks.is_due(version):
            await loading
            checkpoints = self._folder.path(self._stage, "checkpoints")
            await self._checks.look(version, weights, resumable_from=checkpoint_steps(checkpoints))
        is_last = version >= grpo.max_steps or self._checks.on_plateau
        if is_last or is_averaged(version, grpo):
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
        await self._samplers.load_folder(str(target))
        better = await self._checks.choose(averaged)
        if better is not None:
            save_folder(better, self._model_path, target)
