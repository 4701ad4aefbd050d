"""`dmr bench`: timings of the environments, of a GPU and of rollouts."""

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.table import Table

from dmr_pipeline.cli.caches import bench_cache
from dmr_pipeline.cli.common import console, progress_lines, user_errors_exit_2, write_record
from dmr_pipeline.cli.environments import GAMES_HELP, WebShopData
from dmr_pipeline.cli.serve_bench import bench_serve
from dmr_pipeline.errors import UserError

if TYPE_CHECKING:  # `dmr --help` needs none of it
    from dmr_pipeline.acting_bench.record import ActingRecord, Row
    from dmr_pipeline.rollout_bench.record import RolloutRecord

bench = typer.Typer(help="Measure how quick a part is.", no_args_is_help=True)
bench.command("cache")(bench_cache)
bench.command("serve")(bench_serve)


@bench.command("env")
@user_errors_exit_2
def bench_env(
    env: Annotated[Literal["alfworld", "webshop"], typer.Option(help="which environment")] = "alfworld",
    games: Annotated[
        Path | None, typer.Option("--games", envvar="ALFWORLD_DATA", help=f"alfworld: {GAMES_HELP}")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="alfworld: games timed in both engines, drawn at random")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="alfworld: commands in a walk")] = 30,
    products: Annotated[
        int, typer.Option(min=1, help="webshop: in the generated catalogue; the full WebShop has 1,180,000")
    ] = 1000,
    data: WebShopData = None,
) -> None:
    """Time an environment.

    alfworld: our engine beside the official one (left out where it is not installed: pip install 'dmr-pipeline\\[alfworld]'),
    and what many environments take. webshop: making a shop, opening it, searches and steps, and the memory that they take, on
    a generated catalogue and, with --data, on the authors'. A shop lies in the temporary folder meanwhile: of 1,180,000 products
    it takes 0.9 GB there, 4.3 GB of memory, and ten minutes to make.
    """
    if env == "webshop":
        _bench_webshop(products, data)
    elif games is None:
        raise UserError("no games: name their folder with --games or $ALFWORLD_DATA")
    else:
        _bench_alfworld(games, sample, steps)


@bench.command("gpu")
@user_errors_exit_2
def bench_gpu(
    tiny: Annotated[bool, typer.Option("--tiny", help="small shapes, on the CPU too: whether every part runs")] = False,
    output: Annotated[Path, typer.Option(help="JSON file for what is found")] = Path("build/gpu-check.json"),
) -> None:
    """Check this machine's GPU for the pipeline, in under 6 minutes.

    Rungs that are saved and loaded give equal logits; the tiny agent acts as on the CPU; steps a second; low-bit kernels
    against the dequantized product; two GRPO updates; batches that do not fit are halved; decoding at the shapes of Qwen3-1.7B
    and 4B with random weights, against the memory's bandwidth. Exits with 1 where a part fails; the others run all the same.
    """
    from dmr_pipeline.artifacts.folders import DATA_ROOT
    from dmr_pipeline.gpu_check.run import check_gpu

    with progress_lines():
        record = check_gpu(tiny, output, DATA_ROOT)
    table = Table(title=f"{record.hardware.get('gpu', 'CPU')}: {record.seconds:,.0f} s", box=box.SIMPLE)
    for column in ("part", "outcome", "seconds", "GPU memory", "why"):
        table.add_column(column, justify="right" if column in ("seconds", "GPU memory") else "left")
    for part in record.parts:
        memory = "" if part.peak_gpu_bytes is None else _size(part.peak_gpu_bytes)
        table.add_row(part.name, part.outcome, f"{part.seconds:.1f}", memory, part.problem or "")
    console.print(table)
    console.print(f"written to {output}")
    if not record.passed:
        raise typer.Exit(1)


