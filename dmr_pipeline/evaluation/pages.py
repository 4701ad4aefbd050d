"""Results pages: what stands in the places of `dmr report RECIPE` (places.py), from metrics that lie in Git beside the pages.

`RESULTS/<recipe>.metrics.json` is a copy of the evaluation's file, `RESULTS/<recipe>.runs.json` says when, where and in what time
its stages were made.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

from pydantic import AwareDatetime, TypeAdapter

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.run_record import read_run_record
from dmr_pipeline.atomic import replaced
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import places
from dmr_pipeline.evaluation.places import RESULTS
from dmr_pipeline.evaluation.report import curves_table, markdown_table
from dmr_pipeline.evaluation.results import STATIC, Metrics, checking_name, shown_name
from dmr_pipeline.frozen_model import FrozenModel


class StageRun(FrozenModel):
    """Of the run record beside an artifact, what a reader asks for."""

    finished: AwareDatetime
    seconds: float
    commit: str | None
    """None outside of a Git checkout."""
    clean: bool
    """No tracked file differed from the commit."""
    cpu: str
    cores: int | None
    device: str
    torch: str | None


_RUNS = TypeAdapter(dict[str, StageRun])


class Result(NamedTuple):
    """What lies in Git of a recipe's evaluation."""

    folder: Path
    metrics: Metrics
    runs: dict[str, StageRun]
    """Stage -> its run; without those that were made elsewhere, as an agent that lies in Git."""


def write_pages(recipe: str, root: Path = Path()) -> dict[Path, bool]:
    """As `places.write`.

    Raises:
        UserError: also where nothing has been kept of the recipe.
    """
    return places.write("report", recipe, parts_of(read_result(recipe, root / RESULTS)), root)


def filled(text: str, page: Path, recipe: str, result: Result) -> str:
    """As `places.filled`."""
    return places.filled(text, page, "report", recipe, parts_of(result))


def parts_of(result: Result) -> places.Parts:
    return {name: partial(part, result) for name, part in PARTS.items()}


def table(result: Result, page: Path) -> str:
    """All policies, and a note."""
    return markdown_table(result.metrics)


def curves(result: Result, page: Path) -> str:
    """Routers and rules at all budgets, and a note."""
    return curves_table(result.metrics)


def brief(result: Result, page: Path) -> str:
    """At most seven policies and three columns: both ends of the route, the dear one checking what the cheap one drafts, the
    chosen router, random routing at its ratio, the best rule at its cost, and the best static policy that costs no more."""
    metrics, name = result.metrics, result.metrics["headline"]
    high = metrics["route"][0]
    static = (metrics["high"], checking_name(high, metrics["route"][-1]), metrics["low"])
    rows = {
        **{policy: shown_name(policy, metrics) for policy in static if policy in metrics["policies"]},
        f"random@{name}": "random, as often as the router",
        name: "**the router that validation games chose**",
    }
    if name in metrics.get("best_rules", {}):
        rows[f"rule@{name}"] = f"the best rule that nobody trained, `{metrics['best_rules'][name]['rule']}`"
    for pair in metrics["paired"]:
        if (
            pair["policy"] == name
            and pair["p_holm"] is not None
            and metrics["policies"][pair["against"]]["kind"] in STATIC
            and pair["against"] not in rows
        ):
            rows[pair["against"]] = f"{shown_name(pair['against'], metrics)}, without any router"
    lines = [f"| | games won | cost of an episode | steps at {high} |", "| --- | ---: | ---: | ---: |"]
    for policy, shown in rows.items():
        found = metrics["policies"][policy]
        low_end, high_end = (f"{end * 100:.1f}" for end in found["ci95"])
        won = f"{found['success']:.1%} [{low_end}, {high_end}]"
        lines.append(f"| {shown} | {won} | {found['cost']:.2f} | {found['shares'][high]:.0%} |")
    return "\n".join(lines)


