"""The example of an own loop, on a project whose agents babble."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from dmr_pipeline.errors import UserError
from dmr_pipeline.serve.agent import RoutedAgent
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.scripts import load_script
from tests.helpers.serving import SERVED, release


@pytest.fixture
def example() -> ModuleType:
    return load_script(REPOSITORY / "examples" / "own_agent_loop.py")


def test_its_games_are_played_as_the_pipeline_plays_them(
    served_project: Path, example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["own_agent_loop.py", "--recipe", SERVED, "--games", "4", "--check"])
    example.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "4 of 4 are played by the pipeline in the same way"
    assert len(shown) == 6
    assert "float" in "".join(shown)
    assert "int2" in "".join(shown)


def test_a_router_of_other_rungs_is_refused(served_project: Path) -> None:
    agent = RoutedAgent.load(SERVED)
    assert (agent.decider.release, agent.decider.threshold) == (1, pytest.approx(agent.decider.threshold))
    release(served_project, 0.25)
    again = RoutedAgent.load(SERVED)
    assert (again.decider.release, again.decider.threshold) == (2, 0.25)
    settings = served_project / "data" / SERVED / "grpo_router" / "router" / "router.json"
    settings.write_text(settings.read_text().replace('"int2"', '"int3"'))
    with pytest.raises(UserError, match="the recipe routes between float, int2"):
        RoutedAgent.load(SERVED, settings.parent)
