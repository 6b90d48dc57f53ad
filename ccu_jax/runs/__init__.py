"""What the stages of a run share: context, working folder, results and progress."""
