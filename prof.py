import logging

logging.disable(logging.CRITICAL)
import cProfile
import pstats
import tempfile
from pathlib import Path

f = Path(tempfile.mkdtemp(prefix="town-", dir="."))
cProfile.run("live_in_town('all',f,5)", "/tmp/w4/F/.copy-prof")
pstats.Stats("/tmp/w4/F/.copy-prof").sort_stats("cumtime").print_stats(35)
