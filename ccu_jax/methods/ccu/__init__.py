"""CCU as in the paper, CCU+ (its closed-loop form), and the targets of CCU+."""
