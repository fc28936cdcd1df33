.PHONY: test bench lint
test:
	pytest tests/
bench:
	pytest benchmarks/ --benchmark-only
lint:
	ruff check . && ruff format --check . && pyright
