"""GRPO against TRL's own loss, over the same responses and advantages: values and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from alignkit.data.documents import Branch, Document
from alignkit.data.prompts import Prompt
from alignkit.generation.sampled import SampledResponse
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.objectives.group_relative import group_advantages
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.stages.grpo import GrpoRecipe, GrpoSpec
from alignkit.stages.grpo.update import Groups, GroupUpdater, Minibatch
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Scored

LONGEST = 9
PROMPTS, LENGTHS = [5, 8], [[4, 9, 2], [7, 3, 6]]
PRICE = 0.1

# TRL's configuration, ours
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"loss": "sequence_mean"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"kind": "dapo"}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": False}, {"kind": "dr_grpo"}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"kind": "cispo"}),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        {"kind": "gspo"},
    ),
    "grpo with kl": (
        # The paper's k3, which TRL multiplies by the ratio unless told otherwise.
        {"loss_type": "dapo", "beta": PRICE, "use_bias_correction_kl": False},
        {"kl_coef": PRICE},
    ),
}


def policy() -> Any:
    model = attach_adapter(tiny_model(), LoraSpec(kind="lora", rank=2, alpha=4.0), 0)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def rollouts() -> list[Rollout]:
    rng, made = np.random.default_rng(1), []
    for number, (prompt, lengths) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        ids = rng.integers(5, 600, prompt).astype(np.int32)
        own = tuple(
            SampledResponse(rng.integers(5, 600, n), np.zeros(n, np.float32), "stop", 1.0)
            for n in lengths
        )
        branches = tuple(Branch(c.ids.astype(np.int32), np.ones(len(c.ids), bool)) for c in own)
        document = Document(ids, branches, number)
        made.append(Rollout(Prompt(ids, "", None, {}, "a:1"), document, own, ("",) * len(own)))
    return made


def padded(rows: list[torch.Tensor], value: float = 0.0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def trainer_of(model: Any, folder: Path, config: dict[str, Any]) -> Any:
    tokenizer = tiny_tokenizer("chatml")
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "max_completion_length": LONGEST,
        "gradient_checkpointing": False,
        **config,
    }
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda prompts, completions, **columns: [0.0] * len(prompts),
        args=GRPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 6),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
def test_loss_and_gradient_are_trls(case: str, moved: bool, tmp_path: Path) -> None:
    config, objective = CASES[case]
    values = {
        "stage": "grpo",
        "output": "x",
        "model": {"base": "m", "dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "reward": {"rule": "json"},
        "objective": objective,
    }
    spec: GrpoSpec = GrpoRecipe.model_validate_json(json.dumps(values)).with_defaults().objective
    some, lengths = rollouts(), [n for group in LENGTHS for n in group]
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.9, 0.1]], dtype=torch.float64)
    kind: Any = spec.advantage
    advantages = group_advantages(rewards, kind).flatten()
    model = policy()
    trainer = trainer_of(model, tmp_path, config)
    model.train()

    prompts = [r.document.prompt for r in some for _ in r.sampled]
    widest = max(map(len, prompts))
    prompt_ids = torch.stack(
        [torch.from_numpy(np.pad(p, (widest - len(p), 0))).long() for p in prompts]
    )
    prompt_mask = torch.stack([(torch.arange(widest) >= widest - len(p)).long() for p in prompts])
    answers = [torch.from_numpy(c.ids).long() for r in some for c in r.sampled]
    mask = padded([torch.ones(n) for n in lengths]).long()
    inputs: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": padded(answers).long(),
        "completion_mask": mask,
        "advantages": advantages.float(),
        "num_items_in_batch": mask.sum(),
    }
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        now, *_ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompt_ids, inputs["completion_ids"]], 1),
            torch.cat([prompt_mask, mask], 1),
            LONGEST,
        )
    noise, further = torch.randn(2, *now.shape, generator=generator)
    old = now + 0.3 * noise if moved else now
    reference = now + 0.3 * further
    if moved:
        inputs["old_per_token_logps"] = old
    inputs["ref_per_token_logps"] = reference
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    expected = gradients(model)

    scorer = TokenScorer(model, torch.float32).train()
    scored = Scored(old, reference, torch.zeros_like(old), mask.bool())
    groups = Groups(
        some,
        advantages,
        torch.ones(6, dtype=torch.float64),
        scored if moved or spec.kl_coef else None,
        longest=LONGEST,
        kl_coef=spec.kl_coef or 0.0,
    )
    whole = Minibatch([[0, 1]], float(sum(lengths)), 6.0)
    roles: Any = SimpleNamespace(policy=scorer)
    stepper: Any = SimpleNamespace(scale=SimpleNamespace(value=1.0))
    sums = GroupUpdater(roles, spec, stepper).backward(groups, whole, [0, 1])
    found = gradients(model)
    assert float(sums[0]) == pytest.approx(float(loss), abs=1e-4)
    assert found.keys() == expected.keys()
    assert max(float(grad.abs().max()) for grad in expected.values()) > 1e-3
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4, msg=name)
