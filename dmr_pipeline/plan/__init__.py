"""What the stages of a recipe will need, before any of them runs: memory, disk and time, from configs alone.

No weights are loaded: models are built on torch's `meta` device, where tensors have shapes and nothing else, and the rungs of the
ladder are quantized there. How many tokens episodes have comes from the expert's, on some of the recipe's own games; how fast a
model reads and writes them is measured with random weights. All of it is an estimate: `Assumptions` is what it rests on.
"""
