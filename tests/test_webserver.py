"""The web server answers to its own names alone."""

from collections.abc import Iterator
from unittest.mock import patch

import dagster as dg
import pytest
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster_webserver import app, cli
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from dmr_pipeline import webserver
from tests.helpers.fake_project import REPOSITORY


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starlette]:
    """What the command would serve."""
    served: list[Starlette] = []
    with (
        dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as instance,
        WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as context,
        patch.dict("os.environ", {"DMR_UI_HOSTS": " dmr.example ,"}),
    ):

        def serve(**_: object) -> None:
            served.append(app.create_app_from_workspace_process_context(context))

        with patch.object(cli, "cli", serve):
            webserver.main()
        yield served[0]


@pytest.mark.parametrize("host", ["localhost:3000", "127.0.0.1:3000", "localhost", "dmr.example"])
def test_its_own_names_are_answered(guarded: Starlette, host: str) -> None:
    with TestClient(guarded) as client:
        assert client.get("/server_info", headers={"Host": host}).status_code == 200
        query = client.post("/graphql", headers={"Host": host}, json={"query": "{ version }"})
        assert "data" in query.json()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:3000", "localhost.evil.example", "www.localhost", "", "10.0.0.1"]
)
def test_other_names_are_refused(guarded: Starlette, host: str) -> None:
    with TestClient(guarded) as client:
        for path in ("/", "/server_info"):
            assert client.get(path, headers={"Host": host}).status_code == 400
        assert client.post("/graphql", headers={"Host": host}, json={"query": "{ version }"}).status_code == 400
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/graphql", subprotocols=["graphql-ws"], headers={"Host": host}),
        ):
            pass


def test_the_ui_is_started_with_the_guard() -> None:
    assert "-m dmr_pipeline.webserver" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
