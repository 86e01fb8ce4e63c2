"""Questions, prompts and scores: what goes into a rollout and how its answer is judged."""
