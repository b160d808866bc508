"""The stages that come with alignkit; a new one is an entry here. Imports nothing."""

from __future__ import annotations

BUILT_IN = {
    "sft": (
        "alignkit.recipe.stages.sft:SftRecipe",
        "Fine-tune on demonstrations, with prompt-masked loss.",
    ),
    "reward": (
        "alignkit.recipe.stages.reward:RewardRecipe",
        "Train a reward model on preference pairs (Bradley-Terry).",
    ),
    "dpo": (
        "alignkit.recipe.stages.dpo:DpoRecipe",
        "Optimize preferences on pairs: DPO, IPO, SimPO, ORPO and relatives.",
    ),
    "kto": (
        "alignkit.recipe.stages.kto:KtoRecipe",
        "Optimize preferences on single completions labelled good or bad.",
    ),
    "ppo": (
        "alignkit.recipe.stages.ppo:PpoRecipe",
        "Reinforcement learning from a reward model, a rule or a function, with a KL penalty.",
    ),
    "grpo": (
        "alignkit.recipe.stages.grpo:GrpoRecipe",
        "Reinforcement learning from rewards of groups of responses, without a value model.",
    ),
}
"""Name -> `module:class` of its recipe, and the help text of its command."""

GROUP = "alignkit.stages"
"""Entry-point group in which packages name the recipe classes of further stages."""
