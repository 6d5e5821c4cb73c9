"""Coverage-guided fuzzing of the code that reads untrusted input, and a replay of the most interesting inputs."""
