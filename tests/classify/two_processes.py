"""Started by torchrun: train and evaluate a run, as launch/train.py and launch/evaluate.py do."""

import sys
from pathlib import Path

from accel_gpt2.classify.evaluate import evaluate_run
from accel_gpt2.classify.fit import fit
from accel_gpt2.recipe import read_layer, resolve
from accel_gpt2.train.processes import leave_processes

recipe, run = Path(sys.argv[1]), Path(sys.argv[2])
fit(resolve([read_layer(recipe)]), run, quiet=True)
evaluate_run(run, quiet=True)
leave_processes()
