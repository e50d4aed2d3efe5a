"""Studies: several runs through the contract's commands, then their evaluation.

``spec`` plans the runs of a file of ``config/study``, ``launch`` starts them, ``display`` shows their progress, and
``execution`` puts these together. A launcher of your own is a subclass of
:class:`~fwlora.experiment.study.launch.Launcher` and one call of
:func:`~fwlora.experiment.study.launch.register_launcher`; ``fwlora study <name> --on <launcher>`` chooses it.
"""
