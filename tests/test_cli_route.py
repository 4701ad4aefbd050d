"""`dmr route calibrate`, whose games were played elsewhere."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from dmr_pipeline.cli import app, stages
from dmr_pipeline.cli.common import console
from dmr_pipeline.environments import benchmark
from dmr_pipeline.evaluation import route_calibration
from dmr_pipeline.evaluation.route_calibration import Calibration, Played
from dmr_pipeline.router.model import load_router
from tests.helpers.routers import CPU, random_router


def played(games: int, ratio: float) -> Played:
    near = [ratio - 0.03, ratio + 0.03]
    return Played(
        games=games, high_ratio=ratio, high_ratio_ci95=near, success=0.8, success_ci95=[0.7, 0.9], cost=0.5,
        cost_ci95=[0.45, 0.55],
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """What `calibrate` was asked for."""
    found: list[object] = []

    def calibrate(recipe, name, budget, artifacts, validation, fresh, folder, progress):
        found.extend([name, budget, sorted(artifacts), len(fresh), folder])
        router = random_router(threshold=0.25, ties=0.5) if name.endswith("router") else None
        fresh_played = played(len(fresh), 0.21) if fresh else None
        ties = 0.5 if name != "margin" else 0.0
        return Calibration(
            threshold=0.25, ties=ties, sample=False, strict=None, validation=played(10, 0.19), fresh=fresh_played
        ), router

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("alfworld-tiny", "webshop-tiny"):
        recipe = Path(__file__).parents[1] / "recipes" / f"{name}.yaml"
        (tmp_path / "recipes" / recipe.name).write_bytes(recipe.read_bytes())
    monkeypatch.setattr(stages, "verify_current", lambda stage, _: SimpleNamespace(path=tmp_path / stage))
    monkeypatch.setattr(route_calibration, "calibrate", calibrate)
    monkeypatch.setattr(console, "_width", 100)
    return found


@pytest.fixture
def games(monkeypatch: pytest.MonkeyPatch) -> None:
    some = SimpleNamespace(read_tasks=lambda *_: ["a game"] * 10, fresh_tasks=lambda count: ["another"] * count)
    monkeypatch.setattr(benchmark, "benchmark_of", lambda _: some)


def dmr_route(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["route", "calibrate", *arguments])


@pytest.mark.usefixtures("games")
def test_json_and_nothing_else(asked: list[object]) -> None:
    told = json.loads(dmr_route("--recipe", "alfworld-tiny", "--high-ratio", "0.2", "--json").stdout)
    name, budget, artifacts, fresh, folder = asked
    assert (name, fresh, folder) == ("grpo_router", 200, Path("data/scratch/alfworld-tiny/route"))
    assert (budget.high_ratio, budget.cost, budget.sample, budget.strict) == (0.2, None, False, False)
    assert artifacts == ["benchmark_tasks", "grpo_router", "quantized_checkpoints"]
    wanted = {"threshold": 0.25, "ties": 0.5, "validation_high_ratio": 0.19, "validation_success": 0.8}
    wanted |= {"fresh_high_ratio": 0.21, "fresh_success": 0.8, "fresh_games": 200, "written": None}
    assert wanted.items() <= told.items()
    assert told["fresh_high_ratio_ci95"] == pytest.approx([0.18, 0.24])
    assert told["settings"]["threshold"] == 0.25
    assert told["settings"]["ties"] == 0.5


@pytest.mark.usefixtures("games")
def test_lines_and_the_router_that_is_written(asked: list[object], tmp_path: Path) -> None:
    arguments = ("--router", "kl_router", "--cost", "0.5", "--sample", "--fresh-games", "7", "--write", "settled")
    result = dmr_route(*arguments)
    assert result.exit_code == 0, result.output
    assert (asked[0], asked[1].cost, asked[1].sample, asked[3]) == ("kl_router", 0.5, True, 7)
    assert "on 7 fresh games: high-precision ratio 21.0% [18.0, 24.0], success 80.0% [70.0, 90.0]" in result.output
    assert '"threshold": 0.25' in result.output
    assert load_router(tmp_path / "settled", CPU).settings.ties == 0.5
    again = dmr_route(*arguments)
    assert again.exit_code == 2
    assert "--write settled: there is something already" in again.output


@pytest.mark.usefixtures("games")
def test_a_rule_has_no_weights_and_is_deployed_by_its_name(asked: list[object]) -> None:
    result = dmr_route("--router", "margin", "--high-ratio", "0.2")
    assert result.exit_code == 0, result.output
    assert asked[0] == "margin"
    assert asked[2] == ["benchmark_tasks", "quantized_checkpoints"]
    assert "to deploy it: dmr serve alfworld-tiny --static 'margin>0.25'" in result.output
    told = json.loads(dmr_route("--router", "margin", "--high-ratio", "0.2", "--json").stdout)
    assert (told["static"], told["settings"]) == ("margin>0.25", None)
    # What is drawn by lot at its threshold is more than a name tells.
    assert json.loads(dmr_route("--router", "stuck", "--high-ratio", "0.2", "--json").stdout)["static"] is None
    for arguments, said in (
        (("--router", "sense"), "name one of kl_router, grpo_router, random"),
        (("--router", "margin", "--write", "settled"), "margin has no weights"),
    ):
        refused = dmr_route(*arguments, "--high-ratio", "0.2")
        assert (refused.exit_code, said in refused.output) == (2, True), refused.output


def test_a_benchmark_whose_tasks_are_a_list_has_no_fresh_ones(
    asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmr_pipeline.environments.webshop.benchmark import GeneratedShop

    monkeypatch.setattr(GeneratedShop, "read_tasks", lambda *_: ["a goal"] * 10)
    result = dmr_route("--recipe", "webshop-tiny", "--high-ratio", "0.2")
    assert "webshop has no fresh games: its tasks are a list that ends" in result.output
    told = json.loads(dmr_route("--recipe", "webshop-tiny", "--high-ratio", "0.2", "--json").stdout)
    assert told["fresh_success"] is None


def test_a_budget_has_to_be_given(asked: list[object]) -> None:
    result = dmr_route()
    assert result.exit_code == 2
    assert "give one budget: --high-ratio 0.2, or --cost 0.5" in result.output
    assert not asked
