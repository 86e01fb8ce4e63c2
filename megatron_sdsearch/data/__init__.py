"""Questions, prompts and scores: the inputs of rollouts and the scoring of answers."""
