"""Each validator of recipes: one change to a recipe that is right, and the only line that is then said."""

import hashlib
import json
import logging
import os
import re
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dmr_pipeline import pipeline
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import (
    RECIPE_FOLDER,
    Architecture,
    check_recipe,
    is_recipe_name,
    load_recipe,
    recipe_names,
)
from dmr_pipeline.recipe_fields import Section
from dmr_pipeline.recipe_text import read_mapping
from dmr_pipeline.versioning import dvc_stages
from tests.fake_project import RECIPE_YAML, REPOSITORY

LEFT_OUT = object()
GONE = "Field required"
INFINITE, NAN = float("inf"), float("nan")
ARCHITECTURE = {"layers": 2, "width": 32, "heads": 2, "key_value_heads": 1, "head_width": 16, "feed_forward": 64}


def content(base: str, changes: dict[str, object]) -> dict[str, Any]:
    """A committed recipe with other values at dotted paths; a number in a path is an index."""
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / RECIPE_FOLDER / f"{base}.yaml").read_text())
    for path, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        at: Any = found
        for parent in parents:
            at = at.setdefault(parent, {}) if isinstance(at, dict) else at[parent]
        if value is LEFT_OUT:
            del at[last]
        elif last == "+":
            at.append(value)
        else:
            at[last] = value
    return found


def problems(folder: Path, base: str, changes: dict[str, object]) -> list[str]:
    (folder / "x.yaml").write_text(yaml.safe_dump(content(base, changes), allow_unicode=True))
    recipe, found = check_recipe("x", folder)
    assert (recipe is None) == bool(found)
    return found


