"""Lessons: one step by hand, what each loss does to the gradient, changes to make."""
