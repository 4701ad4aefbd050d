"""Git's side of what is materialised: `dvc.lock` becomes commits on a branch `retrain/<date>`.

HEAD, the index and the work tree are never touched: a commit is put together in an index of its own, and the branch is
moved only if nobody else moved it meanwhile.
"""

import datetime
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from ruamel.yaml import YAML

from dmr_pipeline.errors import UserError
from dmr_pipeline.versioning.dvc_project import dvc_at_rest
from dmr_pipeline.versioning.lock_file import LOCK_FILE

ATTEMPTS = 20
IDENTITY = ("dmr-pipeline", "dmr-pipeline@localhost")
"""Name and address of the committer where Git is configured with none."""


def commit_lock(message: str, paths: Sequence[Path], date: datetime.date) -> str | None:
    """Commit `dvc.lock` and `paths`, as they are in the work tree, to the branch `retrain/<date>`.

    The branch starts at HEAD. A branch that is checked out somewhere is never moved, since its work tree would then seem
    to undo the commit: `retrain/<date>-1` and so on take its place.

    Processes of one clone share `dvc.lock`, so that it holds all that they committed. Other clones and work trees may have
    committed to the branch too. So the entries are merged, one by one: an entry that differs from HEAD's was made here and
    is taken from the file; any other stays as the branch has it. Where two clones made the same entry, the last one
    stands at the tip of the branch and the other in its history.

    Args:
        paths: files or folders to be committed along, ignored ones too. DVC finds an entry's stage only where `dvc.yaml`
            has it, so that one belongs here while HEAD's is another.
        date: the day, in UTC.

    Returns:
        The commit; None where the branch, or HEAD, has all of it.

    Raises:
        UserError: the working directory is in no Git checkout or DVC project, a path does not exist, or Git refuses.
    """
    _git("rev-parse", "--show-toplevel")
    with dvc_at_rest(), tempfile.TemporaryDirectory() as scratch:
        for attempt in range(ATTEMPTS):
            branch = _branch(date)
            tip = _find(branch)
            parent = tip or _find("HEAD")
            tree = _write_tree(parent, _merged_lock(tip), paths, Path(scratch, f"index-{attempt}"))
            if parent is not None and tree == _git("rev-parse", f"{parent}^{{tree}}"):
                return None
            commit = _commit_tree(tree, parent, message)
            expected = tip or "0" * len(commit)  # zeros: the branch must not exist
            moved = _run("update-ref", "-m", "retrain", f"refs/heads/{branch}", commit, expected)
            if moved.returncode == 0:
                return commit
    raise UserError(f"git could not move the branch {branch}: {_one_line(moved.stderr)}")


def _branch(date: datetime.date) -> str:
    """The day's first branch that is not checked out."""
    lines = _git("worktree", "list", "--porcelain").splitlines()
    checked_out = {line.removeprefix("branch refs/heads/") for line in lines if line.startswith("branch ")}
    names = (f"retrain/{date:%Y-%m-%d}" + (f"-{number}" if number else "") for number in count())
    return next(name for name in names if name not in checked_out)


def _find(revision: str) -> str | None:
    """Its commit; None where there is none, as in a repository without commits."""
    return _run("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").stdout.strip() or None


def _merged_lock(tip: str | None) -> str:
    """Content of `dvc.lock` for a commit on top of the branch's tip."""
    if not LOCK_FILE.is_file():
        raise UserError(f"there is no {LOCK_FILE} to commit: materialise a stage first")
    mine = LOCK_FILE.read_text(encoding="utf-8")
    branch = _run("show", f"{tip}:./{LOCK_FILE}").stdout if tip else ""
    if not branch:
        return mine
    entries, branch_entries, head_entries = map(_entries, (mine, branch, _run("show", f"HEAD:./{LOCK_FILE}").stdout))
    kept = {
        address: entry
        for address, entry in branch_entries.items()
        if address not in entries or entries[address] == head_entries.get(address)
    }
    merged = {**entries, **kept}
    if merged == branch_entries:
        return branch
    if merged == entries:
        return mine
    from dvc.utils.serialize import dumps_yaml

    return str(dumps_yaml({**YAML(typ="safe").load(mine), "stages": merged}))


def _entries(lock: str) -> Mapping[str, object]:
    entries: Mapping[str, object] = (YAML(typ="safe").load(lock) or {}).get("stages", {})
    return entries


def _write_tree(parent: str | None, lock: str, paths: Sequence[Path], index: Path) -> str:
    own_index = {"GIT_INDEX_FILE": str(index)}
    _git("read-tree", parent or "--empty", environment=own_index)
    if paths:
        _git("add", "--all", "--force", "--", *map(str, paths), environment=own_index)
    in_repository = _git("rev-parse", "--show-prefix") + LOCK_FILE.as_posix()
    blob = _git("hash-object", "-w", "--stdin", "--path", LOCK_FILE.as_posix(), stdin=lock)
    _git("update-index", "--add", "--cacheinfo", f"100644,{blob},{in_repository}", environment=own_index)
    return _git("write-tree", environment=own_index)


def _commit_tree(tree: str, parent: str | None, message: str) -> str:
    parents = ["-p", parent] if parent else []
    return _git("commit-tree", tree, *parents, stdin=message, environment=_identity())


def _identity() -> dict[str, str]:
    """Who commits, where neither Git's configuration nor the environment says it; Git's own guess would be the host's name."""
    environment: dict[str, str] = {}
    for role in ("AUTHOR", "COMMITTER"):
        if _run("-c", "user.useConfigOnly=true", "var", f"GIT_{role}_IDENT").returncode != 0:
            environment.update(zip((f"GIT_{role}_NAME", f"GIT_{role}_EMAIL"), IDENTITY, strict=True))
    return environment


def _git(*arguments: str, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """What Git prints.

    Raises:
        UserError: it refuses.
    """
    done = _run(*arguments, stdin=stdin, environment=environment)
    if done.returncode != 0:
        raise UserError(f"git {arguments[0]}: {_one_line(done.stderr)}")
    return done.stdout.strip()


def _run(
    *arguments: str, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *arguments],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError as error:
        raise UserError("git is not installed, and retrained artifacts are to be committed to it") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
