"""Evaluation, apart from training: records of runs in; checked, compared, judged and drawn; files out."""
