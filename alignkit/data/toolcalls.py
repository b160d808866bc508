"""Tool calls and function schemas in the OpenAI form."""

from __future__ import annotations

from typing import Any

from alignkit.data.fields import need, parse_json
from alignkit.data.sources import Row
from alignkit.errors import DataError


def tool_calls(value: Any, row: Row, number: int) -> tuple[dict[str, Any], ...]:
    """Calls in the OpenAI form, with arguments as a mapping."""
    calls = parse_json(value, row, f"turn {number}") if isinstance(value, str) else value
    parsed = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise DataError(
                f"{row.place}: turn {number} calls a tool without a name",
                hint='as in {"name": "get_weather", "arguments": {"city": "Oslo"}}',
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments, row, f"arguments of {function['name']}")
        body = {"name": function["name"], "arguments": arguments}
        parsed.append({"type": "function", "function": body})
    return tuple(parsed)


def tool_schemas(row: Row) -> tuple[dict[str, Any], ...]:
    """Function schemas in the OpenAI form."""
    tools = row.values.get("tools")
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return ()
    schemas = []
    for number, tool in enumerate(need(row, "tools", list)):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise DataError(
                f"{row.place}: tools[{number}] describes no function with a name",
                hint='as in {"name": "get_weather", "parameters": {...}}',
            )
        schemas.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(schemas)
