"""Metrics: pure functions of an answer and its references, each with its version and normaliser (docs/evaluation.md).

``open_metric(name, settings)`` is the only way in; ``METRICS`` the table of them.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from megatron_omni.scoring.choice import Choice, LikelihoodChoice
from megatron_omni.scoring.intervals import IoU
from megatron_omni.scoring.likelihood import Perplexity
from megatron_omni.scoring.metric import Metric
from megatron_omni.scoring.numeric import MeanRelativeAccuracy, RelaxedAccuracy
from megatron_omni.scoring.speech import CharacterErrorRate, WordErrorRate
from megatron_omni.scoring.text import ANLS, ExactMatch
from megatron_omni.scoring.translation import Bleu, ChrF

METRICS: dict[str, type[Metric]] = {
    "exact_match": ExactMatch,
    "choice": Choice,
    "likelihood_choice": LikelihoodChoice,
    "mean_relative_accuracy": MeanRelativeAccuracy,
    "relaxed_accuracy": RelaxedAccuracy,
    "anls": ANLS,
    "wer": WordErrorRate,
    "cer": CharacterErrorRate,
    "bleu": Bleu,
    "chrf": ChrF,
    "iou": IoU,
    "perplexity": Perplexity,
}


def nearest(word: str, known: Mapping[str, object] | list[str]) -> str:
    """``; did you mean 'x'?`` for a word that is nearly one of ``known``, else the whole list."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(known)}"


def open_metric(name: str, settings: Mapping[str, Any]) -> Metric:
    """The metric of this name; ValueError for an unknown name or setting, and for a library that is not installed."""
    if name not in METRICS:
        raise ValueError(f"metric = {name!r} is unknown; {nearest(name, METRICS)}")
    known = list(inspect.signature(METRICS[name]).parameters)
    for setting in settings:
        if setting not in known:
            said = nearest(setting, known) if known else "it has none"
            raise ValueError(f"metric_settings: metric {name!r} has no setting {setting!r}; {said}")
    try:
        return METRICS[name](**settings)
    except ImportError as error:
        raise ValueError(
            f"metric {name!r} needs {error.name}, which is not installed: pip install 'megatron-omni[evaluate]'"
        ) from error
