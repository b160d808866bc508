"""Whole PPO runs on the tiny base: what they learn, what must not change them, how they end.

Float32 sums in another order differ by some 1e-7; Adam divides by the root of the second moment,
which makes 1e-5 of it where a gradient is near zero.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from running import (
    KILL_AFTER,
    adapter_of,
    furthest,
    make_ppo_recipe,
    make_preference_recipe,
    make_prompts,
    steps_of,
    train,
    without_times,
    write_rows,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.models.adapters.files import HEAD_KEY
from alignkit.runtime.metrics import read_metrics
from alignkit.stages.ppo import step as ppo_step

pytestmark = pytest.mark.slow  # whole runs

ADAPTER = "adapter/adapter_model.safetensors"
VALUE = "value/adapter_model.safetensors"
DENSE = "merged/model.safetensors"
FULL: dict[str, Any] = {"adapter": {"kind": "full"}, "training__learning_rate": 3e-4, "merge": True}
STILL = {"training__learning_rate": 1e-30, "value": {"learning_rate": 1e-30}}
"""Steps that move no float32 weight."""


def run_of(folder: Path, base: Path, *overrides: str, **fields: Any) -> Path:
    """Two steps of two passes, unless the fields say otherwise."""
    fields = {"objective": {"epochs": 2}, "training__max_steps": 2, **fields}
    train(make_ppo_recipe(folder, base, **fields), *overrides)
    return folder / "run"


def samples_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def about(run: Path) -> Any:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def value_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / VALUE)


def assert_equal_runs(one: Path, two: Path) -> None:
    """Every metric and every trained weight, to 1e-5."""
    for mine, other in zip(without_times(one), without_times(two), strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for file in (ADAPTER, VALUE, DENSE):
        assert (one / file).is_file() == (two / file).is_file()
        if (one / file).is_file():
            assert furthest(load_file(one / file), load_file(two / file)) < 1e-5


@contextmanager
def taken_over() -> Iterator[list[bool]]:
    """Whether each step's first update takes over the outputs that it was scored with."""
    found: list[bool] = []
    score = ppo_step.score_rollouts

    def record(*about: Any, **options: Any) -> Any:
        scored, outputs = score(*about, **options)
        found.append(outputs is not None)
        return scored, outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_step, "score_rollouts", record)
        yield found


def assert_moved(run: Path) -> None:
    """Otherwise "equal" would say nothing."""
    steps = steps_of(run)
    assert max(abs(step["kl/k1"]) for step in steps[1:]) > 1e-3
    assert len({round(step["value_loss"], 5) for step in steps}) == len(steps)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run with every pass over all responses at once."""
    folder = tmp_path_factory.mktemp("reference")
    with taken_over() as found:
        run = run_of(folder, tiny_base, "training.microbatch_tokens=4096")
    assert set(found) == {True}
    assert_moved(run)
    return run


@pytest.fixture(scope="module")
def reward_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over the tiny base, with its merged form."""
    folder = tmp_path_factory.mktemp("reward")
    train(make_preference_recipe(folder, tiny_base, "reward", merge=True))
    return folder / "run"


# Learning --------------------------------------------------------------------------------------

LEARNING_STEPS, LEARNING_RATE = 14, 3e-3

NAMES = {
    *("reward", "kl/k1", "kl/k3", "kl_coef", "clip_fraction", "value_loss", "policy_loss"),
    *("explained_variance", "entropy", "response_length", "eos_rate", "loss", "score"),
    *("reward_std", "approx_kl", "grad_norm", "value_grad_norm", "learning_rate", "tokens"),
    *("value_learning_rate", "responses", "epoch", "step_seconds", "tokens_per_second"),
    *("memory_gb", "sampling_seconds", "reward/regex"),
}


