"""`dmr doctor`: each part present and missing, on a machine that the test sets up."""

import importlib
import json
import os
import re
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
import typer
from click.testing import CliRunner as ClickRunner
from typer.testing import CliRunner

from dmr_pipeline import doctor
from dmr_pipeline.cli.doctor import doctor as doctor_command
from dmr_pipeline.doctor import Finding
from dmr_pipeline.model_cache import CONVERSION, SOURCE_FILE, Source
from tests.helpers.fake_project import REPOSITORY

ABSENT = Finding("PostgreSQL server", False, "none")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, no program on the PATH, none of the variables."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in [name for name in os.environ if name.startswith("DAGSTER_")] + ["ALFWORLD_DATA", "WEBSHOP_DATA"]:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def add_programs(*names: str) -> None:
    for name in names:
        program = Path("bin") / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)


def add_instance(default_limit: int = 1) -> None:
    Path("dagster_home").mkdir()
    Path("dagster_home/dagster.yaml").write_text(
        f"telemetry: {{enabled: false}}\nconcurrency: {{pools: {{default_limit: {default_limit}}}}}\n"
    )


def add_dvc(remote: str = "") -> None:
    Path(".dvc").mkdir(exist_ok=True)
    Path(".dvc/config").write_text(remote)
    Path("dvc.yaml").write_text("stages: {}\n")


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    import torch

    card = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)


@pytest.mark.parametrize(
    ("look", "add", "part"),
    [
        (doctor.git, lambda: add_programs("git"), "Git"),
        (doctor.compilers, lambda: add_programs("gcc", "g++", "make"), "compilers"),
        (doctor.chromium, lambda: add_programs("chromium"), "Chromium"),
        (doctor.dvc_project, add_dvc, "DVC project"),
        (doctor.dvc_remote, lambda: add_dvc("['remote \"store\"']\n    url = /mnt/store\n"), "DVC remote"),
        (doctor.dagster_home, add_instance, "Dagster home"),
    ],
)
def test_a_part_is_missed_then_found(look: Callable[[], Finding], add: Callable[[], None], part: str) -> None:
    missing = look()
    assert (missing.part, missing.found) == (part, False)
    assert missing.remedy
    add()
    found = look()
    assert (found.part, found.found, found.remedy) == (part, True, "")


def test_a_compiler_alone_is_not_enough() -> None:
    add_programs("gcc", "make")
    assert doctor.compilers().remedy == "apt-get install g++"


def test_the_remote_is_named() -> None:
    add_dvc("['remote \"store\"']\n    url = s3://bucket/path\n")
    assert doctor.dvc_remote().detail == "store (s3://bucket/path)"


def test_a_broken_dvc_config_is_a_finding() -> None:
    add_dvc("[core\n")
    assert doctor.dvc_remote().remedy == "mend .dvc/config"


def test_an_instance_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    add_instance()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "not writable" in doctor.dagster_home().detail


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 11, 0), (3, 13, 1)])
def test_python(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    finding = doctor.python()
    assert finding.detail == ".".join(map(str, version))
    assert finding.found == (version[1] > 10)


@pytest.mark.parametrize(("cuda", "build"), [(None, "CPU build"), ("13.0", "CUDA 13.0")])
def test_torch(monkeypatch: pytest.MonkeyPatch, cuda: str | None, build: str) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = doctor.torch_build()
    assert finding.found
    assert finding.detail == f"{torch.__version__}, {build}"


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = doctor.torch_build()
    assert (finding.found, finding.required, finding.remedy) == (False, True, "make setup")
    assert not doctor.gpu().found


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    assert doctor.gpu() == Finding("GPU", False, "none: stages run on the CPU")
    add_programs("nvidia-smi")
    assert "torch does not see it" in doctor.gpu().detail
    pretend_gpus(monkeypatch, 2)
    assert doctor.gpu() == Finding("GPU", True, "Some GPU (80 GiB), Some GPU (80 GiB)")


@pytest.mark.parametrize(
    ("gpus", "limit", "fits"), [(0, 1, True), (1, 1, True), (2, 1, False), (2, 2, True), (0, 3, False)]
)
def test_the_pool_s_limit_beside_the_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, limit: int, fits: bool) -> None:
    pretend_gpus(monkeypatch, gpus)
    add_instance()
    if limit != 1:  # else the default of dagster.yaml
        with dg.DagsterInstance.from_config("dagster_home") as instance:
            instance.event_log_storage.set_concurrency_slots("gpu", limit)
    finding = doctor.gpu_pool(ABSENT)
    assert finding.found == fits
    assert finding.detail == f"limit {limit}, GPUs here: {gpus}"
    if not fits:
        assert f" dagster instance concurrency set gpu {max(gpus, 1)} " in finding.remedy


def test_the_remedy_of_the_pool_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster._cli import create_dagster_cli

    pretend_gpus(monkeypatch, 2)
    add_instance()
    home, _, *words = doctor.gpu_pool(ABSENT).remedy.partition(" (")[0].split()
    monkeypatch.setenv(*home.split("="))
    done = ClickRunner().invoke(create_dagster_cli(), words)
    assert done.exit_code == 0, done.output
    assert doctor.gpu_pool(ABSENT).found


