"""Answers to conversations through transformers' `generate`, in batches or streamed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, TextStreamer

from alignkit.errors import AlignkitError, DataError, ModelError
from alignkit.generation.rollout import stop_tokens
from alignkit.generation.sampling import SamplingSettings
from alignkit.models.attention.prefix import has_window, prefix_length
from alignkit.models.opening import OpenModel
from alignkit.models.quiet import quiet_transformers
from alignkit.rendering import RenderingError, render_chat

Turns = list[dict[str, str]]

_BATCH = 16


def generate_answers(
    opened: OpenModel,
    conversations: list[Turns],
    settings: SamplingSettings,
    draft: OpenModel | None = None,
) -> list[str]:
    """One answer to each conversation.

    Args:
        opened: model and tokenizer.
        conversations: turns that end with the user's.
        settings: decoding.
        draft: a smaller model of the same tokens, whose guesses the model confirms or not
            (speculative decoding, arXiv:2211.17192): at temperature 0 the same answers.

    Returns:
        Answers in order, without special tokens.

    Raises:
        AlignkitError: a prompt does not fit the model's context, or the draft has other tokens.
    """
    answers: list[str] = []
    options = {} if draft is None else _assisted(opened, draft, settings)
    torch.manual_seed(settings.seed)
    model = opened.model
    alone = draft is not None or (prefix_length(model) and has_window(model.config))
    together = 1 if alone else _BATCH
    for start in range(0, len(conversations), together):
        texts = [render_prompt(opened, turns) for turns in conversations[start : start + together]]
        inputs = _encode(opened, texts, settings)
        output = _generate(opened, inputs, settings, **options)
        width = inputs["input_ids"].shape[1]
        answers += [
            settings.cut(text).strip()
            for text in opened.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        ]
    return answers


def stream_answer(
    opened: OpenModel, turns: Turns, settings: SamplingSettings, write: Callable[[str], None]
) -> str:
    """One answer, passed on piece by piece.

    Args:
        opened: model and tokenizer.
        turns: end with the user's.
        settings: decoding.
        write: gets each new piece of text.

    Returns:
        The whole answer.
    """
    torch.manual_seed(settings.seed)
    inputs = _encode(opened, [render_prompt(opened, turns)], settings)
    streamer = _Streamer(opened.tokenizer, write)
    _generate(opened, inputs, settings, streamer=streamer)
    return settings.cut("".join(streamer.pieces)).strip()


def _assisted(opened: OpenModel, draft: OpenModel, settings: SamplingSettings) -> dict[str, Any]:
    """Options of transformers' `generate` for a draft."""
    if settings.beams > 1:
        raise AlignkitError("beams and a draft exclude each other", hint="leave one of them out")
    if opened.tokenizer.get_vocab() != draft.tokenizer.get_vocab():
        raise AlignkitError(
            f"{draft.name} has other tokens than {opened.name}",
            hint="a draft is a smaller model of the same family",
        )
    return {"assistant_model": draft.model}


def render_prompt(opened: OpenModel, turns: Turns) -> str:
    """The turns as the model reads them; without a chat template, their plain text.

    Raises:
        DataError: the chat template refuses them.
    """
    if opened.tokenizer.chat_template:
        try:
            return render_chat(opened.tokenizer, turns, add_generation_prompt=True)
        except RenderingError as error:
            hint = "change the prompt or the system message; many templates know no system turn"
            raise DataError(error.message, hint=error.hint or hint) from error
    return "\n".join(turn["content"] for turn in turns)


def _encode(opened: OpenModel, texts: list[str], settings: SamplingSettings) -> Any:
    tokenizer = opened.tokenizer
    for text in texts:
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise AlignkitError(
                f"a prompt is not UTF-8 text: {text[-60:]!a}",
                hint="write whole characters; a file in another encoding is converted by iconv",
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not tokenizer.chat_template,
        return_token_type_ids=False,
    )
    config = opened.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    longest, before = int(inputs["attention_mask"].sum(1).max()), prefix_length(opened.model)
    if context and before + longest + settings.max_new_tokens > context:
        after = f" after a prefix of {before}" if before else ""
        raise AlignkitError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones do not fit the "
            f"model's context of {context}{after}",
            hint="shorten the prompt, or lower --max-new-tokens",
        )
    rows = opened.model.get_input_embeddings().weight.shape[0]
    if int(inputs["input_ids"].max()) >= rows:
        number = int(inputs["input_ids"].max())
        raise ModelError(
            f"{tokenizer.convert_ids_to_tokens(number)!r} of a prompt is token {number}, and the "
            f"model {opened.name} has {rows} tokens",
            hint="the tokenizer is of another model, or tokens were added to it alone",
        )
    return inputs.to(opened.model.device)


@torch.no_grad()
def _generate(
    opened: OpenModel, inputs: Any, settings: SamplingSettings, **options: Any
) -> torch.Tensor:
    if settings.stop:
        options |= {"stop_strings": list(settings.stop), "tokenizer": opened.tokenizer}
    with quiet_transformers():
        output: torch.Tensor = opened.model.generate(
            **inputs,
            **settings.options(),
            eos_token_id=sorted(stop_tokens(opened.model, opened.tokenizer)) or None,
            pad_token_id=opened.tokenizer.pad_token_id,
            logits_processor=[_FiniteLogits(opened.name)],
            **options,
        )
    return output


class _FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Refuses a model whose first logits say nothing.

    Args:
        name: of the model.
    """

    def __init__(self, name: str) -> None:
        self.name, self.checked = name, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `[B, V]`."""
        if not self.checked and bool(scores.isnan().any()):
            raise ModelError(
                f"{self.name} computes logits that are not numbers",
                hint="its files are damaged, or a value in its config.json is wrong; in float16 "
                "large activations overflow: --dtype float32",
            )
        self.checked = True
        return scores


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands finished words to a function instead of printing them."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take the next piece."""
        self.pieces.append(text)
        self.write(text)
