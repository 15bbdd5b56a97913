"""What most rows of pilot.csv trained: the third ladder's models before they had V2's attention."""
from configs.ladder.third import *

half_rope = False
partial_key_offset = False
