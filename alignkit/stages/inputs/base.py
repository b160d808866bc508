"""The model that a recipe starts from.

A run that was not merged, or an adapter folder, is merged first, once, under `$ALIGNKIT_HOME`: the
model to start from, and with it the reference of a preference stage, is the adapted one, never
silently the bare base. It stays there: the adapters trained on it name it as their base. Only a run
merges; a plan reads the tokenizer and the configuration that the merge will write.
"""

from __future__ import annotations

import fcntl
import hashlib
from dataclasses import replace
from pathlib import Path

from alignkit.data.tokenize import answer_ends
from alignkit.errors import ModelError
from alignkit.models.adapters.files import has_head
from alignkit.models.adapters.finding import base_of_adapter, tokenizer_of
from alignkit.models.base.adapter_kinds import require_mergeable
from alignkit.models.base.changes import BaseChanges
from alignkit.models.base.fitness import require_language_model, require_plain_weights
from alignkit.models.base.generation import generation_settings
from alignkit.models.base.identity import weights_version
from alignkit.models.base.loading import BaseModel, load_tokenizer, stored_dtype
from alignkit.models.base.places import resolve
from alignkit.models.base.skeleton import require_complete
from alignkit.models.merging.merge import merge_adapter
from alignkit.models.merging.settings import write_merged_settings
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.model import ModelSpec
from alignkit.stages.inputs.checking import file_rows
from alignkit.terminal import print_line


def start_model(spec: ModelSpec, *, merge: bool = True) -> BaseModel:
    """Where the model of a recipe is.

    Args:
        spec: names a hub id, a folder, a file, a run folder, an adapter or a known name.
        merge: merge an adapter first; otherwise only print a note: the result has no weights.

    Returns:
        A language model.

    Raises:
        ModelError: there is no such model, or it is a reward model or cannot be merged.
    """
    place = resolve(spec.base, trust_remote_code=spec.trust_remote_code)
    if place.unmerged is not None:
        base = _merged(_source(place.unmerged), place.unmerged, merge=merge)
    else:
        base = place.whole()
        require_language_model(base)
        require_plain_weights(base)
        require_complete(base)
    change = generation_settings(base)[1]
    if change:
        print_line(change, "note")
    return replace(base, changes=BaseChanges(spec.rope_scaling, spec.add_tokens))


def _source(adapter: Path) -> BaseModel:
    """The base that an adapter is merged into."""
    require_mergeable(adapter)
    if has_head(adapter):
        raise ModelError(
            f"{adapter} is a reward model, not a language model",
            hint="name the model it was trained from; `alignkit eval` scores answers with it",
        )
    try:
        source = base_of_adapter(adapter, None)
    except ModelError as error:
        hint = f"merge it with `alignkit merge-lora {adapter} --base BASE` and name the result"
        raise ModelError(
            f"{adapter} is an adapter whose base is missing: {error.message}", hint=hint
        ) from None
    require_complete(source)
    return source


def _merged(source: BaseModel, adapter: Path, *, merge: bool) -> BaseModel:
    digest = hashlib.sha256(weights_version(source).encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = adapter / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    name = digest.hexdigest()[:32]
    folder = alignkit_home() / "merged" / digest.hexdigest()[:32]
    merged = BaseModel(str(folder), None, source.trust_remote_code)
    if (folder / "config.json").is_file():
        return merged
    tokenizer = load_tokenizer(tokenizer_of(adapter, source))
    why = "training starts from it, not from its base"
    if not merge:
        print_line(f"{adapter} is merged first when the run starts: {why}", "note")
        settings = alignkit_home() / "cache" / "unmerged" / folder.name
        write_merged_settings(source, adapter, settings, tokenizer)
        return replace(merged, location=str(settings), unmerged=adapter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process merges, the others wait for it
        if not (folder / "config.json").is_file():
            print_line(f"{adapter} is merged first: {why}", "note")
            rows, stops = file_rows(None, tokenizer)
            merge_adapter(
                source,
                adapter,
                folder,
                rows=rows,
                dtype=stored_dtype(source),
                tokenizer=tokenizer,
                stop_tokens=answer_ends(tokenizer, stops),
            )
    return merged
