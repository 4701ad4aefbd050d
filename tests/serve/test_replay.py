"""Releases on logged episodes: what is read from the log is what was decided at work."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dmr_pipeline.cli.common import console
from dmr_pipeline.cli.router import router as router_commands
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.schema import EXAMPLE, LoggedEpisode
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.serve import release as releases
from dmr_pipeline.serve.deciders import decider_of
from dmr_pipeline.serve.journal import episode_of
from dmr_pipeline.serve.local import Ask, LocalAgents
from dmr_pipeline.serve.replay import is_usable, logged_episodes, logged_run
from dmr_pipeline.serve.requests import Which
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.sessions import Budget, Session
from dmr_pipeline.serve.settings import ServeSettings
from tests.helpers.serving import SERVED, release


def log_episodes(folder: Path, count: int, epsilon: float) -> None:
    """Of a step each, as agents at work leave them; won where the dearer rung acted."""
    service = Service(ServeSettings(recipe=SERVED, epsilon=epsilon))
    agents, decider = service.backend.agents, service.backend.deciders.find(Which())
    for number in range(count):
        game = generate_game(5000 + number % 7, 50)[0]
        session = agents.open(f"{number}", RolloutRequest(game), decider)
        world = game.episode()
        observation = world.reset()
        (action,) = agents.act([Ask(session, observation)])
        assert not isinstance(action, UserError)
        observation, _, _ = world.step(action.command)
        won = session.trajectory.steps[0].precision == "float"
        service.journal.write(episode_of(session, won, None, observation))
        agents.close(session)
    service.backend.stop()


def five_steps(agents: LocalAgents, session: Session, game: Task) -> LoggedEpisode:
    """Of this game, as the log has them."""
    world = game.episode()
    observation = world.reset()
    for _ in range(5):
        (action,) = agents.act([Ask(session, observation)])
        assert not isinstance(action, UserError)
        observation, _, _ = world.step(action.command)
    return episode_of(session, True, None, observation)


def dmr_router(*arguments: str):
    return CliRunner().invoke(router_commands, [*arguments, "--recipe", SERVED])


def test_a_release_is_estimated_from_what_was_logged(served_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 120)
    log_episodes(served_project, 70, epsilon=1.0)  # every decision is drawn
    release(served_project, 0.0)  # always the dearer one: it would win each
    done = dmr_router("replay", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output[done.output.index("{") :])
    assert found["estimate"]["episodes"] == 70
    assert found["estimate"]["self_normalised"][0] == pytest.approx(1.0)
    assert found["estimate"]["doubly_robust"][0] == pytest.approx(1.0, abs=0.15)
    assert 0.4 < found["estimate"]["logged"] < 0.6
    assert 20 < found["estimate"]["effective"] < 60
    assert found["agreement"] == pytest.approx(0.5, abs=0.1)
    shown = dmr_router("replay", "2").output
    assert "doubly robust" in shown
    assert "0 episodes are left out" in shown


def test_what_the_log_does_not_tell_is_refused(served_project: Path) -> None:
    log_episodes(served_project, 3, epsilon=0.0)
    assert "tell as much as 3.0" in dmr_router("replay", "1").output  # of itself it tells all, but these are few
    release(served_project, 0.0)
    refused = dmr_router("replay", "2")
    assert refused.exit_code == 2
    assert "nothing was drawn" in refused.output
    assert "no release 9" in dmr_router("replay", "9").output


def test_the_log_holds_all_that_the_router_has_decided_on(served_project: Path) -> None:
    """Its chances are 0 or 1 as it decided, and its levels those of then."""
    rollouts = Rollouts.load(served_project / "data" / SERVED / "quantized_checkpoints", load_recipe(SERVED))
    router = releases.load(served_project / "data" / SERVED / "released_router" / "router", rollouts)
    agents, decider = LocalAgents(rollouts, slots=1), decider_of(router, 1, 1)
    for number in range(3):
        game = generate_game(100 + number, 50)[0]
        session = agents.open("a", RolloutRequest(game), decider)
        episode = five_steps(agents, session, game)
        assert is_usable(episode, router.settings.route)
        run = logged_run(episode, LocalAgents(rollouts, slots=1), decider_of(router, 1), router)
        # What the agent wrote beside its command is not logged, so levels may differ a little after babble.
        assert run.numbers[0, 1] == pytest.approx(session.actions[0].probability, abs=1e-4)
        assert run.target[0].tolist() == [float(session.actions[0].precision == rung) for rung in router.settings.route]
        assert run.ratios[0] == 1.0
        assert np.isin(run.target, (0.0, 1.0)).all()
        assert not is_usable(replace_reason(episode, "fixed"), router.settings.route)


def test_a_budget_of_the_session_would_have_held_the_target_too(served_project: Path) -> None:
    release(served_project, 0.0)  # always the dearer one, where it may
    rollouts = Rollouts.load(served_project / "data" / SERVED / "quantized_checkpoints", load_recipe(SERVED))
    with releases.earlier(SERVED, 2) as folder:
        router = releases.load(folder, rollouts)
    agents, game = LocalAgents(rollouts, slots=1), generate_game(100, 50)[0]
    session = agents.open("a", RolloutRequest(game), decider_of(router, 1, 2), Budget(high_ratio=0.4))
    episode = five_steps(agents, session, game)
    assert [step.reason for step in episode.steps] == ["budget", "budget", "router", "budget", "router"]
    assert is_usable(episode, router.settings.route)
    run = logged_run(episode, LocalAgents(rollouts, slots=1), decider_of(router, 1, 2), router)
    assert run.target.tolist() == [[0, 1], [0, 1], [1, 0], [0, 1], [1, 0]]
    assert run.ratios.tolist() == [1.0] * 5


def test_files_that_would_not_be_ingested_are_no_log(served_project: Path) -> None:
    incoming = served_project / "data/incoming" / SERVED
    incoming.mkdir(parents=True, exist_ok=True)
    for name in ("once", "again"):
        (incoming / f"{name}.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    found = logged_episodes(load_recipe(SERVED), served_project / "data")
    assert [episode.episode_id for episode in found] == [EXAMPLE["episode_id"]]


def replace_reason(episode, reason: str):
    first, *rest = episode.steps
    return episode.model_copy(update={"steps": [first.model_copy(update={"reason": reason}), *rest]})
