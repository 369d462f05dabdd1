"""Answers: what may be said in each decision format, and what any text is taken for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from decision_case import JUNCTION, decision, lane, observation
from hypothesis import given
from hypothesis import strategies as st

from envs.answers import FORMATS, Parsed, act, answer_text, label, offered, options, parse
from envs.controllers import max_pressure
from envs.dialect import messages, observation_text
from envs.errors import UserError
from envs.naming import retold
from envs.scenario import RESCO_TIMINGS, load_scenario
from envs.types import Action, ParseFailure
from envs.world import World

NAMES = [phase.name for phase in JUNCTION.phases]
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)

legal_sets = st.sets(st.integers(0, 2), min_size=1).map(sorted)
asked = st.builds(
    lambda name, legal, current, rng: offered(
        retold(decision(observation(current=current), legal), rng)[0], name
    ),
    st.sampled_from(list(FORMATS)),
    legal_sets,
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)


@given(asked)
def test_everything_that_may_be_answered_parses_to_itself(question):
    assert options(question)
    for action in options(question):
        text = answer_text(question, action)
        assert parse(question, text) == Parsed(action=action, strict=True)
        assert parse(question, f"My answer: {text}!") == Parsed(action=action, strict=False)


@given(asked)
def test_options_are_legal_and_have_names_of_their_own(question):
    assert {action.phase for action in options(question)} == set(question.legal)
    names = [label(question, action) for action in options(question)]
    assert len(set(names)) == len(names)


@given(asked, st.text())
def test_any_text_is_a_legal_action_or_a_failure(question, completion):
    parsed = parse(question, completion)
    assert isinstance(parsed, ParseFailure) or parsed.action in options(question)


@given(asked)
def test_two_answers_are_none(question):
    texts = [answer_text(question, action) for action in options(question)]
    if len(texts) > 1:
        assert parse(question, texts[0] + texts[-1]).reason.startswith("more than one")


@given(asked)
def test_what_a_controller_does_may_be_answered(question):
    assert act(question, max_pressure(question).phase) in options(question)


@EVERY_FORMAT
def test_instructions_say_how_to_answer(name):
    question = offered(decision(observation()), name)
    system = messages(question)[0]["content"]
    assert FORMATS[name].asks in system
    example = "{" + system.rpartition("{")[2].removesuffix(".")
    assert (
        json.loads(example).keys() == json.loads(answer_text(question, options(question)[0])).keys()
    )


def test_the_format_decides_what_a_line_ends_with():
    seen = observation(current=1)
    ends = {
        name: [
            line.partition(" choose ")[2]
            for line in observation_text(offered(decision(seen), name)).splitlines()
        ]
        for name in FORMATS
    }
    assert ends == {
        "phase": ["A", "B", "C"],
        "phase_duration": ["A", "B", "C"],
        "extend": ["", "yes", "no"],
    }


# The running green goes on, or makes way


@pytest.mark.parametrize(
    ("legal", "current", "offers"),
    [
        ((0, 1, 2), 0, {"yes": 0, "no": 1}),
        ((0, 1, 2), 2, {"yes": 2, "no": 0}),
        ((0, 2), 0, {"yes": 0, "no": 2}),
        ((1,), 1, {"yes": 1}),
        ((0, 1), 2, {"no": 0}),
    ],
    ids=["the next", "around", "not what is illegal", "minimum green", "maximum green"],
)
def test_extend_offers_the_running_green_and_the_next_legal_one(legal, current, offers):
    question = offered(decision(observation(current=current), legal), "extend")
    assert {label(question, a): a.phase for a in options(question)} == offers


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ('{"extend": "maybe"}', "unknown extend"),
        ('{"extend": true}', "no extend"),
        ("yes or no", "more than one extend"),
        ('{"phase": "A"}', "no extend"),
    ],
)
def test_extend_is_yes_or_no(completion, reason):
    question = offered(decision(observation()), "extend")
    assert parse(question, completion) == ParseFailure(reason=reason)


# A phase and its duration


def test_durations_are_whole_decision_intervals():
    question = offered(decision(observation(), (1,)), "phase_duration")
    assert options(question) == tuple(Action(phase=1, hold_s=s) for s in (10, 20, 30, 40))
    quick = replace(question, timing=RESCO_TIMINGS["arterial4x4"])
    assert [action.hold_s for action in options(quick)] == [5, 10, 15, 20]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ('{"phase": "A", "duration": 25}', "unknown duration"),
        ('{"phase": "A"}', "no duration"),
        ('{"phase": "A", "duration": "20"}', "unknown duration"),
        ('{"duration": 20}', "no phase"),
        ("A for 20 or 30 s", "more than one duration"),
        ("A for 25 or 20 s", "more than one duration"),
        ("A -20", "no duration"),
        ("A " + "1" * 5000, "no duration"),
        ('{"phase": "B", "duration": 20}', "phase not legal now"),
    ],
)
def test_a_duration_is_one_of_those_offered(completion, reason):
    question = offered(decision(observation(), (0, 2)), "phase_duration")
    assert parse(question, completion) == ParseFailure(reason=reason)


@pytest.mark.parametrize("completion", ["A, 20s", "20 seconds of A.", "phase A, duration: 20."])
def test_a_recognisable_duration_is_partial(completion):
    question = offered(decision(observation()), "phase_duration")
    parsed = parse(question, completion)
    assert parsed == Parsed(action=Action(phase=0, hold_s=20), strict=False)


def test_what_may_not_be_answered_has_no_answer():
    question = offered(decision(observation()), "phase_duration")
    with pytest.raises(ValueError, match="may not be answered"):
        answer_text(question, Action(phase=0))


def test_keys_in_another_order_are_partial():
    question = offered(decision(observation()), "phase_duration")
    parsed = parse(question, '{"duration": 20, "phase": "B"}')
    assert parsed == Parsed(action=Action(phase=1, hold_s=20), strict=False)


@pytest.mark.parametrize(
    ("queue", "current", "hold_s"),
    [(0, 0, 10), (5, 0, 10), (6, 0, 20), (18, 0, 40), (60, 0, 40), (3, 1, 10), (5, 1, 20)],
)
def test_a_controller_holds_as_long_as_its_queue_and_the_yellow_need(queue, current, hold_s):
    question = offered(decision(observation(lane(queue), current=current)), "phase_duration")
    assert act(question, 0) == Action(phase=0, hold_s=hold_s)


def hold(world, scenario, hold_s):
    """Settle the longest queue's green; what may be chosen at the next instants, and when."""
    world.reset(scenario, seed=1)
    world.drive("max_wave", scenario.begin_s + 200)
    decision = max(world.decisions(), key=lambda d: (len(d.legal), d.junction.tls_id))
    tls_id, lanes = decision.junction.tls_id, decision.observation.lanes
    queues = [sum(lanes[i].queue_veh for i in p.lanes) for p in decision.junction.phases]
    others = [i for i in decision.legal if i != decision.observation.current]
    chosen = max(others, key=lambda i: queues[i])
    begin_s, _ = world.time()
    world.step({tls_id: Action(phase=chosen, hold_s=hold_s)})
    seen = []
    for _ in range(6):
        now_s, _ = world.time()
        [here] = [d for d in world.decisions() if d.junction.tls_id == tls_id]
        assert here.observation.current == chosen or chosen not in seen[-1][1]
        seen.append((now_s - begin_s, here.legal))
        world.step({})
    return chosen, seen


