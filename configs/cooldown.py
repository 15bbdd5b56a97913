"""A cooldown: branch off the middle of a long run, with other text and a rate that falls to zero.

    python train.py configs/smoke.py --schedule=wsd --save_every=300 --run_dir=out/trunk      the long run
    python train.py configs/cooldown.py                                                       this, from its step 300

The branch keeps weights, moments and step count; mixture, schedule and length are its own. Marin cooled its 67B run
down in this way, from 2.386 to 2.277 nats on Paloma [cited: marin #6811]. Run by us: yes; README.md in this folder
has the losses beside those of a run that went on as before."""
from configs.smoke import *

init_from = "out/trunk@300"
keep_optimizer = True
tokenizer = "out/trunk"             # that of the long run, whatever the text is
mixture = (("shakespeare", 0.8), ("kjv", 0.2))      # more of the plays than before [assumed]

schedule = "wsd"
steps = 400                         # 300 of them are done
decay = 0.25                        # so the rate falls from step 300 on [derived]
