"""A small process for those who check or rank rows on a laptop: pandera without pandas, polars without what it frees.

Imported before all else by the package, since both are settled by the first import."""

import os
import sys
from importlib.machinery import ModuleSpec

# jemalloc, which polars allocates from, keeps freed memory for ten seconds: 100 MiB while a million rows are read.
os.environ.setdefault("_RJEM_MALLOC_CONF", "dirty_decay_ms:50,muzzy_decay_ms:0")


class _WithoutPandas:
    """A finder that finds neither pandas nor pyarrow. pandera then does without them, as where they are not installed:
    75 MiB and half a second less. What is imported later finds them again."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in ("pandas", "pyarrow"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return None


if "pandas" not in sys.modules and "pandera" not in sys.modules:
    import polars as pl  # before the finder: polars remembers whether there is pyarrow

    sys.meta_path.insert(0, _WithoutPandas)
    try:
        import pandera.polars as pa

        # It looks for pandas once more at its first check, and remembers.
        pa.DataFrameSchema({"x": pa.Column(int, pa.Check.ge(0))}).validate(pl.DataFrame({"x": [0]}))
    finally:
        sys.meta_path.remove(_WithoutPandas)
