"""JSON read member by member, compared with Python's `json`."""

import itertools
import json
import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.environments.webshop.official import json_members
from dmr_pipeline.environments.webshop.official.json_members import read_members

loads = partial(json.loads, parse_int=float)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
texts = st.builds(
    json.dumps,
    st.lists(values) | st.dictionaries(st.text(), values),
    indent=st.sampled_from([None, 1]),
    ensure_ascii=st.booleans(),
)


def read(text: str, pieces: int) -> object:
    blocks = [text[i : i + pieces] for i in range(0, len(text), pieces)]
    return list(read_members(blocks, "[")) if text.lstrip(" \n").startswith("[") else dict(read_members(blocks, "{"))


@given(texts, st.integers(1, 9), st.sampled_from(["", " ", "\n "]))
def test_members_are_those_of_the_whole(text: str, pieces: int, around: str):
    assert read(around + text + around, pieces) == loads(text)


@given(texts, st.integers(1, 9), st.data())
def test_what_is_cut_or_altered_is_refused_where_the_whole_is(text: str, pieces: int, data: st.DataObject):
    place = data.draw(st.integers(1, len(text)))
    put = data.draw(st.sampled_from(["", ",", "]", "}", '"', "1", "x", ":"]))
    altered = (
        text[:place] + put + text[place + data.draw(st.integers(0, 2)) :] if data.draw(st.booleans()) else text[:place]
    )
    try:
        whole = loads(altered)
    except ValueError:
        with pytest.raises(ValueError, match="character"):
            read(altered, pieces)
    else:
        assert read(altered, pieces) == whole


@pytest.mark.parametrize("text", ["", " ", "3", '"["', "{}", '{"item": [1]}', "\ufeff[]"])
def test_another_kind_of_json_is_refused(text: str):
    with pytest.raises(ValueError, match=r"Expecting '\[': character"):
        list(read_members([text], "["))


def test_numbers_that_strict_json_lacks():
    not_a_number, infinite, huge, small = read_members(["[NaN, -Infinity, ", "9" * 5000, ", 1e-9999]"], "[")
    assert math.isnan(not_a_number)
    assert (infinite, huge, small) == (-math.inf, math.inf, 0.0)


def test_the_message_names_the_character():
    with pytest.raises(ValueError, match="Expecting ',': character 2,005"):
        list(read_members(["[" + "1," * 1000, '"a"', ' "b"]'], "["))


def test_deep_nesting_is_refused():
    with pytest.raises(ValueError, match="nested too deeply: character 1"):
        list(read_members(["[" * 200_000], "["))


def test_bad_json_does_not_make_it_read_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_members, "LONGEST_MEMBER", 1000)
    with pytest.raises(ValueError, match="character 6"):
        list(read_members(itertools.chain(['[{"a" 1}, '], itertools.repeat("more")), "["))
