"""How a server of a recipe is run."""

from pathlib import Path

from pydantic import Field, SecretStr

from dmr_pipeline.artifacts.folders import DATA_ROOT
from dmr_pipeline.frozen_model import FrozenModel

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeSettings(FrozenModel):
    """Limits are there so that no client can take the server's memory or time from the others."""

    recipe: str
    data_root: Path = DATA_ROOT
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key: SecretStr | None = Field(
        None, description="asked of every client; needed where the host is no loopback address"
    )
    sessions: int = Field(
        1000, ge=1, description="kept at most; the one that has not been heard of for longest goes first"
    )
    slots: int = Field(32, ge=1, description="sessions whose keys and values are kept, of which so many act at once")
    session_seconds: float = Field(3600.0, gt=0, description="after which a session that is not heard of has ended")
    request_seconds: float = Field(120.0, gt=0, description="after which a request is given up")
    request_bytes: int = Field(2_000_000, ge=1000, description="of a request's body at most")
    requests: int = Field(256, ge=1, description="at once at most")
    epsilon: float = Field(0.0, ge=0, le=1, description="share of decisions that are drawn at random")
    seed: int = Field(0, description="of actions and decisions that are drawn")
    low_on_failure: bool = Field(False, description="where the router fails the cheapest rung acts; else the dearest")
    degrade: bool = Field(False, description="where the dearer upstream is down a cheaper one answers, and says so")
    static: str | None = Field(
        None,
        description="what decides in place of a router: a rung, which then acts throughout; int4<int2, of which the first checks"
        " what the second drafts; margin>0.4, a rule at a threshold; 'verdict': what the verdict deploys",
    )
    router: Path | None = Field(None, description="folder of the router that decides; by default the released one's")
    upstreams: dict[str, str] = Field(
        default_factory=dict,
        description="rung -> address of an OpenAI-compatible server, /v1 included; none: in this process",
    )
    upstream_models: dict[str, str] = Field(
        default_factory=dict, description="rung -> the model's name there; by default the first that it lists"
    )
    upstream_key: SecretStr | None = Field(None, description="sent to the upstreams; clients' keys are not")
    router_seconds: float = Field(2.0, gt=0, description="upstream: after which the router has failed")
    connect_seconds: float = Field(5.0, gt=0, description="upstream: to connect")
    first_byte_seconds: float = Field(60.0, gt=0, description="upstream: until an answer begins, and between its parts")
    retries: int = Field(
        2, ge=0, description="upstream: further tries, before the answer begins alone; none after a timeout"
    )
    retry_seconds: float = Field(
        0.25, ge=0, description="upstream: before the first further try, then twice as long each time"
    )
