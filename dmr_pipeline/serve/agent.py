"""A routed agent for a loop of your own: it is told what the environment shows, and says what to do.

    agent = RoutedAgent.load("alfworld-tiny")
    agent.begin(Goal("kitchen/17", "pick_and_place_simple", "put some apple on sidetable."))
    while not over:
        action = agent.act(observation)
        observation, over = carry_out(action.command)
    episode = agent.end(success)

`decide` asks the router alone, for those who run the models elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import Decision, rungs_of
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.rules import is_rule_at_bar
from dmr_pipeline.serve import release
from dmr_pipeline.serve.deciders import decider_of
from dmr_pipeline.serve.local import Ask, LocalAgents, Turn
from dmr_pipeline.serve.sessions import UNLIMITED, Action, Budget, Goal, Session

__all__ = ["Action", "Budget", "Goal", "RoutedAgent", "Turn"]


class RoutedAgent:
    """One episode at a time, with the rungs that a recipe routes between."""

    def __init__(self, rollouts: Rollouts, router: Router | str, release: int | None = None, seed: int = 0) -> None:
        """
        Args:
            router: that decides; or the name of what needs none: a rung, which then acts throughout; `int4<int2`, of which the
                first checks what the second drafts; or `margin>0.4`, a rule at a threshold (`rule_at_bar`).
            release: number of the router's release, if it is one.
            seed: of actions that are drawn at a temperature.
        """
        self.rollouts = rollouts
        self._agents = LocalAgents(rollouts, slots=1, seed=seed)
        self.decider = self._agents.untrained(router) if isinstance(router, str) else decider_of(router, 1, release)
        self._session: Session | None = None

    @classmethod
    def load(cls, recipe: str, router: Path | str | None = None, data_root: Path = DATA_ROOT) -> "RoutedAgent":
        """From the project in the working directory.

        Args:
            router: folder of a router, or the name of what needs none, as above, of any rungs of the ladder; the released router
                by default.

        Raises:
            UserError: an artifact is missing, or the router is for other rungs.
        """
        checkpoints = verify(artifact_folder("quantized_checkpoints", recipe, data_root)).path
        number = None
        if router is None:
            router, number = release.released(recipe, data_root)
        rungs = rungs_of(router) if isinstance(router, str) and not is_rule_at_bar(router) else None
        rollouts = Rollouts.load(checkpoints, load_recipe(recipe), rungs)
        return cls(rollouts, router if isinstance(router, str) else release.load(router, rollouts), number)

    @property
    def session(self) -> Session:
        """The episode that goes on: its steps, actions, spend and cost so far.

        Raises:
            UserError: none does.
        """
        if self._session is None:
            raise UserError("no episode has begun: call begin(task) first")
        return self._session

    def begin(self, task: Task, member: int = 0, budget: Budget = UNLIMITED) -> None:
        """A new episode; one that was not ended is given up.

        Args:
            task: a benchmark's, or a `Goal` whose environment is elsewhere.
            member: tells episodes of one task apart where actions are drawn.
        """
        if self._session is not None:
            self._agents.close(self._session)
        self._session = self._agents.open(
            f"{task.task_id}/{member}", RolloutRequest(task, member), self.decider, budget
        )

    def act(self, observation: str, admissible_commands: Sequence[str] | None = None) -> Action:
        """
        Args:
            observation: the first one without the instruction; then what the last command has shown.
            admissible_commands: that do something here, for agents that choose among them or read them, and routers that
                force search steps.

        Raises:
            UserError: the episode has had its steps, or its transcript has no room for another; or no commands came where
                they are needed.
        """
        (action,) = self._agents.act([Ask(self.session, observation, admissible_commands)])
        if isinstance(action, Exception):
            raise action
        return action

    def end(self, success: bool, reward: float | None = None, observation: str = "") -> Trajectory:
        """The episode as it was played.

        Args:
            reward: in [0, 1]; by default that of success.
            observation: what the last command has shown.
        """
        session, self._session = self.session, None
        self._agents.close(session)
        trajectory = session.trajectory
        trajectory.reward = float(success) if reward is None else reward
        if trajectory.steps:
            trajectory.steps[-1] = replace(trajectory.steps[-1], observation=observation)
        return trajectory

    def decide(
        self, task: Task, past: Sequence[Turn], observation: str, admissible_commands: Sequence[str] | None = None
    ) -> Decision:
        """Which precision is to act, after these steps. Nothing acts, and no episode goes on; a probe's agent reads the
        transcript.

        Args:
            past: steps taken so far, with the precisions that acted, which a router may read.
        """
        session = self._agents.open(task.task_id, RolloutRequest(task), self.decider, past=past)
        return self._agents.decide(Ask(session, observation, admissible_commands)).decision
