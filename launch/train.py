"""What a launcher starts: `accelerate launch launch/train.py --profile rtx4070ti`.

Its options are those of `accel-gpt2 train`; `--help` lists them. `python` and `torchrun` work too.
"""

from accel_gpt2.cli.train import launched_main

if __name__ == "__main__":
    launched_main()
