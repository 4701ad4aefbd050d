"""The authors' files, read by WebShop's own rules.

The rules are those of WebShop's `load_products` (princeton-nlp/WebShop, web_agent_site/engine/engine.py).
"""

import codecs
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from sys import intern
from typing import Annotated, Any, Literal, NamedTuple

import rich.progress
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from dmr_pipeline.environments.webshop.catalogue import HumanInstruction, Product, price_tag
from dmr_pipeline.environments.webshop.official.json_members import read_members
from dmr_pipeline.errors import UserError

Size = Literal["small", "full"]
"""1,000 products, or 1.18 million."""


class Files(NamedTuple):
    """Names of the files of a catalogue."""

    products: str
    """A list of products."""
    attributes: str
    """asin -> attributes of the product, and where it has one, the instruction of its synthetic goals."""
    human: str
    """asin -> instructions that people wrote. A folder may lack it."""


FILES: dict[Size, Files] = {
    "small": Files("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json"),
    "full": Files("items_shuffle.json", "items_ins_v2.json", "items_human_ins.json"),
}


LINKS = {
    "items_shuffle_1000.json": "https://drive.google.com/uc?id=1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib",
    "items_ins_v2_1000.json": "https://drive.google.com/uc?id=1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu",
    "items_shuffle.json": "https://drive.google.com/uc?id=1A2whVgOO0euk5O13n2iYDM0bQRkkRduB",
    "items_ins_v2.json": "https://drive.google.com/uc?id=1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi",
    "items_human_ins.json": "https://drive.google.com/uc?id=14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O",
}
"""Of the authors, from their setup.sh; for a browser or gdown, since Google Drive does not answer with the files themselves."""


NO_PRICE = 100.0
"""Dollars. What WebShop asks for a product whose price is missing."""


NO_ATTRIBUTES = ("DUMMY_ATTR",)
"""What WebShop gives a product whose attributes are missing."""


_BLOCK_BYTES = 1 << 20


_NAMED = 5


_NO_NUMBER = re.compile(r"[^\d.]")


Drop = Literal["bad asin", "repeated", "bad field", "bad price"]
"""Why a product is left out: its asin is not ten capital letters and digits; a sound product had it before; another field is
missing or of a wrong type; its price is not a number."""


Unused = Literal["malformed", "no product", "no attributes"]
"""Why an instruction is not used. What is malformed may have held one."""


class Named(BaseModel):
    """How many there are, and the first of them."""

    model_config = ConfigDict(extra="forbid")

    count: int = 0
    first: list[str] = Field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(name[:40].encode("unicode_escape").decode())


class Instructions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    used: int = 0
    unused: dict[Unused, Named] = Field(default_factory=dict)
    """Named by asin."""

    def leave(self, reason: Unused, asin: str) -> None:
        self.unused.setdefault(reason, Named()).add(asin)


class Contents(BaseModel):
    """What was read; it is filled meanwhile."""

    model_config = ConfigDict(extra="forbid")

    sources: dict[str, str] = Field(default_factory=dict)
    """File -> its sha256."""
    products: int = 0
    dropped: dict[Drop, Named] = Field(default_factory=dict)
    """Named by asin where there is one, else by place in the file, from 1."""
    synthetic: Instructions = Field(default_factory=Instructions)
    human: Instructions = Field(default_factory=Instructions)

    def drop(self, reason: Drop, name: str) -> None:
        self.dropped.setdefault(reason, Named()).add(name)


def _whole(text: str) -> str:
    text.encode()
    return text


_Text = Annotated[str, AfterValidator(_whole)]
"""Without halves of surrogate pairs, which JSON can have and Parquet cannot."""


class _Raw(BaseModel):
    """Of the authors' files, the fields that are used."""

    model_config = ConfigDict(strict=True)


class _RawOption(_Raw):
    value: _Text


class _RawProduct(_Raw):
    asin: Annotated[str, StringConstraints(pattern=r"^[A-Z0-9]{10}$")]
    name: _Text
    category: _Text
    query: _Text
    product_category: _Text
    full_description: _Text | None = None
    small_description: list[_Text] | _Text | None = None
    pricing: _Text | None = None
    customization_options: dict[_Text, list[_RawOption] | None] | Literal[""] | None = None


class _RawExtra(_Raw):
    attributes: list[_Text] | None = None
    instruction: _Text | None = None
    instruction_attributes: list[_Text] | None = None


class _RawHuman(_Raw):
    instruction: _Text
    instruction_attributes: list[_Text]
    instruction_options: list[_Text]


class _Extra(NamedTuple):
    """What is known of a product besides the product itself."""

    attributes: tuple[str, ...] = NO_ATTRIBUTES
    instruction: str | None = None
    instruction_attributes: tuple[str, ...] = ()


