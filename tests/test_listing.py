from __future__ import annotations

from rich.console import Console

from rl_ft.listing import list_recipes, list_scenarios, show_scenario


def shown(show, *arguments):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, *arguments)
    return console.export_text()


def test_a_generated_scenario_shows_its_phases_and_what_a_model_reads():
    text = shown(show_scenario, "generated:7")
    assert "generated:7: generated" in text
    assert "phase" in text
    assert "what a model reads at 300 s" in text


def test_lists_name_everything_that_ships():
    assert "resco:<map>" in shown(list_scenarios)
    assert "tiny-cpu" in shown(list_recipes)
