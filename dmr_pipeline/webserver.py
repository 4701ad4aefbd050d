"""Dagster's web server, which answers only to the names that it is meant to be reached by.

Dagster takes any Host header: a page on the internet whose name is made to lead to 127.0.0.1 (DNS rebinding) could then start
and stop runs from the browser of whoever has the UI open. There is still no login: whoever reaches the server may do anything.
"""

import os
from unittest.mock import patch

from dagster_webserver import app, cli
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

HOSTS = ("localhost", "127.0.0.1")
HOSTS_VARIABLE = "DMR_UI_HOSTS"
"""Further names, separated by commas: those of a proxy in front of the server."""


class GuardedWebserver(DagsterWebserver):
    def build_middleware(self) -> list[Middleware]:
        named = (name.strip() for name in os.environ.get(HOSTS_VARIABLE, "").split(","))
        hosts = [*HOSTS, *(name for name in named if name)]
        return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False), *super().build_middleware()]


def main() -> None:
    """The command `dagster-webserver`, with its options and variables."""
    with patch.object(app, "DagsterWebserver", GuardedWebserver):  # no option names a class
        cli.cli(auto_envvar_prefix="DAGSTER_WEBSERVER")


if __name__ == "__main__":
    main()
