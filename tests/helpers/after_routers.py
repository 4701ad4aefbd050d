"""Untrained routers that decide after the draft, of every kind."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from dmr_pipeline.recipe.kl_router import Feature, Probe, RouterModel
from dmr_pipeline.router.kl import with_settings
from dmr_pipeline.router.model import Router, new_router
from tests.helpers.rollouts import LOW, PROMPTER, ROUTE
from tests.helpers.routers import ARCHITECTURE, CPU, enlarge

PROBE = Probe(layers=(1, 2), hidden=8)
ALL: tuple[Feature, ...] = get_args(Feature)


def new(model: RouterModel, route: Sequence[str] = ROUTE, **settings: float) -> Router:
    router = new_router(model, route, PROMPTER.tokenizer, 0, CPU, LOW)
    if model.probe is None:
        enlarge(router.model)
    return with_settings(replace(router, model=router.model.eval()), **settings)


def probe(route: Sequence[str] = ROUTE, **settings: float) -> Router:
    return new(RouterModel(probe=PROBE, decides="after"), route, **settings)


def informed(route: Sequence[str] = ROUTE, **settings: float) -> Router:
    """It looks at the draft, and at the states before that."""
    return new(RouterModel(probe=Probe(layers=(1, 2), features=ALL, hidden=8), decides="after"), route, **settings)


def counting(route: Sequence[str] = ROUTE, **settings: float) -> Router:
    """A logistic regression of a few numbers."""
    return new(RouterModel(probe=Probe(layers=(), features=ALL, hidden=0), decides="after"), route, **settings)


def lm(route: Sequence[str] = ROUTE, **settings: float) -> Router:
    return new(RouterModel(architecture=ARCHITECTURE, decides="after"), route, **settings)
