"""What alignkit takes for granted of PEFT and transformers beside their documentation.

The doors, `models/peft_parts.py` and `models/transformers_parts.py`, stand on these facts. A test
that fails here after an update names the library, its version and what has changed in it.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest
import torch
from mixtures import mixture
from peft import EvaConfig, IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners import PrefixEncoder
from peft.tuners.lora import Linear
from peft.utils import ModulesToSaveWrapper
from tiny import tiny_model
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    MptConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alignkit.models import transformers_parts
from alignkit.models.peft_parts import (
    IA3_FEEDFORWARD,
    IA3_TARGETS,
    active_adapter,
    adapter_layers,
    convert_peft_config_for_transformers,
    forget_merge,
    get_eva_state_dict,
    is_of_adapter,
    make_switchable,
    stored_name,
    switched,
)

IDS = torch.arange(3, 11)[None]


def now(library: str, what: str) -> str:
    """What a failure says."""
    return f"{library} {version(library)} {what}"


def peft_model(names: tuple[str, ...] = ("default",), **settings: Any) -> Any:
    """A tiny model under LoRA adapters of PEFT, none of which is zero."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings
    )
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_model(), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "a whole module": {"modules_to_save": ["lm_head"]},
    "rows of tokens": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_flags_of_layers_choose_the_adapter(kind: str) -> None:
    with torch.no_grad():
        model = peft_model(("default", "other"), **KINDS[kind])
        for name, weight in model.named_parameters():
            if ".other" in name:
                weight.add_(0.1)
    layers = adapter_layers(model)
    for layer in layers:
        for flag in ("_active_adapter", "_disable_adapters"):
            assert hasattr(layer, flag), now("peft", f"{type(layer).__name__} has no {flag}")
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    first, trained = logits(model), [w.requires_grad for w in model.parameters()]
    with model.disable_adapter():
        base = logits(model)
    for name, expected in (("other", other), ("default", first), (None, base)):
        with switched(layers, name):
            same = torch.equal(logits(model), expected)
            assert same, now("peft", f"computes something else where flags say {name} ({kind})")
            assert active_adapter(layers[0]) == name
            flags = [w.requires_grad for w in model.parameters()]
            assert flags == trained, now("peft", "changes what is trained with a flag")
    assert not torch.equal(first, base)
    assert not torch.equal(first, other)
    assert torch.equal(logits(model), first)


def test_a_prefix_has_no_flags_of_its_own() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(tiny_model(), config)
    encoder = model.prompt_encoder[model.active_adapter]
    assert isinstance(encoder, PrefixEncoder), now("peft", "keeps prefixes elsewhere")
    taken = {"_disable_adapters", "_active_adapter", "disable_adapters"} & set(dir(encoder))
    assert not taken, now("peft", f"has {taken} of its own for prefixes: use it")
    make_switchable(model)
    assert adapter_layers(model) == [encoder]
    # Two layers, keys and values, two key heads of 16.
    width = encoder(torch.arange(3)).shape
    assert width == (3, 2 * 2 * 2 * 16), now("peft", "orders a prefix otherwise")
    given = torch.randn(width)
    encoder.load_prompt_embeddings(given)
    cache = model.get_prompt(batch_size=1)
    assert isinstance(cache, DynamicCache)
    keys = given.view(3, 2, 2, 2, 16)[:, 1, 0].transpose(0, 1)  # of the second layer
    assert torch.equal(cache.layers[1].keys[0], keys), now("peft", "orders a prefix otherwise")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merge_is_forgotten(kind: str) -> None:
    model = peft_model(**KINDS[kind])
    layer = next(m for m in model.modules() if isinstance(m, Linear))
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge(safe_merge=True)
    merged = weight.detach().clone()
    weight.data.copy_(before)
    assert layer.merged, now("peft", "does not note what is merged")
    forget_merge(layer)
    assert not layer.merged, now("peft", "notes what is merged elsewhere than in merged_adapters")
    kept = [k for k, v in vars(layer).items() if k.endswith("caches") and v]
    assert not kept, now("peft", f"keeps more of a merge: {kept}")
    layer.merge(safe_merge=True)
    again = torch.equal(weight, merged)
    assert again, now("peft", "merges otherwise the second time")
    assert not torch.equal(merged, before)


