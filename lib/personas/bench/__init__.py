"""A bench for methods that claim to find what a fine-tune made of a model: given what a researcher of a real
model would have, scored on what only the known world knows.

case.py: what a method is given. methods/: one file a method. truth.py and score.py: how it is scored.
run.py: all cases, and the table.
"""
