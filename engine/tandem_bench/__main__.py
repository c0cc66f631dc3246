"""`python -m tandem_bench NAME`: the benchmarks where the `tandem` command isn't installed."""

from tandem_bench.catalog import build_app, exit_on_error

if __name__ == "__main__":
    build_app(exit_on_error)()
