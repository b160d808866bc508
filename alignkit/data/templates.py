"""Chat templates: a conversation as text, and what a template does that its user should know."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkit.data.formats import Conversation
from alignkit.data.turns import Message
from alignkit.errors import DataError, ModelError
from alignkit.recipe.assets import assets_root
from alignkit.rendering import RenderingError, render_chat


def template_text(name_or_path: str) -> str:
    """The template source that a recipe names.

    Args:
        name_or_path: a file, or the name of a shipped template.

    Returns:
        Jinja source.

    Raises:
        DataError: the file is not UTF-8 text.
    """
    shipped = assets_root() / "data_templates" / "chat" / f"{name_or_path}.jinja"
    path = shipped if shipped.is_file() else name_or_path
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}",
            hint="a chat template is a text file of Jinja source",
        ) from None


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        tokenizer: a transformers tokenizer that carries the template.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            shipped = sorted(
                p.stem for p in (assets_root() / "data_templates/chat").glob("*.jinja")
            )
            raise ModelError(
                "the model's tokenizer has no chat template, and the rows are conversations",
                hint=f"set model.chat_template to one of {', '.join(shipped)}",
            )
        self.tokenizer = tokenizer
        code = re.sub(r"\{#.*?#\}", "", tokenizer.get_chat_template(), flags=re.DOTALL)
        self.has_markers = re.search(r"\{%[-+]?\s*generation\b", code) is not None
        self.names = frozenset(re.findall(r"\w+", code))
        self.knows_tool_calls = "tool_calls" in self.names
        self.knows_tools = "tools" in self.names
        added = tokenizer.added_tokens_decoder.values()
        self.specials = tuple(token.content for token in added if token.special)

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The turns as the template reads them.

        Tool calls and schemas that the template would drop are written into the text in the
        `<tool_call>` form of Hermes (https://arxiv.org/abs/2408.11857).
        """
        turns: list[dict[str, Any]] = []
        for message in conversation.messages:
            turn = {"role": message.role, "content": message.content, **message.more}
            if message.tool_calls and self.knows_tool_calls:
                turn["tool_calls"] = list(message.tool_calls)
            else:
                turn["content"] = written_out(message)
            turns.append(turn)
        if conversation.tools and not self.knows_tools:
            schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
            offer = f"You may call these tools:\n<tools>\n{schemas}\n</tools>"
            if turns[0]["role"] == "system":
                turns[0] = turns[0] | {"content": f"{turns[0]['content']}\n\n{offer}"}
            else:
                turns.insert(0, {"role": "system", "content": offer})
        return turns

    def flattens(self, conversation: Conversation) -> bool:
        """Whether tool calls or schemas of this row are written as text."""
        calls = any(message.tool_calls for message in conversation.messages)
        return (calls and not self.knows_tool_calls) or (
            bool(conversation.tools) and not self.knows_tools
        )

    def hands_on(self, key: str, value: str | None, rendered: str) -> bool:
        """Whether a further key of a turn, with its text if it is one, is in the rendered text."""
        if key not in self.names and f'"{key}"' not in rendered:
            return False
        quoted = json.dumps(value, ensure_ascii=False)[1:-1]
        return value is None or value.strip() in rendered or quoted in rendered

    def render(
        self,
        turns: list[dict[str, Any]],
        conversation: Conversation,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The turns as text.

        Args:
            turns: a prefix of `messages(conversation)`.
            conversation: names the row and holds its tools.
            generation_prompt: end with the header of an assistant turn.

        Raises:
            DataError: the template refuses the row.
        """
        try:
            return render_chat(
                self.tokenizer,
                turns,
                tools=self._tools(conversation),
                add_generation_prompt=generation_prompt,
            )
        except RenderingError as error:
            raise DataError(
                f"{conversation.place}: {error.message}",
                hint=error.hint
                or "change the row, or choose another template with model.chat_template",
            ) from error

    def _tools(self, conversation: Conversation) -> list[dict[str, Any]] | None:
        return list(conversation.tools) or None if self.knows_tools else None

    def marked(self, conversation: Conversation) -> tuple[str, list[int]]:
        """The text of a template that marks what the assistant generates, and the mask [T] of it.

        Raises:
            DataError: the template refuses the row.
        """
        turns = self.messages(conversation)
        text = self.render(turns, conversation)  # within limits, so that the next may have none
        marked = self.tokenizer.apply_chat_template(
            turns,
            tools=self._tools(conversation),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return text, list(marked["assistant_masks"])

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes to open an answer; empty if it writes nothing."""
        asked = [{"role": "user", "content": "a"}]
        try:
            plain, prompt = (
                render_chat(self.tokenizer, asked, add_generation_prompt=add)
                for add in (False, True)
            )
        except RenderingError:
            return ""
        return prompt[common_length(plain, prompt) :]

    def doubts(self) -> list[str]:
        """What the template does, whatever the rows are, that its user should know."""
        opener = self.generation_prompt
        found = []
        if not opener:
            found.append("it has no generation prompt: an answer follows the last turn directly")
        if "<think>" in opener and "</think>" not in opener:
            found.append(f"its generation prompt opens a think block: {opener!r}")
        if "strftime_now" in self.names:
            found.append(
                "it writes the date of the day: tomorrow the same rows are other tokens, and a run "
                "of today is not resumed; name a template with a fixed date"
            )
        elif "date_string" in self.names:
            found.append("it writes a fixed date")
        return found


def written_out(message: Message) -> str:
    """A turn's text, followed by the tools that it calls."""
    if not message.tool_calls:
        return message.content
    calls = "\n".join(_tool_call_text(call) for call in message.tool_calls)
    return f"{message.content}\n{calls}".strip()


def is_written(turn: dict[str, Any], text: str) -> bool:
    """Whether a rendered text holds a turn's content and the names of the tools that it calls."""
    names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
    return all(part in text for part in (str(turn["content"]).strip(), *names))


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of characters or items that two texts or lists share at the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _tool_call_text(call: dict[str, Any]) -> str:
    function = json.dumps(call["function"], ensure_ascii=False)
    return f"<tool_call>\n{function}\n</tool_call>"
