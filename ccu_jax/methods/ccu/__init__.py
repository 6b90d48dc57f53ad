"""CCU in the form of the paper, CCU+ (its closed-loop form), and their targets."""
