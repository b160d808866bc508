"""Prompts of `generate` and `chat`: what a template refuses, and what is no text."""

from __future__ import annotations

import pytest
import torch
from tiny import chat_template, tiny_model, tiny_tokenizer

from alignkit.errors import AlignkitError
from alignkit.generation.answers import generate_answers, render_prompt
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


# decoding -------------------------------------------------------------------------------------


def opened(kind: str = "llama", **more: int) -> OpenModel:
    tokenizer = tiny_tokenizer("chatml", chat_template("chatml"))
    return OpenModel(tiny_model(kind, **more), tokenizer, "tiny")


ASKED = [[{"role": "user", "content": text}] for text in ("Hi", "Count to three.", "Who?")]


def test_a_draft_changes_no_answer() -> None:
    model = opened()
    plain = generate_answers(model, ASKED, SamplingSettings(24))
    other = opened()
    for weight in other.model.parameters():  # guesses that are often wrong
        weight.data += 0.05 * weight.data.std() * torch.randn_like(weight)
    for draft in (opened(), other):
        assert generate_answers(model, ASKED, SamplingSettings(24), draft) == plain
    with pytest.raises(AlignkitError, match="beams and a draft exclude each other"):
        generate_answers(model, ASKED, SamplingSettings(4, beams=2), draft=opened())
    stranger = OpenModel(other.model, tiny_tokenizer("gemma"), "stranger")
    with pytest.raises(AlignkitError, match="stranger has other tokens than tiny"):
        generate_answers(model, ASKED, SamplingSettings(4), stranger)


def test_beams_find_what_is_likelier() -> None:
    model = opened()

    def likelihood(answer: str) -> float:
        asked = render_prompt(model, ASKED[1])
        ids = model.tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
        told = model.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model.model(torch.cat([ids, told], 1)).logits.double().log_softmax(-1)
        rows = logits[0, ids.shape[1] - 1 : -1]
        return float(rows.gather(1, told[0, :, None]).mean())

    (greedy,) = generate_answers(model, ASKED[1:2], SamplingSettings(6))
    (wide,) = generate_answers(model, ASKED[1:2], SamplingSettings(6, beams=8))
    assert likelihood(wide) >= likelihood(greedy)


def test_an_answer_ends_at_a_stop_text() -> None:
    model = opened()
    whole = generate_answers(model, ASKED, SamplingSettings(24))
    stop = whole[0][len(whole[0]) // 2 :][:2]
    cut = generate_answers(model, ASKED, SamplingSettings(24, stop=(stop, "never there")))
    assert cut[0] == whole[0][: whole[0].index(stop)].strip()
    assert SamplingSettings(stop=("b", "a")).cut("xxabxx") == "xx"


def test_min_p_near_one_is_greedy() -> None:
    model = opened()
    greedy = generate_answers(model, ASKED, SamplingSettings(8))
    assert generate_answers(model, ASKED, SamplingSettings(8, 1.0, min_p=0.999)) == greedy
    assert generate_answers(model, ASKED, SamplingSettings(8, 1.0, seed=3)) != greedy


@pytest.mark.parametrize(
    ("name", "value"), [("min_p", 1.0), ("typical_p", 0.0), ("beams", 0), ("stop", ("",))]
)
def test_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(AlignkitError, match=f"{name} cannot be"):
        SamplingSettings(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(AlignkitError, match="beams cannot be 2"):
        SamplingSettings(temperature=1.0, beams=2)
    assert SamplingSettings().changed("stop", "END").stop == ("END",)
