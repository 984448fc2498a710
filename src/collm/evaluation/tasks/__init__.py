"""Evaluation tasks, a file each: what is asked, when an answer ends, and how it is scored."""