def test_names_inside_a_wrapped_model() -> None:
    settings = {**KINDS["a whole module"], **KINDS["rows of tokens"]}
    base = set(tiny_model(tie_word_embeddings=False).state_dict())
    model: Any = get_peft_model(
        tiny_model(tie_word_embeddings=False), LoraConfig(target_modules=["q_proj"], **settings)
    )
    found, adapters = set(), set()
    for path, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            of_adapter = is_of_adapter(path) or isinstance(module, nn.ParameterDict)
            (adapters if of_adapter else found).add(stored_name(f"{path}.{key}"))
    assert found == base, now("peft", f"names weights otherwise: {sorted(found ^ base)}")
    trained = ("lora_A", "lora_B", "modules_to_save", "trainable_tokens")
    odd = [name for name in adapters if not any(part in name for part in trained)]
    assert adapters, now("peft", "does not end the names of an adapter with its own")
    assert not odd, now("peft", f"names adapters otherwise: {odd}")


def test_what_a_lora_layer_says_about_itself() -> None:
    settings = {"lora_alpha": 8}
    plain = next(m for m in peft_model(**settings).modules() if isinstance(m, Linear))
    dora = next(m for m in peft_model(use_dora=True).modules() if isinstance(m, Linear))
    names = list(inspect.signature(type(plain).forward).parameters)
    assert names == ["self", "x", "args", "kwargs"], now("peft", f"calls layers with {names}")
    expected: dict[str, Any] = {
        "scaling": {"default": 2.0},
        "r": {"default": 4},
        "use_dora": {"default": False},
        "lora_bias": {"default": False},
        "fan_in_fan_out": False,
        "merged": False,
        "disable_adapters": False,
        "active_adapters": ["default"],
    }
    for name, value in expected.items():
        found = getattr(plain, name, None)
        assert found == value, now("peft", f"has {name} = {found!r} in a plain LoRA layer")
    assert not plain.lora_variant, now("peft", "has a variant for plain LoRA")
    assert dora.lora_variant, now("peft", "has no variant for DoRA")
    assert isinstance(plain.lora_dropout["default"], nn.Identity)
    x = torch.randn(5, plain.in_features)
    with torch.no_grad():
        update = x @ plain.lora_A["default"].weight.T @ plain.lora_B["default"].weight.T
        by_hand = plain.get_base_layer()(x) + 2.0 * update
        torch.testing.assert_close(plain(x), by_hand, msg=now("peft", "computes LoRA otherwise"))


