"""Malformed and absurd recipes, names and arguments on the command line: each ends in exit code 2 and a line that says why."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from dmr_pipeline.cli import app
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import RECIPE_FOLDER, load_recipe
from tests.helpers.bad_recipes import ALFWORLD, OTHERS
from tests.helpers.deadline import Hang, at_most_seconds
from tests.helpers.fake_project import RECIPE, RECIPE_YAML, REPOSITORY, dvc
from tests.helpers.recipes import BAD_NAMES, TEXTS, content

pytestmark = pytest.mark.slow

HANG_SECONDS = 120
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run",),
    ("status",),
    ("report",),
    ("pull",),
    ("recipe", "check"),
    ("materialize", "agent", "--recipe"),
    ("router", "history", "--recipe"),
    ("router", "promote", "--recipe"),
    ("router", "rollback", "--recipe"),
    ("trajectories", "validate", "episodes.jsonl", "--recipe"),
    ("env", "experts", "webshop", "--recipe"),
)
"""All that take a recipe; its name comes last."""


@dataclass
class Tally:
    calls: int = 0
    accepted: list[str] = field(default_factory=list)
    untidy: list[str] = field(default_factory=list)
    """A traceback, another exit code, more lines than one, or what a terminal would act on."""
    hung: list[str] = field(default_factory=list)

    def call(self, arguments: tuple[str, ...], note: str, mine: tuple[str, ...]) -> None:
        """`mine` are texts of which a refusal has one: what is refused for another reason was accepted."""
        self.calls += 1
        said = f"{note}: dmr {' '.join(arguments)[:100]!r}"
        try:
            with at_most_seconds(HANG_SECONDS):
                result = CliRunner().invoke(app, list(arguments))
        except Hang:
            self.hung.append(said)
            return
        lines = result.stderr.splitlines()
        tidy = result.exit_code == 2 and isinstance(result.exception, SystemExit) and "Traceback" not in result.output
        tidy &= bool(lines) and all(line.startswith("error: ") and line.isprintable() for line in lines)
        tidy &= len(lines) == 1 or arguments[:2] == ("recipe", "check")
        if result.exit_code == 0 or (tidy and not all(any(text in line for text in mine) for line in lines)):
            self.accepted.append(f"{said}: {shown(result)}")
        elif not tidy:
            self.untidy.append(f"{said}: exit code {result.exit_code}, {result.exception!r}: {shown(result)}")


def shown(result: Result) -> str:
    return repr(result.output[-300:])


VALUES: dict[str, object] = {
    "null": None, "empty": "", "digits": "24", "path": "../x", "long": "a" * 20_000, "escapes": "a\x1b]0;b\x07\u202ec",
    "true": True, "list": [], "nested": [[1]], "map": {}, "-1": -1, "0": 0, "1": 1, "1e30": 10**30, "inf": float("inf"),
    "nan": float("nan"), "tiny": 1e-300,
}  # fmt: skip
COUNTED = {"1"}
FROM_0 = {"0", "1"}
SHARE = {"0", "1", "tiny"}
RIGHT: dict[str, set[str]] = {
    "benchmark.seed": FROM_0, "benchmark.price_seed": FROM_0,
    "benchmark.splits.agent_train": COUNTED, "benchmark.splits.test": COUNTED,
    "agent.pretrained": {"null"}, "agent.finetune": {"null"}, "agent.temperature": FROM_0,
    "agent.training.architecture.width": COUNTED, "agent.training.architecture.heads": COUNTED,
    "agent.training.architecture.key_value_heads": COUNTED, "agent.training.architecture.feed_forward": COUNTED,
    "agent.training.episodes_per_update": COUNTED, "agent.training.learning_rate": COUNTED,
    "agent.training.warmup_updates": FROM_0, "agent.training.weight_decay": SHARE,
    "agent.training.looks_per_update": COUNTED, "agent.training.looks_alone_until": FROM_0,
    "agent.training.short_until": {"0"}, "agent.training.dagger_from": FROM_0, "agent.training.dagger_every": COUNTED,
    "agent.training.dagger_episodes": COUNTED, "agent.training.dagger_steps": COUNTED,
    "agent.training.dagger_tokens": COUNTED, "agent.training.mistake_rate": {"0", "tiny"}, "agent.training.seed": FROM_0,
    "agent.prompt.max_action_tokens": COUNTED, "agent.prompt.page.hide": {"list"},
    "agent.prompt.page.segment_words": {"null", "1"}, "agent.prompt.page.observation_words": {"null", "1"},
    **{f"precisions.ladder.{i}.name": {"digits"} for i in range(1, 4)},
    **{f"precisions.ladder.{i}.keep_float": {"list"} for i in range(1, 5)},
    "precisions.pair": {"null"}, "precisions.margin": SHARE, "precisions.least_saving": SHARE,
    "precisions.kl_episodes": COUNTED, "trajectories.behaviour": {"list"},
    **{f"trajectories.behaviour.{i}.name": {"digits"} for i in range(3)},
    **{f"trajectories.behaviour.{i}.shares.{rung}": {"1"} for i, rung in ((0, "float"), (1, "int2"))},
    "trajectories.seed": FROM_0,
    "sensitivity.tau": {"null"}, "sensitivity.won_only": {"true"},
    "kl_router.model.probe.hidden": FROM_0, "kl_router.model.architecture": {"null"},
    "kl_router.model.pretrained": {"null"}, "kl_router.model.lora": {"null"},
    "kl_router.epochs": COUNTED, "kl_router.batch_episodes": COUNTED, "kl_router.learning_rate": COUNTED,
    "kl_router.validation_games": COUNTED, "kl_router.seed": FROM_0,
    "grpo_router.updates": COUNTED, "grpo_router.games_per_update": COUNTED, "grpo_router.iterations": COUNTED,
    "grpo_router.learning_rate": COUNTED, "grpo_router.cost_weight": SHARE, "grpo_router.beta": {"0"},
    "grpo_router.validate_every": COUNTED, "grpo_router.validation_games": COUNTED,
    "grpo_router.target_ratio": {"null"}, "grpo_router.seed": FROM_0,
    "evaluation.random_draws": COUNTED, "evaluation.confidence_games": COUNTED, "evaluation.seed": FROM_0,
    "release.success_margin": SHARE, "release.cost_increase": SHARE, "release.games": {"null", "1"}, "release.seed": FROM_0,
    "retraining.min_new_steps": COUNTED, "versioning.remote": {"null", "digits"},
    "runtime.threads": COUNTED, "runtime.processes": COUNTED, "runtime.batch_episodes": COUNTED,
}  # fmt: skip
"""Field -> those of VALUES that are meant to be taken."""
TEXTS_OF_PROMPTS = {"opening", "turn", "thought_end", "action_end"}
"""Any text can be one; whether a tokenizer has it is known later (tests of agent/prompts.py)."""


def leaves(value: object, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for i, inner in enumerate(value):
                yield from leaves(inner, f"{path}.{i}")
        yield path


def replaced(full: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    changed: dict[str, Any] = yaml.safe_load(yaml.safe_dump(full))
    at: Any = changed
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for parent in parents:
        at = at[parent]
    at[last] = value
    return changed


def test_no_hostile_recipe_and_no_hostile_argument_gets_past_the_line_that_refuses_it(
    project: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    started, tally = time.monotonic(), Tally()
    file = RECIPE_FOLDER / "x.yaml"
    of_file, of_name = (f"{file}: ",), ("can be no recipe's name: ", "unknown recipe ")
    Path("episodes.jsonl").write_text("{}\n")

    def try_text(text: bytes, note: str) -> None:
        file.write_bytes(text)
        command = COMMANDS[tally.calls % len(COMMANDS)]
        tally.call((*command, "x"), note, of_file)

    for name, text, _ in TEXTS:
        try_text(text, name)
    for cut in range(1, len(RECIPE_YAML) - 20, 40):
        try_text(RECIPE_YAML[:cut].encode(), f"cut at {cut}")
    for name, changes, _ in ALFWORLD:
        try_text(yaml.safe_dump(content("alfworld-tiny", changes)).encode(), name)
    for base, name, changes, _ in OTHERS:
        try_text(yaml.safe_dump(content(base, changes)).encode(), name)

    # Every field there is, whoever adds one, has each of the values; what is right for it is said above.
    seen: set[str] = set()
    for base in ("alfworld-tiny", "webshop-tiny-official"):
        full = load_recipe(base, REPOSITORY / RECIPE_FOLDER).model_dump(mode="json") | {"name": "x"}
        file.write_text(yaml.safe_dump(full))
        assert CliRunner().invoke(app, ["recipe", "check", "x"]).exit_code == 0, "what is refused below is the change"
        for path in leaves(full):
            if path in seen or path == "name":
                continue
            seen.add(path)
            for name, value in VALUES.items():
                of_prompt = path.split(".")[-1] in TEXTS_OF_PROMPTS and (isinstance(value, str) or value is None)
                if not of_prompt and name not in RIGHT.get(path, ()):
                    file.write_text(yaml.safe_dump(replaced(full, path, value)))
                    tally.call(("recipe", "check", "x"), f"{path} is {name}", of_file)
    file.unlink()

    for name in [*BAD_NAMES, "x", "nope"]:
        for command in COMMANDS:
            dashes = ("--",) if name.startswith("-") and command[-1] != "--recipe" else ()
            tally.call((*command, *dashes, name), f"the name {name[:20]!r}", of_name)
        tally.call(("materialize", "--recipe", RECIPE, "--", name), f"the stage {name[:20]!r}", ("unknown stage ",))
        code = ("materialize", "agent", "--recipe", RECIPE, "--code-version", name)
        tally.call(code, f"the code version {name[:20]!r}", ("agent has code version ",))
        if "\0" not in name:
            calls = [("provenance", "--", name), ("trajectories", "validate", "--recipe", RECIPE, "--", name)]
            for call in calls:
                tally.call(call, f"the file {name[:20]!r}", ("",))

    with capsys.disabled():
        print(  # noqa: T201 - the counts
            f"\nrecipes and calls {tally.calls}: accepted wrongly {len(tally.accepted)}, traceback {len(tally.untidy)}, "
            f"hang {len(tally.hung)} ({time.monotonic() - started:.0f} s)"
        )
    assert tally.calls > 2000
    assert not tally.accepted, "\n".join(tally.accepted[:50])
    assert not tally.untidy, "\n".join(tally.untidy[:50])
    assert not tally.hung, "\n".join(tally.hung)
    assert sorted(path.name for path in RECIPE_FOLDER.iterdir()) == [f"{RECIPE}.yaml"]
    assert not Path("data/x").exists()


def test_odd_files_among_the_recipes_reach_neither_dvc_nor_a_shell(project: Recipe) -> None:
    for name in ("x;touch PWNED;", "$(touch PWNED)", "`touch PWNED`", ".hidden", "a b", "-rf", "1e3", "é", "x" * 200):
        (RECIPE_FOLDER / f"{name}.yaml").write_text(RECIPE_YAML)
    before = Path("dvc.yaml").read_text()
    for command in (["render"], ["render", "--check"], ["recipe", "check", "--all"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    assert Path("dvc.yaml").read_text() == before
    stages = dvc("stage", "list", "--all", "--name-only").split()
    assert all(stage.endswith(f"@{RECIPE}") for stage in stages)
    assert CliRunner().invoke(app, ["status", RECIPE]).exit_code == 0
    assert not Path("PWNED").exists()
