"""Chat templates: a conversation as text, and the characters of each assistant turn.

The span of a turn runs from the end of what the model is given (the conversation before, with the
generation prompt) to the end of what it has to write (its text and the end-of-turn token). It is
found by rendering prefixes of the conversation, so it holds for any template; where a template
renders a turn differently once later turns exist, there is no such span and the row is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from alignkit.data.formats import Conversation, Message
from alignkit.errors import DataError, ModelError
from alignkit.recipe.assets import assets_root

Span = tuple[int, int]
"""A trained turn in the rendered text: its first character after the generation prompt, and one
past the last character that belongs to it."""


def template_text(name_or_path: str) -> str:
    """The template source that a recipe names.

    Args:
        name_or_path: a file, or the name of a shipped template.

    Returns:
        Jinja source.
    """
    shipped = assets_root() / "data_templates" / "chat" / f"{name_or_path}.jinja"
    path = shipped if shipped.is_file() else name_or_path
    with open(path, encoding="utf-8") as file:
        return file.read().rstrip("\n")


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
        self.knows_tool_calls = "tool_calls" in code
        self.knows_tools = re.search(r"\btools\b", code) is not None
        added = tokenizer.added_tokens_decoder.values()
        self.specials = tuple(token.content for token in added if token.special)

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The turns as the template reads them.

        Tool calls and schemas that the template would drop are written into the text in the
        `<tool_call>` form of Hermes (https://arxiv.org/abs/2408.11857).
        """
        turns: list[dict[str, Any]] = []
        for message in conversation.messages:
            turn: dict[str, Any] = {"role": message.role, "content": message.content}
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
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    tools=list(conversation.tools) or None if self.knows_tools else None,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except Exception as error:
            raise DataError(
                f"{conversation.place}: the chat template refuses the row: {error}",
                hint="change the row, or choose another template with model.chat_template",
            ) from error

    def spans(self, conversation: Conversation, *, last_only: bool) -> tuple[str, list[Span]]:
        """Rendered text and the span of each assistant turn that the row asks to train.

        Args:
            conversation: the row.
            last_only: only the last assistant turn is wanted.

        Returns:
            The text and the spans in order. Turns that are not wanted may be rewritten.

        Raises:
            DataError: the template refuses the row or rewrites a turn that is wanted.
        """
        turns = self.messages(conversation)
        shift = len(turns) - len(conversation.messages)
        full = self.render(turns, conversation)
        replies = [
            (position + shift, message)
            for position, message in enumerate(conversation.messages)
            if message.role == "assistant"
        ]
        spans = [
            self._span(full, turns, position, conversation)
            for position, message in (replies[-1:] if last_only else replies)
            if message.trained
        ]
        return full, spans

    def _span(
        self, full: str, turns: list[dict[str, Any]], position: int, conversation: Conversation
    ) -> Span:
        before = self._before(full, turns[:position], conversation)
        if before is not None:
            after = self.render(turns[: position + 1], conversation)
            end = self._end(full, after, before, turns[position])
            if end is not None:
                return before, end
        raise DataError(
            f"{conversation.place}: the chat template rewrites turn {position} once later turns "
            "follow it, so no mask over that turn can be right",
            hint="train only the last turn (data.train_on: last_turn), or choose a template that "
            "keeps earlier turns (model.chat_template)",
        )

    def _before(
        self, full: str, turns: list[dict[str, Any]], conversation: Conversation
    ) -> int | None:
        """Length of what the model is given before the turn, if the text starts with it."""
        if not turns:
            return 0
        with_prompt = self.render(turns, conversation, generation_prompt=True)
        if full.startswith(with_prompt):
            return len(with_prompt)
        # A generation prompt may hold more than the finished turn, such as a thinking switch.
        plain = self.render(turns, conversation)
        common = common_length(with_prompt, full)
        if full.startswith(plain):
            return max(common, len(plain))
        return common if common > len(plain) else None

    def _end(self, full: str, after: str, before: int, turn: dict[str, Any]) -> int | None:
        """End of a turn that begins at `before`, from the text `after` where it is the last one."""
        if full.startswith(after):
            return len(after)
        # As the last turn it may open with more, such as an empty thinking block,
        start = after.find(full[before : before + 8], before + 1)
        while start != -1:
            if full.startswith(after[start:], before) and is_written(turn, after[start:]):
                return before + len(after) - start
            start = after.find(full[before : before + 8], start + 1)
        # or close with more, such as an end of the whole text; no special token is cut in two.
        end = common_length(full, after)
        for special in self.specials:
            at = after.rfind(special, 0, end + len(special) - 1)
            end = at if at < end < at + len(special) else end
        closed = after[before:end].rstrip().endswith(self.specials)
        return end if closed and is_written(turn, after[before:end]) else None


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
