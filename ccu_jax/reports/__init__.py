"""Reports: findings, tables, the figure and the HTML page of a run."""
