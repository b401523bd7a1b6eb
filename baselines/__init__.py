"""The methods the paper and its successors compare with: one file each, run by train_online.py's loop.

    python -m baselines.qc --task lift       # also fql, rlpd, dsrl, dppo, reinflow, ogpo; cloning: train_offline.py

Not here: the loop, evaluation, checkpoints and resume (train_online.py), comparing runs (benchmarks/compare.py).
"""
