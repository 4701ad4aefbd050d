"""What this machine brings for the pipeline: one finding a part. Nothing is changed; each function is quick."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dmr_pipeline.artifacts.folders import DATA_ROOT
from dmr_pipeline.model_cache import KNOWN, cache_folder, fetched, fetched_bytes, fetched_names

LOW_DISK_BYTES = 5e9
"""Less is worth a warning: an LLM of 2 B parameters with its precision ladder takes about as much."""
SERVER_TIMEOUT = 2
"""Seconds in which the PostgreSQL server must answer."""


@dataclass(frozen=True)
class Finding:
    """One part of the machine or of the project's folder."""

    part: str
    found: bool
    detail: str
    """What was found, or what is wrong."""
    remedy: str = ""
    """What to do where the part is missing; empty where there is nothing to do."""
    required: bool = False
    """Nothing runs without it."""


def examine() -> list[Finding]:
    """All parts, in the order in which they are best mended. Takes some seconds, most of them to import torch and Dagster."""
    graphics, database = gpu(), postgres_server()
    return [
        python(),
        torch_build(),
        graphics,
        git(),
        dvc_project(),
        dvc_remote(),
        dagster_home(),
        gpu_pool(database),
        extra("ray", "dagster-ray", "stages on a Ray cluster"),
        extra("postgres", "dagster-postgres", "one instance for several machines"),
        database,
        extra("kubernetes", "dagster-k8s", "stages as Kubernetes jobs"),
        alfworld_data(),
        webshop_data(),
        title_nouns(),
        compilers(),
        alfworld_engine(),
        chromium(),
        *named_models(),
        free_disk(),
    ]


def python() -> Finding:
    found = sys.version_info >= (3, 11)
    detail = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", found, detail, "" if found else "make setup PYTHON=python3.11", required=True)


def torch_build() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", False, f"cannot be imported: {_line(error)}", "make setup", required=True)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", True, f"{torch.__version__}, {build}", required=True)


def gpu() -> Finding:
    devices = _gpus()
    if devices:
        return Finding("GPU", True, ", ".join(devices))
    if shutil.which("nvidia-smi"):
        return Finding(
            "GPU",
            False,
            "torch does not see it: stages run on the CPU",
            "install torch's CUDA build, or a newer driver",
        )
    return Finding("GPU", False, "none: stages run on the CPU")


def _gpus() -> list[str]:
    """Name and memory of each GPU that torch can use."""
    try:
        import torch
    except ImportError:
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]


def git() -> Finding:
    found = shutil.which("git") is not None
    return Finding("Git", found, "on the PATH" if found else "not on the PATH", "" if found else "apt-get install git")


def dvc_project() -> Finding:
    found = Path(".dvc/config").is_file() and Path("dvc.yaml").is_file()
    detail = str(Path.cwd()) if found else f"{Path.cwd()} has no .dvc/config and dvc.yaml"
    return Finding("DVC project", found, detail, "" if found else "cd to the project's folder", required=True)


def dvc_remote() -> Finding:
    from dvc.config import Config, ConfigError

    try:
        remotes = Config(".dvc")["remote"]
    except ConfigError as error:
        return Finding("DVC remote", False, _line(error), "mend .dvc/config")
    if remotes:
        return Finding("DVC remote", True, ", ".join(f"{name} ({remote['url']})" for name, remote in remotes.items()))
    return Finding("DVC remote", False, "none: artifacts stay on this machine", "dvc remote add -d NAME URL")


def dagster_home() -> Finding:
    home = _dagster_home()
    if not (home / "dagster.yaml").is_file():
        remedy = "unset DAGSTER_HOME, and run dmr in the project's folder"
        return Finding("Dagster home", False, f"{home} has no dagster.yaml", remedy, required=True)
    if not os.access(home, os.W_OK):
        return Finding("Dagster home", False, f"{home} is not writable", f"chmod u+w {home}", required=True)
    return Finding("Dagster home", True, str(home), required=True)


def _dagster_home() -> Path:
    return Path(os.environ.get("DAGSTER_HOME", "dagster_home")).resolve()


def gpu_pool(database: Finding) -> Finding:
    """The limit of the pool `gpu` beside this machine's GPUs.

    Args:
        database: what `postgres_server` found, since an instance whose database is away takes long to say so.
    """
    import dagster as dg
    from sqlalchemy.exc import SQLAlchemyError

    if "DAGSTER_PG_HOST" in os.environ and not database.found:
        return Finding("pool gpu", False, "not known: the instance's database does not answer", "see PostgreSQL server")
    home = _dagster_home()
    if not (home / "dagster.yaml").is_file():
        return Finding("pool gpu", False, "not known: there is no instance", "see Dagster home")
    try:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
            limit = limits.get("gpu", instance.get_concurrency_config().pool_config.default_pool_limit)
    except (dg.DagsterError, SQLAlchemyError, ImportError, OSError) as error:
        return Finding("pool gpu", False, f"the instance cannot be opened: {_line(error)}", f"mend {home}/dagster.yaml")
    gpus = len(_gpus())
    detail = f"limit {'none' if limit is None else limit}, GPUs here: {gpus}"
    if limit == max(gpus, 1):
        return Finding("pool gpu", True, detail)
    return Finding(
        "pool gpu",
        False,
        detail,
        f"DAGSTER_HOME={home.resolve()} dagster instance concurrency set gpu {max(gpus, 1)} (or the GPUs of all workers)",
    )


