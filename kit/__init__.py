"""The machinery of every training stage. Read it last: the algorithm does not need it."""
