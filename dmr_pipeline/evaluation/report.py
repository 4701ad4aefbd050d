"""The evaluation as people read it: a table for the terminal, one for Markdown, and an HTML file to explore, offline."""

import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table

from dmr_pipeline.artifacts.folders import artifact_folder, sidecar_path
from dmr_pipeline.artifacts.run_record import run_record_beside
from dmr_pipeline.atomic import replaced
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation import charts
from dmr_pipeline.evaluation.interval_text import in_brackets, in_percent, in_points, seen_in_points
from dmr_pipeline.evaluation.results import (
    STATIC,
    BestRule,
    Metrics,
    PairedComparison,
    PolicyCurve,
    PolicyMetrics,
)
from dmr_pipeline.rollout.failures import FAILURES

if TYPE_CHECKING:
    from dmr_pipeline.evaluation.viewer import Seen

_KIND_STYLES = {
    "single": "",
    "rung": "",
    "speculative": "",
    "baseline": "",
    "random": "dim",
    "router": "bold",
    "ablation": "dim",
    "oracle": "italic",
}
_NONE = "-"
COST_COLUMN = "cost (weights + cache)"
GAIN_COLUMN = "gain at equal cost"
FAILURES_COLUMN = "parse failures"
PASSES_COLUMN = "passes a step (drafts taken)"


_FACTS: Mapping[str, str] = {
    "sensitivity": "Sensitivity labels",
    "kl_router": "KL router (stage 1)",
    "grpo_router": "GRPO router (stage 2)",
}


def headline(metrics: Metrics) -> list[str]:
    """The result in plain words: the findings, then the planned tests."""
    return [*_findings(metrics), *_planned_tests(metrics)]


def _findings(metrics: Metrics) -> list[str]:
    """What the chosen router does, whether it beats static policies at its cost, what of the gap it recovers, and whether it
    is no worse than always-high by the margin."""
    policies, name = metrics["policies"], metrics["headline"]
    router, high, low = policies[name], policies[metrics["high"]], policies[metrics["low"]]
    sentences = [
        f"On {router['n']} test games {name}, the router chosen on validation, succeeds in {router['success']:.1%} "
        f"({_confidence(metrics)} interval {in_percent(router['ci95'])}), acting {_shares(router, metrics)}; "
        f"{metrics['high']} succeeds in {high['success']:.1%}, "
        f"{metrics['low']} in {low['success']:.1%}.",
        f"At its cost of {router['cost']:.2f} it is {_against_static(metrics)}.",
    ]
    if "score" in router:
        sentences.append(
            f"Its score, the mean reward times 100, is {_score(router)} "
            f"(interval {in_percent(router['score_ci95']).removesuffix('%')}); {metrics['high']}'s is {_score(high)}, "
            f"{metrics['low']}'s {_score(low)}."
        )
    recovered, interval = router.get("gap_recovered"), router.get("gap_ci95")
    if recovered is None or interval is None:
        only = ", though it scores less," if "score" in low and low["score"] < high["score"] else ""
        sentences.append(
            f"{metrics['low']} wins no fewer games than {metrics['high']} here{only or ','} so there is no gap in success to"
            " recover."
        )
    else:
        ends = f"{metrics['high']} and {metrics['low']}"
        sentences.append(f"It recovers {recovered:.0%} of the gap between {ends} (interval {in_percent(interval, 0)}).")
    if router["cost"] < high["cost"]:
        sentences.append(f"An episode costs {router['cost'] / high['cost']:.0%} of what one of {metrics['high']} does.")
    else:
        sentences.append(
            f"It saves nothing: an episode costs {router['cost'] / high['cost']:.2f} times {metrics['high']}'s."
        )
    return [*sentences, f"{_no_worse(metrics)}."]


