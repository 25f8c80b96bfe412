"""What a run is: typed recipes, without torch and without megatron."""
