"""What the teacher is shown: the searches of all siblings and how they ended."""
