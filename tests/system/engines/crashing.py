"""An engine for tests that says why it cannot work, and ends at once."""

import sys

print("tries to load the weights", flush=True)
print("the flux capacitor is broken", file=sys.stderr, flush=True)
sys.exit(3)