T, P, K, G = "agent.training.", "precisions.", "kl_router.", "grpo_router."
MODEL = "kl_router.model"
AGENT_ALONE = {"agent.training": LEFT_OUT, "agent.pretrained": {"model": "models/x"}}
ALFWORLD: list[tuple[str, dict[str, object], str]] = [
    # Types are strict, numbers finite.
    ("true-is-no-count", {T + "updates": True}, f"{T}updates: Input should be a valid integer (it is True)"),
    ("text-is-no-count", {T + "updates": "24"}, f"{T}updates: Input should be a valid integer (it is '24')"),
    ("float-is-no-count", {T + "updates": 24.0}, f"{T}updates: Input should be a valid integer (it is 24.0)"),
    ("text-is-no-number", {T + "learning_rate": "0.1"},
     f"{T}learning_rate: Input should be a valid number (it is '0.1')"),
    ("true-is-no-number", {K + "target_ratio": True}, f"{K}target_ratio: Input should be a valid number (it is True)"),
    ("number-is-no-flag", {"sensitivity.won_only": 1},
     "sensitivity.won_only: Input should be a valid boolean (it is 1)"),
    ("number-is-no-text", {P + "high": 5}, f"{P}high: Input should be a valid string (it is 5)"),
    ("date-is-no-text", {P + "high": date(2024, 1, 1)}, f"{P}high: Input should be a valid string"),
    ("text-is-no-list", {MODEL: {"probe": {"layers": "4"}}}, f"{MODEL}.probe.layers: Input should be a valid tuple"),
    ("list-is-no-section", {"sensitivity": [1]}, "sensitivity: Input should be a valid dictionary or instance"),
    ("nothing-is-no-section", {"release": None}, "release: Input should be a valid dictionary or instance"),
    ("unknown-key", {"agent.promt": {}}, "agent.promt: Extra inputs are not permitted"),
    ("unknown-section", {"colour": "red"}, "colour: Extra inputs are not permitted"),
    ("key-that-is-no-text", {"sensitivity": {1: 2, "quantile": 0.8}}, "sensitivity.1: Keys should be strings"),
    ("missing", {"evaluation": LEFT_OUT}, f"evaluation: {GONE}"),
    ("missing-in-benchmark", {"benchmark.splits": LEFT_OUT}, f"benchmark.splits: {GONE}"),
    *(
        (f"not-finite-{value}-{path}", {path: value}, f"{path}: Input should be ")
        for value in (INFINITE, -INFINITE, NAN)
        for path in (T + "learning_rate", "agent.temperature", P + "gate_high", G + "cost_weight", "release.cost_increase")
    ),
    ("infinite-tau", {"sensitivity": {"tau": INFINITE}},
     "sensitivity.tau: Input should be a finite number (it is inf)"),
    ("nan-in-a-pair", {P + "gate_gap": [NAN, 0.5]}, f"{P}gate_gap.0: Input should be a finite number"),
    # Bounds.
    *(
        (f"huge-{path}", {path: 10**30}, f"{path}: Input should be at most ")
        for path in (
            "benchmark.splits.agent_train", "benchmark.splits.test", "benchmark.step_limit", "benchmark.seed",
            T + "updates", T + "episodes_per_update", T + "dagger_tokens", T + "seed", T + "looks_per_update",
            T + "architecture.feed_forward", "agent.prompt.max_action_tokens", "trajectories.seed", P + "kl_episodes",
            K + "epochs", K + "batch_episodes", K + "seed", G + "updates", G + "games_per_update", G + "group_size",
            G + "iterations", G + "seed", "evaluation.random_draws", "evaluation.bootstrap", "evaluation.seed",
            "release.games", "release.bootstrap", "retraining.min_new_steps", "runtime.batch_episodes", "runtime.processes",
        )
    ),
    *(
        (f"zero-{path}", {path: 0}, f"{path}: Input should be greater than ")
        for path in (
            "benchmark.splits.agent_train", "benchmark.splits.router_train", "benchmark.splits.validation",
            "benchmark.splits.test", "benchmark.step_limit", T + "updates", T + "learning_rate", T + "dagger_every",
            P + "kl_episodes", "sensitivity.quantile", K + "epochs", K + "target_ratio", G + "updates", G + "group_size",
            G + "clip", G + "initial_ratio", G + "target_ratio", "evaluation.random_draws", "evaluation.confidence_ratio",
            "evaluation.bootstrap", "release.games", "retraining.min_new_steps", "runtime.threads",
        )
    ),
    *(
        (f"one-{path}", {path: 1.0}, f"{path}: Input should be less than ")
        for path in (
            "sensitivity.quantile", K + "target_ratio", G + "initial_ratio", G + "target_ratio", G + "clip",
            "evaluation.confidence_ratio", "evaluation.confidence", "release.confidence",
        )
    ),
    *(
        (f"learning-rate-{name}", {name + "learning_rate": 3}, f"{name}learning_rate: Input should be at most 1.0: no optimiser")
        for name in (T, K, G)
    ),
    *(
        (f"seed-{name}", {f"{name}.seed": 2**32}, f"{name}.seed: Input should be at most 4,294,967,295: numpy takes no larger")
        for name in ("benchmark", "agent.training", "trajectories", "kl_router", "grpo_router", "evaluation", "release")
    ),
    ("negative-seed", {K + "seed": -1}, f"{K}seed: Input should be greater than or equal to 0"),
    ("group-of-one", {G + "group_size": 1}, f"{G}group_size: Input should be greater than or equal to 2"),
    ("weak-confidence", {"release.confidence": 0.2},
     "release.confidence: Input should be greater than or equal to 0.5"),
    ("negative-weight", {G + "cost_weight": -1}, f"{G}cost_weight: Input should be greater than or equal to 0"),
    ("hot", {"agent.temperature": 1000}, "agent.temperature: Input should be at most 100.0: it would draw at random"),
    ("nearly-cold", {"agent.temperature": 1e-9},
     "agent.temperature: 1e-09 divides logits by next to nothing; 0 is greedy"),
    ("step-limit", {"benchmark.step_limit": 2}, "benchmark.step_limit: Input should be greater than or equal to 3"),
    ("unknown-device", {"runtime.device": "tpu"},
     "runtime.device: Input should be 'auto', 'cpu' or 'cuda' (it is 'tpu')"),
    ("unknown-benchmark", {"benchmark.environment": "mars"},
     "benchmark.environment: Input should be one of 'alfworld', 'alfworld-official', 'webshop', 'webshop-official' (it is 'm"),
    ("no-room-for-an-action", {"agent.max_transcript_tokens": 14},
     "agent.prompt.max_action_tokens: 14, but a transcript may have 14 tokens: set it lower, or agent.max_transcript_tokens"),
    ("long-actions", {"agent.prompt.max_action_tokens": 4096},
     "agent.prompt.max_action_tokens: 4,096, but a transcript may have 4,096 tokens"),
    ("nearly-sure", {"release.confidence": 0.999999},
     "release.bootstrap: 2000 resamples, but an interval of 0.999999 has"),
    # Architectures.
    ("heads", {T + "architecture.heads": 3, T + "architecture.key_value_heads": 2},
     f"{T}architecture.key_value_heads: 2 does not divide the 3 heads"),
    ("odd-heads", {T + "architecture.head_width": 15}, f"{T}architecture.head_width: 15 is odd"),
    ("large", {T + "architecture.layers": 8000, T + "architecture.width": 90_000}, f"{T}architecture: "),
    ("router-heads", {MODEL: {"architecture": ARCHITECTURE | {"key_value_heads": 4}}},
     f"{MODEL}.architecture.key_value_heads: 4 "),
    # Training.
    *(
        (f"past-the-end-{field}", {T + field: 1001}, f"{T}{field}: 1,001, but there are 1,000 updates")
        for field in ("warmup_updates", "short_until", "dagger_from")
    ),
    ("looks-past-the-end", {T + "looks_alone_until": 1001, T + "short_until": 0},
     f"{T}looks_alone_until: 1,001, but there are 1,000 updates"),
    ("no-looks", {T + "looks_per_update": 0}, f"{T}looks_per_update: 0, but there is nothing else up to update 250"),
    ("short-among-looks", {T + "short_until": 200}, f"{T}short_until: 200, but up to update 250 there are no games"),
    ("short-steps", {T + "short_steps": 2}, f"{T}short_steps: 2, but no game can be won in fewer than 3 steps"),
    ("no-dagger", {T + "dagger_every": 600, T + "dagger_from": 601},
     f"{T}dagger_every: 600 has no multiple from dagger_from on"),
    ("weight-decay", {T + "weight_decay": 2}, f"{T}weight_decay: Input should be less than or equal to 1"),
    ("mistakes", {T + "mistake_rate": 1.5}, f"{T}mistake_rate: Input should be at most 0.5: the expert"),
    # The agent.
    ("two-sources", {"agent.pretrained": {"model": "x"}}, "agent: give exactly one of 'pretrained' and 'training'"),
    ("no-source", {"agent.training": LEFT_OUT}, "agent: give exactly one of 'pretrained' and 'training'"),
    ("empty-source", {"agent.training": LEFT_OUT, "agent.pretrained": {"model": ""}},
     "agent.pretrained.model: String should have at least 1 character"),
    ("revision", {"agent.training": LEFT_OUT, "agent.pretrained": {"model": "x", "revision": "main"}},
     "agent.pretrained.revision: String should match pattern"),
    ("scored-thoughts", {"agent.action": "score"},
     "agent.action: an agent that thinks first must generate its actions"),
    ("thoughtless-looks", {"agent.prompt.thought_end": LEFT_OUT}, "agent: the looks of alfworld teach thoughts"),
    ("empty-hide", {"agent.prompt.page": {"hide": [""]}},
     "agent.prompt.page.hide.0: String should have at least 1 character"),
    # The ladder.
    ("one-rung", {P + "ladder": [{"name": "float", "weights": "float"}], P + "low": "float"},
     f"{P}ladder: Tuple should have at"),
    ("rung-name", {P + "ladder.1.name": "a/b"}, f"{P}ladder.1.name: String should match pattern"),
    ("long-rung-name", {P + "ladder.1.name": "a" * 101},
     f"{P}ladder.1.name: String should have at most 100 characters"),
    ("rung-tokenizer", {P + "ladder.1.name": "tokenizer"},
     f"{P}ladder.1.name: 'tokenizer' is the folder beside the rungs"),
    ("rung-called-low", {P + "ladder.1.name": "low"},
     f"{P}ladder: a rung may be called 'low' only if it is precisions.low"),
    ("same-names", {P + "ladder.1.name": "int4"}, f"{P}ladder: names are not unique: ['float', 'int4', 'int4',"),
    ("equal-rungs", {P + "ladder.3": {"name": "other", "weights": "int4"}},
     f"{P}ladder: rungs 'int4' and 'other' are equal"),
    ("unknown-high", {P + "high": "int3"}, f"{P}high: 'int3' is not on the ladder ['float',"),
    ("unknown-low", {P + "low": "int3"}, f"{P}low: 'int3' is not on the ladder ['float',"),
    ("low-is-high", {P + "low": "float"}, f"{P}low: 'float' has to be below high, 'float'"),
    ("low-above-high", {P + "low": "int8", P + "high": "int4"}, f"{P}low: 'int8' has to be below high, 'int4'"),
    ("upside-down", {P + "ladder.1.weights": "int4", P + "ladder.2.weights": "int8"},
     f"{P}ladder: is highest first, but 'int4' (int8) is below 'int8'"),
    ("ranges", {P + "ladder.1.ranges": "mse"}, f"{P}ladder.1.ranges: rung 'int8': ranges is for int4 and int2 weights"),
    ("float-activations", {P + "ladder.0.activations": "int8"}, f"{P}ladder: rung 'float': quantized activations need"),
    ("float-kept", {P + "ladder.0.keep_float": ["lm_head", "*.down_proj"]},
     f"{P}ladder: rung 'float' is float throughout"),
    ("bracket", {P + "ladder.4.keep_float": ["["]},
     f"{P}ladder.4.keep_float: rung 'int2': '[' is no pattern of module names"),
    ("everything", {P + "ladder.4.keep_float": ["*"]}, f"{P}ladder.4.keep_float: rung 'int2': '*' fits every module"),
    ("everything-else", {P + "ladder.4.keep_float": ["lm_head", "model.*"]},
     f"{P}ladder: rung 'int2': keep_float: ['lm_head', 'model.*'] leave every linear layer in float"),
    ("typo", {P + "ladder.4.keep_float": ["lm_haed"]},
     f"{P}ladder: rung 'int2': keep_float: 'lm_haed' fits no linear layer"),
    ("container", {P + "ladder.4.keep_float": ["model.layers.0"]},
     f"{P}ladder: rung 'int2': keep_float: 'model.layers.0' fits"),
    ("no-such-layer", {P + "ladder.4.keep_float": ["*.layers.8.*"]},
     f"{P}ladder: rung 'int2': keep_float: '*.layers.8.*' fits"),
    ("gate-gap", {P + "gate_gap": [0.5, 0.2]}, f"{P}gate_gap: [0.5, 0.2]: the first is the lower bound"),
    ("gate-gap-of-one", {P + "gate_gap": [0.5]}, f"{P}gate_gap.1: {GONE}"),
    # Trajectories and labels.
    ("behaviour-slash", {"trajectories.behaviour.2.name": "a/b"},
     "trajectories.behaviour.2.name: String should match pattern"),
    ("behaviour-twice", {"trajectories.behaviour.2.name": "all-low"}, "trajectories.behaviour: names are not unique"),
    ("behaviour-ratio", {"trajectories.behaviour.2.high_ratio": 0},
     "trajectories.behaviour: policies of one high_ratio play"),
    ("behaviour-ingested", {"trajectories.behaviour.2.name": "ingested"},
     "trajectories.behaviour: 'ingested' is the policy of"),
    ("no-behaviour", {"trajectories.behaviour": []}, "trajectories.behaviour: Tuple should have at least 1 item"),
    ("two-thresholds", {"sensitivity.tau": 0.1}, "sensitivity: give exactly one of 'tau' and 'quantile'"),
    ("no-threshold", {"sensitivity.quantile": LEFT_OUT}, "sensitivity: give exactly one of 'tau' and 'quantile'"),
    ("large-tau", {"sensitivity": {"tau": 1e6}},
     "sensitivity.tau: Input should be at most 1,000.0: no step's divergence"),
    ("label-share", {"sensitivity.label_share": [0.6, 0.6]},
     "sensitivity.label_share: [0.6, 0.6]: the first is the lower bound"),
    # Routers.
    ("two-routers", {MODEL + ".architecture": ARCHITECTURE},
     f"{MODEL}: give exactly one of 'probe', 'architecture' and"),
    ("no-router", {MODEL: {}}, f"{MODEL}: give exactly one of 'probe', 'architecture' and 'pretrained'"),
    ("lora", {MODEL + ".lora": {}}, f"{MODEL}.lora: needs 'pretrained'"),
    ("lora-rank", {MODEL: {"pretrained": {"model": "x"}, "lora": {"rank": 0}}},
     f"{MODEL}.lora.rank: Input should be greater"),
    ("probe-nowhere", {MODEL + ".probe.layers": []}, f"{MODEL}.probe.layers: Tuple should have at least 1 item"),
    ("probe-twice", {MODEL + ".probe.layers": [4, 4]}, f"{MODEL}.probe.layers: [4, 4] are not all different"),
    ("probe-too-high", {MODEL + ".probe.layers": [4, 9]}, f"{MODEL}.probe.layers: [4, 9], but the agent has 8"),
    ("probe-at-zero", {MODEL + ".probe.layers": [4, 0]}, f"{MODEL}.probe.layers.1: Input should be greater than 0"),
    ("probe-beta", {G + "beta": 0.1}, f"{G}beta: trl reloads the reference as a causal LM, which a probe is not"),
    ("gated-weight", {G + "cost_weight": 1.5}, f"{G}cost_weight: 1.5: with the gated reward"),
    # The rest.
    ("resamples", {"evaluation.bootstrap": 30},
     "evaluation.bootstrap: 30 resamples, but an interval of 0.95 has one beyond"),
    ("resamples-of-release", {"release.bootstrap": 1000, "release.confidence": 0.999},
     "release.bootstrap: 1000 resamples"),
    ("remote", {"versioning.remote": "-v; ls"}, "versioning.remote: String should match pattern"),
    ("threads", {"runtime.threads": 2}, "runtime.threads: torch's threads do not survive a fork"),
    ("name", {"name": "y"}, "its name is 'y', but the file is called 'x'"),
    ("name-type", {"name": ["x"]}, "its name is ['x'], but the file is called 'x'"),
    # Games that there are not.
    *(
        (f"too-few-games-{path}", {path: 201}, f"{path}: 201 games, but benchmark.splits.validation has 200")
        for path in (
            P + "kl_episodes", K + "validation_games", G + "validation_games", "evaluation.confidence_games", "release.games",
        )
    ),
    ("games-per-update", {G + "games_per_update": 241},
     f"{G}games_per_update: 241 games, but benchmark.splits.router_train has 240"),
]  # fmt: skip
OTHERS: list[tuple[str, str, dict[str, object], str]] = [
    ("alfworld-tiny-official", "test", {"benchmark.splits.test": 141},
     "benchmark.splits.test: 141 games, but official valid_seen"),
    ("alfworld-tiny-official", "unseen", {"benchmark.test_split": "valid_unseen"},
     "benchmark.splits.test: 140 games, but official"),
    ("alfworld-tiny-official", "train", {"benchmark.splits.agent_train": 3114},
     "benchmark.splits: agent_train, router_train and "),
    ("webshop-tiny", "test", {"benchmark.splits.test": 501},
     "benchmark.splits.test: 501 games, but WebShop's published split has"),
    ("webshop-tiny", "validation", {"benchmark.splits.validation": 1001},
     "benchmark.splits.validation: 1,001 games, but WebShop's"),
    ("webshop-tiny", "products", {"benchmark.products": 10**9},
     "benchmark.products: Input should be at most 2,000,000"),
    ("webshop-tiny", "shortest", {"agent.training.short_until": 9, "agent.training.short_steps": 1},
     "agent.training.short_steps: 1"),
    ("webshop-tiny-official", "price_seed", {"benchmark.price_seed": -1},
     "benchmark.price_seed: Input should be greater than or"),
]  # fmt: skip


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
        ({P + "ladder.0.name": "high", P + "high": "high"}, "precisions.high", "high"),
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
    "alfworld-tiny": "571bc6e31c3a",
    "alfworld-tiny-official": "8d5db5f19202",
    "webshop-tiny": "24358fcf9b2f",
    "webshop-tiny-official": "18f4c0968846",
}
"""SHA-256 of what agents that lie in Git were made from; a new field is left out where it is not set."""


