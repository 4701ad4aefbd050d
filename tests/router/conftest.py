import torch

# Threads that wait for each other on busy cores make these tiny models many times slower.
torch.set_num_threads(1)
