"""The prebuilt CUDA kernels: their sources, how they are built, and how they reach the GPU. See README.md here.

Imports nothing and calls nothing by itself. `driver` is the way in. Never imports the other rooms.
"""
