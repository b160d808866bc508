"""A base with adapters as plain weights: read, changed, rounded and written file by file.

Memory holds one file and one layer, whatever the model. Only GGUF bases, and files that name
weights differently from transformers, are held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from alignkit.errors import ModelError, RoundingError
from alignkit.models.adapters.files import PLAIN, load_adapter, trained_over
from alignkit.models.adapters.targets import vocabulary_ends
from alignkit.models.adapters.tensors import read_weights
from alignkit.models.base.changes import grown
from alignkit.models.base.fitness import require_plain_weights
from alignkit.models.base.loading import DTYPES, BaseModel, load_config, token_rows
from alignkit.models.kernels.requantized import as_trained
from alignkit.models.merging.report import Drift, QuantizedReport
from alignkit.models.merging.updates import AdapterPart, Blend, Updates, seed_of
from alignkit.models.weights.rounding import round_stochastically
from alignkit.models.weights.shards import Weights, open_weights
from alignkit.models.weights.streaming import build_without_weights, make_room, streaming

Onto = Literal["auto", "original", "dequantized"]

ONTO: tuple[Onto, ...] = ("auto", "original", "dequantized")
"""Weights to merge onto if the base was quantized in training."""

Weight = Callable[[str], torch.Tensor]
"""Gives a weight by its name."""


class MergedWeights:
    """Weights of a base: as read, as changed by adapters, and as rounded.

    Args:
        base: the model the adapters were trained on.
        adapter: a PEFT folder, or several with their weights.
        dtype: of the written weights.

    Raises:
        ModelError: the base cannot be read, or an adapter does not fit it.
    """

    def __init__(self, base: BaseModel, adapter: Path | Blend, dtype: torch.dtype) -> None:
        require_plain_weights(base)
        self.base, self.dtype = base, dtype
        self.blend = adapter if isinstance(adapter, Blend) else Blend((AdapterPart(adapter),))
        self.plain = _skeleton(base)
        self.config = self.plain.config
        resized = _vocabulary_names(self.plain) if base.changes.resizes else []
        self.stored = open_weights(base, self.plain, resized)
        self.original: Weight = self.stored.__getitem__
        if base.changes.resizes:
            rows = base.changes.rows
            self.original = grown(self.original, resized, *token_rows(base), rows)
        self.adapted = [self._under(part.folder) for part in self.blend.parts]
        self.notes: tuple[str, ...] = ()
        self.quantization, self.trained = self._trained()
        self.survived, self.rounding_error, self._sums = 1.0, 0.0, [0.0, 0.0, 0.0]
        self._put_onto(self.original)

    def _under(self, adapter: Path) -> Any:
        model = _skeleton(self.base)
        make_room(model, read_weights(adapter))
        return load_adapter(model, adapter)

    def _trained(self) -> tuple[str, Weight]:
        """How the base was quantized in training, and its weights as they were then."""
        over = [trained_over(part.folder) for part in self.blend.parts]
        self.corrects = any(one is not None and one.init == "loftq" for one in over)
        if self.corrects and [part.weight for part in self.blend.parts] != [1.0]:
            raise ModelError(
                "an adapter that started with what quantization lost (loftq) can be neither "
                "weighted nor combined: its start would no longer match what was lost",
                hint="merge it alone",
            )
        kinds = {one.precision if one else PLAIN for one in over}
        kind, dtype, device = kinds.pop()
        if kinds:
            self.notes = (
                "the adapters were trained over bases in different precisions, or quantized on "
                "different devices: merged onto the original weights, and not compared with what "
                "was trained",
            )
        if kind == "none" or kinds:
            return "none", self.original
        return kind, as_trained(self.plain, self.original, kind, DTYPES[dtype], self._like(device))

    def _like(self, kind: str) -> torch.device:
        """A device of the kind that quantized the base; the processor, with a note, without one."""
        if kind == "cuda" and torch.cuda.is_available():
            return torch.device("cuda")
        if kind != "cpu":
            self.notes = (
                f"the base was quantized on {kind}, which is not here: quantized again on the "
                "processor, where single codes can differ",
            )
        return torch.device("cpu")

    def choose(
        self,
        read: Callable[[Any], torch.Tensor],
        onto: Onto,
        compare: Callable[[torch.Tensor, torch.Tensor], Drift],
    ) -> tuple[torch.Tensor, QuantizedReport | None]:
        """What `read` returns for base + adapter, over the weights that are merged onto.

        Args:
            read: takes a model.
            onto: for a base that was quantized in training; `auto` takes the original weights
                unless the adapter does worse there than `compare` allows.
            compare: takes what was read over the trained and over the original weights.

        Raises:
            RoundingError: `original`, and the adapter does worse there.
            ModelError: `dequantized`, and the base was not quantized.
        """
        kind = self.quantization
        if kind == "none":
            if onto == "dequantized":
                raise ModelError(
                    "the adapter was not trained over one quantized base: there is nothing to "
                    "dequantize",
                    hint="remove --onto",
                )
            return self.exact(read, self.original), None
        trained, original = (self.exact(read, w) for w in (self.trained, self.original))
        drift = compare(trained, original)
        if onto == "original" and drift.exceeds:
            raise RoundingError(
                f"over the original weights the adapter differs from what was trained over {kind} "
                f"weights: {drift.what} {drift.original:.4f} instead of {drift.trained:.4f}, "
                f"{drift.distance}, and it may be off by at most {drift.limit:.3g}",
                hint="merge with --onto dequantized",
            )
        if onto == "original" and self.corrects:
            raise ModelError(
                "the adapter started with what quantization lost (loftq): over the original "
                "weights that would count twice",
                hint="merge with --onto dequantized, or remove --onto",
            )
        if onto == "dequantized" or drift.exceeds or self.corrects:
            self._put_onto(self.trained)
            return trained, QuantizedReport(kind, "dequantized", drift)
        return original, QuantizedReport(kind, "original", drift)

    def _put_onto(self, weights: Weight) -> None:
        """Merge onto these base weights."""
        self.source = weights
        self.updates = Updates(self.adapted, self.blend, weights)

    @property
    def modules(self) -> int:
        """Number of adapted layers."""
        return self.updates.modules

    def untied(self) -> list[str]:
        """Names of weights that the base shares with others and the merged model does not."""
        changed, after = self.updates.changed, self.updates.after

        def apart(name: str, shared: str) -> bool:
            if name not in changed and shared not in changed:
                return False
            return {name, shared} - changed != set() or not torch.equal(after(name), after(shared))

        return [name for name, shared in self.stored.tied.items() if apart(name, shared)]

    def before(self, read: Callable[[Any], torch.Tensor], weights: Weight) -> torch.Tensor:
        """What `read` returns for the base alone."""
        with streaming(self.plain, weights):
            return read(self.plain)

    def exact(self, read: Callable[[Any], torch.Tensor], weights: Weight) -> torch.Tensor:
        """What `read` returns for base + adapter."""
        if self.updates.plain:
            with streaming(self.adapted[0], weights):
                return read(self.adapted[0])
        with streaming(self.plain, Updates(self.adapted, self.blend, weights).after):
            return read(self.plain)

    @torch.no_grad()
    def rounded(self, name: str) -> torch.Tensor:
        """A weight as it is written; what rounding left of its update is added up."""
        if name not in self.updates.changed:
            weight = self.source(name)
            return weight.to(self.dtype) if weight.is_floating_point() else weight
        before, exact = self.updates.pair(name)
        generator = torch.Generator().manual_seed(seed_of(name))
        rounded = round_stochastically(exact, self.dtype, generator)
        update, kept = exact - before, rounded.float() - before
        self._sums[0] += float((kept * update).sum(dtype=torch.float64))
        self._sums[1] += float(update.square().sum(dtype=torch.float64))
        self._sums[2] += float((kept - update).square().sum(dtype=torch.float64))
        return rounded

    def write(self, folder: Path, names: Sequence[str], extra: dict[str, torch.Tensor]) -> None:
        """Write weights, file by file, each read back.

        Args:
            folder: created if it does not exist.
            names: of the weights.
            extra: more weights, as they are to be stored.

        Raises:
            ModelError: a file does not hold what was written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._sums = [0.0, 0.0, 0.0]

        def weight(name: str) -> torch.Tensor:
            return extra[name] if name in extra else self.rounded(name)

        self.stored.write(folder, [*names, *extra], weight)
        self.updates.release()
        kept, squared, lost = self._sums
        if squared > 0.0:
            self.survived, self.rounding_error = kept / squared, (lost / squared) ** 0.5


def _skeleton(base: BaseModel) -> Any:
    config, trust = load_config(base), base.trust_remote_code
    return build_without_weights(AutoModelForCausalLM, config, trust_remote_code=trust)


def _vocabulary_names(model: Any) -> list[str]:
    """Names of the weights with a row for each token."""
    return [
        f"{name}.{key}"
        for name, module in vocabulary_ends(model).items()
        for key, _ in module.named_parameters(recurse=False)
    ]


def stored_weights(base: BaseModel) -> Weights:
    """The base's weights by name, as they are stored."""
    skeleton = _skeleton(base)
    return open_weights(base, skeleton, _vocabulary_names(skeleton))


def read_merged(
    folder: Path,
    kind: Any,
    config: PreTrainedConfig,
    read: Callable[[Any], torch.Tensor],
    **options: Any,
) -> torch.Tensor:
    """What `read` returns for a written model, layer by layer in float32.

    Args:
        folder: of the weights.
        kind: transformers class to build.
        config: its configuration.
        read: takes the model.
        **options: for `kind.from_config`.
    """
    model = build_without_weights(kind, config, **options)
    stored = open_weights(BaseModel(str(folder)), model, kind=kind)
    with streaming(model, stored.__getitem__):
        return read(model)
