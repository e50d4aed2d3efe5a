"""The experiment harness around :mod:`fwlora`: settings, engine, search, tracking, records, evaluation, studies."""
