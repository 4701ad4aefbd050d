"""Stage `ingested_trajectories`: episodes that an agent logged at work (see ingestion/inbox.py)."""

import json
import logging
import shutil

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.errors import printable
from dmr_pipeline.ingestion.inbox import NOT_MOVED, dropped_files, put_in_quarantine, read_dropped, shortened
from dmr_pipeline.ingestion.rules import Rules
from dmr_pipeline.ingestion.stored import EPISODES_FOLDER, LEFT_OUT_FILE, read_stored, store_episodes, stored_files
from dmr_pipeline.summaries import IngestedSummary

log = logging.getLogger(__name__)


def ingested_trajectories(context: StageContext) -> StageResult:
    """Takes in what was dropped since the artifact before; counts in the summary are without the episodes left out."""
    rules = Rules.of(context.recipe, context.inputs["benchmark_tasks"])
    folder = context.output / EPISODES_FOLDER
    folder.mkdir()
    episodes = [] if context.previous is None else read_stored(context.previous)
    for path in [] if context.previous is None else stored_files(context.previous):
        shutil.copyfile(path, folder / path.name)
    ids = {episode.episode_id for episode in episodes}
    not_moved: dict[str, str] = {}
    for file in [] if context.incoming is None else dropped_files(context.incoming):
        stored = folder / f"{file.digest}.parquet"
        if stored.exists():
            continue
        new, problems = read_dropped(file, rules, ids)
        if problems:
            trouble = put_in_quarantine(file, problems)
            if trouble is not None:
                not_moved[file.digest] = f"{trouble}; it was refused: {shortened(problems)}"
        elif new:
            store_episodes(new, stored)
            episodes += new
            ids |= {episode.episode_id for episode in new}
            log.info("%s: %d episodes", printable(file.path), len(new))
            if (warning := rules.strangers(new)) is not None:
                log.warning("%s: %s", printable(file.path), warning)
    left_out = {
        episode.episode_id: why for episode in episodes if (why := next(rules.violations(episode), None)) is not None
    }
    if left_out:
        log.warning("%d of %d ingested episodes are left out, see %s", len(left_out), len(episodes), LEFT_OUT_FILE)
    text = json.dumps(left_out, indent=2, sort_keys=True) + "\n"
    (context.output / LEFT_OUT_FILE).write_text(text, encoding="utf-8")
    used = [episode for episode in episodes if episode.episode_id not in left_out]
    return StageResult(
        summary=IngestedSummary(
            files=len(stored_files(context.output)),
            episodes=len(used),
            steps=sum(len(episode.steps) for episode in used),
        ).model_dump(),
        measured={NOT_MOVED: not_moved} if not_moved else {},
    )
