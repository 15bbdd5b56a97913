"""Rung 1: the same dense model, its matrices by AdamH on the hypersphere, with the recipe's beta1 and eps."""
from configs.ladder.rungs.a_dense_adamw import *

optimizer = "adamh"
adam_lr_scale = 16.0                   # matrices at the heuristic's rate, the others at 16 x [measured: ../pilot.csv]
del beta1, eps, lr_scale          # beta2 stays 0.95, as the 129B run had it [measured: ../pilot.csv]