def run(result: Result, page: Path) -> str:
    """When, where, with which code, and in what time the stages were made."""
    runs = result.runs
    if (last := runs.get("evaluation_report")) is None:
        raise UserError(
            "evaluation_report has no run record here, since it was made on another machine: write its pages there"
        )
    total = sum(stage.seconds for stage in runs.values())
    commit = f"commit {last.commit[:7]}{'' if last.clean else ', changed,'}" if last.commit else "code outside of Git"
    device = "" if last.device == last.cpu else f", {last.device}"
    longest = sorted(runs, key=lambda stage: -runs[stage].seconds)[:3]
    times = ", ".join(f"{stage} {_time(runs[stage].seconds)}" for stage in longest)
    return (
        f"*Made on {last.finished:%Y-%m-%d} with {commit} and torch {last.torch}, on {last.cores} cores of {last.cpu}{device}."
        f" The stages took {_time(total)} ({times}).*"
    )


def picture(result: Result, page: Path) -> str:
    """Accuracy against cost, drawn into RESULTS."""
    from dmr_pipeline.evaluation.picture import draw  # matplotlib takes a second to import

    recipe = result.metrics["recipe"]
    file = result.folder / f"{recipe}.svg"
    draw(result.metrics, file)
    target = Path(os.path.relpath(file, page.parent)).as_posix()
    return f"![Games won against the cost of an episode, for each policy of {recipe}]({target})"


PARTS: Mapping[str, Callable[[Result, Path], str]] = {
    part.__name__: part for part in (table, curves, brief, run, picture)
}
"""What a marker may ask for."""


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def keep(data_root: Path, recipe: str, stages: Iterable[str], results: Path = RESULTS) -> None:
    """Copy the metrics of a recipe's evaluation into `results`, and what its run records say.

    Args:
        data_root: holds `<recipe>/<stage>`.
        recipe: its name.
        stages: the pipeline's; each has an artifact.
        results: where to.

    Stages that came from elsewhere have no run record here: what was kept of them beside the same metrics stays.

    Raises:
        UserError: an artifact is missing or damaged.
    """
    made = artifact_folder("evaluation_report", recipe, data_root) / "metrics.json"
    metrics, kept = _metrics_file(recipe, results), _runs_file(recipe, results)
    unchanged = made.is_file() and metrics.is_file() and kept.is_file() and made.read_bytes() == metrics.read_bytes()
    runs = _RUNS.validate_json(kept.read_bytes()) if unchanged else {}
    for stage in stages:
        record = read_run_record(verify(artifact_folder(stage, recipe, data_root)))
        if record is not None:
            runs[stage] = StageRun(
                finished=record.finished,
                seconds=record.seconds,
                commit=record.git.commit if record.git else None,
                clean=record.git is not None and record.git.clean,
                cpu=record.machine.cpu,
                cores=record.machine.cores,
                device=record.device.name,
                torch=record.libraries.get("torch"),
            )
    results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made, metrics)
    with replaced(kept) as part:
        part.write_bytes(_RUNS.dump_json(runs, indent=2) + b"\n")


def read_result(recipe: str, results: Path = RESULTS) -> Result:
    """
    Raises:
        UserError: nothing has been kept of this recipe.
    """
    metrics, runs = _metrics_file(recipe, results), _runs_file(recipe, results)
    if not metrics.is_file() or not runs.is_file():
        raise UserError(
            f"{metrics} and {runs.name} are not both there: `dmr run {recipe}`, then `dmr report {recipe} --markdown`"
        )
    return Result(
        results, cast(Metrics, json.loads(metrics.read_text(encoding="utf-8"))), _RUNS.validate_json(runs.read_bytes())
    )


def _metrics_file(recipe: str, results: Path) -> Path:
    return results / f"{recipe}.metrics.json"


def _runs_file(recipe: str, results: Path) -> Path:
    return results / f"{recipe}.runs.json"
