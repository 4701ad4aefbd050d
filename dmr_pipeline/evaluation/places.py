"""Places in README.md and docs/ that a command fills from what lies in Git beside the pages.

<!-- dmr report alfworld-tiny: table -->
...
<!-- end -->
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from dmr_pipeline.atomic import replaced
from dmr_pipeline.errors import UserError

RESULTS = Path("docs/results")
"""Where the pages of results lie, and what they are made from."""

Parts = Mapping[str, Callable[[Path], str]]
"""What a marker may ask for -> its text, for a page."""


def write(command: str, name: str, parts: Parts, root: Path = Path()) -> dict[Path, bool]:
    """Make anew what stands in the places of `dmr COMMAND NAME`.

    Returns:
        Page -> whether it is another one than before.

    Raises:
        UserError: no page has such a place, or one is of an unknown part, or has no end.
    """
    changed = {}
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        before = page.read_text(encoding="utf-8") if page.is_file() else ""
        if _start(command, name) in before:
            after = filled(before, page, command, name, parts)
            changed[page] = after != before
            if changed[page]:
                with replaced(page) as part:
                    part.write_text(after, encoding="utf-8")
    if not changed:
        raise UserError(
            f"neither README.md nor a page of docs/ has a place for {name}: write `{_start(command, name)}table -->`, and"
            " `<!-- end -->` on a line below it, where its table shall stand"
        )
    return changed


def filled(text: str, page: Path, command: str, name: str, parts: Parts) -> str:
    """The text of a page with all places of `dmr COMMAND NAME` filled.

    Raises:
        UserError: a place is of an unknown part, or has no end.
    """

    def fill(place: re.Match[str]) -> str:
        start, its, part, _, end = place.groups()
        if its != name:
            return place.group()
        if part not in parts:
            raise UserError(f"{page}: {start.strip()}: there is no such part, there are {', '.join(parts)}")
        return f"{start}\n{parts[part](page).strip()}\n\n{end}"

    any_place = re.compile(rf"(<!-- dmr {command} (\S+): ([^>\n]*) -->\n)(.*?)(<!-- end -->)", re.S)
    starts, places = text.count(_start(command, name)), any_place.findall(text)
    if any("<!-- dmr " in inside for _, _, _, inside, _ in places) or starts != sum(
        place[1] == name for place in places
    ):
        raise UserError(f"{page}: a place of {name} has no `<!-- end -->` on a line of its own")
    return any_place.sub(fill, text)


def _start(command: str, name: str) -> str:
    return f"<!-- dmr {command} {name}: "
