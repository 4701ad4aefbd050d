"""What is sold, and the folder that holds it: products, the search index over them, and each one's price.

A product's price is drawn once for a shop where the catalogue gives a range (WebShop draws it when it loads).
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmr_pipeline.environments.webshop.nouns import NounTagger, nouns
from dmr_pipeline.environments.webshop.search import SearchIndex, build_index
from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

RESULTS = 50
"""Products that a search finds at most."""
_CHUNK = 20_000
"""Products written at once."""


@dataclass(frozen=True, slots=True)
class HumanInstruction:
    """What a person wrote for a product (WebShop's `items_human_ins.json`)."""

    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    """Values, without their names."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product as WebShop has it once it is loaded."""

    asin: str
    """Ten characters, upper case."""
    category: str
    """beauty, electronics, garden, fashion or grocery."""
    query: str
    """The kind of product, lower case: what was searched for when the product was found."""
    product_category: str
    """A path such as 'Home & Kitchen › Furniture'."""
    title: str
    description: str
    bullet_points: tuple[str, ...]
    attributes: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    """Name, lower case -> values, lower case."""
    pricing: tuple[float, ...]
    """Dollars: one price, or the ends of a range."""
    price_tag: str
    """As pages show it: '$9.99' or '$9.99 to $12.0'."""
    instruction: str | None = None
    """Of the synthetic goals, without options and price; None where the product is in none."""
    instruction_attributes: tuple[str, ...] = ()
    human_instructions: tuple[HumanInstruction, ...] = field(default=())


_STRINGS = pa.list_(pa.large_string())
SCHEMA = pa.schema(
    [
        ("asin", pa.large_string()),
        ("category", pa.large_string()),
        ("query", pa.large_string()),
        ("product_category", pa.large_string()),
        ("title", pa.large_string()),
        ("description", pa.large_string()),
        ("bullet_points", _STRINGS),
        ("attributes", _STRINGS),
        ("options", pa.list_(pa.struct([("name", pa.large_string()), ("values", _STRINGS)]))),
        ("pricing", pa.list_(pa.float64())),
        ("price_tag", pa.large_string()),
        ("instruction", pa.large_string()),
        ("instruction_attributes", _STRINGS),
        (
            "human_instructions",
            pa.list_(pa.struct([("instruction", pa.large_string()), ("attributes", _STRINGS), ("options", _STRINGS)])),
        ),
    ]
)
"""One row a product."""


def price_tag(pricing: Sequence[float]) -> str:
    """As WebShop writes one price, or a range."""
    return " to ".join(f"${price}" for price in pricing)


def write_shop(products: Iterable[Product], folder: Path) -> int:
    """Write `products.parquet` and `index/` into a folder, which is made; prices come with `write_terms`.

    Products are taken one by one, so that the whole catalogue need not fit into memory as objects.

    Returns:
        How many there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def documents() -> Iterable[str]:
        nonlocal count
        with pq.ParquetWriter(folder / "products.parquet", SCHEMA, compression="zstd") as writer:
            chunk: list[dict[str, Any]] = []
            for product in products:
                count += 1
                chunk.append(_to_row(product))
                if len(chunk) == _CHUNK:
                    writer.write_table(pa.Table.from_pylist(chunk, SCHEMA))
                    chunk = []
                yield search_document(product)
            if chunk:
                writer.write_table(pa.Table.from_pylist(chunk, SCHEMA))

    build_index(documents(), folder / "index")
    return count


def search_document(product: Product) -> str:
    """The text that is searched: title, description, first bullet point, and the options."""
    first = product.bullet_points[0] if product.bullet_points else ""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options.items())
    return f"{product.title} {product.description} {first} {options}".lower()


def read_pricing(folder: Path) -> list[list[float]]:
    """What each product of a shop's folder may cost, in order."""
    pricing: list[list[float]] = pq.read_table(folder / "products.parquet", columns=["pricing"])["pricing"].to_pylist()
    return pricing


def draw_prices(pricing: Iterable[Sequence[float]], rng: random.Random) -> list[float]:
    """The price of each product: drawn where it is a range, in order, as WebShop draws it from Python's generator."""
    return [rng.uniform(*ends) if len(ends) > 1 else ends[0] for ends in pricing]


class Terms(FrozenModel):
    """What a shop needs besides its products, in `terms.json`."""

    nouns: NounTagger
    """Who finds the nouns of titles."""


def write_terms(prices: Sequence[float], tagger: NounTagger, folder: Path) -> None:
    """Complete the folder of a shop: `prices.parquet` and `terms.json`."""
    pq.write_table(pa.table({"price": pa.array(prices, pa.float64())}), folder / "prices.parquet")
    (folder / "terms.json").write_text(Terms(nouns=tagger).model_dump_json() + "\n", encoding="utf-8")


class Shop:
    """A folder that `write_shop` and `write_terms` wrote, opened. Pickled as its folder's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._table = pq.read_table(folder / "products.parquet").combine_chunks()
            self.prices: list[float] = pq.read_table(folder / "prices.parquet")["price"].to_pylist()
            self._index = SearchIndex.load(folder / "index")
            self.nouns = nouns(Terms.model_validate_json((folder / "terms.json").read_bytes()).nouns)
        except FileNotFoundError as error:
            raise UserError(f"{folder} is not a shop, a file is missing ({error}): make it anew") from error
        if not len(self._table) == len(self.prices) == len(self._index):
            raise UserError(f"{folder}: products, prices and index are of different lengths; make it anew")
        self._row_of = {asin.lower(): row for row, asin in enumerate(self._table["asin"].to_pylist())}
        self.product = lru_cache(maxsize=20_000)(self._product)
        """product(row): one product."""
        self.search = lru_cache(maxsize=20_000)(self._search)
        """search(words): rows of the best matches, RESULTS at most, best first."""
        self.rows_where = lru_cache(maxsize=1_000)(self._rows_where)
        """rows_where(column, value): all rows whose column is the value, in order."""

    def __len__(self) -> int:
        return len(self.prices)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return open_shop, (self.folder,)

    def row(self, asin: str) -> int | None:
        """Of an asin in any case, or None."""
        return self._row_of.get(asin.lower())

    def at_random(self, key: str) -> tuple[int, ...]:
        """Rows drawn by a key, RESULTS at most."""
        return tuple(random.Random(key).sample(range(len(self)), min(RESULTS, len(self))))

    def _rows_where(self, column: str, value: str) -> tuple[int, ...]:
        return tuple(pc.indices_nonzero(pc.equal(self._table[column], value)).to_pylist())

    def with_attribute(self, attribute: str) -> tuple[int, ...]:
        """All rows of products that have the attribute, in order."""
        return self._rows_of_attribute.get(attribute, ())

    @cached_property
    def _rows_of_attribute(self) -> dict[str, tuple[int, ...]]:
        rows: dict[str, dict[int, None]] = {}
        for row, attributes in enumerate(self._table["attributes"].to_pylist()):
            for attribute in attributes:
                rows.setdefault(attribute, {})[row] = None
        return {attribute: tuple(found) for attribute, found in rows.items()}

    def _product(self, row: int) -> Product:
        return _from_row(self._table.slice(row, 1).to_pylist()[0])

    def _search(self, words: str) -> tuple[int, ...]:
        return self._index.search(words, RESULTS)


def open_shop(folder: Path) -> Shop:
    """The shop in a folder; opened once a process, however often it is asked for."""
    path = folder.resolve()
    prices = path / "prices.parquet"
    return _open_shop(path, prices.stat().st_mtime_ns if prices.is_file() else 0)


@lru_cache(maxsize=4)
def _open_shop(folder: Path, changed_ns: int) -> Shop:
    return Shop(folder)


def _to_row(product: Product) -> dict[str, Any]:
    row = {name: getattr(product, name) for name in SCHEMA.names}
    row["options"] = [{"name": name, "values": values} for name, values in product.options.items()]
    row["human_instructions"] = [asdict(human) for human in product.human_instructions]
    return row


def _from_row(row: dict[str, Any]) -> Product:
    human = tuple(
        HumanInstruction(h["instruction"], tuple(h["attributes"]), tuple(h["options"]))
        for h in row["human_instructions"]
    )
    options = {option["name"]: tuple(option["values"]) for option in row["options"]}
    lists = {name: tuple(row[name]) for name in ("bullet_points", "attributes", "pricing", "instruction_attributes")}
    return Product(**{**row, **lists, "options": options, "human_instructions": human})
