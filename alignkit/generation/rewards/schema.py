"""JSON that a schema allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import RewardError
from alignkit.generation.rewards.responses import Response
from alignkit.generation.rewards.rules import bare_json, refuse_constant, row_column
from alignkit.limits import TimeUp, time_limit
from alignkit.recipe.rules import JsonSchemaReward

try:
    import jsonschema
    from referencing.exceptions import Unresolvable
except ImportError:  # an extra: only this rule needs it
    jsonschema = None


def schema_score(spec: JsonSchemaReward) -> Callable[[Sequence[Response]], list[float]]:
    """1 for each response that its schema allows, else 0.

    Args:
        spec: the schema's file, or its column.

    Returns:
        A function from responses to numbers. It raises RewardError where a row's schema is none.

    Raises:
        RewardError: the package is not installed, or the file holds no schema.
    """
    if jsonschema is None:
        raise RewardError(
            "the reward rule `json_schema` needs the package jsonschema, which is not installed",
            hint="pip install 'alignkit[json]'",
        )
    shared = None if spec.file is None else _validator(_read(spec.file), spec.file)

    def one(response: Response) -> float:
        validator = shared
        if validator is None:
            assert spec.column is not None
            validator = _validator(_of_row(response, spec.column), response.place)
        try:
            value = json.loads(bare_json(response.text), parse_constant=refuse_constant)
            return float(validator.is_valid(value))
        except (ValueError, RecursionError, ArithmeticError):  # 1e400 is a multiple of nothing
            return 0.0
        except Unresolvable as error:
            raise RewardError(
                f"{spec.file or response.place}: the schema names another schema: {error}",
                hint="put it in under $defs: nothing is fetched",
            ) from None

    def score(responses: Sequence[Response]) -> list[float]:
        try:
            with time_limit(spec.timeout):
                return [one(response) for response in responses]
        except TimeUp:
            raise RewardError(
                f"the schema of the reward rule `json_schema` takes more than {spec.timeout:g} "
                "seconds",
                hint="simplify its patterns, or raise reward.timeout",
            ) from None

    return score


def _validator(schema: Any, place: str) -> Any:
    try:
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (jsonschema.SchemaError, AttributeError, TypeError) as error:
        reason = getattr(error, "message", str(error))
        raise RewardError(
            f"{place}: is not a JSON schema: {reason}", hint="see https://json-schema.org"
        ) from None
    return kind(schema, registry=jsonschema.validators.SPECIFICATIONS)  # nothing is fetched


def _read(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardError(
            f"{file}: cannot be read as JSON: {error}", hint="name a file with a JSON schema"
        ) from None


def _of_row(response: Response, column: str) -> Any:
    value = row_column(response, column, "json_schema", objects=True)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RewardError(
            f"{response.place}: {column!r} is not JSON: {error}",
            hint="name another column with reward.column, or remove the row",
        ) from None
