import shutil
import subprocess
from pathlib import Path

from dmr_pipeline.recipe.reading import RECIPE_FOLDER, recipe_names
from tests.helpers.fake_project import REPOSITORY


def test_of_all_data_git_takes_the_agents_that_the_project_commits(tmp_path: Path) -> None:
    """A pretrained agent of a new recipe has gigabytes: `git add .` must not take it."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "data").mkdir()
    shutil.copy(REPOSITORY / "data" / ".gitignore", tmp_path / "data")
    for recipe in (*recipe_names(REPOSITORY / RECIPE_FOLDER), "new"):
        for stage in ("agent", "quantized_checkpoints"):
            model = tmp_path / "data" / recipe / stage / "model" / "model.safetensors"
            model.parent.mkdir(parents=True)
            model.touch()
            model.parents[1].with_name(f"{stage}.run.json").touch()
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    added = subprocess.run(["git", "-C", str(tmp_path), "ls-files"], capture_output=True, text=True, check=True)
    agents = [
        f"data/{recipe}/agent/model/model.safetensors"
        for recipe in ("alfworld-smollm2", "alfworld-tiny", "webshop-smollm2", "webshop-tiny")
    ]
    assert added.stdout.split() == ["data/.gitignore", *agents]
