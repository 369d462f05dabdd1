"""What teachers would answer to a decision state: the rows of the supervised start.

Every state is told several times with its phases in another order and under other names, so that
what is learnt is to read the traffic.
"""

from __future__ import annotations

import math
import random
from typing import Any

from envs import dialect
from envs.answers import act, answer_texts
from envs.controllers import CONTROLLERS
from envs.naming import as_told, in_world, retold
from envs.types import Action
from rl_ft.config import Config
from rl_ft.sections import Teacher
from rl_ft.states import DecisionState, reward_weights

Row = dict[str, Any]


def lessons(
    state: DecisionState, teacher: Teacher, config: Config, *, num: int, soften: bool = True
) -> list[Row]:
    """`num` tellings of a state, each a chat that ends with the teacher's answer.

    Lookahead's answers are drawn among the cheap ones, if `soften`; else it gives the cheapest. A
    model that is `given` learns none of them: the answers beside its questions are max-pressure's.

    Example of a row:
        {"id": "generated:3/100004/320/J0",
         "messages": [{"role": "user", "content": "north left q4 ...: ... choose D\\n..."},
                      {"role": "assistant", "content": '{"phase": "D"}'}],
         "legal_answers": ['{"phase": "B"}', '{"phase": "D"}'],
         "cost_veh_s": {'{"phase": "B"}': 611.0, '{"phase": "D"}': 572.5}}
    """
    tellings = random.Random(f"{config.seed}/{state.id}")
    choices = random.Random(f"{config.seed}/{state.id}/{teacher}")
    controller = CONTROLLERS.get("max_pressure" if teacher == "given" else teacher)
    costs = state.costs_veh_s(reward_weights(config))
    rows = []
    for _ in range(num):
        told, order = retold(state.decision, tellings)
        if controller:
            action = act(state.decision, controller(state.decision).phase)
        elif soften:
            action = draw_cheap(costs, config.prepare.lookahead_temperature_veh_s, choices)
        else:
            action = min(costs, key=costs.__getitem__)
        texts = answer_texts(told)
        chat = dialect.messages(told, instructions=config.model.instructions)
        answer = {"role": "assistant", "content": texts[as_told(action, order)]}
        rows.append(
            {
                "id": state.id,
                "messages": [*chat, answer],
                "legal_answers": list(texts.values()),
                "cost_veh_s": {text: costs[in_world(a, order)] for a, text in texts.items()},
            }
        )
    return rows


def draw_cheap(costs: dict[Action, float], temperature_veh_s: float, rng: random.Random) -> Action:
    """An action drawn from softmax(-cost / temperature).

    Where all cost nearly the same, chance decides: to insist on the cheapest would teach
    noise, and leave nothing to explore.
    """
    least = min(costs.values())
    weights = [math.exp((least - cost) / temperature_veh_s) for cost in costs.values()]
    return rng.choices(list(costs), weights=weights)[0]
