"""Read by every Python that has this folder on its path, as it starts: there is no torch.

transformers imports torch wherever it finds it, and most of a command's time would go there; none
of the commands needs it. And the collector of garbage comes as rarely as in the tests themselves.
"""

import gc
import sys

sys.modules["torch"] = None  # type: ignore[assignment]
gc.set_threshold(50_000, 20, 50)
