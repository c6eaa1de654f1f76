"""How training works. No stage and no method is known here.

data makes batches; models computes log-probs and scores of them; scoring and sampling use models without training
them; training holds the contract of a method, the loop and the checkpoints.
"""
