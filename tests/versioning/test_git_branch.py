import datetime
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_objects, dvc_stages
from dmr_pipeline.versioning.git_branch import commit_lock
from tests.helpers.fake_project import RECIPE, REPOSITORY, dvc

DAY = datetime.date(2026, 3, 1)
BRANCH = "retrain/2026-03-01"


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(project: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The fake project, committed to Git on 'main', with somebody's uncommitted work in it."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A Person")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "person@example.org")
    Path(".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")  # else DVC adds the first line itself
    write_lock({"tasks@other": "1"})
    git("checkout", "-q", "-b", "main")
    git("add", "--all")
    git("commit", "-q", "-m", "start")
    Path("staged").write_text("staged")
    git("add", "staged")
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text() + "# changed by hand\n")
    Path("untracked").write_text("untracked")
    return project


def write_lock(entries: dict[str, str], file: Path = Path("dvc.lock")) -> None:
    """Args: entries: address -> the last digit of its output's hash."""
    stages = {
        address: {"cmd": "x", "outs": [{"path": address, "hash": "md5", "md5": digit.zfill(32)}]}
        for address, digit in entries.items()
    }
    with file.open("w") as stream:
        YAML(typ="safe").dump({"schema": "2.0", "stages": stages}, stream)


def recorded(revision: str) -> dict[str, str]:
    lock = YAML(typ="safe").load(git("show", f"{revision}:dvc.lock"))
    return {address: entry["outs"][0]["md5"] for address, entry in lock["stages"].items()}


def entries(revision: str) -> dict[str, str]:
    """As `write_lock` takes them."""
    return {address: md5.lstrip("0") for address, md5 in recorded(revision).items()}


def state() -> dict[str, str]:
    """All that a commit to another branch must leave alone."""
    return {
        "head": Path(".git/HEAD").read_text() + git("rev-parse", "HEAD"),
        "status": git("status", "--porcelain=v2", "--branch"),
        "staged": git("ls-files", "--stage"),
        "content": "\n".join(path.read_text() for path in sorted(Path().glob("*")) if path.is_file()),
    }


@pytest.mark.parametrize("detached", [False, True])
def test_lock_is_committed_to_the_days_branch_and_nothing_else_is_touched(checkout: Recipe, detached: bool):
    if detached:
        git("checkout", "-q", "--detach")
    write_lock({"tasks@other": "1", "tasks@fake": "2"})
    before, head = state(), git("rev-parse", "HEAD")
    commit = commit_lock("Retrained: fake", [], DAY)
    assert state() == before
    assert commit == git("rev-parse", BRANCH)
    assert git("rev-parse", f"{BRANCH}~1") == head
    assert git("diff", "--name-only", head, BRANCH) == "dvc.lock"
    assert git("show", f"{BRANCH}:dvc.lock") == Path("dvc.lock").read_text().strip()
    assert git("log", "-1", "--format=%s by %an <%ae>", BRANCH) == "Retrained: fake by A Person <person@example.org>"


def test_paths_are_committed_along_ignored_folders_too(checkout: Recipe):
    ignored = Path("data", RECIPE, "benchmark_tasks")
    ignored.mkdir(parents=True)
    (ignored / "file").write_text("x")
    commit_lock("m", [Path("dvc.yaml"), ignored], DAY)
    assert set(git("diff", "--name-only", "HEAD", BRANCH).splitlines()) == {"dvc.yaml", f"{ignored}/file"}
    (ignored / "file").unlink()
    commit_lock("m", [ignored], DAY)
    assert git("diff", "--name-only", "HEAD", BRANCH) == "dvc.yaml"


def test_nothing_new_is_no_commit(checkout: Recipe):
    assert commit_lock("m", [], DAY) is None
    assert git("branch", "--list", BRANCH) == ""
    write_lock({"tasks@fake": "2"})
    assert commit_lock("m", [], DAY) is not None
    assert commit_lock("m", [], DAY) is None


