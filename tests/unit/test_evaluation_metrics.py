"""Metrics against jiwer, sacrebleu and tables worked by hand; rules; standard errors and paired tests."""

import math
import random

import jiwer
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import binomtest
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from megatron_omni.config.data import EvalSourceConfig
from megatron_omni.evaluation.uncertainty import paired, score_of, sign_test, standard_error
from megatron_omni.scoring import METRICS, open_metric
from megatron_omni.scoring.metric import Metric
from megatron_omni.scoring.rules import open_rule

WORDS = (
    "the",
    "cat",
    "Mr. Smith",
    "won't",
    "3",
    "twenty one",
    "猫",
    "在",
    "左边",
    "naïve",
    "Ünïcode",
    "$20.50",
    "[noise]",
    "é",
    "\u2028x",
)
ENDLESS = "and then " * 400


def pairs() -> list[tuple[str, str]]:
    """60 answers with their references: alike, changed, empty, endless."""
    pick = random.Random(3)
    found = []
    for number in range(60):
        reference = pick.choices(WORDS, k=pick.randint(1, 12))
        answer = [w for w in reference if pick.random() > 0.2] + pick.choices(WORDS, k=pick.randint(0, 2))
        found.append(("", ENDLESS, "\n\t")[number % 3] if number < 6 else " ".join(answer))
        found[-1] = (found[-1], " ".join(["word", *reference]))
    return found


PAIRS = pairs()


def scored(metric: Metric, cases: list[tuple[str, str]]) -> tuple[list[float | None], float | None]:
    """Each sample's score, and the score of all."""
    found = [metric.score(answer, [reference], None) for answer, reference in cases]
    return [s.score for s in found], score_of(metric, [s.statistics for s in found if s.statistics is not None])


@pytest.mark.parametrize("name", ["wer", "cer"])
@pytest.mark.parametrize("normaliser", ["english", "basic", "characters", "none"])
def test_error_rates_are_those_of_jiwer_over_the_whole_set(name: str, normaliser: str) -> None:
    normal = {
        "english": EnglishTextNormalizer(), "basic": BasicTextNormalizer(),
        "characters": BasicTextNormalizer(split_letters=True), "none": str,
    }[normaliser]  # fmt: skip
    answers, references = ([normal(text).strip() for text in side] for side in zip(*PAIRS))
    assert all(references)
    each, whole = scored(open_metric(name, {"normaliser": normaliser}), PAIRS)
    rate = getattr(jiwer, name)
    assert whole == rate(references, answers)
    assert each == [rate(reference, answer) for reference, answer in zip(references, answers)]
    assert whole != pytest.approx(np.mean(each))


def test_empty_references_do_not_count_and_the_best_reference_does() -> None:
    wer = open_metric("wer", {})
    assert wer.score("a b", ["", " [noise] "], None).statistics is None
    assert wer.score("a cat", ["a dog sat", "a cat"], None).statistics == (0, 2)
    assert wer.score(None, ["a dog"], None).score == 1.0


@pytest.mark.parametrize("settings", [{}, {"lowercase": True}, {"tokenize": "zh"}])
def test_bleu_is_that_of_sacrebleu(settings: dict) -> None:
    metric = open_metric("bleu", settings)
    answers, references = map(list, zip(*PAIRS))
    theirs = BLEU(**settings)
    assert scored(metric, PAIRS)[1] == pytest.approx(theirs.corpus_score(answers, [references]).score, rel=1e-12)
    assert all(part in metric.version for part in str(theirs.get_signature()).split("|")[1:])


@pytest.mark.parametrize("settings", [{}, {"word_order": 2}])
def test_chrf_is_that_of_sacrebleu_with_several_references(settings: dict) -> None:
    metric = open_metric("chrf", settings)
    answers, first = map(list, zip(*PAIRS))
    second = [reference.upper() for reference in first[::-1]]
    statistics = [metric.score(a, [r, s], None).statistics for a, r, s in zip(answers, first, second)]
    theirs = CHRF(**settings).corpus_score(answers, [first, second]).score
    assert score_of(metric, [s for s in statistics if s is not None]) == pytest.approx(theirs, rel=1e-12)


