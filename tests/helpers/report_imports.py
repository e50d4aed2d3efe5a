"""A program that runs ``src.train`` and prints which modules that imported, one line of JSON at the end."""

import atexit
import json
import runpy
import sys

before = set(sys.modules)


def report() -> None:
    print(json.dumps(sorted(set(sys.modules) - before)))


if __name__ == "__main__":
    atexit.register(report)
    runpy.run_module("src.train", run_name="__main__", alter_sys=True)
