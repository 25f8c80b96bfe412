"""What a training step optimises; a stage of the recipe is a YAML file, only a task is code."""
