"""A study's results on the pages of docs/: `RESULTS/<study>.study.json` lies in Git, and fills its places there."""

from functools import partial
from pathlib import Path

from pydantic import ValidationError

from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import places
from dmr_pipeline.evaluation.interval_text import in_brackets, seen_in_points
from dmr_pipeline.study.results import ORACLE, Compared, Point, Results


def results_file(study: str, results: Path = places.RESULTS) -> Path:
    return results / f"{study}.study.json"


def read_results(study: str, results: Path = places.RESULTS) -> Results:
    """
    Raises:
        UserError: they are not there, or of another version.
    """
    path = results_file(study, results)
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: `dmr study run studies/{study}.yaml --markdown`") from error
    except ValidationError as error:
        raise UserError(f"{path} is of another version: run the study again") from error


def write_pages(study: str, root: Path = Path()) -> dict[Path, bool]:
    """As `places.write`."""
    return places.write("study", study, parts_of(read_results(study, root / places.RESULTS)), root)


def parts_of(results: Results) -> places.Parts:
    parts = {"table": _table, "references": _references, "comparisons": _comparisons}
    return {name: partial(part, results) for name, part in parts.items()}


def _table(results: Results, page: Path) -> str:
    """All policies at all budgets, and a note."""
    seeds = any(len(point.by_seed) > 1 for point in results.points)
    columns = ["policy", "budget", "success", *(["seeds ±"] if seeds else []), "ratio", "cost", "gain at equal cost"]
    rows = [_row(point, seeds) for point in results.points]
    seeds_said = f"means of the training seeds {_list(results.study.seeds)}" if seeds else "of one training"
    trained = f"; routers are {seeds_said}" if results.study.routers else ""
    tuned = f", tuned on {results.study.validation_games} validation games" if results.study.validation_games else ""
    lookup = " Prompt lookup at every precision; the unit of cost is an episode at a pass a token."
    note = (
        f"{results.games} {_which(results)}{tuned}; brackets: {results.confidence:.0%} intervals, by"
        f" game{trained}. Budget: spend at most, on validation games. Gain: points of success over static policies (single"
        f" precisions, checked drafts) and mixtures of their episodes at equal cost.{lookup if results.prompt_lookup else ''}"
    )
    return "\n".join([*_lines(columns, rows, 2), "", note])


def _which(results: Results) -> str:
    """Which games were played at the end."""
    study = results.study
    order = "" if study.reworded is None else ", which list what is seen in another order"
    limit = "" if study.step_limit is None else f", of at most {study.step_limit} steps"
    return f"{_of_seeds(results)}{order}{limit}"


def _of_seeds(results: Results) -> str:
    study = results.study
    if study.benchmark is None and not results.fresh:
        return "games of the test split"
    if study.benchmark is None:
        passed_over = f", after the first {study.first_game}" if study.first_game else ""
        return f"games of seeds that no split uses{passed_over}"
    said = study.benchmark.model_dump(exclude={"splits", "seed", "step_limit"})
    return f"test games of another benchmark ({', '.join(f'{key}: {value}' for key, value in said.items())})"


def _row(point: Point, seeds: bool) -> list[str]:
    deviation = "" if point.seed_deviation is None else f"{100 * point.seed_deviation:.1f}"
    return [
        point.policy,
        "" if point.budget is None else f"{point.budget:g}",
        f"{point.success:.1%} {in_brackets(point.success_ci95)}",
        *([deviation] if seeds else []),
        f"{point.ratio:.1%}",
        f"{point.cost:.3f} [{point.cost_ci95[0]:.3f}, {point.cost_ci95[1]:.3f}]",
        f"{100 * point.gain:+.1f} {in_brackets(point.gain_ci95)}",
    ]


def _references(results: Results, page: Path) -> str:
    """Each tuned policy against the ends of the route and the oracle."""
    columns = ["policy", "budget", "against", "better by, points", "p", "could have seen", "cost saved"]
    rows = [
        [
            one.policy,
            f"{one.budget:g}",
            named_reference(one.against),
            f"{100 * one.difference:+.1f} {in_brackets(one.difference_ci95)}",
            f"{one.p_value:.3f}",
            seen_in_points(one.smallest_difference),
            f"{one.saved:.0%} {in_brackets(one.saved_ci95)}",
        ]
        for one in results.references
    ]
    note = (
        "Sign-flip tests over games, not corrected for their number. Could have seen: the difference in points that as many games"
        " show with a chance of 80%. The oracle: the dearest precision acts just where the precisions' actions differ."
    )
    return "\n".join([*_lines(columns, rows, 3), "", note])


def named_reference(against: str) -> str:
    """What a policy is compared with, in words."""
    return "the oracle" if against == ORACLE else f"{against} alone"


def _comparisons(results: Results, page: Path) -> str:
    """Routers against the best rule at equal cost."""
    seeds = any(len(one.difference_by_seed) > 1 for one in results.compared)
    by, lost = "better by, points", "lost to the dearest rung"
    trainings = ["of each training"] if seeds else []
    columns = ["router", "budget", "against", by, *trainings, "p (Holm)", lost, "not worse"]
    margin = f"{100 * results.margin:.0f} points"
    note = f"Planned before the run. Not worse: the upper end of what it loses is below {margin}."
    return "\n".join([*_lines(columns, [_compared(one, seeds) for one in results.compared], 3), "", note])


def _compared(one: Compared, seeds: bool) -> list[str]:
    return [
        one.router,
        f"{one.budget:g}",
        one.rule,
        f"{100 * one.difference:+.1f} {in_brackets(one.difference_ci95)}",
        *([by_seed(one.difference_by_seed)] if seeds else []),
        f"{one.p_holm:.3f}",
        f"{100 * one.lost:.1f} {in_brackets(one.lost_ci95)}",
        "shown" if one.not_worse else "not shown",
    ]


def _lines(columns: list[str], rows: list[list[str]], left: int) -> list[str]:
    """
    Args:
        left: columns of words; the others are of numbers.
    """
    ruler = ["---"] * left + ["---:"] * (len(columns) - left)
    return [f"| {' | '.join(row)} |" for row in (columns, ruler, *rows)]


def by_seed(differences: list[float], between: str = ", ") -> str:
    """Of each training seed, in points."""
    return between.join(f"{100 * difference:+.1f}" for difference in differences)


def _list(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))