def test_second_commit_of_a_day_follows_the_first(checkout: Recipe):
    write_lock({"tasks@other": "1", "tasks@fake": "2"})
    first = commit_lock("first", [], DAY)
    write_lock({"tasks@other": "1", "tasks@fake": "3"})
    second = commit_lock("second", [], DAY)
    assert git("rev-parse", f"{second}~1") == first
    assert entries(BRANCH) == {"tasks@other": "1", "tasks@fake": "3"}
    assert commit_lock("next day", [], DAY + datetime.timedelta(days=1)) is not None
    assert git("rev-parse", "retrain/2026-03-02~1") == git("rev-parse", "HEAD")


def test_entries_that_another_work_tree_committed_are_kept(checkout: Recipe, monkeypatch: pytest.MonkeyPatch):
    """It made an entry that this one lacks, and made anew one that this one has only from HEAD."""
    here = Path.cwd()
    there = here.with_name(here.name + "-there")
    git("worktree", "add", "-q", "--detach", str(there))
    write_lock({"tasks@other": "9", "tasks@third": "3"}, there / "dvc.lock")
    monkeypatch.chdir(there)
    commit_lock("there", [], DAY)
    monkeypatch.chdir(here)
    write_lock({"tasks@other": "1", "tasks@fake": "2"})
    before = Path("dvc.lock").read_text()
    commit_lock("here", [], DAY)
    assert entries(BRANCH) == {"tasks@other": "9", "tasks@third": "3", "tasks@fake": "2"}
    assert Path("dvc.lock").read_text() == before
    assert commit_lock("again", [], DAY) is None
    write_lock({"tasks@other": "7", "tasks@fake": "2"})
    commit_lock("made here at last", [], DAY)
    assert entries(BRANCH) == {"tasks@other": "7", "tasks@third": "3", "tasks@fake": "2"}


def test_branch_that_is_checked_out_is_never_moved(checkout: Recipe):
    git("checkout", "-q", "-b", BRANCH)
    elsewhere = Path.cwd().with_name(Path.cwd().name + "-elsewhere")
    git("worktree", "add", "-q", "-b", f"{BRANCH}-1", str(elsewhere))
    write_lock({"tasks@fake": "2"})
    before = state()
    commit = commit_lock("m", [], DAY)
    assert state() == before
    assert commit == git("rev-parse", f"{BRANCH}-2")
    assert git("rev-parse", BRANCH) == git("rev-parse", f"{BRANCH}-1") == git("rev-parse", "main")


