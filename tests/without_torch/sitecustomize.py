"""Read by every Python that has this folder on its path, as it starts: there is no torch.

transformers imports torch wherever it finds it, and most of a command's time would go there; none
of the commands needs it.
"""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
