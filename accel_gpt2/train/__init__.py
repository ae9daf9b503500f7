"""Effects with torch: the loop, the model, the loss, the optimizer, checkpoints."""

import os

# OpenMP threads that wait by spinning take the other threads' cores away wherever anything else
# runs: on two busy cores passive waiting trains 2-3 times faster. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
