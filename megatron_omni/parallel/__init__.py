"""Process groups, wrapping for data parallelism, pipeline schedule: parallelism applied from outside the model."""
