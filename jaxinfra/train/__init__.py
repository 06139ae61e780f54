"""Training on one device: data, loss, optimiser, step, checkpoints, metrics and the loop.

from jaxinfra.train.config import TrainConfig  # imports no jax
from jaxinfra.train.loop import train

train(TrainConfig(data="stdlib", model="tiny", steps=300))
"""
