"""What a file's rows are read as: columns named, texts read back, forms parsed, labels judged.

One row goes through columns.py (or presets.py) -> written.py -> formats.py (cells.py, tools.py, rankings.py); plain
ones go as columns (columnar.py). A new public data set is an entry of `presets.PRESETS`.
"""
