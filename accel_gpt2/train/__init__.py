"""Effects with torch: the loop, the model, the loss, the optimizer, checkpoints."""

import os

# OpenMP threads that wait by spinning take the other threads' cores away wherever anything else
# runs (docs/benchmarks/2026-11-23-openmp-wait.md). Read by OpenMP when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Where several processes train, one that goes leaves the others' connections to warn of it in pages
# of C++ frames, before anybody can say why. Read when torch is loaded; errors are still shown.
if os.environ.get("WORLD_SIZE", "1") != "1":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
