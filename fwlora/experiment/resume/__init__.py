"""What a run needs to be stopped and continued: its holder, its attempts, its checkpoints.

``session`` puts these together for ``src.train``; ``store`` keeps checkpoints, ``encoding`` their content,
``checkpointer`` decides when one is written, ``attempts`` and ``identity`` say what continues what, and ``lock`` keeps
two processes from one run.
"""
