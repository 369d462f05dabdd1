"""What is exported: that it is the run's own model, says how it is used, and appears whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from grpo_case import ragged_groups
from lesson_case import write_rows

from envs.errors import UserError
from envs.scenario import load_scenario
from rl_ft import export
from rl_ft.adapter import factors_between
from rl_ft.export import export_run, find_trained
from rl_ft.prepare import prepare_model
from rl_ft.recipe import load_config
from rl_ft.run_folder import RunFolder
from rl_ft.snapshots import Snapshots, is_averaged
from rl_ft.weights import digest, largest_difference, read_folder, save_folder

START = "max_pressure"
RANK = 2
SMALL = ("grpo.max_steps=3", "grpo.average_from=0.6", "grpo.learning_rate=0.02")


def reinforce(folder: RunFolder) -> None:
    """GRPO on invented groups, up to the model that `train_grpo` would leave."""
    from rl_ft.learner import build_trainer, load_model

    config, kept = folder.config, Snapshots(folder.path("snapshots"))
    model, tokenizer = load_model(folder.path("sft", START), config)

    def publish(state, version):
        if is_averaged(version, config.grpo):
            kept.add(version, state)

    build_trainer(
        model=model,
        tokenizer=tokenizer,
        config=config,
        output_dir=folder.path("checkpoints"),
        fetch=lambda step: ragged_groups(4, seed=step),
        publish=publish,
        on_metrics=lambda step, values: None,
        num_groups=4,
    ).train()
    target = folder.path("grpo", START, "model")
    save_folder(kept.mean(), folder.path("sft", START), target)
    folder.mark_done(f"grpo/{START}")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    """A run that trained adapters, the supervised start and the mean of two versions after it."""
    from rl_ft.sft import fit_teacher, teacher_jobs

    config = load_config("smoke", [*SMALL, f"model.lora={{r: {RANK}}}", "sft.num_train_epochs=1"])
    folder = RunFolder.create(tmp_path_factory.mktemp("lora") / "run", config, resume=False)
    prepare_model(config, folder.path("model"))
    for name in ("sft", "eval"):
        write_rows(folder.path("data", f"{name}_{START}.jsonl"), num=16)
    (job,) = teacher_jobs(config, folder)
    fit_teacher(config, job, on_metrics=lambda step, values: None)
    reinforce(folder)
    folder.finish("finished")
    return folder.root


@pytest.fixture(scope="module")
def full_run(lora_run, tmp_path_factory) -> Path:
    """The same models from a run that trained all parameters."""
    root = tmp_path_factory.mktemp("full") / "run"
    shutil.copytree(lora_run, root)
    text = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(re.sub(r"  lora:\n(    .*\n)+", "  lora: null\n", text))
    return root


def exported(run, form, out, **changes):
    settings = {"form": form, "start": None, "out": out, "scenarios": (), "seeds": 0}
    return export_run(run, **{**settings, **changes})


@pytest.fixture(scope="module")
def adapter(lora_run, tmp_path_factory) -> Path:
    return exported(lora_run, "adapter", tmp_path_factory.mktemp("out") / "adapter")


@pytest.fixture(scope="module")
def merged(full_run, tmp_path_factory) -> Path:
    return exported(full_run, "merged", tmp_path_factory.mktemp("out") / "merged")


def facts(folder):
    return json.loads((folder / "export.json").read_text())


# ---- the whole model


def test_a_merged_export_has_the_weights_of_the_run_to_the_last_bit(full_run, merged):
    assert digest(read_folder(merged)) == digest(read_folder(full_run / "grpo" / START / "model"))
    assert facts(merged)["comparison"]["largest_weight_difference"] == 0.0


def test_an_export_says_how_it_is_asked(merged, adapter):
    for folder in (merged, adapter):
        question = json.loads((folder / "question.json").read_text())
        assert question == {"decision_format": "phase", "instructions": False}


def test_an_export_says_where_it_comes_from(full_run, merged):
    found = facts(merged)
    assert (found["run"], found["start"]) == (str(full_run), START)
    assert (found["recipe"], found["seed"], found["format"]) == ("smoke", 1, "merged")
    commit = json.loads((full_run / "manifest.json").read_text())["starts"][-1]["git_commit"]
    assert found["git_commit"] == commit


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_code_of_the_card_asks_the_exported_model(form, request, monkeypatch, capsys):
    folder = request.getfixturevalue(form)
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.S | re.M)
    row = json.loads((Path(facts(folder)["run"]) / "data" / f"sft_{START}.jsonl").open().readline())
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    assert names["messages"] == row["messages"][:-1]
    assert names["answer"].shape[1] > names["chat"]["input_ids"].shape[1]
    answer = names["answer"][0, names["chat"]["input_ids"].shape[1] :]
    said = names["tokenizer"].decode(answer, skip_special_tokens=True)
    assert capsys.readouterr().out == said + "\n"


def test_without_a_place_of_its_own_an_export_lies_in_the_run(full_run):
    place = exported(full_run, "merged", None)
    assert place == full_run / "export" / f"{START}-merged"
    assert (place / "export.json").is_file()


def test_a_run_of_an_earlier_version_of_the_settings_can_be_exported(full_run, tmp_path):
    shutil.copytree(full_run, tmp_path / "run")
    changed(tmp_path / "run" / ".done" / f"grpo.{START}", config_hash="other")
    assert exported(tmp_path / "run", "merged", tmp_path / "out").is_dir()


def test_the_commit_is_that_which_trained_whatever_went_on_with_the_run_later(full_run, tmp_path):
    manifest = json.loads((full_run / "manifest.json").read_text())
    later = manifest["starts"][-1] | {"start": "2999-01-01T00:00:00+00:00", "git_commit": "later"}
    shutil.copytree(full_run, tmp_path / "run")
    changed(tmp_path / "run" / "manifest.json", starts=[*manifest["starts"], later])
    out = exported(tmp_path / "run", "merged", tmp_path / "out")
    said = json.loads((out / "export.json").read_text())["git_commit"]
    assert said == manifest["starts"][-1]["git_commit"]


def changed(file, **content):
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


# ---- the adapter


def test_an_adapter_on_the_base_that_it_names_is_the_model_of_the_run(lora_run, adapter):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits
        left = AutoModelForCausalLM.from_pretrained(lora_run / "grpo" / START / "model")(ids).logits
        began = AutoModelForCausalLM.from_pretrained(lora_run / "model")(ids).logits
    torch.testing.assert_close(adapted, left, atol=1e-4, rtol=1e-4)
    assert (began - left).abs().max() > 0.01


def test_an_adapter_names_the_model_that_the_run_began_with(lora_run, adapter):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(lora_run / "model")


def test_an_adapter_has_the_ranks_of_the_start_and_of_every_averaged_version(adapter):
    assert facts(adapter)["rank"] == RANK * (1 + 2)


def test_an_adapter_is_compared_after_it_was_read_again(lora_run, adapter):
    weights = read_folder(lora_run / "grpo" / START / "model")
    largest = max(tensor.abs().max().item() for tensor in weights.values())
    assert 0.0 < facts(adapter)["comparison"]["largest_weight_difference"] < 1e-6 * largest


def test_an_adapter_comes_with_its_tokenizer_and_without_weights_of_a_model(adapter):
    names = {file.name for file in adapter.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not names & {"model.safetensors", "config.json"}


def test_a_run_that_trained_all_parameters_has_no_adapter(full_run, tmp_path):
    with pytest.raises(UserError, match=r"trained all parameters.*--format merged"):
        exported(full_run, "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def low_rank(rank, shape=(24, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, rank, generator=generator) for n in shape]
    return 0.05 * draw[0] @ draw[1].T


def models(*changes, dtype=torch.float32):
    """A base and what the mean of some changes makes of it."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.q_proj.weight": (24, 16), "b.q_proj.weight": (24, 16), "norm.weight": (16,)}
    base = {n: torch.randn(*shape, generator=generator).to(dtype) for n, shape in shapes.items()}
    trained = base | {"a.q_proj.weight": (base["a.q_proj.weight"] + sum(changes)).to(dtype)}
    return base, trained


