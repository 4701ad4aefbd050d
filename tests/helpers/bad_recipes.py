"""Each validator of recipes: one change to a recipe that is right, and the only line that is then said."""

from datetime import date

from tests.helpers.recipes import LEFT_OUT

GONE = "Field required"
INFINITE, NAN = float("inf"), float("nan")
ARCHITECTURE = {"layers": 2, "width": 32, "heads": 2, "key_value_heads": 1, "head_width": 16, "feed_forward": 64}
T, P, K, G = "agent.training.", "precisions.", "kl_router.", "grpo_router."
MODEL, BEHAVIOUR = "kl_router.model", "trajectories.behaviour"
MIXED = {"name": "mixed"}
AUTO: dict[str, object] = {P + "route": "auto", "trajectories": LEFT_OUT}
FINETUNE = {
    "updates": 4, "episodes_per_update": 2, "learning_rate": 0.001, "warmup_updates": 1, "dagger_from": 4, "dagger_every": 2,
    "dagger_episodes": 2, "dagger_steps": 4, "dagger_tokens": 100, "mistake_rate": 0.1,
}  # fmt: skip
AGENT_ALONE = {"agent.training": LEFT_OUT, "agent.pretrained": {"model": "models/x"}}
ALFWORLD: list[tuple[str, dict[str, object], str]] = [
    # Types are strict, numbers finite.
    ("true-is-no-count", {T + "updates": True}, f"{T}updates: Input should be a valid integer (it is True)"),
    ("text-is-no-count", {T + "updates": "24"}, f"{T}updates: Input should be a valid integer (it is '24')"),
    ("float-is-no-count", {T + "updates": 24.0}, f"{T}updates: Input should be a valid integer (it is 24.0)"),
    ("text-is-no-number", {T + "learning_rate": "0.1"},
     f"{T}learning_rate: Input should be a valid number (it is '0.1')"),
    ("true-is-no-number", {K + "target_ratio": True}, f"{K}target_ratio: Input should be a valid number (it is True)"),
    ("number-is-no-flag", {"sensitivity.won_only": 1},
     "sensitivity.won_only: Input should be a valid boolean (it is 1)"),
    ("number-is-no-text", {P + "route": ["float", "int2", 5]}, f"{P}route.2: Input should be a valid string (it is 5)"),
    ("date-is-no-text", {P + "route": ["float", "int2", date(2024, 1, 1)]},
     f"{P}route.2: Input should be a valid string"),
    ("text-is-no-list", {MODEL: {"probe": {"layers": "4"}}}, f"{MODEL}.probe.layers: Input should be a valid tuple"),
    ("list-is-no-section", {"sensitivity": [1]}, "sensitivity: Input should be a valid dictionary or instance"),
    ("nothing-is-no-section", {"release": None}, "release: Input should be a valid dictionary or instance"),
    ("unknown-key", {"agent.promt": {}}, "agent.promt: Extra inputs are not permitted"),
    ("unknown-section", {"colour": "red"}, "colour: Extra inputs are not permitted"),
    ("key-that-is-no-text", {"sensitivity": {1: 2, "quantile": 0.8}}, "sensitivity.1: Keys should be strings"),
    ("missing", {"evaluation": LEFT_OUT}, f"evaluation: {GONE}"),
    ("missing-in-benchmark", {"benchmark.splits": LEFT_OUT}, f"benchmark.splits: {GONE}"),
    *(
        (f"not-finite-{value}-{path}", {path: value}, f"{path}: Input should be ")
        for value in (INFINITE, -INFINITE, NAN)
        for path in (T + "learning_rate", "agent.temperature", P + "margin", G + "cost_weight", "release.cost_increase")
    ),
    ("infinite-tau", {"sensitivity": {"tau": INFINITE}},
     "sensitivity.tau: Input should be a finite number (it is inf)"),
    ("nan-in-a-pair", {"sensitivity.label_share": [NAN, 0.5]},
     "sensitivity.label_share.0: Input should be a finite number"),
    # Bounds.
    *(
        (f"huge-{path}", {path: 10**30}, f"{path}: Input should be at most ")
        for path in (
            "benchmark.splits.agent_train", "benchmark.splits.test", "benchmark.step_limit", "benchmark.seed",
            T + "updates", T + "episodes_per_update", T + "dagger_tokens", T + "seed", T + "looks_per_update",
            T + "architecture.feed_forward", "agent.prompt.max_action_tokens", "trajectories.seed", P + "kl_episodes",
            K + "epochs", K + "batch_episodes", K + "seed", G + "updates", G + "games_per_update", G + "group_size",
            G + "iterations", G + "seed", "evaluation.random_draws", "evaluation.bootstrap", "evaluation.seed",
            "release.games", "release.bootstrap", "retraining.min_new_steps", "runtime.batch_episodes", "runtime.processes",
        )
    ),
    *(
        (f"zero-{path}", {path: 0}, f"{path}: Input should be greater than ")
        for path in (
            "benchmark.splits.agent_train", "benchmark.splits.router_train", "benchmark.splits.validation",
            "benchmark.splits.test", "benchmark.step_limit", T + "updates", T + "learning_rate", T + "dagger_every",
            P + "kl_episodes", "sensitivity.quantile", K + "epochs", K + "target_ratio", G + "updates", G + "group_size",
            G + "clip", G + "initial_ratio", G + "target_ratio", "evaluation.random_draws", "evaluation.confidence_ratio",
            "evaluation.bootstrap", "release.games", "retraining.min_new_steps", "runtime.threads",
        )
    ),
    *(
        (f"one-{path}", {path: 1.0}, f"{path}: Input should be less than ")
        for path in (
            "sensitivity.quantile", K + "target_ratio", G + "initial_ratio", G + "target_ratio", G + "clip",
            "evaluation.confidence_ratio", "evaluation.confidence", "release.confidence",
        )
    ),
    *(
        (f"learning-rate-{name}", {name + "learning_rate": 3}, f"{name}learning_rate: Input should be at most 1.0: no optimiser")
        for name in (T, K, G)
    ),
    *(
        (f"seed-{name}", {f"{name}.seed": 2**32}, f"{name}.seed: Input should be at most 4,294,967,295: numpy takes no larger")
        for name in ("benchmark", "agent.training", "trajectories", "kl_router", "grpo_router", "evaluation", "release")
    ),
    ("negative-seed", {K + "seed": -1}, f"{K}seed: Input should be greater than or equal to 0"),
    ("group-of-one", {G + "group_size": 1}, f"{G}group_size: Input should be greater than or equal to 2"),
    ("weak-confidence", {"release.confidence": 0.2},
     "release.confidence: Input should be greater than or equal to 0.5"),
    ("negative-weight", {G + "cost_weight": -1}, f"{G}cost_weight: Input should be greater than or equal to 0"),
    ("hot", {"agent.temperature": 1000}, "agent.temperature: Input should be at most 100.0: it would draw at random"),
    ("nearly-cold", {"agent.temperature": 1e-9},
     "agent.temperature: 1e-09 divides logits by next to nothing; 0 is greedy"),
    ("step-limit", {"benchmark.step_limit": 2}, "benchmark.step_limit: Input should be greater than or equal to 3"),
    ("unknown-device", {"runtime.device": "tpu"},
     "runtime.device: Input should be 'auto', 'cpu' or 'cuda' (it is 'tpu')"),
    ("unknown-benchmark", {"benchmark.environment": "mars"},
     "benchmark.environment: Input should be one of 'alfworld', 'alfworld-official', 'webshop', 'webshop-official' (it is 'm"),
    ("no-room-for-an-action", {"agent.max_transcript_tokens": 14},
     "agent.prompt.max_action_tokens: 14, but a transcript may have 14 tokens: set it lower, or agent.max_transcript_tokens"),
    ("long-actions", {"agent.prompt.max_action_tokens": 4096},
     "agent.prompt.max_action_tokens: 4,096, but a transcript may have 4,096 tokens"),
    ("nearly-sure", {"release.confidence": 0.999999},
     "release.bootstrap: 2000 resamples, but an interval of 0.999999 has"),
    # Architectures.
    ("heads", {T + "architecture.heads": 3, T + "architecture.key_value_heads": 2},
     f"{T}architecture.key_value_heads: 2 does not divide the 3 heads"),
    ("odd-heads", {T + "architecture.head_width": 15}, f"{T}architecture.head_width: 15 is odd"),
    ("large", {T + "architecture.layers": 8000, T + "architecture.width": 90_000}, f"{T}architecture: "),
    ("router-heads", {MODEL: {"architecture": ARCHITECTURE | {"key_value_heads": 4}}},
     f"{MODEL}.architecture.key_value_heads: 4 "),
    # Training.
    *(
        (f"past-the-end-{field}", {T + field: 1001}, f"{T}{field}: 1,001, but there are 1,000 updates")
        for field in ("warmup_updates", "short_until", "dagger_from")
    ),
    ("looks-past-the-end", {T + "looks_alone_until": 1001, T + "short_until": 0},
     f"{T}looks_alone_until: 1,001, but there are 1,000 updates"),
    ("no-looks", {T + "looks_per_update": 0}, f"{T}looks_per_update: 0, but there is nothing else up to update 250"),
    ("short-among-looks", {T + "short_until": 200}, f"{T}short_until: 200, but up to update 250 there are no games"),
    ("short-steps", {T + "short_steps": 2}, f"{T}short_steps: 2, but no game can be won in fewer than 3 steps"),
    ("no-dagger", {T + "dagger_every": 600, T + "dagger_from": 601},
     f"{T}dagger_every: 600 has no multiple from dagger_from on"),
    ("weight-decay", {T + "weight_decay": 2}, f"{T}weight_decay: Input should be less than or equal to 1"),
    ("mistakes", {T + "mistake_rate": 1.5}, f"{T}mistake_rate: Input should be at most 0.5: the expert"),
    # The agent.
    ("two-sources", {"agent.pretrained": {"model": "x"}}, "agent: give exactly one of 'pretrained' and 'training'"),
    ("nothing-to-tune", {"agent.finetune": FINETUNE}, "agent.finetune: there is no 'pretrained' LLM to fine-tune"),
    ("lora-targets", AGENT_ALONE | {"agent.finetune": FINETUNE | {"lora": {"targets": ["all-linear", "q_proj"]}}},
     "agent.finetune.lora.targets: all-linear has all layers in it"),
    ("no-source", {"agent.training": LEFT_OUT}, "agent: give exactly one of 'pretrained' and 'training'"),
    ("empty-source", {"agent.training": LEFT_OUT, "agent.pretrained": {"model": ""}},
     "agent.pretrained.model: String should have at least 1 character"),
    ("revision", {"agent.training": LEFT_OUT, "agent.pretrained": {"model": "x", "revision": "main"}},
     "agent.pretrained.revision: String should match pattern"),
    ("scored-thoughts", {"agent.action": "score"},
     "agent.action: an agent that thinks first must generate its actions"),
    ("thoughtless-looks", {"agent.prompt.thought_end": LEFT_OUT}, "agent: the looks of alfworld teach thoughts"),
    ("nothing-to-search", {"kl_router.force_search": True}, "kl_router.force_search: nothing is searched in alfworld"),
    ("looks-that-know-no-step", {"agent.prompt.opening": "{task} {observation} {steps_left}"},
     "agent.training.looks_per_update: looks know no {steps_left}, which prompt.opening names: set it to 0"),
    ("unknown-placeholder", {"agent.prompt.opening": "{tusk}"},
     "agent.prompt.opening: '{tusk}' is no placeholder: there are {task}, {observation}"),
    ("open-brace", {"agent.prompt.turn": "{observation"},
     "agent.prompt.turn: expected '}' before end of string; write a brace that is meant as such twice"),
    ("chat-of-a-trained-agent", {"agent.prompt.chat": {}, "agent.prompt.opening": "{task}", "agent.prompt.turn": "{observation}"},
     "agent.prompt.chat: the tokenizer of an agent that is trained here has no chat template: leave it out"),
    ("unknown-of-chat", {"agent.prompt.chat": {"sistem": "x"}}, "agent.prompt.chat.sistem: Extra inputs are not permitted"),
    ("empty-hide", {"agent.prompt.page": {"hide": [""]}},
     "agent.prompt.page.hide.0: String should have at least 1 character"),
    # The ladder.
    ("one-rung", {P + "ladder": [{"name": "float", "weights": "float"}]},
     f"{P}ladder: Tuple should have at"),
    ("rung-name", {P + "ladder.1.name": "a/b"}, f"{P}ladder.1.name: String should match pattern"),
    ("long-rung-name", {P + "ladder.1.name": "a" * 101},
     f"{P}ladder.1.name: String should have at most 100 characters"),
    ("rung-tokenizer", {P + "ladder.1.name": "tokenizer"},
     f"{P}ladder.1.name: 'tokenizer' is the folder beside the rungs"),
    ("rung-called-low", {P + "ladder.1.name": "low"},
     f"{P}ladder: a rung may be called 'low' only if it is the last of the route"),
    ("rung-called-high", {P + "ladder.1.name": "high"},
     f"{P}ladder: a rung may be called 'high' only if it is the first of the route"),
    ("same-names", {P + "ladder.1.name": "int4"}, f"{P}ladder: names are not unique: ['float', 'int4', 'int4',"),
    ("equal-rungs", {P + "ladder.3": {"name": "other", "weights": "int4"}},
     f"{P}ladder: rungs 'int4' and 'other' are equal"),
    ("unknown-first", {P + "route.0": "int3", BEHAVIOUR: [MIXED | {"shares": {"int2": 1}}]},
     f"{P}route: 'int3' is not on the ladder ['float',"),
    ("unknown-last", {P + "route.1": "int3", BEHAVIOUR: [MIXED | {"shares": {"float": 1}}]},
     f"{P}route: 'int3' is not on the ladder ['float',"),
    ("unknown-between", {P + "route": ["float", "int3", "int2"]}, f"{P}route: 'int3' is not on the ladder ['float',"),
    ("route-of-one", {P + "route": ["float"]}, f"{P}route: Tuple should have at least 2 items"),
    ("no-route", {P + "route": LEFT_OUT}, f"{P}route: {GONE}"),
    ("route-of-51", {P + "route": ["float"] * 51}, f"{P}route: Tuple should have at most 50 items"),
    ("route-is-a-text", {P + "route": "float"}, f"{P}route: Input should be 'auto' (it is 'float')"),
    ("route-twice", {P + "route": ["float", "int2", "int2"]},
     f"{P}route: 'int2' has to be below 'int2'; the ladder is highest first: ['float', 'int8', 'int4', 'int2-mse', 'int2']"),
    ("route-turned-round", {P + "route": ["int2", "float"]}, f"{P}route: 'float' has to be below 'int2'; the ladder"),
    ("route-out-of-order", {P + "route": ["float", "int4", "int8", "int2"]},
     f"{P}route: 'int8' has to be below 'int4'; the ladder"),
    *(
        (f"gone-{field}", {P + field: "float"}, f"{P}{field}: Extra inputs are not permitted")
        for field in ("high", "low")
    ),
    ("upside-down", {P + "ladder.1.weights": "int4", P + "ladder.2.weights": "int8"},
     f"{P}ladder: is highest first, but 'int4' (int8) is below 'int8'"),
    ("ranges", {P + "ladder.1.ranges": "mse"}, f"{P}ladder.1.ranges: rung 'int8': ranges is for int4, int3 and int2 weights"),
    ("rounding", {P + "ladder.1.rounding": "gptq"},
     f"{P}ladder.1.rounding: rung 'int8': rounding is for int4, int3 and int2 weights, these are int8"),
    ("head-of-float", {P + "ladder.0.head": "int8"}, f"{P}ladder.0.head: rung 'float' is float throughout: leave out head"),
    ("gptq-of-nothing", {P + "gptq": {}}, f"{P}gptq: no rung has `rounding: gptq`"),
    ("gptq-of-too-many-games", {P + "gptq": {"episodes": 10**8}, P + "ladder.4.rounding": "gptq"},
     f"{P}gptq.episodes: 100,000,000 games, but benchmark.splits.agent_train has "),
    ("gptq-without-damping", {P + "gptq": {"damping": 0.0}, P + "ladder.4.rounding": "gptq"}, f"{P}gptq.damping: Input"),
    ("kernels-of-float32", {P + "kernels": "low_bit"},
     f"{P}kernels: low-bit kernels compute with bfloat16: set agent.dtype to that, or leave kernels out"),
    ("empty-drafts", {P + "speculative": {"draft_tokens": 0}}, f"{P}speculative.draft_tokens: Input should be greater than"),
    ("float-activations", {P + "ladder.0.activations": "int8"}, f"{P}ladder: rung 'float': quantized activations need"),
    ("float-kept", {P + "ladder.0.keep_float": ["lm_head", "*.down_proj"]},
     f"{P}ladder: rung 'float' is float throughout"),
    ("bracket", {P + "ladder.4.keep_float": ["["]},
     f"{P}ladder.4.keep_float: rung 'int2': '[' is no pattern of module names"),
    ("everything", {P + "ladder.4.keep_float": ["*"]}, f"{P}ladder.4.keep_float: rung 'int2': '*' fits every module"),
    ("everything-else", {P + "ladder.4.keep_float": ["lm_head", "model.*"]},
     f"{P}ladder: rung 'int2': keep_float: ['lm_head', 'model.*'] leave every linear layer in float"),
    ("typo", {P + "ladder.4.keep_float": ["lm_haed"]},
     f"{P}ladder: rung 'int2': keep_float: 'lm_haed' fits no linear layer"),
    ("container", {P + "ladder.4.keep_float": ["model.layers.0"]},
     f"{P}ladder: rung 'int2': keep_float: 'model.layers.0' fits"),
    ("no-such-layer", {P + "ladder.4.keep_float": ["*.layers.8.*"]},
     f"{P}ladder: rung 'int2': keep_float: '*.layers.8.*' fits"),
    ("pair-of-a-named-route", {P + "pair": ["float", "int2"]}, f"{P}pair: is for route: auto; leave it out"),
    ("pair-of-one", AUTO | {P + "pair": ["float"]}, f"{P}pair.1: {GONE}"),
    ("pair-turned-round", AUTO | {P + "pair": ["int2", "float"]}, f"{P}pair: 'float' has to be below 'int2'; the ladder"),
    ("pair-off-the-ladder", AUTO | {P + "pair": ["float", "int1"]}, f"{P}pair: 'int1' is not on the ladder ['float',"),
    ("auto-with-a-rung-called-low", AUTO | {P + "ladder.4.name": "low", P + "pair": ["float", "low"]},
     f"{P}ladder: a rung may be called 'low' only if it is the last of the route"),
    ("auto-with-behaviours", {P + "route": "auto"},
     "trajectories.behaviour: which rungs are routed is not known with precisions.route: auto; leave it out"),
    ("cache-of-odd-bits", {P + "cache_bits": 12}, f"{P}cache_bits: Input should be 8, 16 or 32"),
    ("the-gate-of-old", {P + "gate_gap": [0.2, 0.5]}, f"{P}gate_gap: Extra inputs are not permitted"),
    # Trajectories and labels.
    ("behaviour-slash", {"trajectories.behaviour.2.name": "a/b"},
     "trajectories.behaviour.2.name: String should match pattern"),
    ("behaviour-twice", {"trajectories.behaviour.2.name": "all-low"}, "trajectories.behaviour: names are not unique"),
    ("behaviour-of-equal-shares", {BEHAVIOUR + ".2.shares": {"int2": 1}},
     f"{BEHAVIOUR}: 'all-low' and 'mixed' have equal shares, so they play the same episodes"),
    ("behaviour-of-a-share-of-zero", {BEHAVIOUR + ".2.shares": {"float": 0, "int2": 1}},
     f"{BEHAVIOUR}: 'all-low' and 'mixed' have equal shares, so they play the same episodes"),
    ("shares-above-one", {BEHAVIOUR + ".2.shares": {"float": 0.5, "int2": 0.6}},
     f"{BEHAVIOUR}.2.shares: {{'float': 0.5, 'int2': 0.6}} sum to 1.1, not to 1"),
    ("shares-below-one", {BEHAVIOUR + ".2.shares": {"float": 0.5}},
     f"{BEHAVIOUR}.2.shares: {{'float': 0.5}} sum to 0.5, not to 1"),
    ("share-above-one", {BEHAVIOUR + ".2.shares": {"float": 1.5, "int2": 0}},
     f"{BEHAVIOUR}.2.shares.float: Input should be less than or equal to 1"),
    ("share-below-zero", {BEHAVIOUR + ".2.shares": {"float": -0.5, "int2": 1}},
     f"{BEHAVIOUR}.2.shares.float: Input should be greater than or equal to 0"),
    ("share-that-is-no-number", {BEHAVIOUR + ".2.shares": {"float": NAN, "int2": 1}},
     f"{BEHAVIOUR}.2.shares.float: Input should be "),
    ("share-that-is-a-text", {BEHAVIOUR + ".2.shares": {"float": "1"}},
     f"{BEHAVIOUR}.2.shares.float: Input should be a valid number (it is '1')"),
    ("shares-of-a-number", {BEHAVIOUR + ".2.shares": {1: 1.0}},
     f"{BEHAVIOUR}.2.shares.1.[key]: Input should be a valid string (it is 1)"),
    ("no-shares", {BEHAVIOUR + ".2.shares": {}},
     f"{BEHAVIOUR}.2.shares: Dictionary should have at least 1 item"),
    ("shares-missing", {BEHAVIOUR + ".2.shares": LEFT_OUT}, f"{BEHAVIOUR}.2.shares: {GONE}"),
    ("shares-of-a-rung-that-is-not-routed", {BEHAVIOUR + ".2.shares": {"float": 0.5, "int4": 0.5}},
     f"{BEHAVIOUR}.2.shares: 'int4' is none of precisions.route ['float', 'int2']"),
    ("shares-of-a-rung-that-there-is-not", {BEHAVIOUR + ".0.shares": {"float": 1, "int3": 0}},
     f"{BEHAVIOUR}.0.shares: 'int3' is none of precisions.route ['float', 'int2']"),
    ("behaviour-ingested", {"trajectories.behaviour.2.name": "ingested"},
     "trajectories.behaviour: 'ingested' is the policy of"),
    ("two-thresholds", {"sensitivity.tau": 0.1}, "sensitivity: give exactly one of 'tau' and 'quantile'"),
    ("no-threshold", {"sensitivity.quantile": LEFT_OUT}, "sensitivity: give exactly one of 'tau' and 'quantile'"),
    ("large-tau", {"sensitivity": {"tau": 1e6}},
     "sensitivity.tau: Input should be at most 1,000.0: no step's divergence"),
    ("label-share", {"sensitivity.label_share": [0.6, 0.6]},
     "sensitivity.label_share: [0.6, 0.6]: the first is the lower bound"),
    # Routers.
    ("two-routers", {MODEL + ".architecture": ARCHITECTURE},
     f"{MODEL}: give exactly one of 'probe', 'architecture' and"),
    ("no-router", {MODEL: {}}, f"{MODEL}: give exactly one of 'probe', 'architecture' and 'pretrained'"),
    ("lora", {MODEL + ".lora": {}}, f"{MODEL}.lora: needs 'pretrained'"),
    ("lora-rank", {MODEL: {"pretrained": {"model": "x"}, "lora": {"rank": 0}}},
     f"{MODEL}.lora.rank: Input should be greater"),
    ("probe-nowhere", {MODEL + ".probe.layers": []}, f"{MODEL}.probe.layers: there is nothing to decide on"),
    ("probe-twice", {MODEL + ".probe.layers": [4, 4]}, f"{MODEL}.probe.layers: [4, 4] are not all different"),
    ("probe-of-no-draft", {MODEL + ".probe.features": ["repeats", "draft"]},
     f"{MODEL}.probe.features: 'draft' is of a draft, which there is only"),
    ("probe-of-draws", {MODEL + ".probe.features": ["margin"], "agent.temperature": 0.5},
     "kl_router.model.probe.features: 'margin' is learned from greedy actions"),
    ("probe-too-high", {MODEL + ".probe.layers": [4, 9]}, f"{MODEL}.probe.layers: [4, 9], but the agent has 8"),
    ("probe-at-zero", {MODEL + ".probe.layers": [4, 0]}, f"{MODEL}.probe.layers.1: Input should be greater than 0"),
    ("probe-beta", {G + "beta": 0.1}, f"{G}beta: trl reloads the reference as a causal LM, which a probe is not"),
    ("gated-weight", {G + "cost_weight": 1.5}, f"{G}cost_weight: 1.5: with the gated reward"),
    # The rest.
    ("resamples", {"evaluation.bootstrap": 30},
     "evaluation.bootstrap: 30 resamples, but an interval of 0.95 has one beyond"),
    ("resamples-of-release", {"release.bootstrap": 1000, "release.confidence": 0.999},
     "release.bootstrap: 1000 resamples"),
    ("remote", {"versioning.remote": "-v; ls"}, "versioning.remote: String should match pattern"),
    ("threads", {"runtime.threads": 2}, "runtime.threads: torch's threads do not survive a fork"),
    ("name", {"name": "y"}, "its name is 'y', but the file is called 'x'"),
    ("name-type", {"name": ["x"]}, "its name is ['x'], but the file is called 'x'"),
    # Games that there are not.
    *(
        (f"too-few-games-{path}", {path: 201}, f"{path}: 201 games, but benchmark.splits.validation has 200")
        for path in (
            P + "kl_episodes", K + "validation_games", G + "validation_games", "evaluation.confidence_games", "release.games",
        )
    ),
    ("games-per-update", {G + "games_per_update": 241},
     f"{G}games_per_update: 241 games, but benchmark.splits.router_train has 240"),
]  # fmt: skip
OTHERS: list[tuple[str, str, dict[str, object], str]] = [
    ("alfworld-tiny-official", "test", {"benchmark.splits.test": 141},
     "benchmark.splits.test: 141 games, but official valid_seen"),
    ("alfworld-tiny-official", "unseen", {"benchmark.test_split": "valid_unseen"},
     "benchmark.splits.test: 140 games, but official"),
    ("alfworld-tiny-official", "train", {"benchmark.splits.agent_train": 3114},
     "benchmark.splits: agent_train, router_train and "),
    ("webshop-tiny", "drafts-of-commands", {P + "speculative": {}, "agent.action": "score"},
     f"{P}speculative: with agent.action: score nothing is written, so nothing is drafted"),
    ("webshop-tiny", "test", {"benchmark.splits.test": 501},
     "benchmark.splits.test: 501 games, but WebShop's published split has"),
    ("webshop-tiny", "validation", {"benchmark.splits.validation": 1001},
     "benchmark.splits.validation: 1,001 games, but WebShop's"),
    ("webshop-tiny", "products", {"benchmark.products": 10**9},
     "benchmark.products: Input should be at most 2,000,000"),
    ("webshop-tiny", "shortest", {"agent.training.short_until": 9, "agent.training.short_steps": 1},
     "agent.training.short_steps: 1"),
    ("webshop-tiny-official", "price_seed", {"benchmark.price_seed": -1},
     "benchmark.price_seed: Input should be greater than or"),
]  # fmt: skip
