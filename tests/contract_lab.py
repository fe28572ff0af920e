"""What the tests of the contract share: validators for the schemas that `python worker.py schema` prints, and the page.

docs/contract.md has examples that an API's author copies. The tests take them out of the page and use them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from bson import ObjectId
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from testbed.processes import SOURCE
from worker_commands.schema import contract_schema

PAGE = (SOURCE / "docs/contract.md").read_text()
BSON_TYPES = {ObjectId: "objectId", datetime: "date"}


def check_type(validator: Any, types: Any, value: object, schema: dict[str, Any]) -> Iterator[ValidationError]:
    """The keyword `type`, for values as pymongo returns them: what is no text in MongoDB must not be some there."""
    wanted, found = schema.get("x-bsonType"), BSON_TYPES.get(type(value))
    if wanted != found:
        yield ValidationError(f"{value!r} is no {wanted or types}")
    elif not found:
        yield from Draft202012Validator.VALIDATORS["type"](validator, types, value, schema)


def check_pattern(validator: Any, pattern: str, value: object, _schema: object) -> Iterator[ValidationError]:
    """The keyword `pattern` as JSON Schema has it, where `$` is the very end. In Python a line end may follow it."""
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} doesn't match {pattern}")


ContractValidator: Any = extend(Draft202012Validator, {"type": check_type, "pattern": check_pattern})  # type: ignore[no-untyped-call]


def as_json(document: Any) -> Any:
    """The document as JSON has it, as the page says: its ids as hex digits, its dates in ISO 8601."""
    return json.loads(json.dumps(document, default=lambda it: it.isoformat() if isinstance(it, datetime) else str(it)))


def plain_validator_of(name: str) -> Any:
    """A validator for one of the schemas as any library makes it, for values as JSON has them."""
    schema = {**contract_schema(), "$ref": f"#/$defs/{name}"}
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def validator_of(name: str, *, is_closed: bool = False) -> Any:
    """A validator for one of the schemas. A closed one also refuses fields that an API may add, but the worker not."""
    whole = copy.deepcopy(contract_schema())
    if is_closed:
        for schema in whole["$defs"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
    return ContractValidator({**whole, "$ref": f"#/$defs/{name}"})


def section(heading: str) -> str:
    """What docs/contract.md has under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def example(heading: str, language: str = "json") -> str:
    """The first block of code under a heading, also one in a list."""
    found = re.search(rf"^ *```{language}\n(.*?)^ *```$", section(heading), re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def rows(heading: str) -> dict[str, list[str]]:
    """The rows of the first table under a heading, by the name in their first cell."""
    found = re.search(r"(?:^\|.*\n)+", section(heading), re.MULTILINE)
    assert found, heading
    cells = [line.strip("|").split(" | ") for line in found[0].splitlines()[2:]]
    return {first.strip(" `"): others for first, *others in cells}


def faults(validator: Any, value: object) -> list[str]:
    """What is wrong with a value, each fault with its place."""
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]
