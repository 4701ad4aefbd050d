"""What the package's own data is made of where pydantic reads or writes it."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """No keys but its fields, and no changes once it is there."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
