"""What a rollout is worth: plain functions of completions, from the package or from a file of the user's.

    def f(completions, prompts, completion_ids, finish_reasons, step, **columns) -> list[float | None]

called once a batch with keywords, sync or async; ``columns`` holds a list for every column of the records, ``solution``
falling back to a record's last answer. ``None`` abstains. A completion's reward is the sum of weight x value
(``score.py`` has the exact rule). No torch here: functions run on the one rank that reads, beside the training.
"""

from megatron_omni.rewards.score import RewardError, Rewards, Scores, columns_of

__all__ = ["RewardError", "Rewards", "Scores", "columns_of"]
