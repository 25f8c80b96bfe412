"""Training of omnimodal mixture-of-experts language models on Megatron-Core."""
