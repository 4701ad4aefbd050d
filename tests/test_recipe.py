"""Each validator of recipes: one change to a recipe that is right, and the only line that is then said."""

import hashlib
import json
import logging
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.agent import Agent
from dmr_pipeline.recipe.fields import Section
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.recipe.reading import RECIPE_FOLDER, check_recipe, load_recipe, recipe_names
from dmr_pipeline.recipe.text import read_mapping
from tests.helpers.bad_recipes import (
    AGENT_ALONE,
    ALFWORLD,
    ARCHITECTURE,
    AUTO,
    BEHAVIOUR,
    MIXED,
    MODEL,
    OTHERS,
    G,
    K,
    P,
    T,
)
from tests.helpers.fake_project import RECIPE_YAML, REPOSITORY
from tests.helpers.recipes import BAD_NAMES, TEXTS, content


def problems(folder: Path, base: str, changes: dict[str, object]) -> list[str]:
    (folder / "x.yaml").write_text(yaml.safe_dump(content(base, changes), allow_unicode=True))
    recipe, found = check_recipe("x", folder)
    assert (recipe is None) == bool(found)
    return found


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [pytest.param("alfworld-tiny", changes, said, id=name) for name, changes, said in ALFWORLD]
    + [pytest.param(base, changes, said, id=f"{base}-{name}") for base, name, changes, said in OTHERS],
)
def test_what_would_fail_later_is_refused_in_one_line(
    tmp_path: Path, base: str, changes: dict[str, object], said: str
) -> None:
    (problem,) = problems(tmp_path, base, changes)
    assert problem.startswith(f"{tmp_path}/x.yaml: {said}")
    assert problem.isprintable()
    with pytest.raises(UserError, match=re.escape(said)):
        load_recipe("x", tmp_path)


@pytest.mark.parametrize(
    ("changes", "path", "value"),
    [
        ({T + "learning_rate": 1}, "agent.training.learning_rate", 1.0),
        ({K + "seed": 2**32 - 1}, "kl_router.seed", 2**32 - 1),
        ({P + "ladder.4.keep_float": ["lm_head", "*.layers.[07].*"]}, "precisions.ladder.4.keep_float.1", "*.layers.[07].*"),
        ({T + "dagger_from": 1000}, "agent.training.dagger_from", 1000),
        ({G + "cost_weight": 1.5, G + "reward": "difference"}, "grpo_router.cost_weight", 1.5),
        (AGENT_ALONE | {MODEL + ".probe.layers": [36]}, "kl_router.model.probe.layers.0", 36),
        (AGENT_ALONE | {P + "ladder.4.keep_float": ["*.q"]}, "precisions.ladder.4.keep_float.0", "*.q"),
        ({"benchmark.splits.validation": 150}, "precisions.kl_episodes", 50),
        (
            {P + "ladder.0.name": "high", P + "route.0": "high", BEHAVIOUR: [MIXED | {"shares": {"high": 1}}]},
            "precisions.route.0", "high",
        ),
        ({P + "route": ["float", "int4", "int2"]}, "precisions.route.1", "int4"),
        ({P + "route": ["float", "int8", "int4", "int2-mse", "int2"]}, "precisions.route.4", "int2"),
        (
            {P + "route": ["float", "int4", "int2"], BEHAVIOUR + ".2.shares": {"int4": 0.1, "float": 0.7, "int2": 0.2}},
            BEHAVIOUR + ".2.shares.int4", 0.1,
        ),
        ({BEHAVIOUR + ".1.shares": {"float": 0, "int2": 1}}, BEHAVIOUR + ".1.shares.float", 0.0),
        (AUTO, "precisions.route", "auto"),
        ({P + "speculative": {"draft_tokens": 4}}, "precisions.speculative.draft_tokens", 4),
        (AUTO | {P + "pair": ["float", "int4"]}, "precisions.pair.1", "int4"),
        ({"versioning.remote": "s3-store.eu"}, "versioning.remote", "s3-store.eu"),
        ({"evaluation.bootstrap": 40}, "evaluation.bootstrap", 40),
    ],
)  # fmt: skip
def test_what_is_right_is_taken(tmp_path: Path, changes: dict[str, object], path: str, value: object) -> None:
    assert problems(tmp_path, "alfworld-tiny", changes) == []
    at: Any = load_recipe("x", tmp_path).model_dump()
    for part in path.split("."):
        at = at[int(part) if part.isdigit() else part]
    assert at == value
    assert type(at) is type(value)