@pytest.mark.parametrize("name", DUMPS)
def test_committed_recipes_stay_what_published_artefacts_were_made_from(name: str) -> None:
    dump = load_recipe(name, REPOSITORY / RECIPE_FOLDER).model_dump_json()
    assert hashlib.sha256(dump.encode()).hexdigest().startswith(DUMPS[name])


def test_all_problems_are_named_at_once_and_commands_name_the_first(tmp_path: Path) -> None:
    changes = {
        T + "updates": "1000", P + "gate_gap": [0.5, 0.2], P + "low": "float", "evaluation.bootstrap": 1,
        "grpo_router.lerning_rate": 1, K + "validation_games": 500, "benchmark.splits.validation": 100,
    }  # fmt: skip
    found = problems(tmp_path, "alfworld-tiny", changes)
    wanted = [
        "grpo_router.lerning_rate: Extra inputs are not permitted",
        "agent.training.updates: Input should be a valid integer (it is '1000')",
        "precisions.low: 'float' has to be below high, 'float'; the ladder is highest first: ",
        "precisions.gate_gap: [0.5, 0.2]: the first is the lower bound, the second the upper one",
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


def laughs(first: str, following: str) -> bytes:
    """Each line stands for nine times the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + following % ", ".join([f"*a{i - 1}"] * 9) for i in range(1, 9)]
    return "\n".join(lines).encode()


TEXTS: list[tuple[str, bytes, str]] = [
    ("utf-16", RECIPE_YAML.encode("utf-16"), "is not UTF-8 text (byte 0)"),
    ("latin-1", b"# caf\xe9\n" + RECIPE_YAML.encode(), "is not UTF-8 text (byte 5)"),
    ("random", bytes(range(255, -1, -1)), "is not UTF-8 text (byte 0)"),
    ("nul", b"benchmark: \x00",
     "not valid YAML: unacceptable character #x0000: special characters are not allowed in \""),
    ("escape", b"benchmark: \x1b[31m", "not valid YAML: unacceptable character #x001b"),
    ("empty", b"", "a recipe is a mapping of sections, this is NoneType"),
    ("text", b"recipe", "a recipe is a mapping of sections, this is str"),
    ("list", b"- a", "a recipe is a mapping of sections, this is list"),
    ("two", b"a: 1\n---\nb: 2\n", "not valid YAML: line 2, column 1: but found another document"),
    ("open", b"a: [1, 2", "not valid YAML: line 1, column 9: expected ',' or ']'"),
    ("tab", b"a:\n\t- b", "not valid YAML: line 2, column 1: found character"),
    ("twice", RECIPE_YAML.encode() + b"release: {}\n",
     "not valid YAML: line 26, column 1: found duplicate key \"release\""),
    ("twice-within", b"a: {b: 1, b: 2}", "not valid YAML: line 1, column 11: found duplicate key \"b\""),
    ("deep", b"a: " + b"[" * 50_000, "not valid YAML: line 1: more than 20 levels of nesting"),
    ("deep-blocks", b"".join(b" " * i + b"a:\n" for i in range(300)), "not valid YAML: line 21: more than 20 levels"),
    ("digits", b"a: " + b"9" * 5000, "not valid YAML: line 1: a number of 5,000 characters"),
    ("hex-digits", b"a: 0x" + b"f" * 5000, "not valid YAML: line 1: a number of 5,002 characters"),
    ("date", b"a: 2024-13-45", "not valid YAML: month must be in 1..12"),
    ("python", b"a: !!python/object/apply:os.system [ls]",
     "not valid YAML: line 1: a recipe has no tags, but there is "),
    ("tag", b"a: !!int x", "not valid YAML: line 1: a recipe has no tags"),
    ("bool-tag", b"a: !!bool x", "not valid YAML: line 1: a recipe has no tags"),
    ("timestamp-tag", b"a: !!timestamp x", "not valid YAML: line 1: a recipe has no tags"),
    ("binary", b"a: !!binary AAAA", "not valid YAML: line 1: a recipe has no tags"),
    ("alias", b"a: *b", "not valid YAML: line 1, column 4: found undefined alias 'b'"),
    ("key", b"? {a: b}\n: 1", "not valid YAML: line 1, column 3: found unhashable key"),
    ("laughs", laughs("[x]", "[%s]"), "not valid YAML: line 7: more than 50 references to anchors"),
    ("merged-laughs", laughs("{x: 1}", "{<<: [%s]}"), "not valid YAML: line 7: more than 50 references to anchors"),
    ("large", b"# " + b"x" * 100_000, "is larger than 100,000 bytes"),
]  # fmt: skip


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
    monkeypatch.setattr("dmr_pipeline.recipe_text.YAML", lambda **options: pytest.fail("it is parsed again"))
    assert load_recipe("x", tmp_path) == first
    assert read_mapping(path) == held
    monkeypatch.undo()
    path.write_text(RECIPE_YAML.replace("quantile: 0.5", "quantile: 0.75"))
    assert load_recipe("x", tmp_path).sensitivity.quantile == 0.75


BAD_NAMES = [
    "", ".", "..", "../x", "x/y", "/etc/passwd", "X", "-x", ".x", "_x", "x y", "x;ls", "$(ls)", "`ls`", "x\n", "x\0", "é",
    "a" * 101, "a" * 5000, "\x1b[31m", "1e3", "12", "0x1f", "0o17", "1.5", "1_000", "incoming", "official", "*", "x{y}", "#x",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_are_checked_before_any_path_is_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("dmr_pipeline.recipe.read_mapping", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(UserError, match="can be no recipe's name: small letters") as caught:
        load_recipe(name, tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@settings(deadline=None, max_examples=50)
@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True).filter(is_recipe_name))
def test_a_name_is_the_same_in_dvc_yaml(name: str) -> None:
    rendered = YAML(typ="safe").load(dvc_stages.render(pipeline.STAGES, [name]))
    assert all(stage["matrix"]["recipe"] == [name] for stage in rendered["stages"].values())


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
