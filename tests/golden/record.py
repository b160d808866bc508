# ruff: noqa: E402  (kernels are pinned before torch is imported)
"""Short runs of every stage, and what they compute, to the bit.

    python tests/golden/record.py            prints this machine's values as JSON
    python tests/golden/record.py --write    keeps them beside this file

Kernels are pinned to instructions that every processor of the last ten years has, so that most
machines compute the same bits. Which bits a machine's kernels give is measured beside: where they
differ from those of the recording machine, only losses can be compared.
"""

from __future__ import annotations

import os

PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ALIGNKIT_DEVICE": "cpu",
}
os.environ.update(PINNED)  # read when torch is imported

import gc
import hashlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from bitsandbytes import functional
from bitsandbytes.functional import quantize_4bit
from running import losses, make_ppo_recipe, make_preference_recipe, make_recipe, train
from safetensors.torch import load_file
from tiny import save_tiny

from alignkit.models.kernels.quantized import exact_nf4

VALUES = Path(__file__).parent / "stages.json"

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
NF4 = {"model__dtype": "bfloat16", "model__quantization": "nf4"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model__dtype": "bfloat16"},
    "nf4": NF4,
}
GROUPS = {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 6}
STEPS = {"training__max_steps": 3, "merge": True}


def stage_runs(base: Path, home: Path) -> dict[str, dict[str, Any]]:
    """Name of each run -> its losses and hashes.

    Args:
        base: folder of a tiny model.
        home: where the runs go.
    """
    makers: dict[str, Any] = {
        "sft": make_recipe,
        "ppo": make_ppo_recipe,
        "grpo": partial(make_ppo_recipe, stage="grpo", rollout=GROUPS),
    }
    found = {}
    for precision, fields in PRECISIONS.items():
        for stage in ("sft", "reward", "dpo", "kto", "ppo", "grpo"):
            folder = home / precision / stage
            if stage in makers:
                recipe = makers[stage](folder, base, **STEPS, **fields)
            else:
                recipe = make_preference_recipe(folder, base, stage, **STEPS, **fields)
            found[f"{stage} {precision}"] = _outcome(recipe)
    full: dict[str, Any] = {**STEPS, "adapter": {"kind": "full"}, "training__learning_rate": 1e-4}
    found["sft full"] = _outcome(make_recipe(home / "full", base, **full))
    found["dpo full"] = _outcome(make_preference_recipe(home / "dpo", base, "dpo", **full))
    rewarded = {"reward": {"model": str(home / "float32" / "reward" / "run")}}
    found["ppo reward model"] = _outcome(make_ppo_recipe(home / "ppo", base, **STEPS, **rewarded))
    return found


def _outcome(recipe: Path) -> dict[str, Any]:
    summary = train(recipe)
    run = Path(summary.output)
    return {
        "losses": losses(run),
        "adapter": weights_hash(run / "adapter"),
        "merged": weights_hash(run / "merged"),
    }


def weights_hash(folder: Path) -> str | None:
    """SHA-256 of the names, types and bytes of all tensors; None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kernel_bits() -> str:
    """What this machine's kernels make of fixed numbers: products, attention, exponentials."""
    digest = hashlib.sha256(torch.__version__.encode())
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, inner, columns in ((5, 64, 128), (97, 128, 64), (160, 64, 700), (64, 700, 64)):
            a = torch.randn(rows, inner, generator=generator).to(dtype)
            b = torch.randn(columns, inner, generator=generator).to(dtype)
            made = [a @ b.T, a.exp().sum(1), a.softmax(1), a.sigmoid(), a.square().mean(1)]
            heads = a.view(1, rows, -1, inner // 4).transpose(1, 2)
            made.append(torch.nn.functional.scaled_dot_product_attention(heads, heads, heads))
            for tensor in made:
                digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def nf4_bits() -> str:
    """What this machine makes of fixed weights in NF4."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 704, generator=generator).to(torch.bfloat16)
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    digest = hashlib.sha256(packed.numpy().tobytes())
    digest.update(exact_nf4(packed, state).float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def record() -> dict[str, Any]:
    """All values of this machine."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # each run searches for garbage twice: most of its time beside all that is imported
    functional.dequantize_4bit = exact_nf4  # its own rounds otherwise where there is AVX-512
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNKIT_HOME"] = str(Path(folder) / "home")
        base = Path(folder) / "base"
        save_tiny(base)
        return {
            "kernels": kernel_bits(),
            "nf4": nf4_bits(),
            "base": weights_hash(base),
            "runs": stage_runs(base, Path(folder)),
        }


if __name__ == "__main__":
    made = json.dumps(record(), indent=1)
    if "--write" in sys.argv:
        VALUES.write_text(made + "\n", encoding="utf-8")
    else:
        print(made)