DUMPS = {
    "alfworld-smollm2": "ac65ada41a6d",
    "alfworld-tiny": "8a444d343dff",
    "alfworld-tiny-official": "fccd760a556b",
    "webshop-smollm2": "9dc2f90888fc",
    "webshop-tiny": "e07b5225508d",
    "webshop-tiny-official": "181ecb0c3389",
}
"""SHA-256 of what agents that lie in Git were made from; a new field is left out where it is not set."""


@pytest.mark.parametrize("name", DUMPS)
def test_committed_recipes_stay_what_published_artifacts_were_made_from(name: str) -> None:
    dump = load_recipe(name, REPOSITORY / RECIPE_FOLDER).model_dump(mode="json", include={"benchmark", "agent"})
    assert hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest().startswith(DUMPS[name])


def test_all_problems_are_named_at_once_and_commands_name_the_first(tmp_path: Path) -> None:
    changes = {
        T + "updates": "1000", "sensitivity.label_share": [0.5, 0.2], P + "route": ["float", "float"], "evaluation.bootstrap": 1,
        "grpo_router.lerning_rate": 1, K + "validation_games": 500, "benchmark.splits.validation": 100,
    }  # fmt: skip
    found = problems(tmp_path, "alfworld-tiny", changes)
    wanted = [
        "grpo_router.lerning_rate: Extra inputs are not permitted",
        "agent.training.updates: Input should be a valid integer (it is '1000')",
        "precisions.route: 'float' has to be below 'float'; the ladder is highest first: ",
        "sensitivity.label_share: [0.5, 0.2]: the first is the lower bound, the second the upper one",
        "evaluation.bootstrap: 1 resamples, but an interval of 0.95 has one beyond its ends from 40 on",
    ]
    assert len(found) == len(wanted)
    for problem, line in zip(found, wanted, strict=True):
        assert line in problem
    with pytest.raises(UserError, match=r"lerning_rate.* \(and 4 more: `dmr recipe check x` shows all\)"):
        load_recipe("x", tmp_path)


def test_checks_across_sections_do_not_wait_for_the_sections_that_they_leave_out(tmp_path: Path) -> None:
    found = problems(tmp_path, "alfworld-tiny", {"evaluation.seed": "1", MODEL + ".probe.layers": [99]})
    assert [line.partition("x.yaml: ")[2] for line in found] == [
        "evaluation.seed: Input should be a valid integer (it is '1')",
        "kl_router.model.probe.layers: [99], but the agent has 8",
    ]


@pytest.mark.parametrize(("text", "said"), [pytest.param(text, said, id=name) for name, text, said in TEXTS])
def test_a_text_that_is_no_recipe_is_one_line(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "x.yaml").write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_recipe("x", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/x.yaml: {said}")
    assert str(caught.value).isprintable()


def test_a_recipe_is_read_as_dvc_reads_it(tmp_path: Path) -> None:
    """PyYAML, of YAML 1.1, takes 1e-3 for a string and 010 for eight."""
    text = RECIPE_YAML.replace("learning_rate: 0.001", "learning_rate: 1e-3").replace(
        "group_size: 2", "group_size: 010"
    )
    (tmp_path / "x.yaml").write_text("\ufeff" + text, encoding="utf-8")
    recipe = load_recipe("x", tmp_path)
    seen = YAML(typ="safe").load(tmp_path / "x.yaml")
    assert recipe.kl_router.learning_rate == seen["kl_router"]["learning_rate"] == 0.001
    assert recipe.grpo_router.group_size == seen["grpo_router"]["group_size"] == 10


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_whatever_the_file_holds_it_is_a_user_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "x.yaml").write_bytes(text)
    recipe, found = check_recipe("x", folder)
    assert recipe is None
    assert found
    assert all("\n" not in line for line in found)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "device"):
        with pytest.raises(UserError, match=rf"{name}.yaml: is no file"):
            load_recipe(name, tmp_path)
    for name in ("dangling", "loop"):
        with pytest.raises(UserError, match=rf"{name}.yaml: cannot be read: "):
            load_recipe(name, tmp_path)
    assert recipe_names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(RECIPE_YAML)
    (tmp_path / "x.yaml").chmod(0)
    with pytest.raises(UserError, match=r"x.yaml: cannot be read: Permission denied"):
        load_recipe("x", tmp_path)


