"""The smallest recipes that run through all real stages."""

RECIPE_YAML = """\
benchmark: {step_limit: 4, splits: {agent_train: 6, router_train: 4, validation: 4, test: 4}}
agent:
  training:
    architecture: {layers: 2, width: 32, heads: 2, key_value_heads: 1, head_width: 16, feed_forward: 32}
    updates: 6
    episodes_per_update: 2
    learning_rate: 0.004
    warmup_updates: 2
    looks_per_update: 0
    looks_alone_until: 0
    short_until: 2
    short_steps: 30
    dagger_from: 4
    dagger_every: 2
    dagger_episodes: 2
    dagger_steps: 4
    dagger_tokens: 100
    mistake_rate: 0.05
precisions:
  ladder: [{name: float, weights: float}, {name: int4, weights: int4, ranges: mse}, {name: int2, weights: int2}]
  route: [float, int2]
  kl_episodes: 2
trajectories:
  behaviour:
    - {name: all-high, shares: {float: 1}}
    - {name: all-low, shares: {int2: 1}}
    - {name: mixed, shares: {float: 0.5, int2: 0.5}}
sensitivity: {quantile: 0.5}
kl_router:
  model: {probe: {layers: [1, 2], hidden: 4}}
  epochs: 1
  batch_episodes: 4
  learning_rate: 0.001
  validation_games: 4
  target_ratio: 0.3
grpo_router:
  updates: 2
  games_per_update: 2
  group_size: 2
  iterations: 2
  learning_rate: 0.001
  cost_weight: 0.3
  validate_every: 1
  validation_games: 3
  target_ratio: 0.4
evaluation: {bootstrap: 50}
release: {}
"""
_CHANGES = {
    "route: [float, int2]": "route: [float, int4, int2]",
    "{float: 0.5, int2: 0.5}": "{float: 0.3, int4: 0.4, int2: 0.3}",
    "quantile: 0.5": "quantile: 0.75",  # of the rows of both cheaper rungs: half of them would be all of int2's
}
THREE_RUNGS_YAML = RECIPE_YAML
"""The same, with routers that choose from the whole ladder."""
for _old, _new in _CHANGES.items():
    assert _old in THREE_RUNGS_YAML
    THREE_RUNGS_YAML = THREE_RUNGS_YAML.replace(_old, _new)
