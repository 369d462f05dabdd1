"""What a run trained, as a folder for others: the whole model, or an adapter of the one before it.

The folder is read again, and what it holds is driven beside the run's own model: `export.json` says
how far they are apart. Nothing else of a run is written to.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

from envs.answers import FORMATS
from envs.errors import UserError
from envs.scenario import expand
from rl_ft.config import Config
from rl_ft.question import write_question
from rl_ft.recipe import nearest, read_config
from rl_ft.run_folder import RunFolder, appearing, write_atomically
from rl_ft.snapshots import is_averaged

log = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors*", "sft.json")
"""What a model folder has beside the tokenizer and the question."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank."""
RUN, EXPORT = "run", "export"
"""The two policies that are compared."""
LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")"""
LOAD_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoPeftModelForCausalLM.from_pretrained(".")"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A start that a run has reinforced to the end."""

    folder: RunFolder
    start: str

    @property
    def config(self) -> Config:
        """What the run was told."""
        return self.folder.config

    @property
    def base(self) -> Path:
        """The model that the run began with, before any training."""
        return self.folder.root / "model"

    @property
    def model(self) -> Path:
        """The model that the run left."""
        return self.folder.root / "grpo" / self.start / "model"


def export_run(
    run: Path,
    *,
    form: str,
    start: str | None,
    out: Path | None,
    scenarios: Sequence[str],
    seeds: int,
) -> Path:
    """Write one start of a run to `out` (default: `export/<start>-<form>` in the run).

    `out` appears whole or not at all, after the comparison on `scenarios` (default: the first that
    the run is judged on) with simulation seeds 1..`seeds`; 0 seeds compare the weights only.

    Raises:
        UserError: nothing trained is there, `out` is taken, or the form does not fit the run.
    """
    if form not in FORMS:
        known = ", ".join(FORMS)
        raise UserError(f"--format {form}: expected one of {known}{nearest(form, FORMS)}")
    trained = find_trained(run, start)
    target = out or run / "export" / f"{trained.start}-{form}"
    _require_free(target)
    with appearing(target.absolute()) as folder:
        facts = _facts(trained, form)
        facts |= FORMS[form](trained, folder)
        write_question(folder, trained.config)
        with _as_model(trained, folder) as model:
            facts["comparison"] = _compare(trained, model, scenarios, seeds)
        write_atomically(folder / "export.json", json.dumps(facts, indent=2) + "\n")
        write_atomically(folder / "README.md", _card(trained, facts))
    log.info("exported to %s", target)
    return target


def find_trained(run: Path, start: str | None) -> Trained:
    """The start of that name in a run folder, or the only one.

    Raises:
        UserError: no run, no such start, more than one to choose from, or not trained to the end.
    """
    if not (run / "config.yaml").is_file():
        hint = ""
        if (run / "config.json").is_file():
            hint = "; it is a model folder, which transformers and vLLM load as it is"
        raise UserError(f"--run {run} is not the folder of a run: no config.yaml in it{hint}")
    config = read_config(run / "config.yaml")
    starts = config.prepare.teachers
    if start is None and len(starts) > 1:
        raise UserError(f"{run} reinforces {' and '.join(starts)}: choose one with --start")
    start = start or starts[0]
    if start not in starts:
        raise UserError(f"--start {start}: {run} reinforces {', '.join(starts)}")
    folder = RunFolder(root=run.absolute(), config=config)
    if not folder.is_marked(f"grpo/{start}"):
        raise UserError(
            f"grpo of {start} is not done in {run}: go on with `rl-ft run --out {run} --resume`"
        )
    return Trained(folder=folder, start=start)


def _write_merged(trained: Trained, folder: Path) -> dict[str, Any]:
    shutil.copytree(trained.model, folder, dirs_exist_ok=True)
    return {}


def _write_adapter(trained: Trained, folder: Path) -> dict[str, Any]:
    from rl_ft.adapter import factors_between, save_adapter
    from rl_ft.weights import read_folder

    lora = trained.config.model.lora
    if lora is None:
        raise UserError(
            "--format adapter: the run trained all parameters (model.lora is null), which is no "
            "adapter; --format merged writes the whole model"
        )
    grpo = trained.config.grpo
    steps = range(grpo.max_steps + 1)
    num_averaged = sum(is_averaged(v, grpo) or v == grpo.max_steps for v in steps)
    # One adapter of the supervised start, one of each version whose mean may be left.
    max_rank = lora.r * (1 + num_averaged)
    factors = factors_between(
        read_folder(trained.base), read_folder(trained.model), max_rank=max_rank
    )
    shutil.copytree(
        trained.model, folder, ignore=shutil.ignore_patterns(*MODEL_FILES), dirs_exist_ok=True
    )
    rank = save_adapter(factors, trained.base, folder)
    return {"base": str(trained.base), "rank": rank}


