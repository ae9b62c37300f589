"""DeepSeek-V3 in plain PyTorch, without parallelism: attention, experts, router, MTP, generation.

Start at transformer.py.
"""
