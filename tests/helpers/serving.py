"""Routed agents at work on random models: games played through them, and what must come out."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from openai import OpenAI
from starlette.testclient import TestClient

from dmr_pipeline.agent.checkpoint import load_tokenizer
from dmr_pipeline.artifacts.folders import publish
from dmr_pipeline.artifacts.manifest import folder_hash, hash_files, write_manifest
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.kl_router import RouterModel
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.model import Router, new_router, save_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.serve.agent import RoutedAgent
from dmr_pipeline.serve.app import make_app
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.settings import ServeSettings
from dmr_pipeline.stages.quantized_checkpoints import quantized_checkpoints
from dmr_pipeline.stages.released_router import promote, released_router
from tests.helpers.ladders import write_inputs
from tests.helpers.micro_recipe import RECIPE_YAML
from tests.helpers.rollouts import rollouts_of
from tests.helpers.routers import AGENTS, ARCHITECTURE, ROUTE, TOKENIZER, enlarge

SERVED = "served"


def babbling(**changes: object) -> Rollouts:
    """The random agents that the random routers of helpers/routers.py and probes.py are for."""
    rollouts = rollouts_of(ROUTE)
    acting = ActingModels({rung: AGENTS[rung] for rung in ROUTE}, rollouts.acting.pass_bytes, rollouts.device)
    given = {"acting": acting, "prompter": Prompter.of(TOKENIZER, Prompt()), "step_limit": 7, **changes}
    return replace(rollouts, **given)


def play_by_hand(agent: RoutedAgent, run: RolloutRequest, step_limit: int, commands: bool = False) -> Trajectory:
    """One game, its environment here."""
    episode = run.task.episode()
    observation, reward, over = episode.reset(), 0.0, False
    agent.begin(run.task, run.member)
    while not over and agent.session.turn < step_limit:
        action = agent.act(observation, episode.admissible_commands() if commands else None)
        observation, reward, over = episode.step(action.command)
    return agent.end(reward >= 1, reward, observation)


def as_told(played: list[Trajectory]) -> list[Trajectory]:
    """The episodes without what only an environment that is here can tell, probabilities in full thousandths."""
    return [
        replace(
            trajectory,
            steps=[
                replace(
                    step,
                    failure=None if step.failure == "inadmissible" else step.failure,
                    exceedance=tuple(round(level, 3) for level in step.exceedance),
                )
                for step in trajectory.steps
            ],
        )
        for trajectory in played
    ]


def served_content() -> dict[str, object]:
    """A recipe of agents that babble, on four games."""
    content = yaml.safe_load(RECIPE_YAML)
    content["benchmark"]["splits"] |= {"agent_train": 1, "validation": 4, "test": 2}
    content["benchmark"]["step_limit"] = 5
    content["agent"]["prompt"] = {"max_action_tokens": 6}
    content["precisions"]["ladder"] = [{"name": rung, "weights": rung} for rung in ROUTE]
    content["precisions"]["kl_episodes"] = 1
    content["runtime"] = {"device": "cpu", "threads": 1, "processes": 1}
    return content


def served_recipe() -> Recipe:
    return Recipe.model_validate({"name": SERVED, **served_content()})


def make_served_project(folder: Path) -> None:
    """A project whose ladder is made, and whose first router, of random weights, is released."""
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / f"{SERVED}.yaml").write_text(yaml.safe_dump(served_content()))
    artifacts = folder / "data" / SERVED
    games = {split: [generate_game(number + 100 * i, 50)[0] for number in range(count)]
             for i, (split, count) in enumerate(served_recipe().benchmark.splits)}  # fmt: skip
    inputs = write_inputs(artifacts, **games)
    checkpoints = artifacts / "quantized_checkpoints"
    checkpoints.mkdir()
    (folder / "scratch").mkdir()
    quantized_checkpoints(StageContext(served_recipe(), inputs, checkpoints, folder / "scratch"))
    write_manifest(checkpoints)
    release(folder, threshold_between(artifacts))


def threshold_between(artifacts: Path) -> float:
    """At which the router of `release` lets both rungs act, no probability being close to it."""
    router = trained(artifacts, 0.5)
    rollouts = Rollouts.load(artifacts / "quantized_checkpoints", served_recipe())
    games = benchmark_of(served_recipe().benchmark).read_tasks(artifacts / "benchmark_tasks", "router_train")
    played = rollouts.play([RolloutRequest(game) for game in games], routing_policy(router, 4), 0)
    levels = sorted(step.exceedance[0] for trajectory in played for step in trajectory.steps)
    middle = levels[len(levels) // 4 : -len(levels) // 4]
    _, low, high = max((after - before, before, after) for before, after in pairwise(middle))
    return (low + high) / 2


def trained(artifacts: Path, threshold: float) -> Router:
    tokenizer = load_tokenizer(artifacts / "quantized_checkpoints" / "tokenizer")
    router = new_router(RouterModel(architecture=ARCHITECTURE), ROUTE, tokenizer, 3, torch.device("cpu"))
    enlarge(router.model)
    return replace(router, settings=router.settings.model_copy(update={"threshold": threshold}))


def release(folder: Path, threshold: float) -> None:
    """The router at this threshold becomes the one in use, as a run of the pipeline would have it."""
    artifacts = folder / "data" / SERVED
    shutil.rmtree(artifacts / "grpo_router", ignore_errors=True)
    save_router(trained(artifacts, threshold), artifacts / "grpo_router" / "router")
    names = ("benchmark_tasks", "quantized_checkpoints", "grpo_router")
    inputs = {"quantized_checkpoints": folder_hash(hash_files(artifacts / "quantized_checkpoints"))}
    write_manifest(artifacts / "grpo_router", inputs=inputs)
    folder_now, new = artifacts / "released_router", artifacts / ".released_router.new"
    new.mkdir()
    previous = folder_now if folder_now.exists() else None
    context = StageContext(served_recipe(), {n: artifacts / n for n in names}, new, folder / "scratch", previous)
    (promote if previous else released_router)(context)
    write_manifest(new, stage="released_router")
    publish(new, folder_now)


def play_by_client(client: OpenAI, game: Task, model: str, stream: bool, step_limit: int) -> list[tuple[str, str]]:
    """Command and precision of each step, by the official client; the outcome is posted."""
    world = game.episode()
    messages, done, over, reward = [{"role": "user", "content": world.first_observation()}], [], False, 0.0
    name = f"{game.task_id}-{stream}"
    while not over and len(done) < step_limit:
        asked = {"model": model, "messages": messages, "extra_headers": {"x-session-id": name},
                 "metadata": {"task_id": game.task_id, "task_type": game.task_type}}  # fmt: skip
        if stream:
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            served, usage = chunks[0].model, chunks[-1].usage
        else:
            answer = client.chat.completions.create(**asked)
            text, served, usage = answer.choices[0].message.content, answer.model, answer.usage
        assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens >= 0
        observation, reward, over = world.step(text)
        done.append((text, served.partition(":")[2]))
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": observation}]
    said = client.post(
        f"/sessions/{name}/outcome", body={"success": reward >= 1, "observation": observation}, cast_to=object
    )
    assert said["logged"], said
    return done


@contextmanager
def client_of(**settings: object) -> Iterator[TestClient]:
    service = Service(ServeSettings(recipe=SERVED, **settings))
    with TestClient(make_app(service), base_url="http://127.0.0.1") as client:
        client.service = service
        yield client


def chat(client: TestClient, *texts: str, model: str = f"dmr/{SERVED}", headers=None, **fields: object):
    """A conversation of the user's and the assistant's texts by turns."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return client.post("/v1/chat/completions", json={"model": model, "messages": messages, **fields}, headers=headers)


@contextmanager
def dmr_serve(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in the working directory; gives its address."""
    command = [sys.executable, "-m", "dmr_pipeline", "serve", SERVED, "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = next((found[0] for line in process.stdout if (found := re.findall(r"http://[\d.:]+", line))), None)
        assert address, process.stderr.read()
        yield address, process
    finally:
        process.kill()
        process.wait()
