"""`dmr data webshop`: from little files of the authors' kind, and from the real ones where `$WEBSHOP_DATA` is."""

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from dmr_pipeline.cli import app
from dmr_pipeline.environments.webshop.catalogue import HumanInstruction, Product, open_shop, write_terms
from dmr_pipeline.environments.webshop.official import packing as official
from dmr_pipeline.environments.webshop.official.packing import DOWNLOAD_FOLDER, PACK_FOLDER, official_shop, pack
from dmr_pipeline.environments.webshop.official.reading import FILES, LINKS, Contents, parse_pricing, read_products
from dmr_pipeline.errors import UserError
from tests.helpers import needs

SMALL = FILES["small"]
DAMAGE = {
    "cut": lambda content: content[:-1],
    "NUL in a name": lambda content: content[:4] + b"\0" + content[4:],
    "Latin-1": lambda content: content.replace(b'"', b'"\xe9', 1),
    "another kind": lambda content: b'{"item": %b}' % content if content.startswith(b"[") else b"[%b]" % content,
    "twice": lambda content: content * 2,
    "empty": lambda content: b"",
    "a web page": lambda content: b"<!DOCTYPE html><html>",
}


@pytest.fixture(autouse=True)
def outside_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


def raw(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "asin": f"B{number:09d}",
        "name": f"Dress {number}",
        "full_description": "Of silk.",
        "small_description": ["Long", "Red "],
        "pricing": "$9.50",
        "customization_options": "",
        "category": "fashion",
        "query": " Dresses\n",
        "product_category": "Clothing › Dresses",
        "images": [],
        "average_rating": 4.5,
    } | changes


def without(field: str) -> dict[str, Any]:
    product = raw(7)
    del product[field]
    return product


INSTRUCTION = {"attributes": ["silk"], "instruction": "Find me silk dresses", "instruction_attributes": ["silk"]}


def write(folder: Path, products: object, attributes: object = None, human: object = None, files=SMALL) -> Path:
    """A folder of the authors' files."""
    folder.mkdir(exist_ok=True)
    (folder / files.products).write_text(json.dumps(products))
    (folder / files.attributes).write_text(
        json.dumps({raw(1)["asin"]: INSTRUCTION} if attributes is None else attributes)
    )
    if human is not None:
        (folder / files.human).write_text(json.dumps(human))
    return folder


def read(folder: Path) -> tuple[list[Product], Contents]:
    contents = Contents()
    return list(read_products(folder, SMALL, contents)), contents


def dmr(*arguments: str, **environment: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", **environment}).invoke(app, ["data", "webshop", *arguments])


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.output.splitlines()]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data", [raw(1), raw(2)])


def test_a_product_is_loaded_as_webshop_loads_it(tmp_path: Path):
    options = {
        "Size": [{"value": " X/L ", "image": None}, {"value": "S"}],
        "Color": None,
        "size": [{"value": "M", "price": 3}],
        "Fit Type": [],
    }
    product = raw(1, pricing="$10.52 - $1,040.5 $3", customization_options=options, extra=float("nan"))
    written = {"instruction": "i need silk.", "instruction_attributes": ["silk"], "instruction_options": ["s"], "id": 1}
    unused = written | {"instruction_attributes": []}
    folder = write(tmp_path / "a", [product], human={product["asin"]: [written, unused, written]})
    (found,), contents = read(folder)
    assert found == Product(
        asin="B000000001",
        category="fashion",
        query="dresses",
        product_category="Clothing › Dresses",
        title="Dress 1",
        description="Of silk.",
        bullet_points=("Long", "Red "),
        attributes=("silk",),
        options={"size": ("m",), "fit type": ()},
        pricing=(10.52, 1040.5),
        price_tag="$10.52 to $1040.5",
        instruction="Find me silk dresses",
        instruction_attributes=("silk",),
        human_instructions=(HumanInstruction("i need silk.", ("silk",), ("s",)),) * 2,
    )
    assert (contents.products, contents.synthetic.used, contents.human.used) == (1, 1, 2)


