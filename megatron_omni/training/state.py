"""Where a run stands: the counters that a checkpoint carries besides weights, optimizer and data cursor."""

from dataclasses import asdict, dataclass


@dataclass(kw_only=True)
class TrainState:
    """Counters of one run. ``step`` counts optimizer steps begun, skipped ones included; it keys every random draw."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    """Tokens of the samples consumed, media placeholders included, padding not."""
    consumed_label_tokens: int = 0
    updates: int = 0
    """Steps that changed the weights: the position in the learning-rate schedule."""
    skipped_in_a_row: int = 0
    """Steps skipped for non-finite gradients since the last update."""

    def state_dict(self) -> dict[str, int]:
        """Plain values for the checkpoint."""
        return asdict(self)

    def load_state_dict(self, values: dict[str, int]) -> None:
        """Take the values of a checkpoint."""
        for name, value in values.items():
            assert hasattr(self, name), f"unknown counter {name!r} in the checkpoint's training state"
            setattr(self, name, int(value))
