"""`dmr data`: the official data of a benchmark."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from dmr_pipeline.cli.common import console, user_errors_exit_2
from dmr_pipeline.errors import UserError

if TYPE_CHECKING:
    from dmr_pipeline.environments.alfworld.official.packing import Pack
    from dmr_pipeline.environments.webshop.official.packing import Pack as WebShopPack
    from dmr_pipeline.environments.webshop.official.reading import Named

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
    from dmr_pipeline.environments.alfworld.official import packing as official

    if source is None:
        address = url or official.ARCHIVE_URL
        wanted = sha256 or official.known_checksum(address)
        if wanted is not None:
            console.print(f"the archive must have sha256 {wanted}; --sha256 takes another", soft_wrap=True)
        archive = official.download_games(address, sha256=wanted)
        console.print(f"archive: sha256 {archive.sha256}", soft_wrap=True)
        if wanted is None:
            console.print(
                "Its checksum is not known to this project, so that nothing but the connection vouches for it. The pack"
                " remembers it: this machine refuses another archive from this address. To pin it elsewhere too, give"
                f" --sha256 {archive.sha256}",
                style="yellow",
                soft_wrap=True,
            )
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
    from dmr_pipeline.environments.alfworld.official.packing import OFFICIAL_GAMES, PACK_FOLDER

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
    _show_size(PACK_FOLDER)


@data.command()
@user_errors_exit_2
def webshop(
    source: Annotated[
        Path | None,
        typer.Option("--from", envvar="WEBSHOP_DATA", help="take the files from this folder"),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="download them from this http(s) folder: URL/items_shuffle.json ...")
    ] = None,
    size: Annotated[
        Literal["small", "full"] | None,
        typer.Option(
            help="1,000 products or all 1.18 million; if not given, all where the folder has them, small with --url"
        ),
    ] = None,
    sha256: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=HEX", help="refuse the file NAME where it has another checksum; may be repeated"),
    ] = None,
) -> None:
    """Get WebShop's products and instructions, from a folder or from a server, and pack them for `dmr run`.

    The files: items_shuffle.json and items_ins_v2.json, or both with _1000, and items_human_ins.json, which a folder may lack.

    Their authors have them on Google Drive, for a browser or gdown; without --from and --url, the command gives the links.

    --url is for a server of one's own. A download that was cut is resumed by the same command.

    Refused: a file that is not whole JSON.

    Products left out: asin not ten capitals and digits, or there before; a field missing or of a wrong type; price not a number.

    A missing price is no error: it is 100 dollars, as in WebShop.

    Instructions left out: malformed, without attributes, or of no product.

    All that is left out is counted, and the first few are named.
    """
    from dmr_pipeline.environments.webshop.official import packing as official
    from dmr_pipeline.environments.webshop.official import reading

    if source is None:
        size = size or "small"
        if url is None:
            links = ", ".join(f"{name}: {reading.LINKS[name]}" for name in reading.FILES[size])
            raise UserError(
                "no WebShop files: open the authors' links in a browser or with gdown, put the files into a folder, and name it "
                f"with --from or $WEBSHOP_DATA ({links})"
            )
        folder = official.download_files(url, size, _checksums(sha256 or []))
        packed = official.pack(folder, size=size, url=url)
        shutil.rmtree(official.DOWNLOAD_FOLDER)
    elif url or sha256:
        raise UserError(
            f"--url and --sha256 are for the download, but the files are in {source}: "
            "leave them out, or --from and $WEBSHOP_DATA"
        )
    else:
        packed = official.pack(source, size=size)
    _show_shop(packed)


def _checksums(options: list[str]) -> dict[str, str]:
    """File name -> sha256."""
    sums = {}
    for option in options:
        name, equals, digits = option.partition("=")
        if not equals:
            raise UserError(f"--sha256 {option}: write NAME=HEX, the file's name and its checksum")
        sums[name] = digits
    return sums


def _show_shop(packed: "WebShopPack") -> None:
    from dmr_pipeline.environments.webshop.official.packing import PACK_FOLDER
    from dmr_pipeline.environments.webshop.official.reading import FILES

    contents, files = packed.contents, FILES[packed.name]
    for name, digest in contents.sources.items():
        console.print(f"{name}: sha256 {digest}", soft_wrap=True)
    table = Table(title=f"WebShop, {packed.name} catalogue", box=box.SIMPLE)
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("the first of them")
    table.add_row("products", f"{contents.products:,}", "")
    _add_rows(table, contents.dropped)
    table.add_row("synthetic instructions", f"{contents.synthetic.used:,}", "")
    _add_rows(table, contents.synthetic.unused)
    lack = "" if files.human in contents.sources else f"no {files.human}"
    table.add_row("human instructions", f"{contents.human.used:,}", lack)
    _add_rows(table, contents.human.unused)
    console.print(table)
    _show_size(PACK_FOLDER)


def _add_rows(table: Table, left_out: Mapping[Any, "Named"]) -> None:
    for reason, named in left_out.items():
        table.add_row(f"  left out: {reason}", f"{named.count:,}", escape(", ".join(named.first)))


def _show_size(folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"packed: {folder} ({size / 1e6:.2f} MB)", soft_wrap=True)
