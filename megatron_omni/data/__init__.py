"""From JSONL records to micro-batches."""
