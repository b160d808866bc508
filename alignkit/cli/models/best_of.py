"""`--best-of` of `alignkit generate`: several answers to each prompt, and the best of them."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from alignkit.cli.output import print_json, say, stdout
from alignkit.errors import AlignkitError

_WHOLE = ("top_p", "top_k", "repetition_penalty", "min_p", "typical_p", "beams", "stop", "draft")
"""What would narrow the distribution that the answers are drawn from, or is of no use there."""


def check_best_of(
    best_of: int | None,
    reward: str | None,
    against: str | None,
    settings: Any,
    draft: str | None = None,
) -> None:
    """Refuse what best-of-n would ignore.

    Args:
        best_of: number of answers.
        reward: the reward model.
        against: a second model.
        settings: decoding.
        draft: a model that guesses ahead.

    Raises:
        AlignkitError: options that do not go together.
    """
    if best_of is None or reward is None:
        raise AlignkitError(
            "--best-of and --reward go together",
            hint="as in --best-of 8 --reward runs/reward",
        )
    if against is not None:
        raise AlignkitError(
            "--best-of and --against exclude each other", hint="generate with one model at a time"
        )
    if settings.temperature == 0:
        raise AlignkitError(
            "--best-of needs a temperature above 0: at 0 all answers are the same",
            hint="remove --temperature; its default is then 1",
        )
    plain = {"draft": None, **vars(type(settings)())}
    asked = {"draft": draft, **vars(settings)}
    for name in _WHOLE:
        if asked[name] != plain[name]:
            raise AlignkitError(
                f"--{name.replace('_', '-')} is not available with --best-of: its answers are "
                "drawn from the model's whole distribution",
                hint="leave it out; a lower --temperature narrows the distribution",
            )


def answer_best(
    model: str,
    reward: str,
    turns: list[list[dict[str, str]]],
    samples: int,
    settings: Any,
    dtype: str,
    base: str | None,
) -> Any:
    """The answers to each prompt with their rewards.

    Args:
        model: that answers.
        reward: model that judges.
        turns: of each prompt.
        samples: answers to each prompt.
        settings: decoding.
        dtype: of both models.
        base: of the adapter, in place of the one it names.
    """
    from alignkit.jobs.candidates import (
        SampleSettings,
        best_of,
        judge_answers,
        open_answering,
    )

    sampling = SampleSettings(
        samples, settings.max_new_tokens, settings.temperature, settings.seed, dtype
    )
    opened = open_answering(model, reward, dtype, base)
    rollouts = best_of(opened, turns, sampling, say)
    del opened  # the reward model takes its place in memory
    return judge_answers(rollouts, reward, dtype, say)


def print_best(answered: Any, prompts: list[str], as_json: bool) -> None:
    """The best answer to each prompt; as JSON all of them.

    Args:
        answered: the answers to each prompt with their rewards.
        prompts: as the user wrote them.
        as_json: print one JSON document instead of text.
    """
    rows = []
    for number, (prompt, answers) in enumerate(zip(prompts, answered, strict=True)):
        rewards = [answer.reward for answer in answers]
        chosen = rewards.index(max(rewards))
        candidates = [
            {"answer": a.text, "reward": a.reward, "tokens": a.tokens, "finish": a.finish}
            for a in answers
        ]
        rows.append({"prompt": prompt, "chosen": chosen, **candidates[chosen]})
        rows[-1]["candidates"] = candidates
        if as_json:
            continue
        if len(prompts) > 1:
            stdout.print(Text(f"> {prompt}", style="bold"))
        stdout.print(Text(answers[chosen].text))
        mean = sum(rewards) / len(rewards)
        say(
            f"reward {max(rewards):.4f}, the best of {len(rewards)}: mean {mean:.4f}, worst "
            f"{min(rewards):.4f}"
        )
        if number < len(prompts) - 1:
            stdout.print()
    if as_json:
        print_json(rows)
