"""`alignflow rank`: people rank answers, on a local page or in the terminal; what they say becomes rows to train on.

questions.py reads the file; session.py is one person's walk through it, which page.html (by server.py) and terminal.py
show; verdicts.py keeps each verdict at once; rows.py makes rows of them, and agreement.py says how far people agree.
"""
