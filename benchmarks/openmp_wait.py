"""Does passive waiting of OpenMP threads pay? Interleaved runs, median of the pairs' ratios.

    python benchmarks/openmp_wait.py [pairs]

Each run is a process of its own, since OpenMP reads the policy when it is loaded.
"""

import os
import statistics
import subprocess
import sys

_STEPS = """
import time, numpy as np, torch
from accel_gpt2.data.batching import collate
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train.causal import arrays
from accel_gpt2.train.model import build_model
from accel_gpt2.train.optim import build_optimizer

recipe = resolve([Layer(origin="benchmark", values={"model": "gpt2-tiny"})]).recipe
model = build_model(recipe, vocab_size=4096, eos_token_id=0).train()
optimizer = build_optimizer(model, recipe)
random = np.random.default_rng(0)
batch = collate([random.integers(0, 4096, 65) for _ in range(32)])
tensors = [torch.from_numpy(x) for x in arrays(batch)]
for step in range(13):
    if step == 3:
        started = time.perf_counter()
    (model(*tensors) / batch.num_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
print(10 * batch.num_tokens / (time.perf_counter() - started))
"""


def _tokens_per_second(policy: str) -> float:
    # torch is imported first in the steps above, so what our package would set comes too late.
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy == "PASSIVE":
        environment["OMP_WAIT_POLICY"] = policy
    result = subprocess.run(
        [sys.executable, "-c", _STEPS], env=environment, capture_output=True, text=True, check=True
    )
    return float(result.stdout)


if __name__ == "__main__":
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    ratios = []
    for pair in range(pairs):
        order = ("PASSIVE", "unset") if pair % 2 else ("unset", "PASSIVE")
        rate = {policy: _tokens_per_second(policy) for policy in order}
        ratios.append(rate["PASSIVE"] / rate["unset"])
        sys.stdout.write(
            f"passive {rate['PASSIVE']:.0f} unset {rate['unset']:.0f} tokens/s, "
            f"ratio {ratios[-1]:.2f}, load {os.getloadavg()[0]:.1f}\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"median ratio {statistics.median(ratios):.2f}\n")