def markdown_table(metrics: Metrics) -> str:
    """The results as a GitHub table, a policy a row."""
    score = ("score",) if has_scores(metrics) else ()
    acting = precision_columns(metrics)
    passes = ("tokens read", "steps", PASSES_COLUMN)
    failed = (FAILURES_COLUMN, "inadmissible")
    columns = ("policy", "success", *score, *acting, COST_COLUMN, *passes, "gap recovered", GAIN_COLUMN, *failed)
    rows = [columns, ("---",) + ("---:",) * (len(columns) - 1)]
    for name, policy in metrics["policies"].items():
        scores = [f"{_score(policy)} {in_brackets(policy['score_ci95'], 1)}"] if score else []
        others = (
            f"{policy['tokens']:,.0f}",
            f"{policy['steps']:.1f}",
            _passes(policy),
            _recovered(policy),
            _gain(policy),
            f"{policy['parse_failures']:.1%}",
            f"{policy['failures']['inadmissible']:.1%}",
        )
        shown = f"**{name}**" if name == metrics["headline"] else name
        rows.append((shown, _success(policy), *scores, *precision_cells(policy, metrics), _cost(policy), *others))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{_note(metrics)}\n"


def curves_table(metrics: Metrics) -> str:
    """Routers and rules at all budgets as a GitHub table, a curve a row; nothing where there are no curves."""
    curves = metrics.get("curves", {})
    if not curves:
        return ""
    budgets = [f"{point['budget']:g}" for point in next(iter(curves.values()))["points"]]
    columns = ("curve", *(f"at {budget}" for budget in budgets), "APGR", "CPT(50%)", "CPT(80%)", "AIQ", "mean gain")
    rows = [columns, ("---",) + ("---:",) * (len(columns) - 1)]
    for name, curve in curves.items():
        points = (f"{point['success']:.1%} ({point['cost']:.2f})" for point in curve["points"])
        rows.append((f"**{name}**" if curve["kind"] == "router" else name, *points, *curve_cells(curve)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{CURVES_NOTE}{_rules_note(metrics)}\n"


CURVES_NOTE = (
    "Curves: success on the test games (and cost) where a router or a rule that nobody trained was set, on validation games, to"
    " a high-precision ratio of at most that, or the least that it can. Mean gain: points of success over static policies and"
    " mixtures of their episodes at equal cost, mean over the budgets."
)


def curve_cells(curve: PolicyCurve) -> tuple[str, str, str, str, str]:
    """APGR, both CPTs, AIQ and the mean gain, the first and the last with intervals."""

    def number(value: float | None) -> str:
        return _NONE if value is None else f"{value:.3f}"

    def share(value: float | None) -> str:
        return _NONE if value is None else f"{value:.1%}"

    interval = curve["apgr_ci95"]
    area = number(curve["apgr"]) + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")
    low, high = curve["mean_gain_ci95"]
    gain = f"{curve['mean_gain'] * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}]"
    return area, share(curve["cpt50"]), share(curve["cpt80"]), number(curve["aiq"]), gain


def _rules_note(metrics: Metrics) -> str:
    """Which rules routers are compared with."""
    chosen = [
        f" rule@{router}: {best['rule']} at {best['budget']:g}."
        for router, best in metrics.get("best_rules", {}).items()
    ]
    return (
        f" On validation games the rule that wins most at the router's cost or less:{''.join(chosen)}" if chosen else ""
    )


def console_table(metrics: Metrics) -> Table:
    """The results for a terminal of 80 columns or more, where a score takes the room of the gap recovered."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
        title=f"{metrics['recipe']}: test games",
        title_justify="left",
        title_style="bold",
    )
    scores = has_scores(metrics)
    table.caption, table.caption_justify = f"{_columns(metrics, scores)} {_note(metrics)}", "left"
    table.add_column("policy", overflow="fold")
    ratio = "ratio" if len(metrics["route"]) == 2 else "bits"
    for column in (
        "success",
        *(("score", ratio, "cost") if scores else (ratio, "cost", "gap")),
        "parse\nfails",
        "gain",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    kind = None
    for name, policy in metrics["policies"].items():
        if kind not in (None, policy["kind"]):
            table.add_section()
        kind = policy["kind"]
        marked = f"{name} *" if name == metrics["headline"] else name
        acting, cost = precision_cells(policy, metrics)[-1], f"{policy['cost']:.3f}"
        recovered = policy.get("gap_recovered")
        gap = _NONE if recovered is None else f"{recovered:.0%}"
        middle = (_score(policy), acting, cost) if scores else (acting, cost, gap)
        success = f"{policy['success']:.1%} {in_brackets(policy['ci95'], 0)}"
        fails = f"{policy['parse_failures']:.1%}"
        table.add_row(marked, success, *middle, fails, _gain(policy), style=_KIND_STYLES[kind])
    return table


def _columns(metrics: Metrics, scores: bool) -> str:
    """What a terminal's reader, who has no definitions beside the table, asks of its words."""
    high = metrics["route"][0]
    acting = (
        f"Ratio: steps at {high}." if len(metrics["route"]) == 2 else "Bits: a weight, mean of the steps' precisions."
    )
    gap = "" if scores else " Gap: won back of what always_low loses to always_high."
    oracle = " disagreement: an oracle, which cannot be deployed." if "disagreement" in metrics["policies"] else ""
    return f"*: chosen on validation. {acting}{gap}{oracle}"


def render_beside(data_root: Path, recipe: str) -> Path:
    """The HTML report of `data/<recipe>/evaluation_report`, in the folder above: it shows measured times, so it is no part of
    the artifact."""
    folder = artifact_folder("evaluation_report", recipe, data_root)
    html = folder.with_name("report.html")
    render_html(folder, sidecar_path(folder) if run_record_beside(folder) is not None else None, html)
    return html


def render_html(folder: Path, sidecar: Path | None, html: Path) -> None:
    """Write the report of an evaluation's folder as one file without references to others.

    Args:
        folder: holds metrics.json; figures.json, transcripts.parquet with openings.parquet, choices.parquet and
            episodes.parquet, context.json and manifest.json are shown where they are there.
            context.json: `recipe` (section -> settings), `ladder` (list of name, bits_per_weight, bytes, kl_to_float,
            success_validation, cost_validation, dominated_by), `verdict` (pays: bool, text: sentence, deploy: rung, route:
            rungs), `sensitivity`, `kl_router`, `grpo_router` (fact -> value), `notes` (list of sentences); each may be absent.
        sidecar: the run's record; its `measured.seconds_per_step` maps a policy to mean, p95 (seconds), router_share.
        html: the file, replaced at once.

    Raises:
        UserError: there is no metrics.json in the folder.
    """
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder}: no metrics.json; materialise evaluation_report first")
    metrics = cast(Metrics, _json(folder / "metrics.json"))
    context = _json(folder / "context.json") if (folder / "context.json").is_file() else {}
    run = _json(sidecar) if sidecar else {}
    manifest = _json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    policies = metrics["policies"]
    figures = _json(folder / "figures.json") if (folder / "figures.json").is_file() else None
    seen = None
    if (folder / "transcripts.parquet").is_file():
        from dmr_pipeline.evaluation.viewer import seen_in  # polars

        seen = seen_in(folder, metrics)
    drawn = _charts(metrics, figures, seen)

    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            metrics=metrics,
            findings=_findings(metrics),
            tests=_planned_tests(metrics),
            standing=_standing(metrics),
            scores=has_scores(metrics),
            draws=max(policy["episodes"] // policy["n"] for policy in policies.values()),
            confidence=_confidence(metrics),
            router=policies[metrics["headline"]],
            passes={name: _passes(policy) for name, policy in policies.items()},
            precision_columns=precision_columns(metrics),
            precision_cells={name: precision_cells(policy, metrics) for name, policy in policies.items()},
            against_high=policies[metrics["headline"]]["cost"] / policies[metrics["high"]]["cost"],
            failures=FAILURES,
            planned=len(planned(metrics)),
            curves=metrics.get("curves", {}),
            curve_cells={name: curve_cells(curve) for name, curve in metrics.get("curves", {}).items()},
            curves_note=CURVES_NOTE + _rules_note(metrics),
            no_worse=_no_worse(metrics),
            task_types=sorted({name for policy in policies.values() for name in policy["by_task_type"]}),
            charts=drawn,
            charts_json=script_json({"charts": drawn, "legends": _legends(metrics, drawn)}),
            figures=figures,
            training={} if figures is None else {title: _training_name(title) for title in charts.training(figures)},
            seen=seen,
            spend_title=charts.spend_title(metrics),
            scripts=_scripts(),
            ladder=context.get("ladder", []),
            verdict=context.get("verdict"),
            facts={title: context[key] for key, title in _FACTS.items() if context.get(key)},
            notes=context.get("notes", []),
            settings={section: _flat(content) for section, content in context.get("recipe", {}).items()},
            seconds_per_step=run.get("measured", {}).get("seconds_per_step", {}),
            manifest=manifest,
            run=run,
        )
    )
    html.parent.mkdir(parents=True, exist_ok=True)
    with replaced(html) as part:
        part.write_text(page, encoding="utf-8")