def test_changes_of_several_ranks_add_up_to_one_adapter():
    base, trained = models(low_rank(2), low_rank(3, seed=5))
    factors = factors_between(base, trained, max_rank=10)
    b, a = factors["a.q_proj"]
    assert (b.shape, a.shape) == ((24, 5), (5, 16))
    torch.testing.assert_close(base["a.q_proj.weight"] + b @ a, trained["a.q_proj.weight"])


def test_modules_of_a_kind_that_did_not_change_add_nothing():
    factors = factors_between(*models(low_rank(2)), max_rank=2)
    b, a = factors["b.q_proj"]
    assert factors.keys() == {"a.q_proj", "b.q_proj"}
    assert not (b @ a).any()


def test_an_adapter_of_rounded_weights_is_right_to_their_rounding():
    base, trained = models(low_rank(2), dtype=torch.bfloat16)
    b, a = factors_between(base, trained, max_rank=2)["a.q_proj"]
    again = (base["a.q_proj.weight"].float() + b @ a).bfloat16()
    assert (again - trained["a.q_proj.weight"]).abs().max() <= 2**-7 * trained[
        "a.q_proj.weight"
    ].abs().max()


def test_a_change_of_a_higher_rank_is_refused():
    with pytest.raises(UserError, match=r"change of a\.q_proj\.weight is no adapter of rank 4"):
        factors_between(*models(low_rank(5)), max_rank=4)


