"""`dmr provenance`: where an artifact comes from, back to the seeds."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from dmr_pipeline.cli.common import console, user_errors_exit_2
from dmr_pipeline.versioning.provenance import Chain, Origin, common_libraries, run_libraries, trace


@user_errors_exit_2
def provenance(
    path: Annotated[Path, typer.Argument(help="an artifact's folder, data/RECIPE/STAGE, or a file in it")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Show which artifacts, code, seeds and runs an artifact was made from."""
    chain = trace(path)
    if as_json:
        typer.echo(json.dumps(_as_json(chain), indent=2))
        return
    shared = common_libraries(chain)
    tree = Tree(_describe(chain.origins[chain.stage], shared, Text()))
    _add_inputs(tree, chain, chain.stage, shared, {chain.stage})
    console.print(tree)
    if shared:
        console.print(f"libraries of all these runs: {_listed(shared)}", soft_wrap=True, highlight=False)


def _add_inputs(tree: Tree, chain: Chain, stage: str, shared: dict[str, str], shown: set[str]) -> None:
    """Each artifact in full where it comes up first; later only its name."""
    for name, used in chain.origins[stage].artifact.manifest.inputs.items():
        note = _note(used, chain.now(name))
        if name in chain.problems:
            tree.add(Text.assemble((name, "bold"), note, (f"\n{chain.problems[name]}", "red")))
        elif name in shown:
            tree.add(Text.assemble((name, "bold"), f" {chain.now(name)} (above)", note))
        else:
            shown.add(name)
            branch = tree.add(_describe(chain.origins[name], shared, note))
            _add_inputs(branch, chain, name, shared, shown)


def _note(used: str, now: str | None) -> Text:
    """Empty where the input that is there is the one that was used."""
    if used == now:
        return Text()
    there = "there is none now" if now is None else f"there is now {now}"
    return Text(f"\nwas made from {used}, {there}", style="yellow")


def _describe(origin: Origin, shared: dict[str, str], note: Text) -> Text:
    manifest, run = origin.artifact.manifest, origin.run
    lines = [
        f"recipe {manifest.recipe}: {', '.join(manifest.sections)}",
        f"seeds: {_listed(origin.seeds()) or 'none'}",
    ]
    if run is None:
        lines.append("made elsewhere: no record of the run")
    else:
        differing = {name: version for name, version in run_libraries(run).items() if name not in shared}
        git = "no Git" if run.git is None else f"git {run.git.commit}"
        lines += [
            git + ("" if run.git is None or run.git.clean else " with uncommitted changes"),
            f"device: {run.device.name}"
            + (f", CUDA {run.device.cuda}" if run.device.cuda else "")
            + f"; threads {run.runtime.threads}, processes {run.runtime.processes}",
            f"made {run.finished:%Y-%m-%d %H:%M} UTC in {run.seconds:.1f} s"
            + (f", run {run.run_id}" if run.run_id else ""),
            *([f"libraries that differ between the runs: {_listed(differing)}"] if differing else []),
        ]
    heading = (f"{manifest.stage}", "bold"), f" {origin.artifact.hash}, code version {manifest.code_version}"
    return Text.assemble(*heading, note, *(f"\n{line}" for line in lines))


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _as_json(chain: Chain) -> dict[str, Any]:
    """The chain as a flat list, since an artifact may be an input of several."""
    return {
        "stage": chain.stage,
        "artifacts": [
            {
                "stage": stage,
                "recipe": origin.artifact.manifest.recipe,
                "path": str(origin.artifact.path),
                "hash": origin.artifact.hash,
                "code_version": origin.artifact.manifest.code_version,
                "sections": origin.artifact.manifest.sections,
                "seeds": origin.seeds(),
                "inputs": {
                    name: {"used": used, "now": chain.now(name)}
                    for name, used in origin.artifact.manifest.inputs.items()
                },
                "run": None if origin.run is None else origin.run.model_dump(mode="json", exclude={"log"}),
            }
            for stage, origin in chain.origins.items()
        ],
        "problems": chain.problems,
    }
