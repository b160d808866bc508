"""A user's loss: loaded, checked before any row is read, and called like our own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import TrainingError
from alignkit.objectives.preference import PairLogprobs
from alignkit.recipe.assets import show_file
from alignkit.recipe.objectives import CustomPairSpec, CustomSpec
from alignkit.recipe.section import Section
from alignkit.runtime.user_code import load_function, raised


def custom_loss(spec: CustomSpec, shape: CustomShape) -> Callable[..., torch.Tensor]:
    """The user's function with its parameters.

    Args:
        spec: of the recipe.
        shape: of the stage.

    Returns:
        A function of the same tensors as our own losses of that stage. Each call raises
        TrainingError if the user's raises anything, or returns anything but one number an item.

    Raises:
        TrainingError: the file cannot be run, or has no such function.
    """
    path = Path(spec.file)
    with _kept():
        loss = load_function(
            path, spec.name, TrainingError, what="loss function", shape=shape.written
        )

    def call(*arguments: Any) -> torch.Tensor:
        try:
            with _kept():
                losses = loss(*arguments, **spec.parameters)
        except (Exception, SystemExit) as error:
            raise raised(error, path, spec.name, TrainingError, shape=shape.written) from error
        count = len(_tensors(arguments)[0])
        if not isinstance(losses, torch.Tensor) or losses.shape != (count,):
            shown = (
                list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            )
            raise _fault(spec, f"must give one number for each of {count} items, got {shown}")
        return losses

    return call


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """What the user's code changes for the whole process is put back.

    A loss stays in this process, because gradients flow through it.
    """
    folder, dtype = os.getcwd(), torch.get_default_dtype()
    with contextlib.redirect_stdout(sys.stderr), torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_default_dtype(dtype)


@dataclass(frozen=True)
class CustomShape:
    """What a user's loss looks like in one stage.

    Args:
        written: its first line, with `{name}` in it.
        example: the arguments of a call, of a few items.
    """

    written: str
    example: Callable[[CustomSpec], tuple[Any, ...]]


def check_custom(objective: Section, shape: CustomShape | None) -> None:
    """Call a user's loss on a few made-up items before any row is read.

    Args:
        objective: of the recipe; one of our own is not checked.
        shape: of the stage; None if it takes no user's loss.

    Raises:
        TrainingError: it is not finite, not differentiable, does not give one number an item, or
            gives another number when it is called again.
    """
    if not isinstance(objective, CustomSpec):
        return
    if shape is None:
        raise _fault(objective, "is not an objective of this stage")
    loss, arguments = custom_loss(objective, shape), shape.example(objective)
    losses = loss(*arguments)
    if not torch.isfinite(losses).all():
        raise _fault(objective, f"is not finite on usual log-probs: {losses.tolist()}")
    if not losses.requires_grad:
        raise _fault(objective, "is not differentiable: its result does not depend on its input")
    trained = [tensor for tensor in _tensors(arguments) if tensor.requires_grad]
    slopes = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    known = [slope for slope in slopes if slope is not None]
    if not known or not all(torch.isfinite(slope).all() for slope in known):
        raise _fault(objective, "has no finite gradient on usual log-probs")
    if not torch.equal(loss(*arguments), losses):
        raise _fault(objective, "gives another number when it is called again: it must be pure")


def _example_tokens(spec: CustomSpec) -> tuple[torch.Tensor]:
    """`[4]` log-probs of trained tokens."""
    return (torch.tensor([-0.1, -2.3, -0.7, -4.0]).requires_grad_(),)


def _example_pairs(spec: CustomSpec) -> tuple[PairLogprobs]:
    """Three pairs of completions: a clear one, a close one and one the wrong way round."""
    chosen = torch.tensor([-12.0, -30.5, -41.0], dtype=torch.float64).requires_grad_()
    rejected = torch.tensor([-25.0, -31.0, -22.0], dtype=torch.float64).requires_grad_()
    known = torch.tensor([[-13.0, -30.0, -40.0], [-24.0, -31.5, -23.0]], dtype=torch.float64)
    tokens = torch.tensor([[8.0, 20.0, 31.0], [14.0, 22.0, 9.0]])
    compares = isinstance(spec, CustomPairSpec) and spec.reference
    return (PairLogprobs(chosen, rejected, *tokens, *(known if compares else ())),)


def _example_rewards(spec: CustomSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[3]` rewards of chosen and of rejected completions, and margins."""
    chosen = torch.tensor([1.5, 0.2, -0.5]).requires_grad_()
    rejected = torch.tensor([-0.5, 0.1, 0.75]).requires_grad_()
    return chosen, rejected, torch.zeros(3)


TOKENS = CustomShape("def {name}(logprobs, **parameters)", _example_tokens)
PAIRS = CustomShape("def {name}(pairs, **parameters)", _example_pairs)
REWARDS = CustomShape("def {name}(chosen, rejected, margins, **parameters)", _example_rewards)


def _tensors(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors in a loss's arguments, those of pairs one by one."""
    if isinstance(arguments[0], PairLogprobs):
        return [value for value in vars(arguments[0]).values() if value is not None]
    return list(arguments)


def _fault(spec: CustomSpec, rule: str) -> TrainingError:
    return TrainingError(
        f"{show_file(Path(spec.file))}: {spec.name} {rule}",
        hint="data_templates/objectives/ has an example for each stage",
    )
