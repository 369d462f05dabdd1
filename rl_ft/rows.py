"""What stands in a dataset: the records of its files, strict about names and numbers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from envs.types import Action, DecisionFormat, JunctionSpec, Observation, Outcome, SignalTiming
from rl_ft.states import Leg


class Record(BaseModel):
    """Strict about names; a number that is none is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Candidate(Record):
    """A legal answer and what it leads to."""

    answer: str
    action: Action
    outcome: Outcome


class GrpoRow(Record):
    """One decision state as a row.

    `prompt` and `candidates` tell it with its phases in the order of the junction; `way` and `seed`
    lead back to it. What the junction is like stands in `junctions.json`.
    """

    id: str
    scenario: str
    seed: int
    time_s: float
    junction: str
    way: tuple[Leg, ...]
    prompt: tuple[dict[str, str], ...]
    legal: tuple[int, ...]
    """Phases that may be chosen, by their places."""
    candidates: tuple[Candidate, ...]
    """Everything that may be answered."""
    max_pressure: str
    """What max-pressure answers."""
    observation: Observation


class SftRow(Record):
    """A chat that ends with a teacher's answer; TRL's conversational format.

    Example:
        SftRow(id="generated:3/100004/320/J0",
               messages=({"role": "user", "content": "..."},
                         {"role": "assistant", "content": '{"phase": "D"}'}),
               legal_answers=('{"phase": "B"}', '{"phase": "D"}'),
               cost_veh_s={'{"phase": "B"}': 611.0, '{"phase": "D"}': 572.5})
    """

    id: str
    messages: tuple[dict[str, str], ...] = Field(min_length=2)
    legal_answers: tuple[str, ...]
    cost_veh_s: dict[str, float]

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The chat up to the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the teacher says."""
        return self.messages[-1]["content"]

    def answered(self, answer: str) -> SftRow:
        """The same chat with another answer."""
        last = {**self.messages[-1], "content": answer}
        return self.model_copy(update={"messages": (*self.prompt, last)})


class Place(Record):
    """What the decision states of a scenario share."""

    timing: SignalTiming
    junctions: dict[str, JunctionSpec]


class FileEntry(Record):
    """What a file must be."""

    sha256: str
    rows: int


class Settings(Record):
    """What decides, beside the traffic, what stands in the rows."""

    decision_format: DecisionFormat
    instructions: bool
    horizon_s: float
    follow: str
    time_loss: float
    junction_time_loss: float
    halting: float
    lookahead_temperature_veh_s: float


class Manifest(Record):
    """Where a dataset comes from and what it consists of."""

    schema_version: int
    seed: int
    rl_ft: str
    sumo: str
    """Version that measured: another one may drive differently."""
    settings: Settings
    scenarios: dict[str, str]
    """Hash of each scenario's files (`envs.scenario.content_hash`)."""
    files: dict[str, FileEntry]