@pytest.mark.parametrize("scenario", ["generated:4", "resco:cologne1"])
def test_a_settled_green_stays_until_its_time_is_over(scenario):
    city = load_scenario(scenario)
    interval_s = city.timing.decision_interval_s
    with World() as world:
        chosen, seen = hold(world, city, 3 * interval_s)
    assert [legal for after_s, legal in seen if after_s < 3 * interval_s] == [(chosen,)] * 2
    assert len(dict(seen)[3 * interval_s]) > 1


def test_maximum_green_ends_what_was_settled():
    city = load_scenario("resco:cologne1")
    timing = replace(city.timing, max_green_s=15)
    with World() as world:
        chosen, seen = hold(world, replace(city, timing=timing), 60)
    assert dict(seen)[10.0] == (chosen,)
    assert chosen not in dict(seen)[20.0]


def test_what_is_settled_is_not_settled_anew_before_its_time():
    city = load_scenario("resco:cologne1")
    with World() as world:
        world.reset(city, seed=1)
        world.drive("max_wave", city.begin_s + 200)
        [decision] = world.decisions()
        tls_id, current = decision.junction.tls_id, decision.observation.current
        for _ in range(3):
            world.step({tls_id: Action(phase=current, hold_s=20)})
        assert len(world.decisions()[0].legal) == 1  # the third began another 20 s
        world.step({tls_id: Action(phase=current)})
        assert len(world.decisions()[0].legal) > 1


