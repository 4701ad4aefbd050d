"""The exact tokenizer gives every command back, and a value is the same tokens wherever it stands."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dmr_pipeline.training.vocabulary import exact_word_tokenizer
from tests.helpers import needs

VALUES = (
    "7.7 ounce (pack of 1)",
    "men's",
    "4x-large",
    "mossy oak | country dna",
    "w |  polarizer lens",
    "a1-wine\xa0red",
    '160x100\xa0cm (65"x39.5")',
    "rose gold, white",
    "1.3-fl. oz.",
    "shade 0: porcelain",
    "bdc .350 legend",
    "set [new] [2]",
)
PAGE = "Instruction: [SEP] Mug, red: 2 [SEP] $7.99 to $12.0 [SEP] Rating: N.A."


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def given_back(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return str(tokenizer.decode(encode(tokenizer, text), skip_special_tokens=True))


def test_commands_come_back_to_the_letter_from_a_tokenizer_that_was_saved(tmp_path: Path) -> None:
    exact_word_tokenizer(["search click", *VALUES]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for value in VALUES:
        for command in (f"click[{value}]", f"search[{value}]", f"click[{value.upper()}]"):
            assert given_back(tokenizer, command) == command.lower()


@given(st.lists(st.text("ab1[],:;.!?()|'-$\xa0 ", min_size=1, max_size=12), min_size=1, max_size=4).map(" ".join))
def test_any_text_comes_back_but_for_blanks_at_its_ends(text: str) -> None:
    assert given_back(exact_word_tokenizer([text]), text) == text.strip()


def test_a_value_is_the_same_tokens_in_a_command_a_sentence_and_on_a_page() -> None:
    tokenizer = exact_word_tokenizer(["find a mug with color and price click < prev buy now", *VALUES])
    for value in VALUES:
        tokens = encode(tokenizer, value)
        assert tokenizer.unk_token_id not in tokens
        for text in (
            f"click[{value}]",
            f"find a mug with color: {value}, and price",
            f"< Prev [SEP] {value} [SEP] Buy Now",
        ):
            found = encode(tokenizer, text)
            assert any(found[i : i + len(tokens)] == tokens for i in range(len(found))), (value, text)


def test_a_words_end_is_split_off_a_price_is_not_and_the_separator_is_one_token() -> None:
    tokens = exact_word_tokenizer([PAGE]).tokenize(PAGE)
    assert " ".join(tokens) == "instruction ￭: [sep] mug ￭, red ￭: 2 [sep] $7.99 to $12.0 [sep] rating ￭: n.a ￭."


def test_what_is_in_no_text_is_unknown() -> None:
    tokenizer = exact_word_tokenizer(["click red"])
    assert encode(tokenizer, "click[blue]").count(tokenizer.unk_token_id) == 1


@needs.webshop_files
def test_all_that_can_be_clicked_in_the_real_catalogue_comes_back() -> None:
    data = needs.WEBSHOP_DATA
    products = json.loads((data / "items_shuffle_1000.json").read_text(encoding="utf-8"))
    values = {
        option["value"].strip().replace("/", " | ").lower()
        for product in products
        for options in (product["customization_options"] or {}).values()
        for option in options or ()
    }
    commands = [f"click[{text}]" for text in values | {product["asin"].lower() for product in products}]
    tokenizer = exact_word_tokenizer(["click", *values, *(product["asin"] for product in products)])
    assert len(commands) > 2900
    assert [command for command in commands if given_back(tokenizer, command) != command] == []
