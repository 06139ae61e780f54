"""Data that trainers learn from: where it comes from, its tokens, its batches.

found = rows.build(config, tokenizer)     # of a TrainerConfig
batch = rows.Batches(found, batch_size=8).batch_at(step)
"""