def read_products(folder: Path, files: Files, contents: Contents) -> Iterator[Product]:
    """The products of a catalogue as WebShop loads them, one at a time, so that the file may be larger than memory.

    What is wrong with one product or instruction costs this one, which is counted and, the first ones, named: see `Drop` and
    `Unused`. No error are a missing price (NO_PRICE), missing attributes (NO_ATTRIBUTES), description or bullet points. WebShop
    itself drops long and repeated asins, keeps short ones, and stops at the rest.

    Args:
        contents: is filled meanwhile.

    Raises:
        UserError: a file is not JSON or not of the expected kind, no product is left, or none has an instruction.
    """
    extras = _read_extras(folder / files.attributes, contents)
    human = _read_human(folder / files.human, contents) if (folder / files.human).is_file() else {}
    seen: set[str] = set()
    for number, content in enumerate(_read(folder / files.products, "[", contents), start=1):
        try:
            raw = _RawProduct.model_validate(content)
        except ValidationError as error:
            contents.drop(*_why(error, content, number))
            continue
        if raw.asin in seen:
            contents.drop("repeated", raw.asin)
            continue
        pricing = parse_pricing(raw.pricing)
        if pricing is None:
            contents.drop("bad price", f"{raw.asin} ({raw.pricing})")
            continue
        seen.add(raw.asin)
        extra, written = extras.pop(raw.asin, _Extra()), human.pop(raw.asin, [])
        contents.products += 1
        contents.synthetic.used += extra.instruction is not None
        contents.human.used += len(written)
        yield _product(raw, pricing, extra, written)
    for asin, extra in extras.items():
        if extra.instruction is not None:
            contents.synthetic.leave("no product", asin)
    for asin, written in human.items():
        for _ in written:
            contents.human.leave("no product", asin)
    if not contents.products:
        raise UserError(f"{folder / files.products}: none of its products can be used: take the authors' file")
    if not contents.synthetic.used + contents.human.used:
        raise UserError(
            f"{folder}: no product of {files.products} has an instruction in {files.attributes} or {files.human}: "
            "take files that belong together"
        )


def parse_pricing(text: str | None) -> tuple[float, ...] | None:
    """Dollars: the first two numbers that follow a '$', of whose text only digits and dots count; NO_PRICE where there is no
    text, and None where there is no number, or what follows a '$' is none or infinite."""
    if not text:
        return (NO_PRICE,)
    try:
        prices = [float(_NO_NUMBER.sub("", part)) for part in text.split("$")[1:]]
    except ValueError:
        return None
    return tuple(prices[:2]) if prices and all(map(math.isfinite, prices)) else None


def _product(raw: _RawProduct, pricing: tuple[float, ...], extra: _Extra, human: list[HumanInstruction]) -> Product:
    points = raw.small_description if raw.small_description is not None else []
    return Product(
        asin=raw.asin,
        category=raw.category,
        query=raw.query.lower().strip(),
        product_category=raw.product_category,
        title=raw.name,
        description=raw.full_description or "",
        bullet_points=(points,) if isinstance(points, str) else tuple(points),
        attributes=extra.attributes,
        options={
            name.lower(): tuple(option.value.strip().replace("/", " | ").lower() for option in options)
            for name, options in (raw.customization_options or {}).items()
            if options is not None
        },
        pricing=pricing,
        price_tag=price_tag(pricing),
        instruction=extra.instruction,
        instruction_attributes=extra.instruction_attributes,
        human_instructions=tuple(human),
    )


def _why(error: ValidationError, content: object, number: int) -> tuple[Drop, str]:
    """The reason, and how the product is named."""
    asin = content.get("asin") if isinstance(content, dict) else None
    name = asin if isinstance(asin, str) and asin else f"product {number:,}"
    fields = [
        str(problem["loc"][0]) for problem in error.errors(include_url=False, include_input=False) if problem["loc"]
    ]
    if "asin" in fields:
        return "bad asin", name
    if fields == ["pricing"]:
        return "bad price", name
    return "bad field", f"{name} ({fields[0]})" if fields else name


def _read_extras(path: Path, contents: Contents) -> dict[str, _Extra]:
    extras: dict[str, _Extra] = {}
    for asin, content in _read(path, "{", contents):
        try:
            raw = _RawExtra.model_validate(content)
        except ValidationError:
            contents.synthetic.leave("malformed", asin)
            continue
        # The same few thousand attributes come again and again.
        attributes = NO_ATTRIBUTES if raw.attributes is None else tuple(map(intern, raw.attributes))
        if raw.instruction is None:
            extras[asin] = _Extra(attributes)
        elif raw.instruction_attributes:
            extras[asin] = _Extra(attributes, raw.instruction, tuple(map(intern, raw.instruction_attributes)))
        else:
            contents.synthetic.leave("no attributes", asin)
            extras[asin] = _Extra(attributes)
    return extras


def _read_human(path: Path, contents: Contents) -> dict[str, list[HumanInstruction]]:
    human: dict[str, list[HumanInstruction]] = {}
    for asin, written in _read(path, "{", contents):
        for content in written if isinstance(written, list) else [written]:
            try:
                raw = _RawHuman.model_validate(content)
            except ValidationError:
                contents.human.leave("malformed", asin)
                continue
            if not raw.instruction_attributes:
                contents.human.leave("no attributes", asin)
                continue
            human.setdefault(asin, []).append(
                HumanInstruction(raw.instruction, tuple(raw.instruction_attributes), tuple(raw.instruction_options))
            )
    return human


def _read(path: Path, opening: Literal["[", "{"], contents: Contents) -> Iterator[Any]:
    """The members of a file, whose checksum is recorded."""
    try:
        yield from read_members(_blocks(path, contents), opening)
    except ValueError as error:
        kind = "list" if opening == "[" else "object"
        raise UserError(f"{path}: not a whole JSON {kind} ({error}): delete it and get it anew") from error


def _blocks(path: Path, contents: Contents) -> Iterator[str]:
    digest, decoder, done = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    with rich.progress.open(path, "rb", description=path.name) as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                yield decoder.decode(block)
                done += len(block)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 near byte {done + error.start:,}") from error
    contents.sources[path.name] = digest.hexdigest()