def _against_static(metrics: Metrics) -> str:
    """The headline router beside what static policies and mixtures reach at its cost; and who does as well for as little."""
    policies = metrics["policies"]
    router = policies[metrics["headline"]]
    points = f"{router['gain_at_equal_cost'] * 100:+.1f} points"
    against = f"{points} (interval {in_points(router['gain_ci95'])}) against static policies and mixtures of them"
    static = {name: policy for name, policy in policies.items() if policy["kind"] in STATIC}
    as_good = [
        name
        for name, policy in static.items()
        if policy["success"] >= router["success"] and policy["cost"] <= router["cost"]
    ]
    if not as_good:
        return against
    name = max(as_good, key=lambda name: (static[name]["success"], -static[name]["cost"]))
    wins = "more" if static[name]["success"] > router["success"] else "as much"
    spends = "for less" if static[name]["cost"] < router["cost"] else "at the same cost"
    return f"{against}; {name} wins {wins} {spends} ({static[name]['success']:.1%} at {static[name]['cost']:.2f})"


def _standing(metrics: Metrics) -> dict[str, str]:
    """Static policies: on the hull or not, in words."""
    below = {
        name: "below a mixture" if by == "mixture" else f"dominated by {by}"
        for name, by in metrics["below_hull"].items()
    }
    return {point["policy"]: "on the line" for point in metrics["hull"]} | below


