"""How training works. No stage and no method is known here.

tables gives the rows of a kind and data makes batches of them; models computes log-probs and scores; scoring and
sampling use models without training them; training holds the contract of a method, the loop and the checkpoints.
"""
