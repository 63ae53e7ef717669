"""Speed and quality beside other runtimes, in one run: `python -m benchmarks.run --help`."""
