"""The authors' catalogue, downloaded or taken from the folder that `$WEBSHOP_DATA` names, packed as a shop without prices."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from dmr_pipeline.artifacts.folders import locked, published, recover
from dmr_pipeline.artifacts.full_disk import disk_full_is_user_error
from dmr_pipeline.artifacts.manifest import hash_files
from dmr_pipeline.download import download
from dmr_pipeline.environments.webshop.catalogue import write_shop
from dmr_pipeline.environments.webshop.official.reading import FILES, LINKS, Contents, Size, read_products
from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

PACK_FOLDER = Path("data/official/webshop")
DOWNLOAD_FOLDER = PACK_FOLDER.with_name("webshop.download")
CODE_VERSION = "1"
"""To be raised where `read_products`, `Product` or the search index changes: a pack of another version holds another shop."""


class Pack(FrozenModel):
    """What `pack.json` says."""

    code_version: str
    name: Size
    url: str | None
    """Of the folder that the files were downloaded from; None where they came from a folder on disk."""
    contents: Contents
    files: dict[str, str]
    """Path in the pack (posix) -> md5."""

    @property
    def products(self) -> int:
        return self.contents.products


def official_shop(folder: Path = PACK_FOLDER) -> tuple[Path, Pack]:
    """The folder of the packed catalogue, which lacks only what `write_terms` writes, and what is in it.

    Raises:
        UserError: it is missing, damaged, or was made by another code version.
    """
    recover(folder)
    try:
        packed = Pack.model_validate_json((folder / "pack.json").read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{folder} is missing: run `dmr data webshop`") from error
    except ValidationError as error:
        raise UserError(f"{folder / 'pack.json'} is damaged: run `dmr data webshop`") from error
    if packed.code_version != CODE_VERSION:
        raise UserError(f"{folder} has code version {packed.code_version}, not {CODE_VERSION}: run `dmr data webshop`")
    files = hash_files(folder)
    for path in sorted(packed.files.keys() | files.keys() - {"pack.json"}):
        if packed.files.get(path) != files.get(path):
            raise UserError(f"{folder / path} is damaged: run `dmr data webshop`")
    return folder, packed


def download_files(
    url: str, size: Size = "small", sha256: Mapping[str, str] | None = None, folder: Path = DOWNLOAD_FOLDER
) -> Path:
    """Download the files of a catalogue, `<url>/<name>` each.

    Args:
        sha256: of files, by name.

    Returns:
        The folder they are in.

    Raises:
        UserError: a checksum is of no file of the catalogue, or a download failed (the message says how).
    """
    sums = dict(sha256 or {})
    if unknown := sums.keys() - set(FILES[size]):
        raise UserError(f"{min(unknown)} is not a file of the {size} catalogue: it has {', '.join(FILES[size])}")
    # A folder for each URL: what is left of another URL's download is not taken for this one's.
    url = url.rstrip("/")
    target = folder / hashlib.sha256(url.encode()).hexdigest()[:8]
    for name in FILES[size]:
        download(f"{url}/{name}", target / name, sums.get(name))
    return target


def pack(folder: Path, output: Path = PACK_FOLDER, size: Size | None = None, url: str | None = None) -> Pack:
    """Pack the authors' files that `folder` holds: `products.parquet`, `index/` and `pack.json`. Takes about 1 ms a product.

    The old pack at `output` stays until the new one is complete. Equal files give equal packs everywhere.

    Args:
        size: which catalogue; None for the full one where its products are there, else the small one.
        url: that they were downloaded from.

    Raises:
        UserError: as `read_products`; or a file is missing, or the disk is full.
    """
    name = size or ("full" if (folder / FILES["full"].products).is_file() else "small")
    files = FILES[name]
    for file in (files.products, files.attributes):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} has no {file}: name another folder with --from or $WEBSHOP_DATA; "
                f"the authors have the file at {LINKS[file]}"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_is_user_error(output, output.parent), locked(output), published(output) as new:
        contents = Contents()
        write_shop(read_products(folder, files, contents), new)
        packed = Pack(code_version=CODE_VERSION, name=name, url=url, contents=contents, files=hash_files(new))
        (new / "pack.json").write_text(packed.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return packed
