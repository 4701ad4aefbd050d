"""What a study's file may say."""

from pathlib import Path

import pytest

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.study.design import ladder_recipe, load_study, variant_recipe
from tests.helpers.fake_project import REPOSITORY


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("in_repository")
def test_a_variant_changes_what_it_names_and_the_seeds(tmp_path: Path) -> None:
    text = "recipe: alfworld-tiny\nrouters: {a: {}, b: {changes: {kl_router: {model: {probe: {hidden: 7}}}}}}\n"
    study = load_study(written(tmp_path, text))
    plain, changed = (variant_recipe(study, name, 3) for name in ("a", "b"))
    assert (plain.name, changed.name) == ("a-3", "b-3")
    assert plain.kl_router.model.probe is not None
    assert changed.kl_router.model.probe == plain.kl_router.model.probe.model_copy(update={"hidden": 7})
    assert (changed.kl_router.seed, changed.grpo_router.seed) == (3, 3)
    rest = {"kl_router", "grpo_router", "name"}
    assert changed.model_dump(exclude=rest) == plain.model_dump(exclude=rest)


@pytest.mark.usefixtures("in_repository")
def test_a_study_is_named_by_its_file() -> None:
    with pytest.raises(
        UserError, match=r"^alfworld-tiny-study: there is no such file \(.*studies/alfworld-tiny-study\.yaml"
    ):
        load_study(Path("alfworld-tiny-study"))


@pytest.mark.usefixtures("in_repository")
def test_rules_alone_are_a_study(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, "recipe: alfworld-tiny\nrules: [margin]\nbudgets: [0.3]\n"))
    assert (study.routers, study.rules) == ({}, ("margin",))


@pytest.mark.usefixtures("in_repository")
def test_a_ladder_of_its_own_is_that_of_all_its_routers(tmp_path: Path) -> None:
    ladder = "[{name: float, weights: float}, {name: small, weights: int4, head: int4}]"
    text = f"recipe: alfworld-tiny\nprecisions: {{ladder: {ladder}, pair: [float, small]}}\nrouters: {{a: {{}}}}\n"
    study = load_study(written(tmp_path, text))
    base, own = load_recipe("alfworld-tiny"), ladder_recipe(study)
    assert own.precisions.ladder == (
        Rung(name="float", weights="float"),
        Rung(name="small", weights="int4", head="int4"),
    )
    assert own.precisions.pair == ("float", "small")
    assert own.precisions.margin == base.precisions.margin
    assert own.model_dump(exclude={"name", "precisions"}) == base.model_dump(exclude={"name", "precisions"})
    assert variant_recipe(study, "a", 0).precisions == own.precisions
    assert ladder_recipe(study.model_copy(update={"precisions": {}})) == base


@pytest.mark.usefixtures("in_repository")
def test_what_only_routers_would_not_take_does_not_stop_rules_alone(tmp_path: Path) -> None:
    """The recipe's behaviour policies mix a rung that this ladder has not; nothing is recorded for rules."""
    ladder = "precisions: {ladder: [{name: float, weights: float}, {name: int8, weights: int8}], route: [float, int8]}"
    text = f"recipe: webshop-tiny\nrules: [margin]\nbudgets: [0.2, 0.4]\n{ladder}\n"
    assert ladder_recipe(load_study(written(tmp_path, text))).precisions.route == ("float", "int8")
    with pytest.raises(UserError, match=r"routers\.a\.changes: trajectories\.behaviour\.1\.shares: 'int2' is none of"):
        load_study(written(tmp_path, text + "routers: {a: {}}\n"))


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize("path", sorted((REPOSITORY / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_studies_are_right(path: Path) -> None:
    study = load_study(path)
    for name in study.routers:
        variant_recipe(study, name, study.seeds[-1])


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("routers: {a: {changes: {precisions: {margin: 0.1}}}}", "'precisions': a variant may change trajectories"),
        ("routers: {a: {changes: {kl_router: {epoch: 1}}}}", "routers.a.changes: kl_router.epoch: Extra inputs"),
        ("rules: [guess]", "rules.0: "),
        ("rules: [margin, margin]", "rules: ['margin', 'margin'] are not all different"),
        ("routers: {a: {}}\nbudgets: [0.3]", "0.2 is none of the budgets, 0.3"),
        ("routers: {a: {}}\nseeds: [1, 1]", "[1, 1] are not all different"),
        ("routers: {a: {stage: agent}}", "stage"),
        ("precisions: {pair: [float, int5]}", "precisions: pair: 'int5'"),
        ("precisions: {bits: 4}", "precisions.bits: Extra inputs"),
        ("first_game: -1", "first_game: Input should be greater than or equal to 0"),
        (
            "first_game: 5\nbenchmark: {environment: alfworld, step_limit: 9, splits: "
            "{agent_train: 1, router_train: 1, validation: 1, test: 1}}",
            "first_game: is of fresh games",
        ),
        (
            "routers: {a: {changes: {grpo_router: {updates: 3}}}}",
            "'grpo_router' changes nothing of the router of stage 1",
        ),
        ("routers: {a: {changes: {kl_router: {seed: 7}}}}", "kl_router.seed is each of the study's `seeds` in turn"),
        (
            "routers: {a: {changes: {kl_router: {target: consequence}}}}",
            "routers.a.changes: kl_router.target: consequence needs steps that were swapped",
        ),
        (
            "routers: {a: {stage: grpo_router, changes: {grpo_router: {beta: 0.1}}}}",
            "routers.a.changes: grpo_router.beta: trl reloads the reference as a causal LM, which a probe is not",
        ),
        (
            "routers: {a: {changes: {kl_router: {validation_games: 5000}}}}",
            "routers.a.changes: kl_router.validation_games: 5,000 games, but benchmark.splits.validation has",
        ),
        ("recipe: webshop-tiny\nfirst_game: 5", "the tasks of webshop are a list, and none is fresh"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_study(written(tmp_path, text if "recipe:" in text else f"recipe: alfworld-tiny\n{text}\n"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
