"""Judge rollouts: averages, the evaluation of an exported model, and the queries of teacher and student compared."""
