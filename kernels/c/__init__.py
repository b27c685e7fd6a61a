"""Kernels in C: `<op>.c` in portable C99, and a folder for every instruction set that has more to offer."""
