"""Coverage-guided fuzzing of the parts that read input of strangers, and a replay of the most interesting inputs."""
