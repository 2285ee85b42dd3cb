"""What tools/benchmark.py times: problems with their float64 solution, contenders, clocks, floors, tables."""