@pytest.mark.slow
def test_a_rule_is_learned_and_the_folder_is_whole(tiny_base: Path, tmp_path: Path) -> None:
    # Below temperature 1 the random base is sharp enough for a low-rank adapter to turn it.
    write_rows(tmp_path / "rows.jsonl", make_prompts(4))
    held = write_rows(tmp_path / "held.jsonl", make_prompts(8, seed=5))
    run = run_of(
        tmp_path,
        tiny_base,
        adapter={"kind": "lora", "rank": 16, "alpha": 32},
        rollout={
            "prompts_per_step": 4,
            "samples_per_prompt": 12,
            "max_new_tokens": 2,
            "temperature": 0.5,
            "missing_eos_penalty": None,
        },
        objective={},
        data__eval=[{"path": str(held)}],
        training__max_steps=LEARNING_STEPS,
        training__learning_rate=LEARNING_RATE,
        training__schedule="constant",
        merge=True,
    )
    steps = steps_of(run)
    first, last = steps[:4], steps[-4:]
    gain = sum(s["reward"] for s in last) / 4 - sum(s["reward"] for s in first) / 4
    # Mean of 4 · 48 responses on either side.
    error = math.sqrt(sum(s["reward_std"] ** 2 / 48 for s in (*first, *last))) / 4
    assert gain > 2 * error
    assert steps[0]["kl/k1"] == pytest.approx(0.0, abs=1e-5)
    assert 0.1 < steps[-1]["kl/k1"] < 8.0
    for step in steps:
        assert step.keys() >= NAMES
        assert all(math.isfinite(step[name]) for name in NAMES)
        assert step["kl/k3"] >= -1e-6
        assert step["responses"] == 48
        assert 1 <= step["response_length"] <= 2
    before, after = (line for line in read_metrics(run / "metrics.jsonl") if "eval/reward" in line)
    assert before["eval/kl/k1"] == pytest.approx(0.0, abs=1e-5)
    assert after["eval/kl/k1"] > 0.01
    assert after["eval/reward_gain"] == pytest.approx(
        after["eval/reward"] - before["eval/reward"], abs=1e-5
    )
    assert before["eval/prompts"] == 8
    assert_samples(run, shown=8, held_out=8 * 12, steps=LEARNING_STEPS)
    assert (run / ADAPTER).is_file()
    assert {name.rsplit(".", 2)[1] for name in value_of(run)} >= {"lora_A", "lora_B", "score"}
    policy: Any = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert furthest(policy.state_dict(), base.state_dict()) > 1e-3
    summary = about(run)["summary"]
    assert about(run)["status"] == "finished"
    assert summary["merge"]["mean_kl"] < 1e-6 < summary["merge"]["mean_kl_to_base"]


def assert_samples(run: Path, *, shown: int, held_out: int, steps: int) -> None:
    """Responses of step 1, every tenth and the last; all held-out ones before and after."""
    lines = samples_of(run)
    count: dict[tuple[str, int], int] = {}
    for line in lines:
        assert line.keys() == {
            *("step", "rows", "place", "prompt", "response", "finish", "reward", "rewards", "kl"),
        }
        assert line["finish"] in ("stop", "length")
        assert line["rewards"] == {"regex": line["reward"]}
        assert line["reward"] == float("e" in line["response"])
        assert line["prompt"][-1]["role"] == "user"
        key = line["rows"], line["step"]
        count[key] = count.get(key, 0) + 1
    told = {s for s in range(1, steps + 1) if s in (1, steps) or s % 10 == 0}
    expected = {("train", step): shown for step in told}
    assert count == {**expected, ("held_out", 0): held_out, ("held_out", steps): held_out}


