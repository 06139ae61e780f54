"""Pipeline parallelism: a schedule is a table, and one program runs any table.

`schedule` makes tables, `validate` finds what is wrong in one, `simulate` gives bubble, stash and
traffic, `draw` shows it, `run` executes it inside `shard_map`, `split` parts a backward pass into
gradients of inputs and of weights, `train` applies all that to the model.
"""
