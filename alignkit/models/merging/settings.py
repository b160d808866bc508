"""What a merge writes besides the weights, known before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from alignkit.files import replace_folder
from alignkit.models.adapters.files import fitting, read_adapter_config
from alignkit.models.adapters.patterns import require_quick_patterns
from alignkit.models.adapters.tensors import require_stored_ranks
from alignkit.models.base.loading import BaseModel, load_config, stored_dtype
from alignkit.models.base.skeleton import build_skeleton
from alignkit.models.peft_parts import stored_name
from alignkit.models.weights.writing import write_settings


def write_merged_settings(base: BaseModel, adapter: Path, folder: Path, tokenizer: Any) -> None:
    """Write the configuration and the tokenizer of base + adapter, as `merge_adapter` does.

    Args:
        base: the model the adapter was trained on.
        adapter: PEFT adapter folder.
        folder: to write, replaced if it exists.
        tokenizer: of the merged model.

    Raises:
        ModelError: the adapter does not fit the base.
    """
    model = _skeleton(base)
    if _unties(_skeleton(base), adapter):
        untie(model.config)
    with replace_folder(folder) as written:
        write_settings(base, model, stored_dtype(base), tokenizer, written)


def untie(config: Any) -> None:
    """Make embedding and output head two matrices.

    Args:
        config: of a merged model, changed in place.
    """
    for one in (config, config.get_text_config()):
        one.tie_word_embeddings = False


def _skeleton(base: BaseModel) -> Any:
    return build_skeleton(load_config(base), trust_remote_code=base.trust_remote_code)


def _unties(model: Any, adapter: Path) -> bool:
    """Whether a merge changes tied weights differently; new tokens change them alike."""
    tied = dict(model.all_tied_weights_keys)
    if not tied:
        return False
    config = read_adapter_config(adapter)
    require_quick_patterns(config, model.state_dict, adapter)
    require_stored_ranks(config, adapter)
    with fitting(adapter), torch.device("meta"):
        adapted = get_peft_model(model, config)
    kinds = {
        stored_name(name): type(module)
        for name, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    }
    ends = [[kinds.get(n.rpartition(".")[0]) for n in pair] for pair in tied.items()]
    return any(pair not in ([None] * 2, [TrainableTokensLayer] * 2) for pair in ends)
