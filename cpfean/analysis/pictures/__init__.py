"""Pictures of what models see, and of where two of them differ.

sheet     a page measured in inches: texts that fit, boxes that cover as little as they can
pairs     an image and a caption: boxes by their gates, words by the gates that name them
ranks     the ranks of all queries by two models
queries   which pairs are drawn, and under which title and file name
"""
