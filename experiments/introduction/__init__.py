"""An interactive introduction to meta-learning by implicit gradients, as one HTML file.

Each module computes the arrays of some figures with the library's public functions; `page` packs
them and writes the file.
"""