def test_what_may_be_missing(tmp_path: Path):
    bare = {name: raw(1)[name] for name in ("asin", "name", "category", "query", "product_category")}
    null = raw(2, full_description=None, small_description=None, pricing=None, customization_options=None)
    text = raw(3, small_description="One", pricing="", customization_options={"Size": [{"value": "A/B"}]})
    products, contents = read(write(tmp_path / "a", [bare, null, text]))
    assert [(p.description, p.bullet_points, p.pricing, p.price_tag) for p in products] == [
        ("", (), (100.0,), "$100.0"),
        ("", (), (100.0,), "$100.0"),
        ("Of silk.", ("One",), (100.0,), "$100.0"),
    ]
    assert products[1].attributes == ("DUMMY_ATTR",)
    assert products[2].options == {"size": ("a | b",)}
    assert not contents.dropped


@pytest.mark.parametrize(
    ("product", "reason", "name"),
    [
        (raw(7, asin="nan"), "bad asin", "nan"),
        (raw(7, asin="B00000000007"), "bad asin", "B00000000007"),
        (raw(7, asin="B0000000 7"), "bad asin", "B0000000 7"),
        (raw(7, asin="b00000000a"), "bad asin", "b00000000a"),
        (raw(7, asin="B٠٠٠٠٠٠٠٠٠"), "bad asin", "B" + "\\u0660" * 9),
        (raw(7, asin="B000000007\n"), "bad asin", "B000000007\\n"),
        (raw(7, asin=""), "bad asin", "product 2"),
        (raw(7, asin=float("nan")), "bad asin", "product 2"),
        (without("asin"), "bad asin", "product 2"),
        *[(without(field), "bad field", f"B000000007 ({field})") for field in ("name", "category", "query")],
        (without("product_category"), "bad field", "B000000007 (product_category)"),
        (raw(7, name=None), "bad field", "B000000007 (name)"),
        (raw(7, name=float("nan")), "bad field", "B000000007 (name)"),
        (raw(7, name="\ud83d"), "bad field", "B000000007 (name)"),
        (raw(7, small_description=["\ud83d"]), "bad field", "B000000007 (small_description)"),
        (raw(7, customization_options={"\ud83d": None}), "bad field", "B000000007 (customization_options)"),
        (raw(7, query=["a"]), "bad field", "B000000007 (query)"),
        (raw(7, full_description=3), "bad field", "B000000007 (full_description)"),
        (raw(7, small_description=["a", None]), "bad field", "B000000007 (small_description)"),
        (raw(7, customization_options={"Size": [{"image": "a"}]}), "bad field", "B000000007 (customization_options)"),
        (raw(7, customization_options={"Size": "L"}), "bad field", "B000000007 (customization_options)"),
        (raw(7, customization_options="Size"), "bad field", "B000000007 (customization_options)"),
        (raw(1, name="again"), "repeated", "B000000001"),
        (raw(7, pricing="free"), "bad price", "B000000007 (free)"),
        (raw(7, pricing="$"), "bad price", "B000000007 ($)"),
        (raw(7, pricing="$1.2.3"), "bad price", "B000000007 ($1.2.3)"),
        (raw(7, pricing="$5 to $ninety"), "bad price", "B000000007 ($5 to $ninety)"),
        (raw(7, pricing="$" + "9" * 400), "bad price", "B000000007 ($" + "9" * 27),
        (raw(7, pricing=9.5), "bad price", "B000000007"),
        (raw(7, pricing=float("inf")), "bad price", "B000000007"),
        (raw(7, pricing=10**4000), "bad price", "B000000007"),
        ("B000000007", "bad field", "product 2"),
        (None, "bad field", "product 2"),
    ],
)
def test_a_bad_product_is_left_out_counted_and_named(tmp_path: Path, product: object, reason: str, name: str):
    products, contents = read(write(tmp_path / "a", [raw(1), product, raw(2)]))
    assert [p.title for p in products] == ["Dress 1", "Dress 2"]
    assert {key: (named.count, named.first) for key, named in contents.dropped.items()} == {reason: (1, [name])}


def test_a_bad_product_does_not_keep_a_sound_one_of_its_asin_out(tmp_path: Path):
    products, contents = read(write(tmp_path / "a", [raw(1, pricing="$"), raw(1, name="Sound"), raw(1)]))
    assert [p.title for p in products] == ["Sound"]
    assert {key: named.count for key, named in contents.dropped.items()} == {"bad price": 1, "repeated": 1}


def number_of(text: str) -> float | None:
    kept = "".join(character for character in text if character == "." or character.isdecimal())
    try:
        return float(Decimal(kept))
    except InvalidOperation:
        return None


