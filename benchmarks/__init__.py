"""What Fractal costs, beside loops written by hand and beside other frameworks: `python -m benchmarks --help`."""
