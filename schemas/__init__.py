"""What configs, rows, requests and results look like, and their base. Needs neither torch nor Prefect nor MLflow."""

import json
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticCustomError

Model = TypeVar("Model", bound=BaseModel)

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


class Grown(Strict):
    """A config with fields that came `later`: while these are None nothing names them, so that older keys stay."""

    later: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None or name not in self.later}


def read_stored(model: type[Model], text: str) -> Model:
    """What alignflow itself has stored, perhaps in another version: fields that this one does not know are left out.

    What users write is not read so: there an unknown field is a mistake.

    Raises:
        ValidationError: it is not JSON, or a field that this version needs is missing or has another type.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        unknown = [one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"]
        if not unknown:
            raise
    content = json.loads(text)
    for *above, name in unknown:
        inner = content
        for part in above:
            inner = inner[part]
        del inner[name]
    return model.model_validate_json(json.dumps(content))
