"""A loop of your own around a routed agent. An example to start from.

    python examples/own_agent_loop.py                       # 20 games of alfworld-tiny, by its released router
    python examples/own_agent_loop.py --always int2         # by one precision throughout
    python examples/own_agent_loop.py --check               # and say whether the pipeline plays them in the same way

The environment is yours: here it is ALFWorld, of which the agent sees no more than the texts. Run it where `dmr run RECIPE` has
made the ladder and the router.
"""

import argparse
from pathlib import Path

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.serve.agent import Goal, RoutedAgent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="alfworld-tiny")
    parser.add_argument("--games", type=int, default=20, help="of the split that routers learn on")
    parser.add_argument("--router", type=Path, help="folder of a router, such as data/RECIPE/kl_router/router")
    parser.add_argument("--always", help="name of a rung that acts throughout")
    parser.add_argument("--check", action="store_true", help="compare with the pipeline's own rollouts")
    options = parser.parse_args()

    recipe = load_recipe(options.recipe)
    games = benchmark_of(recipe.benchmark).read_tasks(
        verify(artifact_folder("benchmark_tasks", options.recipe)).path, "router_train", options.games
    )
    agent = RoutedAgent.load(options.recipe, options.always or options.router)
    played: list[Trajectory] = []
    for game in games:
        world = game.episode()
        observation, reward, over = world.reset(), 0.0, False
        # All that an agent needs to know of a game. `agent.begin(game)` would do for one of the pipeline's.
        agent.begin(Goal(game.task_id, game.task_type, game.instruction))
        while not over and agent.session.turn < recipe.benchmark.step_limit:
            action = agent.act(observation, world.admissible_commands())
            observation, reward, over = world.step(action.command)
        cost = agent.session.cost
        played.append(agent.end(reward >= 1, reward, observation))
        steps = [step.precision for step in played[-1].steps]
        shares = ", ".join(f"{rung} {steps.count(rung)}" for rung in dict.fromkeys(steps))
        print(f"{game.task_id}: {'won' if played[-1].success else 'lost'} at a cost of {cost:.2f} ({shares})")
    print(f"{sum(trajectory.success for trajectory in played)} of {len(played)} won")

    if options.check:
        policy = agent.decider.policy
        theirs = [agent.rollouts.play([RolloutRequest(game)], policy, seed=0)[0] for game in games]
        same = sum(
            [(step.command, step.precision) for step in mine.steps]
            == [(step.command, step.precision) for step in other.steps]
            for mine, other in zip(played, theirs, strict=True)
        )
        print(f"{same} of {len(played)} are played by the pipeline in the same way")


if __name__ == "__main__":
    main()
