"""The training loop on megatron.core pieces."""
