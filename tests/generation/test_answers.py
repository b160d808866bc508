"""Prompts of `generate` and `chat`: what a template refuses, and what is no text."""

from __future__ import annotations

import pytest
from tiny import chat_template, tiny_model, tiny_tokenizer

from alignkit.errors import AlignkitError
from alignkit.generation.answers import generate_answers
from alignkit.generation.rollout import stop_tokens
from alignkit.generation.sampling import SamplingSettings
from alignkit.models.opening import OpenModel

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
            "the chat template refuses the conversation: no system\n"
            "hint: change the prompt or the system message; many templates know no system turn",
        ),
        (
            [{"role": "user", "content": "Hi \udcff"}],
            "a prompt is not UTF-8 text: '<|im_start|>user\\nHi \\udcff<|im_end|>\\n"
            "<|im_start|>assistant\\n'\n"
            "hint: write whole characters; a file in another encoding is converted by iconv",
        ),
    ],
)
def test_refused_conversations(turns: list[dict[str, str]], message: str) -> None:
    tokenizer = tiny_tokenizer("chatml", REFUSES + chat_template("chatml"))
    opened = OpenModel(tiny_model("llama"), tokenizer, "tiny")
    with pytest.raises(AlignkitError) as caught:
        generate_answers(opened, [turns], SamplingSettings(4))
    assert str(caught.value) == message


def test_the_templates_end_of_turn_ends_a_response() -> None:
    model, tokenizer = tiny_model("gemma"), tiny_tokenizer("gemma")
    model.generation_config.eos_token_id = None
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert stop_tokens(model, tokenizer) == {end, tokenizer.eos_token_id}