def _write_gguf(trained: Trained, folder: Path) -> dict[str, Any]:
    """Never: a file that nothing here can drive would be exported unseen."""
    if trained.config.model.name_or_path == "tiny":
        raise UserError(
            "--format gguf: llama.cpp has the tokenizers that it knows built in, and that of the "
            "from-scratch model is none of them (its converter ends with 'BPE pre-tokenizer was "
            "not recognized'); --format merged is for transformers and vLLM"
        )
    raise UserError(
        "--format gguf: no converter is kept on PyPI by llama.cpp's makers, and vLLM on a CPU "
        "drives no GGUF to compare with; use --format merged --out DIR, then llama.cpp's own "
        "`python convert_hf_to_gguf.py DIR --outfile model.gguf`"
    )


FORMS: Mapping[str, Callable[[Trained, Path], dict[str, Any]]] = {
    "merged": _write_merged,
    "adapter": _write_adapter,
    "gguf": _write_gguf,
}
"""By name what writes it into an empty folder and returns what is to be known of it."""


def _require_free(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target} is a file; expected a folder or a new name")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"--out {target} is not empty; give another --out")


@contextmanager
def _as_model(trained: Trained, folder: Path) -> Iterator[Path]:
    """A model folder with what was exported, for what drives whole models only."""
    if not (folder / "adapter_config.json").is_file():
        yield folder
        return
    from rl_ft.adapter import merged_with
    from rl_ft.learner import load_model
    from rl_ft.weights import save_folder

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    # Beside the export: samplers on other machines see that disk.
    with TemporaryDirectory(dir=folder.parent, prefix=".merged-") as place:
        model, _ = load_model(base, trained.config)
        save_folder(merged_with(model, folder), trained.model, Path(place, "model"))
        yield Path(place, "model")


def _compare(
    trained: Trained, exported: Path, scenarios: Sequence[str], seeds: int
) -> dict[str, Any]:
    """How far a model folder is from the one in the run, in its weights and on the road."""
    from rl_ft.weights import largest_difference, read_folder

    far = largest_difference(read_folder(exported), read_folder(trained.model))
    log.info("largest difference of a weight to the model in the run: %.1e", far)
    found: dict[str, Any] = {"largest_weight_difference": far, "seeds": seeds}
    if not seeds:
        return found
    from rl_ft.evaluate import evaluate, print_table

    names = expand(scenarios) if scenarios else expand(trained.config.scenarios.held_out)[:1]
    results = evaluate(
        trained.config,
        controllers=(),
        models={RUN: trained.model, EXPORT: exported},
        splits=dict.fromkeys(names, "held_out"),
        seeds=seeds,
        baseline=RUN,
        versus={},
    )
    print_table(results)
    by_policy = [
        [{**row, "policy": None} for row in results["rows"] if row["policy"] == policy]
        for policy in (RUN, EXPORT)
    ]
    equal = sum(one == other for one, other in zip(*by_policy, strict=True))
    log.info("%d of %d episodes are the same in every figure", equal, len(by_policy[0]))
    return found | {
        "equal_episodes": equal,
        "differences": results["comparisons"],
        "rows": results["rows"],
    }


def _facts(trained: Trained, form: str) -> dict[str, Any]:
    """Where an export comes from."""
    manifest = json.loads((trained.folder.root / "manifest.json").read_text(encoding="utf-8"))
    return {
        "format": form,
        "run": str(trained.folder.root),
        "start": trained.start,
        "recipe": trained.config.recipe,
        "seed": trained.config.seed,
        "git_commit": _trained_at(trained, manifest["starts"]),
        "decision_format": trained.config.decision_format,
    }


def _trained_at(trained: Trained, starts: Sequence[Mapping[str, Any]]) -> str:
    """Commit of the last command in the run that began before the model was finished."""
    finished = trained.folder.finished(f"grpo/{trained.start}")
    before = [start for start in starts if start["start"] <= finished]
    return (before or starts)[-1]["git_commit"] or "unknown"


def _card(trained: Trained, facts: Mapping[str, Any]) -> str:
    """What a person needs to load the folder and to ask."""
    lessons = trained.folder.root / "data" / f"sft_{trained.start}.jsonl"
    with lessons.open(encoding="utf-8") as lines:
        chat = json.loads(next(lines))["messages"]
    is_adapter, rank = facts["format"] == "adapter", facts.get("rank", 0)
    text = (resources.files("rl_ft") / "templates" / "card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        facts,
        library="peft" if is_adapter else "transformers",
        what=f"A LoRA adapter of rank {rank} for `{facts['base']}`"
        if is_adapter
        else "A whole model",
        load=LOAD_ADAPTER if is_adapter else LOAD_MODEL,
        serve=(
            f"vllm serve {facts['base']} --enable-lora --lora-modules policy=. \\\n"
            f"    --max-lora-rank {next((r for r in VLLM_RANKS if r >= rank), rank)}"
            if is_adapter
            else "vllm serve ."
        ),
        asks=FORMATS[trained.config.decision_format].asks,
        messages=json.dumps([message for message in chat if message["role"] != "assistant"]),
        max_tokens=trained.config.grpo.max_completion_length,
    )
