"""What `training_peers.py` measures: one file per peer, each in its natural form.

Every side runs in a process of its own (`child`) and trains on when it is its turn (`turns`), on
the same documents from the same weights (`workload`).
"""
