"""Which mechanisms differ from full attention, which are as good, and what a number of seeds can show at all.

Every mechanism is compared with full attention alone, seed by seed: runs of one seed share their data, and what the
seed does to both goes out of their difference. `paired` tests one comparison, `family` all of a task at one length
together, `power` says what so many seeds can show. Numbers in, numbers out: no rows, no words.
"""

from attention_zoo.statistics.family import Verdict, judge
from attention_zoo.statistics.paired import Pairs
from attention_zoo.statistics.power import detectable, power_of, preset_seeds, seeds_needed

__all__ = ["Pairs", "Verdict", "detectable", "judge", "power_of", "preset_seeds", "seeds_needed"]
