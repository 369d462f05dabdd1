"""Small datasets from a real simulation, for tests and for a look at the formats.

Writes three files that any trainer reads, and beside them `data/`, which `rl-ft` trains from
(`--set prepare.dataset=OUT/data`). The same seed gives the same bytes.

    python scripts/prepare_test_data.py [--grpo-rows 50] [--sft-rows 20] [--seed 1] [--out DIR]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import get_args

from envs.types import DecisionFormat
from rl_ft.dataset import write_dataset
from rl_ft.recipe import load_config
from rl_ft.states import collect_states

COPIES = {
    "small_grpo_dataset.json": "grpo.json",
    "small_sft_dataset.json": "sft_max_pressure.json",
    "small_sft_dataset.jsonl": "sft_max_pressure.jsonl",
}


def main() -> None:
    """Simulate, write, and say what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grpo-rows", type=int, default=50)
    parser.add_argument("--sft-rows", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", choices=get_args(DecisionFormat), default="phase")
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/testdata"))
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out {arguments.out} is not empty; remove it or name another folder")
    if not 0 < arguments.sft_rows <= arguments.grpo_rows:
        parser.error("--sft-rows must be from 1 to --grpo-rows: both tell the same states")
    config = load_config(
        "small-scale",
        [
            f"prepare.num_states={arguments.grpo_rows}",
            f"prepare.num_lesson_states={arguments.sft_rows}",
            f"decision_format={arguments.format}",
        ],
        seed=arguments.seed,
    )
    data = arguments.out / "data"
    write_dataset(data, collect_states(config), config.prepare.num_eval_states, config)
    for name, source in COPIES.items():
        shutil.copyfile(data / source, arguments.out / name)
    print(f"{arguments.out}: {arguments.grpo_rows} GRPO rows, {arguments.sft_rows} SFT rows")


if __name__ == "__main__":
    main()
