"""Learning rates of each stage and adapter: the default, and what is usual."""

from __future__ import annotations

DEFAULT_LEARNING_RATE = {
    "sft": {"lora": 2.0e-4, "ia3": 3.0e-3, "prefix": 3.0e-2, "projection": 5.0e-4, "full": 2.0e-5},
    "reward": {"lora": 1.0e-4, "ia3": 3.0e-3, "full": 1.0e-5},
    "dpo": {"lora": 2.0e-5, "ia3": 5.0e-4, "prefix": 3.0e-3, "projection": 1.0e-4, "full": 5.0e-7},
    "kto": {"lora": 2.0e-5, "ia3": 5.0e-4, "prefix": 3.0e-3, "projection": 1.0e-4, "full": 1.0e-6},
    "ppo": {"lora": 2.0e-5, "full": 1.0e-6},
}
"""Stage -> adapter -> peak learning rate. Preference losses move all answers of a kind at once, so
they take far smaller steps than imitation."""

USUAL_RATES = {
    "sft": {
        "lora": (1e-5, 1e-3),
        "ia3": (3e-4, 3e-2),
        "prefix": (1e-3, 2e-1),
        "projection": (1e-5, 3e-3),
        "full": (5e-7, 1e-4),
    },
    "reward": {"lora": (1e-5, 1e-3), "ia3": (3e-4, 3e-2), "full": (1e-6, 1e-4)},
    "dpo": {
        "lora": (1e-6, 5e-4),
        "ia3": (1e-5, 1e-2),
        "prefix": (1e-4, 5e-2),
        "projection": (1e-6, 1e-3),
        "full": (5e-8, 1e-5),
    },
    "ppo": {"lora": (1e-6, 5e-4), "full": (5e-8, 1e-5)},
}
"""Stage -> adapter -> usual range of the learning rate; a prefix through a network is a
`projection`."""

USUAL_RATES["kto"] = USUAL_RATES["dpo"]