def planned(metrics: Metrics) -> list[PairedComparison]:
    return [pair for pair in metrics["paired"] if pair["p_holm"] is not None]


def _planned_tests(metrics: Metrics) -> list[str]:
    """In words. Significance is at one minus the intervals' confidence, after Holm's correction."""
    sentences = []
    for pair in planned(metrics):
        against = metrics["policies"][pair["against"]]
        named = f"random routing ({_shares(against, metrics)})" if against["kind"] == "random" else pair["against"]
        if against["kind"] in STATIC:
            named = f"{named}, the best static policy that costs no more,"
        if best := _rule_against(pair, metrics):
            named = f"{best['rule']}, the best rule that costs no more on validation games,"
        whose = "Against" if pair["policy"] == metrics["headline"] else f"Of {pair['policy']} against"
        sentences.append(f"{whose} {named} {_verdict(pair, metrics)}.")
    return sentences


def _rule_against(pair: PairedComparison, metrics: Metrics) -> BestRule | None:
    """Where a router is compared with the rule that was chosen for it."""
    best = metrics.get("best_rules", {}).get(pair["policy"])
    return best if pair["against"] == f"rule@{pair['policy']}" else None


def _verdict(pair: PairedComparison, metrics: Metrics) -> str:
    p = corrected(pair)
    points = f"{pair['difference'] * 100:+.1f} points (interval {in_points(pair['ci95'])}, {_p_value(p)})"
    if p >= 1 - metrics["confidence"]:
        least = pair["smallest_difference"]
        seen = (
            "these games could have shown none"
            if least is None
            else f"these games could have shown {seen_in_points(least)}"
        )
        return f"no difference is shown: {points} in the paired test; {seen}"
    return f"it is {'better' if pair['difference'] > 0 else 'worse'} in the paired test: {points}"


