"""`dmr serve`: the released router at work, behind OpenAI's interface."""

import os
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr, ValidationError

from dmr_pipeline.cli.common import RecipeArgument, console, progress_lines, user_errors_exit_2
from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.recipe.reading import load_recipe

KEY_VARIABLE = "DMR_API_KEY"
UPSTREAM_KEY_VARIABLE = "DMR_UPSTREAM_KEY"


@user_errors_exit_2
def serve(
    recipe: RecipeArgument,
    host: Annotated[
        str, typer.Option(help=f"address to listen on; any but this machine's own needs ${KEY_VARIABLE}")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    slots: Annotated[int, typer.Option(help="sessions whose keys and values are kept; so many act at once")] = 32,
    sessions: Annotated[int, typer.Option(help="kept at most")] = 1000,
    session_seconds: Annotated[
        float, typer.Option(help="after which a session that is not heard of has ended")
    ] = 3600.0,
    request_seconds: Annotated[float, typer.Option(help="after which a request is given up")] = 120.0,
    epsilon: Annotated[
        float,
        typer.Option(help="share of decisions that are drawn at random, so that the log tells of other routers too"),
    ] = 0.0,
    low_on_failure: Annotated[
        bool, typer.Option(help="where the router fails the cheapest precision acts, not the dearest")
    ] = False,
    upstream: Annotated[
        list[str] | None,
        typer.Option(
            help="RUNG=URL of an OpenAI-compatible server, or RUNG=URL#MODEL; once for each precision of the same model. Without"
            f" any the ladder's models act in this process. ${UPSTREAM_KEY_VARIABLE} is the key that they ask for, if they do"
        ),
    ] = None,
    retries: Annotated[int, typer.Option(help="further tries of an upstream, before its answer begins")] = 2,
    router: Annotated[
        Path | None,
        typer.Option(
            help="folder of the router that decides, in place of the released one: data/RECIPE/kl_router/router, or what dmr"
            " route calibrate --write has written"
        ),
    ] = None,
    static: Annotated[
        str | None,
        typer.Option(
            help="no router: this precision acts (int4), or checks what another one drafts (int4<int2), or a rule decides at a"
            " threshold (margin>0.4, see dmr route calibrate); verdict: what dmr ladder says to deploy"
        ),
    ] = None,
    degrade: Annotated[
        bool, typer.Option(help="where the dearer upstream is down a cheaper one answers, and says so")
    ] = False,
) -> None:
    """Serve a recipe's agent: POST /v1/chat/completions, and what docs/serve.md describes.

    Its released router decides at each turn which precision acts, and one that is released meanwhile is taken up; with --router
    another one decides, with --static none. Episodes whose outcome is posted become files in data/incoming/RECIPE/, which the
    pipeline takes in.
    """
    load_recipe(recipe)
    named = [_upstream(text) for text in upstream or []]
    if static is not None and named:
        raise UserError(
            f"--static is for models in this process: ask an upstream by the model's name, dmr/{recipe}:RUNG"
        )
    if static is not None and router is not None:
        raise UserError("--static is for serving without a router, and --router names one: leave one of them out")
    from dmr_pipeline.serve.settings import ServeSettings

    try:
        settings = ServeSettings(
            recipe=recipe,
            host=host,
            port=port,
            api_key=_secret(KEY_VARIABLE),
            upstream_key=_secret(UPSTREAM_KEY_VARIABLE),
            slots=slots,
            sessions=sessions,
            session_seconds=session_seconds,
            request_seconds=request_seconds,
            epsilon=epsilon,
            low_on_failure=low_on_failure,
            router=router,
            static=static,
            upstreams={rung: address for rung, address, _ in named},
            upstream_models={rung: model for rung, _, model in named if model},
            retries=retries,
            degrade=degrade,
        )
    except ValidationError as error:
        raise UserError("; ".join(problems_of(error))) from error
    try:
        from dmr_pipeline.serve import run
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'dmr-pipeline[serve]'") from error
    with progress_lines():
        run.serve(settings, lambda address: console.print(f"dmr/{recipe} at {address}/v1", highlight=False))


def _secret(variable: str) -> SecretStr | None:
    return SecretStr(os.environ[variable]) if os.environ.get(variable) else None


def _upstream(text: str) -> tuple[str, str, str]:
    """Rung, address, and the model's name there, which may be empty."""
    rung, _, rest = text.partition("=")
    address, _, model = rest.partition("#")
    if not rung or not address.startswith(("http://", "https://")):
        raise UserError(f"--upstream {text}: write RUNG=URL, such as int4=http://127.0.0.1:8001/v1")
    return rung, address, model
