"""Sessions by their names, and conversations as they come back."""

import asyncio

import pytest

from dmr_pipeline.serve.conversation import command_of
from dmr_pipeline.serve.table import Held, Table


def test_who_waits_for_a_session_that_ends_has_another_one() -> None:
    """The next episode of the same name may begin while the outcome of the last one is written."""

    async def play() -> tuple[Held, Held, Table]:
        table = Table(10, 1000.0, lambda session: None)
        async with table.turn("a") as first:
            waiting = asyncio.create_task(turn(table))
            await asyncio.sleep(0)
            table.drop("a")
        return first, await waiting, table

    async def turn(table: Table) -> Held:
        async with table.turn("a") as held:
            return held

    first, second, table = asyncio.run(play())
    assert second is not first
    assert table.find("a") is second
    assert not second.lock.locked()


@pytest.mark.parametrize(
    "arguments", ['{"to":"desk 1", "n":[1,2]}', '{ "to": "desk 1",\n "n": [1, 2] }', {"to": "desk 1", "n": [1, 2]}]
)
def test_a_called_tool_is_the_same_however_its_arguments_are_spaced(arguments: object) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "go", "arguments": arguments}}]}
    assert command_of(call) == 'go({"to": "desk 1", "n": [1, 2]})'


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "go", "arguments": "{to: caf\u00e9"}}]}
    assert command_of(call) == "go({to: caf\u00e9)"