@bench.command("rollout")
@user_errors_exit_2
def bench_rollout(
    quick: Annotated[bool, typer.Option("--quick", help="few episodes and layers: whether every part runs")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Steps a second of agents that play episodes, beside transformers' `generate` called at each step, in some minutes.

    The tiny agents play games of their recipes, 1, 16 and 64 at once; a Llama of 135 M random weights writes along
    transcripts. A step is one action of one episode, read and written, its environment included. Every measurement has a
    process of its own with one torch thread, and CPU seconds count: on an idle core they are the clock's. Beside each figure
    stands the one of a committed baseline. Exits with 1 where an action is not the one that `generate` writes.
    """
    os.environ.setdefault("TQDM_DELAY", "1")  # transformers' bars of less than a second are noise
    from dmr_pipeline.artifacts.folders import DATA_ROOT
    from dmr_pipeline.rollout_bench import record as records
    from dmr_pipeline.rollout_bench import run

    record, baseline = run.new_record(), records.read_baseline()
    with progress_lines():
        for figure in run.bench_rollout(run.QUICK if quick else run.FULL, DATA_ROOT):
            record.figures.append(figure)
            if json is not None:
                write_record(json, record)
    for table in _rollout_tables(record, baseline):
        console.print(table)
    console.print(
        "steps/s: of CPU time, one process with one torch thread. MB: the most memory that it held above model and games. equal:"
        " actions like those of generate, among the episodes that it played too."
        f" baseline: {_whence(baseline)}. here: {_whence(record)}. Figures of different machines do not compare.",
        highlight=False,
    )
    if not record.equal:
        raise typer.Exit(1)


@bench.command("acting")
@user_errors_exit_2
def bench_acting(
    model: Annotated[
        str,
        typer.Option(
            help="random-135m (a Llama of random weights), tiny (the agent of alfworld-tiny), or the folder of a causal LM"
        ),
    ] = "random-135m",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="where to act; on a CPU by one thread")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="short histories, few layers: whether every part runs")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="nothing is begun after so many; by default 70 on a GPU")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="file for the rows")] = None,
) -> None:
    """Time for a step, read and written, at each precision, in a quarter of an hour on a CPU at rest.

    Each alone, dequantized and by low-bit kernels; by transformers' `generate`; bfloat16 checking what a cheaper one drafts; and
    mixed, with a cache each and with one for both. 1, 8 and 64 episodes at once, histories of 500, 2,000 and 8,000 tokens. The
    limit is what the passes read over the memory's bandwidth, which is measured first. Exits with 1 where a part fails.
    """
    os.environ.setdefault("TQDM_DELAY", "1")  # transformers' bars of less than a second are noise
    from dmr_pipeline.acting_bench import actors, run
    from dmr_pipeline.agent.checkpoint import resolve_device

    chosen = resolve_device(device)
    run.prepare(chosen)
    actor = actors.load_actor(model, layers=2 if quick else None)
    record = run.new_acting_record(actor, chosen)
    if seconds is None and chosen.type == "cuda":
        seconds = 70.0
    cells = run.QUICK if quick else run.FULL if chosen.type == "cpu" else run.ON_A_GPU
    with progress_lines():
        for row in run.bench_acting(actor, chosen, record.bandwidth, cells, seconds):
            record.rows.append(row)
            if json is not None:
                write_record(json, record)
    for table in _acting_tables(record):
        console.print(table)
    console.print(
        f"{record.device}, {record.date[:10]}, memory read at {record.bandwidth / 1e9:.1f} GB/s."
        " ms: a step of all episodes, median, of CPU time on a CPU. times: quicker than bfloat16."
        " limit: ms that reading the bytes of its passes takes. passes: of the dear and the cheap precision."
        " equal: actions that are bfloat16's. int4h: with a head of int8."
        " 1 by 1: without guesses from what was written before.",
        highlight=False,
    )
    if not record.passed:
        raise typer.Exit(1)


def _acting_tables(record: "ActingRecord") -> Iterator[Table]:
    def cell(row: "Row") -> tuple[int, int]:
        return row.at_once, row.history

    for (at_once, history), rows in groupby(record.rows, cell):
        title = f"{record.model}, {at_once} at once, history of {history:,} tokens"
        table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        for column in ("", "cache", "ms", "times", "limit", "passes", "taken", "equal", "MB of\nweights", "of\ncaches"):
            table.add_column(column, justify="right" if column not in ("", "cache") else "left")
        first: float | None = None
        for row in rows:
            if not row.steps:
                table.add_row(f"{row.way}: {row.problem}", row.cache)
                continue
            first = first or row.ms_a_step
            table.add_row(
                row.way,
                row.cache,
                f"{row.ms_a_step:,.0f}",
                f"{first / row.ms_a_step:.2f}",
                f"{row.limit_ms:,.0f}",
                f"{row.passes_of_dear:.1f}" + (f" + {row.passes_of_cheap:.1f}" if row.passes_of_cheap else ""),
                f"{row.accepted / row.drafted:.0%}" if row.drafted else "",
                f"{row.equal}/{row.compared}",
                f"{row.weight_bytes / 1e6:,.0f}",
                f"{row.cache_bytes / 1e6:,.1f}",
            )
        yield table


def _whence(record: "RolloutRecord") -> str:
    commit = (
        "no commit"
        if record.git is None
        else f"commit {record.git.commit[:7]}{'' if record.git.clean else ', changed'}"
    )
    return f"{commit}, {record.date[:10]}, {record.machine.cpu}, {record.machine.cores} cores"


def _rollout_tables(record: "RolloutRecord", baseline: "RolloutRecord") -> Iterator[Table]:
    for agent, figures in groupby(record.figures, lambda figure: figure.agent):
        table = Table(title=agent, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
        for column in ("", "at\nonce", "steps", "steps/s", "base-\nline", "times", "MB", "base-\nline", "equal"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for figure in figures:
            before = baseline.like(figure)
            rates, memory = [f"{figure.steps_a_second:,.3g}", "", ""], [f"{figure.memory_bytes / 1e6:,.0f}", ""]
            if before is not None:
                rates[1:] = [f"{before.steps_a_second:,.3g}", f"{figure.steps_a_second / before.steps_a_second:.2f}"]
                memory[1:] = [f"{before.memory_bytes / 1e6:,.0f}"]
            table.add_row(
                figure.way,
                str(figure.at_once),
                f"{figure.steps:,}",
                *rates,
                *memory,
                f"{figure.equal}/{figure.compared}",
                style="" if figure.equal == figure.compared else "red",
            )
        yield table


def _bench_alfworld(games: Path, sample: int, steps: int) -> None:
    from rich.progress import track

    from dmr_pipeline.environments.alfworld import bench as benchmark
    from dmr_pipeline.environments.alfworld.official import engine
    from dmr_pipeline.environments.alfworld.official.reading import read_game
    from dmr_pipeline.environments.alfworld.official.verify import game_files
    from dmr_pipeline.environments.alfworld.store import to_json

    paths = game_files(games)
    some = random.Random(0).sample(paths, min(1000, len(paths)))
    timed = some[:sample]
    pairs = list(
        track(
            benchmark.timings(timed, steps, official=engine.is_installed()),
            description="the same walks in both engines",
            total=len(timed),
        )
    )
    loaded = [read_game(path) for path in track(some, description="games for many environments")]
    packed = [to_json(game) for game in loaded]
    table = Table(title=f"ALFWorld: medians over {len(timed)} games, {steps} commands each", box=box.SIMPLE)
    for column in ("", "ours", "official engine", "times faster"):
        table.add_column(column, justify="right" if column else "left")
    for name, field in (("load a game file", "load"), ("reset", "reset"), ("step", "step")):
        ours = median(getattr(mine, field) for mine, _ in pairs)
        theirs = [getattr(other, field) for _, other in pairs if other is not None]
        table.add_row(
            name, _duration(ours), *([_duration(median(theirs)), f"{median(theirs) / ours:,.0f}"] if theirs else [])
        )
    table.add_row("load a packed game", _duration(median(map(benchmark.packed_load_seconds, packed[:sample]))))
    console.print(table)
    if not engine.is_installed():
        console.print(
            "left out: the official engine, which is not installed (pip install 'dmr-pipeline[alfworld]')", markup=False
        )
    console.print("A reset includes the first admissible commands, a step those that follow it.")
    megabytes = benchmark.memory_bytes(packed, 1000) / 1e6
    console.print(f"1,000 live environments, {len(packed):,} games: {megabytes:,.0f} MB")
    for environments in (1, 10, 100, 1000):
        rate = benchmark.steps_a_second(loaded, environments)
        console.print(f"{environments:5,} environments in a process: {rate:8,.0f} steps a second")


def _bench_webshop(products: int, data: Path | None) -> None:
    from functools import partial

    from dmr_pipeline.artifacts.full_disk import disk_full_is_user_error
    from dmr_pipeline.environments.webshop import bench as benchmark
    from dmr_pipeline.environments.webshop.official.packing import pack

    writers: dict[str, Callable[[Path], object]] = {"generated": partial(benchmark.write_long_shop, products)}
    if data is not None:
        writers["the authors'"] = partial(pack, data)
    columns = []
    for name, write in writers.items():
        console.print(f"making a shop of {name} products")
        with tempfile.TemporaryDirectory() as temporary, disk_full_is_user_error(Path(temporary), Path(temporary)):
            made = benchmark.make(write, Path(temporary) / "shop")
            used = benchmark.use(Path(temporary) / "shop")
        columns.append(
            {
                "products": f"{made.products:,}",
                "make the shop": _duration(made.seconds),
                "memory to make it": _size(made.peak_bytes),
                "products on disk": _size(made.product_bytes),
                "index on disk": _size(made.index_bytes),
                "open it": _duration(used.load_s),
                "memory to open it": _size(used.load_peak_bytes),
                "search, median": _duration(median(used.searches_s)),
                "search, 95th percentile": _duration(quantiles(used.searches_s, n=20)[-1]),
                "steps a second": f"{used.steps_a_second:,.0f}",
                "memory after these": _size(used.peak_bytes),
            }
        )
    table = Table(title="WebShop", box=box.SIMPLE)
    table.add_column("")
    for name in writers:
        table.add_column(name, justify="right")
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    console.print(table)
    console.print(
        "Memory is the most that the process held, the pages of mapped files that it read among it. Generated descriptions are"
        " drawn out, to the length of WebShop's, with words that follow Zipf's law. Searches are for what goals ask for."
    )


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.1f} s"
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"


def _size(count: int) -> str:
    return f"{count / 1e6:,.{1 if count < 1e7 else 0}f} MB"