EXACT = [
    ("strip", " a cat\n", ["a cat"], True), ("strip", "A cat", ["a cat"], False), ("strip", "a  cat", ["a cat"], False),
    ("strip", "猫\u3000", ["猫"], True), ("strip", "", [""], True), ("strip", ENDLESS, ["and then"], False),
    ("text", "A  Cat!?", ["a cat"], True), ("text", "a cat。", ["a cat"], True), ("text", "the cat", ["cat"], False),
    ("text", "5%", ["5"], False), ("text", "no", ["yes", "No."], True), ("text", "...", [""], True),
    ("squad", "The cat, sat", ["cat sat"], True), ("squad", "an apple", ["apple"], True), ("squad", "theory", ["ory"], False),
    ("squad", "left-hand", ["lefthand"], True),
]  # fmt: skip


@pytest.mark.parametrize(("normaliser", "answer", "expected", "right"), EXACT)
def test_exact_match(normaliser: str, answer: str, expected: list[str], right: bool) -> None:
    found = open_metric("exact_match", {"normaliser": normaliser}).score(answer, expected, None)
    assert (found.score, found.correct) == (float(right), right)


ANLS = [
    ("hello", ["hello"], 1.0), ("Hello ", ["hello"], 1.0), ("hallo", ["hello"], 0.8), ("helo", ["hello"], 0.8),
    ("he", ["hello"], 0.0), ("abcd", ["abxy"], 0.0), ("abc", ["abx"], 1 - 1 / 3), ("", ["x"], 0.0),
    ("x", ["", "xy", "x y"], 0.0), ("xyz", ["xy", "q"], 1 - 1 / 3), ("猫在左边", ["猫在右边"], 0.75), (ENDLESS, ["and"], 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected", "score"), ANLS)
def test_anls(answer: str, expected: list[str], score: float) -> None:
    assert open_metric("anls", {}).score(answer, expected, None).score == pytest.approx(score)


MEAN_RELATIVE = [
    ("10", "10", 1.0), ("9.5", "10", 1.0), ("10.5", "10", 1.0), ("9.4", "10", 0.9), ("9", "10", 0.9), ("11", "10", 0.9),
    ("8.99", "10", 0.8), ("7.5", "10", 0.6), ("6", "10", 0.3), ("5.5", "10", 0.2), ("5", "10", 0.1), ("15", "10", 0.1),
    ("4.9", "10", 0.0), ("0", "10", 0.0), ("-10", "10", 0.0), ("-95", "-100", 1.0), ("0", "0", 1.0), ("0.001", "0", 0.0),
    ("1,900", "2000", 1.0), ("\u22122", "-2", 1.0), ("nan", "1", 0.0), ("inf", "1", 0.0), ("1_0", "10", 0.0), ("", "1", 0.0),
    ("1e3", "1000", 1.0), ("٣", "3", 1.0), ("three", "3", 0.0), ("3 chairs", "3", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected", "score"), MEAN_RELATIVE)
def test_mean_relative_accuracy(answer: str, expected: str, score: float) -> None:
    """A tenth for each of the thresholds .50 to .95 that the relative error allows, from 0.5 down to 0.05."""
    assert open_metric("mean_relative_accuracy", {}).score(answer, [expected], None).score == pytest.approx(score)


RELAXED = [
    ("105", "100", True), ("105.1", "100", False), ("95", "100", True), ("94.9", "100", False), ("-5", "5", False),
    ("12%", "0.12", True), ("12%", "12", False), ("12.5%", "12%", True), ("0", "0", True), ("0.0", "0", False),
    ("Yes", "yes", True), (" yes ", "yes", True), ("1,000", "1000", False), ("nan", "nan", True), ("", "5", False),
    ("2019", "1999", True),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected", "right"), RELAXED)
def test_relaxed_accuracy(answer: str, expected: str, right: bool) -> None:
    """ChartQA's: 5 % of numbers, a percent sign divides by 100, a reference of 0 and all else is text."""
    assert open_metric("relaxed_accuracy", {}).score(answer, [expected], None).correct is right


IOU = [
    ("segment", "2 to 6", "[0, 4]", 2 / 6), ("segment", "0.0-4.0", "[0, 4]", 1.0), ("segment", "5 9", "[0, 4]", 0.0),
    ("segment", "4 0", "[0, 4]", 0.0), ("segment", "1 3", "[0, 4]", 0.5), ("segment", "-1 1", "0 2", 1 / 3),
    ("box", "0 0 2 2", "[1, 1, 3, 3]", 1 / 7), ("box", "[1,1,3,3]", "[1, 1, 3, 3]", 1.0), ("box", "0 0 1 1", "[1, 1, 3, 3]", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "answer", "expected", "score"), IOU)
def test_iou(kind: str, answer: str, expected: str, score: float) -> None:
    metric = open_metric("iou", {"kind": kind})
    metric.check([expected], None)
    given = open_rule(kind)(answer, None)
    assert metric.score(given, [expected], None).score == pytest.approx(score)
    reached = open_metric("iou", {"kind": kind, "threshold": 0.5}).score(given, [expected], None)
    assert reached.correct is (score >= 0.5)


OPTIONS = ["cat", "dog", "left of it", "none"]
LETTER = [
    ("The answer is (B).", "B"), ("answer is A. No, the answer is C", "C"), ("Answer: **D**", "D"), ("答案是B", "B"),
    ("the answer is a cat", None), ("A. cat", "A"), ("(C) left", "C"), ("B", "B"), ("b", "B"), ("(d)", "D"), ("B)", "B"),
    ("B\nbecause", "B"), ("A cat is there", None), ("dog", "B"), ("Dog.", "B"), ("left of it", "C"), ("E", None),
    ("The answer is E", None), (r"so \boxed{A} or \boxed{D}", "D"), (r"\boxed{\text{B}}", "B"), (r"\boxed{dog}", "B"),
    (r"A. is wrong, hence \boxed{C}", "C"), ("", None), (ENDLESS, None), ("it is B", None), ("answer is (B) \\boxed{C}", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "letter"), LETTER)
def test_letter_of_an_option(said: str, letter: str | None) -> None:
    """In the order: stated, boxed, leading, the option's text."""
    assert open_rule("letter")(said, OPTIONS) == letter


RULES = [
    ("whole", " a\nb ", "a\nb"), ("first_word", "3. chairs", "3"), ("first_word", " ", None), ("last_line", "x\n y \n\n", "y"),
    ("last_line", "", None), ("boxed", r"\boxed{\frac{1}{2}} x", r"\frac{1}{2}"), ("boxed", r"\boxed{a", None),
    ("boxed", "x", None),
    ("number", "2 tables, so 1,234.5 chairs.", "1,234.5"), ("number", "v2 has none", None), ("number", "x=-3", "-3"),
    ("number", "3-4", "4"), ("segment", "from 3 to 7.5", "3 7.5"), ("segment", "at 3", None), ("box", "9 1 2 3 4", "1 2 3 4"),
    ("after: Answer:", "Answer: a Answer: b ", "b"), ("after: Answer:", "b", None),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "said", "taken"), RULES)
def test_rules(rule: str, said: str, taken: str | None) -> None:
    assert open_rule(rule)(said, None) == taken


def test_choice_takes_letters_and_texts_as_references() -> None:
    choice = open_metric("choice", {})
    for expected in (["B"], ["dog"], ["(b)"], ["A", "Dog"]):
        choice.check(expected, OPTIONS)
        assert choice.score("B", expected, OPTIONS).correct is True
        assert choice.score("C", expected, OPTIONS).correct is False
        assert choice.score(None, expected, OPTIONS).correct is False


@pytest.mark.parametrize(
    ("name", "expected", "options", "message"),
    [
        ("choice", ["E"], OPTIONS, r"expected = 'E' is no option; write one of A, B, C, D"),
        ("choice", ["A"], ["a", "b", "A "], r"options repeat: A and C are both 'A '"),
        ("choice", ["B"], ["B", "A"], r"the letter of one option and the text of another \(A\)"),
        ("choice", ["A"], ["a"], r"options has 1 items"),
        ("likelihood_choice", ["A"], None, r"options is missing"),
        ("mean_relative_accuracy", ["three"], None, r"expected = 'three' is no number"),
        ("iou", ["4 0"], None, r"expected = '4 0' is no segment; write \[start, end\]"),
        ("perplexity", ["a", "b"], None, r"perplexity is that of one answer"),
    ],
)
def test_references_that_nothing_can_meet(
    name: str, expected: list[str], options: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_metric(name, {}).check(expected, options)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("exact_mach", {}, r"metric = 'exact_mach' is unknown; did you mean 'exact_match'\?"),
        ("wer", {"normalizer": "english"}, r"metric 'wer' has no setting 'normalizer'; did you mean 'normaliser'\?"),
        ("wer", {"normaliser": "x"}, r"normaliser = 'x'; give one of english, basic"),
        ("anls", {"threshold": 0}, r"threshold = 0"),
        ("bleu", {"tokenize": "x"}, r"tokenize = 'x'"),
        ("iou", {"kind": "x"}, r"kind = 'x'; give one of segment, box"),
    ],
)
def test_unknown_metrics_and_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_metric(name, settings)


def test_an_absent_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("wer", "jiwer"), ("bleu", "sacrebleu.metrics"), ("anls", "rapidfuzz.distance")):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(ValueError, match=r"pip install 'megatron-omni\[evaluate\]'"):
                open_metric(name, {})


def test_recipes_know_the_same_metrics() -> None:
    for name in METRICS:
        EvalSourceConfig(name="x", path="x", metric=name)  # type: ignore[arg-type]
    from typing import get_args

    from megatron_omni.config.data import MetricName

    assert set(get_args(MetricName)) == set(METRICS)


def test_standard_error_of_a_mean_and_of_a_corpus_score() -> None:
    exact = open_metric("exact_match", {})
    values = [[1.0], [0.0], [1.0], [1.0]]
    assert standard_error(exact, values) == pytest.approx(math.sqrt(0.25 / 4))
    assert standard_error(exact, values[:1]) is None and score_of(exact, []) is None
    wer = open_metric("wer", {})
    rng = np.random.default_rng(7)  # not the draws' own seed
    errors = rng.binomial(10, 0.3, 400)
    found = standard_error(wer, [[float(e), 10.0] for e in errors])
    assert found == pytest.approx(errors.std(ddof=1) / 10 / math.sqrt(400), rel=0.1)  # equal lengths: the mean's


def test_paired_bootstrap_and_sign_test() -> None:
    exact = open_metric("exact_match", {})
    rng = np.random.default_rng(1)
    before = (rng.random(300) < 0.5).astype(float)
    better = before.copy()
    better[np.flatnonzero(before == 0)[:40]] = 1.0
    found = paired(exact, before[:, None].tolist(), better[:, None].tolist())
    assert found is not None and found.second - found.first == pytest.approx(40 / 300)
    assert found.low > 0 and found.p < 0.01
    alone = math.sqrt(np.var(better - before, ddof=1) / 300)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * alone, rel=0.15)
    shuffled = before.copy()
    shuffled[np.flatnonzero(before == 0)[:9]], shuffled[np.flatnonzero(before == 1)[:9]] = 1.0, 0.0
    chance = paired(exact, before[:, None].tolist(), shuffled[:, None].tolist(), seed=5)
    assert chance is not None and chance.p > 0.5 and chance.low < 0 < chance.high
    assert paired(exact, before[:, None].tolist(), shuffled[:, None].tolist(), seed=5) == chance
    assert sign_test(9, 1) == binomtest(1, 10).pvalue == pytest.approx(22 / 1024) and sign_test(0, 0) == 1.0
