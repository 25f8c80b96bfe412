"""Loss spikes are found against the recent losses; the samples of a step follow from the data cursor."""

import random
from typing import Any

from megatron_omni.training.incidents import FEWEST, WINDOW, SpikeDetector, sample_ids


def noisy(count: int, *, level: float, spread: float) -> list[float]:
    dice = random.Random(0)
    return [dice.gauss(level, spread) for _ in range(count)]


def test_noise_and_a_falling_loss_are_usual() -> None:
    for losses in (noisy(500, level=2.0, spread=0.2), [5.0 * 0.98**step for step in range(150)]):
        detector = SpikeDetector()
        assert all(detector.add(loss) is None for loss in losses)


def test_a_streak_is_told_once_and_does_not_become_usual_before_it_is_a_level() -> None:
    detector = SpikeDetector()
    for loss in noisy(100, level=2.0, spread=0.05):
        detector.add(loss)
    for length in (1, 50):
        usual, *others = [detector.add(3.0) for _ in range(length)]
        assert usual is not None and abs(usual - 2.0) < 0.05 and others == [None] * (length - 1)
        assert detector.add(2.05) is None
    assert [detector.add(3.0) is not None for _ in range(WINDOW + 100)] == [True] + [False] * (WINDOW + 99)
    assert detector.add(4.0) == 3.0  # against the new level


def test_another_phase_of_the_mixture_is_compared_with_itself_alone() -> None:
    """A source that joins raises the loss for hundreds of steps: nothing to tell, but a spike among them is."""
    detector = SpikeDetector()
    losses = [*noisy(100, level=2.0, spread=0.02), *noisy(100, level=5.0, spread=0.02)]
    told = [i for i, loss in enumerate(losses) if detector.add(loss, phase=i // 100) is not None]
    assert told == [] and detector.add(9.0, phase=1) is not None
    detector = SpikeDetector()
    assert [i for i, loss in enumerate(losses) if detector.add(loss) is not None] == [100]


def test_a_constant_loss_has_no_spread_but_small_changes_are_not_spikes() -> None:
    detector = SpikeDetector()
    for _ in range(FEWEST):
        assert detector.add(1.0) is None
    assert detector.add(1.09) is None and detector.add(1.2) == 1.0


def test_few_losses_say_nothing() -> None:
    detector = SpikeDetector()
    assert all(detector.add(loss) is None for loss in [1.0] * (FEWEST - 1) + [100.0])


def cursor(consumed: int, *waiting: int) -> dict[str, Any]:
    return {"consumed_samples": consumed, "waiting": list(waiting)}


def test_samples_of_a_step_without_and_with_packing() -> None:
    assert sample_ids(cursor(8), cursor(12)) == [8, 9, 10, 11]
    # 8 and 9 waited; 10..13 were drawn; 9 and 12 wait on
    assert sample_ids(cursor(8, 8, 9), cursor(12, 9, 12)) == [8, 10, 11, 13]