@given(st.text("$$.,0123456789 to٣½-e", max_size=30) | st.text(max_size=10))
def test_pricing_is_read_by_webshops_rule(text: str):
    numbers: list[float | None] = []
    rest = text
    while "$" in rest:
        rest = rest[rest.index("$") + 1 :]
        numbers.append(number_of(rest[: rest.index("$")] if "$" in rest else rest))
    sound = bool(numbers) and all(number is not None and math.isfinite(number) for number in numbers)
    expected = (100.0,) if text == "" else tuple(numbers[:2]) if sound else None
    assert parse_pricing(text) == expected


def test_instructions_that_are_not_used_are_counted(tmp_path: Path):
    one, two, three, gone = (raw(number)["asin"] for number in (1, 2, 3, 9))
    attributes = {
        one: INSTRUCTION,
        two: INSTRUCTION | {"instruction_attributes": []},
        three: {"attributes": "silk"},
        gone: INSTRUCTION,
        "B00000000X": {"attributes": ["no instruction"]},
        "\ud800": 3,
    }
    written = {"instruction": "a", "instruction_attributes": ["b"], "instruction_options": []}
    human = {
        one: [written, {"instruction": "a"}, "a"],
        two: [written | {"instruction_attributes": []}, written | {"instruction": "\ud83d"}],
        three: "a",
        gone: [written, written],
    }
    products, contents = read(write(tmp_path / "a", [raw(1), raw(2), raw(3)], attributes, human))
    assert [p.instruction for p in products] == [INSTRUCTION["instruction"], None, None]
    assert [p.attributes for p in products] == [("silk",), ("silk",), ("DUMMY_ATTR",)]
    assert [len(p.human_instructions) for p in products] == [1, 0, 0]
    assert contents.synthetic.model_dump() == {
        "used": 1,
        "unused": {
            "no attributes": {"count": 1, "first": [two]},
            "malformed": {"count": 2, "first": [three, "\\ud800"]},
            "no product": {"count": 1, "first": [gone]},
        },
    }
    assert contents.human.model_dump() == {
        "used": 1,
        "unused": {
            "malformed": {"count": 4, "first": [one, one, two, three]},
            "no attributes": {"count": 1, "first": [two]},
            "no product": {"count": 2, "first": [gone, gone]},
        },
    }


@pytest.mark.parametrize("file", SMALL)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_whole_is_refused_by_name_and_the_old_pack_stays(data: Path, file: str, damage: str):
    write(data, [raw(1)], human={"B000000001": []})
    pack(data)
    before = contents_of(PACK_FOLDER)
    path = data / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    result = dmr("--from", str(data))
    assert result.exit_code == 2, result.output
    assert re.search(
        rf"error: {path}: not a whole JSON (list|object) \(.*\d\): delete it and get it anew", result.output
    )
    assert contents_of(PACK_FOLDER) == before
    assert left_in(PACK_FOLDER.parent) == {"webshop"}


def test_a_catalogue_without_products_or_instructions_is_refused(tmp_path: Path):
    for name, products in (("none", []), ("bad", [raw(1, pricing="$")])):
        with pytest.raises(UserError, match=r"items_shuffle_1000\.json: none of its products can be used"):
            pack(write(tmp_path / name, products))
    with pytest.raises(UserError, match=r"no product of items_shuffle_1000\.json has an instruction"):
        pack(write(tmp_path / "other", [raw(2)]))
    assert not PACK_FOLDER.exists()
    written = {"instruction": "a", "instruction_attributes": ["b"], "instruction_options": []}
    assert pack(write(tmp_path / "human", [raw(2)], human={raw(2)["asin"]: [written]})).contents.human.used == 1


def test_a_pack_is_a_shop_and_says_what_it_was_made_from(data: Path, tmp_path: Path):
    packed = pack(data)
    folder, found = official_shop()
    assert (folder, found) == (PACK_FOLDER, packed)
    assert (packed.name, packed.products, packed.url) == ("small", 2, None)
    assert packed.contents.sources == {
        name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in (SMALL.attributes, SMALL.products)
    }
    pack(data, tmp_path / "again")
    assert contents_of(PACK_FOLDER) == contents_of(tmp_path / "again")
    write_terms([1.0, 2.0], "alphabetic", PACK_FOLDER)
    shop = open_shop(PACK_FOLDER)
    assert [shop.product(row) for row in range(2)] == read(data)[0]
    assert shop.search("dress 2") == (1, 0)


