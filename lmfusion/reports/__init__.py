"""Reports of evaluations, ablations and the demo: HTML and Markdown from templates, charts and picture grids."""
