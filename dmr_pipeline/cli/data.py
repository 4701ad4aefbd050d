"""`dmr data`: the official data of a benchmark."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from dmr_pipeline.cli.common import console, user_errors_exit_2
from dmr_pipeline.errors import UserError

if TYPE_CHECKING:
    from dmr_pipeline.environments.alfworld.official import Pack

data = typer.Typer(help="Get the official data of a benchmark.", no_args_is_help=True)


@data.command()
@user_errors_exit_2
def alfworld(
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", envvar="ALFWORLD_DATA", help="take the games from this folder, which has json_2.1.1/ in it"
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="another address of the archive")] = None,
    sha256: Annotated[str | None, typer.Option(help="refuse the archive where it has another checksum")] = None,
) -> None:
    """Get the official ALFWorld games: download them, or take them from a folder, and pack them for `dmr run`.

    The games are those of the ALFWorld project, under the MIT licence.

    The download is about 36 MB, and some ten times that while it is unpacked; the pack that stays is 1.4 MB.

    A download that was cut is resumed by the same command.
    """
    from dmr_pipeline.environments.alfworld import official

    if source is None:
        archive = official.download_games(url or official.ARCHIVE_URL, sha256=sha256)
        console.print(f"archive: sha256 {archive.sha256}", soft_wrap=True)
        packed = official.pack(official.DOWNLOAD_FOLDER, archive=archive)
        shutil.rmtree(official.DOWNLOAD_FOLDER)
    elif url or sha256:
        raise UserError(
            f"--url and --sha256 are for the download, but the games are in {source}: "
            "leave them out, or --from and $ALFWORLD_DATA"
        )
    else:
        packed = official.pack(source)
    _show_pack(packed)


def _show_pack(packed: "Pack") -> None:
    from dmr_pipeline.environments.alfworld.official import OFFICIAL_GAMES, PACK_FOLDER

    table = Table(title="official ALFWorld games", box=box.SIMPLE)
    for column in ("split", "games", "official", "skipped"):
        table.add_column(column, justify="right" if column in ("games", "official") else "left")
    for split, official in OFFICIAL_GAMES.items():
        found = packed.splits.get(split)
        if found is None:
            table.add_row(split, "not there", str(official))
        else:
            skipped = ", ".join(f"{count} {reason}" for reason, count in found.skipped.items() if count)
            table.add_row(split, str(found.games), str(official), skipped or "none")
    console.print(table)
    for split, found in packed.splits.items():
        if found.games != found.official:
            console.print(
                f"{split}: {found.games} games, but the official split has {found.official}",
                style="yellow",
                soft_wrap=True,
            )
    size = sum(path.stat().st_size for path in PACK_FOLDER.iterdir())
    console.print(f"packed: {PACK_FOLDER} ({size / 1e6:.2f} MB)", soft_wrap=True)
