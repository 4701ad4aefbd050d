import polars as pl

from dmr_pipeline.evaluation.policies import choose_headline, speculative_differences
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.stages.evaluation_report import outgrown_notes
from tests.helpers.evaluations import with_checked


def validation_frame(won: int, cost: float, high_steps: int, spend: float | None = None) -> pl.DataFrame:
    """100 episodes of ten steps."""
    rows = pl.DataFrame({"success": [i < won for i in range(100)]})
    spend = high_steps if spend is None else spend
    return rows.with_columns(cost=pl.lit(cost), steps=pl.lit(10), high_steps=pl.lit(high_steps), spend=pl.lit(spend))


def test_the_headline_router_is_the_one_of_the_higher_reward_within_the_budget() -> None:
    section = load_recipe("alfworld-tiny").grpo_router.model_copy(update={"reward": "difference", "cost_weight": 0.5})
    dear, cheap = validation_frame(80, 0.9, 2), validation_frame(78, 0.5, 2)
    chosen, facts = choose_headline({"dear": dear, "cheap": cheap}, section)
    assert chosen == "cheap"
    assert facts["cheap"] == {"stage_2_reward": 0.53, "success": 0.78, "spend": 0.2, "cost": 0.5}
    assert facts["dear"]["stage_2_reward"] == 0.35
    free = section.model_copy(update={"cost_weight": 0.0})
    assert choose_headline({"dear": dear, "cheap": cheap}, free)[0] == "dear"
    over_budget = validation_frame(99, 0.5, 5)
    assert choose_headline({"cheap": cheap, "over budget": over_budget}, section)[0] == "cheap"
    assert choose_headline({"over budget": over_budget}, section)[0] == "over budget"
    # The budget is of bytes: of three rungs not of steps at the dearest.
    of_three = validation_frame(99, 0.5, 1, spend=4.1)
    chosen, facts = choose_headline({"cheap": cheap, "of three": of_three}, section)
    assert (chosen, facts["of three"]["spend"]) == ("cheap", 0.41)


def test_a_check_that_ends_otherwise_than_writing_is_told(episodes: pl.DataFrame) -> None:
    played = with_checked(episodes)
    assert speculative_differences(played) == []
    checked = pl.col("kind") == "speculative"
    fewer_steps = pl.when(checked & pl.col("task_id").is_in(["game-0003", "game-0004"])).then(9).otherwise("steps")
    lost = pl.when(checked & (pl.col("task_id") == "game-0004")).then(0.0).otherwise("reward")
    (sentence,) = speculative_differences(played.with_columns(steps=fewer_steps, reward=lost))
    assert sentence.startswith(
        "speculative:float<int2-mse ended otherwise than always_high in 2 of 100 games, which only"
    )


def test_episodes_that_outgrew_their_transcript_are_told_by_policy() -> None:
    policies = ["always_low"] * 3 + ["kl_router"] * 2 + ["always_high"]
    outgrown = [True, False, True, False, True, False]
    (note,) = outgrown_notes(pl.DataFrame({"policy": policies, "outgrown": outgrown}))
    assert note.endswith("count as lost: always_low 2, kl_router 1.")
    assert outgrown_notes(pl.DataFrame({"policy": policies, "outgrown": [False] * 6})) == []