def test_the_full_catalogue_is_taken_where_it_is_there(data: Path):
    write(data, [raw(1), raw(2), raw(3)], files=FILES["full"])
    assert any(line.startswith("items_ins_v2.json: sha256 ") for line in lines(dmr("--from", str(data))))
    assert (official_shop()[1].name, official_shop()[1].products) == ("full", 3)
    assert dmr("--from", str(data), "--size", "small").exit_code == 0
    assert (official_shop()[1].name, official_shop()[1].products) == ("small", 2)
    (data / FILES["full"].attributes).unlink()
    with pytest.raises(
        UserError, match=r"data has no items_ins_v2\.json: .*at https://drive\.google\.com/uc\?id=1s2j6"
    ):
        pack(data)


def test_what_is_missing_damaged_or_of_another_version_says_so(data: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="webshop is missing: run `dmr data webshop`"):
        official_shop()
    pack(data)
    PACK_FOLDER.rename(PACK_FOLDER.with_name(".webshop.old"))  # a kill between the two renames
    assert official_shop()[1].products == 2
    products = PACK_FOLDER / "products.parquet"
    content = products.read_bytes()
    for damaged in (content[:-1], b""):
        products.write_bytes(damaged)
        with pytest.raises(UserError, match=r"products\.parquet is damaged: run `dmr data webshop`"):
            official_shop()
    products.unlink()
    with pytest.raises(UserError, match=r"products\.parquet is damaged"):
        official_shop()
    products.write_bytes(content)
    monkeypatch.setattr(official, "CODE_VERSION", "next")
    with pytest.raises(UserError, match=r"has code version \d+, not next"):
        official_shop()
    (PACK_FOLDER / "pack.json").write_text("{}")
    with pytest.raises(UserError, match=r"pack\.json is damaged"):
        official_shop()


