"""Search with a trained model: sentences find images, images find captions, on a page or without.

`cpfean.search.searcher.Searcher` is where to begin.
"""