def test_racing_processes_lose_no_commit(checkout: Recipe):
    """Each in a work tree of its own, so that only Git's compare-and-swap stands between them."""
    script = (
        "import datetime, sys; from dmr_pipeline.versioning.git_branch import commit_lock;"
        f"print(commit_lock('m', [], datetime.date.fromisoformat('{DAY}')))"
    )
    trees = [Path.cwd().with_name(f"{Path.cwd().name}-{number}") for number in range(4)]
    for number, tree in enumerate(trees):
        git("worktree", "add", "-q", "--detach", str(tree))
        write_lock({"tasks@other": "1", f"tasks@{number}": "2"}, tree / "dvc.lock")
    with ThreadPoolExecutor(len(trees)) as threads:
        done = list(
            threads.map(
                lambda tree: subprocess.run(
                    [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {script}"],
                    cwd=tree,
                    capture_output=True,
                    text=True,
                    check=False,
                ),
                trees,
            )
        )
    assert [run.returncode for run in done] == [0] * len(trees), done
    assert set(git("rev-list", f"HEAD..{BRANCH}").split()) == {run.stdout.strip() for run in done}
    assert entries(BRANCH) == {"tasks@other": "1"} | {f"tasks@{number}": "2" for number in range(len(trees))}


def test_branch_moved_meanwhile_is_followed(checkout: Recipe, monkeypatch: pytest.MonkeyPatch):
    from dmr_pipeline.versioning import git_branch

    write_lock({"tasks@fake": "2"})
    original, intruder = git_branch._commit_tree, []

    def slow(tree: str, parent: str | None, message: str) -> str:
        if not intruder:
            intruder.append(git("commit-tree", f"{parent}^{{tree}}", "-p", str(parent), "-m", "intruder"))
            git("update-ref", f"refs/heads/{BRANCH}", intruder[0])
        return original(tree, parent, message)

    monkeypatch.setattr(git_branch, "_commit_tree", slow)
    commit = commit_lock("m", [], DAY)
    assert git("rev-list", f"HEAD..{BRANCH}").split() == [commit, *intruder]


def test_without_an_identity_the_pipeline_is_the_committer(checkout: Recipe, monkeypatch: pytest.MonkeyPatch):
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.delenv(f"GIT_{role}_NAME")
        monkeypatch.delenv(f"GIT_{role}_EMAIL")
    write_lock({"tasks@fake": "2"})
    commit_lock("m", [], DAY)
    assert git("log", "-1", "--format=%an %ae %cn %ce", BRANCH) == " ".join(["dmr-pipeline dmr-pipeline@localhost"] * 2)
    git("config", "user.name", "Configured")
    git("config", "user.email", "configured@example.org")
    write_lock({"tasks@fake": "3"})
    commit_lock("m", [], DAY)
    assert git("log", "-1", "--format=%an %ce", BRANCH) == "Configured configured@example.org"


def test_repository_without_commits_gets_a_first_one(project: Recipe):
    write_lock({"tasks@fake": "2"})
    commit = commit_lock("m", [Path("dvc.yaml")], DAY)
    assert commit is not None
    assert git("rev-list", BRANCH).split() == [commit]
    assert git("ls-tree", "--name-only", BRANCH).split() == ["dvc.lock", "dvc.yaml"]


def test_project_in_a_folder_of_the_repository(checkout: Recipe, monkeypatch: pytest.MonkeyPatch):
    inner = Path("inner")
    inner.mkdir()
    shutil.copytree(".dvc", inner / ".dvc")
    write_lock({"tasks@fake": "2"}, inner / "dvc.lock")
    (inner / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(inner)
    commit_lock("m", [Path("dvc.yaml")], DAY)
    write_lock({"tasks@third": "3"})
    commit_lock("m", [], DAY)
    assert git("diff", "--name-only", "HEAD", BRANCH).split() == ["inner/dvc.lock", "inner/dvc.yaml"]
    lock = YAML(typ="safe").load(git("show", f"{BRANCH}:inner/dvc.lock"))
    assert set(lock["stages"]) == {"tasks@fake", "tasks@third"}


def test_outside_of_git_and_missing_files_are_user_errors(
    checkout: Recipe, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=r"git add: .*nowhere"):
        commit_lock("m", [Path("nowhere")], DAY)
    git("branch", "retrain")  # a branch that is in the way of a folder of branches
    write_lock({"tasks@fake": "2"})
    with pytest.raises(UserError, match=f"could not move the branch {BRANCH}: .*refs/heads/retrain"):
        commit_lock("m", [], DAY)
    Path("dvc.lock").unlink()
    with pytest.raises(UserError, match=r"there is no dvc\.lock"):
        commit_lock("m", [], DAY)
    monkeypatch.chdir(tmp_path_factory.mktemp("bare"))
    with pytest.raises(UserError, match=r"git rev-parse: .*not a git repository"):
        commit_lock("m", [], DAY)


def test_old_release_comes_back_from_its_commit_until_it_is_collected(checkout: Recipe):
    stage = pipeline.STAGES[0]
    folder = artifact_folder(stage.name, RECIPE)

    git("checkout", "-q", "dvc.yaml")
    old = materialize_stage(stage, checkout).artifact
    dvc_stages.commit(stage, RECIPE, artifact=old, rebuilt=True)
    assert commit_lock("old release", [], DAY) is not None
    new_recipe = checkout.model_copy(update={"benchmark": checkout.benchmark.model_copy(update={"seed": 1})})
    new = materialize_stage(stage, new_recipe).artifact
    dvc_stages.commit(stage, RECIPE, artifact=new, rebuilt=True)
    assert new.hash != old.hash

    released = recorded(BRANCH)[f"{stage.name}@{RECIPE}"]
    dvc("gc", "--workspace", "--all-branches", "-f")
    dvc_objects.restore(released, Path("old") / stage.name)
    assert verify(Path("old") / stage.name).hash == old.hash
    assert verify(folder).hash == new.hash
    dvc("gc", "--workspace", "-f")
    shutil.rmtree("old")
    with pytest.raises(UserError, match=f"{released} is not in DVC's cache, and there is no remote"):
        dvc_objects.restore(released, Path("old") / stage.name)
