"""What a launcher starts to evaluate a run: `accelerate launch launch/evaluate.py runs/demo`.

Its options are those of `accel-gpt2 evaluate`. Several processes share the documents.
"""

from accel_gpt2.cli.evaluate import launched_main

if __name__ == "__main__":
    launched_main()