@pytest.mark.slow
def test_steps_of_no_length_change_nothing(tiny_base: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", make_prompts(4, seed=5))
    run = run_of(
        tmp_path,
        tiny_base,
        data__eval=[{"path": str(held)}],
        training__max_steps=4,
        training__eval_every=2,
        merge=True,
        **STILL,
    )
    for step in steps_of(run):
        for name in ("kl/k1", "kl/k3", "approx_kl"):
            assert step[name] == pytest.approx(0.0, abs=1e-7), name
        assert step["clip_fraction"] == 0.0
        assert step["policy_loss"] == pytest.approx(0.0, abs=1e-6)  # whitened: mean 0
    assert sum(step["grad_norm"] > 0 for step in steps_of(run)) > 2, "there was something to learn"
    for name, weight in adapter_of(run).items():
        if "lora_B" in name:
            assert weight.abs().max() < 1e-20
    base = load_file(tiny_base / "model.safetensors")
    assert furthest(load_file(run / DENSE), base) < 1e-20
    assert value_of(run)[HEAD_KEY].abs().max() < 1e-20
    evaluations = [line for line in read_metrics(run / "metrics.jsonl") if "eval/reward" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    for line in evaluations[1:]:  # the same random numbers, so the same responses
        assert (line["eval/reward"], line["eval/reward_gain"]) == (evaluations[0]["eval/reward"], 0)
    held_out = [line for line in samples_of(run) if line["rows"] == "held_out"]
    said = [[line["response"] for line in held_out if line["step"] == s] for s in (0, 2, 4)]
    assert said[0] == said[1] == said[2]


# One base, four models -------------------------------------------------------------------------

REWARDED = {"objective": {}, "training__schedule": "constant"}


@pytest.mark.slow
def test_shared_and_separate_models_are_the_same_run(
    tiny_base: Path, reward_run: Path, tmp_path: Path
) -> None:
    sources = {
        "shared": {"model": str(reward_run)},
        "separate": {"model": str(reward_run / "merged"), "separate": True},
    }
    runs = [
        run_of(tmp_path / name, tiny_base, reward=source, value={"init": "fresh"}, **REWARDED)
        for name, source in sources.items()
    ]
    roles = [json.loads((run / "plan.json").read_text("utf-8"))["roles"][-1] for run in runs]
    assert "a further adapter over the same base" in roles[0]
    assert "a model of its own" in roles[1]
    assert_moved(runs[0])
    assert_equal_runs(*runs)
    rewards = [[line["reward"] for line in samples_of(run)] for run in runs]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


@pytest.mark.slow
def test_the_value_model_starts_from_the_reward_model(
    tiny_base: Path, reward_run: Path, tmp_path: Path
) -> None:
    one = {"reward": {"model": str(reward_run)}, "training__max_steps": 1}
    run = run_of(tmp_path, tiny_base, **one, **STILL)
    reward, value = load_file(reward_run / ADAPTER), value_of(run)
    statistics = json.loads((reward_run / "adapter" / "reward.json").read_text("utf-8"))
    bias = value.pop(HEAD_KEY.replace("weight", "bias"))
    assert float(bias) == pytest.approx(-statistics["mean"] / statistics["std"], rel=1e-6)
    expected = {**reward, HEAD_KEY: reward[HEAD_KEY] / statistics["std"]}
    assert furthest(value, expected) < 1e-6
    # The value at the last token but one is near the normalized reward of the whole response.
    fresh = {**STILL, "value": {"init": "fresh", "learning_rate": 1e-30}}
    plain = run_of(tmp_path / "fresh", tiny_base, **one, **fresh)
    assert steps_of(plain)[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert steps_of(run)[0]["explained_variance"] != pytest.approx(0.0, abs=1e-2)


@pytest.mark.slow
def test_the_dropout_of_a_reward_run_stays_there(tiny_base: Path, tmp_path: Path) -> None:
    lora = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.5}
    fields = {"adapter": lora, "merge": True, "training__max_steps": 2}
    train(make_preference_recipe(tmp_path / "rm", tiny_base, "reward", **fields))
    found = []
    for name, more in {"run": {}, "run/merged": {"separate": True}}.items():
        source = {"model": str(tmp_path / "rm" / name), **more}
        folder = tmp_path / name.replace("/", "-")
        run = run_of(folder, tiny_base, reward=source, **STILL)
        found.append([(s["reward"], s["reward_std"]) for s in steps_of(run)])
    for mine, other in zip(*found, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


Recorded = list[tuple[Sequence[Any], Any]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A list that fills with the rollouts of every step, and their log-probs and values."""
    found: Recorded = []
    score = ppo_step.score_rollouts

    def record(roles: Any, rollouts: Any, groups: Any, **options: Any) -> Any:
        scored, outputs = score(roles, rollouts, groups, **options)
        found.append((rollouts, scored))
        return scored, outputs

    monkeypatch.setattr(ppo_step, "score_rollouts", record)
    return found


class Naive:
    """PPO as the papers write it: four plain models, padded batches, full logits, float64 GAE."""

    def __init__(self, base: Path, start: Path, reward: Path, temperature: float) -> None:
        self.temperature = temperature
        self.policy = self.lora(base, load_file(start / ADAPTER))
        self.reference = self.plain(base)
        weights = load_file(start / VALUE)
        self.head = nn.Linear(64, 1)
        self.head.weight.data = weights.pop(HEAD_KEY)
        self.head.bias.data = weights.pop(HEAD_KEY.replace("weight", "bias"))
        self.value = self.lora(base, weights)
        self.classifier: Any = AutoModelForSequenceClassification.from_pretrained(
            reward / "merged", dtype=torch.float32
        )
        self.statistics = json.loads((reward / "merged" / "reward.json").read_text("utf-8"))
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        valued = [p for p in self.value.parameters() if p.requires_grad]
        valued += list(self.head.parameters())
        self.optimizers = [
            (weights, torch.optim.Adam(weights, lr=rate, eps=1e-5))
            for weights, rate in ((trained, 2e-3), (valued, 6e-3))
        ]

    def plain(self, base: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def lora(self, base: Path, weights: dict[str, torch.Tensor]) -> Any:
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.plain(base), config)
        assert not set_peft_model_state_dict(model, weights).unexpected_keys
        return model

    def batch(self, rollouts: Sequence[Any]) -> None:
        """Padded ids of prompts with their responses, and where each response begins and ends."""
        pairs = [(r.prompt.ids.tolist(), c.ids.tolist()) for r in rollouts for c in r.sampled]
        self.starts = [len(prompt) for prompt, _ in pairs]
        self.lengths = [len(response) for _, response in pairs]
        width = max(map(sum, zip(self.starts, self.lengths, strict=True)))
        self.ids = torch.zeros(len(pairs), width, dtype=torch.int64)
        self.there = torch.zeros(len(pairs), width, dtype=torch.int64)
        for row, (prompt, response) in enumerate(pairs):
            ids = prompt + response
            self.ids[row, : len(ids)] = torch.tensor(ids)
            self.there[row, : len(ids)] = 1
        self.cut = torch.tensor([c.finish == "length" for r in rollouts for c in r.sampled])
        self.mask = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    def responses(self, whole: torch.Tensor) -> torch.Tensor:
        """`[B, T]` of the values one place before each response token."""
        out = torch.zeros(self.mask.shape, dtype=whole.dtype)
        for row, (start, n) in enumerate(zip(self.starts, self.lengths, strict=True)):
            out[row, :n] = whole[row, start - 1 : start - 1 + n]
        return out

    def logprobs(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=self.ids, attention_mask=self.there).logits / self.temperature
        every = logits.log_softmax(-1)
        said = every[:, :-1].gather(2, self.ids[:, 1:, None])[..., 0]
        entropy = -(every.exp() * every).sum(-1)
        return self.responses(said), self.responses(entropy)

    def values(self) -> torch.Tensor:
        decoder = self.value.base_model.model.model
        hidden = decoder(input_ids=self.ids, attention_mask=self.there).last_hidden_state
        return self.responses(self.head(hidden)[..., 0])

    def rewards(self) -> torch.Tensor:
        inner = self.classifier.model
        hidden = inner(input_ids=self.ids, attention_mask=self.there).last_hidden_state
        ends = self.there.sum(1) - 1
        raw = self.classifier.score(hidden[torch.arange(len(ends)), ends])[:, 0]
        return (raw - self.statistics["mean"]) / self.statistics["std"]

    def gae(
        self, score: torch.Tensor, kl: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """β = 0.05, γ = 1, λ = 0.95, one token after the other."""
        found, returns = torch.zeros(2, *self.mask.shape, dtype=torch.float64)
        for row, n in enumerate(self.lengths):
            later = 0.0
            for t in reversed(range(n)):
                earned = -0.05 * kl[row, t].item() + (score[row].item() if t == n - 1 else 0.0)
                following = values[row, t + 1].item() if t < n - 1 else 0.0
                later = earned + following - values[row, t].item() + 0.95 * later
                found[row, t], returns[row, t] = later, later + values[row, t].item()
        flat = found[self.mask]
        return (found - flat.mean()) / (flat.std(correction=0) + 1e-8), returns

    def step(self, rollouts: Sequence[Any]) -> dict[str, float]:
        self.batch(rollouts)
        mask = self.mask
        with torch.no_grad():
            old, entropy = self.logprobs(self.policy)
            kl = (old - self.logprobs(self.reference)[0]) * mask
            old_values, reward = self.values(), self.rewards()
        score = reward - 1.0 * self.cut
        advantage, returns = self.gae(score, kl, old_values)
        losses = []
        for _ in range(4):
            ratio = (self.logprobs(self.policy)[0] - old).exp()
            gains = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            values = self.values()
            near = old_values + (values - old_values).clamp(-0.2, 0.2)
            errors = torch.maximum((values - returns).square(), (near - returns).square()) / 2
            policy_loss, value_loss = -gains[mask].mean(), errors[mask].mean()
            (policy_loss + 0.1 * value_loss).backward()
            for weights, optimizer in self.optimizers:
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append((policy_loss.item(), value_loss.item()))
        policy_loss, value_loss = (sum(column) / 4 for column in zip(*losses, strict=True))
        residual = (returns - old_values)[mask].var(correction=0)
        return {
            "loss": policy_loss + 0.1 * value_loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "reward": reward.mean().item(),
            "score": score.mean().item(),
            "kl/k1": kl.sum(1).mean().item(),
            "kl/k3": ((torch.exp(-kl) - 1 + kl) * mask).sum(1).mean().item(),
            "entropy": (entropy.sum(1) / mask.sum(1)).mean().item(),
            "explained_variance": (1 - residual / returns[mask].var(correction=0)).item(),
            "response_length": mask.sum(1).double().mean().item(),
            "eos_rate": 1 - self.cut.double().mean().item(),
        }


@pytest.mark.slow
def test_four_plain_models_and_a_naive_loop_agree(
    tiny_base: Path, reward_run: Path, tmp_path: Path, recorded: Recorded
) -> None:
    temperature = 0.7
    fields: dict[str, Any] = {
        **REWARDED,
        "reward": {"model": str(reward_run)},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6, "temperature": temperature},
        "value": {"init": "fresh"},
    }
    start = {**fields, **STILL, "value": {"init": "fresh", "learning_rate": 1e-30}}
    start |= {"training__max_steps": 1, "objective": {"epochs": 1}}
    before = run_of(tmp_path / "start", tiny_base, **start)
    recorded.clear()
    run = run_of(tmp_path / "run", tiny_base, **fields)
    naive = Naive(tiny_base, before, reward_run, temperature)
    assert len(recorded) == 2
    for (rollouts, scored), mine in zip(recorded, steps_of(run), strict=True):
        found = naive.step(rollouts)
        for name, value in found.items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        # What was sampled is what is scored.
        for row, said in enumerate(c for r in rollouts for c in r.sampled):
            sampled = torch.from_numpy(said.logprobs)
            assert (scored.policy[row, : len(sampled)] - sampled).abs().max() < 1e-4
    assert_moved(run)
    for model, file in ((naive.policy, ADAPTER), (naive.value, VALUE)):
        trained = load_file(run / file)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                key = name.replace(".default", "")
                assert (trained[key] - weight).abs().max() < 1e-5, name
    assert (value_of(run)[HEAD_KEY] - naive.head.weight).abs().max() < 1e-5


# Invariance ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_micro_batches(reference: Path, tiny_base: Path, tmp_path: Path) -> None:
    with taken_over() as found:
        run = run_of(tmp_path, tiny_base, "training.microbatch_tokens=16")
    assert set(found) == {False}
    assert_equal_runs(run, reference)


def test_gradient_checkpointing(reference: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_base, "training.gradient_checkpointing=true")
    assert_equal_runs(run, reference)


SHAPES: dict[str, dict[str, Any]] = {
    "minibatches and samples": {
        "objective": {"minibatches": 2, "epochs": 2},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6, "samples_per_prompt": 2},
    },
    "value head": {"value": {"kind": "head"}, "merge": True},
    "full weights": FULL,
    "full weights, value head": {**FULL, "value": {"kind": "head"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_and_their_micro_batches(case: str, tiny_base: Path, tmp_path: Path) -> None:
    with taken_over() as found:
        runs = [
            run_of(tmp_path / str(tokens), tiny_base, *more, **SHAPES[case])
            for tokens, more in {
                4096: ["training.microbatch_tokens=4096"],
                60: ["training.microbatch_tokens=60", "training.gradient_checkpointing=true"],
            }.items()
        ]
    # After another minibatch's step, earlier outputs are those of another policy.
    assert found[0] == (case != "minibatches and samples")
    assert_moved(runs[0])
    assert_equal_runs(*runs)
    file = DENSE if "full" in case else ADAPTER
    assert (runs[0] / file).is_file()
    assert (runs[0] / VALUE).exists() == (case == "minibatches and samples")
    samples = 2 if case == "minibatches and samples" else 1
    assert steps_of(runs[0])[0]["responses"] == 4 * samples
    if "value head" in case:
        assert_a_language_model(runs[0])


def assert_a_language_model(run: Path) -> None:
    """What is written of a policy that carries the value head says nothing of it."""
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    config = json.loads((run / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    if (run / ADAPTER).is_file():
        stored = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
        assert stored["task_type"] == "CAUSAL_LM"


def test_a_response_depends_on_its_own_random_numbers(
    reference: Path, tiny_base: Path, tmp_path: Path
) -> None:
    rollout = {"prompts_per_step": 4, "max_new_tokens": 6, "samples_per_prompt": 2}
    twice = run_of(tmp_path, tiny_base, rollout=rollout, training__max_steps=1)
    one, two = (
        [line["response"] for line in samples_of(run) if line["step"] == 1]
        for run in (reference, twice)
    )
    assert one == two[::2]
    assert len(set(two)) == 8


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    fields = FULL if kind == "full" else {}
    run = run_of(tmp_path, tiny_base, model__dtype="bfloat16", **fields)
    first = steps_of(run)[0]
    assert first["kl/k1"] == pytest.approx(0.0, abs=1e-5)
    assert_moved(run)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_base(quantization: str, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    fields = {"model__quantization": quantization, "merge": True}
    run = run_of(tmp_path, tiny_base, **fields)
    assert steps_of(run)[0]["kl/k1"] == pytest.approx(0.0, abs=1e-5)
    assert_moved(run)
    AutoModelForCausalLM.from_pretrained(run / "merged")


@pytest.mark.slow
def test_processes(
    alignkit: CommandLine, tiny_base: Path, reward_run: Path, tmp_path: Path
) -> None:
    # Equal shares of the first step; its fifth prompt leaves one process nothing in the second.
    held = write_rows(tmp_path / "held.jsonl", make_prompts(3, seed=5))
    runs = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_rows(folder / "rows.jsonl", make_prompts(5))
        recipe = make_ppo_recipe(
            folder,
            tiny_base,
            reward=[{"model": str(reward_run)}, {"rule": "regex", "pattern": "e"}],
            data__eval=[{"path": str(held)}],
            objective={"epochs": 2},
            training__max_steps=3,
        )
        if count == 1:
            train(recipe)
        else:
            done = alignkit.together(2, "ppo", recipe, cwd=folder)
            assert done.code == 0, done.stderr
            assert done.stderr.count("step 3/3") == 1, "one process speaks"
        runs.append(folder / "run")
    one, two = runs
    assert furthest(adapter_of(one), adapter_of(two)) < 1e-5
    assert furthest(value_of(one), value_of(two)) < 1e-5
    assert_moved(one)
    for mine, other in zip(without_times(one), without_times(two), strict=True):
        gains = {f"eval/reward_gain{end}" for end in ("", "_low", "_high")}
        assert mine.keys() - other.keys() == gains & mine.keys()
        for name in other.keys() - {"distinct_2"}:  # that is of the first process's texts
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


# Resuming: every kind of PPO run is interrupted in test_resume_kinds.py ------------------------

RARELY = "training.save_every=100"


def resumable(folder: Path, base: Path) -> Path:
    """Four steps whose price of KL changes after each."""
    fields: dict[str, Any] = {
        "objective": {"kl_target": 0.01, "kl_horizon": 8, "epochs": 2},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6, "samples_every": 1},
        "training__eval_every": 2,
        "data__eval_fraction": 0.2,
        "merge": True,
    }
    return make_ppo_recipe(folder, base, **fields)


def assert_same(run: Path, whole: Path) -> None:
    assert without_times(run) == without_times(whole)
    for file in (ADAPTER, VALUE, DENSE):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file

    def shown(folder: Path) -> list[dict[str, Any]]:
        found = samples_of(folder)
        return [{**s, "place": s["place"].rpartition("/")[2]} for s in found]

    assert shown(run) == shown(whole)
    assert about(run)["status"] == "finished"


@pytest.mark.slow
def test_a_scheduler_that_ends_a_run_saves_it(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    train(resumable(tmp_path / "whole", tiny_base), RARELY)
    recipe = resumable(tmp_path, tiny_base)
    stop = KILL_AFTER.replace("STEP", "2").replace("SIGKILL", "SIGTERM")
    done = alignkit("ppo", recipe, RARELY, cwd=tmp_path, before=stop)
    assert done.code == 143, done.stderr
    assert steps_of(tmp_path / "run")[-1]["step"] == 2
    text = done.stderr.replace("\n", " ")
    assert "stopped after step 2 of 4; a checkpoint was saved" in text
    assert "hint: continue with --resume" in text
    assert about(tmp_path / "run")["status"] == "interrupted"
    resumed = alignkit("ppo", recipe, RARELY, "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert "resuming after step 2" in resumed.stderr
    assert_same(tmp_path / "run", tmp_path / "whole" / "run")


# Guard and rewards that fail -------------------------------------------------------------------

FAR = {"training__learning_rate": 2e-2, "training__schedule": "constant", "seed": 1}
"""Steps that soon move the policy far from the reference."""


def test_the_guard_stops(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    fields = {"guard": {"max_kl": 0.05}, "training__save_every": 100, **FAR}
    recipe = make_ppo_recipe(tmp_path, tiny_base, **{**fields, "training__max_steps": 8})
    done = alignkit("ppo", recipe, cwd=tmp_path)
    assert done.code == 2, done.stderr
    run = tmp_path / "run"
    last = steps_of(run)[-1]
    assert last["step"] < 8
    assert [s["kl/k1"] > 0.05 for s in steps_of(run)] == [False] * (last["step"] - 1) + [True]
    text = done.stderr.replace("\n", " ")
    kl = f"{last['kl/k1']:.3g}"
    assert f"the guard stopped the run: the KL of a response is {kl} nats, above" in text
    assert "guard.max_kl = 0.05; a checkpoint was saved" in text
    assert "hint: start anew with a higher objective.kl_coef" in text
    assert "Traceback" not in text
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert saved == [f"step-{last['step']:06d}"]
    assert about(run)["status"] == "failed"
    assert not (run / "adapter").exists()


def test_the_guard_raises_the_price(tiny_base: Path, tmp_path: Path) -> None:
    fields = {"guard": {"max_kl": 0.05, "action": "raise_kl"}, "training__max_steps": 4, **FAR}
    steps = steps_of(run_of(tmp_path, tiny_base, **fields))
    assert any(step["kl/k1"] > 0.05 for step in steps[:-1])
    for step, following in itertools.pairwise(steps):
        factor = 1.5 if step["kl/k1"] > 0.05 else 1.0
        assert following["kl_coef"] == pytest.approx(factor * step["kl_coef"])


@pytest.mark.slow
def test_below_its_limit_the_guard_changes_nothing(
    reference: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path, tiny_base, "training.microbatch_tokens=4096", guard={"max_kl": 1e6})
    assert without_times(run) == without_times(reference)


SCORE = """\
calls = []


def score(prompts, completions, **columns):
    calls.append(len(completions))
    # CHECK
    return [float("e" in text) for text in completions]
"""


def make_scored(folder: Path, base: Path) -> Path:
    folder.mkdir()
    (folder / "score.py").write_text(SCORE, encoding="utf-8")
    return make_ppo_recipe(
        folder,
        base,
        reward={"function": str(folder / "score.py:score")},
        objective={"epochs": 2},
        data__eval_fraction=0.25,
        training__save_every=100,
        training__max_steps=3,
        merge=True,
    )


@pytest.fixture(scope="module")
def scored_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reward function never fails."""
    folder = tmp_path_factory.mktemp("scored") / "whole"
    train(make_scored(folder, tiny_base))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calls", "done_steps", "given"),
    [
        # The dry run is the first call, the evaluation before step 1 the second, step 2 the fourth.
        pytest.param(4, 1, 4, id="a step"),
        pytest.param(6, 3, 3, id="the last evaluation"),
    ],
)
def test_a_reward_function_that_fails_loses_no_step(
    calls: int,
    done_steps: int,
    given: int,
    alignkit: CommandLine,
    scored_run: Path,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "failed"
    recipe = make_scored(folder, tiny_base)
    broken = f'assert len(calls) < {calls}, "out of luck"'
    (folder / "score.py").write_text(SCORE.replace("# CHECK", broken), encoding="utf-8")
    done = alignkit("ppo", recipe, cwd=folder)
    assert done.code == 2, done.stderr
    assert "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    assert f"score raised AssertionError: out of luck, given {given} completions" in text
    assert "score.py:6: " in text
    assert f"hint: the line is `{broken}`" in text
    run = folder / "run"
    assert [step["step"] for step in steps_of(run)] == list(range(1, done_steps + 1))
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert names == [f"step-00000{done_steps}"]
    assert about(run)["status"] == "failed"
    (folder / "score.py").write_text(SCORE, encoding="utf-8")
    done = alignkit("ppo", recipe, "--resume", cwd=folder)
    assert done.code == 0, done.stderr
    assert f"resuming after step {done_steps}" in done.stderr
    assert_same(run, scored_run)
    whole, failed = (about(path)["summary"] for path in (scored_run, run))
    assert failed["after"] == whole["after"] != whole["before"]


def test_the_value_loss_of_a_shared_model_has_its_weight(tiny_base: Path, tmp_path: Path) -> None:
    # The head is zero at first: its loss reaches the shared weights in the second step.
    runs = []
    for weight in (0.1, 10.0):
        recipe = make_ppo_recipe(
            tmp_path / str(weight),
            tiny_base,
            value={"kind": "head"},
            objective={"value_weight": weight, "epochs": 1},
            training__max_steps=2,
            training__max_grad_norm=None,
        )
        train(recipe)
        runs.append(adapter_of(tmp_path / str(weight) / "run"))
    assert furthest(*runs) > 1e-6
