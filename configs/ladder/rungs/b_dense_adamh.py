"""Rung 1: the same dense model, its matrices by AdamH on the hypersphere, with the recipe's betas and eps."""
from configs.ladder.rungs.a_dense_adamw import *

optimizer = "adamh"
del beta1, beta2, eps