def extra(name: str, package: str, purpose: str) -> Finding:
    """An optional extra of pyproject.toml, by a package that it alone brings."""
    try:
        return Finding(f"extra {name}", True, f"{package} {version(package)}")
    except PackageNotFoundError:
        return Finding(
            f"extra {name}", False, f"not installed ({purpose})", f"pip install -c constraints.txt -e '.[{name}]'"
        )


def postgres_server() -> Finding:
    """The server that the variables of deploy/postgres/dagster.yaml name."""
    part = "PostgreSQL server"
    if "DAGSTER_PG_HOST" not in os.environ:
        return Finding(
            part, False, "none ($DAGSTER_PG_HOST is not set): runs are recorded on this machine", "see deploy/README.md"
        )
    from sqlalchemy import URL, create_engine
    from sqlalchemy.exc import SQLAlchemyError

    host, port = os.environ["DAGSTER_PG_HOST"], os.environ.get("DAGSTER_PG_PORT", "5432")
    try:
        address = URL.create(
            "postgresql+psycopg2",
            username=os.environ.get("DAGSTER_PG_USERNAME"),
            password=os.environ.get("DAGSTER_PG_PASSWORD"),
            host=host,
            port=int(port),
            database=os.environ.get("DAGSTER_PG_DB"),
        )
        with create_engine(address, connect_args={"connect_timeout": SERVER_TIMEOUT}).connect() as connection:
            number = connection.exec_driver_sql("show server_version").scalar()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        return Finding(part, False, f"{host}:{port}: {_line(error)}", "start it, or mend the variables DAGSTER_PG_*")
    return Finding(part, True, f"{number} at {host}:{port}")


def alfworld_data() -> Finding:
    from dmr_pipeline.environments.alfworld.official.packing import PACK_FOLDER

    return _official_data("ALFWorld", PACK_FOLDER, "json_2.1.1/")


def webshop_data() -> Finding:
    from dmr_pipeline.environments.webshop.official.packing import PACK_FOLDER

    return _official_data("WebShop", PACK_FOLDER, "items_shuffle*.json")


def _official_data(benchmark: str, pack: Path, needed: str) -> Finding:
    """Packed, or to be packed from the folder that the benchmark's variable names.

    Args:
        needed: pattern of a name that this folder has.
    """
    part, variable, command = f"{benchmark} data", f"{benchmark.upper()}_DATA", f"dmr data {benchmark.lower()}"
    if (pack / "pack.json").is_file():
        return Finding(part, True, f"packed in {pack}")
    source = os.environ.get(variable)
    if source is None:
        return Finding(part, False, "none: generated tasks only", command)
    if any(Path(source).glob(needed)):
        return Finding(part, True, f"{source}, not packed", command)
    return Finding(part, False, f"${variable} is {source}, which has no {needed}", f"unset {variable} && {command}")


def title_nouns() -> Finding:
    """What finds the nouns by which WebShop's reward compares titles."""
    from dmr_pipeline.environments.webshop.nouns import DESCRIPTIONS, installed_tagger

    tagger = installed_tagger()
    remedy = "" if tagger == "spacy" else "pip install spacy && python -m spacy download en_core_web_sm"
    return Finding("nouns of WebShop titles", tagger == "spacy", DESCRIPTIONS[tagger], remedy)


def compilers() -> Finding:
    missing = [name for name in ("gcc", "g++", "make") if shutil.which(name) is None]
    if missing:
        detail = f"no {', '.join(missing)}: only the official ALFWorld engine needs them"
        return Finding("compilers", False, detail, f"apt-get install {' '.join(missing)}")
    return Finding("compilers", True, "gcc, g++, make")


def alfworld_engine() -> Finding:
    from dmr_pipeline.environments.alfworld.official.engine import is_installed

    if is_installed():
        return Finding("official ALFWorld engine", True, f"alfworld {version('alfworld')}")
    return Finding("official ALFWorld engine", False, "not installed: only comparisons need it", "make official-engine")


def chromium() -> Finding:
    browsers = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if browsers:
        return Finding("Chromium", True, browsers[0])
    return Finding("Chromium", False, "not on the PATH: only tests of the UI need it", "apt-get install chromium")


def named_models() -> list[Finding]:
    """LLMs that recipes may name: those that this project knows, and those that were converted here."""
    findings = []
    for name in sorted({*KNOWN, *fetched_names()}):
        if fetched(name) is None:
            findings.append(Finding(f"model {name}", False, "not fetched", f"dmr models fetch {name}"))
        else:
            size, folder = fetched_bytes(name), cache_folder() / name
            findings.append(Finding(f"model {name}", True, f"{size / 1e6:,.0f} MB in {folder}"))
    return findings


def free_disk() -> Finding:
    """Of the disk that artifacts go to."""
    folder = DATA_ROOT if DATA_ROOT.is_dir() else Path()
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.0f} GB for {folder.resolve()}"
    remedy = "" if free >= LOW_DISK_BYTES else "free some, or move data/ to another disk and link it here"
    return Finding("free disk", free >= LOW_DISK_BYTES, detail, remedy)


def _line(error: Exception) -> str:
    """The first line of an error: libraries write the rest for themselves."""
    return (str(error).splitlines() or [type(error).__name__])[0]
