"""This project beside what else runs the same models on a CPU: llama.cpp and transformers.

``hatch run bench:peers --help`` says how it is run. Every run is a process of its own, and the contenders take turns.
"""
