"""The parts of ``bench/roofline.py``: the model, the sites of a network, and the page and picture that show them."""