@pytest.mark.parametrize("content", ["telemetry: 3\n", "storage: {postgres: {postgres_url: {env: DAGSTER_NOWHERE}}}\n"])
def test_an_instance_that_cannot_be_opened(content: str) -> None:
    add_instance()
    Path("dagster_home/dagster.yaml").write_text(content)
    finding = doctor.gpu_pool(ABSENT)
    assert not finding.found
    assert "cannot be opened" in finding.detail
    assert "\n" not in finding.detail


def test_extras() -> None:
    assert doctor.extra("dev", "pytest", "tests") == Finding("extra dev", True, f"pytest {pytest.__version__}")
    missing = doctor.extra("dev", "no-such-distribution", "tests")
    assert not missing.found
    assert missing.remedy == "pip install -c constraints.txt -e '.[dev]'"


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "DAGSTER_PG_HOST" in doctor.postgres_server().detail
    with socket.socket() as probe:  # bound but not listening, so that nothing answers
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        monkeypatch.setenv("DAGSTER_PG_HOST", "127.0.0.1")
        monkeypatch.setenv("DAGSTER_PG_PORT", str(port))
        monkeypatch.setenv("DAGSTER_PG_PASSWORD", "hidden")
        finding = doctor.postgres_server()
    assert not finding.found
    assert f"127.0.0.1:{port}" in finding.detail
    assert "hidden" not in str(finding)
    assert doctor.gpu_pool(finding).remedy == "see PostgreSQL server"


def test_a_port_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_PG_HOST", "127.0.0.1")
    monkeypatch.setenv("DAGSTER_PG_PORT", "postgres")
    assert not doctor.postgres_server().found


@pytest.mark.parametrize(
    ("name", "find", "needed", "shown"),
    [
        ("ALFWorld", doctor.alfworld_data, "json_2.1.1", "json_2.1.1/"),
        ("WebShop", doctor.webshop_data, "items_shuffle_1000.json", "items_shuffle*.json"),
    ],
)
def test_official_data(
    monkeypatch: pytest.MonkeyPatch, name: str, find: Callable[[], Finding], needed: str, shown: str
) -> None:
    part, variable, command = f"{name} data", f"{name.upper()}_DATA", f"dmr data {name.lower()}"
    assert find() == Finding(part, False, "none: generated tasks only", command)
    monkeypatch.setenv(variable, "source")
    unset = f"unset {variable} && {command}"
    assert find() == Finding(part, False, f"${variable} is source, which has no {shown}", unset)
    (Path("source") / needed).mkdir(parents=True)
    assert find() == Finding(part, True, "source, not packed", command)
    pack = Path(f"data/official/{name.lower()}/pack.json")
    pack.parent.mkdir(parents=True)
    pack.write_text("{}")
    assert find() == Finding(part, True, f"packed in {pack.parent}")


def test_without_spacys_model_title_nouns_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "en_core_web_sm", raising=False)
    assert not doctor.title_nouns().found
    assert "spacy download en_core_web_sm" in doctor.title_nouns().remedy
    (tmp_path / "en_core_web_sm.py").write_text("")
    importlib.invalidate_caches()
    assert doctor.title_nouns() == Finding("nouns of WebShop titles", True, "spaCy's en_core_web_sm, as in WebShop")


def test_models_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DMR_MODELS", str(tmp_path))
    assert doctor.named_models() == [
        Finding("model smollm2-135m", False, "not fetched", "dmr models fetch smollm2-135m")
    ]
    source = Source(name="mine", origin="mine.gguf", sha256="0" * 64, licence=None, conversion=CONVERSION)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / SOURCE_FILE).write_text(source.model_dump_json())
    (tmp_path / "mine" / "model.safetensors").write_bytes(bytes(3_000_000))
    assert doctor.named_models()[0] == Finding("model mine", True, f"3 MB in {tmp_path / 'mine'}")


@pytest.mark.parametrize(("free", "enough"), [(4.9e9, False), (5.1e9, True)])
def test_free_disk(monkeypatch: pytest.MonkeyPatch, free: float, enough: bool) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    finding = doctor.free_disk()
    assert finding.found == enough
    assert bool(finding.remedy) != enough


def run_doctor(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(doctor_command)
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return done.exit_code, done.stdout


def test_a_bare_machine_fails_for_its_required_parts() -> None:
    code, output = run_doctor("--json")
    findings = [Finding(**finding) for finding in json.loads(output)]
    assert code == 1
    assert {finding.part for finding in findings if finding.required and not finding.found} == {
        "DVC project",
        "Dagster home",
    }
    assert len({finding.part for finding in findings}) == len(findings)


def test_what_is_optional_may_be_missing() -> None:
    add_dvc()
    add_instance()
    code, output = run_doctor()
    assert code == 0
    assert re.search(r"Dagster home +✓ ", output)
    assert re.search(r"Chromium +– not on the PATH.* apt-get install chromium", output)


def test_remedies_and_extras_are_the_project_s() -> None:
    findings = doctor.examine()
    targets = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert targets is not None
    wanted = {word for finding in findings for word in re.findall(r"^make (\S+)", finding.remedy)}
    assert wanted <= set(targets[1].split())
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [finding.part.removeprefix("extra ") for finding in findings if finding.part.startswith("extra ")]
    assert set(named) == {"ray", "postgres", "kubernetes"}
    assert set(named) <= extras.keys()
    for finding in findings:
        for path in re.findall(r"deploy/\S+", finding.remedy):
            assert (REPOSITORY / path).is_file()