def test_a_text_is_parsed_once_and_what_it_holds_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE_YAML.replace("quantile: 0.5", "quantile: 0.25"))
    first, held = load_recipe("x", tmp_path), deepcopy(read_mapping(path))
    monkeypatch.setattr("dmr_pipeline.recipe.text.YAML", lambda **options: pytest.fail("it is parsed again"))
    assert load_recipe("x", tmp_path) == first
    assert read_mapping(path) == held
    monkeypatch.undo()
    path.write_text(RECIPE_YAML.replace("quantile: 0.5", "quantile: 0.75"))
    assert load_recipe("x", tmp_path).sensitivity.quantile == 0.75


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_are_checked_before_any_path_is_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("dmr_pipeline.recipe.reading.read_mapping", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(UserError, match="can be no recipe's name: small letters") as caught:
        load_recipe(name, tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_odd_files_are_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = [
        "x;touch PWNED;.yaml",
        ".hidden.yaml",
        ".yaml",
        "A.yaml",
        "1e3.yaml",
        "a\x1b[31m.yaml",
        "a" * 101 + ".yaml",
        "$(ls).yaml",
    ]
    for name in [*odd, "good.yaml", "other.yml", ".x.yaml.swp"]:
        (tmp_path / name).write_text(RECIPE_YAML)
    (tmp_path / os.fsdecode(b"\xff.yaml")).write_text(RECIPE_YAML)
    (tmp_path / ".#good.yaml").symlink_to("user@host.1234")  # how Emacs locks a file
    (tmp_path / "folder.yaml").mkdir()
    with caplog.at_level(logging.WARNING):
        assert recipe_names(tmp_path) == ["good"]
        assert recipe_names(tmp_path) == ["good"]
    assert len(caplog.messages) == len(odd) + 3, "each is named once"
    assert all(message.isprintable() for message in caplog.messages)
    assert any("x;touch PWNED;.yaml is passed over: it is not called as a recipe may be" in m for m in caplog.messages)
    assert any("folder.yaml is passed over: it is no file" in m for m in caplog.messages)
    assert any("\\udcff.yaml" in message for message in caplog.messages)


def test_linear_layers_are_those_of_the_model() -> None:
    import torch

    from dmr_pipeline.training.train import new_model

    architecture = Architecture.model_validate(ARCHITECTURE)
    model = new_model(architecture, 10, 0)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == set(architecture.linear_layers())


def test_every_section_is_strict() -> None:
    sections: list[type[Section]] = [Section]
    while sections:
        section = sections.pop()
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["strict"]
        assert section.model_config["allow_inf_nan"] is False
        sections += section.__subclasses__()
    assert json.loads(load_recipe("alfworld-tiny", REPOSITORY / RECIPE_FOLDER).model_dump_json())


def test_a_problem_of_the_whole_hides_none_of_its_sections(tmp_path: Path) -> None:
    """Of a lone surrogate pydantic says nothing else."""
    text = (REPOSITORY / RECIPE_FOLDER / "alfworld-tiny.yaml").read_text().replace("group_size: 8", "group_size: 1")
    (tmp_path / "x.yaml").write_text(text.replace("step_limit: 50", r'"\ud800": 50') + r'"\ud800": 1' + "\n")
    _, found = check_recipe("x", tmp_path)
    assert any("grpo_router.group_size: Input should be greater than or equal to 2 (it is 1)" in line for line in found)
    assert all(line.isprintable() for line in found)


def test_a_dtype_and_kernels_that_are_not_set_leave_the_provenance_of_artifacts_as_it_was() -> None:
    agent = load_recipe("alfworld-tiny", REPOSITORY / RECIPE_FOLDER).agent
    assert "dtype" not in agent.model_dump()
    assert "kernels" not in load_recipe("alfworld-tiny", REPOSITORY / RECIPE_FOLDER).precisions.model_dump()
    assert Agent.model_validate(agent.model_dump() | {"dtype": "bfloat16"}).model_dump()["dtype"] == "bfloat16"
