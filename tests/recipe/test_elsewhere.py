"""Plans for machines that are not here, and what models need, held against published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from running import make_recipe
from transformers import LlamaConfig

from alignkit.errors import AlignkitError
from alignkit.jobs.plan_elsewhere import Elsewhere, plan_elsewhere, smallest_change
from alignkit.models.adapters.sizes import measure_model
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.facts import DataFacts, HardwareFacts, ModelFacts
from alignkit.recipe.planning.cards import CARDS, MFU, read_gpu, read_size, with_card
from alignkit.recipe.planning.plan import make_plan
from alignkit.recipe.planning.sizing import (
    cache_bytes,
    training_operations,
    weight_bytes,
)
from alignkit.recipe.reading.load import load_recipe

HERE = HardwareFacts("cpu", "here", 16 * 10**9, 2, 1)


def llama(hidden: int, layers: int, inner: int, heads: int, **more: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=more.pop("key_heads", heads),
        vocab_size=32_000,
        max_position_embeddings=4096,
    )


SEVEN = llama(4096, 32, 11008, 32)
SIXTY_FIVE = llama(8192, 80, 22016, 64)
SEVENTY = llama(8192, 80, 28672, 64, key_heads=8)
ATTENTION = LoraSpec(
    kind="lora", rank=16, alpha=32, targets=("q_proj", "k_proj", "v_proj", "o_proj")
)


def test_the_cache_of_llama_70b() -> None:
    model = measure_model(SEVENTY, ATTENTION)
    assert cache_bytes(model, 4096) == 1_342_177_280  # 1.34 GB with 8 key heads in fp16
    assert round(cache_bytes(model, 4096, 32) / 1e9, 1) == 42.9


def test_operations_and_weights_of_70b() -> None:
    assert training_operations(70e9, 2e12) == pytest.approx(8.4e23)
    assert [weight_bytes(70e9, bits) / 1e9 for bits in (32, 16, 8, 4)] == [280, 140, 70, 35]


def test_lora_on_the_attention_of_llama_2_7b() -> None:
    assert measure_model(SEVEN, ATTENTION).trainable == 16_777_216


@pytest.mark.parametrize(
    ("config", "gigabytes"), [(SIXTY_FIVE, 48), (SEVEN, 12)], ids=["65B", "7B"]
)
def test_qlora_fits_the_card_of_its_paper(config: Any, gigabytes: int, tmp_path: Path) -> None:
    path = make_recipe(tmp_path, tmp_path)
    recipe = load_recipe(path, ["model.quantization=nf4"]).recipe
    spec = recipe.model.computing_in("bfloat16", "")
    chosen = recipe.model_copy(update={"model": spec, "adapter": ATTENTION})
    hardware = with_card(HERE, CARDS["a6000"], 1)
    data = DataFacts(100, 51_200, 25_600, 512, 8_192, 0, 0, 0)

    def peak(memory: float) -> float:
        from dataclasses import replace

        there = replace(hardware, memory=round(memory * 1e9))
        plan = make_plan(chosen, measure_model(config, ATTENTION), data, there)
        return plan.memory.peak / 1e9 if plan.fits else 1e9

    assert peak(gigabytes) < gigabytes
    assert peak(gigabytes / 2) > gigabytes  # and not half of it


def test_time_is_that_of_the_published_speed(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, tmp_path, adapter={"kind": "full"})
    recipe = load_recipe(path, ["training.batch_size=16"]).recipe
    spec = recipe.model.computing_in("bfloat16", "")
    full = recipe.model_copy(update={"model": spec})
    model = ModelFacts("M", 7 * 10**9, 7 * 10**9, 32, 4096, 11008, 4096, 4096, 32_000, 4096)
    data = DataFacts(1000, 1_000_000, 0, 1000, 16_000, 0, 0, 0)
    one, eight = (
        make_plan(full, model, data, with_card(HERE, CARDS["h100"], count)) for count in (1, 8)
    )
    decoder = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    tokens = one.steps * one.batch_size / 1000 * 1_000_000
    work = tokens * decoder * (8 if one.gradient_checkpointing else 6)
    assert one.seconds == pytest.approx(work / (989e12 * MFU))
    assert eight.seconds is not None
    assert one.seconds is not None
    assert eight.seconds == pytest.approx(one.seconds / 8, rel=1e-6)
    assert not one.fits  # 7B with all weights: 112 GB of states alone


def test_a_recipe_elsewhere_and_what_makes_it_fit(tiny_base: Path, tmp_path: Path) -> None:
    path = make_recipe(tmp_path, tiny_base)
    recipe = load_recipe(path, ["model.dtype=auto"]).recipe
    _, plan = plan_elsewhere(recipe, Elsewhere(CARDS["t4"], 2))
    assert (plan.dtype, plan.hardware.device, plan.hardware.processes) == ("float16", "cuda", 2)
    assert plan.fits
    _, plan = plan_elsewhere(recipe, Elsewhere(CARDS["h100"]))
    assert plan.dtype == "bfloat16"
    small = Elsewhere(memory=900_000_000)
    assert not plan_elsewhere(recipe, small)[1].fits
    found = smallest_change(recipe, lambda more: load_recipe(path, list(more)).recipe, small)
    assert found is not None
    assert found[0] == ("merge=false",)
    assert found[1].fits
    nothing = Elsewhere(memory=1000)
    assert (
        smallest_change(recipe, lambda more: load_recipe(path, list(more)).recipe, nothing) is None
    )


def test_names_and_sizes() -> None:
    assert read_gpu("h100:8") == (CARDS["h100"], 8)
    assert read_gpu("RTX 4090") == (CARDS["4090"], 1)
    assert read_size("24GB") == 24 * 10**9
    assert read_size("1.5 GiB") == 3 * 2**29
    for text in ("h99", "h100:", "h100:0", "h100:x"):
        if text == "h100:":
            continue
        with pytest.raises(AlignkitError, match="--gpu"):
            read_gpu(text)
    for text in ("24", "GB", "0GB", "24XB"):
        with pytest.raises(AlignkitError, match="--memory"):
            read_size(text)


def test_the_command(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    path = str(make_recipe(tmp_path, tiny_base))
    done = alignkit("plan", path, "--gpu", "h100:2", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["hardware"]["name"] == "2 × H100 SXM"
    assert "time at 40% of the published 989 TFLOP/s" in done.stderr
    tight = alignkit("plan", path, "--memory", "0.9GB", cwd=tmp_path)
    assert "does not fit" in tight.stderr
    assert "fits with merge=false" in tight.stderr
    sized = alignkit("plan", "--model", str(tiny_base), "--gpu", "4090", cwd=tmp_path)
    assert "of keys and values" in sized.stdout
    assert "days on 1 × RTX 4090" in sized.stdout
    none = alignkit("plan", cwd=tmp_path)
    assert none.code == 2
    assert "no recipe was named" in none.stderr