def test_what_a_whole_module_keeps() -> None:
    model = peft_model(**KINDS["a whole module"])
    wrapper: Any = next(m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    assert list(wrapper.modules_to_save) == ["default"], now("peft", "keeps copies elsewhere")
    shape = wrapper.original_module.weight.shape
    assert wrapper.modules_to_save["default"].weight.shape == shape


def test_peft_has_targets_of_ia3_for_known_families() -> None:
    config = IA3Config(target_modules=None, feedforward_modules=None)
    chosen = get_peft_model(tiny_model(), config).peft_config["default"]
    expected = set(IA3_TARGETS["llama"]), set(IA3_FEEDFORWARD["llama"])
    found = set(chosen.target_modules), set(chosen.feedforward_modules)
    assert found == expected, now("peft", "takes IA3's targets from elsewhere")


def test_eva_directions_of_what_a_layer_reads() -> None:
    model = tiny_model()
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    asked = []

    def forward(inner: Any, inputs: Any) -> None:
        asked.append(int(inputs))
        inner(input_ids=IDS + int(inputs))

    found = get_eva_state_dict(
        model,
        torch.arange(4),
        config,
        forward_fn=forward,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda states, *_: states[0].flatten(0, -2),
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    layers = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    assert sorted(found) == sorted(layers), now("peft", "names EVA's layers otherwise")
    for factor in found.values():
        assert factor.shape == (2, model.config.hidden_size), now("peft", "gives other directions")
        near = factor.float() @ factor.float().T
        assert torch.allclose(near, torch.eye(2), atol=1e-3), now(
            "peft", "gives no unit directions"
        )
    assert set(asked) <= {0, 1, 2, 3}, now("peft", "passes on something else than its batches")


def test_names_that_peft_reads_as_experts() -> None:
    config = LoraConfig(target_modules=["down_proj"])
    convert_peft_config_for_transformers(config, mixture("Qwen3Moe"), None)
    assert config.target_parameters, now("peft", "no longer reads down_proj as stacked experts")
    config = LoraConfig(target_modules=["down_proj"])
    convert_peft_config_for_transformers(config, tiny_model(), None)
    assert not config.target_parameters, now("peft", "reads a plain model's layer as experts")


def test_the_name_of_the_attention_in_use() -> None:
    model = tiny_model()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        found = transformers_parts.attention_of(model.config)
        assert found == name, now("transformers", f"calls attention {name} {found}")


def test_weights_that_are_not_drawn_can_be_tied_afterwards() -> None:
    config = tiny_model().config
    config.tie_word_embeddings = True
    state = torch.get_rng_state()
    with transformers_parts.no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    assert torch.equal(torch.get_rng_state(), state), now("transformers", "draws them")
    model.tie_weights()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied, now("transformers", "ties weights elsewhere")


def test_which_architectures_have_a_classifier() -> None:
    class Unknown(PreTrainedConfig):
        model_type = "unknown"

    for config, has in ((Qwen3Config(), True), (MptConfig(), True), (Unknown(), False)):
        found = transformers_parts.has_classifier(config)
        kind = config.model_type
        assert found is has, now("transformers", f"knows classifiers otherwise: {kind} {found}")


def test_weights_go_back_to_the_names_of_files() -> None:
    model = mixture("Mixtral")
    stacked = dict(model.state_dict())
    stored = transformers_parts.revert_weight_conversion(model, stacked)
    expert = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    assert expert in stored, now("transformers", "stores Mixtral's experts otherwise")
    stack = stacked["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(stored[expert], stack[2]), now("transformers", "reverts stacks otherwise")


@pytest.mark.parametrize("tied", [True, False])
def test_which_layers_are_never_quantized(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    kept = set(transformers_parts.get_keys_to_not_convert(model))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kept & linear == {"lm_head"}, now("transformers", f"does not quantize {kept & linear}")


def test_merges_of_scored_pieces() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    scores = {"a": 0.0, "b": 0.0, "c": 0.0, "ab": -1.0, "abc": -3.0, "bc": -2.0}
    merges = [tuple(pair) for pair in transformers_parts.generate_merges(vocab, scores)]
    # Best score first; of one piece, the longer left half first.
    expected = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert merges == expected, now("transformers", f"orders merges otherwise: {merges}")


def test_frequencies_of_scaled_positions() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = tiny_model(rope_parameters=rope)
    found, scale = transformers_parts.ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    own = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    # Waves longer than the original context are slowed by the factor, those of a quarter are not.
    waves = 2 * torch.pi / own
    long, short = waves > 16, waves < 4
    assert bool(long.any()), "the case has no long waves"
    torch.testing.assert_close(found[long], own[long] / 8)
    torch.testing.assert_close(found[short], own[short])
    assert scale == 1.0, now("transformers", "scales attention for llama3")


def test_keywords_of_the_decoder_reach_attention() -> None:
    seen: list[dict[str, Any]] = []

    def watch(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append({"segments": None, **options, "layer": module.layer_idx, "mask": mask})
        return query.transpose(1, 2), None

    AttentionInterface.register("contract", watch)
    model = tiny_model()
    model.set_attn_implementation("contract")
    mark = (("a segment",),)
    with torch.no_grad():
        model.get_decoder()(input_ids=IDS, use_cache=False, segments=mark)
    assert [one["layer"] for one in seen] == [0, 1], now("transformers", "numbers layers otherwise")
    for one in seen:
        assert one["segments"] is mark, now("transformers", "keeps keywords from attention")
        assert one["mask"] is None, now("transformers", "makes a mask for unknown attention")


def test_what_a_cache_layer_is_asked() -> None:
    for name in ("update", "get_mask_sizes", "get_seq_length", "lazy_initialization"):
        assert callable(getattr(DynamicLayer, name, None)), now("transformers", f"has no {name}")
    layer = DynamicLayer()
    assert layer.is_initialized is False, now("transformers", "starts cache layers otherwise")
    layer.lazy_initialization(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert layer.is_initialized, now("transformers", "starts cache layers otherwise")


def test_what_a_norm_says_about_itself() -> None:
    norm = LlamaRMSNorm(8, eps=1e-3)
    names = list(inspect.signature(type(norm).forward).parameters)
    assert len(names) == 2, now("transformers", f"calls norms with {names}")
    found = getattr(norm, "variance_epsilon", None)
    assert found == 1e-3, now("transformers", "keeps the epsilon of RMSNorm elsewhere")
