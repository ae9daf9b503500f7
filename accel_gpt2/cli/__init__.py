"""What talks to the person: one file per verb; options, output and errors in one place each."""