def corrected(pair: PairedComparison) -> float:
    """The p-value that counts: of a planned comparison Holm's."""
    return pair["p_value"] if pair["p_holm"] is None else pair["p_holm"]


def _no_worse(metrics: Metrics) -> str:
    """The non-inferiority test against always-high, in words."""
    test, games = metrics["non_inferiority"], metrics["policies"][metrics["headline"]]["n"]
    margin = f"less than {test['margin'] * 100:g} points worse than {metrics['high']}"
    lower = f"lower end {test['lower'] * 100:+.1f}"
    if test["shown"]:
        return f"It is {margin} ({lower})"
    few = (
        ""
        if games >= test["games_needed"]
        else f"; {games} games are too few for that, {test['games_needed']} are needed"
    )
    return f"That it is {margin} is not shown ({lower}{few})"


def precision_columns(metrics: Metrics) -> list[str]:
    """What tells which precisions a policy acts in: of two rungs one number is enough."""
    route = metrics["route"]
    return ["high-precision ratio"] if len(route) == 2 else [*(f"steps at {rung}" for rung in route), "mean bits"]


def precision_cells(policy: PolicyMetrics, metrics: Metrics) -> list[str]:
    """One a column."""
    if len(metrics["route"]) == 2:
        return [f"{policy['high_ratio']:.1%}"]
    return [*(f"{share:.1%}" for share in policy["shares"].values()), f"{policy['mean_bits']:.2f}"]


def _shares(policy: PolicyMetrics, metrics: Metrics) -> str:
    if len(metrics["route"]) == 2:
        return f"in high precision at {policy['high_ratio']:.1%} of the steps"
    shares = [f"{rung} at {share:.1%}" for rung, share in policy["shares"].items()]
    return f"with {', '.join(shares)} of the steps, {policy['mean_bits']:.2f} bits a weight in the mean"


def _success(policy: PolicyMetrics) -> str:
    return f"{policy['success']:.1%} {in_brackets(policy['ci95'], 1)}"


def _cost(policy: PolicyMetrics) -> str:
    return f"{policy['cost']:.3f} ({policy['cost'] - policy['cost_cache']:.3f} + {policy['cost_cache']:.3f})"


def _gain(policy: PolicyMetrics) -> str:
    """In points; the interval, where it is given, in whole ones."""
    low, high = (f"{end * 100:.0f}".replace("-0", "0") for end in policy["gain_ci95"])
    return f"{policy['gain_at_equal_cost'] * 100:+.1f} [{low}, {high}]"


def has_scores(metrics: Metrics) -> bool:
    """Whether rewards are graded, so that a score says more than the success."""
    return "score" in metrics["policies"][metrics["headline"]]


def _recovered(policy: PolicyMetrics) -> str:
    recovered, interval = policy.get("gap_recovered"), policy.get("gap_ci95")
    return _NONE if recovered is None or interval is None else f"{recovered:.0%} {in_brackets(interval, 0)}"


def _passes(policy: PolicyMetrics) -> str:
    """Of the acting precision; in brackets the share of what was drafted for it that it took."""
    taken = f" ({policy['accepted']:.0%})" if "accepted" in policy else ""
    return f"{policy['acting_passes']:.1f}{taken}"


def _score(policy: PolicyMetrics) -> str:
    """Out of 100, as WebShop's papers write it."""
    return f"{policy['score'] * 100:.1f}"


def _note(metrics: Metrics) -> str:
    games = metrics["policies"][metrics["headline"]]["n"]
    score = " Score: mean reward times 100." if has_scores(metrics) else ""
    failed = any(policy["parse_failures"] for policy in metrics["policies"].values())
    fails = " Parse failures: share of the steps whose action is not as the prompt wants it." if failed else ""
    return (
        f"{games} games; brackets: {_confidence(metrics)} intervals, clustered by game.{score} Cost: the ladder's dearest "
        "precision on validation, with 16-bit weights, = 1. Gain: points of success over static "
        f"policies (single precisions, checked drafts) and mixtures of their episodes at equal cost.{fails} "
        f"Chosen on validation: {metrics['headline']}, {_against_static(metrics)}. {_no_worse(metrics)}."
        f"{_planned_short(metrics)}"
    )


