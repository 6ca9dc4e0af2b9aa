"""What stands between `<!-- figures: NAME -->` and `<!-- end -->`, for `scripts/readme_figures.py`:
the text that a public function of that name returns, in one of these files.
"""
