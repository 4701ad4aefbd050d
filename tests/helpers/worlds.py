"""Small shops made by hand, and goals in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmr_pipeline.environments.webshop.catalogue import Product, Shop, open_shop, price_tag, write_shop, write_terms
from dmr_pipeline.environments.webshop.goals import Goal


def product(number: int, title: str, **changes: Any) -> Product:
    pricing = changes.pop("pricing", (9.99,))
    fields = {
        "category": "fashion",
        "query": "dresses",
        "product_category": "Clothing › Women › Dresses",
        "description": "",
        "bullet_points": (),
        "attributes": ("DUMMY_ATTR",),
        "options": {},
    }
    return Product(
        asin=f"B{number:09d}", title=title, pricing=pricing, price_tag=price_tag(pricing), **(fields | changes)
    )


def goal(bought: Product, **changes: Any) -> Goal:
    fields = {
        "index": 0,
        "asin": bought.asin,
        "category": bought.category,
        "query": bought.query,
        "name": bought.title,
        "product_category": bought.product_category,
        "instruction": "Find me a dress, and price lower than 20.00 dollars",
        "attributes": (),
        "price_upper": 20.0,
        "options": {},
        "weight": 1.0,
    }
    return Goal(**(fields | changes))


def shop(products: Sequence[Product], folder: Path, prices: Sequence[float] | None = None) -> Shop:
    write_shop(products, folder)
    write_terms(prices or [p.pricing[0] for p in products], "alphabetic", folder)
    return open_shop(folder)
