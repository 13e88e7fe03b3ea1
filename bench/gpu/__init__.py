"""The parts of ``bench/gpu_check.py``: parity, rules, faults, sanitizer, kernels, speed, and the page that shows them."""