def test_nothing_is_settled_for_less_than_no_time():
    city = load_scenario("generated:1")
    with World() as world:
        world.reset(city, seed=1)
        tls_id = world.decisions()[0].junction.tls_id
        with pytest.raises(UserError, match="cannot be held for -10 s"):
            world.step({tls_id: Action(phase=0, hold_s=-10)})


@EVERY_FORMAT
def test_the_branch_of_any_answer_is_what_then_happens(name):
    city = load_scenario("generated:3")
    with World() as world:
        for number in range(3):
            world.reset(city, seed=number)
            world.drive("max_pressure", city.begin_s + 300)
            question = offered(world.decisions()[0], name)
            tries = [{question.junction.tls_id: action} for action in options(question)]
            outcomes = world.branch(tries, 60.0)
            chosen = (number * 5 + 1) % len(tries)
            assert world.play(tries[chosen], 60.0, "max_wave") == outcomes[chosen]


# The next phase


@pytest.mark.parametrize(
    "completion",
    ['{"phase": "B", "why": "queue"}', "B", "I take B.", "phase B, surely B", '[["phase", "B"]]'],
)
def test_a_recognisable_phase_is_partial(completion):
    assert parse(decision(observation()), completion) == Parsed(
        action=Action(phase=1), strict=False
    )


@given(
    pair=st.permutations(NAMES).map(lambda names: names[:2]),
    form=st.sampled_from(
        [
            "{} or {}",
            '{{"phase": "{}"}}{{"phase": "{}"}}',
            '{{"phase": "{}", "phase": "{}"}}',
            '{{"phase": ["{}", "{}"]}}',
            '{{"phase": "{}"}} {}',
        ]
    ),
)
def test_naming_two_phases_is_a_failure(pair, form):
    failure = parse(decision(observation()), form.format(*pair))
    assert failure == ParseFailure(reason="more than one phase")


@given(legal=legal_sets, name=st.sampled_from(NAMES))
def test_a_phase_that_is_not_legal_is_a_failure(legal, name):
    for completion in (json.dumps({"phase": name}), f"phase {name}"):
        parsed = parse(decision(observation(), legal), completion)
        if NAMES.index(name) in legal:
            assert isinstance(parsed, Parsed)
        else:
            assert parsed == ParseFailure(reason="phase not legal now")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "no phase"),
        ('{"phase": "Z"}', "unknown phase"),
        ('{"phase": "b"}', "unknown phase"),
        ('{"phase": 1}', "unknown phase"),
        ("null", "no phase"),
        ("[" * 100_000, "no phase"),
    ],
)
def test_no_phase_is_a_failure_with_its_reason(completion, reason):
    assert parse(decision(observation()), completion) == ParseFailure(reason=reason)
