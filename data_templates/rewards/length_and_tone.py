"""A reward function to copy: responses of one short paragraph that do not apologise.

In a recipe: `reward: {function: data_templates/rewards/length_and_tone.py:score}`.
"""

WORDS = range(20, 61)  # in a short paragraph
APOLOGIES = ("sorry", "apologi", "as an ai", "i cannot", "i can't")


def score(prompts, completions, **columns):
    """One number for each completion: from 0 to 1 for the length, minus 1 for an apology.

    Args:
        prompts: what was asked: text, or a list of turns with `role` and `content`.
        completions: the policy's responses, as text, in the same order.
        columns: every other column of the rows, as a list with one entry for each completion. Name
            one to use it: `def score(prompts, completions, answer, **columns)`.
    """
    return [_length(completion) - _apologises(completion) for completion in completions]


def _length(completion):
    words = len(completion.split())
    if words in WORDS:
        return 1.0
    # A slow fall, instead of a drop to 0, tells the policy which way to go.
    distance = WORDS[0] - words if words < WORDS[0] else words - WORDS[-1]
    return max(0.0, 1.0 - distance / WORDS[0])


def _apologises(completion):
    return float(any(word in completion.lower() for word in APOLOGIES))