@pytest.mark.parametrize("name", ["norm.weight", "model.embed_tokens.weight"])
def test_what_no_adapter_of_matrices_holds_is_refused(name):
    base, trained = models(low_rank(2))
    base.setdefault(name, torch.ones(3, 4))
    trained[name] = base[name] + 1
    with pytest.raises(UserError, match=f"{name} was trained"):
        factors_between(base, trained, max_rank=4)


def test_models_that_are_equal_have_no_adapter_between_them():
    base, _ = models(low_rank(1))
    with pytest.raises(UserError, match="equals the one"):
        factors_between(base, dict(base), max_rank=4)


def test_the_largest_difference_is_over_all_tensors():
    base, trained = models(torch.full((24, 16), 0.5))
    assert largest_difference(base, trained) == pytest.approx(0.5)
    assert largest_difference(base, base) == 0.0


# ---- GGUF


def test_gguf_is_refused_with_what_works_instead(full_run, tmp_path):
    with pytest.raises(UserError, match=r"BPE pre-tokenizer was not recognized.*--format merged"):
        exported(full_run, "gguf", tmp_path / "out")
    config = (full_run / "config.yaml").read_text()
    shutil.copytree(full_run, tmp_path / "run")
    text = config.replace("name_or_path: tiny", "name_or_path: /models/some")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"--format merged.*convert_hf_to_gguf.py DIR"):
        exported(tmp_path / "run", "gguf", tmp_path / "out")
    assert [place.name for place in tmp_path.iterdir()] == ["run"]


# ---- what cannot be exported


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        find_trained(tmp_path, None)


def test_a_model_folder_needs_no_export(full_run):
    with pytest.raises(UserError, match="model folder, which transformers and vLLM load as it is"):
        find_trained(full_run / "grpo" / START / "model", None)


def test_a_start_that_is_not_trained_to_the_end_is_refused(run_folder):
    with pytest.raises(UserError, match=r"grpo of max_pressure is not done .* --resume"):
        find_trained(run_folder.root, None)


def test_a_start_that_the_run_does_not_have_is_refused(full_run):
    with pytest.raises(UserError, match=r"--start lookahead: .* reinforces max_pressure"):
        find_trained(full_run, "lookahead")


def test_of_several_starts_one_must_be_chosen(tmp_path):
    config = load_config("smoke", ["prepare.teachers=[max_pressure, lookahead]"])
    folder = RunFolder.create(tmp_path / "run", config, resume=False)
    folder.mark_done("grpo/lookahead")
    folder.finish("finished")
    with pytest.raises(UserError, match="max_pressure and lookahead: choose one with --start"):
        find_trained(folder.root, None)
    assert find_trained(folder.root, "lookahead").start == "lookahead"


def test_a_form_that_does_not_exist_is_refused(full_run, tmp_path):
    with pytest.raises(UserError, match="did you mean adapter"):
        exported(full_run, "adaptor", tmp_path / "out")


def test_a_place_that_is_taken_stays_as_it_is(full_run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        exported(full_run, "merged", tmp_path / "taken")
    with pytest.raises(UserError, match="is a file"):
        exported(full_run, "merged", tmp_path / "taken" / "notes")
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["notes"]


def test_an_export_that_fails_leaves_nothing(full_run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(full_run, "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- on the road


@pytest.fixture(scope="module")
def short_city(tmp_path_factory) -> str:
    """A city with five minutes of traffic."""
    city, place = load_scenario("generated:1"), tmp_path_factory.mktemp("city")
    files = f"<net-file value='{city.net_file}'/><route-files value='{city.route_files[0]}'/>"
    (place / "city.sumocfg").write_text(
        f"<configuration><input>{files}</input><time><end value='300'/></time></configuration>"
    )
    return str(place / "city.sumocfg")


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_adapter_drives_beside_the_model_of_the_run(lora_run, short_city, tmp_path, capsys):
    out = exported(lora_run, "adapter", tmp_path / "out", scenarios=[short_city], seeds=2)
    found = facts(out)["comparison"]
    assert [(r["policy"], r["seed"], r["decisions"] > 0) for r in found["rows"]] == [
        (policy, seed, True) for policy in ("export", "run") for seed in (1, 2)
    ]
    (difference,) = found["differences"]
    assert difference["n"] == 2
    assert "differences to run" in capsys.readouterr().out
    assert [place.name for place in tmp_path.iterdir()] == ["out"]
