"""The command line. Bad input gives one clear line on stderr and exit code 2."""

import typer

from dmr_pipeline.cli import stages
from dmr_pipeline.cli.bench import bench
from dmr_pipeline.cli.data import data
from dmr_pipeline.cli.doctor import doctor
from dmr_pipeline.cli.environments import env
from dmr_pipeline.cli.ladder import ladder
from dmr_pipeline.cli.metrics import metrics
from dmr_pipeline.cli.models import models
from dmr_pipeline.cli.plan import plan
from dmr_pipeline.cli.provenance import provenance
from dmr_pipeline.cli.recipe import recipe
from dmr_pipeline.cli.route import route
from dmr_pipeline.cli.router import router
from dmr_pipeline.cli.sensitivity import sensitivity
from dmr_pipeline.cli.serve import serve
from dmr_pipeline.cli.study import study
from dmr_pipeline.cli.trajectories import trajectories

app = typer.Typer(
    rich_markup_mode="markdown",
    help="Dynamic mixed-precision routing of LLM agents: one pipeline from games to the accuracy-cost report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # what is not foreseen is one line (common.py)
)
for command in (
    stages.run,
    stages.materialize,
    stages.restore,
    stages.status,
    stages.pull,
    stages.render,
    stages.report,
):
    app.command()(command)
app.command()(ladder)
app.command()(metrics)
app.command()(plan)
app.command()(provenance)
app.command()(doctor)
app.command()(serve)
app.add_typer(recipe, name="recipe")
app.add_typer(trajectories, name="trajectories")
app.add_typer(router, name="router")
app.add_typer(route, name="route")
app.add_typer(sensitivity, name="sensitivity")
app.add_typer(study, name="study")
app.add_typer(data, name="data")
app.add_typer(models, name="models")
app.add_typer(env, name="env")
app.add_typer(bench, name="bench")
