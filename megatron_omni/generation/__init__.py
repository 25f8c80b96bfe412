"""Text out of a trained model: cached decoding on every layout, and the choice of the next token."""
