"""What configs, rows, requests and results look like, and their base. Needs neither torch nor Prefect nor MLflow."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

_NUMBERS = (int, float, int | None, float | None)


def no_truth(value: Any) -> Any:
    """Refuse true and false where a number is wanted; pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "this is not a number. Fix: give a number")
    return value


class Strict(BaseModel):
    """A model that refuses unknown fields and cannot change."""

    # JSON, in which a stage is asked, has neither infinity nor NaN.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        return no_truth(value) if cls.model_fields[info.field_name or ""].annotation in _NUMBERS else value