def test_a_full_disk(data: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(official, "write_shop", full)
    result = dmr("--from", str(data))
    assert result.exit_code == 2
    assert "no space left on the disk" in result.output
    assert not PACK_FOLDER.exists()


def test_the_table_of_what_was_packed_and_left_out(tmp_path: Path):
    bad = [raw(number, pricing="[red]") for number in range(10, 17)]
    folder = write(tmp_path / "a", [raw(1), raw(1), *bad], {raw(1)["asin"]: INSTRUCTION, "gone": INSTRUCTION})
    shown = lines(dmr(WEBSHOP_DATA=str(folder)))
    assert "products 1" in shown
    assert "left out: repeated 1 B000000001" in shown
    assert f"left out: bad price 7 {', '.join(f'B0000000{number} ([red])' for number in range(10, 15))}" in shown
    assert "synthetic instructions 1" in shown
    assert "left out: no product 1 gone" in shown
    assert "human instructions 0 no items_human_ins.json" in shown
    assert any(line.startswith(f"packed: {PACK_FOLDER} (0.") for line in shown)


class Site:
    """What a server has, where it cuts, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_after: dict[str, int] = {}
        """Bytes of the next answer for a file after which the connection is closed."""
        self.asked: list[tuple[str, str]] = []
        """Name and Range of each request."""
        self.url = ""


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, asked = self.path.rsplit("/", 1)[-1], self.headers.get("Range", "")
            state.asked.append((name, asked))
            if not self.path.startswith("/webshop/") or name not in state.files:
                self.send_error(404)
                return
            content = state.files[name]
            start = int(asked.removeprefix("bytes=").removesuffix("-") or 0)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", '"1"')
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start:][: state.cut_after.pop(name, None)])

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/webshop"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def serve(site: Site, folder: Path) -> dict[str, str]:
    """Returns the checksums of the files."""
    site.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in site.files.items()}


def test_a_download_that_was_cut_is_resumed_and_gives_the_same_pack_as_a_folder(tmp_path: Path, site: Site):
    folder = write(tmp_path / "data", [raw(number) for number in range(1, 2000)], human={})
    sums = serve(site, folder)
    site.cut_after[SMALL.products] = 262_144
    options = [option for name, sha256 in sums.items() for option in ("--sha256", f"{name}={sha256}")]
    first = dmr("--url", site.url, *options)
    assert first.exit_code == 2
    assert "the connection was cut after 262,144 of" in first.output
    assert not PACK_FOLDER.exists()
    shown = lines(dmr("--url", f"{site.url}/", *options))
    assert site.asked == [
        (SMALL.products, ""),
        (SMALL.products, "bytes=262144-"),
        (SMALL.attributes, ""),
        (SMALL.human, ""),
    ]
    for name, sha256 in sums.items():
        assert f"{name}: sha256 {sha256}" in shown
    assert not DOWNLOAD_FOLDER.exists()
    packed = official_shop()[1]
    assert packed.url == f"{site.url}/"
    assert packed.model_copy(update={"url": None}) == pack(folder, tmp_path / "from_folder")


def test_a_wrong_checksum_or_a_missing_file_is_refused(data: Path, site: Site):
    serve(site, data)
    result = dmr("--url", site.url, "--sha256", f"{SMALL.attributes}={'0' * 64}")
    assert result.exit_code == 2
    assert f"{SMALL.attributes}: its sha256 is" in result.output
    result = dmr("--url", site.url, "--size", "full")
    assert result.exit_code == 2
    assert f"{site.url}/items_shuffle.json: the server answers 404" in result.output
    assert not PACK_FOLDER.exists()


def test_options_that_do_not_fit_are_refused(data: Path):
    for option in ("--url", "--sha256"):
        result = dmr(option, "a", WEBSHOP_DATA=str(data))
        assert result.exit_code == 2
        assert "are for the download, but the files are in" in result.output
    result = dmr("--url", "http://127.0.0.1:9", "--sha256", "0" * 64)
    assert result.exit_code == 2
    assert "write NAME=HEX" in result.output
    result = dmr("--url", "http://127.0.0.1:9", "--sha256", f"items_shuffle.json={'0' * 64}")
    assert result.exit_code == 2
    assert "items_shuffle.json is not a file of the small catalogue" in result.output


@pytest.mark.parametrize("size", FILES)
def test_without_a_source_the_authors_links_are_shown(size: str):
    result = dmr("--size", size)
    assert result.exit_code == 2
    for name in FILES[size]:
        assert f"{name}: {LINKS[name]}" in result.output
    assert not PACK_FOLDER.parent.exists()


def test_a_folder_without_the_files(tmp_path: Path):
    result = dmr("--from", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert "nowhere has no items_shuffle_1000.json: name another folder with --from" in result.output
    assert not PACK_FOLDER.parent.exists()


@needs.webshop_files
def test_the_1000_real_products_are_as_webshop_derived_them(tmp_path: Path):
    derived = json.loads((needs.WEBSHOP_DATA / SMALL.products).read_bytes())
    instructions = json.loads((needs.WEBSHOP_DATA / SMALL.attributes).read_bytes())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / SMALL.attributes).write_bytes((needs.WEBSHOP_DATA / SMALL.attributes).read_bytes())
    raw_fields = [*raw(1)]
    (folder / SMALL.products).write_text(json.dumps([{name: item[name] for name in raw_fields} for item in derived]))
    (folder / SMALL.human).write_text(
        json.dumps({d["asin"]: d["instructions"] for d in derived if "instructions" in d})
    )
    packed = pack(folder)
    assert (packed.products, packed.contents.dropped) == (1000, {})
    assert (packed.contents.synthetic.used, packed.contents.human.used) == (415, 13)
    for found, item in zip(pq.read_table(PACK_FOLDER / "products.parquet").to_pylist(), derived, strict=True):
        assert found["asin"] == item["asin"]
        assert found["title"] == item["Title"]
        assert found["description"] == item["Description"]
        assert found["bullet_points"] == item["BulletPoints"]
        assert found["attributes"] == item["Attributes"]
        assert {option["name"]: option["values"] for option in found["options"]} == item["options"]
        assert found["price_tag"] == item["Price"]
        assert [f"${price}" for price in found["pricing"]] == item["Price"].split(" to ")
        for name in ("category", "query", "product_category"):
            assert found[name] == item[name]
        assert found["instruction"] == instructions[item["asin"]].get("instruction")
        assert found["instruction_attributes"] == instructions[item["asin"]].get("instruction_attributes", [])
        human = [(h["instruction"], h["attributes"], h["options"]) for h in found["human_instructions"]]
        expected = ("instruction", "instruction_attributes", "instruction_options")
        assert human == [tuple(h[name] for name in expected) for h in item.get("instructions", [])]
