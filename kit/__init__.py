"""What every stage of training stands on, and no learner needs first."""
