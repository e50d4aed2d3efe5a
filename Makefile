.DEFAULT_GOAL := help
.PHONY: help lint types test test-gpu test-lowest coverage bench quickstart gate wheel
BASE ?= HEAD~1

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

lint: ## style, format, declared dependencies
	uv run ruff check .
	uv run ruff format --check .
	uv run deptry .

types: ## mypy
	uv run mypy

test: ## the tests that need neither GPU nor network
	uv run pytest -n 2

test-gpu: ## the tests that need a CUDA device
	uv run pytest -m gpu

test-lowest: ## the library's tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	uv venv --quiet --clear --python 3.11 .venv-lowest
	uv pip install --quiet --no-config --python .venv-lowest --resolution lowest-direct .
	uv pip install --quiet --no-config --python .venv-lowest hypothesis packaging pytest pytest-timeout pytest-xdist
	uv pip list --python .venv-lowest | grep -E '^(numpy|peft|torch|transformers) '
	PYTHONPATH=. .venv-lowest/bin/python -m pytest -n 2 tests/library

coverage: ## the tests with the lines that they miss
	uv run pytest -n 2 --cov --cov-report=term-missing

bench: ## count what the layout is judged by; benchmarks/README.md has the other benchmarks
	uv run python -m benchmarks.structure

quickstart: ## three methods on MiniLM-L6, evaluated
	uv run fwlora study quickstart

gate: ## compare the numbers of the working tree with those of commit BASE
	uv run python -m tests.gate.compare_commits $(BASE)

wheel: ## build the wheel into dist/
	uv build --wheel
