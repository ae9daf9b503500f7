"""What a training step allocates, found by tracing it on tensors without contents.

Our own step (`step`) runs on fake tensors of a pretend accelerator (`device`) in a process of its
own, and `tracker` counts what would be allocated. It needs no GPU, no weights and next to no
memory, and it knows whatever architecture transformers can build: it is the reference of the closed
form in `plan.memory`, and the answer where that has none.
"""