def _planned_short(metrics: Metrics) -> str:
    """The planned tests in a line."""
    tests = [
        f"{'' if pair['policy'] == metrics['headline'] else pair['policy'] + ' against '}"
        f"{pair['against']} {pair['difference'] * 100:+.1f} ({_p_value(corrected(pair))}; "
        f"could have seen {seen_in_points(pair['smallest_difference'])})"
        for pair in planned(metrics)
    ]
    return f" Planned tests, points against (Holm; 80% power): {', '.join(tests)}." if tests else ""


def _charts(metrics: Metrics, figures: Mapping[str, Any] | None, seen: "Seen | None") -> dict[str, charts.Spec]:
    """By the names that the template places them under."""
    found = {f"plane-{by}": charts.plane(metrics, by) for by in ("cost", "spend")}
    found["task-types"] = charts.by_task_type(metrics)
    if "curves" in metrics:
        found |= {f"curves-{by}": charts.curves(metrics, by) for by in ("cost", "spend")}
    if seen is not None:
        found["asked-by-turn"] = charts.asked_by_turn(metrics, seen.turns)
        found["asked-by-task-type"] = charts.asked_by_task_type(metrics)
    if figures is not None:
        found |= {_training_name(title): spec for title, spec in charts.training(figures).items()}
        found |= {"calibration": charts.calibration(figures), "kl-by-turn": charts.kl_by_turn(figures)}
    return found


def _training_name(title: str) -> str:
    return "training-" + title.lower().replace(":", "").replace(" ", "-")


def _legends(metrics: Metrics, drawn: Mapping[str, charts.Spec]) -> dict[str, dict[str, Any]]:
    """Name of a legend -> its series, those that are drawn at first, and the charts that it rules."""
    policies, curves = charts.policy_series(metrics), charts.curve_series(metrics)
    of = {"plane": policies, "task-types": policies, "curves": curves, "asked": policies}
    found = {}
    for name, series in of.items():
        if ruled := [chart for chart in drawn if chart.startswith(name)]:
            shown = drawn[ruled[0]]["params"][0]["value"]
            possible = {row["series"] for row in drawn[ruled[0]]["data"]["values"]}
            listed = [its._asdict() for its in series if its.name in possible]
            found[name] = {"series": listed, "shown": shown, "charts": ruled}
    return found


def script_json(content: object) -> Markup:
    """JSON that cannot end the element of a page that it stands in."""
    return Markup(json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _scripts() -> list[Markup]:
    """Vega, Vega-Lite and the page's own."""
    here = resources.files("dmr_pipeline.evaluation")
    files = ("vega/vega.min.js", "vega/vega-lite.min.js", "report.js")
    texts = [here.joinpath(file).read_text(encoding="utf-8") for file in files]
    return [Markup(re.sub(r"^//# sourceMappingURL=.*$", "", text, flags=re.M)) for text in texts]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dmr_pipeline.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda value, digits=1: _NONE if value is None else f"{value:.{digits}%}",
        "number": lambda value, digits=3: _NONE if value is None else f"{value:.{digits}f}",
        "signed": lambda value: _NONE if value is None else f"{value * 100:+.1f}",
        "span": lambda interval, digits=1: "" if interval is None else in_brackets(interval, digits),
        "bounds": lambda interval: f"[{interval[0]:.3f}, {interval[1]:.3f}]",
        "points": lambda interval: "" if interval is None else f"[{in_points(interval)}]",
        "milliseconds": lambda seconds: f"{seconds * 1000:.2f}",
        "megabytes": lambda size: f"{size / 1e6:.2f}",
        "p_value": _p_value,
        "seen": seen_in_points,
        "fact": _fact,
        "words": lambda key: key.replace("_", " "),
    }
    environment.filters.update(filters)
    return environment


def _json(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    return _NONE if value is None else str(value)


def _confidence(metrics: Metrics) -> str:
    return f"{metrics['confidence'] * 100:g}%"


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
