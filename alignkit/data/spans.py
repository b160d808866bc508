"""Where each turn stands in a rendered conversation.

The span of an assistant's turn runs from the end of what the model is given (the conversation
before, with the generation prompt) to the end of what it has to write (its text and the end-of-turn
token). It is found by rendering prefixes of the conversation, so it holds for any template; where a
template renders a turn differently once later turns exist, there is no such span and the row is an
error.
"""

from __future__ import annotations

from typing import Any

from alignkit.data.formats import Conversation
from alignkit.data.templates import ChatTemplate, common_length, is_written
from alignkit.data.turns import Message
from alignkit.errors import DataError

Span = tuple[int, int]
"""A turn in the rendered text: its first character after the generation prompt, and one past the
last character that belongs to it."""


class RenderedTurns:
    """A conversation as text, in which its turns are found.

    Args:
        template: that renders it.
        conversation: the row.

    Attributes:
        full: the text.

    Raises:
        DataError: the template refuses the row.
    """

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self.template, self.conversation = template, conversation
        self.turns = template.messages(conversation)
        self.shift = len(self.turns) - len(conversation.messages)
        self.full = template.render(self.turns, conversation)

    def trained(self, *, last_only: bool) -> list[Span]:
        """The span of each assistant turn that the row asks to train.

        Args:
            last_only: only the last assistant turn is wanted.

        Returns:
            Spans in order. Turns that are not wanted may be rewritten.

        Raises:
            DataError: the template rewrites a turn that is wanted.
        """
        messages = self.conversation.messages
        replies = [n for n, message in enumerate(messages) if message.role == "assistant"]
        return [
            self._span(number, messages[number])
            for number in (replies[-1:] if last_only else replies)
            if messages[number].trained and number >= self.conversation.context
        ]

    def left_out(self) -> list[Span]:
        """The span of each turn, of any role, that its own mark keeps out of the loss.

        Raises:
            DataError: the template rewrites such a turn.
        """
        turns = enumerate(self.conversation.messages)
        return [self._span(number, message) for number, message in turns if not message.trained]

    def prompt(self) -> str:
        """The text up to the end of what the last turn is given.

        Raises:
            DataError: the template changes what the answer begins with.
        """
        before = self._before(len(self.turns) - 1) or 0
        return self.full[: self._border(before, self.conversation.messages[-1])]

    def _span(self, number: int, message: Message) -> Span:
        position = number + self.shift
        before = self._before(position)
        if before is not None:
            after = self.template.render(self.turns[: position + 1], self.conversation)
            end = self._end(after, before, self.turns[position])
            if end is not None:
                return self._border(before, message) if message.given else before, end
        raise DataError(
            f"{self.conversation.place}: the chat template rewrites turn {position} once later "
            "turns follow it, so no mask over that turn can be right",
            hint="train only the last turn (data.train_on: last_turn), or choose a template that "
            "keeps earlier turns (model.chat_template)",
        )

    def _before(self, position: int) -> int | None:
        """Length of what the model is given before a turn, if the text starts with it."""
        full, turns, turn = self.full, self.turns[:position], self.turns[position]
        if not turns:
            return self._opening(turn) if turn["role"] == "assistant" else 0
        plain = self.template.render(turns, self.conversation)
        if turn["role"] != "assistant":
            return len(plain) if full.startswith(plain) else None
        with_prompt = self.template.render(turns, self.conversation, generation_prompt=True)
        if full.startswith(with_prompt):
            return len(with_prompt)
        # A generation prompt may hold more than the finished turn, such as a thinking switch.
        common = common_length(with_prompt, full)
        if full.startswith(plain):
            return max(common, len(plain))
        return common if common > len(plain) else None

    def _opening(self, turn: dict[str, Any]) -> int:
        """Length of what stands before an assistant's turn that opens the conversation."""
        lines = self.template.generation_prompt.splitlines(keepends=True)
        for count in range(len(lines), 0, -1):  # its end may be a thinking switch
            header = "".join(lines[:count])
            at = self.full.find(header)
            if at != -1:
                return at + len(header)
        return max(self.full.find(str(turn["content"]).strip()), 0)

    def _border(self, before: int, message: Message) -> int:
        """Where an answer goes on after the part of it that is given."""
        given = message.content[: message.given]
        for text in (given, given.lstrip(), given.strip()):  # a template may trim
            at = self.full.find(text, before)
            if at != -1:
                return at + len(text)
        raise DataError(
            f"{self.conversation.place}: the chat template changes the beginning of the answer, "
            f"{given[:60]!r}, so nothing can go on from it",
            hint="write the beginning into the answer, or choose another model.chat_template",
        )

    def _end(self, after: str, before: int, turn: dict[str, Any]) -> int | None:
        """End of a turn that begins at `before`, from the text `after` where it is the last one."""
        full = self.full
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
        for special in self.template.specials:
            at = after.rfind(special, 0, end + len(special) - 1)
            end = at if at < end < at + len(special) else end
        closed = after[before:end].rstrip().endswith(self.template.specials)
        return end if closed and is_written(turn, after[before:end]) else None
