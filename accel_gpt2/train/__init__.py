"""Effects with torch: the loop, the model, the loss, the optimizer, checkpoints."""

import os

# OpenMP threads that wait by spinning take the other threads' cores away wherever anything else
# runs (docs/benchmarks/2026-11-23-openmp-wait.md). Read by OpenMP when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
